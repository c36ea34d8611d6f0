"""Finds prompt prefixes whose keys and values another sequence has already computed (prefix caching).

Keys and values stay in a slot after its sequence has finished, until another sequence needs the slot. A sequence that
is still running can be shared from too. Knows slots, tokens and media; no tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import numpy as np

from model.targets.prompt import TokenizedPrompt

LEAST = 16  # minimum number of positions to share: fewer are computed as quickly as they are copied
# Tokens at the end of a prompt that a conversation that goes on from it may not repeat: the call for an answer, with an
# opened thought. To compute so many takes hardly longer than to compute one.
CALL = 16


def parting_positions(prompt: TokenizedPrompt) -> tuple[int, ...]:
    """Return the positions at which other prompts are likeliest to part from this one: behind its media, for other
    questions about them, and before its end, for conversations that go on from it."""
    behind_media = prompt.spans[-1][1] if prompt.spans else 0
    return tuple(position for position in (behind_media, len(prompt.ids) - CALL) if position >= LEAST)


@dataclass(frozen=True, eq=False)
class Contents:
    """Identifies the content that keys and values depend on, position by position.

    keys: (positions,) int64, a token for text, a negative number from the digest for a medium; media: first position,
    end and SHA-256 of each medium; salt: only contents with the same salt are shared, so that response times do not
    reveal other clients' prompts.
    """

    keys: np.ndarray
    media: tuple[tuple[int, int, bytes], ...]
    salt: str

    @classmethod
    def of(cls, prompt: TokenizedPrompt, salt: str) -> Contents:
        """Build the contents of a prompt."""
        keys, media = np.array(prompt.ids, np.int64), []
        for medium, (first, end) in zip(prompt.media, prompt.spans, strict=True):
            digest = medium.prompt_digest
            keys[first:end] = -1 - (int.from_bytes(digest[:8], "little") >> 1)
            media.append((first, end, digest))
        return cls(keys, tuple(media), salt)

    def followed_by(self, tokens: Seq[int]) -> Contents:
        """Return these contents with the tokens of an answer appended."""
        return replace(self, keys=np.concatenate((self.keys, np.array(tokens, np.int64))))

    def shared_with(self, other: Contents, most: int) -> int:
        """Count the positions of the common prefix, at most `most`. A medium is shared as a whole or not at all."""
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


def _all(_: int, length: int) -> int:
    """Return the length: every slot can share all of its positions."""
    return length


@dataclass(slots=True)
class _Entry:
    """The content of one slot."""

    contents: Contents
    length: int  # positions whose keys and values are in the slot
    drafted: bool  # the drafter has read them too


class PrefixCache:
    """Keeps track of the content of each slot. With `enabled` false no lookup finds anything."""

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._entries: dict[int, _Entry] = {}  # by slot, the least recently used first

    def hold(self, slot: int, contents: Contents, length: int, *, drafted: bool) -> None:
        """Record that a slot holds the first `length` positions of these contents. drafted: the drafter has read them
        too."""
        self._entries.pop(slot, None)
        if self._enabled:
            self._entries[slot] = _Entry(contents, length, drafted)

    def forget(self, slot: int) -> None:
        """Record that a slot holds nothing that can be shared."""
        self._entries.pop(slot, None)

    def exchange(self, one: int, other: int) -> None:
        """Record that the contents of two slots were exchanged."""
        places = {one: other, other: one}
        self._entries = {places.get(slot, slot): entry for slot, entry in self._entries.items()}

    def clear(self) -> None:
        """Forget the contents of all slots."""
        self._entries.clear()

    def forget_drafts(self) -> None:
        """Record that a new drafter has read none of the cached positions."""
        for entry in self._entries.values():
            entry.drafted = False

    def best(
        self, contents: Contents, most: int, *, drafted: bool, usable: Callable[[int, int], int] = _all
    ) -> tuple[int, int]:
        """Find the slot with the longest common prefix: (slot, positions), at most `most` positions.

        drafted: consider only positions that the drafter has read; usable: returns how many of a slot's first positions
        can be shared, at most so many. Returns 0 positions if no slot shares at least LEAST.
        """
        slot, longest = -1, LEAST - 1
        for at, entry in self._entries.items():
            if entry.drafted or not drafted:
                shared = usable(at, entry.contents.shared_with(contents, min(most, entry.length)))
                if shared > longest:
                    slot, longest = at, shared
        if slot < 0:
            return slot, 0
        self._entries[slot] = self._entries.pop(slot)  # now the most recently used
        return slot, longest

    def choose(self, free: Seq[int], source: int, shared: int) -> int:
        """Choose a free slot for a sequence that shares `shared` positions with `source`.

        Returns `source` if it is free and at least half of its content is shared; otherwise an empty or the least
        recently used slot. (Always reusing `source` would evict the rest of its content on every hit.)
        """
        if shared and source in free and 2 * shared >= self._entries[source].length:
            return source
        order = {slot: at for at, slot in enumerate(self._entries)}
        return min(free, key=lambda slot: (order.get(slot, -1), slot))
