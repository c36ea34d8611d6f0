"""The native route: uploaded media, and answers that tell where each token came from and how long things took."""

from __future__ import annotations

import io
import json
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from tests.service.server import Server


def picture(colour: str = "red", format: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (80, 60), colour).save(file, format)
    return file.getvalue()


@pytest.fixture(scope="module")
def video() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for shade in range(0, 250, 10):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), shade, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def generate(server: Server, media: list[bytes] | None = None, **fields: Any) -> dict[str, Any]:
    data = {"prompt": "what is it?", "max_tokens": "20"} | fields
    files = [("media", ("file", one, "application/octet-stream")) for one in media or []]
    response = server.http.post("/v1/generate", data=data, files=files)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_the_answer_has_the_fields_of_the_contract(server: Server) -> None:
    answer = generate(server, [picture()])
    assert answer.keys() == {"id", "model", "text", "finish_reason", "usage", "speculation", "timings"}
    assert answer["speculation"].keys() == {"acceptance_length", "drafts", "draft_tokens", "accepted_tokens"}
    assert answer["timings"].keys() == {"queue", "media", "time_to_first_token", "decode", "tokens_per_second"}
    assert (answer["model"], answer["finish_reason"]) == ("demo", "length")
    # 1 token, then 4, 4, 4, 4 and 3: five drafts, of which all but the bonus tokens were accepted
    assert answer["speculation"] == {"acceptance_length": 3.8, "drafts": 5, "draft_tokens": 35, "accepted_tokens": 14}
    assert answer["usage"]["completion_tokens_details"] == {
        "accepted_prediction_tokens": 14,
        "rejected_prediction_tokens": 21,
    }
    timings = answer["timings"]
    assert 0 < timings["media"] < timings["time_to_first_token"] < 5
    assert timings["decode"] > 0
    assert timings["tokens_per_second"] == pytest.approx(19 / timings["decode"], rel=0.01)


def test_speculation_off_says_the_same_without_drafts(server: Server) -> None:
    on, off = generate(server, [picture()]), generate(server, [picture()], speculation="off")
    assert off["text"] == on["text"]
    assert off["speculation"] == {"acceptance_length": 1.0, "drafts": 0, "draft_tokens": 0, "accepted_tokens": 0}


def test_a_stream_tells_every_token_and_its_source_and_ends_with_the_same_object(server: Server) -> None:
    whole = generate(server, [picture()])
    files = [("media", ("file", picture(), "image/jpeg"))]
    body = server.http.post(
        "/v1/generate", data={"prompt": "what is it?", "max_tokens": "20", "stream": "true"}, files=files
    )
    assert body.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(block.removeprefix("data: ")) for block in body.text.strip().split("\n\n")]
    assert [event["type"] for event in events] == ["token"] * (len(events) - 1) + ["done"]
    tokens = [token for event in events[:-1] for token in event["tokens"]]
    assert all(token.keys() == {"id", "text", "source"} for token in tokens)
    assert len(tokens) == 20
    assert sum(token["source"] == "draft" for token in tokens) >= 14
    assert "".join(event["text"] for event in events[:-1]) == whole["text"]
    done = events[-1]
    assert done.keys() == whole.keys() | {"type"}
    assert {key: done[key] for key in ("text", "usage", "speculation")} == {
        key: whole[key] for key in ("text", "usage", "speculation")
    }


def test_images_videos_and_text_in_every_mixture(server: Server, video: bytes) -> None:
    mixtures: list[list[bytes]] = [
        [],
        [picture()],
        [video],
        [picture(), video],
        [video, picture()],
        [picture("blue")] * 3,
    ]
    answers = [generate(server, media)["text"] for media in mixtures]
    assert len(set(answers)) == len(mixtures)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_every_image_type_is_read_whatever_it_is_called(server: Server, format: str) -> None:
    assert generate(server, [picture(format=format)])["finish_reason"] == "length"


def test_num_frames_and_fps_choose_the_frames(server: Server, video: bytes) -> None:
    answers = [
        generate(server, [video], **fields)["text"]
        for fields in ({}, {"num_frames": "2"}, {"num_frames": "8"}, {"fps": "2"})
    ]
    assert len(set(answers)) == 4
    assert generate(server, [video], num_frames="4")["text"] == answers[0], "four is what this model asks for"


def test_it_is_greedy_unless_told_otherwise(server: Server) -> None:
    assert generate(server)["text"] == generate(server)["text"]
    sampled = {generate(server, temperature="1")["text"] for _ in range(2)}
    seeded = {generate(server, temperature="1", seed="3")["text"] for _ in range(2)}
    assert (len(sampled), len(seeded)) == (2, 1)


def test_fields_left_empty_as_browsers_send_them_count_as_left_out(server: Server) -> None:
    assert generate(server, temperature="", seed="", num_frames="", stop="")["text"] == generate(server)["text"]


def test_several_stop_strings_can_be_sent(server: Server) -> None:
    words = generate(server)["text"].split()
    answer = generate(server, stop=["never", words[5], words[9]])
    assert answer["finish_reason"] == "stop"
    assert answer["text"].split() == words[:5]


def test_a_plain_form_is_enough_for_text(server: Server) -> None:
    response = server.http.post("/v1/generate", data={"prompt": "what is it?", "max_tokens": 20})
    assert response.json()["text"] == generate(server)["text"]


def test_an_error_within_a_stream_is_an_event_followed_by_done(server: Server) -> None:
    response = server.http.post("/v1/generate", data={"prompt": "FAIL AT 5", "stream": "1"})
    assert response.status_code == 200
    *tokens, error, done = response.text.strip().split("\n\n")
    assert tokens
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "engine_failure"
    assert done == "data: [DONE]"


def test_an_error_before_the_first_token_of_a_stream_has_its_own_status(server: Server) -> None:
    response = server.http.post("/v1/generate", data={"prompt": "FAIL AT 0", "stream": "1"})
    assert (response.status_code, response.json()["error"]["code"]) == (500, "engine_failure")


@pytest.mark.parametrize("name", ["stop", "temperature", "prompt"])
def test_a_field_left_empty_is_a_field_left_out(server: Server, name: str) -> None:
    """Before or after one of the same name that is filled: it was called sent twice."""
    given = {"prompt": "x", "max_tokens": "8", "temperature": "0.5", "seed": "1", "stop": "w"}
    told = [
        server.http.post("/v1/generate", data=given | {name: twice})
        for twice in (given[name], [given[name], ""], ["", given[name]])
    ]
    assert [answer.status_code for answer in told] == [200, 200, 200], told[1].text
    assert len({answer.json()["text"] for answer in told}) == 1
