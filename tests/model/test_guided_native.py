"""What a native round computes for trees that follow a grammar, against the same in torch."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.backends.native import library
from model.decoding import guided_trees
from model.decoding.guided_trees import Continuing, Guided, Worth
from model.decoding.tree import Trees
from model.engine.engine import Engine
from model.engine.native_round import NativeRound
from model.request import Grammar
from tests.model import tiny


@pytest.mark.parametrize("shape", [{}, {"sequential_rank": 0}, {"vocabulary": 200}], ids=["head", "no head", "few"])
def test_a_native_draft_goes_on_as_in_torch(
    tiny_checkpoint: Path, tmp_path: Path, shape: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind random paths and under random masks, for both slots of a batch."""
    if library.load() is None:
        pytest.skip("no native library here")
    draft = tiny.save_draft(tmp_path, tiny_checkpoint, **shape)
    engine = Engine(tiny.config(tiny_checkpoint, draft=str(draft), max_num_seqs=2))
    now, drawn, compared = engine.round, random.Random(0), 0
    assert isinstance(now, NativeRound)
    flash, vocab = now.flash, engine.target.vocab_size
    assert flash is not None
    fit = guided_trees.fit

    def compare(trees: Trees, guided: Mapping[int, Guided], drafter: Continuing, worth: Worth) -> None:
        nonlocal compared
        batch = len(trees.tokens)
        budgets = now.budgets[:batch]
        rank = flash.network.config.sequential_rank
        contexts = now._contexts[: batch * flash.block * rank].view(batch, flash.block, rank)
        flash._continuation.take(trees.tokens[:, 0], budgets > 0, now.drafted, contexts)
        for slot in range(batch):
            for length in range(flash.block + 1):
                path = [drawn.randrange(vocab) for _ in range(length)]
                bits = np.random.default_rng(length).random(vocab + -vocab % 32) < 0.1
                allowed = np.packbits(bits, bitorder="little").tobytes()
                mine, theirs = (each.best(slot, path, allowed, 2) for each in (drafter, flash))
                assert [token for token, _ in mine] == [token for token, _ in theirs]
                assert np.allclose([score for _, score in mine], [score for _, score in theirs], atol=0.05)
                compared += len(mine)
        fit(trees, guided, drafter, worth)

    monkeypatch.setattr(guided_trees, "fit", compare)
    grammar = Grammar("regex", "[a-z ]{40}")
    tiny.drain(engine, [tiny.ask(name, name, grammar=grammar, max_tokens=12) for name in ("red", "blue")])
    assert compared > 20


def test_the_likeliest_allowed_token_is_torchs(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Among equals the first one; whole bytes of a mask may be empty."""
    if library.load() is None:
        pytest.skip("no native library here")
    engine = Engine(tiny.config(tiny_checkpoint, drafter="off", max_num_seqs=2))
    tiny.drain(engine, [tiny.ask(name, name, max_tokens=4) for name in ("red", "blue")])
    now, generator = engine.round, np.random.default_rng(1)
    assert isinstance(now, NativeRound)
    logits = now._now.logits
    logits.copy_((torch.randn_like(logits) * 2).round())
    for share in (0.001, 0.01, 0.3, 1.0):
        for slot in range(len(logits)):
            bits = generator.random(logits.shape[-1]) < share
            bits[generator.integers(len(bits))] = True
            found = now.likeliest(slot, 0, np.packbits(bits, bitorder="little").tobytes())
            row = logits[slot, 0].float().numpy()
            assert found == np.flatnonzero(bits)[row[bits].argmax()]
