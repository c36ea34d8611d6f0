"""What is remembered of media that clients named: files, of one owner only, no more bytes than allowed."""

from __future__ import annotations

import numpy as np

from service.media.media_cache import ENTRY_BYTES, MediaCache, Owner

A, B = ("a", ""), ("b", "")


def test_a_name_is_looked_up_among_those_of_the_same_owner_only():
    cache = MediaCache(10 * ENTRY_BYTES)
    cache.put(A, "sku-1", b"of a")
    cache.put(B, "sku-1", b"of b")
    assert (cache.get(A, "sku-1"), cache.get(B, "sku-1")) == (b"of a", b"of b")
    for owner, uuid in ((("", ""), "sku-1"), (("a", "salt"), "sku-1"), (("", "a"), "sku-1"), (A, "sku-2"), (A, "")):
        assert cache.get(owner, uuid) is None, (owner, uuid)


def test_a_name_that_comes_with_other_bytes_means_those():
    cache = MediaCache(10 * ENTRY_BYTES)
    for data in (b"first", b"the second is longer", b"3"):
        cache.put(A, "x", data)
        assert cache.get(A, "x") == data
        assert (len(cache), cache.num_bytes) == (1, len(data) + ENTRY_BYTES)


def test_what_was_used_least_recently_is_forgotten_first():
    cache = MediaCache(3 * (100 + ENTRY_BYTES))
    for uuid in "abc":
        cache.put(A, uuid, bytes(100))
    assert cache.get(A, "a") is not None
    cache.put(A, "d", bytes(100))
    assert [uuid for uuid in "abcd" if cache.get(A, uuid) is not None] == ["a", "c", "d"]
    cache.put(A, "e", bytes(101))
    assert [uuid for uuid in "acde" if cache.get(A, uuid) is not None] == ["d", "e"], "two go where one byte lacks"


def test_a_file_larger_than_all_is_not_remembered_and_what_it_replaces_is_forgotten():
    cache = MediaCache(3 * ENTRY_BYTES)
    cache.put(A, "other", b"stays")
    cache.put(A, "x", b"old")
    cache.put(A, "x", bytes(3 * ENTRY_BYTES))
    assert cache.get(A, "x") is None, "never the old picture for the new one"
    assert cache.get(A, "other") == b"stays"
    nothing = MediaCache(0)
    nothing.put(A, "x", b"")
    assert (nothing.get(A, "x"), nothing.num_bytes) == (None, 0)


def test_bytes_are_counted_whatever_is_put_and_replaced():
    rng = np.random.default_rng(0)
    cache, most = MediaCache(20 * ENTRY_BYTES), 20 * ENTRY_BYTES
    newest: dict[tuple[Owner, str], bytes] = {}
    for number in range(2000):
        owner, uuid = (A, B)[rng.integers(2)], str(rng.integers(30))
        newest[owner, uuid] = number.to_bytes(2, "big") * int(rng.integers(2000))
        cache.put(owner, uuid, newest[owner, uuid])
        found = {key: data for key in newest if (data := cache.get(*key)) is not None}
        assert all(newest[key] == data for key, data in found.items())
        assert cache.num_bytes == sum(len(data) + ENTRY_BYTES for data in found.values()) <= most
        assert len(cache) == len(found)
