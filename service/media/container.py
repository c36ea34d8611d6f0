"""Read container headers without decoding: whether a file is complete, how many parts it has, its size.

Covers as much of MP4, Matroska/WebM, AVI and WebP as is needed to refuse truncated files and those with more parts than
any recorder writes. Headers that lie pass here and meet the decoders' limits. The walks over RIFF chunks and ISO boxes
are shared with metadata.py and animation.py.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from service.media.limits import MediaLimits
from service.media.refusal import Refusal
from service.media.sniff import Format

Size = tuple[int, int]  # (width, height) in pixels


class Truncated(ValueError):
    """The file ends before its own header says it should."""


class PartCounter:
    """Counts the parts of a file and raises a Refusal beyond the limit."""

    def __init__(self, refusal: str, **limit: int) -> None:
        """Start counting.

        refusal: name, in refusal.py, of the Refusal to raise; limit: name=value, the most parts, under the name that
        the Refusal's message has for them.
        """
        self._refusal, self._limit = refusal, limit
        self._remaining = next(iter(limit.values()))

    def add(self) -> None:
        self._remaining -= 1
        if self._remaining < 0:
            raise Refusal(self._refusal, **self._limit)


def riff_chunks(data: bytes, at: int, end: int, counter: PartCounter) -> Iterator[tuple[bytes, int, int]]:
    """Yield (name, start of content, end of content) for each RIFF chunk in data[at:end].

    A chunk is its name, its length and its content, padded to an even length. The end of a last chunk that is cut off
    lies beyond `end`. counter: counts the chunks.
    """
    while at + 8 <= end:
        counter.add()
        name, length = struct.unpack_from("<4sI", data, at)
        yield name, at + 8, at + 8 + length
        at += 8 + length + length % 2


def iso_boxes(data: bytes, at: int, end: int, counter: PartCounter) -> Iterator[tuple[bytes, int, int]]:
    """Yield (name, start of content, end of content) for each ISO media box in data[at:end].

    A box is its length, its name and its content. The end of a last box that is cut off lies beyond `end`. Stops at a
    length that is less than the box's own header. counter: counts the boxes.
    """
    while at + 8 <= end:
        counter.add()
        length, name = struct.unpack_from(">I4s", data, at)
        head = 8
        if length == 1 and at + 16 <= end:
            length, head = int.from_bytes(data[at + 8 : at + 16], "big"), 16
        stop = end if length == 0 else at + length
        if stop < at + head:
            return
        yield name, at + head, stop
        at = stop


def check_complete(data: bytes, format: Format, limits: MediaLimits) -> None:
    """Raise Truncated for a file that is cut off, and Refusal for one with too many parts."""
    counter = PartCounter("too_many_elements", max_elements=limits.max_elements)
    if format in ("MP4", "AVIF", "HEIC"):
        _check_mp4(data, counter)
    elif format == "WEBM":
        _check_webm(data, counter)
    elif format in ("AVI", "WEBP"):
        size = int.from_bytes(data[4:8], "little")
        if size not in (0, 0xFFFFFFFF) and 8 + size > len(data):  # a recorder that writes to a pipe cannot fill it in
            raise Truncated(format)


def webp_size(data: bytes) -> Size | None:
    """Return the canvas size of a WebP file, or None where its first chunk does not say."""
    chunk = data[12:16]
    if chunk == b"VP8X" and len(data) >= 30:
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if chunk == b"VP8L" and len(data) >= 25:
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if chunk == b"VP8 " and len(data) >= 30:
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    return None


_MP4_PARENTS = (b"moov", b"trak", b"mdia", b"minf", b"stbl")


def _check_mp4(data: bytes, counter: PartCounter) -> None:
    """Walk the boxes at the top and inside the parents above; a stack, since a file may nest them arbitrarily deep."""
    walks = [(iso_boxes(data, 0, len(data), counter), len(data))]  # of the boxes around, each with their end
    while walks:
        boxes, end = walks[-1]
        name, start, stop = next(boxes, (b"", 0, end + 1))
        if stop > end and name in (b"moov", b"mdat", b"moof"):
            raise Truncated("MP4")
        if stop > end:  # no more boxes; garbage after the last one is common, and harmless
            walks.pop()
        elif name in _MP4_PARENTS:
            walks.append((iso_boxes(data, start, stop, counter), stop))


_SEGMENT, _CLUSTER = 0x18538067, 0x1F43B675


def _check_webm(data: bytes, counter: PartCounter) -> None:
    """Walk the elements before the first cluster, at the top and in the segment."""
    at, end = 0, len(data)
    while at < end:
        counter.add()
        name, at = _vint(data, at, end, keep_marker=True)
        size, at = _vint(data, at, end, keep_marker=False)
        if at < 0 or name == _CLUSTER:
            return
        if size != -1 and at + size > end:  # -1: unknown, as in live streams
            raise Truncated("WebM")
        if name != _SEGMENT:
            at = end if size == -1 else at + size


def _vint(data: bytes, at: int, end: int, *, keep_marker: bool) -> tuple[int, int]:
    """Read a variable-length integer: (value, where it ends); (-1, end) for "unknown size", (0, -1) for garbage."""
    if not 0 <= at < end or data[at] == 0:
        return 0, -1
    length = 9 - data[at].bit_length()
    if at + length > end:
        return 0, -1
    value = int.from_bytes(data[at : at + length], "big")
    if keep_marker:
        return value, at + length
    value &= (1 << 7 * length) - 1
    return (-1 if value == (1 << 7 * length) - 1 else value), at + length
