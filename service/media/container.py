"""What a container's own headers say about its completeness and size, read without decoding anything.

Just enough of MP4, Matroska/WebM, AVI and WebP to refuse files that end before they should, and those that consist of
more parts than any recorder writes. A header that lies gets past here; the decoders' limits are for those.
"""

from __future__ import annotations

import struct

from service.media.limits import MediaLimits
from service.media.refusal import Refusal
from service.media.sniff import Format

Size = tuple[int, int]  # (width, height) in pixels


class Truncated(ValueError):
    """The file ends before its own header says it should."""


def check_whole(data: bytes, format: Format, limits: MediaLimits) -> None:
    """Raises Truncated, and Refusal where there are more parts than allowed."""
    if format == "MP4":
        _check_mp4(data, limits.max_elements)
    elif format == "WEBM":
        _check_webm(data, limits.max_elements)
    elif format in ("AVI", "WEBP"):
        size = int.from_bytes(data[4:8], "little")
        if size not in (0, 0xFFFFFFFF) and 8 + size > len(data):  # who writes to a pipe cannot go back and fill it in
            raise Truncated(format)


def webp_size(data: bytes) -> Size | None:
    """The canvas size of a WebP file."""
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


def _check_mp4(data: bytes, max_elements: int) -> None:
    """Walk all boxes at the top and inside the parents above; a cut one is the end of what was sent."""
    ends, at, count = [len(data)], 0, 0  # of the boxes around `at`
    while ends:
        if at + 8 > ends[-1]:
            at = ends.pop()
            continue
        count = _counted(count, max_elements)
        size, name = struct.unpack_from(">I4s", data, at)
        head = 8
        if size == 1 and at + 16 <= ends[-1]:
            size, head = int.from_bytes(data[at + 8 : at + 16], "big"), 16
        stop = ends[-1] if size == 0 else at + size
        if stop > ends[-1] and name in (b"moov", b"mdat", b"moof"):
            raise Truncated("MP4")
        if stop > ends[-1] or stop < at + head:
            at = ends.pop()  # rubbish after the last box is common, and harmless
        elif name in _MP4_PARENTS:
            ends.append(stop)
            at += head
        else:
            at = stop


_SEGMENT, _CLUSTER = 0x18538067, 0x1F43B675


def _check_webm(data: bytes, max_elements: int) -> None:
    """Walk the elements before the first cluster, at the top and in the segment."""
    at, end, count = 0, len(data), 0
    while at < end:
        count = _counted(count, max_elements)
        name, at = _vint(data, at, end, keep_marker=True)
        size, at = _vint(data, at, end, keep_marker=False)
        if at < 0 or name == _CLUSTER:
            return
        if size != -1 and at + size > end:  # -1: a live stream did not know its size
            raise Truncated("WebM")
        if name != _SEGMENT:
            at = end if size == -1 else at + size


def _counted(count: int, max_elements: int) -> int:
    if count >= max_elements:
        raise Refusal("too_many_elements", max_elements=max_elements)
    return count + 1


def _vint(data: bytes, at: int, end: int, *, keep_marker: bool) -> tuple[int, int]:
    """A variable-length integer and where it ends; (-1, end) for "unknown size", (0, -1) where none can be read."""
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
