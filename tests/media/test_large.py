"""Small files of as many pixels as are allowed are decoded one after another, and leave no memory in their child."""

from __future__ import annotations

import asyncio
import re
import struct
from pathlib import Path

import pytest
from PIL import Image

from service.errors import TooLarge
from service.media import MediaDecoder, MediaLimits
from tests.media.samples import SQUARE, encoded, image_bytes

pytestmark = pytest.mark.anyio

SIDE = 7000  # 49 of the 50 million pixels that are allowed
CHILD_MIB = 110  # of an idle child; such a picture takes 140 more


def tiny_webp(side: int) -> bytes:
    """A lossless WebP of one red: no bit is spent on a pixel, so its header may say any size. Some 36 bytes."""
    data = bytearray(encoded(Image.new("RGB", (16, 16), "red"), "WEBP", lossless=True))
    at = data.index(b"VP8L") + 9  # 14 bits of width - 1, 14 of height - 1, 4 others
    (word,) = struct.unpack_from("<I", data, at)
    struct.pack_into("<I", data, at, word & 0xF0000000 | side - 1 | side - 1 << 14)
    return bytes(data)


def large(mode: str, value: int, format: str) -> bytes:
    return encoded(Image.new(mode, (SIDE, SIDE), value), format)


FILES = {
    "WebP": (lambda: tiny_webp(SIDE), (255, 0, 0)),
    "PNG of one bit": (lambda: large("1", 1, "PNG"), (255, 255, 255)),
    "GIF": (lambda: large("P", 0, "GIF"), (0, 0, 0)),
    "grey JPEG": (lambda: large("L", 90, "JPEG"), (90, 90, 90)),
}


def mib_of(pid: int, name: str) -> int:
    """VmRSS: present memory; VmHWM: the most it ever was."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) // 1024


async def test_the_largest_pictures_take_one_childs_memory_at_a_time_and_hold_up_no_small_one():
    files = {name: make() for name, (make, _) in FILES.items()}
    decoder = MediaDecoder(MediaLimits(), SQUARE, workers=2)
    await decoder.start()
    try:
        waiting = {name: asyncio.create_task(decode(decoder, data)) for name, data in files.items()}
        await decode(decoder, image_bytes("PNG"))
        assert not all(task.done() for task in waiting.values()), "a small picture goes through beside them"
        for name, (_, colour) in FILES.items():
            assert (await waiting[name]).frames[0, 9, 9].tolist() == list(colour), name
        await decode(decoder, image_bytes("PNG"))  # whichever child takes it, the other is idle
        children = decoder.stats.children
        idle, busy = sorted(mib_of(pid, "VmHWM") for pid in children)
        assert idle < CHILD_MIB < busy < decoder.limits.memory_bytes >> 20
        async with asyncio.timeout(20):
            while max(mib_of(pid, "VmRSS") for pid in children) > CHILD_MIB:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert decoder.stats.children_started == 2, "no child died of them"
        with pytest.raises(TooLarge, match="7100x7100"):
            await decode(decoder, tiny_webp(7100))
    finally:
        await decoder.close()


async def decode(decoder: MediaDecoder, data: bytes):
    return await decoder.decode(data, kind="image", num_frames=None, fps=None)
