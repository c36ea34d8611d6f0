"""Estimate from a file's header how large it is, as a share of the largest allowed file.

The estimate decides the order and the processor time of decoding, not any limit: a header that lies gets its file
decoded sooner, and stopped sooner. This runs outside the confined children, so it reads a bounded number of fields and
decodes nothing.
"""

from __future__ import annotations

import struct

from service.media.container import webp_size
from service.media.limits import MediaLimits
from service.media.sniff import Format, Kind

MAX_SEGMENTS = 1024  # of a JPEG before its size, or blocks of a GIF before its first frame; phones write some dozens
MAX_ITEMS = 256  # items with a size that are read of an ISO media file
ITEM_BYTES = 64 * 1024  # bytes of an ISO media file that are searched for them
JPEG_SIZES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15


def size_share(data: bytes, kind: Kind, format: Format, limits: MediaLimits) -> float:
    """Return the share (0 to 1) of the allowed pixels or bytes, whichever is larger.

    A picture whose header does not say its size counts as one of the largest; for a video only the bytes count.
    """
    share = len(data) / limits.max_bytes
    if kind == "image":
        size = size_from_header(data, format)
        share = max(share, 1.0 if size is None else size[0] * size[1] / limits.max_pixels)
    return min(share, 1.0)


def size_from_header(data: bytes, format: Format) -> tuple[int, int] | None:
    """Return (width, height) as the header claims, or None where it does not say."""
    try:
        match format:
            case "JPEG":
                return _jpeg_size(data)
            case "PNG":
                return struct.unpack_from(">II", data, 16)
            case "WEBP":
                return webp_size(data)
            case "GIF":
                return _gif_size(data)
            case "BMP":
                return _bmp_size(data)
            case _:
                return _iso_size(data)
    except (struct.error, IndexError):  # shorter than its header
        return None


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Read the size in the start-of-frame segment; segments are FF, marker, length of the rest (2 bytes)."""
    at = 2
    for _ in range(MAX_SEGMENTS):
        marker, length = struct.unpack_from(">xBH", data, at)
        if data[at] != 0xFF:
            return None
        if marker in JPEG_SIZES:
            height, width = struct.unpack_from(">HH", data, at + 5)
            return width, height
        at += 1 if marker == 0xFF else 2 + length  # FF may be repeated before a marker
    return None


def _gif_size(data: bytes) -> tuple[int, int] | None:
    """Return the canvas size, enlarged to hold the first frame as decoders do."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)  # behind the colour table
    for _ in range(MAX_SEGMENTS):
        if data[at] == 0x2C:  # the frame; 0x21 is an extension: blocks with their length, up to an empty one
            left, top, frame_width, frame_height = struct.unpack_from("<HHHH", data, at + 1)
            return max(width, left + frame_width), max(height, top + frame_height)
        at += 2 if data[at] == 0x21 else 1 + data[at]
    return None


def _bmp_size(data: bytes) -> tuple[int, int]:
    (num_header,) = struct.unpack_from("<I", data, 14)
    width, height = struct.unpack_from("<HH" if num_header == 12 else "<ii", data, 18)
    return abs(width), abs(height)  # a negative height: from the top down


def _iso_size(data: bytes) -> tuple[int, int] | None:
    """Return the largest "ispe" (item size) of an AVIF or HEIC: of its picture, tiles and thumbnails."""
    sizes: list[tuple[int, int]] = []
    at = 0
    while (at := data.find(b"ispe", at, ITEM_BYTES)) >= 0 and len(sizes) < MAX_ITEMS:
        sizes.append(struct.unpack_from(">II", data, at + 8))
        at += 4
    return max(sizes, key=lambda size: size[0] * size[1], default=None)
