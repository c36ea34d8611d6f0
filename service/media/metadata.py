"""Strip a picture file to the parts that decide its pixels; extract orientation and colour profile.

Files carry text, thumbnails, makers' notes and broken tags, which make decoders fail. So each file is walked once here
and rewritten without them. The same walk limits the number of parts before any decoder sees the file. Whether a part is
valid is left to the decoder. A walk takes time in proportion to the number of parts, not to their content.

Covers JPEG, PNG, WebP, GIF, AVIF and HEIC. BMP has no metadata to strip.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from service.media.container import PartCounter, Size, iso_boxes, riff_chunks
from service.media.limits import MediaLimits
from service.media.refusal import Refusal
from service.media.sniff import STILL_BRANDS, Format


@dataclass(frozen=True)
class Picture:
    """One still picture. `data` is a file of the same format that holds only its pixels."""

    data: bytes
    orientation: int = 1  # EXIF's: 1 is upright
    profile: bytes = b""  # ICC; empty: none
    transparent: tuple[int, ...] | None = None  # PNG without palette: the decoded colour that is transparent
    depth: int = 8  # PNG: bits per sample
    canvas: Size | None = None  # GIF, WebP: the picture lies at `offset` on a transparent canvas of this size
    offset: tuple[int, int] = (0, 0)
    complete: bool = True  # False: a JPEG without its end marker
    unit: Size = (8, 8)  # JPEG: size in pixels of the minimum coded unit


def split_metadata(data: bytes, format: Format, limits: MediaLimits) -> Picture:
    """Rewrite a picture file without metadata; an animation becomes its first frame.

    Raises Refusal for files beyond the limits, ValueError and struct.error for broken ones.
    """
    split = _SPLITTERS.get(format)
    return Picture(data) if split is None else split(data, limits)


def split_video_metadata(data: bytes, format: Format, limits: MediaLimits) -> Picture:
    """Rewrite an animated PNG, AVIF or HEIC without metadata, with all its frames; return any other file as it is.

    Raises Refusal for files beyond the limits, ValueError and struct.error for broken ones.
    """
    if format in ("AVIF", "HEIC"):
        return _split_heif(data, limits)
    if format != "PNG":
        return Picture(data)
    frames, metadata = _split_png_chunks(data, PartCounter("too_many_elements", max_elements=limits.max_elements))
    return Picture(
        frames,
        exif_orientation(metadata.get(b"eXIf", b"")),
        _inflate_profile(metadata.get(b"iCCP", b""), limits.max_profile_bytes),
    )


def strip_png(data: bytes, limits: MediaLimits) -> bytes:
    """Return a PNG without its metadata. Raises Refusal for too many chunks."""
    return _split_png_chunks(data, _part_counter(limits))[0]


def _part_counter(limits: MediaLimits) -> PartCounter:
    return PartCounter("too_many_parts", max_parts=limits.max_parts)


def exif_orientation(exif: bytes) -> int:
    """Read tag 0x0112 of the first directory: 1 to 8; 1 where it is missing or broken."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (num_entries,) = struct.unpack_from(order + "H", exif, start)
        for at in range(start + 2, start + 2 + 12 * num_entries, 12):
            tag, kind, count = struct.unpack_from(order + "HHI", exif, at)
            if tag == 0x0112 and count == 1 and kind in _INTEGERS:
                (value,) = struct.unpack_from(order + _INTEGERS[kind], exif, at + 8)
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass  # truncated
    return 1


_INTEGERS = {1: "B", 3: "H", 4: "I"}  # EXIF's types BYTE, SHORT and LONG

# --- JPEG: markers, most of them followed by a segment ---

_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # stuffed zeros, fill bytes and restart markers belong to scans
_SCAN_END = re.compile(rb"\xff[\xc0-\xcf\xd8-\xef\xfe]")  # decoders skip reserved markers within a scan
_SOI, _EOI, _SOS, _TEM = 0xD8, 0xD9, 0xDA, 0x01
_FRAMES = (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))  # SOF0 to SOF15
_HUFFMAN_FRAMES = (0xC0, 0xC1, 0xC2)
_JFIF = b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0"
_ADOBE = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0"  # followed by one byte: the colour transform
_COEFFICIENTS = 64  # of a block of 8x8 pixels


def _split_jpeg(data: bytes, limits: MediaLimits) -> Picture:
    """Keep tables, frames and scans, and rewrite JFIF and Adobe markers, which decide the colours.

    Stops at the first end marker, so an MPO file gives its first picture.
    """
    counter = _part_counter(limits)
    view = memoryview(data)
    jfif, adobe, exif, profiles = b"", b"", b"", list[bytes]()
    body: list[bytes | memoryview] = []
    num_scans = num_scan_bytes = 0
    num_blocks, num_components, unit = 0, 1, (8, 8)
    finished: set[tuple[int, int]] = set()  # (component, coefficient) whose last bit is in a scan that has started
    complete, at = False, 2
    while (found := _MARKER.search(data, at)) is not None:
        counter.add()
        start, at = found.span()
        marker = data[start + 1]
        if marker == _EOI:
            complete = True
            break
        if marker in (_SOI, _TEM):
            continue
        if at + 2 > len(data) or (stop := at + int.from_bytes(view[at : at + 2], "big")) > len(data):
            break  # truncated
        content = data[at + 2 : stop] if marker >= 0xC0 else b""
        if marker == _SOS:
            num_scans += 1
            if num_scans > limits.max_scans:
                raise Refusal("too_many_scans", max_scans=limits.max_scans)
            components, (first, last, bits) = content[1 : 1 + 2 * content[0] : 2], content[1 + 2 * content[0] :][:3]
            if not bits & 15:
                finished |= {(component, index) for component in components for index in range(first, last + 1)}
            following = _SCAN_END.search(data, stop)
            end = len(data) if following is None else following.start()
            num_scan_bytes += end - stop
            body.append(view[start:end])
            stop = end
        elif marker in _FRAMES:
            height, width, num_components = struct.unpack_from(">HHB", content, 1)
            num_blocks = width * height // _COEFFICIENTS if marker in _HUFFMAN_FRAMES else 0
            factors = content[7 : 6 + 3 * num_components : 3] if num_components > 1 else b"\x11"
            unit = (8 * max(factor >> 4 for factor in factors), 8 * max(factor & 15 for factor in factors))
            body.append(view[start:stop])
        elif 0xC0 <= marker <= 0xDF:
            body.append(view[start:stop])
        elif marker == 0xE0 and content.startswith(b"JFIF\0"):
            jfif = _JFIF
        elif marker == 0xE1 and content.startswith(b"Exif\0\0") and not exif:
            exif = content
        elif marker == 0xE2 and content.startswith(b"ICC_PROFILE\0"):
            profiles.append(content[12:])
        elif marker == 0xEE and content.startswith(b"Adobe") and len(content) >= 12:
            adobe = _ADOBE + content[11:12]
        at = max(at, stop)
    if not num_scans:
        raise ValueError("a JPEG without a scan")
    # A Huffman-coded block of 8x8 pixels takes at least one bit.
    if 8 * num_scan_bytes < limits.min_decoded * num_blocks or (
        not complete and len(finished) < _COEFFICIENTS * num_components
    ):
        raise Refusal("image_truncated", percent=round(100 * limits.min_decoded))
    if not complete:
        body[-1] = bytes(body[-1]).rstrip(b"\xff")  # half of a marker or of a stuffed byte
    return Picture(
        b"".join([b"\xff\xd8", jfif, adobe, *body, b"\xff\xd9"]),
        exif_orientation(exif),
        _join_profile(profiles),
        complete=complete,
        unit=unit,
    )


def _join_profile(segments: list[bytes]) -> bytes:
    """Join the parts of an ICC profile; each has its number from 1 and their total. Empty where parts are missing."""
    parts = sorted(part for part in segments if len(part) > 2)
    complete = [part[0] for part in parts] == list(range(1, len(parts) + 1)) and all(
        part[1] == len(parts) for part in parts
    )
    return b"".join(part[2:] for part in parts) if complete else b""


# --- PNG: chunks of length, name, content and checksum ---

_PNG = b"\x89PNG\r\n\x1a\n"
_GREY, _RGB, _PALETTE = 0, 2, 3  # colour types that may have a tRNS chunk


def _split_png(data: bytes, limits: MediaLimits) -> Picture:
    """Keep header, palette and image data; an APNG gives its default image.

    Chunks with a wrong checksum are skipped, as libpng does with ancillary ones. Image data has zlib's own checksum,
    which the decoder verifies.
    """
    counter = _part_counter(limits)
    view = memoryview(data)
    chunks: dict[bytes, bytes] = {}  # the first of each kind that is kept, except image data
    image_data: list[memoryview] = []
    at = len(_PNG)
    while at + 8 <= len(data):
        counter.add()
        length, name = struct.unpack_from(">I4s", data, at)
        content, stop = view[at + 8 : at + 8 + length], at + 12 + length
        if name == b"IEND":
            break
        if name == b"IDAT":
            image_data.append(content)
        elif name in (b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"iCCP") and name not in chunks:
            if zlib.crc32(content, zlib.crc32(name)) == int.from_bytes(view[stop - 4 : stop], "big"):
                chunks[name] = bytes(content)
        at = stop
    if (header := chunks.get(b"IHDR")) is None:
        raise ValueError("a PNG without a valid header")
    _, _, depth, colour_type, *_ = struct.unpack(">IIBBBBB", header)
    pixels = b"".join(image_data)
    palette = [_chunk(b"PLTE", chunks[b"PLTE"])] if colour_type == _PALETTE else []
    transparency, transparent = chunks.get(b"tRNS", b""), None
    if palette and 0 < len(transparency) <= min(256, len(chunks[b"PLTE"]) // 3):
        palette.append(_chunk(b"tRNS", transparency))
    elif len(transparency) == {_GREY: 2, _RGB: 6}.get(colour_type, 0) > 0:
        values = struct.unpack(f">{len(transparency) // 2}H", transparency)
        largest = (1 << depth) - 1
        transparent = tuple((value & largest) * max(1, 255 // largest) for value in values)
    return Picture(
        b"".join([_PNG, _chunk(b"IHDR", header), *palette, _chunk(b"IDAT", pixels), _chunk(b"IEND", b"")]),
        exif_orientation(chunks.get(b"eXIf", b"")),
        _inflate_profile(chunks.get(b"iCCP", b""), limits.max_profile_bytes),
        transparent,
        depth,
    )


def _split_png_chunks(data: bytes, counter: PartCounter) -> tuple[bytes, dict[bytes, bytes]]:
    """Return a PNG with only those chunks that make its pixels and frames, and the content of its eXIf and iCCP."""
    view = memoryview(data)
    kept: list[bytes | memoryview] = [view[: len(_PNG)]]
    metadata: dict[bytes, bytes] = {}
    at = len(_PNG)
    while at + 8 <= len(data):
        counter.add()
        length, name = struct.unpack_from(">I4s", data, at)
        if name in (b"IHDR", b"PLTE", b"tRNS", b"acTL", b"fcTL", b"fdAT", b"IDAT", b"IEND"):
            kept.append(view[at : at + 12 + length])
        elif name in (b"eXIf", b"iCCP"):
            metadata.setdefault(name, bytes(view[at + 8 : at + 8 + length]))
        at += 12 + length
    return b"".join(kept), metadata


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(content, zlib.crc32(name)))


def _inflate_profile(content: bytes, max_bytes: int) -> bytes:
    """Decompress the profile of an iCCP chunk: name, 0, method 0, zlib data. Empty where that fails."""
    _, _, packed = content.partition(b"\0")
    inflater = zlib.decompressobj()
    try:
        profile = inflater.decompress(packed[1:], max_bytes) if packed[:1] == b"\0" else b""
    except zlib.error:
        return b""
    return profile if inflater.eof else b""


# --- WebP: RIFF chunks ---


def _split_webp(data: bytes, limits: MediaLimits) -> Picture:
    """Return a WebP without its metadata: the chunks with one picture's colours and transparency."""
    counter = _part_counter(limits)

    def contents(data: bytes, at: int) -> list[tuple[bytes, memoryview]]:
        chunks = riff_chunks(data, at, len(data), counter)
        return [(name, memoryview(data)[start:stop]) for name, start, stop in chunks if stop <= len(data)]

    chunks = dict(reversed(contents(data, 12)))  # the first of each name
    canvas, offset = None, (0, 0)
    picture = chunks
    if (extended := chunks.get(b"VP8X")) is not None:
        canvas = (1 + int.from_bytes(extended[4:7], "little"), 1 + int.from_bytes(extended[7:10], "little"))
    size = canvas
    if (frame := chunks.get(b"ANMF")) is not None:
        x, y, width, height = (int.from_bytes(frame[at : at + 3], "little") for at in (0, 3, 6, 9))
        offset, size = (2 * x, 2 * y), (1 + width, 1 + height)
        picture = dict(contents(bytes(frame), 16))
    parts: dict[bytes, memoryview] = {name: picture[name] for name in (b"ALPH", b"VP8 ", b"VP8L") if name in picture}
    if size is not None and b"ALPH" in parts:
        sides = b"".join((side - 1).to_bytes(3, "little") for side in size)
        parts = {b"VP8X": memoryview(b"\x10\0\0\0" + sides), **parts}  # 0x10: the transparency flag
    body = b"WEBP" + b"".join(
        name + len(content).to_bytes(4, "little") + content + bytes(len(content) % 2) for name, content in parts.items()
    )
    profile = bytes(chunks.get(b"ICCP", b""))
    return Picture(
        b"RIFF" + len(body).to_bytes(4, "little") + body,
        exif_orientation(bytes(chunks.get(b"EXIF", b""))),
        profile,
        canvas=canvas,
        offset=offset,
    )


# --- GIF: blocks ---

_EXTENSION, _IMAGE, _TRAILER, _GRAPHIC_CONTROL = 0x21, 0x2C, 0x3B, 0xF9


def _split_gif(data: bytes, limits: MediaLimits) -> Picture:
    """Keep the colour table, the transparent colour and the first frame, which becomes the whole canvas."""
    counter = _part_counter(limits)
    head = data[:13]
    screen_width, screen_height, flags = struct.unpack_from("<HHB", head, 6)
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    colours, control = data[13:at], b""
    while data[at] != _IMAGE:
        counter.add()
        if data[at] == _EXTENSION:
            start, at = at, at + 2
            while length := data[at]:
                counter.add()
                at += 1 + length
            if data[start + 1] == _GRAPHIC_CONTROL:
                control = data[start : at + 1]
        elif data[at] == _TRAILER:
            raise ValueError("a GIF without a frame")
        at += 1
    x, y, width, height = struct.unpack_from("<HHHH", data, at + 1)
    size = struct.pack("<HH", width, height)
    return Picture(
        b"".join([head[:6], size, head[10:], colours, control, b"\x2c\0\0\0\0", size, data[at + 9 :]]),
        canvas=(max(screen_width, x + width), max(screen_height, y + height)),
        offset=(x, y),
    )


# --- AVIF and HEIC: ISO media boxes ---


def _split_heif(data: bytes, limits: MediaLimits) -> Picture:
    """Rename metadata items, so that decoders ignore them while all offsets in the file stay valid.

    A major brand that does not name the codec becomes `mif1`, the only general one that Pillow knows. Orientation and
    colour profile are properties of the picture, which its decoder reads.
    """
    counter = _part_counter(limits)
    renamed = bytearray(data)
    if data[8:12] in STILL_BRANDS:
        renamed[8:12] = b"mif1"

    def boxes(wanted: bytes, start: int, end: int) -> list[tuple[int, int]]:
        found = iso_boxes(data, start, end, counter)
        return [(at, stop) for name, at, stop in found if name == wanted and stop <= end]

    for meta_start, meta_end in boxes(b"meta", 0, len(data)):
        for table_start, table_end in boxes(b"iinf", meta_start + 4, meta_end):
            entries = table_start + (6 if data[table_start] == 0 else 8)  # version and flags, number of entries
            for start, end in boxes(b"infe", entries, table_end):
                at = start + (10 if data[start] == 3 else 8)  # version and flags, number, protection
                if at + 4 <= end and data[at : at + 4] in (b"Exif", b"mime"):
                    renamed[at : at + 4] = b"skip"
    return Picture(bytes(renamed))


_SPLITTERS: dict[Format, Callable[[bytes, MediaLimits], Picture]] = {
    "JPEG": _split_jpeg,
    "PNG": _split_png,
    "WEBP": _split_webp,
    "GIF": _split_gif,
    "AVIF": _split_heif,
    "HEIC": _split_heif,
}
