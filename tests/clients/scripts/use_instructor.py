# mypy: ignore-errors
"""instructor: models out of pictures in each of its modes, in a stream too."""

from __future__ import annotations

from typing import Any, Literal

import instructor
import openai
from pydantic import BaseModel, field_validator
from rounds import IMAGE, IMAGE_URI, SCRIPTED_URL, URL, a_round, run, say

official = openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
scripted = openai.OpenAI(base_url=f"{SCRIPTED_URL}/v1", api_key="none", max_retries=0)


class Thing(BaseModel):
    """What there is in the picture."""

    center: Literal["a medium red dotted diamond", "a medium blue dotted diamond", "a medium orange dotted diamond"]


def messages(text: str = "What is there?") -> Any:
    return [{"role": "user", "content": [text, instructor.Image.from_path(IMAGE)]}]


def thing_in(mode: instructor.Mode) -> Any:
    client = instructor.from_openai(official, mode=mode)
    return client.create(model="demo", temperature=0, messages=messages(), response_model=Thing).model_dump()


@a_round
def thing() -> Any:
    return thing_in(instructor.Mode.TOOLS)


@a_round
def thing_strict() -> Any:
    return thing_in(instructor.Mode.TOOLS_STRICT)


@a_round
def thing_by_schema() -> Any:
    return thing_in(instructor.Mode.JSON_SCHEMA)


@a_round
def thing_by_responses() -> Any:
    client = instructor.from_openai(official, mode=instructor.Mode.RESPONSES_TOOLS)
    image = {"type": "input_image", "image_url": IMAGE_URI}
    content: Any = [{"type": "input_text", "text": "What is there?"}, image]
    return client.create(
        model="demo", temperature=0, messages=[{"role": "user", "content": content}], response_model=Thing
    ).model_dump()


@a_round
def thing_streamed() -> Any:
    client = instructor.from_openai(official, mode=instructor.Mode.TOOLS)
    *_, last = client.create_partial(model="demo", temperature=0, messages=messages(), response_model=Thing)
    return last.model_dump()


@a_round
def thing_after_a_retry() -> Any:
    """JSON of no particular form, which the model's own check refuses at first: the scripted model says both."""

    class Orange(Thing):
        @field_validator("center")
        @classmethod
        def is_orange(cls, center: str) -> str:
            if "orange" not in center:
                raise ValueError("look again")
            return center

    client = instructor.from_openai(scripted, mode=instructor.Mode.JSON)
    script = say('{"center": "a medium red dotted diamond"}', '{"center": "a medium orange dotted diamond"}')
    return client.create(
        model="demo", messages=messages(f"What is there? {script}"), response_model=Orange, max_retries=1
    ).model_dump()


run()
