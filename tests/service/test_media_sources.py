"""Media that come without their bytes: remembered under a `uuid`, or read from a folder of the server."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from pydantic import ValidationError

from service.settings import Settings, error_messages
from tests.media.samples import encoded, levels, picture, video_bytes
from tests.service.server import Server
from tests.service.test_frame_sampling import ANY_SIZE, arrived, body, ok, part

FIRST, SECOND = (encoded(picture(40, 30, seed=seed), "PNG") for seed in (1, 2))
CLIP = video_bytes("mp4", (40, 30), num_frames=12, rate=10)
CACHE_BYTES = 100_000


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Two workers, two clients with keys, and a folder of media."""
    with tempfile.TemporaryDirectory() as folder:
        media = Path(folder) / "media"
        media.mkdir()
        (media / "two words.png").write_bytes(FIRST)
        (media / "clip.mp4").write_bytes(CLIP)
        (media / "notes.txt").write_text("not an image")
        (Path(folder) / "secret.png").write_bytes(SECOND)
        settings = {"api_key": "alice,bob", "allowed_media_path": media, "media_cache_bytes": CACHE_BYTES}
        server = Server(Path(folder), ANY_SIZE, {**settings, "workers": 2, "max_frames": 16})
        yield server
        assert server.close() == 0, server.log_text()
        assert "Task exception" not in server.log_text()


def ask(server: Server, *parts: dict[str, Any], key: str = "alice", **fields: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"}
    return server.http.post("/v1/chat/completions", json=body(*parts, **fields), headers=headers)


def named(data: bytes, uuid: str, kind: str = "image") -> dict[str, Any]:
    return {**part(data, kind), "uuid": uuid}


def alone(uuid: str, kind: str = "image", **fields: Any) -> dict[str, Any]:
    return {"type": f"{kind}_url", "uuid": uuid, **fields}


def refused(response: httpx.Response, code: str, status: int = 400) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code), response.text
    return error


def is_picture(server: Server, seed: int, index: int = 0) -> bool:
    return np.array_equal(arrived(server, index)[0][0], np.asarray(picture(40, 30, seed=seed)))


@pytest.mark.parametrize("url", [None, "", {}, {"url": None}, {"url": ""}, {"url": None, "detail": "low"}], ids=str)
def test_a_named_image_is_sent_again_without_its_bytes(server: Server, url: Any) -> None:
    ok(ask(server, named(FIRST, "sku-1")))
    ok(ask(server, named(SECOND, "sku-2")))
    for _ in range(3):  # more than there are workers
        ok(ask(server, alone("sku-1", image_url=url), alone("sku-2")))
        assert is_picture(server, 1)
        assert is_picture(server, 2, index=1)


def test_a_named_video_serves_any_frames(server: Server) -> None:
    """Its file is remembered, so that nothing is lost that an earlier request did not want."""
    ok(ask(server, named(CLIP, "clip", "video"), num_frames=2))
    assert len(arrived(server)[0]) == 2
    for num_frames, expected in ((4, [0, 1, 2, 3]), (12, list(range(12)))):
        ok(ask(server, alone("clip", "video"), num_frames=num_frames))
        assert levels(arrived(server)[0]) == expected
        ok(ask(server, alone("clip", "video", num_frames=num_frames)))
        assert levels(arrived(server)[0]) == expected
    error = refused(ask(server, alone("clip")), "unsupported_media", 415)
    assert "sent as image" in error["message"]


def test_each_video_is_sampled_by_its_own_length(server: Server) -> None:
    """And a rate or number of frames for all is no option of the images beside them."""
    long = part(video_bytes("webm", (40, 30), num_frames=60, rate=10), "video")
    ok(ask(server, named(CLIP, "clip", "video"), part(FIRST, "image"), long, media_io_kwargs={"video": {"fps": 2.0}}))
    counts = [len(arrived(server, index)[0]) for index in range(3)]
    assert counts == [6, 1, 16], "this target takes every second frame; 16 are allowed"
    ok(ask(server, alone("clip", "video"), part(FIRST, "image"), num_frames=4))
    assert [len(arrived(server, index)[0]) for index in range(2)] == [4, 1]


def test_other_bytes_under_a_name_replace_it(server: Server) -> None:
    for seed, data in ((1, FIRST), (2, SECOND), (1, FIRST)):
        ok(ask(server, named(data, "changes")))
        assert is_picture(server, seed), "what is sent is used"
        ok(ask(server, alone("changes")))
        assert is_picture(server, seed)


def test_what_is_not_remembered_is_a_400_that_says_to_send_it_again(server: Server) -> None:
    for uuid in ("never sent", "x" * 256, "../sku-1", "SKU-1"):
        error = refused(ask(server, named(FIRST, "sku-1"), alone(uuid)), "media_not_cached")
        assert error["param"] == "messages[0].content[1]"
        assert "send it again" in error["message"]
    refused(ask(server, alone("sku-1"), stream=True, key="bob"), "media_not_cached")
    assert "256" in refused(ask(server, named(FIRST, "x" * 257)), "invalid_request")["message"]


def of_responses(kind: str, data: bytes | None, uuid: str, **options: Any) -> tuple[str, dict[str, Any]]:
    url = {} if data is None else {f"{kind}_url": part(data, kind)[f"{kind}_url"]["url"]}
    content = [{"type": f"input_{kind}", "uuid": uuid, **url, **options}]
    return "/v1/responses", {"input": [{"role": "user", "content": content}], "max_output_tokens": 4}


def of_messages(kind: str, data: bytes | None, uuid: str, **options: Any) -> tuple[str, dict[str, Any]]:
    source = {"type": "base64", "media_type": "image/png", "data": data and base64.b64encode(data).decode()}
    content = [{"type": kind, "uuid": uuid, **({"source": source} if data else {}), **options}]
    return "/v1/messages", {"messages": [{"role": "user", "content": content}], "max_tokens": 4}


@pytest.mark.parametrize("dialect", [of_responses, of_messages])
def test_other_apis_name_media_too(server: Server, dialect: Callable[..., tuple[str, dict[str, Any]]]) -> None:
    """A name means the same file by every route; options are of each part."""

    def send(*part: Any, **options: Any) -> httpx.Response:
        path, fields = dialect(*part, **options)
        return server.http.post(path, json=fields, headers={"Authorization": "Bearer alice"})

    name = dialect.__name__
    ok(send("image", FIRST, f"image {name}"))
    ok(send("video", CLIP, f"clip {name}", num_frames=2))
    for asked in (lambda: send("image", None, f"image {name}"), lambda: ask(server, alone(f"image {name}"))):
        ok(ask(server, part(SECOND, "image")))
        ok(asked())
        assert is_picture(server, 1)
    ok(send("video", None, f"clip {name}", num_frames=4))
    assert levels(arrived(server)[0]) == [0, 1, 2, 3]
    at = "input[0].content[0]" if dialect is of_responses else "messages[0].content[0]"
    for uuid, complaint in (("never sent", "send it again"), ("", f"{at}.")):
        for kind in ("image", "video"):
            refusal = send(kind, None, uuid)
            assert refusal.status_code == 400
            assert complaint in refusal.json()["error"]["message"]
    assert send("image", None, "x" * 257).status_code == 400


def test_a_name_is_of_one_client_only(server: Server) -> None:
    ok(ask(server, named(FIRST, "private"), key="alice"))
    refused(ask(server, alone("private"), key="bob"), "media_not_cached")
    ok(ask(server, named(SECOND, "private"), key="bob"))
    ok(ask(server, alone("private"), key="alice"))
    assert is_picture(server, 1)


def test_a_cache_salt_separates_users_who_share_a_key(server: Server) -> None:
    ok(ask(server, named(FIRST, "of a tenant"), cache_salt="tenant 1"))
    for salt in (None, "tenant 2"):
        refused(ask(server, alone("of a tenant"), cache_salt=salt), "media_not_cached")
    ok(ask(server, alone("of a tenant"), cache_salt="tenant 1"))
    assert is_picture(server, 1)


def test_names_count_within_a_request_too(server: Server) -> None:
    """As in a conversation that is sent again with each turn."""
    ok(ask(server, named(FIRST, "turn"), alone("turn"), named(SECOND, "other"), alone("turn"), alone("other")))
    assert [is_picture(server, seed, index) for index, seed in enumerate((1, 1, 2, 1, 2))] == [True] * 5
    ok(ask(server, named(CLIP, "shown twice", "video"), alone("shown twice", "video"), num_frames=3))
    assert levels(arrived(server, 1)[0]) == levels(arrived(server, 0)[0])
    error = refused(ask(server, alone("late"), named(FIRST, "late"), key="bob"), "media_not_cached")
    assert error["param"] == "messages[0].content[0]", "it comes before its bytes"


def test_a_file_that_cannot_be_decoded_is_not_remembered(server: Server) -> None:
    refused(ask(server, named(FIRST[:200], "broken")), "image_not_decodable")
    refused(ask(server, alone("broken")), "media_not_cached")
    ok(ask(server, named(FIRST, "sound")))
    refused(ask(server, named(FIRST[:200], "sound")), "image_not_decodable")
    ok(ask(server, alone("sound")))
    assert is_picture(server, 1), "the sound one stays"


def test_the_cache_is_bounded_and_counted(server: Server) -> None:
    names = ("flash_media_cache_queries_total", "flash_media_cache_hits_total")
    before = [server.metric(name) for name in names]
    ok(ask(server, named(FIRST, "oldest")))
    ok(ask(server, alone("oldest")))
    noise = encoded(picture(100, 100), "BMP")
    for number in range(4):
        ok(ask(server, named(noise, f"noise {number}")))
        assert 0 < server.metric("flash_media_cache_usage_ratio") <= 1
    refused(ask(server, alone("oldest")), "media_not_cached")
    ok(ask(server, alone("noise 3")))
    assert [server.metric(name) - old for name, old in zip(names, before, strict=True)] == [3, 2]


@pytest.mark.parametrize(
    "missing", [{}, {"image_url": None}, {"image_url": {}}, {"image_url": "", "uuid": ""}], ids=str
)
def test_a_part_needs_a_url_or_a_uuid(server: Server, missing: dict[str, Any]) -> None:
    error = refused(ask(server, {"type": "image_url", **missing}), "missing_field")
    assert error["param"] == "messages[0].content[0].image_url"


def test_files_below_the_allowed_folder_are_media(server: Server) -> None:
    folder = server.log.parent / "media"
    ok(ask(server, {"type": "image_url", "image_url": f"file://{folder}/two%20words.png", "uuid": "from a file"}))
    assert is_picture(server, 1)
    ok(ask(server, {"type": "video_url", "video_url": {"url": f"file://localhost{folder}/clip.mp4"}, "num_frames": 3}))
    assert len(arrived(server)[0]) == 3
    ok(ask(server, alone("from a file")))
    for name, code, status in (
        ("missing.png", "file_not_read", 400),
        ("../secret.png", "file_not_allowed", 400),
        ("notes.txt", "unsupported_media", 415),
    ):
        error = refused(ask(server, {"type": "image_url", "image_url": f"file://{folder}/{name}"}), code, status)
        assert error["param"] == "messages[0].content[0]"


@pytest.mark.parametrize(
    "value", ["relative", "/no/such/folder", "/etc/passwd", "/", "/etc,/no/such/folder", "/etc/.."]
)
def test_a_folder_that_is_none_is_no_setting(value: str) -> None:
    with pytest.raises(ValidationError) as error:
        Settings(allowed_media_path=value)  # type: ignore[arg-type]
    (message,) = error_messages(error.value)
    assert message.startswith("--allowed-media-path (FLASH_ALLOWED_MEDIA_PATH):")
    assert "absolute path of a folder" in message


def test_several_folders_are_a_setting() -> None:
    assert Settings(allowed_media_path="/etc, /usr").allowed_media_path == (Path("/etc"), Path("/usr"))  # type: ignore[arg-type]
    assert Settings().allowed_media_path == ()
