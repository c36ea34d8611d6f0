"""Detect a file's format from its first bytes alone: file names and content types are the client's claims."""

from __future__ import annotations

from typing import Literal

Kind = Literal["image", "video"]
Format = Literal["JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF", "HEIC", "MP4", "WEBM", "AVI", "MPEG-TS", "FRAME LIST"]

KIND_OF: dict[Format, Kind] = {
    "JPEG": "image",
    "PNG": "image",
    "WEBP": "image",
    "GIF": "image",
    "BMP": "image",
    "AVIF": "image",
    "HEIC": "image",
    "MP4": "video",
    "WEBM": "video",
    "AVI": "video",
    "MPEG-TS": "video",
    "FRAME LIST": "video",
}

FRAME_LIST_MAGIC = b"\x8bFRM\r\n\x1a\n"  # FlashServe's own format, see frame_list.py

# ISO media brands of still pictures, in the same container as MP4. AVIF and HEIC brands name the codec; with a general
# still brand, the compatible brands that follow it may name the codec.
_AVIF_BRANDS = (b"avif", b"avis")
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs")
_SEQUENCE_BRANDS = (b"avis", b"hevc", b"hevx", b"hevm", b"hevs", b"msf1")
STILL_BRANDS = (b"mif1", b"mif2", b"msf1", b"miaf", b"MiHA", b"MiHB", b"MiHE", b"MiAB", b"MA1A", b"MA1B")
_QUICKTIME_BOXES = (b"wide", b"free", b"skip", b"moov", b"mdat")  # old files have no ftyp and begin with one of these
_RIFF_FORMATS: dict[bytes, Format] = {b"WEBP": "WEBP", b"AVI ": "AVI"}
_BMP_HEADER_SIZES = (12, 40, 52, 56, 64, 108, 124)


def sniff(data: bytes) -> Format | None:
    """Return the format that a file's magic bytes name, or None for formats that are not supported."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data.startswith(b"RIFF"):
        return _RIFF_FORMATS.get(data[8:12])
    if data.startswith(b"\x1a\x45\xdf\xa3"):
        return "WEBM"  # Matroska has the same magic
    if data[4:8] == b"ftyp":
        return _iso_format(data)
    if data[4:8] in _QUICKTIME_BOXES:
        return "MP4"
    # "BM" alone is too short to be sure: the size of the header must be a known one too.
    if data.startswith(b"BM") and int.from_bytes(data[14:18], "little") in _BMP_HEADER_SIZES:
        return "BMP"
    if data.startswith(FRAME_LIST_MAGIC):
        return "FRAME LIST"
    # Each packet begins with "G"; cameras write four bytes before it.
    if data[0:565:188] == b"GGGG" or data[4:581:192] == b"GGGG":
        return "MPEG-TS"
    return None


def _iso_format(data: bytes) -> Format:
    """Return the format of a file with an ftyp box: length, name, major brand, version, compatible brands."""
    major, *compatible = _brands(data)
    for brand in (major, *(compatible if major in STILL_BRANDS else ())):
        if brand in _AVIF_BRANDS:
            return "AVIF"
        if brand in _HEIC_BRANDS:
            return "HEIC"
    return "HEIC" if major in STILL_BRANDS else "MP4"


def _brands(data: bytes) -> list[bytes]:
    """Return the major brand of an ISO media file, and those that it is compatible with."""
    end = min(int.from_bytes(data[:4], "big"), len(data), 1024)
    return [data[8:12], *(data[at : at + 4] for at in range(16, end - 3, 4))]


# Unsupported formats by their first bytes, so that a refusal can name them.
_UNREAD: tuple[tuple[bytes, str], ...] = (
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (b"%PDF-", "PDF"),
    (b"8BPS", "Photoshop"),
    (b"\0\0\x01\0", "ICO"),
    (b"qoif", "QOI"),
    (b"FLV", "FLV"),
    (b"OggS", "Ogg"),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "WMV"),
    (b"\0\0\x01\xba", "MPEG program stream"),
)


def unsupported_format(data: bytes) -> str | None:
    """Return the name of a known format that is not supported, or None."""
    for magic, name in _UNREAD:
        if data.startswith(magic):
            return name
    text = data[:4096].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<svg", b"<?xml", b"<!--", b"<!doctype svg")) and b"<svg" in text:
        return "SVG"
    return "HTML" if text.startswith((b"<!doctype html", b"<html")) else None


def may_be(format: Format, kind: Kind, data: bytes) -> bool:
    """Return whether a file can be decoded as `kind`. Animated pictures may be image or video, and any GIF."""
    if KIND_OF[format] == kind or format == "GIF":
        return True
    return kind == "video" and is_animated(data, format)


def is_animated(data: bytes, format: Format) -> bool:
    """Return whether a WebP has the animation flag, a PNG an acTL chunk before its pixels, and an AVIF or HEIC a brand
    of sequences."""
    match format:
        case "WEBP":
            return data[12:16] == b"VP8X" and bool(data[20:21] and data[20] & 2)
        case "PNG":
            return 0 < data.find(b"acTL") < data.find(b"IDAT")
        case "AVIF" | "HEIC":
            return not set(_brands(data)).isdisjoint(_SEQUENCE_BRANDS)
        case _:
            return False
