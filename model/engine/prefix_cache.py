"""Prompts that begin alike: what was computed for one sequence, another takes over as far as the two agree.

Keys and values stay in a slot after its sequence is over, until another one needs the slot; those of a sequence under
way may be taken over too. Knows slots, tokens and media; no tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import numpy as np

from model.targets.prompt import TokenizedPrompt

LEAST = 16  # positions that are worth taking over: fewer are computed as quickly as they are copied


@dataclass(frozen=True, eq=False)
class Contents:
    """What keys and values depend on, position by position.

    keys: (positions,) int64, of text its tokens, of a medium a part of its digest, which is negative; media: first
    position, end and SHA-256 of each; salt: only contents with the same one are ever shared, so that no client learns
    from how quickly it is answered what another has asked.
    """

    keys: np.ndarray
    media: tuple[tuple[int, int, bytes], ...]
    salt: str

    @classmethod
    def of(cls, prompt: TokenizedPrompt, salt: str) -> Contents:
        keys, media = np.array(prompt.ids, np.int64), []
        for medium, (first, end) in zip(prompt.media, prompt.spans, strict=True):
            digest = hashlib.sha256(medium.digest + repr(medium.seconds_per_frame).encode()).digest()
            keys[first:end] = -1 - (int.from_bytes(digest[:8], "little") >> 1)
            media.append((first, end, digest))
        return cls(keys, tuple(media), salt)

    def followed_by(self, tokens: Seq[int]) -> Contents:
        return replace(self, keys=np.concatenate((self.keys, np.array(tokens, np.int64))))

    def shared_with(self, other: Contents, most: int) -> int:
        """How many positions both begin with, at most `most`; a medium counts as a whole or not at all."""
        if self.salt != other.salt:
            return 0
        most = min(most, len(self.keys), len(other.keys))
        differing = np.flatnonzero(self.keys[:most] != other.keys[:most])
        length = int(differing[0]) if len(differing) else most
        theirs = set(other.media)
        for medium in self.media:
            first, end, _ = medium
            if first < length and (end > length or medium not in theirs):
                return first
        return length


@dataclass(slots=True)
class _Entry:
    contents: Contents
    length: int  # positions whose keys and values are there
    drafted: bool  # the drafter has read them, too


class PrefixCache:
    """What lies in each slot. With `enabled` false nothing is ever found."""

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._entries: dict[int, _Entry] = {}  # the slot that was of use longest ago first

    def hold(self, slot: int, contents: Contents, length: int, *, drafted: bool) -> None:
        """From now on a slot has the first `length` positions of these."""
        self._entries.pop(slot, None)
        if self._enabled:
            self._entries[slot] = _Entry(contents, length, drafted)

    def forget(self, slot: int) -> None:
        self._entries.pop(slot, None)

    def exchange(self, one: int, other: int) -> None:
        """Note that two slots have exchanged what they hold."""
        places = {one: other, other: one}
        self._entries = {places.get(slot, slot): entry for slot, entry in self._entries.items()}

    def clear(self) -> None:
        self._entries.clear()

    def forget_drafts(self) -> None:
        """Another drafter, which has read none of it, is used from now on."""
        for entry in self._entries.values():
            entry.drafted = False

    def best(self, contents: Contents, most: int, *, drafted: bool) -> tuple[int, int]:
        """The slot that has most of what these begin with, and how many positions, at most `most`; with `drafted` of
        those that the drafter has read. 0 positions: none has enough."""
        slot, longest = -1, LEAST - 1
        for at, entry in self._entries.items():
            if entry.drafted or not drafted:
                shared = entry.contents.shared_with(contents, min(most, entry.length))
                if shared > longest:
                    slot, longest = at, shared
        if slot < 0:
            return slot, 0
        self._entries[slot] = self._entries.pop(slot)  # it was of use
        return slot, longest

    def choose(self, free: Seq[int], source: int, shared: int) -> int:
        """Of the free slots the one for a sequence that has `shared` positions in common with `source`: that one, where
        they are most of what it holds, else the one that is missed least: which holds nothing, or was of use longest
        ago. (Were they always copied, every hit would cost somebody else's.)"""
        if shared and source in free and 2 * shared >= self._entries[source].length:
            return source
        order = {slot: at for at, slot in enumerate(self._entries)}
        return min(free, key=lambda slot: (order.get(slot, -1), slot))
