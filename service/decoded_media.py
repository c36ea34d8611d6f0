"""Count the bytes of decoded images and videos that requests hold, here and again in the workers. Knows no media."""

from __future__ import annotations

from service.errors import NoCapacity, TooLarge


class DecodedMedia:
    """The decoded media of all requests."""

    def __init__(self, max_bytes: int) -> None:
        self.num_bytes = 0
        self._max_bytes = max_bytes

    def open(self) -> DecodedBytes:
        return DecodedBytes(self)

    def add(self, num_bytes: int, own_bytes: int) -> None:
        """Count more bytes. own_bytes: what their request would hold with them. Raises TooLarge and NoCapacity."""
        if own_bytes > self._max_bytes:
            raise TooLarge(
                f"the request's images and videos take {own_bytes} bytes decoded, for all its choices; at most "
                f"{self._max_bytes} are allowed: send fewer or smaller ones, or fewer frames",
                code="too_many_decoded_bytes",
            )
        if self.num_bytes + num_bytes > self._max_bytes:
            raise NoCapacity("decoded media of other requests fill the memory; try again soon", code="media_full")
        self.num_bytes += num_bytes

    def remove(self, num_bytes: int) -> None:
        self.num_bytes -= num_bytes


class DecodedBytes:
    """Those of one request."""

    def __init__(self, media: DecodedMedia) -> None:
        self._media = media
        self._num_bytes = 0

    def add(self, num_bytes: int) -> None:
        """Count a medium. Raises TooLarge and NoCapacity."""
        self._media.add(num_bytes, self._num_bytes + num_bytes)
        self._num_bytes += num_bytes

    def close(self) -> None:
        """Count all as freed; may be called any number of times."""
        self._media.remove(self._num_bytes)
        self._num_bytes = 0
