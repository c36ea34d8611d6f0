"""The worker process: run one engine, driven by messages from a socket.

    python -m service.pool.worker --fd N [--pixels N] [--engine module:callable]

Between two engine steps it handles the messages that have arrived, without waiting; it waits only while the engine is
idle. When the API process ends, the worker ends at once, whatever the engine is doing. Knows nothing of HTTP.

Exit codes: 0 stopped by the API; 1 the engine failed; 2 the model could not be loaded; 3 the API process is gone.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from model.errors import ConfigError
from model.request import EngineStats, Message, Request, RequestError, RequestOutput, SamplingParams
from service import cores
from service.pool import messages as m
from service.pool.arena import ArenaReader
from service.pool.draft_loader import DraftLoader, DraftRead, SwappableEngine
from service.pool.preparer import PreparedRequest, Preparer, PreparingEngine, Rejection

STATS_INTERVAL = 0.1  # seconds
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
EXIT_ENGINE_FAILED, EXIT_LOAD_FAILED, EXIT_ORPHANED = 1, 2, 3

log = logging.getLogger("flashserve.worker")

Event = m.ToWorker | PreparedRequest | Rejection | m.Reply | DraftRead


class EngineProtocol(SwappableEngine, PreparingEngine, Protocol):
    """What a worker calls on an engine: `model.engine.engine.Engine`, or a fake one in tests."""

    @property
    def has_work(self) -> bool: ...
    def add(self, request: Any) -> None: ...
    def abort(self, request_id: str) -> RequestOutput | None: ...
    def step(self) -> list[RequestOutput]: ...
    def pop_stats(self) -> EngineStats: ...


def load_engine(options: dict[str, Any]) -> EngineProtocol:
    """Load the real engine. The default of `--engine`."""
    from model.config import EngineConfig
    from model.engine.engine import Engine

    engine: EngineProtocol = Engine(EngineConfig(**options, share_cores=True))
    return engine


class Link:
    """The worker's end of the socket. A thread receives messages while the engine computes, and passes requests and
    questions to the preparer."""

    def __init__(self, sock: socket.socket, arena: ArenaReader | None = None) -> None:
        """arena: holds the pixels that messages refer to."""
        self._sock = sock
        self._decoder = m.to_worker(arena)
        self._inbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.preparer = Preparer(self._inbox.put)
        self._unsent: deque[memoryview] = deque()
        self._stopping = False
        threading.Thread(target=self._receive_forever, name="link", daemon=True).start()

    def receive(self, *, wait: bool) -> Iterator[Event]:
        """Yield all events that have arrived; with `wait`, wait for one unless bytes are still to be sent."""
        try:
            if wait:
                yield self._inbox.get(timeout=0.01 if self._unsent else None)
            while True:
                yield self._inbox.get_nowait()
        except queue.Empty:
            return

    def put(self, read: DraftRead) -> None:
        """Add an event from another thread of this process; it wakes `receive`."""
        self._inbox.put(read)

    def send(self, message: m.FromWorker) -> None:
        """Send a message without waiting."""
        self._unsent.append(memoryview(m.frame(message)))
        self.flush()

    def flush(self) -> None:
        """Send what the socket accepts without waiting; keep the rest for the next call."""
        while self._unsent:
            try:
                sent = self._sock.send(self._unsent[0], socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError:
                os._exit(EXIT_ORPHANED)
            if sent == len(self._unsent[0]):
                self._unsent.popleft()
            else:
                self._unsent[0] = self._unsent[0][sent:]

    def _receive_forever(self) -> None:
        """Receive messages until the socket closes, then end the process."""
        cores.set_batch_scheduling()
        try:
            while (payload := m.receive_frame(self._sock)) is not None:
                message = self._decoder.decode(payload)
                self._stopping |= isinstance(message, m.Stop)
                if isinstance(message, m.Submit | m.Question):
                    self.preparer.add(message)
                elif not (isinstance(message, m.Abort) and self.preparer.abort(message.request_id)):
                    self._inbox.put(message)
        except OSError:
            pass
        except Exception:  # a worker that receives nothing more is worse than a dead one
            log.exception("the API process sent an invalid message")
        # The API process is gone. The main thread may be loading or computing for minutes: do not wait for it.
        os._exit(0 if self._stopping else EXIT_ORPHANED)


def serve(engine: EngineProtocol, link: Link) -> None:
    """Handle messages and step the engine until the API sends Stop."""
    live: set[str] = set()  # requests in the engine, no terminal message sent yet
    stats = StatsReporter(engine, link)
    draft = DraftLoader(engine, link.put, link.send)
    while True:
        for message in link.receive(wait=not engine.has_work and not stats.due):
            stats.due = True
            if isinstance(message, PreparedRequest):
                engine.add(message.sequence)
                live.add(message.request_id)
            elif isinstance(message, m.Refused | m.Outputs | m.Reply):
                link.send(message)
            elif isinstance(message, m.Abort) and message.request_id in live:
                last = engine.abort(message.request_id) or RequestOutput(message.request_id, "", (), "abort")
                live.discard(message.request_id)
                link.send(m.Outputs((last,)))
            elif isinstance(message, m.ReadDraft):
                draft.read(message)
            elif isinstance(message, DraftRead):
                draft.pack(message)
            elif isinstance(message, m.UseDraft):
                draft.use(message)
            elif isinstance(message, m.DropDraft):
                draft.drop(message)
            elif isinstance(message, m.Stop):
                return
        if engine.has_work:
            outputs = tuple(output for output in engine.step() if output.request_id in live)
            live.difference_update(output.request_id for output in outputs if output.finish_reason)
            if outputs:
                link.send(m.Outputs(outputs))
            stats.due = True
        stats.send_when_due()
        link.flush()


class StatsReporter:
    """Sends the engine's statistics every STATS_INTERVAL while it works, and once when it becomes idle."""

    def __init__(self, engine: EngineProtocol, link: Link) -> None:
        self.due = True  # something happened since the last report
        self._engine = engine
        self._link = link
        self._sent_at = 0.0

    def send_when_due(self) -> None:
        now = time.monotonic()
        if self.due and (not self._engine.has_work or now - self._sent_at >= STATS_INTERVAL):
            self._link.send(m.Stats(self._engine.pop_stats()))
            self._sent_at = now
            self.due = self._engine.has_work


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="service.pool.worker", description=__doc__)
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--pixels", type=int, help="file descriptor of the shared memory that holds decoded media")
    parser.add_argument("--engine", default="service.pool.worker:load_engine")
    arguments = parser.parse_args(argv)
    end_with_parent()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    # A signal to the whole process group must not end running requests: the API process decides when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    cores.set_normal_scheduling()
    arena = None if arguments.pixels is None else ArenaReader(arguments.pixels)
    link = Link(socket.socket(fileno=arguments.fd), arena)
    load = next(link.receive(wait=True))
    try:
        if not isinstance(load, m.Load):
            raise TypeError(f"the first message must be Load, not {load}")
        engine = _import_factory(arguments.engine)(load.options)
        if load.self_test:
            self_test(engine)
    except ConfigError as error:  # its message says which setting is wrong; no traceback needed
        log.error("loading failed: %s", error)
        link.send(m.LoadFailed(str(error)))
        return EXIT_LOAD_FAILED
    except Exception as error:
        log.exception("loading failed")
        link.send(m.LoadFailed(f"{type(error).__name__}: {error}"))
        return EXIT_LOAD_FAILED
    link.preparer.engine = engine
    gc.freeze()  # keeps model and libraries out of collections, which would take as long as many steps
    link.send(m.Ready(engine.info))
    try:
        serve(engine, link)
    except Exception:
        log.exception("the engine failed")
        return EXIT_ENGINE_FAILED
    return 0


def self_test(engine: EngineProtocol) -> None:
    """Decode two tokens of a short prompt. Raises what the engine raises, and RuntimeError where the request fails."""
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    request = Request(
        "self-test", (Message("user", ("Hello",)),), params, speculation=False, salt="self-test", clamp_max_tokens=True
    )
    try:
        engine.add(engine.prepare(request))
    except RequestError:  # the model takes no prompt without media: accept that it has loaded
        return
    num_tokens = 0
    while engine.has_work and num_tokens < 2:
        for output in engine.step():
            if output.finish_reason == "error":
                raise RuntimeError(f"the engine failed its self-test: {output.error}")
            num_tokens += len(output.tokens)
    engine.abort("self-test")  # before it finishes, so that no statistics of finished answers include it
    engine.pop_stats()


def end_with_parent() -> None:
    """Have the kernel kill this process when the API process ends; a stopped process cannot see its socket close."""
    with contextlib.suppress(AttributeError):  # Linux only
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _import_factory(dotted: str) -> Callable[[dict[str, Any]], EngineProtocol]:
    """Import "module:callable"."""
    module, _, name = dotted.partition(":")
    factory: Callable[[dict[str, Any]], EngineProtocol] = getattr(importlib.import_module(module), name)
    return factory


if __name__ == "__main__":
    # os._exit instead of sys.exit: the daemon thread that still reads the socket must not delay the end.
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
