"""Test what a request becomes before it is scheduled."""

from __future__ import annotations

import pytest

from model.engine import intake
from model.engine.engine import Engine
from model.request import Message, Request, RequestError, SamplingParams


@pytest.mark.parametrize(
    "texts", [["word " * 200_000], ["word " * 200] * 1000, ["x" * 1_000_000], ["", "\u754c " * 300_000]], ids=len
)
@pytest.mark.parametrize("is_raw", [False, True])
def test_a_text_that_is_much_too_long_is_refused_by_its_beginning(
    crowd: Engine, monkeypatch: pytest.MonkeyPatch, texts: list[str], is_raw: bool
) -> None:
    """A million characters take a second, in which no other request is prepared."""
    monkeypatch.setattr(intake, "tokenize", lambda *_: pytest.fail("all of it was tokenized"))
    messages = () if is_raw else tuple(Message("user", (text,)) for text in texts)
    request = Request("r", messages, SamplingParams(max_tokens=5), prompt="".join(texts) if is_raw else None)
    with pytest.raises(
        RequestError, match="maximum context length is 256 tokens, the prompt takes more than"
    ) as caught:
        crowd.prepare(request)
    assert (caught.value.param, caught.value.code) == ("prompt" if is_raw else "messages", "context_length_exceeded")


def test_a_text_of_few_long_tokens_is_not_refused_for_its_length(
    crowd: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "CHARS_PER_TOKEN", 1)
    text = "the " * 100
    assert len(text) > crowd.max_model_len
    request = Request("r", (), SamplingParams(max_tokens=1), prompt=text)
    assert crowd.prepare(request).prompt.ids == crowd.tokenize(request)
