"""Remember the files of media under the names that clients gave them, so that these need not be sent again.

A client names a medium by a `uuid`; later parts with that `uuid` alone use the same file. The file is remembered as it
was sent, not its pixels: it is ten to a hundred times smaller, and serves any frames, sizes and options that a later
request wants. Nothing is shared between owners: a name is looked up only among those of the same owner.

The least recently used are forgotten first. Knows nothing of formats or HTTP.
"""

from __future__ import annotations

from collections import OrderedDict

Owner = tuple[str, str]  # the client, and what separates users who share one key

ENTRY_BYTES = 1024  # counted for each entry beside its file, so that their number is bounded too


class MediaCache:
    """Files by owner and name, at most `max_bytes` of them; 0: nothing is remembered."""

    def __init__(self, max_bytes: int) -> None:
        self.num_bytes = 0
        self._max_bytes = max_bytes
        self._files: OrderedDict[tuple[Owner, str], bytes] = OrderedDict()  # the least recently used first

    def __len__(self) -> int:
        return len(self._files)

    @property
    def usage(self) -> float:
        """The share of the allowed bytes in use, 0 to 1."""
        return self.num_bytes / max(1, self._max_bytes)

    def get(self, owner: Owner, uuid: str) -> bytes | None:
        """Return the file of this name, or None where it is not remembered (any more)."""
        data = self._files.get((owner, uuid))
        if data is not None:
            self._files.move_to_end((owner, uuid))
        return data

    def put(self, owner: Owner, uuid: str, data: bytes) -> None:
        """Remember a file in place of any other of this name; one larger than the whole cache is not remembered."""
        self._forget((owner, uuid))
        if len(data) + ENTRY_BYTES > self._max_bytes:
            return
        self._files[owner, uuid] = data
        self.num_bytes += len(data) + ENTRY_BYTES
        while self.num_bytes > self._max_bytes:
            self._forget(next(iter(self._files)))

    def _forget(self, key: tuple[Owner, str]) -> None:
        if (data := self._files.pop(key, None)) is not None:
            self.num_bytes -= len(data) + ENTRY_BYTES
