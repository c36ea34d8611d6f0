"""Describes one request on its way through the engine. Counts tokens, not phases: tokens computed against tokens known;
the rest is derived."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from model.decoding.detokenize import Detokenizer, StopStrings
from model.decoding.grammar import Guide
from model.engine.prefix_cache import Contents
from model.request import FinishReason, Request, RequestStats
from model.targets.prompt import TokenizedPrompt


@dataclass(eq=False)
class Sequence:
    """A request with its prompt, its answer so far and all that the engine keeps about it."""

    request: Request
    prompt: TokenizedPrompt
    detokenizer: Detokenizer
    stops: StopStrings
    guide: Guide | None = None  # where the answer follows a grammar
    arrived: float = field(default_factory=time.perf_counter)
    slot: int | None = None  # in the KV cache; None before prefill starts and after the end
    features: list[list[Tensor]] = field(default_factory=list)  # by medium, in pieces; in prefill only
    positions: np.ndarray | None = None  # (axes, prompt tokens) int32, during prefill only
    next_position: int = 0  # position id of the first answer token
    cached: int = 0  # prompt tokens found in the prefix cache
    medium_keys: dict[int, bytes] = field(default_factory=dict)  # encoder cache keys of the media that were looked up
    computed: int = 0  # tokens whose keys and values are in the KV cache
    tokens: list[int] = field(default_factory=list)  # the answer so far
    started: float = 0.0  # when the first prefill chunk ran
    first_token: float = 0.0
    last_token: float = 0.0
    speculates: bool = False  # whether the drafter knows this sequence
    tries: int = 0  # rounds in which it drafted
    brought: float = 0.0  # accepted draft nodes per such round, running mean
    pause: int = 0  # rounds before it may draft again
    next_pause: int = 0  # length of the latest pause, doubled each time
    drafts: int = 0  # verify steps with draft nodes
    draft_tokens: int = 0
    accepted_tokens: int = 0
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        params = self.request.params
        self.contents = Contents.of(self.prompt, self.request.salt)
        self.takes_likeliest = params.is_greedy

    @property
    def known(self) -> int:
        """Return the number of prompt and answer tokens so far."""
        return len(self.prompt.ids) + len(self.tokens)

    @property
    def prefilling(self) -> bool:
        """Return whether part of the prompt is still to be computed."""
        return self.computed < len(self.prompt.ids)

    @property
    def remaining(self) -> int:
        """Return how many more answer tokens it may emit."""
        return self.request.params.max_tokens - len(self.tokens)

    def stats(self) -> RequestStats:
        """Return its counts and times so far, in seconds."""
        return RequestStats(
            prompt_tokens=len(self.prompt.ids),
            completion_tokens=len(self.tokens),
            drafts=self.drafts,
            draft_tokens=self.draft_tokens,
            accepted_tokens=self.accepted_tokens,
            queue=max(0.0, self.started - self.arrived),
            time_to_first_token=max(0.0, self.first_token - self.arrived),
            decode=max(0.0, self.last_token - self.first_token),
            cached_tokens=self.cached,
        )
