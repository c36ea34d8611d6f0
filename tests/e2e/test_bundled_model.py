"""The bundled model over HTTP: it sees, and its draft is right often enough to be worth the name."""

from __future__ import annotations

from importlib import resources
from typing import Any

import openai

from loadtest.client import Question, Variant, parts
from loadtest.media import File
from tests.e2e.server import EngineServer

SCENE = File("image", "image/png", resources.files("model.demo").joinpath("media/scene.png").read_bytes())
CLIP = File("video", "video/mp4", resources.files("model.demo").joinpath("media/clip.mp4").read_bytes())


def test_it_says_what_is_in_the_image_as_it_streams(demo_server: EngineServer) -> None:
    client = openai.OpenAI(base_url=f"{demo_server.url}/v1", api_key="none", max_retries=0)
    content = parts(Question("Describe the image.", (SCENE,)))
    messages: Any = [{"role": "user", "content": content}]
    stream = client.chat.completions.create(model="demo", messages=messages, temperature=0, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    text = "".join(pieces)
    assert "moon" in text.lower() or "crescent" in text.lower(), text
    assert sum(map(bool, pieces)) > 3, "in several pieces"


def test_drafts_are_accepted_on_images_and_videos(demo_server: EngineServer) -> None:
    for prompt, file in (("Describe the image.", SCENE), ("Describe the video.", CLIP)):
        question = Question(prompt, (file,))
        # Where tests before this one wanted a word each, answers are expected to be too short to draft for, at first.
        for _ in range(20):
            on = demo_server.ask(question, Variant("generate", stream=True))
            if on.done["speculation"]["drafts"]:
                break
        off = demo_server.ask(question, Variant("generate", speculation="off"))
        assert on.texts == off.texts
        assert on.finish_reasons == ("stop",)
        assert on.done["speculation"]["acceptance_length"] > 2.5, on.done["speculation"]
