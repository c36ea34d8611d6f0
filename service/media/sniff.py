"""What a file is, told from its first bytes and from nothing else: names and content types are the client's claims."""

from __future__ import annotations

from typing import Literal

Kind = Literal["image", "video"]
Format = Literal["JPEG", "PNG", "WEBP", "GIF", "BMP", "MP4", "WEBM", "AVI", "FRAME LIST"]

KIND_OF: dict[Format, Kind] = {
    "JPEG": "image",
    "PNG": "image",
    "WEBP": "image",
    "GIF": "image",
    "BMP": "image",
    "MP4": "video",
    "WEBM": "video",
    "AVI": "video",
    "FRAME LIST": "video",
}

FRAME_LIST_MAGIC = b"\x8bFRM\r\n\x1a\n"  # our own, see frame_list.py

# ISO media brands that are still pictures (HEIF, AVIF): same container as MP4, but nothing here reads them.
_STILL_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1", b"avif", b"avis")
_RIFF_FORMATS: dict[bytes, Format] = {b"WEBP": "WEBP", b"AVI ": "AVI"}
_BMP_HEADER_SIZES = (12, 40, 52, 56, 64, 108, 124)


def sniff(data: bytes) -> Format | None:
    """The format of a file by its magic bytes, or None when it is none that we read."""
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
        return None if data[8:12] in _STILL_BRANDS else "MP4"
    # "BM" alone is too short to tell: the size of the header that follows must be a known one too.
    if data.startswith(b"BM") and int.from_bytes(data[14:18], "little") in _BMP_HEADER_SIZES:
        return "BMP"
    if data.startswith(FRAME_LIST_MAGIC):
        return "FRAME LIST"
    return None
