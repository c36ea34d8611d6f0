"""file:// URLs: what is read below the folders that the operator allows, and above all what is not."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from service.errors import BadRequest, NoCapacity, ServiceError, TooLarge
from service.media import MediaLimits
from service.media.fetch import resolve

pytestmark = pytest.mark.anyio

LIMITS = MediaLimits(max_bytes=1000, fetch_seconds=5.0)
BODY = b"a picture"


@pytest.fixture
def allowed(tmp_path: Path) -> Path:
    """A folder with a file, beside one that is not allowed and whose name begins alike."""
    for name in ("allowed", "allowed-not", "outside"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / "a.png").write_bytes(BODY if name == "allowed" else b"secret")
    return tmp_path / "allowed"


async def read(url: str, *folders: Path, count: list[int] | None = None) -> bytes:
    return await resolve(url, limits=LIMITS, allowed_folders=folders, count=(count if count is not None else []).append)


async def refused(url: str, *folders: Path) -> ServiceError:
    with pytest.raises(ServiceError) as error:
        await read(url, *folders)
    return error.value


@pytest.mark.parametrize(
    "form",
    [
        "file://{}/deep/a.png",
        "file:{}/deep/a.png",
        "FILE://LocalHost{}/deep/a.png",
        "file://{}/deep/%61%2Epng",
        "file://{}//deep/./a.png",
        "file://{}/deep/../deep/a.png",
        "file://{}/%64eep%2Fa.png",
    ],
)
async def test_a_file_below_the_folder_is_read_and_counted(allowed: Path, form: str):
    counted: list[int] = []
    assert await read(form.format(allowed), allowed, count=counted) == BODY
    assert counted == [len(BODY)]


async def test_names_of_any_characters(allowed: Path):
    for name, encoded in (
        ("two words.png", "two%20words.png"),
        ("ü.png", "ü.png"),
        ("ü+1.png", "%C3%BC+1.png"),
        ("100%.png", "100%25.png"),
        ("a?b#c\\d.png", "a%3Fb%23c%5Cd.png"),
        ("..png", "..png"),
        (" line\nbreak", "%20line%0Abreak"),
    ):
        (allowed / name).write_bytes(name.encode())
        assert await read(f"file://{allowed}/{encoded}", allowed) == name.encode()
    (allowed / os.fsdecode(b"\xff.png")).write_bytes(b"not UTF-8")
    assert await read(f"file://{allowed}/%FF.png", allowed) == b"not UTF-8"


async def test_it_is_off_by_default_and_the_error_says_how_to_turn_it_on(allowed: Path):
    for url in (f"file://{allowed}/deep/a.png", "file:///etc/passwd", "file:nonsense"):
        error = await refused(url)
        assert (error.status, error.code) == (400, "file_not_allowed")
        assert "--allowed-media-path" in error.message


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "/no/such/file",
        "{0}/../outside/deep/a.png",
        "{0}/../outside/deep/missing.png",
        "{0}/%2e%2e/outside/deep/a.png",
        "{0}/deep/..%2F..%2Foutside/deep/a.png",
        "{0}-not/deep/a.png",
        "{0}-no/such/a.png",
        "{0}",
        "{0}/",
        "{0}/deep/..",
        "/\ud800.png",
        "/proc/self/environ",
        "/dev/zero",
        "/",
    ],
)
async def test_whatever_lies_outside_gets_one_answer_whether_it_exists_or_not(allowed: Path, path: str):
    error = await refused("file://" + path.format(allowed), allowed, allowed / "deep")
    other = await refused("file:///surely/not/there", allowed)
    assert (error.status, error.code, error.message) == (other.status, "file_not_allowed", other.message)
    assert str(allowed) not in error.message


async def test_links_are_followed_only_to_what_is_allowed(allowed: Path):
    (allowed / "inside.png").symlink_to("deep/a.png")
    (allowed / "folder").symlink_to(allowed / "deep")
    (allowed / "out.png").symlink_to(allowed.parent / "outside" / "deep" / "a.png")
    (allowed / "out").symlink_to(allowed.parent / "outside")
    (allowed / "up").symlink_to("..")
    (allowed / "root").symlink_to("/")
    (allowed / "gone.png").symlink_to(allowed.parent / "outside" / "missing.png")
    (allowed / "loop").symlink_to("loop")
    for path in ("inside.png", "folder/a.png"):
        assert await read(f"file://{allowed}/{path}", allowed) == BODY
    errors = []
    for path in (
        "out.png",
        "out/deep/a.png",
        "out/deep/no.png",
        "up/outside/deep/a.png",
        "root/etc/passwd",
        "gone.png",
    ):
        errors.append(await refused(f"file://{allowed}/{path}", allowed))
    assert {error.code for error in errors} == {"file_not_allowed"}
    assert len({error.message for error in errors}) == 1
    assert (await refused(f"file://{allowed}/loop", allowed)).code == "file_not_read"
    both = (allowed, allowed.parent / "outside")
    assert await read(f"file://{allowed}/out.png", *both) == b"secret", "a link from one allowed folder to another"


async def test_a_way_out_and_back_in_says_nothing_of_what_lies_outside(allowed: Path):
    """Dots are resolved as URLs have it, without a look at the disk, so no link or folder outside can be guessed."""
    (allowed.parent / "outside" / "link").symlink_to("/")
    for name in ("deep", "link", "missing"):
        assert await read(f"file://{allowed}/../outside/{name}/../../allowed/deep/a.png", allowed) == BODY


async def test_the_folder_itself_may_be_a_link(allowed: Path, tmp_path: Path):
    """As volumes that are replaced at once are."""
    link = tmp_path / "current"
    link.symlink_to(allowed)
    for url in (f"file://{link}/deep/a.png", f"file://{allowed}/deep/a.png"):
        assert await read(url, link) == BODY
    link.unlink()
    link.symlink_to(tmp_path / "outside")
    assert await read(f"file://{link}/deep/a.png", link) == b"secret", "as the operator set it meanwhile"
    assert (await refused(f"file://{allowed}/deep/a.png", link)).code == "file_not_allowed"


async def test_a_part_that_is_exchanged_for_a_link_meanwhile_is_not_followed(allowed: Path, monkeypatch):
    resolved = os.path.realpath

    def exchange(path: bytes, *, at: str) -> bytes:
        real = resolved(path)
        if real.endswith(b"a.png"):
            place = allowed / at
            place.rename(allowed / "was")
            place.symlink_to(allowed.parent / "outside" / at)
        return real

    looked_at = os.stat

    def exchange_later(path: bytes, **options: Any) -> os.stat_result:
        status = looked_at(path, **options)
        exchange(b"a.png", at="deep/a.png")
        return status

    for module, name, function, at in (
        (os.path, "realpath", lambda path: exchange(path, at="deep"), "deep"),
        (os.path, "realpath", lambda path: exchange(path, at="deep/a.png"), "deep/a.png"),
        (os, "stat", exchange_later, "deep/a.png"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, function)
            assert (await refused(f"file://{allowed}/deep/a.png", allowed)).code == "file_not_read"
        (allowed / at).unlink()
        (allowed / "was").rename(allowed / at)
    assert await read(f"file://{allowed}/deep/a.png", allowed) == BODY


async def test_only_regular_files_of_an_allowed_size_are_opened(allowed: Path, monkeypatch):
    os.mkfifo(allowed / "pipe")
    monkeypatch.chdir(allowed)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
    for name in ("pipe", "socket", "deep", "missing", "deep/a.png/more"):
        error = await refused(f"file://{allowed}/{name}", allowed)
        assert (error.status, error.code) == (400, "file_not_read"), name
    assert (await refused("file:///dev/zero", Path("/dev"))).code == "file_not_read"
    for size, too_large in ((0, False), (1000, False), (1001, True), (10**12, True)):
        with (allowed / "size").open("wb") as file:
            file.truncate(size)
        if too_large:
            error = await refused(f"file://{allowed}/size", allowed)
            assert isinstance(error, TooLarge)
            assert error.code == "too_many_bytes"
        else:
            assert await read(f"file://{allowed}/size", allowed) == bytes(size)
    endless = await refused("file:///proc/self/maps", Path("/proc/self"))
    assert endless.code == "too_many_bytes", "a file that says it is empty"


@pytest.mark.parametrize(
    "url",
    [
        "file:",
        "file://",
        "file:a.png",
        "file://a.png",
        "file://server/share/a.png",
        "file://127.0.0.1/a.png",
        "file:///C:/a.png",
        "file:///c%3A/a.png",
        "file://C:/a.png",
        "file:///C|/a.png",
        "file:C:\\a.png",
        "file:\\\\server\\a.png",
        "file:///a\\b.png",
        "file:///a.png?x=1",
        "file:///a.png#x",
        "file:///a%00.png",
        "file:///" + "a" * 5000,
    ],
)
async def test_malformed_urls_say_what_is_wrong(allowed: Path, url: str):
    error = await refused(url, allowed)
    assert isinstance(error, BadRequest)
    assert error.code == "invalid_url"
    assert "file:///folder/name.png" in error.message or "4096 bytes" in error.message


async def test_a_file_system_that_hangs_stops_neither_the_loop_nor_other_media(allowed: Path, monkeypatch):
    hangs = threading.Event()
    monkeypatch.setattr(os.path, "realpath", lambda path: (hangs.wait(10), path)[1])
    limits = MediaLimits(fetch_seconds=0.2)
    try:
        with pytest.raises(BadRequest) as error:
            await resolve(f"file://{allowed}/deep/a.png", limits=limits, allowed_folders=(allowed,))
        assert error.value.code == "fetch_timeout"
        large = "data:image/png;base64," + "QUJD" * 500_000  # decoded in another thread
        assert len(await asyncio.wait_for(resolve(large, limits=limits), 5)) == 1_500_000
    finally:
        hangs.set()


async def test_bytes_beyond_the_budget_of_all_are_refused(allowed: Path):
    def full(_: int) -> None:
        raise NoCapacity("full", code="bodies_full")

    with pytest.raises(NoCapacity, match="full"):
        await resolve(f"file://{allowed}/deep/a.png", limits=LIMITS, allowed_folders=(allowed,), count=full)
