"""Test that layers with a state compute what the family's own forward computes, whatever the slots went through.

Most run on each kind of state: the gated delta rule (Qwen3.5, with experts too), short convolutions of two widths
(LFM2, LFM3) and Mamba2 (Nemotron-H).
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv, causal_conv1d_fn

from model.backends import recurrences
from model.backends.attention import prompt_rows
from model.backends.kv_cache import KVCache
from model.backends.recurrences import Rows
from model.backends.slot_states import SAVED, SlotStates
from model.errors import ConfigError
from model.targets.states import States
from tests.model.hybrids import CONFIGS, HIDDEN, Hybrid, close, some, tiny

PATHS = {  # a tree's parents: its root-to-leaf paths
    (-1,): [[0]],
    (-1, 0, 1, 2, 3): [[0, 1, 2, 3, 4]],
    (-1, 0, 0, 1, 1, 2, 3): [[0, 1, 3, 6], [0, 1, 4], [0, 2, 5]],
    (-1, 0, 0, 0, 0): [[0, 1], [0, 2], [0, 3], [0, 4]],
    (-1, 0, 1, 1, 2, 0): [[0, 1, 2, 4], [0, 1, 3], [0, 5]],
}
CHAIN, BUSHY, STAR, MIXED = list(PATHS)[1:]


@pytest.fixture(params=CONFIGS)
def hybrid(request: pytest.FixtureRequest) -> Hybrid:
    return Hybrid(request.param)


@pytest.mark.parametrize("chunks", [[20], [1, 1, 2, 16], [9, 5, 1, 5], [65, 3, 70], [64, 1, 2], [130]])
def test_a_prompt_may_be_cut_anywhere(hybrid: Hybrid, chunks: list[int]) -> None:
    prompt = some(sum(chunks), seed=1)
    hybrid.start(1)
    out = torch.cat([hybrid.read(1, chunk) for chunk in prompt.split(chunks)])
    close(out, hybrid.expected(prompt))
    hybrid.check_next([1])


@pytest.mark.parametrize("parents", PATHS, ids=len)
def test_a_tree_is_verified_and_only_the_accepted_path_is_remembered(hybrid: Hybrid, parents: tuple[int, ...]) -> None:
    hybrid.start(0)
    hybrid.read(0, some(13, seed=2))
    embeds = some(1, len(parents), seed=3)
    for path in PATHS[parents]:
        for accepted in {1, len(path) // 2 + 1, len(path)}:
            out = hybrid.verify(embeds, [list(parents)])
            hybrid.check(out[0], 0, embeds[0], PATHS[parents])
            hybrid.keep([0], [path[:accepted]], embeds)
            hybrid.check_next([0])


def test_slots_of_a_batch_do_not_touch_each_other_and_idle_ones_stay(hybrid: Hybrid) -> None:
    """Slots have different lengths and trees of different sizes; slot 2 idles and is no shorter for it."""
    for slot, length in enumerate((3, 17, 9, 40)):
        hybrid.start(slot)
        hybrid.read(slot, some(length, seed=slot))
    idle = [states[2].clone() for states in hybrid.states._states]
    embeds = some(4, 8, seed=5)
    trees = [CHAIN, (-1,), (), BUSHY]
    out = hybrid.verify(embeds, [list(tree) for tree in trees])
    for slot, tree in enumerate(trees):
        hybrid.check(out[slot], slot, embeds[slot], PATHS.get(tree, []))
    hybrid.keep(range(4), [[0, 1, 2], [0], [], [0, 2, 5]], embeds)
    hybrid.check_next([0, 1, 3])
    assert all(torch.equal(states[2], was) for states, was in zip(hybrid.states._states, idle, strict=True))
    hybrid.check_next([2])


def test_plain_decoding_of_some_slots(hybrid: Hybrid) -> None:
    for slot in (0, 2):
        hybrid.start(slot)
        hybrid.read(slot, some(6 + slot, seed=slot))
    for step in range(5):
        embeds = some(3, 1, seed=10 + step)
        parents = [[-1], [], [-1]] if step != 2 else [[], [], [-1]]
        out = hybrid.verify(embeds, parents)
        for slot in (0, 2):
            if parents[slot]:
                hybrid.check(out[slot], slot, embeds[slot], [[0]])
        hybrid.keep(range(3), [[0] if tree else [] for tree in parents], embeds)


def test_rows_of_a_pass_that_keeps_none_leave_no_trace(hybrid: Hybrid) -> None:
    hybrid.start(0)
    hybrid.read(0, some(7, seed=1))
    hybrid.verify(some(1, 6, seed=2), [list(MIXED)])  # nothing is kept at all
    embeds = some(1, 5, seed=3)
    hybrid.verify(embeds, [list(STAR)])
    hybrid.keep([0], [[]], embeds)
    hybrid.check_next([0])


def test_slots_are_exchanged(hybrid: Hybrid) -> None:
    for slot, length in ((0, 5), (3, 11)):
        hybrid.start(slot, save_at=(4,))
        hybrid.read(slot, some(length, seed=slot))
    hybrid.exchange(0, 3)
    hybrid.check_next([0, 3])
    hybrid.exchange(3, 1)  # a free one
    hybrid.check_next([0, 1])
    assert [hybrid.states.shareable(slot, 100) for slot in range(4)] == [4, 4, 0, 0]
    hybrid.start(2, source=0, length=4)
    hybrid.check_next([0, 1, 2])


@pytest.mark.parametrize("chunks", [[30], [12, 18], [11, 1, 18], [100, 30], [130]])
def test_a_sequence_starts_where_another_was_saved(hybrid: Hybrid, chunks: list[int]) -> None:
    """Also while the other one runs, when it has finished, and in the same slot."""
    prompt, states = some(sum(chunks), seed=1), hybrid.states
    hybrid.start(0, save_at=(12, len(prompt) - 1))
    for chunk in prompt.split(chunks):
        hybrid.read(0, chunk)
    assert [states.shareable(0, most) for most in (11, 12, 25, len(prompt) - 1, 500)] == [
        *(0, 12, 12, len(prompt) - 1, len(prompt) - 1)
    ]
    hybrid.start(2, source=0, length=12)
    assert states.shareable(2, 500) == 12
    hybrid.start(1, source=0, length=len(prompt) - 1)
    hybrid.check_next([0, 1, 2])
    embeds = some(3, 2, seed=4)
    hybrid.verify(embeds, [[-1, 0]] * 3)
    hybrid.keep(range(3), [[0, 1], [0], [0, 1]], embeds)
    hybrid.cache.free(0)
    hybrid.start(3, source=0, length=len(prompt) + 2)
    hybrid.check_next([1, 2, 3])
    hybrid.start(0, source=0, length=12)
    assert states.shareable(0, 500) == 12, "what lay behind is overwritten"
    hybrid.check_next([0, 1, 2, 3])


def test_a_new_sequence_inherits_nothing(hybrid: Hybrid) -> None:
    hybrid.start(0, save_at=(3,))
    hybrid.read(0, some(9, seed=1))
    hybrid.cache.free(0)
    hybrid.start(0)
    assert hybrid.states.shareable(0, 500) == 0
    hybrid.check_next([0])
    prompt = some(5, seed=2)
    close(hybrid.read(0, prompt), hybrid.expected(prompt))


def test_several_prompts_are_read_in_one_pass(hybrid: Hybrid) -> None:
    """Chunks of different lengths, one of them empty, on both sides of the border between the two ways to compute."""
    for num in (20, 90):
        starts, counts = np.array([0, 0, 0], np.int32), np.array([num, 0, num - 7], np.int32)
        embeds = some(3, num, seed=num)
        for slot in (0, 2):
            hybrid.start(slot, save_at=(6,))
        rows = prompt_rows(hybrid.cache, 0, 0, num)
        rows.starts, rows.counts = starts, counts
        out = hybrid.run(embeds, np.arange(num)[None], rows)
        for slot in (0, 2):
            close(out[slot, : counts[slot]], hybrid.expected(embeds[slot, : counts[slot]]))
        hybrid.keep([0, 1, 2], [list(range(count)) for count in counts], embeds)
        assert hybrid.states.shareable(2, 500) == 6
        hybrid.check_next([0, 2])
        for slot in (0, 2):
            hybrid.cache.free(slot)


def test_saved_states_are_bounded_and_counted(hybrid: Hybrid) -> None:
    states = hybrid.states
    hybrid.start(0, save_at=range(1, 20))
    hybrid.read(0, some(20, seed=1))
    assert [saved.length for saved in states._slots[0].saved] == [17, 18, 19][-SAVED:]
    own = sum(state.nbytes for state in states._states)
    copies = 4 * sum(state.nbytes for saved in states._slots[0].saved for state in saved.states)
    assert states.nbytes == own + copies
    assert SlotStates(states._layers, 4, saving=False).nbytes == own


def test_nothing_is_saved_where_no_prefix_is_cached() -> None:
    hybrid = Hybrid("lfm2")
    hybrid.cache.states = SlotStates(hybrid.states._layers, 4, saving=False)
    hybrid.start(0, save_at=(3, 9))
    hybrid.read(0, some(9, seed=1))
    hybrid.cache.free(0)
    assert hybrid.states.shareable(0, 500) == 0


def test_caches_of_one_model_do_not_touch_each_other(hybrid: Hybrid) -> None:
    other = copy.copy(hybrid)
    other.kept = list(hybrid.kept)
    other.cache = KVCache(
        layers=hybrid.cache.layers,
        num_slots=2,
        capacity=64,
        margin=8,
        dtype=torch.float32,
        device=torch.device("cpu"),
        states=SlotStates(hybrid.states._layers, 2, saving=True),
    )
    for number, each in enumerate((hybrid, other)):
        each.start(0)
        each.read(0, some(8 + number, seed=number))
    for each in (hybrid, other, hybrid):
        each.check_next([0])
        embeds = some(1, 3, seed=9)
        each.verify(embeds, [[-1, 0, 1]])
        each.keep([0], [[0, 1]], embeds)


def test_without_a_pass_the_layers_are_the_family_s(hybrid: Hybrid) -> None:
    embeds = some(70, seed=1)
    hybrid.model.set_attn_implementation("eager")
    with torch.inference_mode():
        assert torch.equal(
            hybrid.model(inputs_embeds=embeds[None], use_cache=False).last_hidden_state[0], hybrid.expected(embeds)
        )


def test_sizes_are_known_without_weights(hybrid: Hybrid) -> None:
    with torch.device("meta"):
        model = type(hybrid.model)(hybrid.model.config)
    states = States.of(model)
    assert states is not None
    assert 4 * states.bytes_per_slot(saving=True) == hybrid.states.nbytes


@pytest.mark.parametrize(
    "broken", ["states stay", "every row is kept", "branches see each other", "windows ignore branches"]
)
def test_these_tests_see_a_fault(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    """Break one thing at a time: the comparison that the tests above make must fail."""
    hybrid = Hybrid("qwen3_5_text")
    hybrid.start(0)
    hybrid.read(0, some(9, seed=1))
    of = Rows.of.__func__  # type: ignore[attr-defined]

    def as_chain(cls: type[Rows], *arguments: object) -> Rows:
        rows: Rows = of(cls, *arguments)
        if broken == "branches see each other":
            rows.visible = torch.ones_like(rows.visible).tril()
        else:
            rows.parents = None
        return rows

    if broken == "states stay":
        monkeypatch.setattr(recurrences.Change, "apply", lambda _, states, *__: states)
    elif broken == "every row is kept":
        apply = recurrences.Change.apply
        last = torch.tensor([len(BUSHY) - 1])
        monkeypatch.setattr(recurrences.Change, "apply", lambda change, states, at, _: apply(change, states, at, last))
    else:
        monkeypatch.setattr(Rows, "of", classmethod(as_chain))
    with pytest.raises(AssertionError):  # noqa: PT012
        embeds = some(1, len(BUSHY), seed=2)
        out = hybrid.verify(embeds, [list(BUSHY)])
        hybrid.check(out[0], 0, embeds[0], PATHS[BUSHY])
        hybrid.keep([0], [[0, 2]], embeds)
        hybrid.check_next([0])


@pytest.mark.parametrize("kind", ["jamba", "falcon_mamba", "kimi_linear", "mamba"])
def test_states_that_cannot_be_rolled_back_are_refused_by_name(kind: str) -> None:
    with torch.device("meta"):
        config = CONFIG_MAPPING[kind](num_hidden_layers=2)
        model = AutoModel.from_config(config)
    with pytest.raises(ConfigError, match=rf"(?i)layers of type {kind.replace('_', '')}\w+ carry a state"):
        States.of(model)


class TwoStates(Lfm2ShortConv):
    """A layer with two convolutions behind each other."""

    def forward(self, hidden_states: Tensor, past_key_values: Any = None, **_: Any) -> Tensor:
        x = hidden_states.mT if past_key_values is None else past_key_values.update_conv_state(hidden_states.mT)
        return causal_conv1d_fn(causal_conv1d_fn(x, self.conv.weight[:, 0]), self.conv.weight[:, 0]).mT


def test_a_layer_that_computes_two_states_with_one_function_is_refused() -> None:
    model = tiny("lfm2")
    model.layers[0].conv.__class__ = TwoStates
    with pytest.raises(ConfigError, match="TwoStates compute a state more than once"):
        States.of(model)


class Wider(Lfm2ShortConv):
    """A layer whose input is not as wide as the model."""

    def forward(self, hidden_states: Tensor, past_key_values: Any = None, **_: Any) -> Tensor:
        x = hidden_states.view(len(hidden_states), 3 * HIDDEN, -1)
        x = x if past_key_values is None else past_key_values.update_conv_state(x)
        return causal_conv1d_fn(x, self.in_proj.weight[:, :3]).mT


def test_a_layer_that_cannot_be_run_alone_is_refused() -> None:
    model = tiny("lfm2")
    model.layers[0].conv.__class__ = Wider
    with pytest.raises(ConfigError, match="Wider carry a state and cannot be run alone: RuntimeError"):
        States.of(model)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_models_without_a_state_are_left_alone(kind: str) -> None:
    with torch.device("meta"):
        model = AutoModel.from_config(CONFIG_MAPPING[kind](num_hidden_layers=2))
    assert States.of(model) is None
    assert all("forward" not in vars(module) for module in model.modules())
