"""Trains a draft for a target. Embeddings and lm_head stay the target's; only the draft network learns.

The target reads prompt and answer once (hidden states captured on the fly, kept in memory while they fit, never on
disk); then tokens are drafted from many places of the answer at once, exactly as in serving. Every kind of draft learns
from the same examples, in the same order, at the same places, for as many steps.

Batches follow from the number of the step alone. So a training that was killed ends where it would have ended, and one
of two processes ends where one of twice the accumulation does.
"""

from __future__ import annotations

import math
import os
import random
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from model.drafters.checkpoint import Network
from model.request import Message
from model.targets.base import Target
from model.train.data import Example, Interrupted
from model.train.loss import Learner, draft_loss
from model.train.seen import Memory
from model.train.team import Alone, Team

Row = dict[str, Any]  # of the history: "step" and either "loss", "hits", "rate" or "acceptance"


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 1500
    batch: int = 16  # examples that go through the target together
    accumulate: int = 1  # such batches per step and process
    anchors: int = 24  # drafts begun per answer and step
    rate: float = 1.5e-3
    gamma: float = 5.0
    warmup: int = 50
    seed: int = 0
    save_every: float = 45.0  # seconds
    evaluate_every: int = 0  # steps; 0: never
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
    *,
    team: Team | None = None,
    memory: Memory | None = None,
    evaluate: Callable[[int], dict[str, Any] | None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
) -> list[Row]:
    """Train in place, resuming from `file` if it is there. Examples of one batch are of one `group(number)`.

    memory: of what the target gave for these examples, where several trainings share it. evaluate: what is to be
    measured after so many steps, called in the first process. Returns the history. Raises Interrupted, all being saved,
    at the end of the step in which `stop` came true in any process.
    """
    # Under autocast a norm's weights stay float32, as they should; torch says once that it is slower so.
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    team = team or Alone()
    state = State(network, config.rate, file)
    state.load()
    team.wait()  # nobody saves before all have loaded
    learner = Learner(target, network)
    batches = Batches(examples, config, team, group)
    memory = memory or Memory(config.memory_bytes)
    bar = tqdm(total=config.steps, initial=state.step, desc="draft", unit="step", disable=team.rank > 0, mininterval=1)
    acceptance: dict[str, Any] = {}
    saved_at = time.monotonic()
    with bar:
        while True:
            if team.rank == 0 and state.evaluation_is_due(config):
                state.save()  # measuring takes a while, too
                measured = evaluate(state.step)
                if measured is not None:
                    state.history.append({"step": state.step, "acceptance": measured})
                    acceptance = {"acceptance": measured.get("length")}
                state.save()
                saved_at = time.monotonic()
            if state.step >= config.steps:
                return state.history
            rate = rate_at(state.step, config)
            for setting in state.optimiser.param_groups:
                setting["lr"] = rate
            state.optimiser.zero_grad()
            losses: list[Tensor] = []
            for batch, rng in batches.of(state.step):
                seen = memory.seen(target, batch, messages, network)
                with torch.autocast(target.device.type, torch.bfloat16, enabled=config.autocast):
                    loss, hits = draft_loss(learner, seen, anchors=config.anchors, gamma=config.gamma, rng=rng)
                (loss / config.accumulate).backward()
                losses.append(torch.cat((loss.detach().float()[None], hits.detach().float())))
            stopping = torch.tensor([float(stop())], device=target.device)
            mean = share(network, torch.cat((torch.stack(losses).mean(0), stopping)), team).tolist()
            if not math.isfinite(mean[0]):
                raise FloatingPointError(f"the loss is {mean[0]} at step {state.step}; try a lower rate")
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            state.optimiser.step()
            state.step += 1
            state.history.append({"step": state.step, "loss": mean[0], "hits": mean[1:-1], "rate": rate})
            bar.update()
            bar.set_postfix(
                {"loss": f"{mean[0]:.3f}", "hits": " ".join(f"{h:.2f}" for h in mean[1:-1])} | acceptance, refresh=False
            )
            last = state.step == config.steps or mean[-1] > 0
            if team.rank == 0 and (last or time.monotonic() - saved_at > config.save_every):
                state.save()
                saved_at = time.monotonic()
            if mean[-1] > 0:
                raise Interrupted


def rate_at(step: int, config: TrainConfig) -> float:
    """Of learning: a short rise, then half a cosine down to a fiftieth."""
    rise = min(1.0, (step + 1) / config.warmup)
    return config.rate * rise * (0.51 + 0.49 * math.cos(math.pi * step / config.steps))


def share(network: nn.Module, losses: Tensor, team: Team) -> Tensor:
    """Average gradients over the team, in place, and with them what each of it has to tell."""
    if team.size == 1:
        return losses
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in network.parameters()]
    mean = team.average(torch.cat([*(g.flatten() for g in gradients), losses]))
    at = 0
    for parameter in network.parameters():
        parameter.grad = mean[at : at + parameter.numel()].view_as(parameter).clone()
        at += parameter.numel()
    return mean[at:]


class Batches:
    """Which examples a step is made of, and where in them drafts begin."""

    def __init__(
        self, examples: list[Example], config: TrainConfig, team: Team, group: Callable[[int], object]
    ) -> None:
        self._groups: dict[object, list[Example]] = {}
        for example in examples:
            if len(example.answer) > 2:
                self._groups.setdefault(group(example.number), []).append(example)
        if not self._groups:
            raise ValueError("no answer is long enough to learn from")
        self._names = sorted(self._groups, key=str)
        self._config, self._team = config, team

    def of(self, step: int) -> list[tuple[list[Example], random.Random]]:
        """This process's share: of as many batches as all have together, every `size`-th."""
        count = self._config.accumulate * self._team.size
        made = []
        for number in range(self._team.rank, count, self._team.size):
            rng = random.Random(step * count + number + 1_000_000_007 * self._config.seed)
            weights = [len(self._groups[name]) for name in self._names]
            chosen = self._groups[rng.choices(self._names, weights)[0]]
            made.append((rng.sample(chosen, min(self._config.batch, len(chosen))), rng))
        return made


class State:
    """All that a training would lose if it were killed now."""

    def __init__(self, network: Network, rate: float, file: Path) -> None:
        self.network, self.step, self.history = network, 0, list[Row]()
        self.optimiser = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.02, betas=(0.9, 0.98))
        self._file = file

    def evaluation_is_due(self, config: TrainConfig) -> bool:
        every = config.evaluate_every
        if not every or not self.step or self.step % every and self.step < config.steps:
            return False
        return not any("acceptance" in row for row in self.history if row["step"] == self.step)

    def load(self) -> None:
        if self._file.exists():
            saved = torch.load(self._file, weights_only=True, map_location="cpu")
            self.network.load_state_dict(saved["network"])
            self.optimiser.load_state_dict(saved["optimiser"])
            self.step, self.history = saved["step"], saved["history"]

    def save(self) -> None:
        """Beside, then moved into place: a kill in between leaves the former."""
        scratch = self._file.with_suffix(".tmp")
        whole = {
            "network": self.network.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "history": self.history,
        }
        with scratch.open("wb") as out:
            torch.save(whole, out)
            out.flush()
            os.fsync(out.fileno())
        scratch.replace(self._file)
