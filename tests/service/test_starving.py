"""Over HTTP: clients that send slow or broken files without pause take nothing from one that sends a good picture."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import psutil
import pytest
from PIL import Image

from tests.media.samples import encoded, endless_gif, image_bytes
from tests.service.server import Server
from tests.service.starving import flooded, send, send_video

GOOD = image_bytes("PNG", (320, 240))
PHOTO = image_bytes("JPEG", (1600, 1200))
SLOW = {
    "progressive": lambda: encoded(plain(), "JPEG", progressive=True, quality=95, subsampling=0),
    "lossless": lambda: encoded(plain(), "WEBP", lossless=True, quality=0, method=0),
    "transparent": lambda: encoded(plain().convert("RGBA"), "PNG", compress_level=1),
}
BROKEN = {format: image_bytes(format, (64, 48))[:-400] for format in ("PNG", "JPEG", "WEBP", "GIF", "BMP")}


def plain() -> Image.Image:
    return Image.new("RGB", (2800, 2800), (9, 99, 199))  # nearly all of the pixels allowed


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = {"max_pixels": 8_000_000, "media_workers": 3, "video_workers": 1, "spare_media_workers": 1}
    server = Server(tmp_path_factory.mktemp("starving"), {}, settings)
    server.http.timeout = 60
    yield server
    server.close()


def test_a_good_picture_does_not_wait_for_slow_ones(server: Server) -> None:
    with flooded(server.url, [make() for make in SLOW.values()]) as flood:
        server.wait(lambda: len(flood.statuses) >= 1, 60)
        for data in (GOOD, PHOTO, GOOD, PHOTO):
            before = len(flood.statuses)
            assert send(server.http, data).status_code == 200
            assert len(flood.statuses) - before <= 2, "in one line, it would have waited for eight of them"
    assert set(flood.statuses) == {200}, "slow ones are served too"


def test_a_large_picture_from_another_address_does_not_wait_for_all_of_theirs(server: Server) -> None:
    data = SLOW["transparent"]()
    elsewhere = httpx.HTTPTransport(local_address="127.0.0.2")
    with (
        httpx.Client(base_url=server.url, timeout=60, transport=elsewhere) as http,
        flooded(server.url, [data]) as flood,
    ):
        server.wait(lambda: len(flood.statuses) >= 1, 60)
        before = len(flood.statuses)
        assert send(http, data).status_code == 200
        assert len(flood.statuses) - before <= 4, "in one line, it would have waited for eight of them"


def test_a_good_picture_does_not_wait_for_slow_videos(server: Server) -> None:
    with flooded(server.url, [endless_gif(40)], send_video) as flood:
        server.wait(lambda: len(flood.statuses) >= 1, 60)
        for data in (GOOD, PHOTO, GOOD, PHOTO):
            before = len(flood.statuses)
            assert send(server.http, data).status_code == 200
            assert len(flood.statuses) - before <= 2
    assert set(flood.statuses) == {200}


def test_broken_pictures_cost_no_child(server: Server) -> None:
    def children() -> set[int]:
        return {child.pid for child in psutil.Process(server.process.pid).children(recursive=True)}

    before = children()
    with flooded(server.url, list(BROKEN.values())) as flood:
        server.wait(lambda: len(flood.statuses) >= 8, 60)
        for _ in range(5):
            assert send(server.http, GOOD).status_code == 200
    assert set(flood.statuses) == {400}
    assert children() == before
