"""Capture the target's hidden states over prompts and answers; keep them in memory while they fit, never on disk."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from model.backends.attention import AttentionMetadata, MaskKind
from model.backends.kv_cache import KVCache
from model.config import EngineConfig
from model.decoding.grammar import Grammars
from model.drafters.checkpoint import Network
from model.drafters.eagle.network import EagleNetwork
from model.request import Message
from model.targets.base import Target
from model.targets.prompt import TokenizedPrompt
from model.train.data import Example


@dataclass(frozen=True)
class Seen:
    """Hold the captured states of one prompt and answer, in the target's dtype.

    aux_hidden_states: (positions, num_taps * hidden). embeds: (positions, hidden), the input embeddings; (0, hidden)
    for drafts that do not read them. taught: (answer tokens + 1, tokens offered), row i the log-probabilities that
    answer token i was chosen from: among all tokens, or among those that its grammar allowed. chosen: (answer tokens +
    1), false for a token that the grammar left no choice for, and which no draft has to find. ids: token ids of prompt
    and answer. prompt: without its media, whose pixels would take more memory than all the rest.
    """

    aux_hidden_states: Tensor
    embeds: Tensor
    taught: Tensor
    chosen: Tensor
    ids: list[int]
    prompt: TokenizedPrompt

    @property
    def num_bytes(self) -> int:
        """Return the memory of the captured tensors in bytes."""
        return self.aux_hidden_states.nbytes + self.embeds.nbytes + self.taught.nbytes


def capture(
    target: Target,
    prompts: list[TokenizedPrompt],
    answers: list[tuple[int, ...]],
    network: Network,
    allowed: Sequence[Tensor | None] | None = None,
) -> list[Seen]:
    """Run one causal pass over prompts and answers, padded on the right, and capture the states that this draft reads.

    allowed: for each answer the tokens that its grammar left for each of its tokens, (answer tokens + 1, vocab) bool;
    None where it had none. Returns one Seen for each prompt, in order.
    """
    ids = [p.ids + list(a) for p, a in zip(prompts, answers, strict=True)]
    width, batch = max(map(len, ids)), len(ids)
    cache = KVCache(
        layers=target.layers,
        num_slots=batch,
        capacity=width,
        margin=0,
        dtype=target.dtype,
        device=target.device,
        states=None if target.states is None else target.states.allocate(batch, saving=False),
    )
    tokens = torch.zeros(batch, width, dtype=torch.int64)
    positions, features = [], defaultdict(list)
    for b, prompt in enumerate(prompts):
        tokens[b, : len(ids[b])] = torch.tensor(ids[b])
        for medium in prompt.media:
            features[target.stream(medium.kind)].append(target.encode(medium, 0, target.pieces(medium)))
        for stream, embedded in _written(target, answers[b]).items():
            features[stream].append(embedded)
        places = target.positions(prompt)
        after = places[:, -1:] + 1 + np.arange(width - places.shape[1], dtype=np.int32)
        positions.append(np.concatenate((places, after), 1))
    counts = np.array([len(each) for each in ids], np.int32)
    rows = AttentionMetadata(cache, 0, width, np.zeros(batch, np.int32), counts, MaskKind.CAUSAL)
    encoded = {target.stream(medium.kind) for prompt in prompts for medium in prompt.media}
    joined = {stream: _joined(features[stream]) for stream in encoded}
    hidden, aux_hidden_states, embeds = target.forward(tokens.to(target.device), np.stack(positions, 1), rows, joined)
    seen = []
    for b, (each, prompt) in enumerate(zip(ids, prompts, strict=True)):
        first, end = len(prompt.ids) - 1, len(each)
        logits = target.logits(hidden[b, first:end]).float()
        chosen = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        if allowed is not None and (mask := allowed[b]) is not None:
            mask = mask.to(logits.device)
            logits, chosen = logits.masked_fill(~mask, -torch.inf), mask.sum(-1) > 1
        taught = logits.log_softmax(-1).to(target.dtype)
        if network.offered is not None:
            taught = taught[:, network.offered]
        read = end if isinstance(network, EagleNetwork) else 0
        kept = aux_hidden_states[b, :end].clone(), embeds[b, :read].clone()
        seen.append(Seen(*kept, taught, chosen, each, replace(prompt, media=())))
    return seen


def allowed_tokens(example: Example, grammars: Grammars, vocab_size: int) -> Tensor | None:
    """Follow an answer through its grammar: which tokens might have been chosen for each of its tokens, and behind it.

    Returns (answer tokens + 1, vocab) bool; None if the example has no grammar.
    """
    if example.grammar is None:
        return None
    guide = grammars.begin(example.grammar)
    rows = torch.ones(len(example.answer) + 1, vocab_size, dtype=torch.bool)
    for row, token in zip(rows, example.answer, strict=False):
        if (mask := guide.mask()) is not None:
            row.copy_(torch.from_numpy(mask))
        guide.advance(token)
    return rows


def grammars_of(target: Target) -> Grammars:
    """Return what compiles grammars for a target, with the limits that an engine has by default."""
    return Grammars(
        *(target.tokenizer, target.vocab_size, target.eos_ids),
        num_cached=EngineConfig.grammar_cache,
        max_symbols=EngineConfig.max_grammar_symbols,
    )


def _written(target: Target, answer: tuple[int, ...]) -> dict[str, Tensor]:
    """Return the embeddings of placeholders that an answer has, by stream: there they are tokens like any other."""
    counts = {stream: answer.count(token) for stream, token in target.placeholders.items()}
    return {
        stream: target.embed(torch.full((count,), target.placeholders[stream], device=target.device))
        for stream, count in counts.items()
        if count
    }


def _joined(parts: list[Tensor]) -> Tensor:
    """Join features, some of which lack the rows for inner layers beside them: (tokens, width)."""
    width = max(part.shape[-1] for part in parts)
    return torch.cat([F.pad(part, (0, width - part.shape[-1])) for part in parts])


class Memory:
    """Cache captured states of examples until `budget` bytes are used; later examples are captured again each time."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._captured: dict[int, Seen] = {}
        self._grammars: Grammars | None = None

    def seen(
        self,
        target: Target,
        batch: list[Example],
        messages: Callable[[int], tuple[Message, ...]],
        network: Network,
    ) -> list[Seen]:
        """Return the captured states of a batch in order, running the target only for examples that are not cached."""
        missing = [e for e in batch if e.number not in self._captured]
        fresh: dict[int, Seen] = {}
        if missing:
            prompts = [target.prompt(messages(e.number)) for e in missing]
            if self._grammars is None:
                self._grammars = grammars_of(target)
            allowed = [allowed_tokens(e, self._grammars, target.vocab_size) for e in missing]
            with torch.no_grad():
                captured = capture(target, prompts, [e.answer for e in missing], network, allowed)
            fresh = {e.number: seen for e, seen in zip(missing, captured, strict=True)}
        for number, seen in fresh.items():
            if seen.num_bytes <= self._budget:
                self._budget -= seen.num_bytes
                self._captured[number] = seen
        return [fresh.get(e.number) or self._captured[e.number] for e in batch]
