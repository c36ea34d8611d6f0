"""Trains a FLASH draft for a target. Embeddings and lm_head stay the target's; only the draft network learns.

The target reads prompt and answer once (hidden states captured on the fly, kept in memory while they fit, never on
disk); then blocks are drafted from many places of the answer at once, each seeing the context before it and itself,
exactly as in serving.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from model.attention import Rows, Sight
from model.draft.network import DraftNetwork
from model.kv_cache import KVCache
from model.request import Message
from model.targets.base import Prompt, Target
from model.train.data import Example
from model.train.loss import block_loss


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 1500
    batch: int = 16
    anchors: int = 24  # blocks drafted per answer and step
    rate: float = 1.5e-3
    gamma: float = 5.0
    warmup: int = 50
    save_every: float = 45.0  # seconds
    autocast: bool = True
    memory_bytes: int = 6 << 30  # of hidden states kept for when an example comes up again


@dataclass(frozen=True)
class Seen:
    """One prompt and answer as the target saw them, in its dtype.

    taps: (positions, num_taps * hidden); taught: (answer tokens + 1, vocab), row i the logits from which answer token i
    came; ids: prompt and answer.
    """

    taps: Tensor
    taught: Tensor
    ids: list[int]
    prompt: Prompt

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.taps, self.taught))


def capture(target: Target, prompts: list[Prompt], answers: list[tuple[int, ...]]) -> list[Seen]:
    """One causal pass of the target over prompts and answers, padded on the right."""
    ids = [p.ids + list(a) for p, a in zip(prompts, answers, strict=True)]
    width, batch = max(map(len, ids)), len(ids)
    cache = KVCache(
        num_layers=target.num_layers,
        num_slots=batch,
        num_heads=target.num_kv_heads,
        head_dim=target.head_dim,
        capacity=width,
        margin=0,
        dtype=target.dtype,
        device=target.device,
    )
    embeds = torch.zeros(batch, width, target.hidden_size, dtype=target.dtype, device=target.device)
    positions = []
    for b, prompt in enumerate(prompts):
        embeds[b, : len(ids[b])] = target.embed(torch.tensor(ids[b], device=target.device))
        for medium, (start, end) in zip(prompt.media, prompt.spans, strict=True):
            embeds[b, start:end] = target.encode(medium, 0, target.pieces(medium))
        places = target.positions(prompt)
        after = places[:, -1:] + 1 + np.arange(width - places.shape[1], dtype=np.int32)
        positions.append(np.concatenate((places, after), 1))
    counts = np.array([len(each) for each in ids], np.int32)
    rows = Rows(cache, 0, width, np.zeros(batch, np.int32), counts, Sight.CAUSAL)
    hidden, taps = target.forward(embeds, np.stack(positions, 1), rows)
    seen = []
    for b, (each, prompt) in enumerate(zip(ids, prompts, strict=True)):
        first = len(prompt.ids) - 1
        seen.append(
            Seen(taps[b, : len(each)].clone(), target.logits(hidden[b, first : len(each)]).clone(), each, prompt)
        )
    return seen


class Memory:
    """Hidden states of examples already seen, while they fit; the rest is computed anew each time."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._held: dict[int, Seen] = {}

    def seen(self, target: Target, batch: list[Example], messages: Callable[[int], tuple[Message, ...]]) -> list[Seen]:
        missing = [e for e in batch if e.number not in self._held]
        fresh: dict[int, Seen] = {}
        if missing:
            prompts = [target.prompt(messages(e.number)) for e in missing]
            with torch.no_grad():
                captured = capture(target, prompts, [e.answer for e in missing])
            fresh = {e.number: seen for e, seen in zip(missing, captured, strict=True)}
        for number, seen in fresh.items():
            if seen.num_bytes <= self._budget:
                self._budget -= seen.num_bytes
                self._held[number] = seen
        return [fresh.get(e.number) or self._held[e.number] for e in batch]


def context_of(network: DraftNetwork, taps: Tensor, prompt: Prompt) -> tuple[Tensor, list[int]]:
    """The draft's context of one sequence: its rows (rows, hidden); for each position, how many rows lie before it."""
    fused = network.fuse(taps)
    rows: list[Tensor] = []
    index: list[int] = []
    at = count = 0
    for start, end in prompt.spans:
        rows.append(fused[at:start])
        index += range(count, count + start - at)
        count += start - at
        if network.compressor is not None:
            rows.append(network.compressor(fused[None, start:end])[0])
            count += len(rows[-1])
        index += [count] * (end - start)
        at = end
    rows.append(fused[at:])
    index += range(count, count + len(fused) - at)
    return torch.cat(rows), index


def draft_loss(
    target: Target, network: DraftNetwork, seen: list[Seen], config: TrainConfig, rng: random.Random
) -> tuple[Tensor, Tensor]:
    """Draft `anchors` blocks per answer at random places; the loss, and hits per position."""
    block, batch = network.config.block, len(seen)
    contexts, newest, before, labels, taught = [], [], [], [], []
    for each in seen:
        ids = each.ids
        context, index = context_of(network, each.taps.float(), each.prompt)
        contexts.append(context)
        first, last = len(each.prompt.ids), len(ids) - 2  # the newest token of a block is any answer token but the last
        places = [rng.randint(first, max(first, last)) for _ in range(config.anchors)]
        for p in places:
            newest.append(ids[p])
            before.append(index[p])
            wanted = [ids[p + 1 + j] if p + 1 + j < len(ids) else -100 for j in range(block)]
            labels.append(wanted)
            taught.append(each.taught[[min(p + j, len(ids) - 1) - first + 1 for j in range(block)]])
    longest = max(map(len, contexts))
    context = torch.stack([F.pad(c, (0, 0, 0, longest - len(c))) for c in contexts])
    device = context.device
    newest_ids = torch.tensor(newest, device=device).view(batch, -1)
    starts = torch.tensor(before, device=device).view(batch, -1)  # (batch, anchors)
    label = torch.tensor(labels, device=device)  # (batch * anchors, block)

    kept = network.context_keys_values(context, torch.arange(longest, device=device).expand(batch, -1))
    rows = starts.shape[1] * block
    owner = torch.arange(rows, device=device) // block
    sees_context = torch.arange(longest, device=device) < starts.repeat_interleave(block, 1)[:, :, None]
    sees_block = (owner[:, None] == owner[None, :]).expand(batch, -1, -1)
    mask = torch.cat((sees_context, sees_block), -1)[:, None]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = kept[layer]
        return F.scaled_dot_product_attention(q, torch.cat((keys, k), 2), torch.cat((values, v), 2), attn_mask=mask)

    hidden = network.block_hidden(target.embed(newest_ids).float(), starts, attend)
    drafted = target.logits(hidden.to(target.dtype)).flatten(0, 1)
    if network.sequential is not None:
        previous = torch.cat((newest_ids.flatten()[:, None], label[:, :-1].clamp_min(0)), 1)
        drafted = drafted + network.sequential(previous)
    return block_loss(drafted.float(), torch.stack(taught).float(), label, gamma=config.gamma)


def train(
    target: Target,
    network: DraftNetwork,
    examples: list[Example],
    messages: Callable[[int], tuple[Message, ...]],
    config: TrainConfig,
    file: Path,
    group: Callable[[int], object],
) -> None:
    """Train in place, resuming from `file` if it is there. Examples of one batch are of one `group(number)`."""
    optimiser = torch.optim.AdamW(network.parameters(), lr=config.rate, weight_decay=0.02, betas=(0.9, 0.98))
    step = 0
    if file.exists():
        saved = torch.load(file, weights_only=True)
        network.load_state_dict(saved["network"])
        optimiser.load_state_dict(saved["optimiser"])
        step = saved["step"]
    groups: dict[object, list[Example]] = {}
    for example in examples:
        if len(example.answer) > 2:
            groups.setdefault(group(example.number), []).append(example)
    names = sorted(groups, key=str)
    memory = Memory(config.memory_bytes)
    begun, first, saved_at = time.time(), step, time.time()
    while step < config.steps:
        rng = random.Random(step)
        chosen = groups[rng.choices(names, [len(groups[n]) for n in names])[0]]
        batch = rng.sample(chosen, min(config.batch, len(chosen)))
        for setting in optimiser.param_groups:
            setting["lr"] = (
                config.rate
                * min(1.0, (step + 1) / config.warmup)
                * (0.51 + 0.49 * math.cos(math.pi * step / config.steps))
            )
        seen = memory.seen(target, batch, messages)
        with torch.autocast(target.device.type, torch.bfloat16, enabled=config.autocast):
            loss, hits = draft_loss(target, network, seen, config, rng)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        step += 1
        if step % 20 == 0:
            pace = (time.time() - begun) / (step - first)
            hit = " ".join(f"{h:.2f}" for h in hits.tolist())
            print(f"draft {step}/{config.steps} loss {loss.item():.3f} hits {hit} ({pace:.2f} s/step)", flush=True)
        if time.time() - saved_at > config.save_every or step == config.steps:
            saved_at = time.time()
            scratch = file.with_suffix(".tmp")
            torch.save({"network": network.state_dict(), "optimiser": optimiser.state_dict(), "step": step}, scratch)
            scratch.replace(file)
