"""Check for hours that answers in a crowd equal answers alone: crowds of random requests, each answer compared.

    python -m tests.model.stress --minutes 60 [--native auto] [--seed 0] [--drafter flash]

Every round draws 200 random requests (test_soak.py) and answers each alone. Then it answers all in a crowd that joins
and leaves: once with the target's own answers, corrupted, as a draft, and once with an untrained draft. The engines
keep running from round to round, as a server's does. Passes run in torch unless --native says otherwise.

A row of the native library has the same bits in every batch, so no difference is allowed there. A row of torch may
round differently in another batch, so each difference is judged: how much noise on the logits, as a share of their
range, makes the other token come out? Up to NOISE, rounding explains it. Exit code 1: some difference is not explained.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

from model.backends.native import library
from model.decoding import sampling
from model.engine.engine import Engine
from model.request import Request, RequestError, SamplingParams
from tests.model import tiny
from tests.model.oracle import with_oracle
from tests.model.test_soak import random_request

NOISE = 1e-5  # share of the logits' range; a float32 sum of some thousand terms has a smaller error
DRAWS = 64


def noise_between(logits: Tensor, params: SamplingParams, position: int, tokens: set[int]) -> float:
    """Find the least noise, as a share of the logits' range, under which each of `tokens` is chosen at times.

    logits: (vocab,) float64, those that decide `position` of the answer. Returns infinity if 0.01 is not enough.
    """
    generator = torch.Generator().manual_seed(0)
    span = float(logits.max() - logits.min())
    drawn = torch.full((DRAWS,), sampling.uniform(params.seed, position), dtype=torch.float64)
    for scale in (10 ** (exponent / 2) for exponent in range(-18, -3)):
        noisy = logits + scale * span * torch.randn(DRAWS, len(logits), generator=generator, dtype=torch.float64)
        if params.temperature:
            chosen = sampling.invert(sampling.distribution(noisy, params), drawn)
        else:
            chosen = noisy.argmax(-1)
        if tokens <= set(chosen.tolist()):
            return float(scale)
    return math.inf


def deciding_logits(engine: Engine, request: Request, position: int) -> Tensor | None:
    """Return the logits (vocab,) float64 from which a plain engine chooses token `position` of its answer.

    Returns None if the answer ends earlier, or if the native library chose the token.
    """
    seen: list[Tensor] = []

    def choose(logits: Tensor, *arguments: Any, **options: Any) -> np.ndarray:
        seen.append(logits[0, -1].double().clone())
        return original(logits, *arguments, **options)

    original = sampling.choose
    with mock.patch.object(sampling, "choose", choose):
        tiny.answers(engine, [replace(request, params=replace(request.params, max_tokens=position + 1))])
    return seen[position] if position < len(seen) else None


def crowded(engine: Engine, requests: list[Request], rng: random.Random) -> dict[str, list[int]]:
    """Answer all requests, with a few joining at every step, and return their tokens."""
    coming, answers = list(requests), dict[str, list[int]]()
    while coming or engine.has_work:
        for _ in range(rng.choice((0, 0, 0, 1, 1, 2, 6))):
            if coming:
                request = coming.pop(0)
                engine.add(request)
                answers[request.request_id] = []
        for output in engine.step():
            answers[output.request_id] += [token.id for token in output.tokens]
        engine.check_integrity()
    tiny.assert_idle(engine)
    return answers


class Stress:
    """Run rounds on two engines, and count requests, differences and unexplained differences."""

    def __init__(self, folder: Path, drafter: str) -> None:
        checkpoint = tiny.save_checkpoint(folder / "target")
        draft = tiny.save_network(folder / "draft", drafter, checkpoint)
        self.plain = Engine(tiny.config(checkpoint, drafter="off", max_num_seqs=1, max_model_len=384))
        config = tiny.config(checkpoint, draft=str(draft), max_num_seqs=16, prefill_chunk=16)
        self.crowd = Engine(config)
        self.requests = self.differences = self.unexplained = 0

    def round(self, seed: int) -> None:
        """Draw 200 requests, answer them alone and in crowds, and compare."""
        rng = random.Random(seed)
        known: dict[str, list[int]] = {}
        served = []
        for number in range(200):
            request = random_request(number, rng)
            try:
                known[request.request_id] = tiny.answers(self.plain, [request])[request.request_id]
            except RequestError:
                continue
            served.append(request)
        own = self.crowd.drafter
        with_oracle(self.crowd, known, seed=seed, truth=0.8)
        self.compare(seed, "oracle", served, known, crowded(self.crowd, served, rng))
        self.crowd.use(own)
        self.compare(seed, "untrained", served, known, crowded(self.crowd, served, rng))

    def compare(
        self, seed: int, way: str, requests: list[Request], known: dict[str, list[int]], answers: dict[str, list[int]]
    ) -> None:
        """Compare answers in a crowd with those alone; print and judge each difference."""
        for request in requests:
            expected, found = known[request.request_id], answers[request.request_id]
            self.requests += 1
            if expected == found:
                continue
            self.differences += 1
            at = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), None)
            noise = math.inf
            # Rounding cannot explain an answer that only ends early.
            if at is not None and (logits := deciding_logits(self.plain, request, at)) is not None:
                noise = noise_between(logits, request.params, at, {expected[at], found[at]})
            self.unexplained += noise > NOISE
            verdict = "explained by rounding" if noise <= NOISE else "NOT EXPLAINED"
            print(
                f"round {seed}, {way}, {request.request_id}: token {at} of {len(expected)} differs; "
                f"noise {noise:.1e}: {verdict}\n  {request.params}\n  alone {expected}\n  crowd {found}",
                flush=True,
            )


def main() -> int:
    """Run rounds until the time is over. Returns the exit code."""
    parser = argparse.ArgumentParser("tests.model.stress", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--native", default="off", help="see FLASH_NATIVE; default: off, which is torch")
    parser.add_argument("--seed", type=int, default=0, help="of the first round")
    parser.add_argument("--drafter", default="flash", choices=("flash", "flash-paper", "eagle", "medusa"))
    options = parser.parse_args()
    os.environ[library.CHOICE] = options.native
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    build = library.load()
    until, seed = time.monotonic() + 60 * options.minutes, options.seed
    with tempfile.TemporaryDirectory() as folder:
        stress = Stress(Path(folder), options.drafter)
        print(f"native library: {build.name if build else 'off'}; torch {torch.__version__}", flush=True)
        while time.monotonic() < until:
            stress.round(seed)
            seed += 1
            print(
                f"{seed - options.seed} rounds, {stress.requests} answers: {stress.differences} differ, "
                f"{stress.unexplained} not explained",
                flush=True,
            )
    return int(stress.unexplained > 0)


if __name__ == "__main__":
    sys.exit(main())
