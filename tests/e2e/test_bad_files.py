"""Broken files of every type, among good requests: each a clear 4xx, and nobody else notices."""

from __future__ import annotations

import random

import pytest

from loadtest import media
from loadtest.client import Answer, Question, Variant
from loadtest.media import File
from tests.e2e.server import EngineServer
from tests.media.samples import audio_only_mp4, encoded, picture, png_header

IMAGES = {format: media.image(6, 200, 160, format) for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP")}
VIDEOS = {format: media.video(6, 160, 120, format) for format in ("mp4", "webm", "avi")}


def scrambled(file: File) -> File:
    """Its first bytes, so that it is taken for what it was, and noise."""
    return File(file.kind, file.mime, file.data[:24] + random.Random(0).randbytes(2000))


def bad_files() -> dict[str, tuple[File, set[int]]]:
    bad: dict[str, tuple[File, set[int]]] = {}
    for name, file in (IMAGES | VIDEOS).items():
        bad[f"{name} cut in half"] = file.cut(0.5), {400}
        bad[f"{name} scrambled"] = scrambled(file), {400, 413}  # noise may claim any size
        bad[f"{name} of a few bytes"] = File(file.kind, file.mime, file.data[:10]), {400, 415}
    png, mp4 = "image/png", "video/mp4"
    bad["empty"] = File("image", png, b""), {400}
    bad["text"] = File("image", png, b"I am not an image, whatever they say."), {415}
    bad["svg"] = File("image", png, b"<svg xmlns='http://www.w3.org/2000/svg'/>"), {415}
    bad["video as an image"] = File("image", png, VIDEOS["mp4"].data), {415}
    bad["image as a video"] = File("video", mp4, IMAGES["PNG"].data), {415}
    bad["tiff"] = File("image", png, encoded(picture(16, 16), "TIFF")), {415}
    bad["20,000 x 20,000"] = File("image", png, png_header(20_000, 20_000)), {413}
    bad["no frames"] = File("video", mp4, audio_only_mp4()), {400}
    return bad


BAD = bad_files()


def good_questions() -> list[tuple[Question, Variant]]:
    sampled = {"temperature": 0.8, "seed": 4}
    shown: list[tuple[File, ...]] = [(), (IMAGES["PNG"],), (IMAGES["JPEG"], VIDEOS["mp4"]), (VIDEOS["avi"],)]
    return [
        (
            Question("Describe it.", files, {"max_tokens": 60, "ignore_eos": True} | extra),
            Variant("chat", stream=stream),
        )
        for files in shown
        for extra, stream in (({}, True), (sampled, False))
    ]


def check_refused(name: str, answer: Answer) -> None:
    assert answer.status in BAD[name][1], (name, answer)
    assert answer.error.keys() == {"message", "type", "param", "code"}
    assert answer.error["type"] == "invalid_request_error"
    assert answer.error["param"], name
    assert not any(word in answer.error["message"] for word in ("Traceback", "/", "PIL", "libav", "Error"))


@pytest.mark.parametrize("route", ["chat", "generate"])
def test_bad_files_are_refused_and_the_requests_beside_them_finish_untouched(server: EngineServer, route: str) -> None:
    good = good_questions()
    undisturbed = [server.text(*one) for one in good]
    way = Variant("chat") if route == "chat" else Variant("generate", stream=True)
    names = [name for name in BAD if route == "chat" or " as a" not in name]  # a file's kind is not said there
    bad = [(Question("Describe it.", (media.image(1), BAD[name][0]), {"max_tokens": 4}), way) for name in names]
    mixed = [(index, one) for index, one in enumerate([*good, *bad])]
    random.Random(1).shuffle(mixed)
    answers: dict[int, Answer] = {}
    for start in range(0, len(mixed), 20):
        batch = mixed[start : start + 20]
        numbers = [index for index, _ in batch]
        answers |= dict(zip(numbers, server.ask_all([one for _, one in batch]), strict=True))
    for index, name in enumerate(names, len(good)):
        check_refused(name, answers[index])
    assert [answers[index].texts[0] for index in range(len(good))] == undisturbed
    assert [worker["restarts"] for worker in server.health()["workers"]] == [0]
    server.wait_idle()
