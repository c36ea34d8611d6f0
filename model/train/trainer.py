"""Trains a draft for a target. Embeddings and lm_head stay the target's; only the draft network learns.

The target reads prompt and answer once (hidden states captured on the fly, kept in memory while they fit, never on
disk); then tokens are drafted from many places of the answer at once, exactly as in serving. Every kind of draft learns
from the same examples, in the same order, at the same places, for as many steps.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from model.draft.checkpoint import Network
from model.request import Message
from model.targets.base import Target
from model.train.data import Example
from model.train.loss import draft_loss
from model.train.seen import Memory


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 1500
    batch: int = 16
    anchors: int = 24  # drafts begun per answer and step
    rate: float = 1.5e-3
    gamma: float = 5.0
    warmup: int = 50
    save_every: float = 45.0  # seconds
    autocast: bool = True
    memory_bytes: int = 6 << 30  # of hidden states kept for when an example comes up again


def train(
    target: Target,
    network: Network,
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
            loss, hits = draft_loss(target, network, seen, anchors=config.anchors, gamma=config.gamma, rng=rng)
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
