"""Picture files put together from their parts, for what Pillow does not write: chunks, segments, boxes, profiles."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import av
import numpy as np
from PIL import Image, ImageCms

GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6  # PNG's colour types
SAMPLES = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGB_ALPHA: 4}


def chunk(name: bytes, content: bytes, *, sound: bool = True) -> bytes:
    """A chunk of a PNG; its checksum is wrong where it is not sound."""
    checksum = zlib.crc32(name + content) ^ (0 if sound else 1)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)


ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def png(samples: np.ndarray, depth: int, colour_type: int, *extra: bytes, interlaced: bool = False) -> bytes:
    """samples: (height, width, channels). `extra` are chunks before the image data."""
    height, width, channels = samples.shape
    assert channels == SAMPLES[colour_type]
    passes = [samples[y::down, x::across] for x, y, across, down in ADAM7] if interlaced else [samples]
    data = zlib.compress(b"".join(_rows(each, depth) for each in passes if each.size))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, interlaced))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _rows(samples: np.ndarray, depth: int) -> bytes:
    """Each with the filter that changes nothing before it."""
    height = len(samples)
    if depth == 16:
        rows = samples.astype(">u2").reshape(height, -1).view(np.uint8)
    else:
        bits = samples.reshape(height, -1, 1) >> np.arange(depth - 1, -1, -1) & 1
        rows = np.packbits(bits.reshape(height, -1).astype(np.uint8), axis=1)
    return b"".join(b"\0" + row.tobytes() for row in rows)


def with_chunks(data: bytes, *chunks: bytes) -> bytes:
    """A PNG with more chunks before its image data."""
    at = data.index(b"IDAT") - 4
    return data[:at] + b"".join(chunks) + data[at:]


def segment(marker: int, content: bytes) -> bytes:
    """A segment of a JPEG."""
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def with_segments(data: bytes, *segments: bytes) -> bytes:
    """A JPEG with more segments at its beginning."""
    return data[:2] + b"".join(segments) + data[2:]


def tiff(*entries: tuple[int, int, int, bytes], order: str = ">") -> bytes:
    """EXIF with these entries: tag, type, count, and value or offset as four bytes."""
    head = (b"MM" if order == ">" else b"II") + struct.pack(order + "HIH", 42, 8, len(entries))
    return head + b"".join(struct.pack(order + "HHI", *entry[:3]) + entry[3] for entry in entries) + bytes(4)


def orientation(value: int, order: str = ">") -> tuple[int, int, int, bytes]:
    """The entry that says how a picture is to be turned."""
    return 0x0112, 3, 1, struct.pack(order + "HH", value, 0)


# --- ICC profiles ---


def srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def swapped_profile() -> bytes:
    """sRGB, but what it calls red is green, and the other way round."""
    profile = bytearray(srgb_profile())
    red, green = profile.index(b"rXYZ"), profile.index(b"gXYZ")
    profile[red : red + 4], profile[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(profile)


def _profile(space: bytes, connection: bytes, kind: bytes, tags: dict[bytes, bytes]) -> bytes:
    start = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += struct.pack(">4sII", name, start + len(body), len(content))
        body += content
    white = struct.pack(">3I", 0xF6D6, 0x10000, 0xD32D)  # D50
    head = struct.pack(
        ">I4sI4s4s4s12x4s28x", start + len(body), b"\0" * 4, 0x04200000, kind, space, connection, b"acsp"
    )
    return head + white + bytes(128 - len(head) - len(white)) + table + body


def grey_profile(gamma: float) -> bytes:
    """A GRAY profile of one curve."""
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))
    white = b"XYZ \0\0\0\0" + struct.pack(">3I", 0xF6D6, 0x10000, 0xD32D)
    return _profile(b"GRAY", b"XYZ ", b"mntr", {b"wtpt": white, b"kTRC": curve})


def cmyk_profile() -> bytes:
    """A CMYK profile by a table of 16 corners: as much ink as there is makes it darker, and cyan alone is red."""
    corners = np.stack(np.meshgrid(*[[0, 1]] * 4, indexing="ij"), axis=-1).reshape(16, 4)
    lightness = np.clip(255 - corners @ (60, 40, 20, 255), 0, 255)
    reddish = np.clip(128 + corners @ (90, 0, 0, 0), 0, 255)
    corner_lab = np.stack([lightness, reddish, np.full(16, 128)], axis=-1).astype(np.uint8).tobytes()
    straight = bytes(range(256))
    matrix = struct.pack(">9i", *(np.eye(3, dtype=int) * 0x10000).ravel().tolist())
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + straight * 4 + corner_lab + straight * 3
    white = b"XYZ \0\0\0\0" + struct.pack(">3I", 0xF6D6, 0x10000, 0xD32D)
    return _profile(b"CMYK", b"Lab ", b"prtr", {b"wtpt": white, b"A2B0": table})


# --- HEIC ---


def box(name: bytes, *content: bytes) -> bytes:
    body = b"".join(content)
    return struct.pack(">I4s", 8 + len(body), name) + body


def full_box(name: bytes, version: int, *content: bytes) -> bytes:
    return box(name, bytes([version, 0, 0, 0]), *content)


def _hevc(image: Image.Image) -> tuple[bytes, bytes]:
    """One HEVC picture: its hvcC box, and its data as MP4 and HEIC have them."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        options = {"x265-params": "log-level=none:keyint=1:qp=4", "preset": "ultrafast"}
        stream: Any = container.add_stream("libx265", rate=1, options=options)
        stream.width, stream.height, stream.pix_fmt = *image.size, "yuv420p"
        stream.codec_context.codec_tag = "hvc1"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(image), format="rgb24")))
        container.mux(stream.encode())
    data = file.getvalue()
    config, media = data.index(b"hvcC") - 4, data.index(b"mdat") - 4
    ends = [at + int.from_bytes(data[at : at + 4], "big") for at in (config, media)]
    return data[config : ends[0]], data[media + 8 : ends[1]]


def heic(
    image: Image.Image,
    *,
    brands: Sequence[bytes] = (b"heic", b"mif1", b"heic"),
    grid: tuple[int, int] | None = None,
    says: tuple[int, int] | None = None,
    turns: int | None = None,
    mirror: int | None = None,
    exif: bytes | None = None,
    profile: bytes | None = None,
) -> bytes:
    """A HEIC as phones write it, of one picture or of (rows, columns) of tiles.

    turns: quarters, anticlockwise (irot). mirror: the axis along which pixels are reversed (imir). says: its size in
    pixels, where that is a lie.
    """
    rows, columns = grid or (1, 1)
    width, height = image.width // columns, image.height // rows
    tiles = [
        _hevc(image.crop((x * width, y * height, (x + 1) * width, (y + 1) * height)))
        for y in range(rows)
        for x in range(columns)
    ]
    items = [(index + 1, b"hvc1", tile[1]) for index, tile in enumerate(tiles)]  # id, type, content
    properties = [
        tiles[0][0],
        full_box(b"ispe", 0, struct.pack(">II", *((grid and (width, height)) or says or image.size))),
    ]
    used = {item: [0x81, 2] for item, _, _ in items}  # properties of each item, from 1; 0x80: essential
    references = b""
    primary = 1
    if grid is not None:
        primary = len(items) + 1
        size = says or image.size
        items.append((primary, b"grid", struct.pack(">BBBBHH", 0, 0, rows - 1, columns - 1, *size)))
        properties.append(full_box(b"ispe", 0, struct.pack(">II", *size)))
        used[primary] = [3]
        references += box(b"dimg", struct.pack(f">HH{len(tiles)}H", primary, len(tiles), *range(1, primary)))
    for name, value in ((b"irot", turns), (b"imir", mirror)):
        if value is not None:
            properties.append(box(name, bytes([value])))
            used[primary].append(0x80 | len(properties))
    if profile is not None:
        properties.append(box(b"colr", b"prof", profile))
        used[primary].append(len(properties))
    if exif is not None:
        items.append((len(items) + 1, b"Exif", exif))
        references += box(b"cdsc", struct.pack(">HHH", len(items), 1, primary))

    def meta(offset: int) -> bytes:
        places = b""
        for item, _, content in items:
            places += struct.pack(">HHHII", item, 0, 1, offset, len(content))
            offset += len(content)
        infos = [full_box(b"infe", 2, struct.pack(">HH4s", item, 0, kind), b"\0") for item, kind, _ in items]
        uses = [struct.pack(">HB", item, len(indices)) + bytes(indices) for item, indices in used.items()]
        return full_box(
            b"meta",
            0,
            full_box(b"hdlr", 0, bytes(4), b"pict", bytes(13)),
            full_box(b"pitm", 0, struct.pack(">H", primary)),
            full_box(b"iloc", 0, b"\x44\0", struct.pack(">H", len(items)), places),
            full_box(b"iinf", 0, struct.pack(">H", len(items)), *infos),
            full_box(b"iref", 0, references),
            box(b"iprp", box(b"ipco", *properties), full_box(b"ipma", 0, struct.pack(">I", len(used)), *uses)),
        )

    head = box(b"ftyp", brands[0], bytes(4), *brands[1:])
    return head + meta(len(head) + len(meta(0)) + 8) + box(b"mdat", *(content for _, _, content in items))
