"""Raw prompts on the real engine: the tokens of a conversation written out, log-probabilities in the older format."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from loadtest import media
from loadtest.client import data_uri
from tests.e2e.server import EngineServer


@pytest.fixture(scope="module")
def client(server: EngineServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, prompt: Any, **fields: Any) -> Any:
    settings: Any = {"max_tokens": 24, "temperature": 0, "extra_body": {"ignore_eos": True}} | fields
    return client.completions.create(model="tiny", prompt=prompt, **settings)


@pytest.mark.parametrize("logprobs", [0, 3])
def test_logprobs_are_the_chats_own_in_columns(client: openai.OpenAI, logprobs: int) -> None:
    text = "the quick brown fox"
    (choice,) = ask(client, text, logprobs=logprobs).choices
    columns = choice.logprobs
    assert len(columns.tokens) == len(columns.token_logprobs) == len(columns.top_logprobs) == 24
    for token, logprob, top in zip(columns.tokens, columns.token_logprobs, columns.top_logprobs, strict=True):
        assert math.isclose(top[token], logprob)
        assert max(logprobs, 1) <= len(top) <= logprobs + 1
        assert logprob == max(top.values()), "greedy"
    streamed = list(ask(client, text, logprobs=logprobs, stream=True))
    parts = [chunk.choices[0].logprobs for chunk in streamed if chunk.choices[0].logprobs]
    assert [token for part in parts for token in part.tokens] == columns.tokens
    assert [offset for part in parts for offset in part.text_offset] == columns.text_offset


def test_offsets_are_places_in_the_text(client: openai.OpenAI) -> None:
    """Random tokens: many are parts of characters, which have no text of their own."""
    (choice,) = ask(client, "fox", logprobs=1, temperature=2, seed=1, max_tokens=64).choices
    columns = choice.logprobs
    assert columns.text_offset[0] == 0
    assert sorted(columns.text_offset) == columns.text_offset
    whole = [
        (token, offset)
        for token, offset in zip(columns.tokens, columns.text_offset, strict=True)
        if not token.startswith(("bytes:", "<"))
    ]
    assert whole
    # Where half a character comes before it, what stands for that half comes with the token behind it.
    assert all(choice.text[offset:].lstrip("\ufffd").startswith(token) for token, offset in whole)


def test_a_batch_with_drafts_says_what_each_prompt_says_alone_without(client: openai.OpenAI) -> None:
    prompts = ["fox", "the quick brown fox " * 12, "over the lazy dog", "fox"]
    for settings in ({"temperature": 0}, {"temperature": 1, "seed": 4, "n": 2}):
        together = ask(client, prompts, **settings)
        plain = {"extra_body": {"ignore_eos": True, "speculation": "off"}}
        alone = [choice.text for prompt in prompts for choice in ask(client, prompt, **settings, **plain).choices]
        assert [choice.text for choice in together.choices] == alone
    again = ask(client, prompts[1])
    assert again.usage.prompt_tokens_details.cached_tokens > 16


@pytest.mark.parametrize("ids", [[10**9], [5, 10**9], [[5], [10**9]]])
def test_token_ids_that_are_none_are_refused(client: openai.OpenAI, ids: Any) -> None:
    for echo in (False, True):
        with pytest.raises(openai.BadRequestError, match="names token") as refusal:
            ask(client, ids, echo=echo)
        assert str(refusal.value.param).startswith("prompt")


@pytest.mark.parametrize("prompt", ["see <image> here", ["fox", "<image>"]])
def test_a_placeholder_is_refused(client: openai.OpenAI, prompt: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="stands for an image"):
        ask(client, prompt)


def test_a_conversation_is_tokenized_as_it_is_charged(server: EngineServer) -> None:
    image = {"type": "image_url", "image_url": {"url": data_uri(media.image(1))}}
    text = {"type": "text", "text": "what is <image> red?"}
    for content in ("fox", [image, text], [text, image, image]):
        messages = [{"role": "user", "content": content}]
        chat = server.http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1}).json()
        found = server.http.post("/tokenize", json={"messages": messages, "return_token_strs": True}).json()
        assert found["count"] == len(found["tokens"]) == len(found["token_strs"]) == chat["usage"]["prompt_tokens"]
        if content == "fox":
            written = server.http.post("/detokenize", json={"tokens": found["tokens"]}).json()["prompt"]
            assert server.http.post("/tokenize", json={"prompt": written}).json()["tokens"] == found["tokens"]
            fields = {"prompt": found["tokens"], "max_tokens": 8, "temperature": 0}
            raw = server.http.post("/v1/completions", json=fields).json()
            whole = {"messages": messages, "max_tokens": 8, "temperature": 0}
            answer = server.http.post("/v1/chat/completions", json=whole).json()
            assert raw["choices"][0]["text"] == answer["choices"][0]["message"]["content"]
