"""No more frames of a video are taken than the model's context holds; who asks for more is told how many would fit."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from loadtest import media
from loadtest.client import Question, Variant
from tests.e2e.conftest import FEW_SLOTS, StartServer, running
from tests.e2e.server import EngineServer

CLIP = media.video(5, 192, 192, num_frames=120, rate=12)  # ten seconds
SHORT = media.video(6, 192, 192, num_frames=36, rate=12)


@pytest.fixture(scope="module")
def demo_qwen_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineServer]:
    yield from running(tmp_path_factory.mktemp("demo-qwen"), {"model": "demo-qwen", **FEW_SLOTS})


def about(*files: media.File, **sampling: object) -> Question:
    return Question("Describe it.", files, sampling if "max_tokens" in sampling else {"max_tokens": 2} | sampling)


def tokens(server: EngineServer, *files: media.File, **sampling: object) -> int:
    answer = server.ask(about(*files, **sampling), Variant("generate"))
    assert answer.status == 200, answer.error
    return int(answer.usage["prompt_tokens"])


@pytest.mark.parametrize("way", [Variant("generate"), Variant("chat")], ids=["generate", "chat"])
def test_more_frames_than_fit_are_refused_with_the_number_that_does(demo_server: EngineServer, way: Variant) -> None:
    most = demo_server.health()["engine"]["max_frames"]
    assert most == 25
    assert demo_server.ask(about(SHORT, num_frames=most), way).status == 200
    for more in (most + 1, 32, 33, 10_000):
        refused = demo_server.ask(about(SHORT, num_frames=more), way)
        assert refused.status == 400
        assert refused.error["param"] == "num_frames"
        says = "num_frames: at most 25 frames fit this model's context of 4096 tokens"
        assert refused.error["message"] == says


def test_a_rate_that_gives_more_than_fit_is_thinned_to_what_fits(demo_server: EngineServer) -> None:
    """30 frames of three seconds, 120 of ten: as many tokens as 25 frames have, and room for an answer."""
    whole = tokens(demo_server, CLIP, num_frames=25)
    for clip, fps in ((SHORT, 10), (CLIP, 3), (CLIP, 1000)):
        assert tokens(demo_server, clip, fps=fps) == whole, fps
    assert tokens(demo_server, SHORT, fps=2) == whole - 19 * 144, "what fits is left as it is"
    assert whole + 300 <= 4096


@pytest.mark.parametrize(
    ("which", "files", "sampling"),
    [
        ("demo_server", 2, {"num_frames": 25}),
        ("demo_server", 8, {}),
        ("demo_qwen_server", 3, {"fps": 10}),
    ],
)
def test_several_videos_are_told_what_would_fit(
    request: pytest.FixtureRequest, which: str, files: int, sampling: dict[str, object]
) -> None:
    server: EngineServer = request.getfixturevalue(which)
    refused = server.ask(about(*[SHORT] * files, **sampling, max_tokens=600), Variant("generate"))
    assert (refused.status, refused.error["code"]) == (400, "context_length_exceeded")
    hint = re.search(r"with num_frames (\d+) it would fit", refused.error["message"])
    assert hint is not None, refused.error
    fitting = int(hint[1])
    assert tokens(server, *[SHORT] * files, num_frames=fitting, max_tokens=600) <= 4096 - 600
    again = server.ask(about(*[SHORT] * files, num_frames=fitting + 2, max_tokens=600), Variant("generate"))
    assert again.status == 400, "and with more it does not"


def test_where_sizes_differ_the_option_bounds_and_the_context_says_the_rest(demo_qwen_server: EngineServer) -> None:
    assert demo_qwen_server.health()["engine"]["max_frames"] == 114, "of the smallest size"
    assert tokens(demo_qwen_server, CLIP, fps=12) == tokens(demo_qwen_server, CLIP, num_frames=32)
    refused = demo_qwen_server.ask(about(CLIP, num_frames=33), Variant("chat"))
    assert (refused.status, refused.error["message"]) == (400, "num_frames must be at most 32")


def test_an_option_above_what_fits_is_lowered_with_a_line_in_the_log(start_server: StartServer) -> None:
    server = start_server(max_frames=64, max_model_len=128)
    assert "--max-frames is reduced from 64 to 6, which fit the model's context of 128 tokens" in server.log_text()
    refused = server.ask(about(CLIP, num_frames=7), Variant("generate"))
    assert "at most 6 frames fit this model's context of 128 tokens" in refused.error["message"]
    assert tokens(server, CLIP, fps=12) == tokens(server, CLIP, num_frames=6)
    assert tokens(server, CLIP) == tokens(server, CLIP, num_frames=6), "what the model takes by default is six"


def test_what_a_model_takes_by_default_fits_too(start_server: StartServer) -> None:
    server = start_server(max_model_len=64)
    assert "is reduced" not in server.log_text(), "nobody set the option"
    assert tokens(server, CLIP) == tokens(server, CLIP, num_frames=3)
    assert server.ask(about(CLIP, num_frames=4), Variant("generate")).error["param"] == "num_frames"
