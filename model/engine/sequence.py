"""One request on its way through the engine. Counts tokens, not phases: computed against known; the rest is derived."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from model.decoding.detokenize import Detokenizer, StopStrings
from model.engine.prefix_cache import Contents
from model.request import FinishReason, Request, RequestStats
from model.targets.prompt import TokenizedPrompt


@dataclass(eq=False)
class Sequence:
    request: Request
    prompt: TokenizedPrompt
    detokenizer: Detokenizer
    stops: StopStrings
    arrived: float = field(default_factory=time.perf_counter)
    slot: int | None = None  # of the KV cache, once admitted
    embeds: Tensor | None = None  # (prompt tokens, hidden), once it has its slot, until prefilled
    positions: np.ndarray | None = None  # (axes, prompt tokens) int32, likewise
    next_position: int = 0  # position id of the first answer token
    seen: int = 0  # prompt positions whose media have been encoded
    cached: int = 0  # prompt tokens that were taken over from another sequence
    medium_key: bytes = b""  # the encoder cache's, of the medium that `seen` reaches into
    computed: int = 0  # tokens whose keys and values are held
    tokens: list[int] = field(default_factory=list)  # the answer so far
    started: float = 0.0  # when the first prefill chunk ran
    first_token: float = 0.0
    last_token: float = 0.0
    speculates: bool = False  # whether its drafter knows of it
    tries: int = 0  # rounds in which it drafted
    brought: float = 0.0  # accepted nodes of such a round, of late
    pause: int = 0  # rounds before it may draft again
    next_pause: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        params = self.request.params
        self.contents = Contents.of(self.prompt, self.request.salt)
        self.takes_likeliest = params.temperature == 0.0 and not params.processes

    @property
    def known(self) -> int:
        return len(self.prompt.ids) + len(self.tokens)

    @property
    def prefilling(self) -> bool:
        return self.computed < len(self.prompt.ids)

    @property
    def remaining(self) -> int:
        """Answer tokens it may still emit."""
        return self.request.params.max_tokens - len(self.tokens)

    def stats(self) -> RequestStats:
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
