"""Prepares requests and answers questions about the target in a thread of its own. Knows nothing of sockets.

Processors and tokenizers are not safe side by side, so it does one thing at a time. One picture may take seconds; so an
abort passes all that wait, and small requests pass large ones:

    rank = number of earlier arrivals + pixels / PIXELS_PER_PLACE
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

from model.request import Medium, Request, RequestError, RequestOutput, VideoMetadata
from service import cores
from service.pool import messages as m

PIXELS_PER_PLACE = 100_000  # for so many pixels one later request may pass

log = logging.getLogger("flashserve.worker")


class PreparingEngine(Protocol):
    """What is called on an engine here, by one thread."""

    def prepare(self, request: Request) -> Any: ...
    def sample_frames(self, source: VideoMetadata, num_frames: int | None, fps: float | None) -> list[int] | None: ...
    def tokenize(self, request: Request) -> list[int]: ...
    def token_names(self, ids: Sequence[int]) -> list[str]: ...
    def detokenize(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class PreparedRequest:
    """A request in the engine's own form, ready for `add`."""

    request_id: str
    sequence: Any


Rejection = m.Refused | m.Outputs  # ends a request that could not be prepared, or was aborted before


class Preparer:
    """Turns each Submit into a PreparedRequest or a Rejection, and each Question into a Reply."""

    def __init__(self, deliver: Callable[[PreparedRequest | Rejection | m.Reply], None]) -> None:
        """deliver: gets the results, in the preparer's thread."""
        self.engine: PreparingEngine | None = None  # set before any messages are sent
        self._deliver = deliver
        self._queue: queue.PriorityQueue[tuple[int, int, m.Question | str]] = queue.PriorityQueue()
        self._numbers = count()
        self._lock = threading.Lock()
        self._unprepared: dict[str, m.Submit | None] = {}  # by request id, until delivered; None: aborted
        threading.Thread(target=self._run, name="preparer", daemon=True).start()

    def add(self, message: m.Submit | m.Question) -> None:
        """Queue a request or a question."""
        number = next(self._numbers)
        if isinstance(message, m.Submit):
            with self._lock:
                self._unprepared[message.request_id] = message
            rank = number + _num_pixels(message) // PIXELS_PER_PLACE
            self._queue.put((rank, number, message.request_id))
        else:
            self._queue.put((number, number, message))

    def abort(self, request_id: str) -> bool:
        """Abort a request unless it has been delivered; return whether this did. Frees its media if it waits."""
        with self._lock:
            if request_id not in self._unprepared:
                return False
            self._unprepared[request_id] = None
            return True

    def _run(self) -> None:
        cores.set_batch_scheduling()
        while True:
            _, _, entry = self._queue.get()
            if isinstance(entry, str):
                self._prepare_and_deliver(entry)
            else:
                self._deliver(self._answer(entry))

    def _prepare_and_deliver(self, request_id: str) -> None:
        with self._lock:
            submit = self._unprepared[request_id]
        result = self._prepare(submit) if submit is not None else None
        with self._lock:  # so that an abort either finds the request here or comes after its delivery
            if self._unprepared.pop(request_id) is None or result is None:
                result = m.Outputs((RequestOutput(request_id, "", (), "abort"),))
            self._deliver(result)

    def _prepare(self, submit: m.Submit) -> PreparedRequest | Rejection:
        """Tokenize a request and lay out its prompt; return the message that ends it where that fails."""
        try:
            return PreparedRequest(submit.request_id, self._loaded_engine.prepare(submit.request))
        except RequestError as error:
            return m.Refused(submit.request_id, error.message, error.param, error.code)
        except Exception as error:
            # Templates and tokenizers read untrusted text here: an exception fails this request only.
            log.exception("request %s could not be prepared", submit.request_id)
            return m.Outputs((RequestOutput(submit.request_id, "", (), "error", error=repr(error)),))

    def _answer(self, question: m.Question) -> m.Reply:
        """Answer a question about the target: which frames of a video it wants, which tokens a text has."""
        try:
            return _answer(self._loaded_engine, question)
        except RequestError as error:
            return m.NotAnswered(question.number, error.message, error.param, error.code)
        except Exception:  # processors and tokenizers read what a client sent: an exception fails this request only
            log.exception("a question could not be answered: %.1000r", question)
            return m.NotAnswered(question.number, None)

    @property
    def _loaded_engine(self) -> PreparingEngine:
        if self.engine is None:
            raise RuntimeError("the engine is not loaded yet")
        return self.engine


def _answer(engine: PreparingEngine, question: m.Question) -> m.Reply:
    """Ask the engine. Raises RequestError, and what tokenizers and processors raise."""
    match question:
        case m.Sample():
            indices = engine.sample_frames(question.source, question.num_frames, question.fps)
            return m.Sampled(question.number, None if indices is None else tuple(map(int, indices)))
        case m.Tokenize():
            ids = engine.tokenize(question.request)
            return m.Tokenized(question.number, tuple(ids), tuple(engine.token_names(ids)))
        case m.Detokenize():
            return m.Detokenized(question.number, engine.detokenize(question.ids))


def _num_pixels(submit: m.Submit) -> int:
    media = (part for message in submit.messages for part in message.content if isinstance(part, Medium))
    return sum(medium.frames.size // 3 for medium in media)
