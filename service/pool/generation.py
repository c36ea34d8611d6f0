"""One request to an engine as its consumer sees it: an unbroken run of outputs, whichever workers produce them.

A worker that dies takes nothing along: tokens depend on the request and its seed alone, so another worker, given the
same request, says the same again, and what the client already has is dropped here. Knows nothing of processes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from model.request import RequestOutput
from service.errors import BadRequest, EngineFailure, ServiceError
from service.pool.messages import Refused, Submit

if TYPE_CHECKING:
    from service.pool.supervisor import Death

log = logging.getLogger("flashserve.pool")

# An output with a finish_reason, or an error, is the last.
Event = RequestOutput | ServiceError


class Generation:
    def __init__(self, submit: Submit, deliver: Callable[[Event], None]) -> None:
        self.submit = submit
        self.finished = False
        self.attempts = 0  # workers it was sent to
        self.deaths: set[Death] = set()  # of workers that had it, which no other request is known to have caused
        self.text = ""  # delivered so far
        self._deliver = deliver
        self._ids: list[int] = []  # delivered so far
        self._replayed_ids = 0  # of these, said again by the present worker
        self._replayed_chars = 0

    @property
    def request_id(self) -> str:
        return self.submit.request_id

    def begin_attempt(self) -> None:
        self.attempts += 1
        self._replayed_ids = 0
        self._replayed_chars = 0

    def refuse(self, message: Refused) -> None:
        self.fail(BadRequest(message.message, param=message.param, code=message.code))

    def fail(self, error: ServiceError) -> None:
        if not self.finished:
            self.finished = True
            self._deliver(error)

    def feed(self, output: RequestOutput) -> None:
        """Take in what a worker said; deliver what of it is new."""
        if self.finished:
            return
        if output.finish_reason == "error":
            log.error("request %s failed in the engine: %s", self.request_id, output.error)
            self.fail(EngineFailure("the engine failed on this request"))
        elif output.finish_reason == "abort":
            self.fail(EngineFailure("the request was aborted", code="aborted"))
        elif len(self._ids) == self._replayed_ids and len(self.text) == self._replayed_chars:
            self._deliver_all(output)
        elif not self._repeats_itself(output):
            log.error("request %s: a second worker said something else", self.request_id)
            self.fail(EngineFailure("the answer could not be continued after a worker died", code="replay_diverged"))
        else:
            self._deliver_new(output)

    def _repeats_itself(self, output: RequestOutput) -> bool:
        ids = self._ids[self._replayed_ids :]
        text = self.text[self._replayed_chars : self._replayed_chars + len(output.text)]
        agreed = all(old == new.id for old, new in zip(ids, output.tokens, strict=False))
        return agreed and output.text.startswith(text)

    def _deliver_new(self, output: RequestOutput) -> None:
        #   delivered  |---------------------->|
        #   replayed   |------------->|                 before this output
        #   output                     |-------+-----|
        #                              known     new
        known_ids = len(self._ids) - self._replayed_ids
        known_chars = len(self.text) - self._replayed_chars
        new = replace(
            output,
            text=output.text[max(0, known_chars) :],
            tokens=output.tokens[max(0, known_ids) :],
            logprobs=output.logprobs and output.logprobs[max(0, known_ids) :],
        )
        self._replayed_ids += min(known_ids, len(output.tokens))
        self._replayed_chars += min(known_chars, len(output.text))
        self._deliver_all(new)

    def _deliver_all(self, output: RequestOutput) -> None:
        """What nobody has heard yet, from a worker that does not, or no longer, repeat another."""
        self._ids.extend(token.id for token in output.tokens)
        self.text += output.text
        self._replayed_ids += len(output.tokens)
        self._replayed_chars += len(output.text)
        self.finished = output.finish_reason is not None
        if output.tokens or output.text or self.finished:
            self._deliver(output)
