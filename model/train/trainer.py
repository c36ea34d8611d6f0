"""Train a draft for a target. The target, its embeddings and its lm_head stay fixed; only the draft network learns.

The target reads each prompt and answer once; its hidden states are kept in memory while they fit, never on disk. Tokens
are then drafted from many places of the answer at once, exactly as in serving. Every drafter is trained on the same
examples, in the same order, at the same places, for the same number of steps.

A batch depends only on its step number. So an interrupted training reaches the same result as an uninterrupted one, and
two processes reach the result of one process with twice the accumulation.
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

Row = dict[str, Any]  # of the history: "step" with either "acceptance", or "loss", "hits" and "rate"


@dataclass(frozen=True)
class TrainConfig:
    """Hold the hyperparameters of a training."""

    steps: int = 1500
    batch: int = 16  # examples in one pass of the target
    accumulate: int = 1  # batches per step and process
    anchors: int = 24  # drafts per answer and step
    rate: float = 1.5e-3
    gamma: float = 5.0
    warmup: int = 50
    seed: int = 0
    save_every: float = 45.0  # seconds
    evaluate_every: int = 0  # steps; 0: never
    autocast: bool = True
    memory_bytes: int = 6 << 30  # cache of captured hidden states


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
    """Train `network` in place, resuming from `file` if it exists.

    group: maps a prompt number to its group; all examples of a batch are from one group. memory: cache of captured
    states, to be shared by several trainings on the same examples. evaluate: measures the draft after the given step;
    called in the process of rank 0 only; None means that it was stopped.

    Returns the history. Raises Interrupted at the end of the step in which `stop()` came true in any process, after
    saving; and FloatingPointError if the loss is not finite.
    """
    # Under autocast the weights of norms stay float32 on purpose; torch warns that this is slower.
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    team = team or Alone()
    state = State(network, config.rate, file)
    state.load()
    team.wait()  # no process may save before all have loaded
    learner = Learner(target, network)
    batches = Batches(examples, config, team, group)
    memory = memory or Memory(config.memory_bytes)
    bar = tqdm(total=config.steps, initial=state.step, desc="draft", unit="step", disable=team.rank > 0, mininterval=1)
    acceptance: dict[str, Any] = {}
    saved_at = time.monotonic()
    with bar:
        while True:
            if team.rank == 0 and state.evaluation_is_due(config):
                state.save()  # measuring takes a while, and a kill may come meanwhile
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
    """Compute the learning rate of a step: linear warm-up, times a half cosine that falls to a fiftieth."""
    rise = min(1.0, (step + 1) / config.warmup)
    return config.rate * rise * (0.51 + 0.49 * math.cos(math.pi * step / config.steps))


def share(network: nn.Module, losses: Tensor, team: Team) -> Tensor:
    """Average gradients over the team in place, in one collective call that also averages `losses`.

    losses: (n,). Returns their mean over the team.
    """
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
    """Choose the examples of each step, and seed the places in them where drafts begin.

    Raises ValueError if no answer has three tokens or more.
    """

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
        """Return this process's share of the batches of a step, each with its own random generator."""
        count = self._config.accumulate * self._team.size
        made = []
        for number in range(self._team.rank, count, self._team.size):
            rng = random.Random(step * count + number + 1_000_000_007 * self._config.seed)
            weights = [len(self._groups[name]) for name in self._names]
            chosen = self._groups[rng.choices(self._names, weights)[0]]
            made.append((rng.sample(chosen, min(self._config.batch, len(chosen))), rng))
        return made


class State:
    """Hold everything that a killed training needs to resume: weights, optimiser, step and history."""

    def __init__(self, network: Network, rate: float, file: Path) -> None:
        self.network, self.step, self.history = network, 0, list[Row]()
        self.optimiser = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.02, betas=(0.9, 0.98))
        self._file = file

    def evaluation_is_due(self, config: TrainConfig) -> bool:
        """Return whether this step must be evaluated and has not been."""
        every = config.evaluate_every
        if not every or not self.step or self.step % every and self.step < config.steps:
            return False
        return not any("acceptance" in row for row in self.history if row["step"] == self.step)

    def load(self) -> None:
        """Load the file if it exists."""
        if self._file.exists():
            saved = torch.load(self._file, weights_only=True, map_location="cpu")
            self.network.load_state_dict(saved["network"])
            self.optimiser.load_state_dict(saved["optimiser"])
            self.step, self.history = saved["step"], saved["history"]

    def save(self) -> None:
        """Write a temporary file, sync it and rename it; a kill leaves either the former file or the new one."""
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
