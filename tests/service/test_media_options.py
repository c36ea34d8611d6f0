"""Options of the model's processors: what a client sends reaches the engine as it is, or is refused by its name."""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model.request import MEDIA_OPTIONS, Geometry
from service.errors import BadRequest
from service.schemas import media_options
from service.schemas.media_options import MediaFields, MediaOptions
from tests.media.samples import encoded, picture, video_bytes
from tests.service.conftest import StartServer
from tests.service.server import Server
from tests.service.test_frame_sampling import ANY_SIZE, arrived, ask, ok, part, questions

PNG, MP4 = encoded(picture(40, 30), "PNG"), video_bytes("mp4", (40, 30), num_frames=4)
BOTH = ("min_pixels", "max_pixels")
TAKES_ALL = Geometry(image_options=MEDIA_OPTIONS, video_options=MEDIA_OPTIONS)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), ANY_SIZE, {"max_pixels": 10_000_000, "max_clip_pixels": 100_000})
        yield server
        assert server.close() == 0, server.log_text()


@pytest.fixture(scope="module")
def bundled() -> Iterator[Server]:
    """A target whose processors take no options, as the bundled ones."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), {}, {})
        yield server
        assert server.close() == 0, server.log_text()


def options_of(server: Server, index: int = 0) -> dict[str, Any]:
    return dict(arrived(server, index)[1][-1])


def read(path: str = "", **fields: Any) -> MediaOptions:
    return media_options.read(MediaFields(**fields), path)


def test_options_of_a_request_reach_each_medium_that_they_are_for(server: Server) -> None:
    kwargs = {"min_pixels": 64, "do_image_splitting": False, "size": {"width": 8, "height": 16}}
    ok(ask(server, part(PNG, "image"), part(MP4), max_pixels=4096, mm_processor_kwargs=kwargs))
    size = (("height", 16), ("width", 8))
    assert options_of(server) == {"min_pixels": 64, "max_pixels": 4096, "do_image_splitting": False, "size": size}
    assert options_of(server, 1) == {"min_pixels": 64, "max_pixels": 4096, "size": size}, "no option of videos"


def test_options_of_a_part_come_before_those_of_the_request(server: Server) -> None:
    ok(
        ask(
            server,
            part(PNG, "image") | {"max_pixels": 2048},
            part(PNG, "image") | {"mm_processor_kwargs": {"min_pixels": 99}},
            part(PNG, "image"),
            part(MP4) | {"fps": 2.0, "mm_processor_kwargs": {"max_pixels": 512}},
            max_pixels=4096,
            num_frames=3,
        )
    )
    assert [options_of(server, index) for index in range(4)] == [
        {"max_pixels": 2048},
        {"max_pixels": 4096, "min_pixels": 99},
        {"max_pixels": 4096},
        {"max_pixels": 512},
    ]
    assert questions(server)[-1].endswith("None 2.0"), "a part's fps is instead of the request's num_frames"


@pytest.mark.parametrize(
    ("fields", "end"),
    [
        ({"mm_processor_kwargs": {"num_frames": 2}}, "2 None"),
        ({"mm_processor_kwargs": {"fps": 4}}, "None 4.0"),
        ({"mm_processor_kwargs": {"num_frames": 2}, "num_frames": 2}, "2 None"),
    ],
)
def test_sampling_may_stand_among_the_options(server: Server, fields: dict[str, Any], end: str) -> None:
    ok(ask(server, part(MP4), **fields))
    assert questions(server)[-1].endswith(end)
    assert options_of(server) == {}
    ok(ask(server, part(MP4) | fields))
    assert questions(server)[-1].endswith(end)


@pytest.mark.parametrize(
    ("fields", "end"),
    [
        ({"media_io_kwargs": {"video": {"num_frames": 2}}}, "2 None"),
        ({"media_io_kwargs": {"video": {"fps": 4, "num_frames": None}}}, "None 4.0"),
        ({"media_io_kwargs": {"video": {"num_frames": -1}}}, "None 1000.0"),
        ({"media_io_kwargs": {"video": {"num_frames": -1, "fps": 2}}}, "None 2.0"),
        ({"media_io_kwargs": {"video": {"num_frames": 3, "fps": 2}}}, "None 2.0"),
        ({"media_io_kwargs": {"video": {"num_frames": 2}, "image": {"image_mode": "RGB"}, "audio": None}}, "2 None"),
        ({"media_io_kwargs": {"video": {"num_frames": 2}}, "num_frames": 2}, "2 None"),
    ],
    ids=str,
)
def test_sampling_may_be_asked_for_as_vllm_has_it(server: Server, fields: dict[str, Any], end: str) -> None:
    ok(ask(server, part(MP4), **fields))
    assert questions(server)[-1].endswith(end)
    ok(ask(server, part(MP4) | fields))
    assert questions(server)[-1].endswith(end)
    form = {"prompt": "?", "max_tokens": "2"} | {name: json.dumps(value) for name, value in fields.items()}
    ok(server.http.post("/v1/generate", files=[("media", MP4)], data=form))
    assert questions(server)[-1].endswith(end)


@pytest.mark.parametrize(
    ("both", "alone"),
    [
        ({"fps": 1000, "num_frames": 3}, {"num_frames": 3}),
        ({"fps": 1000, "num_frames": 1}, {"num_frames": 1}),
        ({"fps": 1000, "num_frames": 20}, {"fps": 1000}),
        ({"fps": 5, "num_frames": 20}, {"fps": 5}),
        ({"fps": 5, "num_frames": 4}, {"num_frames": 4}),
        ({"num_frames": -1}, {"fps": 1000}),
    ],
    ids=str,
)
def test_with_a_rate_the_number_of_frames_is_the_most(
    bundled: Server, both: dict[str, Any], alone: dict[str, Any]
) -> None:
    clip = video_bytes("mp4", (64, 64), num_frames=12)  # ten in a second
    answers = [
        ask(bundled, part(clip), temperature=0, **fields)
        for fields in ({"media_io_kwargs": {"video": both}}, alone, {"num_frames": 7})
    ]
    for answer in answers:
        ok(answer)
    first, same, other = (answer.json()["choices"][0]["message"]["content"] for answer in answers)
    assert first == same != other, "the fake engine's words are those of the frames"


def test_options_may_stand_beside_the_url(server: Server) -> None:
    def within(part: dict[str, Any], **options: Any) -> dict[str, Any]:
        kind = part["type"]
        return part | {kind: part[kind] | options}

    ok(
        ask(
            server,
            within(part(PNG, "image"), max_pixels=2048),
            within(part(PNG, "image"), mm_processor_kwargs={"min_pixels": 99}) | {"max_pixels": 1024},
            within(part(PNG, "image"), min_pixels=77) | {"min_pixels": 66},
            within(part(MP4), fps=2.0, max_pixels=512),
            max_pixels=4096,
        )
    )
    assert [options_of(server, index) for index in range(4)] == [
        {"max_pixels": 2048},
        {"max_pixels": 1024, "min_pixels": 99},
        {"max_pixels": 4096, "min_pixels": 77},
        {"max_pixels": 512},
    ]
    assert questions(server)[-1].endswith("None 2.0")
    wrong = ask(server, within(part(MP4), fps=-1))
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "messages[0].content[0].video_url.fps")


def test_a_form_takes_them_too(server: Server) -> None:
    data = {"prompt": "?", "max_tokens": "2", "min_pixels": "65", "mm_processor_kwargs": '{"max_pixels": 4097}'}
    ok(server.http.post("/v1/generate", files=[("media", PNG), ("media", MP4)], data=data))
    for index in (0, 1):
        assert options_of(server, index) == {"min_pixels": 65, "max_pixels": 4097}
    for text in ("[]", "{", '"x"'):
        response = server.http.post("/v1/generate", files=[("media", PNG)], data={"mm_processor_kwargs": text})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "mm_processor_kwargs")


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        (
            {"mm_processor_kwargs": {"pixels": 1}},
            "mm_processor_kwargs.pixels",
            "known are min_pixels, max_pixels, size",
        ),
        (
            {"media_io_kwargs": {"video": {"backend": "x"}}},
            "media_io_kwargs.video.backend",
            "known are video.num_frames",
        ),
        ({"media_io_kwargs": {"image": {"image_mode": "L"}}}, "media_io_kwargs.image.image_mode", "not a known option"),
        ({"media_io_kwargs": {"video": {"fps": 0}}}, "media_io_kwargs.video.fps", "Expected `float` > 0"),
        (
            {"media_io_kwargs": {"video": {"fps": 2}}, "fps": 3.0},
            "media_io_kwargs.video.fps",
            "differ; send one",
        ),
        ({"mm_processor_kwargs": {"do_resize": False}}, "mm_processor_kwargs.do_resize", "not a known option"),
        ({"mm_processor_kwargs": {"max_soft_tokens": 9}}, "mm_processor_kwargs.max_soft_tokens", "does not take"),
        ({"mm_processor_kwargs": {"max_pixels": "9"}}, "mm_processor_kwargs.max_pixels", "Expected `int`, got `str`"),
        ({"mm_processor_kwargs": {"max_pixels": True}}, "mm_processor_kwargs.max_pixels", "got `bool`"),
        ({"mm_processor_kwargs": {"do_image_splitting": 1}}, "mm_processor_kwargs.do_image_splitting", "`bool`"),
        ({"mm_processor_kwargs": {"fps": 0}}, "mm_processor_kwargs.fps", "> 0"),
        ({"mm_processor_kwargs": {"num_frames": 999}}, "mm_processor_kwargs.num_frames", "at most 32"),
        ({"mm_processor_kwargs": {"num_frames": 2, "fps": 1}}, "mm_processor_kwargs.fps", "not both"),
        ({"mm_processor_kwargs": {"num_frames": 2}, "num_frames": 3}, "mm_processor_kwargs.num_frames", "differ"),
        ({"mm_processor_kwargs": {"min_pixels": 2}, "min_pixels": 3}, "mm_processor_kwargs.min_pixels", "differ"),
        ({"mm_processor_kwargs": {"size": {"height": 9}}}, "mm_processor_kwargs.size", "sets of keys"),
        ({"mm_processor_kwargs": {"size": {}}}, "mm_processor_kwargs.size", "sets of keys"),
        ({"mm_processor_kwargs": {"size": {"shortest_edge": 9}}}, "mm_processor_kwargs.size", "sets of keys"),
        (
            {"mm_processor_kwargs": {"size": {"shortest_edge": 9, "longest_edge": 8}}},
            "mm_processor_kwargs.size",
            "must not be above",
        ),
        ({"mm_processor_kwargs": {"size": {"height": 0, "width": 1}}}, "mm_processor_kwargs.size", ">= 1"),
        ({"mm_processor_kwargs": {"size": 9}}, "mm_processor_kwargs.size", "Expected `object`"),
        ({"min_pixels": 10, "max_pixels": 9}, "min_pixels", "must not be above max_pixels"),
        ({"min_pixels": 10, "mm_processor_kwargs": {"max_pixels": 9}}, "min_pixels", "must not be above"),
        ({"min_pixels": 0}, "min_pixels", ">= 1"),
    ],
    ids=str,
)
def test_what_is_wrong_is_refused_by_its_name(server: Server, fields: dict[str, Any], param: str, says: str) -> None:
    for response, prefix in (
        (ask(server, part(MP4), **fields), ""),
        (ask(server, part(MP4) | fields), "messages[0].content[0]."),
    ):
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, prefix + param)
        assert says in error["message"]


@pytest.mark.parametrize(
    ("parts", "fields", "param", "says"),
    [
        ([part(PNG, "image")], {"num_frames": 3}, "num_frames", "is for videos, and there is none"),
        ([part(MP4)], {"mm_processor_kwargs": {"do_image_splitting": True}}, "", "is for images, and there is none"),
        ([], {"max_pixels": 9}, "max_pixels", "is for images and videos, and there is none"),
        (
            [part(MP4) | {"mm_processor_kwargs": {"do_image_splitting": True}}],
            {},
            "messages[0].content[0].mm_processor_kwargs.do_image_splitting",
            "this model's video processor does not take do_image_splitting; it takes max_pixels, min_pixels, size",
        ),
    ],
)
def test_what_is_for_no_medium_is_refused(
    server: Server, parts: list[dict[str, Any]], fields: dict[str, Any], param: str, says: str
) -> None:
    response = ask(server, *parts, **fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param or "mm_processor_kwargs.do_image_splitting")
    assert says in error["message"]


@pytest.mark.parametrize(
    "fields",
    [{"min_pixels": 9}, {"max_pixels": 9}, {"mm_processor_kwargs": {"size": {"height": 9, "width": 9}}}],
    ids=str,
)
def test_a_target_that_takes_none_says_so(bundled: Server, fields: dict[str, Any]) -> None:
    for response in (ask(bundled, part(PNG, "image"), **fields), ask(bundled, part(PNG, "image") | fields)):
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, "unknown_option")
        assert error["message"].endswith("it takes no options")
    ok(ask(bundled, part(PNG, "image"), mm_processor_kwargs={}))


def test_a_medium_may_not_be_enlarged_beyond_what_may_be_sent(server: Server) -> None:
    """The processor works in the worker, without a child's limits."""
    ok(ask(server, part(PNG, "image"), min_pixels=10_000_000))
    ok(ask(server, part(MP4), min_pixels=50_000))  # two frames
    for parts, fields, param in (
        ([part(PNG, "image")], {"min_pixels": 10_000_001}, "min_pixels"),
        ([part(MP4)], {"min_pixels": 50_001}, "min_pixels"),
        ([part(PNG, "image") | {"min_pixels": 2**31}], {}, "messages[0].content[0].min_pixels"),
        ([part(MP4)], {"mm_processor_kwargs": {"size": {"height": 251, "width": 200}}}, "mm_processor_kwargs.size"),
    ):
        error = ask(server, *parts, **fields).json()["error"]
        assert error["param"] == param
        assert "enlarge" in error["message"]


@pytest.mark.parametrize(
    ("size", "shape", "pixels"),
    [
        ({"height": 10, "width": 20}, (1, 5, 7), 200),
        ({"height": 10, "width": 20}, (3, 5, 7), 600),
        ({"longest_edge": 100}, (1, 30, 60), 5000),
        ({"longest_edge": 100}, (2, 60, 60), 20000),
        ({"shortest_edge": 10, "longest_edge": 400}, (1, 30, 60), 200),
        ({"shortest_edge": 10, "longest_edge": 12}, (1, 10, 100), 14.4),
    ],
)
def test_enlarging_is_computed_as_processors_do_it(
    size: dict[str, int], shape: tuple[int, int, int], pixels: float
) -> None:
    options = read(mm_processor_kwargs={"size": size})
    media_options.check_pixels(options, TAKES_ALL, shape, int(pixels + 1))
    with pytest.raises(BadRequest, match="enlarge"):
        media_options.check_pixels(options, TAKES_ALL, shape, int(pixels - 1))


def test_edges_that_are_areas_count_as_areas() -> None:
    """Qwen's processors call the least number of pixels `shortest_edge`."""
    options = read(mm_processor_kwargs={"size": {"shortest_edge": 5000, "longest_edge": 10**9}})
    area = Geometry(video_options=("size",), size_is_area=True)
    media_options.check_pixels(options, area, (2, 30, 60), 10_000)
    with pytest.raises(BadRequest, match="enlarge"):
        media_options.check_pixels(options, area, (2, 30, 60), 9_999)
    with pytest.raises(BadRequest, match="enlarge"):
        media_options.check_pixels(options, TAKES_ALL, (2, 30, 60), 10_000)


def test_every_option_has_a_type_and_an_order() -> None:
    assert (*media_options.TYPES,) == MEDIA_OPTIONS
    values = {"max_pixels": 9, "min_pixels": 8, "max_soft_tokens": 70}
    sizes = ({"width": 3, "height": 2}, {"height": 2, "width": 3})
    orders = [dict(order) for size in sizes for order in itertools.permutations((values | {"size": size}).items())]
    known = {read(mm_processor_kwargs=order).known_to(TAKES_ALL, "image") for order in orders}
    assert len(known) == 1, "caches must find a medium, however a client orders its options"


def test_decoded_media_are_bounded_for_one_request_and_for_all(start_server: StartServer) -> None:
    """One of 40 x 30 pixels takes 3600 bytes, once for each choice, until its request ends."""
    server = start_server(ANY_SIZE | {"delay": 0.05}, max_decoded_bytes=4 * 3600)
    image = part(PNG, "image")
    ok(ask(server, *[image] * 4))
    ok(ask(server, image, n=4))
    for parts, fields in (([image] * 5, {}), ([image], {"n": 5}), ([image, image], {"n": 3}), ([part(MP4)] * 3, {})):
        response = ask(server, *parts, **fields)
        assert (response.status_code, response.json()["error"]["code"]) == (413, "too_many_decoded_bytes")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask, server, image, image, max_tokens=60, ignore_eos=True, speculation="off")
        server.wait(lambda: server.metric("flash_requests_running") == 1)
        ok(ask(server, image, image))
        response = ask(server, image, n=3)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "media_full")
        assert response.headers["retry-after"]
        ok(running.result())
    ok(ask(server, image, n=4))
