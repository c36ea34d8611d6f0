"""The native route on the real engine: files of every type that is read, and users' text that looks like ours."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from loadtest import media
from loadtest.client import Question, Variant
from tests.e2e.server import EngineServer

SAMPLING = {"max_tokens": 20, "ignore_eos": True}


def about(*files: media.File, prompt: str = "Describe it.", **sampling: object) -> Question:
    return Question(prompt, files, SAMPLING | sampling)


def test_the_same_picture_in_any_exact_format_gets_the_same_answer(server: EngineServer) -> None:
    """Colours, rows and edges must come through every decoder alike; a file's type must not show in the answer."""
    answers = {
        f: server.text(about(media.image(4, format=f)), Variant("generate")) for f in ("PNG", "BMP", "WEBP", "GIF")
    }
    assert len(set(answers.values())) == 1, answers
    chat = server.text(about(media.image(4)), Variant("chat"))
    assert chat == answers["PNG"], "whichever way it came"


def test_jpeg_is_read(server: EngineServer) -> None:
    answer = server.ask(about(media.image(4, format="JPEG")), Variant("generate"))
    assert answer.usage["completion_tokens"] == 20


@pytest.mark.parametrize("format", ["mp4", "webm", "avi"])
def test_videos_are_read_and_their_frames_counted(server: EngineServer, format: str) -> None:
    clip = media.video(5, format=format)
    text = server.ask(about(), Variant("generate")).usage["prompt_tokens"]
    answers = [server.ask(about(clip, num_frames=n), Variant("generate")) for n in (1, 4, 8)]
    marker = answers[0].usage["prompt_tokens"] - text - 16
    assert [a.usage["prompt_tokens"] - text - marker for a in answers] == [16, 64, 128]
    assert len({a.texts for a in answers}) == 3
    at_two_a_second = server.ask(about(clip, fps=2), Variant("generate"))
    assert at_two_a_second.usage["prompt_tokens"] == answers[1].usage["prompt_tokens"], (
        "two seconds at two frames a second are four frames"
    )


def test_a_stream_tells_the_source_of_every_token_and_ends_with_the_whole_object(server: EngineServer) -> None:
    whole = server.ask(about(media.image(4), media.video(5)), Variant("generate")).done
    done = server.ask(about(media.image(4), media.video(5)), Variant("generate", stream=True)).done
    assert done["text"] == whole["text"]
    assert done.keys() == whole.keys() | {"type"}
    assert done["speculation"]["drafts"] > 0
    assert done["timings"]["time_to_first_token"] > done["timings"]["media"] > 0


SPECIAL = ("<image>", "<|video|>", "<|end|>", "<|user|>", "<|assistant|>", "<s>", "<pad>")


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("with_image", [False, True])
def test_a_special_token_in_the_users_text_is_plain_text(server: EngineServer, special: str, with_image: bool) -> None:
    """A literal image placeholder has crashed other servers; a literal turn marker would let users speak as others."""
    tokenizer = AutoTokenizer.from_pretrained(server.settings["model"])
    files = (media.image(4),) if with_image else ()
    plain = server.ask(about(*files, prompt="What is? Describe"), Variant("generate"))
    for way in (Variant("generate"), Variant("chat", stream=True)):
        answer = server.ask(about(*files, prompt=f"What is{special}? Describe"), way)
        assert answer.status == 200, answer.error
        split = tokenizer(f"What is{special}? Describe", split_special_tokens=True, add_special_tokens=False).input_ids
        known = tokenizer("What is? Describe", add_special_tokens=False).input_ids
        assert len(split) - len(known) > 1, "spelt out"
        grown = answer.usage["prompt_tokens"] - plain.usage["prompt_tokens"]
        assert abs(grown - (len(split) - len(known))) <= 1, "one token more or less where pieces meet"
        assert answer.texts != plain.texts


def test_texts_meant_for_templates_and_placeholders_are_text(server: EngineServer) -> None:
    for prompt in ("{{ 7 * 7 }} {% raw %}", "\ue0000\ue001", "\x00 \u202e \U0001f600", "<|image_pad|>", "<" * 200):
        answer = server.ask(about(media.image(4), prompt=prompt), Variant("generate"))
        assert answer.status == 200, (prompt, answer.error)
