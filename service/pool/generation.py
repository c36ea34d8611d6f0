"""One request as its consumer sees it: a continuous stream of outputs, whichever workers produce them.

Tokens depend only on the request and its seed. So when a worker dies, another one replays the request from its start,
and this module drops what the consumer already has. Knows nothing of processes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from model.request import RequestOutput
from service.errors import BadRequest, EngineFailure, ServiceError
from service.pool.messages import Refused, Submit
from service.pool.supervisor import Death

log = logging.getLogger("flashserve.pool")

Event = RequestOutput | ServiceError  # an output with a finish_reason, or an error, is the last event


class Generation:
    """A request that workers decode, with what was delivered of it so far."""

    def __init__(self, submit: Submit, deliver: Callable[[Event], None]) -> None:
        self.submit = submit
        self.finished = False
        self.attempts = 0  # how often it was sent to a worker
        self.deaths: set[Death] = set()  # of workers that were decoding it, unless another request was at fault
        self.text = ""  # delivered so far
        self._deliver = deliver
        self._ids: list[int] = []  # token ids delivered so far
        self._replayed_ids = 0  # of these, how many the present worker has repeated
        self._replayed_chars = 0

    @property
    def request_id(self) -> str:
        return self.submit.request_id

    def begin_attempt(self) -> None:
        """Expect a worker to replay the request from its start."""
        self.attempts += 1
        self._replayed_ids = 0
        self._replayed_chars = 0

    def refuse(self, message: Refused) -> None:
        """End with the engine's refusal, as a 400."""
        self.fail(BadRequest(message.message, param=message.param, code=message.code))

    def fail(self, error: ServiceError) -> None:
        """Deliver an error as the last event, unless it has ended already."""
        if not self.finished:
            self.finished = True
            self._deliver(error)

    def feed(self, output: RequestOutput) -> None:
        """Deliver the new part of a worker's output; fail where it differs from what was delivered before."""
        if self.finished:
            return
        if output.finish_reason == "error":
            log.error("request %s failed in the engine: %s", self.request_id, output.error)
            self.fail(EngineFailure("the engine failed on this request"))
        elif output.finish_reason == "abort":
            self.fail(EngineFailure("the request was aborted", code="aborted"))
        elif len(self._ids) == self._replayed_ids and len(self.text) == self._replayed_chars:
            self._deliver_all(output)
        elif not self._matches_delivered(output):
            log.error("request %s: the replay on another worker differs from what was delivered", self.request_id)
            self.fail(EngineFailure("the answer could not be continued after a worker died", code="replay_diverged"))
        else:
            self._deliver_new(output)

    def _matches_delivered(self, output: RequestOutput) -> bool:
        """Compare a replayed output with the tokens and text delivered before."""
        ids = self._ids[self._replayed_ids :]
        text = self.text[self._replayed_chars : self._replayed_chars + len(output.text)]
        same_ids = all(old == new.id for old, new in zip(ids, output.tokens, strict=False))
        return same_ids and output.text.startswith(text)

    def _deliver_new(self, output: RequestOutput) -> None:
        """Cut off what was delivered before, and deliver the rest."""
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
        """Deliver an output of which nothing was delivered before."""
        self._ids.extend(token.id for token in output.tokens)
        self.text += output.text
        self._replayed_ids += len(output.tokens)
        self._replayed_chars += len(output.text)
        self.finished = output.finish_reason is not None
        if output.tokens or output.text or self.finished:
            self._deliver(output)
