"""What a container's own header says about size, completeness and mirroring, read without decoding anything.

Just enough of MP4, Matroska/WebM, AVI, GIF and WebP to refuse frames that are too large before a decoder allocates
them, and files that end before they should. A header that lies gets past here; the child's limits and the check on
the first decoded frame are for those.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from service.media.sniff import Format

Size = tuple[int, int]  # (width, height) in pixels


class Truncated(ValueError):
    """The file ends before its own header says it should."""


def video_size(data: bytes, format: Format) -> Size | None:
    """The largest frame size announced, or None when no header says. Raises Truncated."""
    sizes = {"MP4": _mp4_sizes, "WEBM": _webm_sizes, "AVI": _avi_sizes, "GIF": _gif_sizes}[format](data)
    return max(sizes, key=lambda size: size[0] * size[1], default=None)


def mirrored_axis(data: bytes, format: Format) -> int | None:
    """The axis of (height, width) along which a frame is still to be flipped when it has been turned as the container
    says; None where it is not mirrored. Cameras that face their owner write such files. Raises Truncated."""
    if format != "MP4":
        return None
    a = b = c = d = 0  # of the display matrix: (x, y) is shown at (a x + c y, b x + d y); of no track so far
    for name, start, end in _mp4_boxes(data, 0, len(data)):
        if name == b"tkhd" and end > start:
            # version and flags 4, times and duration 20 or, in version 1, 32, layer and the like 16, then the matrix
            at = start + (52 if data[start] == 1 else 40)
            a, b, _, c, d = struct.unpack_from(">5i", data, at) if at + 20 <= end else (0,) * 5
        elif name == b"stsd" and _is_visual(data[start + 12 : start + 16]):
            break
    if b == c == 0 and a * d < 0:
        return 0
    return 1 if a == d == 0 and b * c > 0 else None  # what was turned on its side is flipped across


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


def _gif_sizes(data: bytes) -> list[Size]:
    """Magic 6 bytes, then width and height."""
    return [struct.unpack_from("<HH", data, 6)] if len(data) >= 10 else []


def _avi_sizes(data: bytes) -> list[Size]:
    """RIFF [size] "AVI " LIST [size] "hdrl" "avih" [size] {..., width at byte 32, height at byte 36}."""
    if 8 + int.from_bytes(data[4:8], "little") > len(data):
        raise Truncated("AVI")
    if data[20:28] != b"hdrlavih" or len(data) < 72:
        return []
    return [struct.unpack_from("<II", data, 32 + 32)]


_MP4_PARENTS = (b"moov", b"trak", b"mdia", b"minf", b"stbl")


def _mp4_sizes(data: bytes) -> list[Size]:
    """Sizes in the sample descriptions of all video tracks: moov/trak/mdia/minf/stbl/stsd."""
    sizes: list[Size] = []
    for name, start, end in _mp4_boxes(data, 0, len(data)):
        if name == b"stsd" and end - start >= 8 + 36 and _is_visual(data[start + 12 : start + 16]):
            # version and flags 4, count 4, then the entry: size 4, codec 4, ..., width at byte 32, height at 34
            sizes.append(struct.unpack_from(">HH", data, start + 8 + 32))
    return sizes


def _is_visual(codec: bytes) -> bool:
    return codec in (b"avc1", b"avc3", b"hvc1", b"hev1", b"vp08", b"vp09", b"av01", b"mp4v", b"mjpg", b"jpeg")


def _mp4_boxes(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Every box inside [start, end) and inside the parents above, as (name, start and end of its content)."""
    while start + 8 <= end:
        size, name = struct.unpack_from(">I4s", data, start)
        head = 8
        if size == 1 and start + 16 <= end:
            size, head = int.from_bytes(data[start + 8 : start + 16], "big"), 16
        stop = end if size == 0 else start + size
        if stop > end:
            if name in (b"moov", b"mdat", b"moof"):
                raise Truncated("MP4")
            return  # rubbish after the last box is common, and harmless
        if stop < start + head:
            return
        yield name, start + head, stop
        if name in _MP4_PARENTS:
            yield from _mp4_boxes(data, start + head, stop)
        start = stop


_SEGMENT, _CLUSTER = 0x18538067, 0x1F43B675
_TRACKS, _ENTRY, _VIDEO, _WIDTH, _HEIGHT = 0x1654AE6B, 0xAE, 0xE0, 0xB0, 0xBA
_WEBM_PARENTS = (_SEGMENT, _TRACKS, _ENTRY, _VIDEO)


def _webm_sizes(data: bytes) -> list[Size]:
    """Sizes of all video tracks: Segment/Tracks/TrackEntry/Video/{PixelWidth, PixelHeight}."""
    widths, heights = [], []
    for name, start, end in _webm_elements(data, 0, len(data)):
        if name == _WIDTH:
            widths.append(int.from_bytes(data[start:end], "big"))
        elif name == _HEIGHT:
            heights.append(int.from_bytes(data[start:end], "big"))
    return [(max(widths), max(heights))] if widths and heights else []


def _webm_elements(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Every element before the first cluster, inside the parents above, as (id, start and end of its content)."""
    while start < end:
        name, at = _vint(data, start, end, keep_marker=True)
        size, at = _vint(data, at, end, keep_marker=False)
        if at < 0 or name == _CLUSTER:
            return
        stop = end if size == -1 else at + size  # -1: a live stream did not know its size
        if stop > end:
            raise Truncated("WebM")
        yield name, at, stop
        if name in _WEBM_PARENTS:
            yield from _webm_elements(data, at, stop)
        start = stop


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
