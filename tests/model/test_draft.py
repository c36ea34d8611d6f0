"""Test that the FLASH draft computes the same in serving as in training, and is bound to its target."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from model.backends.native import library
from model.config import EngineConfig
from model.decoding.tree import Trees
from model.demo import prompts
from model.drafters import checkpoint, presets
from model.drafters.flash import network as network_file
from model.drafters.flash.drafter import FlashDrafter
from model.drafters.flash.network import ALL, DraftConfig, DraftNetwork, SequentialHead
from model.drafters.layers import rotary_table, rotate
from model.drafters.presets import Sizes
from model.engine.engine import Engine
from model.engine.native_round import NativeRound
from model.errors import ConfigError
from model.request import Message, Request, SamplingParams
from model.targets.base import Target
from model.train import loss
from model.train.loss import Learner, block_loss, draft_loss
from model.train.seen import capture
from tests.model import tiny
from tests.model.guided import Guided

# -- serving and training


class Watched(Guided):
    """Run the real drafter on an oracle's trees, so that paths of every length enter its context.

    served: (request, answer tokens known) -> the logits of its block.
    """

    def __init__(self, engine: Engine, known: dict[str, list[int]], seed: int) -> None:
        assert isinstance(engine.drafter, FlashDrafter)
        super().__init__(engine, engine.drafter, known, seed)
        self.served: dict[tuple[str, int], Tensor] = {}

    def propose(self, newest: np.ndarray, budgets: np.ndarray) -> Trees:
        trees = super().propose(newest, budgets)
        assert isinstance(self.drafter, FlashDrafter)
        assert self.drafter.drafted is not None
        for sequence in self.engine.scheduler.running:
            if not sequence.prefilling and sequence.slot is not None:
                known = sequence.request.request_id, len(sequence.tokens)
                self.served[known] = self.drafter.drafted[sequence.slot].clone()
        return trees


class Places(random.Random):
    """Place anchors where the test wants them: `randint` returns the offsets of a list in turn."""

    def __init__(self, offsets: list[int]) -> None:
        super().__init__(0)
        self.offsets = offsets

    def randint(self, a: int, b: int) -> int:
        self.offsets = [*self.offsets[1:], self.offsets[0]]
        return a + self.offsets[-1]


CONVERSATIONS: dict[str, tuple[Message, ...]] = {
    "media": (Message("user", (tiny.video(1, 3), "What is it, and ", tiny.image(2), "is it there?")),),
    "last": (Message("user", ("Describe the image.", tiny.image(3))),),
    "text": (Message("user", ("How many objects are there on a white background?",)),),
}


@pytest.mark.parametrize(("chunk", "seed"), [(16, 0), (17, 1), (23, 2), (500, 3)])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"num_latents": 0},
        {"num_latents": ALL},
        {"num_latents": ALL, "pooled": 5},
        {"pooled": 7},
        {"pooled": 500},
        {"sequential_rank": 0},
        {"vocabulary": 70},
    ],
    ids=["whole", "blind", "uncompressed", "averaged", "averaged-first", "more-rows-than-positions", "flat", "narrow"],
)
def test_served_blocks_are_the_blocks_that_were_trained(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, seed: int, shape: dict[str, int]
) -> None:
    """Else a well trained draft is served on contexts it never saw, and only the acceptance length tells, by being low.

    Media split over chunks, latents in their place, positions of the context, rollback after every accepted path, moves
    between slots: for each step in which the engine drafted, the trainer's own code makes the same logits.
    """
    monkeypatch.setattr(network_file, "ENOUGH", 4)  # so that some of these small media are subsampled
    draft = tiny.save_draft(tmp_path / "draft", tiny_checkpoint, **shape)
    engine = Engine(tiny.config(tiny_checkpoint, draft=str(draft), max_num_seqs=4, prefill_chunk=chunk))
    plain = Engine(tiny.config(tiny_checkpoint, max_num_seqs=1))
    requests = [tiny.ask(name, *messages[0].content, max_tokens=40) for name, messages in CONVERSATIONS.items()]
    # The lowest slot has the shortest answer, so that the others move.
    known = tiny.answers(plain, [tiny.ask("brief", "Hi", max_tokens=6), *requests])

    watched = Watched(engine, known, seed)
    engine.use(watched)
    served = watched.served
    assert tiny.answers(engine, [tiny.ask("brief", "Hi", max_tokens=6), *requests]) == known

    taught: list[Tensor] = []

    def learn(drafted: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Tensor]:
        taught.append(drafted)
        return block_loss(drafted, *rest, **named)

    monkeypatch.setattr(loss, "block_loss", learn)
    monkeypatch.setattr(
        SequentialHead, "bias", lambda *_: 0.0
    )  # compare the logits before the head; the next test covers the head
    network, target = checkpoint.load(draft, engine.target), engine.target  # the served network's layers are packed
    assert isinstance(network, DraftNetwork)
    offsets = list(range(34))
    with torch.no_grad():
        seen = capture(
            target,
            [target.prompt(m) for m in CONVERSATIONS.values()],
            [tuple(known[name]) for name in CONVERSATIONS],
            network,
        )
        draft_loss(Learner(target, network), seen, anchors=len(offsets), gamma=5.0, rng=Places([*offsets]))
    block = network.config.block
    drafted = taught[0].view(len(CONVERSATIONS), len(offsets), block, -1)
    compared = 0
    for b, name in enumerate(CONVERSATIONS):
        for offset in offsets:
            ours = served.get((name, offset + 1))
            if ours is None:
                continue
            torch.testing.assert_close(ours, drafted[b, offset], atol=2e-3, rtol=1e-3)
            compared += 1
    assert compared > 10
    assert drafted.std() > 0.5, "logits that all lie at nought would be equal without meaning anything"


def test_the_sequential_head_says_along_a_path_what_it_was_taught_to() -> None:
    """Training computes all of a path at once; serving computes it level by level, beside other paths."""
    torch.manual_seed(0)
    head = SequentialHead(DraftConfig(32, 24, vocab_size=50, aux_layers=(1,), sequential_rank=8)).requires_grad_(False)
    torch.nn.init.normal_(head.after.weight)
    hidden, tokens = torch.randn(3, 6, 24), torch.randint(50, (3, 6))
    taught, step = head.bias(hidden, tokens), head.along(head.context(hidden))
    states = None
    for depth in range(6):
        level = tokens[:, depth, None].expand(-1, 1 if depth == 0 else 2).clone()
        level[:, 1:] = 7  # another candidate beside the path's own
        states, said = step(depth, level, None if states is None else states[:, :1].expand(-1, 2, -1))
        torch.testing.assert_close(said[:, 0], taught[:, depth])
    moved = hidden.clone()
    moved[:, 0] += 1
    assert not torch.allclose(head.bias(moved, tokens)[:, -1], taught[:, -1]), "a path is remembered to its end"


class Apart:
    """Hide a FLASH drafter from a native round, which then asks for trees between two native calls."""

    def __init__(self, drafter: FlashDrafter) -> None:
        self._drafter = drafter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._drafter, name)


@pytest.mark.skipif(library.load() is None, reason="no native library here")
def test_a_native_round_drafts_what_its_parts_draft() -> None:
    """The bundled draft has long paths accepted; it must read them alike in one native call and in several."""
    served: list[dict[tuple[str, int], Tensor]] = []
    accepted: list[list[int]] = []
    for native in (True, False):
        engine = Engine(EngineConfig(dtype="float32", max_num_seqs=4, max_model_len=1280, adaptive_drafting=False))
        drafter, now = engine.drafter, engine.round
        assert isinstance(drafter, FlashDrafter)
        assert isinstance(now, NativeRound)
        if not native:
            engine.use(Apart(drafter))
        seen: dict[tuple[str, int], Tensor] = {}

        def watched(
            *given: int,
            verify: Any = now.draft_and_verify,
            seen: Any = seen,
            engine: Any = engine,
            drafter: Any = drafter,
        ) -> Any:
            result = verify(*given)
            logits = engine.round.drafted if engine.round.flash is not None else drafter.drafted
            for s in engine.scheduler.running:
                if not s.prefilling and engine.round.budgets[s.slot] > 0:
                    seen[s.request.request_id, len(s.tokens)] = logits[s.slot].clone()
            return result

        now.draft_and_verify = watched  # type: ignore[assignment,method-assign]
        for number, task in enumerate(prompts.TASKS):
            told = prompts.messages(number, split="heldout", task=task)
            engine.add(Request(f"{number}", told, SamplingParams(max_tokens=60)))
        while engine.has_work:
            engine.step()
            engine.check_integrity()
        accepted.append(list(engine.pop_stats().acceptance_lengths))
        served.append(seen)
    one, other = served
    both = one.keys() & other.keys()
    assert len(both) > 0.8 * len(one)
    for key in both:
        torch.testing.assert_close(one[key], other[key], atol=5e-2, rtol=1e-2)
    assert sum(accepted[0]) / len(accepted[0]) > 4, "paths too short to tell anything"


def test_the_trainer_sees_what_the_target_serves(tiny_target: Target, plain_engine: Engine) -> None:
    """The trainer's logits must be those that the answer was chosen from: each answer token is their best."""
    name = "media"
    answer = tiny.answers(plain_engine, [tiny.ask(name, *CONVERSATIONS[name][0].content, max_tokens=30)])[name]
    prompt = tiny_target.prompt(CONVERSATIONS[name])
    with torch.no_grad():
        network = tiny.new_draft(tiny_target)
        seen = capture(tiny_target, [prompt, prompt], [tuple(answer), tuple(answer[:9])], network)
    assert seen[0].taught[:30].argmax(-1).tolist() == answer
    assert seen[1].taught[:9].argmax(-1).tolist() == answer[:9]


# -- the network


def test_a_block_does_not_see_another_block(tiny_target: Target) -> None:
    """Several blocks over one context are trained at once; in serving each is alone."""
    network = tiny.new_draft(tiny_target)
    torch.manual_seed(0)
    last, tail = torch.randn(1, 3, tiny_target.hidden_size), torch.randn(1, 3, network.config.hidden_size)
    positions = torch.tensor([[5, 9, 9]])

    def alone(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        blocks = q.shape[2] // network.config.block
        owner = torch.arange(q.shape[2]) // network.config.block
        mask = owner[:, None] == owner[None] if blocks > 1 else None
        mixed: Tensor = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return mixed

    with torch.no_grad():
        together = network.block_hidden(last, tail, positions, alone)
        for i in range(3):
            one = slice(i, i + 1)
            single = network.block_hidden(last[:, one], tail[:, one], positions[:, one], alone)
            torch.testing.assert_close(together[:, i], single[:, 0], atol=1e-5, rtol=1e-5)


def test_latents_are_as_many_as_configured_whatever_the_medium(tiny_target: Target) -> None:
    """And their norm stays that of text rows: both stand in one context."""
    network = tiny.new_draft(tiny_target, num_latents=3)
    assert network.compressor is not None
    with torch.no_grad():
        for visual in (1, 16, 96):
            latents = network.compressor(torch.randn(2, visual, 32))
            assert latents.shape == (2, 3, 32)
            torch.testing.assert_close(latents.pow(2).mean(-1), torch.ones(2, 3), atol=1e-2, rtol=0)


@pytest.mark.parametrize(("pooled", "total"), [(2, 300), (16, 3200), (16, 144), (7, 5)])
def test_averaged_rows_are_means_of_what_is_read_whatever_the_chunks(
    tiny_target: Target, pooled: int, total: int
) -> None:
    network = tiny.new_draft(tiny_target, pooled=pooled)
    aux_hidden_states, rng = torch.randn(total, 6, dtype=torch.float64), random.Random(0)
    whole = network.read(aux_hidden_states, 0, total)
    assert len(whole) <= total
    assert len(whole) >= min(total, 16 * pooled), "means of too few"
    for _ in range(20):
        cuts = [0, *sorted(rng.choices(range(total), k=4)), total]
        parts = [network.read(aux_hidden_states[a:b], a, total) for a, b in itertools.pairwise(cuts)]
        assert torch.equal(torch.cat(parts), whole), cuts
    means = network.averaged(whole, total)
    assert len(means) == min(pooled, total)
    apart = -(-total // len(whole))
    for row, mean in enumerate(means):
        mine = [p for p in range(0, total, apart) if p * len(means) // total == row]
        torch.testing.assert_close(mean, aux_hidden_states[mine].mean(0))


@pytest.mark.parametrize(
    ("drafter", "pooled", "latents", "block", "layers", "rank"),
    [("flash", 16, ALL, 10, 2, 64), ("flash-paper", 0, 64, 5, 1, 0)],
)
def test_a_new_draft_has_the_shape_that_is_documented(
    tiny_target: Target, drafter: str, pooled: int, latents: int, block: int, layers: int, rank: int
) -> None:
    made = presets.shape(drafter, tiny_target, Sizes(hidden_size=64))
    assert isinstance(made, DraftConfig)
    told = (made.pooled, made.num_latents, made.block, made.num_layers, made.sequential_rank)
    assert told == (pooled, latents, block, layers, rank)


def test_of_a_large_vocabulary_a_new_draft_is_offered_a_part(tiny_target: Target) -> None:
    def offered(drafter: str, tokens: int, wanted: int | None = None) -> int:
        monkeypatch.setattr(tiny_target, "vocab_size", tokens)
        return presets.shape(drafter, tiny_target, Sizes(vocabulary=wanted)).vocabulary

    with pytest.MonkeyPatch.context() as monkeypatch:
        for drafter in ("flash", "eagle", "medusa"):
            assert (offered(drafter, 32_000), offered(drafter, 152_064)) == (0, 16_384)
            assert (offered(drafter, 152_064, 0), offered(drafter, 1_000, 500)) == (0, 500)
        assert offered("flash-paper", 152_064) == 0, "as published"
        for wrong in (-1, 10, 1_001):
            with pytest.raises(ConfigError, match="vocabulary"):
                offered("flash", 1_000, wrong)


def test_rotary_positions_are_relative() -> None:
    """A key's place matters only by its distance: cached keys stay right while the block moves on."""
    config = DraftConfig(hidden_size=32, target_hidden_size=64, vocab_size=9, aux_layers=(0,), num_heads=2)
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 16)

    def score(at: int, key_at: int) -> Tensor:
        tables = [rotary_table(config, torch.tensor([[p]]), torch.float32) for p in (at, key_at)]
        return (rotate(q, *tables[0]) * rotate(k, *tables[1])).sum(-1)

    torch.testing.assert_close(score(7, 3), score(107, 103), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(score(7, 3), score(7, 4), atol=1e-2)


# -- the checkpoint


def test_a_saved_draft_comes_back_as_it_was(tiny_target: Target, tmp_path: Path) -> None:
    network = tiny.new_draft(tiny_target, num_layers=1, block=3, vocabulary=200)
    checkpoint.save(tmp_path, network, tiny_target, command="train it", acceptance_length={"caption": 4.5})
    loaded = checkpoint.load(tmp_path, tiny_target)
    assert loaded.config == network.config
    assert {n: v.to(torch.bfloat16).float().tolist() for n, v in network.named_parameters()} == {
        n: v.tolist() for n, v in loaded.named_parameters()
    }
    assert loaded.offered is not None
    assert network.offered is not None
    assert loaded.offered.equal(network.offered), "ids are whole numbers, which bfloat16 has few of"
    assert not any(p.requires_grad for p in loaded.parameters())
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1, "whoever may read the one file, may read the other"
    described = json.loads((tmp_path / "config.json").read_text())
    assert described["command"] == "train it"
    assert described["acceptance_length"] == {"caption": 4.5}
    assert described["target_fingerprint"] == checkpoint.fingerprint(tiny_target)


def test_a_draft_for_another_target_is_refused(tiny_draft: Path, tiny_gqa_checkpoint: Path, tmp_path: Path) -> None:
    """It would run, be wrong nearly always, and say nothing. Of the same shape with other weights, too."""
    with pytest.raises(ConfigError, match="another target"):
        Engine(tiny.config(tiny_gqa_checkpoint, draft=str(tiny_draft)))
    other = tiny.save_checkpoint(tmp_path / "other", seed=7)
    with pytest.raises(ConfigError, match="another target"):
        Engine(tiny.config(other, draft=str(tiny_draft)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_a_draft_fits_its_target_in_every_dtype(tiny_checkpoint: Path, tiny_draft: Path, dtype: str) -> None:
    """Trained in float32, served in bfloat16: the fingerprint is of the checkpoint, not of how it was loaded."""
    Engine(tiny.config(tiny_checkpoint, draft=str(tiny_draft), dtype=dtype, max_num_seqs=1))


@pytest.mark.parametrize(
    "broken",
    ["no folder", "json", "field", "fingerprint", "no weights", "weights", "shape", "names", "offered", "not finite"],
)
def test_a_broken_draft_is_a_clear_error(tiny_target: Target, tmp_path: Path, broken: str) -> None:
    """The user who starts the service reads one line that names the folder, not a traceback of a library."""
    folder = tmp_path / "draft"
    checkpoint.save(folder, tiny.new_draft(tiny_target, vocabulary=100), tiny_target)
    described = json.loads((folder / "config.json").read_text())
    weights = folder / "model.safetensors"
    match broken:
        case "no folder":
            folder = tmp_path / "nothing"
        case "json":
            (folder / "config.json").write_text("{")
        case "field":
            described["draft"]["colour"] = "red"
            (folder / "config.json").write_text(json.dumps(described))
        case "fingerprint":
            del described["target_fingerprint"]
            (folder / "config.json").write_text(json.dumps(described))
        case "no weights":
            weights.unlink()
        case "weights":
            weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
        case "shape":
            described["draft"]["block"] += 1
            (folder / "config.json").write_text(json.dumps(described))
        case "names":
            safetensors.torch.save_file({"x": torch.zeros(1)}, weights)
        case "offered":
            held = safetensors.torch.load_file(weights)
            held["offered"][-1] = tiny_target.vocab_size
            safetensors.torch.save_file(held, weights)
        case "not finite":
            held = safetensors.torch.load_file(weights)
            held["out.weight"][0, 0] = torch.nan
            safetensors.torch.save_file(held, weights)
    with pytest.raises(ConfigError, match=str(folder)):
        checkpoint.load(folder, tiny_target)


def test_a_draft_that_reads_other_layers_is_refused(tiny_target: Target, tmp_path: Path) -> None:
    config = DraftConfig(
        hidden_size=32,
        target_hidden_size=tiny_target.hidden_size,
        vocab_size=tiny_target.vocab_size,
        aux_layers=tuple(t - 1 for t in tiny_target.aux_layers),
    )
    checkpoint.save(tmp_path, DraftNetwork(config), tiny_target)
    with pytest.raises(ConfigError, match="layers"):
        checkpoint.load(tmp_path, tiny_target)
