"""In bfloat16, on a processor that multiplies it, a token's logits have the same bits however it is computed.

This is what makes speculation unable to change an answer: verifying many rows, in any batch, at any key length, is
decoding one row. Were it lost (another kernel, another layout), answers would start to differ at near ties.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model import attention
from model.config import EngineConfig, _has_bfloat16_products
from model.engine import Engine
from model.kv_cache import KVCache

HELD = 70

pytestmark = pytest.mark.skipif(not _has_bfloat16_products(), reason="this processor has no bfloat16 products")


@pytest.fixture(params=["tiny_checkpoint", "tiny_gqa_checkpoint"])
def engine(request: pytest.FixtureRequest) -> Engine:
    checkpoint: Path = request.getfixturevalue(request.param)
    return Engine(EngineConfig(model=str(checkpoint), drafter="off", dtype="bfloat16", max_model_len=384))


@torch.inference_mode()
def last_hidden(engine: Engine, embeds: torch.Tensor, batch: int, rows: int) -> torch.Tensor:
    """Hidden states of `rows` causal rows in slot 0, computed beside batch - 1 slots that hold more."""
    generator = torch.Generator().manual_seed(7)
    held = torch.randn(engine.cache.data[:, :, :1].shape, generator=generator)
    engine.cache.data[:] = held.to(engine.target.dtype)
    starts = HELD + 11 * torch.arange(batch)
    causal = torch.ones(1, rows, rows, dtype=torch.bool).tril()
    positions = (starts[:, None] + torch.arange(rows))[None]
    where = attention.plan(engine.cache, 0, starts, causal, engine.target.dtype)
    hidden, _ = engine.target.forward(embeds[:, :rows].repeat(batch, 1, 1), positions, where)
    return engine.target.logits(hidden)[0]


def test_a_rows_bits_do_not_depend_on_how_many_rows_sequences_or_keys_there_are(engine: Engine) -> None:
    width = engine.target.hidden_size
    embeds = torch.randn(1, 128, width, generator=torch.Generator().manual_seed(3)).to(engine.target.dtype)
    whole = last_hidden(engine, embeds, 1, 128)
    for batch, rows in ((1, 1), (1, 2), (1, 3), (1, 8), (1, 16), (1, 100), (4, 1), (8, 7), (16, 1), (16, 6)):
        part = last_hidden(engine, embeds, batch, rows)
        assert torch.equal(part, whole[:rows]), f"{batch} sequences of {rows} rows"


@pytest.mark.parametrize("held", [150, 243, 300, 560, 700, 800, 1000])
def test_attention_is_as_exact_when_neighbours_are_longer(held: int) -> None:
    """One slot holds `held` tokens, its neighbour up to 700 more: what the first gets does not change by a bit."""
    generator = torch.Generator().manual_seed(held)
    cache = KVCache(
        num_layers=1, num_slots=2, num_heads=4, head_dim=64, capacity=1920, margin=0,
        dtype=torch.bfloat16, device=torch.device("cpu"),
    )  # fmt: skip
    cache.data[:] = torch.randn(cache.data.shape, generator=generator).bfloat16()
    queries, keys, values = torch.randn(3, 2, 4, 40, 64, generator=generator).bfloat16()

    def mixed(rows: int, neighbour: int, batch: int) -> torch.Tensor:
        causal = torch.ones(1, rows, rows, dtype=torch.bool).tril()
        where = attention.plan(cache, 0, torch.tensor([held, neighbour][:batch]), causal, torch.bfloat16)
        return attention.attend(where, 0, *(x[:batch, :, :rows] for x in (queries, keys, values)))[0]

    alone = mixed(40, held, 1)
    for rows in (1, 2, 3, 4, 7, 16, 33, 35, 40):
        for neighbour in range(held - 60, held + 700, 47):
            assert torch.equal(mixed(rows, neighbour, 2), alone[:, :rows]), f"{rows} rows beside {neighbour}"
