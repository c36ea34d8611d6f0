"""A decoder shared by the tests of a module; those that break its children make their own."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from service.media import MediaDecoder, MediaLimits
from tests.media.samples import SQUARE


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def decoder() -> AsyncIterator[MediaDecoder]:
    decoder = MediaDecoder(MediaLimits(decode_seconds=10.0), SQUARE, workers=2)
    await decoder.start()
    yield decoder
    await decoder.close()
