"""Says which tokens of a prompt see each other in both directions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from model.backends.kv_cache import Blocks
from model.targets.prompt import TokenizedPrompt


@dataclass(frozen=True)
class Rule:
    """Which tokens of a prompt see each other in both directions.

    who: "runs" for marked tokens that lie side by side, "media" for all marked tokens, "prompt" for all tokens; marked
    tokens are those that the processor says belong to media. blocks: see LayerShape.
    """

    who: Literal["runs", "media", "prompt"]
    blocks: Blocks

    def applied(self, prompt: TokenizedPrompt, marked: np.ndarray) -> TokenizedPrompt:
        """Return the prompt with its blocks. marked: (tokens,) bool."""
        if self.who == "prompt":
            return replace(prompt, blocks=((0, len(prompt.ids)),))
        at = np.flatnonzero(marked)
        if not len(at):
            return prompt
        if self.who == "media":
            first, last = int(at[0]), int(at[-1]) + 1
            return replace(prompt, blocks=((first, last),), outside=first + np.flatnonzero(~marked[first:last]))
        runs = np.split(at, np.flatnonzero(np.diff(at) > 1) + 1)
        return replace(prompt, blocks=tuple((int(run[0]), int(run[-1]) + 1) for run in runs))


RULES = [Rule(who, blocks) for who in ("runs", "media", "prompt") for blocks in ("whole", "window")]
