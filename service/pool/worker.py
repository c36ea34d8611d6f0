"""The worker process: one engine, driven by messages from a socket.

    python -m service.pool.worker --fd N [--pixels N] [--engine module:callable]

Between two steps it takes in what has arrived and never waits; it waits only when the engine has nothing to do. It
knows nothing of HTTP. When the API process is gone it ends at once, whatever the engine is doing, even while stopped.

Exit codes: 0 told to stop; 1 the engine broke; 2 the model could not be loaded; 3 the API process vanished.
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
from dataclasses import dataclass
from typing import Any, Protocol

from model.errors import ConfigError
from model.request import EngineStats, Message, Request, RequestError, RequestOutput, SamplingParams
from service import cores
from service.pool import incoming
from service.pool import messages as m
from service.pool.arena import Shared
from service.pool.incoming import DraftRead, IncomingDraft

STATS_INTERVAL = 0.1
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
EXIT_ENGINE_BROKE, EXIT_LOAD_FAILED, EXIT_ORPHANED = 1, 2, 3

log = logging.getLogger("flashserve.worker")


@dataclass(frozen=True)
class Prepared:
    """A request that only waits to be added: the engine's own form of it."""

    request_id: str
    sequence: Any


Refusal = m.Refused | m.Outputs  # of one request, to be told to the API process
Arrived = m.ToWorker | Prepared | Refusal | DraftRead


class Engine(incoming.Engine, Protocol):
    """What a worker asks of an engine: `model.engine.engine.Engine`, or a stand-in for it in tests."""

    @property
    def has_work(self) -> bool: ...
    def prepare(self, request: Request) -> Any: ...
    def add(self, request: Any) -> None: ...
    def abort(self, request_id: str) -> RequestOutput | None: ...
    def step(self) -> list[RequestOutput]: ...
    def pop_stats(self) -> EngineStats: ...


def load_engine(options: dict[str, Any]) -> Engine:
    from model.config import EngineConfig
    from model.engine.engine import Engine as RealEngine

    engine: Engine = RealEngine(EngineConfig(**options, share_cores=True))
    return engine


class Link:
    """The worker's end of the socket: a thread receives, so that large media arrive while the engine computes, and
    prepares the requests that came, so that the engine need not between two steps."""

    def __init__(self, sock: socket.socket, shared: Shared | None = None) -> None:
        """shared: where pixels lie that are not sent along."""
        self.engine: Engine | None = None  # that prepares them; nobody sends any before it is there
        self._sock = sock
        self._decoder = m.to_worker(shared)
        self._inbox: queue.SimpleQueue[Arrived] = queue.SimpleQueue()
        self._unsent: deque[memoryview] = deque()
        self._stopping = False
        threading.Thread(target=self._receive_forever, name="link", daemon=True).start()

    def receive(self, *, wait: bool) -> Iterator[Arrived]:
        """All messages that are here; with `wait`, at least one, unless bytes are still to be sent."""
        try:
            if wait:
                yield self._inbox.get(timeout=0.01 if self._unsent else None)
            while True:
                yield self._inbox.get_nowait()
        except queue.Empty:
            return

    def put(self, read: DraftRead) -> None:
        """As if it had arrived: from another thread of this process, to wake the one that receives."""
        self._inbox.put(read)

    def send(self, message: m.FromWorker) -> None:
        self._unsent.append(memoryview(m.frame(message)))
        self.flush()

    def flush(self) -> None:
        """Send what the socket takes without waiting; the rest stays for the next call."""
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
        cores.give_way()
        try:
            while (payload := m.receive_frame(self._sock)) is not None:
                message = self._decoder.decode(payload)
                self._stopping |= isinstance(message, m.Stop)
                self._inbox.put(self._prepared(message) if isinstance(message, m.Submit) else message)
        except OSError:
            pass
        except Exception:  # a deaf worker is worse than a dead one
            log.exception("the API process does not speak our language")
        # Nobody is left to serve. The main thread may be loading or computing for minutes: do not wait for it.
        os._exit(0 if self._stopping else EXIT_ORPHANED)

    def _prepared(self, submit: m.Submit) -> Prepared | Refusal:
        try:
            if self.engine is None:
                raise RuntimeError("the engine is not loaded yet")
            return Prepared(submit.request_id, self.engine.prepare(submit.request))
        except RequestError as error:
            return m.Refused(submit.request_id, error.message, error.param, error.code)
        except Exception as error:
            # Templates and tokenizers meet strangers' text here: what they choke on is that request's own failure.
            log.exception("request %s could not be taken in", submit.request_id)
            return m.Outputs((RequestOutput(submit.request_id, "", (), "error", error=repr(error)),))


def serve(engine: Engine, link: Link) -> None:
    """Step the engine whenever it has work, until told to stop."""
    live: set[str] = set()  # taken in, no terminal message sent yet
    stats = StatsReport(engine, link)
    draft = IncomingDraft(engine, link.put, link.send)
    while True:
        for message in link.receive(wait=not engine.has_work and not stats.owed):
            stats.owed = True
            if isinstance(message, Prepared):
                engine.add(message.sequence)
                live.add(message.request_id)
            elif isinstance(message, m.Refused | m.Outputs):
                link.send(message)
            elif isinstance(message, m.Abort) and message.request_id in live:
                last = engine.abort(message.request_id) or RequestOutput(message.request_id, "", (), "abort")
                live.discard(message.request_id)
                link.send(m.Outputs((last,)))
            elif isinstance(message, m.ReadDraft):
                draft.read(message)
            elif isinstance(message, DraftRead):
                draft.take(message)
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
            stats.owed = True
        stats.send_when_due()
        link.flush()


class StatsReport:
    """Sends what the engine counted: every STATS_INTERVAL while it works, and once more when it falls idle."""

    def __init__(self, engine: Engine, link: Link) -> None:
        self._engine = engine
        self._link = link
        self._sent_at = 0.0
        self.owed = True

    def send_when_due(self) -> None:
        now = time.monotonic()
        if self.owed and (not self._engine.has_work or now - self._sent_at >= STATS_INTERVAL):
            self._link.send(m.Stats(self._engine.pop_stats()))
            self._sent_at = now
            self.owed = self._engine.has_work


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="service.pool.worker", description=__doc__)
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--pixels", type=int, help="file descriptor of the memory in which media lie")
    parser.add_argument("--engine", default="service.pool.worker:load_engine")
    arguments = parser.parse_args(argv)
    end_with_parent()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    # A signal to the whole process group must not break running answers: the API process decides when to stop us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    cores.take_part()
    shared = None if arguments.pixels is None else Shared(arguments.pixels)
    link = Link(socket.socket(fileno=arguments.fd), shared)
    load = next(link.receive(wait=True))
    try:
        if not isinstance(load, m.Load):
            raise TypeError(f"the first message must be Load, not {load}")
        engine = _factory(arguments.engine)(load.options)
        if load.check:
            check(engine)
    except ConfigError as error:  # a setting's: it says all that there is to say
        log.error("loading failed: %s", error)
        link.send(m.LoadFailed(str(error)))
        return EXIT_LOAD_FAILED
    except Exception as error:
        log.exception("loading failed")
        link.send(m.LoadFailed(f"{type(error).__name__}: {error}"))
        return EXIT_LOAD_FAILED
    link.engine = engine
    gc.freeze()  # model and libraries stay: walking through all of it takes as long as many steps
    link.send(m.Ready(engine.info))
    try:
        serve(engine, link)
    except Exception:
        log.exception("the engine broke")
        return EXIT_ENGINE_BROKE
    return 0


def check(engine: Engine) -> None:
    """Have the engine read a prompt and decode a token. Raises what it raises, and RuntimeError where it fails."""
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    request = Request("check", (Message("user", ("Hello",)),), params, speculation=False, salt="check", fit=True)
    try:
        engine.add(engine.prepare(request))
    except RequestError:  # a model that takes no text alone: it is loaded, and that has to do
        return
    num_tokens = 0
    while engine.has_work and num_tokens < 2:
        for output in engine.step():
            if output.finish_reason == "error":
                raise RuntimeError(f"the engine fails on a request of our own: {output.error}")
            num_tokens += len(output.tokens)
    engine.abort("check")  # not finished: what answers are like is not to be learnt from it
    engine.pop_stats()


def end_with_parent() -> None:
    """Have the kernel kill this process when the API process ends: one that is stopped cannot see its socket close."""
    with contextlib.suppress(AttributeError):  # Linux only
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _factory(dotted: str) -> Callable[[dict[str, Any]], Engine]:
    module, _, name = dotted.partition(":")
    factory: Callable[[dict[str, Any]], Engine] = getattr(importlib.import_module(module), name)
    return factory


if __name__ == "__main__":
    # Not sys.exit: a daemon thread that still reads the socket must not delay or disturb the end.
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
