"""Test the KV cache without a model: every row contains a number that names its token."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from model.backends import kv_cache
from model.backends.kv_cache import ALIGNED, KVCache, LayerShape, uniform

LAYERS, HEADS, DIM = 2, 3, 4


def cache(num_slots: int = 4, capacity: int = 40, margin: int = 8) -> KVCache:
    return KVCache(
        layers=uniform(LAYERS, HEADS, DIM),
        num_slots=num_slots,
        capacity=capacity,
        margin=margin,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def write(kv: KVCache, first_slot: int, names: list[list[float]]) -> None:
    """Append rows to the slots from first_slot on; every row contains its name, in every layer and head."""
    batch, rows = len(names), len(names[0])
    starts = torch.tensor(kv.lengths[first_slot : first_slot + batch])
    locations = kv.storages[0].locations(first_slot, starts[:, None] + torch.arange(rows))
    mark = torch.tensor(names)[:, None, :, None] + torch.arange(HEADS)[:, None, None] / 8
    for layer in range(LAYERS):
        keys = (mark + layer / 64).expand(batch, HEADS, rows, DIM)
        kv.write(layer, locations, keys, -keys)


def held(kv: KVCache, slot: int) -> list[float]:
    """Return the names of a slot's rows; fail if layers, heads, keys and values disagree."""
    length = kv.lengths[slot]
    names = None
    for layer in range(LAYERS):
        keys, values = kv.read(layer, slot, 1, length)
        assert torch.equal(keys, -values)
        bare = keys[0] - torch.arange(HEADS)[:, None, None] / 8 - layer / 64
        assert torch.equal(bare, bare[:1, :, :1].expand_as(bare)), "heads or columns of one row are not of one token"
        row = bare[0, :, 0].tolist()
        assert names is None or names == row
        names = row
    assert names is not None
    return names


def test_rows_written_are_read_back_by_slot_and_head() -> None:
    """Strides mixed up between slots and heads would show one sequence another one's keys."""
    kv = cache()
    slots = [kv.allocate() for _ in range(3)]
    write(kv, 0, [[10, 11], [20, 21], [30, 31]])
    kv.keep(slots, [[0, 1]] * 3)
    assert [held(kv, s) for s in slots] == [[10, 11], [20, 21], [30, 31]]


def test_keep_moves_the_accepted_rows_down_in_order() -> None:
    """A node kept at its place in the tree, not on its path, would be attended to as another token."""
    kv = cache()
    slots = [kv.allocate() for _ in range(3)]
    write(kv, 0, [[1, 2], [3, 4], [5, 6]])
    kv.keep(slots, [[0, 1], [0, 1], [0]])
    write(kv, 0, [[10, 11, 12, 13, 14], [20, 21, 22, 23, 24], [30, 31, 32, 33, 34]])
    kv.keep(slots, [[0, 2, 3], [0, 1, 4], [0]])
    assert held(kv, 0) == [1, 2, 10, 12, 13]
    assert held(kv, 1) == [3, 4, 20, 21, 24]
    assert held(kv, 2) == [5, 30]
    write(kv, 0, [[40, 41], [50, 51], [60, 61]])
    kv.keep(slots, [[0], [0, 1], []])  # an idle slot keeps nothing
    assert [held(kv, s) for s in slots] == [[1, 2, 10, 12, 13, 40], [3, 4, 20, 21, 24, 50, 51], [5, 30]]


def test_keep_reads_all_rows_before_it_writes_any() -> None:
    """Rows 1..6 move to 0..5, so each destination is the source of the next row."""
    kv = cache()
    slot = kv.allocate()
    write(kv, 0, [[0, 1, 2, 3, 4, 5, 6]])
    kv.keep([slot], [[1, 2, 3, 4, 5, 6]])
    assert held(kv, slot) == [1, 2, 3, 4, 5, 6]


def test_slots_exchange_what_they_hold_and_who_has_them() -> None:
    kv = cache()
    first, second = kv.allocate(), kv.allocate()
    write(kv, 0, [[1, 2, 3], [4, 5, 6]])
    kv.keep([first, second], [[0, 1, 2], [0, 1, 2]])
    assert kv.free(first)
    kv.exchange(second, first)
    kv.check_integrity()
    assert held(kv, first) == [4, 5, 6]
    assert list(kv.lengths) == [3, 0, 0, 0]
    assert kv.allocate() == second, "the source is free again, and the lowest"
    kv.share(second, second, 3)
    assert held(kv, second) == [1, 2, 3], "what was left in the other has changed places with it"


def test_what_overflowed_is_cleared_and_not_shared() -> None:
    """torch adds -inf to masked scores, and a NaN would stay NaN for the next sequence in the slot."""
    kv = cache()
    for slot in (kv.allocate(), kv.allocate()):
        write(kv, slot, [[1, 2, 3, 4]])
        kv.keep([slot], [[0, 1]])
    kv.data[1, 1, 0, 2, 1, 3] = float("nan")  # kept
    kv.data[0, 0, 1, 0, 3, 0] = float("inf")  # rejected
    assert not kv.free(0)
    assert kv.free(1)
    assert kv.data.isfinite().all()
    kv.share(1, kv.take(1), 2)
    assert held(kv, 1) == [1, 2]


def test_what_idle_rows_left_is_cleared_when_a_slot_is_taken() -> None:
    kv = cache()
    for slot in range(3):
        kv.take(slot)
        write(kv, slot, [[1, 2]])
        kv.keep([slot], [[0, 1]])
    kv.free(0)
    kv.free(2)
    kv.data[:, :, :, :, kv.capacity :] = float("nan")
    kv.take(2)
    assert kv.data[:, :, 2].isfinite().all()
    kv.exchange(1, 0)
    assert kv.data[:, :, 0].isfinite().all()


def test_usage_is_exact() -> None:
    """Autoscaling reads this gauge: it is not rounded to blocks, and it is zero when nothing runs."""
    kv = cache(num_slots=4, capacity=40)
    assert kv.usage == 0.0
    a, b = kv.allocate(), kv.allocate()
    assert kv.usage == 0.0
    write(kv, 0, [[1, 2, 3], [4, 5, 6]])
    assert kv.usage == 0.0, "scratch is not held"
    kv.keep([a, b], [[0, 1, 2], [0, 2]])
    assert kv.usage == 5 / 160
    kv.free(a)
    assert kv.usage == 2 / 160
    kv.free(b)
    assert kv.usage == 0.0


def test_a_freed_slot_starts_empty_and_the_lowest_goes_first() -> None:
    """A length left over from the slot's last tenant would show its rows to the next."""
    kv = cache()
    assert [kv.allocate() for _ in range(4)] == [0, 1, 2, 3]
    write(kv, 0, [[1.0]] * 4)
    kv.keep([0, 1, 2, 3], [[0]] * 4)
    kv.free(2)
    kv.free(1)
    assert kv.lowest_free() == 1
    assert [kv.allocate(), kv.allocate()] == [1, 2]
    assert list(kv.lengths) == [1, 0, 0, 1]
    assert kv.lowest_free() is None


def test_a_slot_is_not_freed_twice_nor_taken_twice() -> None:
    """Two requests in one slot is the worst that can happen: one user's answer from another's picture."""
    kv = cache()
    kv.take(2)
    with pytest.raises(ValueError, match="not in list"):
        kv.take(2)
    kv.free(2)
    with pytest.raises(AssertionError, match="freed twice"):
        kv.free(2)


def test_check_integrity_sees_what_is_wrong() -> None:
    kv = cache()
    kv.lengths[1] = 3
    with pytest.raises(AssertionError, match="free slot holds"):
        kv.check_integrity()
    kv = cache()
    kv.lengths[kv.allocate()] = 41
    with pytest.raises(AssertionError, match="more than fits"):
        kv.check_integrity()


def test_bytes_per_slot_is_what_is_allocated() -> None:
    """A wrong figure would make a budget in bytes meaningless."""
    kv = cache(num_slots=3, capacity=40, margin=8)
    each = KVCache.bytes_per_slot(layers=uniform(LAYERS, HEADS, DIM), capacity=40, margin=8, dtype=torch.float32)
    assert kv.data.numel() * kv.data.element_size() == 3 * each


def test_a_long_random_life_keeps_every_row() -> None:
    """Against a dictionary of lists: allocate, write, keep, move, free in random order."""
    rng = random.Random(0)
    kv, truth = cache(num_slots=5, capacity=60, margin=8), dict[int, list[float]]()
    name = 0.0
    for _ in range(400):
        action = rng.choice(("allocate", "step", "step", "step", "move", "free"))
        if action == "allocate" and kv.num_free:
            truth[kv.allocate()] = []
        elif action == "step" and truth:
            rows, slots = rng.randint(1, 8), 1 + max(truth)
            names = [[name := name + 1 for _ in range(rows)] for _ in range(slots)]
            write(kv, 0, names)
            paths = []
            for slot in range(slots):
                fits = slot in truth and len(truth[slot]) + rows <= kv.capacity
                paths.append(sorted(rng.sample(range(rows), rng.randint(0, rows))) if fits else [])
                if fits:
                    truth[slot] += [names[slot][r] for r in paths[-1]]
            kv.keep(list(range(slots)), paths)
        elif action == "move" and truth and kv.num_free:
            source, lowest = rng.choice(list(truth)), kv.lowest_free()
            assert lowest is not None
            kv.exchange(source, lowest)
            truth[lowest] = truth.pop(source)
        elif action == "free" and truth:
            slot = rng.choice(list(truth))
            kv.free(slot)
            del truth[slot]
        kv.check_integrity()
        assert {s: held(kv, s) for s in truth} == truth


def test_a_kernel_that_reads_a_whole_block_at_the_very_end_reads_zeros() -> None:
    """If heads are narrower than a block, the block of the last key reaches beyond it, into zeroed memory."""
    kv, *others = (cache(num_slots=1, capacity=64, margin=0) for _ in range(4))
    for other in others:
        other.data.fill_(1)
    end = kv.data.storage_offset() + kv.data.numel()
    assert not torch.as_strided(kv.data, (ALIGNED,), (1,), end).any()


# -- layers with windows. What attention reads of them is in test_attention.py.


def gemma(heads: int, width: int, window: int | None) -> list[LayerShape | None]:
    """Return the layers of Gemma 3 4B: each sixth sees everything, the others a window."""
    return [LayerShape(heads, width, None if layer % 6 == 5 else window) for layer in range(34)]


@pytest.mark.parametrize(("capacity", "most"), [(32768, 0.25), (8192, 0.45), (1024, 1.0)])
def test_layers_with_windows_store_little_more_than_their_windows(capacity: int, most: float) -> None:
    """Chunks and trees are those of an engine's defaults. A ring must not take more than a slot without one."""
    room: dict[str, Any] = {"capacity": capacity, "margin": 65, "rows": 512}
    counted, allocated = {}, {}
    for window in (1024, None):
        layers = gemma(1, 32, window)
        counted[window] = KVCache.bytes_per_slot(layers=layers, **room, dtype=torch.float32)
        kv = KVCache(layers=layers, num_slots=1, **room, dtype=torch.float32, device=torch.device("cpu"))
        assert kv.nbytes == counted[window]
        allocated[window] = sum(storage.data.untyped_storage().nbytes() for storage in kv.storages)
        assert allocated[window] <= counted[window] + (len(kv.storages) << 22), "beyond what rounding to pages adds"
    assert counted[1024] <= most * counted[None]
    assert allocated[1024] <= most * allocated[None]
    real = [KVCache.bytes_per_slot(layers=gemma(4, 256, w), **room, dtype=torch.bfloat16) for w in (1024, None)]
    assert real[0] / real[1] == pytest.approx(counted[1024] / counted[None])


def test_layers_of_equal_size_share_a_storage_and_others_do_not() -> None:
    shapes = [
        LayerShape(2, 8),
        LayerShape(2, 8, 20),
        None,
        LayerShape(2, 8, 21),
        LayerShape(1, 8, 20),
        LayerShape(2, 8),
    ]
    kv = KVCache(layers=shapes, num_slots=1, capacity=2000, margin=8, dtype=torch.float32, device=torch.device("cpu"))
    assert len(kv.storages) == 3
    first, _ = kv.storage(0)
    assert kv.storage(5) == (first, 1)
    assert kv.storage(3)[0] is kv.storage(1)[0], "windows of about one size have rings of one size"
    with pytest.raises(KeyError):
        kv.storage(2)


@pytest.mark.parametrize("written", [30, 100, 140, 300])
def test_no_overflow_of_one_sequence_stays_in_a_ring_for_the_next(
    written: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that was rejected once may be infinite; wherever it lies, it must not reach another sequence."""
    monkeypatch.setattr(kv_cache, "REACH", 16)

    def started(written: int) -> KVCache:
        """Return a cache of two slots, in the first of which a sequence has a tree with infinite rows behind it."""
        kv = KVCache(layers=[LayerShape(1, 4, 20), LayerShape(1, 4)], num_slots=2, capacity=300, margin=8, rows=16,
                     dtype=torch.float32, device=torch.device("cpu"))  # fmt: skip
        kv.take(0)
        for begin in range(0, written + 8, 4):
            rows = torch.full((1, 1, 4, 4), 1.0 if begin < written else math.inf)
            for layer, storage in enumerate(kv.storages):
                kv.write(layer, storage.locations(0, torch.arange(begin, begin + 4)[None]), rows, rows)
            kv.keep([0], [list(range(min(4, written - begin)))] if begin < written else [[]])
        assert not all(storage.data.isfinite().all() for storage in kv.storages)
        return kv

    def clean(kv: KVCache, slot: int) -> bool:
        return all(bool(storage.data[:, :, slot].isfinite().all()) for storage in kv.storages)

    kv = started(written)
    kv.take(1)
    kv.share(0, 1, written - 4)
    assert clean(kv, 1), "shared"
    kv = started(written)
    kv.exchange(0, 1)
    assert clean(kv, 0), "exchanged"
    kv = started(written)
    assert kv.free(0) == (written != 140), "only in a ring that was filled rejected rows lie among the others"
    assert clean(kv, 0), "freed"


def test_a_new_sequence_shares_all_of_its_own_whoever_had_its_slot_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """How far a slot was written is kept for the sequence before, of which a prefix may be shared, not for this one."""
    monkeypatch.setattr(kv_cache, "REACH", 16)
    kv = KVCache(layers=[LayerShape(1, 4, 20)], num_slots=2, capacity=300, margin=8, rows=16, dtype=torch.float32,
                 device=torch.device("cpu"))  # fmt: skip
    for length in (280, 30):
        slot = kv.allocate()
        kv.keep([slot], [list(range(length))])
        kv.free(slot)
        assert kv.shareable(slot, length)
        assert not kv.shareable(slot, length - 17)
