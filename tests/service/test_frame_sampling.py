"""Media of any size, and frames that the target chooses: the engine gets what was sent, whoever dies meanwhile."""

from __future__ import annotations

import base64
import concurrent.futures
import math
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from model.request import VideoMetadata  # noqa: F401  # eval of what the fake engine writes
from service.media.limits import MediaLimits
from service.media.sampling import spread
from service.media.video import decode_video
from service.media.wire import Job
from tests.media.samples import encoded, image_bytes, levels, picture, video_bytes
from tests.service import fake_engine as fake
from tests.service.conftest import StartServer
from tests.service.server import Server

ANY_SIZE = {"any_size": 1}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), ANY_SIZE, {"max_frames": 16})
        yield server
        assert server.close() == 0, server.log_text()
        assert "Task exception" not in server.log_text()


def part(data: bytes, kind: str = "video") -> dict[str, Any]:
    return {"type": f"{kind}_url", f"{kind}_url": {"url": "data:;base64," + base64.b64encode(data).decode()}}


def body(*parts: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "?"}]}],
        "max_tokens": 2,
        **fields,
    }


def ask(server: Server, *parts: dict[str, Any], **fields: Any) -> httpx.Response:
    return server.http.post("/v1/chat/completions", json=body(*parts, **fields))


def arrived(server: Server, index: int = 0) -> tuple[np.ndarray, list[Any]]:
    """A medium of the last request as the engine got it: frames; kind, seconds_per_frame, times, source, options."""
    folder = server.log.parent
    return np.load(folder / f"medium-{index}.npy"), eval((folder / f"medium-{index}.txt").read_text())


def questions(server: Server) -> list[str]:
    file = server.log.parent / "sampled"
    return file.read_text().splitlines() if file.exists() else []


def ok(response: httpx.Response) -> None:
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (37, 61), (600, 3), (1001, 777)], ids=str)
def test_a_picture_keeps_its_size_and_pixels(server: Server, size: tuple[int, int]) -> None:
    image = picture(*size)
    ok(ask(server, part(encoded(image, "PNG"), "image"), part(image_bytes("BMP", (8, 5)), "image")))
    frames, (kind, *rest) = arrived(server)
    assert np.array_equal(frames, np.asarray(image)[None])
    assert (kind, rest) == ("image", [None, None, None, ()])
    assert arrived(server, 1)[0].shape == (1, 5, 8, 3)


@pytest.mark.parametrize("format", ["mp4", "webm", "avi"])
def test_the_target_chooses_the_frames_and_gets_their_times(server: Server, format: str) -> None:
    before = len(questions(server))
    ok(ask(server, part(video_bytes(format, (50, 34), num_frames=9, rate=10))))
    frames, (kind, seconds, times, source, _) = arrived(server)
    assert (kind, frames.shape, levels(frames)) == ("video", (5, 34, 50, 3), [0, 2, 4, 6, 8])
    assert times == (0.0, 0.2, 0.4, 0.6, 0.8)
    assert seconds == pytest.approx(0.2)
    assert source == VideoMetadata(total_frames=9, fps=10.0, duration=0.9, width=50, height=34)
    asked = questions(server)[before:]
    assert len(asked) == 1, "each clip is asked about once"
    assert repr(source) in asked[0]


def test_num_frames_and_fps_reach_the_target(server: Server) -> None:
    data = part(video_bytes("mp4", num_frames=6))
    ok(ask(server, data, num_frames=4))
    assert levels(arrived(server)[0]) == [0, 1, 2, 3]
    assert questions(server)[-1].endswith("4 None")
    ok(ask(server, data, fps=2.5))
    assert questions(server)[-1].endswith("None 2.5")
    ok(ask(server, data, num_frames=9))
    assert questions(server)[-1].endswith("6 None"), "no processor is asked for more frames than there are"
    assert ask(server, data, num_frames=17).json()["error"]["param"] == "num_frames"


def test_without_an_opinion_of_the_target_frames_are_sampled_as_ever(server: Server) -> None:
    data = part(video_bytes("mp4", num_frames=12, rate=10))
    ok(ask(server, data, fps=fake.SAMPLING_HAS_NO_OPINION))
    assert len(arrived(server)[0]) == 12, "every frame of a clip that is slower"


def test_lists_of_frames_are_nobodys_choice(server: Server) -> None:
    before = questions(server)
    pictures = [picture(31, 17, seed=seed) for seed in range(3)] + [picture(62, 34)]
    frames = ",".join(base64.b64encode(encoded(one, "PNG")).decode() for one in pictures)
    for parameters, times, fps in (("", None, None), (";fps=2", (0.0, 0.5, 1.0, 1.5), 2.0)):
        url = {"url": f"data:video/jpeg{parameters};base64,{frames}"}
        ok(ask(server, {"type": "video_url", "video_url": url}))
        pixels, (_, _, got, source, _) = arrived(server)
        assert pixels.shape == (4, 17, 31, 3), "all at the size of the first"
        assert np.array_equal(pixels[:3], np.stack([np.asarray(one) for one in pictures[:3]]))
        assert (got, source) == (times, VideoMetadata(4, fps, fps and 4 / fps, 31, 17))
    assert questions(server) == before


@pytest.mark.parametrize("size", [(1, 201), (603, 3)], ids=str)
def test_a_picture_that_is_too_narrow_for_any_processor_is_refused(server: Server, size: tuple[int, int]) -> None:
    """A processor that fixes the shortest edge would make gigabytes of it, and the worker has no child's limits."""
    error = ask(server, part(encoded(picture(*size), "PNG"), "image")).json()["error"]
    assert (error["code"], error["param"]) == ("too_narrow", "messages[0].content[0]")


def test_limits_are_settings_and_without_shared_memory_media_arrive_too(start_server: StartServer) -> None:
    server = start_server(ANY_SIZE, max_frames=3, max_clip_pixels=3 * 600, shared_media_bytes=4096)
    images = [picture(301, 203, seed=seed) for seed in range(3)]
    ok(ask(server, *(part(encoded(image, "PNG"), "image") for image in images)))
    for index, image in enumerate(images):
        assert np.array_equal(arrived(server, index)[0][0], np.asarray(image))
    ok(ask(server, part(video_bytes("mp4", (48, 32), num_frames=11))))  # of 0, 2, 4, 6, 8, 10
    frames, (_, _, times, source, _) = arrived(server)
    assert (frames.shape, levels(frames)) == ((3, 20, 30, 3), [0, 6, 10]), "more than max_frames: thinned out evenly"
    assert times == (0.0, 0.6, 1.0)
    assert (source.width, source.height) == (48, 32), "what the file has"


@pytest.mark.parametrize(
    ("most", "num_frames"), [(6000, 4), (999, 5), (100, 7), (3, 3), (48 * 32 * 2, 2), (48 * 32 * 2 - 1, 2)]
)
def test_all_frames_together_are_bounded(most: int, num_frames: int) -> None:
    """As little as needed, evenly, keeping the aspect."""
    job = Job("video", "MP4", num_frames)
    limits = MediaLimits(max_clip_pixels=most)
    frames = np.stack(decode_video(video_bytes("mp4", (48, 32)), job, limits=limits, geometry=fake.ANY_SIZE).pixels)
    count, height, width, _ = frames.shape
    assert count == num_frames
    assert count * height * width <= most
    if most >= num_frames * 48 * 32:
        assert (width, height) == (48, 32)
    else:
        scale = math.sqrt(most / (num_frames * 48 * 32))
        assert abs(width - 48 * scale) <= 1
        assert abs(height - 32 * scale) <= 1
        assert count * (height + 1) * (width + 1) > most
    if min(width, height) > 2:
        assert levels(frames) == spread(12, num_frames).tolist(), "in their order"


@pytest.mark.parametrize(
    ("fps", "status", "code", "says"),
    [
        (fake.SAMPLING_REFUSES, 400, "not_sampled", "takes no such rate"),
        (fake.SAMPLING_FAILS, 500, "engine_failure", "failed to choose"),
        (fake.SAMPLING_IS_WRONG, 500, "engine_failure", "does not have"),
        (fake.SAMPLING_IS_EMPTY, 500, "engine_failure", "does not have"),
    ],
)
def test_a_target_that_cannot_choose_costs_one_request_and_no_child(
    server: Server, fps: float, status: int, code: str, says: str
) -> None:
    children = _children(server)
    response = ask(server, part(video_bytes("mp4")), fps=fps)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, "messages[0].content[0]")
    assert says in error["message"]
    assert "secret" not in response.text
    ok(ask(server, part(video_bytes("mp4"))))
    assert _children(server) == children


def _children(server: Server) -> list[int]:
    """The decoding children's process ids."""
    found = psutil.Process(server.process.pid).children(recursive=True)
    return sorted(child.pid for child in found if "service.media.child" in " ".join(child.cmdline()))


def test_a_worker_that_dies_while_it_chooses_is_replaced(start_server: StartServer) -> None:
    server = start_server(ANY_SIZE)
    ok(ask(server, part(video_bytes("mp4", num_frames=5)), fps=fake.SAMPLING_DIES_ONCE))
    assert levels(arrived(server)[0]) == [0, 2, 4]
    assert len({line.split()[0] for line in questions(server)}) == 2, "two processes were asked"
    server.wait(lambda: server.metric("flash_worker_up") == 1)


def test_a_video_of_which_every_worker_dies_fails_alone(start_server: StartServer) -> None:
    server = start_server(ANY_SIZE | {"delay": 0.02}, workers=2, video_workers=1)
    others = [part(image_bytes("PNG", seed=seed), "image") for seed in range(4)]
    fields = {"max_tokens": 200, "ignore_eos": True, "speculation": "off"}
    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        running = [pool.submit(ask, server, other, **fields) for other in others]
        server.wait(lambda: server.metric("flash_requests_running") == 4)
        error = ask(server, part(video_bytes("mp4")), fps=fake.SAMPLING_DIES).json()["error"]
        for one in running:
            ok(one.result())
    assert (error["code"], len(questions(server))) == ("worker_died", 3)
    server.wait(lambda: server.metric("flash_worker_up") == 2)
    ok(ask(server, part(video_bytes("mp4"))))


def test_a_worker_that_hangs_while_it_chooses_is_killed(start_server: StartServer) -> None:
    server = start_server(ANY_SIZE, stall_timeout=1, max_request_retries=0)
    response = ask(server, part(video_bytes("mp4")), fps=fake.SAMPLING_HANGS)
    assert response.json()["error"]["code"] == "worker_died"
    assert "was silent for" in server.log_text()
    server.wait(lambda: server.metric("flash_worker_up") == 1)
    ok(ask(server, part(video_bytes("mp4"))))


def test_waiting_for_the_target_is_not_decoding_but_part_of_the_request(start_server: StartServer) -> None:
    """A busy worker answers late: that must neither refuse a video as too slow nor hold its request for ever."""
    server = start_server(ANY_SIZE, media_timeout=fake.SLOW_SECONDS / 2)
    ok(ask(server, part(video_bytes("mp4")), fps=fake.SAMPLING_IS_SLOW))
    server = start_server(ANY_SIZE, request_timeout=1, stall_timeout=60)
    response = ask(server, part(video_bytes("mp4")), fps=fake.SAMPLING_IS_SLOW)
    assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
    time.sleep(fake.SLOW_SECONDS)
    ok(ask(server, part(video_bytes("mp4"))))


def test_a_client_that_leaves_meanwhile_leaves_nothing(start_server: StartServer) -> None:
    server = start_server(ANY_SIZE, shared_media_bytes=0)
    with pytest.raises(httpx.ReadTimeout):
        server.http.post(
            "/v1/chat/completions", json=body(part(video_bytes("mp4")), fps=fake.SAMPLING_IS_SLOW), timeout=0.7
        )
    assert len(questions(server)) == 1
    server.wait(lambda: server.health()["requests"] == 0)
    ok(ask(server, part(video_bytes("mp4"))))
    assert server.metric("flash_worker_restarts_total") == 0
    assert len(_children(server)) == 1


def test_a_child_that_is_killed_while_it_waits_is_replaced(start_server: StartServer) -> None:
    server = start_server(ANY_SIZE)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, server, part(video_bytes("mp4", num_frames=3)), fps=fake.SAMPLING_IS_SLOW)
        server.wait(lambda: questions(server))
        os.kill(_children(server)[0], signal.SIGKILL)
        ok(answer.result())
    assert levels(arrived(server)[0]) == [0, 2]
    assert len(questions(server)) == 2


def test_the_bundled_kind_of_target_is_not_asked(start_server: StartServer) -> None:
    server = start_server()
    ok(ask(server, part(video_bytes("mp4")), num_frames=5))
    assert not questions(server)


def test_a_still_sent_as_a_form_keeps_its_size_too(server: Server) -> None:
    image = Image.fromarray(np.asarray(picture(77, 13)))
    files = [("media", encoded(image, "PNG")), ("media", video_bytes("webm", (20, 30), num_frames=3))]
    ok(server.http.post("/v1/generate", files=files, data={"prompt": "?", "max_tokens": "2", "num_frames": "2"}))
    assert np.array_equal(arrived(server)[0][0], np.asarray(image))
    assert arrived(server, 1)[0].shape == (2, 30, 20, 3)
