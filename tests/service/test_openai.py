"""The official client, unchanged, against a real server."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from PIL import Image

from tests.service.server import Server, chat_body


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def image_part(colour: str = "red", format: str = "PNG") -> dict[str, Any]:
    file = io.BytesIO()
    Image.new("RGB", (80, 60), colour).save(file, format)
    data = base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/{format.lower()};base64,{data}"}}


def ask(client: openai.OpenAI, content: Any = "hello", **fields: Any) -> Any:
    fields = {"max_tokens": 12, "temperature": 0} | fields
    return client.chat.completions.create(model="demo", messages=[{"role": "user", "content": content}], **fields)


def test_a_completion_has_openais_shape(client: openai.OpenAI) -> None:
    answer = ask(client)
    assert answer.id.startswith("chatcmpl-")
    assert answer._request_id == answer.id
    assert (answer.object, answer.model) == ("chat.completion", "demo")
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason, choice.message.role) == (0, "length", "assistant")
    assert len(choice.message.content.split()) == 12
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (1, 12, 13)
    details = answer.usage.completion_tokens_details
    # 1 token, then blocks of 4, 4 and 3, each of which carried 7 draft tokens
    assert (details.accepted_prediction_tokens, details.rejected_prediction_tokens) == (8, 13)


def test_a_stream_says_the_same_as_the_answer_in_one_piece(client: openai.OpenAI) -> None:
    whole = ask(client)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content == ""
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:-1])
    assert all(chunk.choices[0].delta.content for chunk in chunks[1:-2]), "empty chunks are not sent"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks[-3:-1]] == [None, "length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_usage_so_far_comes_with_every_chunk_where_vllms_option_asks_for_it(client: openai.OpenAI) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    prompt = "how many words are these?"
    *chunks, last = ask(client, prompt, stream=True, stream_options=options, temperature=1.0, seed=7, n=2)
    assert [chunk.choices[0].delta.role for chunk in chunks[:3]] == ["assistant", "assistant", None]
    said = 0
    for chunk in chunks:  # those that open the choices included
        assert chunk.usage.prompt_tokens == 5
        assert chunk.usage.completion_tokens - said == len((chunk.choices[0].delta.content or "").split())
        assert chunk.usage.total_tokens == 5 + chunk.usage.completion_tokens
        said = chunk.usage.completion_tokens
    assert last.choices == []
    assert last.usage.completion_tokens == said == 24
    silent = ask(client, stream=True, stream_options={"continuous_usage_stats": True})
    assert not any(chunk.usage for chunk in silent), "as with vLLM, it says how usage is told, not whether"


@pytest.mark.parametrize("fields", [{"max_tokens": 1}, {"n": 3}, {"stop": "e"}, {"temperature": 1, "seed": 3}], ids=str)
def test_each_chunks_usage_can_be_read_without_a_look(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    """vLLM's own tests read `chunk.usage.prompt_tokens` of every chunk."""
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    for content in ("hello", [image_part(), {"type": "text", "text": "what is it?"}]):
        whole = ask(client, content, **fields).usage
        chunks = list(ask(client, content, stream=True, stream_options=options, **fields))
        assert {chunk.usage.prompt_tokens for chunk in chunks} == {whole.prompt_tokens}
        assert (chunks[0].usage.completion_tokens, chunks[-1].usage) == (0, whole)


def test_a_stream_on_the_wire_ends_with_done_and_has_no_usage_unless_asked(server: Server) -> None:
    with server.http.stream("POST", "/v1/chat/completions", json=chat_body(stream=True, max_tokens=3)) as response:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        body = response.read().decode()
    assert body.endswith("\n\ndata: [DONE]\n\n")
    assert all(block.startswith("data: ") for block in body.strip().split("\n\n"))
    assert "usage" not in body


def test_images_reach_the_engine_and_change_the_answer(client: openai.OpenAI) -> None:
    text = {"type": "text", "text": "what is it?"}
    answers = {
        ask(client, [image_part("red"), text]).choices[0].message.content,
        ask(client, [image_part("blue"), text]).choices[0].message.content,
        ask(client, [image_part("red"), image_part("blue"), text]).choices[0].message.content,
        ask(client, [image_part("blue"), image_part("red"), text]).choices[0].message.content,
        ask(client, [text]).choices[0].message.content,
    }
    assert len(answers) == 5, "order and content of media must arrive as sent"


def test_a_video_may_come_as_a_list_of_frames(client: openai.OpenAI) -> None:
    """As vLLM's clients send it; each frame counts, and so does their order."""

    def shown(*colours: str, parameters: str = "", **fields: Any) -> str:
        urls = [image_part(colour, "JPEG")["image_url"]["url"].partition(",")[2] for colour in colours]
        part = {"type": "video_url", "video_url": {"url": f"data:video/jpeg{parameters};base64,{','.join(urls)}"}}
        answer = ask(client, [part, {"type": "text", "text": "what is it?"}], extra_body=fields)
        return str(answer.choices[0].message.content)

    lists = [("red",), ("red", "red"), ("red", "blue"), ("blue", "red"), ("red", "blue", "red")]
    assert len({shown(*colours) for colours in lists}) == len(lists)
    assert shown("red", "blue", "red", num_frames=1) == shown("red")
    assert shown("red", "blue", "red", "red", parameters=";fps=2", fps=1) == shown("red", "red", parameters=";fps=1")
    with pytest.raises(openai.BadRequestError, match=r"data:video/jpeg;fps=2;base64") as untimed:
        shown("red", "blue", fps=1)
    assert (untimed.value.code, untimed.value.param) == ("no_frame_times", "messages[0].content[0]")
    with pytest.raises(openai.BadRequestError, match="frame 2: the data: URI has '!' at offset 0") as broken:
        ask(client, [{"type": "video_url", "video_url": {"url": "data:video/jpeg;base64,/9j/,!"}}])
    assert broken.value.param == "messages[0].content[0]"


def test_choices_differ_from_each_other_and_the_first_is_that_of_a_single_one(client: openai.OpenAI) -> None:
    alone = ask(client, temperature=1.0, seed=7)
    three = ask(client, temperature=1.0, seed=7, n=3)
    texts = [choice.message.content for choice in three.choices]
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    assert texts[0] == alone.choices[0].message.content
    assert len(set(texts)) == 3
    assert [c.message.content for c in ask(client, temperature=1.0, seed=7, n=3).choices] == texts
    assert (three.usage.prompt_tokens, three.usage.completion_tokens) == (1, 36)


def test_streamed_choices_keep_apart(client: openai.OpenAI) -> None:
    whole = ask(client, temperature=1.0, seed=7, n=3)
    texts = ["", "", ""]
    for chunk in ask(client, temperature=1.0, seed=7, n=3, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]


def test_without_a_seed_answers_differ_and_greedy_ones_do_not(client: openai.OpenAI) -> None:
    drawn = {ask(client, temperature=openai.omit).choices[0].message.content for _ in range(2)}
    greedy = {ask(client, temperature=0).choices[0].message.content for _ in range(2)}
    assert (len(drawn), len(greedy)) == (2, 1), "the default temperature is 1, as OpenAI's"


@pytest.mark.parametrize("as_list", [False, True])
def test_stop_strings_end_the_answer_before_them(client: openai.OpenAI, as_list: bool) -> None:
    whole = ask(client).choices[0].message.content
    stop = whole.split()[6]
    answer = ask(client, stop=[stop, "never"] if as_list else stop).choices[0]
    assert answer.finish_reason == "stop"
    assert answer.message.content == whole[: whole.index(stop)]


def test_eos_ends_it_and_ignore_eos_does_not(client: openai.OpenAI) -> None:
    ended = ask(client, max_tokens=60)
    assert (ended.choices[0].finish_reason, ended.usage.completion_tokens) == ("stop", 40)
    ignored = ask(client, max_tokens=60, extra_body={"ignore_eos": True})
    assert (ignored.choices[0].finish_reason, ignored.usage.completion_tokens) == ("length", 60)


def test_speculation_off_gives_the_same_text_without_drafts(client: openai.OpenAI) -> None:
    off = ask(client, extra_body={"speculation": "off"})
    assert off.choices[0].message.content == ask(client).choices[0].message.content
    assert off.usage.completion_tokens_details.accepted_prediction_tokens == 0
    assert off.usage.completion_tokens_details.rejected_prediction_tokens == 0


def test_an_answer_can_be_sent_back_as_history(client: openai.OpenAI) -> None:
    first = ask(client)
    messages: Any = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": "hello"},
        first.choices[0].message.model_dump(),
        {"role": "user", "content": [{"type": "text", "text": "and now?"}]},
    ]
    again = client.chat.completions.create(model="demo", messages=messages, max_completion_tokens=3, temperature=0)
    assert again.usage is not None
    assert again.usage.completion_tokens == 3


def test_harmless_fields_of_openais_are_accepted(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"}
    fields |= {"logprobs": False, "presence_penalty": 0, "logit_bias": {}, "response_format": {"type": "text"}}
    assert ask(client, **fields).choices[0].finish_reason == "length"


@pytest.mark.parametrize("kind", ["image_url", "video_url"])
@pytest.mark.parametrize("place", ["first", "last", "both"])
def test_a_url_may_stand_alone(client: openai.OpenAI, kind: str, place: str) -> None:
    """`"image_url": "data:..."`, beside parts of the other form."""
    parts = [{"type": kind, kind: image_part(colour, "GIF")["image_url"]} for colour in ("red", "blue")]
    expected = ask(client, parts)
    for part in parts if place == "both" else [parts[place == "last"]]:
        part[kind] = part[kind]["url"]
    answer = ask(client, parts)
    assert answer.choices[0].message.content == expected.choices[0].message.content
    assert answer.usage.prompt_tokens == expected.usage.prompt_tokens


def test_a_url_alone_is_media_and_no_text(client: openai.OpenAI) -> None:
    """However long it is; and what is wrong with it is said of its part."""
    url = image_part()["image_url"]["url"] + "A" * 4 * (1 << 20)  # more than --max-text-bytes; rubbish after the end
    assert ask(client, [{"type": "image_url", "image_url": url}]).choices
    for wrong, code, param in (
        ("x.png", "unsupported_url", "messages[0].content[0]"),
        ("", "missing_field", "messages[0].content[0].image_url"),
        (None, "missing_field", "messages[0].content[0].image_url"),
        ([], "invalid_request", "messages[0].content[0].image_url"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, [{"type": "image_url", "image_url": wrong}])
        assert (caught.value.code, caught.value.param) == (code, param)


@pytest.mark.parametrize("detail", ["auto", "low", "high", "original", "whatever comes next"])
def test_every_detail_is_accepted_and_without_effect(client: openai.OpenAI, detail: str) -> None:
    part = image_part()
    answer = ask(client, [part]).choices[0].message.content
    part["image_url"]["detail"] = detail
    assert ask(client, [part]).choices[0].message.content == answer


@pytest.mark.parametrize(
    "hint",
    [
        {"prompt_cache_options": {}},
        {"prompt_cache_options": {"mode": "explicit", "ttl": "1h"}},
        {"prompt_cache_key": "a", "prompt_cache_retention": "24h"},
        {"reasoning_effort": "none"},
        {"tool_choice": "none", "tools": []},
    ],
    ids=str,
)
def test_hints_of_openais_present_client_are_without_effect(client: openai.OpenAI, hint: dict[str, Any]) -> None:
    answer = ask(client).choices[0].message.content
    assert ask(client, extra_body=hint).choices[0].message.content == answer


def test_every_part_may_carry_a_cache_breakpoint(client: openai.OpenAI) -> None:
    parts: list[dict[str, Any]] = [
        image_part(),
        {"type": "text", "text": "what is it?"},
        {"type": "video_url", "video_url": image_part(format="GIF")["image_url"]},
    ]
    answer = ask(client, parts).choices[0].message.content
    for mode in ({"mode": "explicit"}, {}, None):
        marked = [part | {"prompt_cache_breakpoint": mode} for part in parts]
        assert ask(client, marked).choices[0].message.content == answer


def test_models_are_listed_and_found(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    model = client.models.retrieve("demo")
    assert model.owned_by == "flashserve"
    more: Any = model.model_extra  # what vLLM has beside OpenAI's fields, and its clients read
    assert (more["root"], more["parent"], more["permission"]) == ("demo", None, [])
    assert more["max_model_len"] > 0
    with pytest.raises(openai.NotFoundError, match="'gpt-4' is not served here; send 'demo'"):
        client.models.retrieve("gpt-4")


def test_errors_arrive_as_the_clients_typed_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "hi"}])
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    assert "'gpt-4' is not served here; send 'demo'" in unknown.value.message
    with pytest.raises(openai.BadRequestError) as bad:
        ask(client, temperature=3)
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as long:
        ask(client, "word " * 3000, stream=True)
    assert long.value.code == "context_length_exceeded", "what only the engine can tell still comes before the 200"


@pytest.mark.parametrize("prompt", ["please FAIL AT 0", "please FAIL AT 9", "please CHOKE"])
def test_an_engine_error_is_that_requests_alone_and_tells_no_secrets(client: openai.OpenAI, prompt: str) -> None:
    with pytest.raises(openai.InternalServerError) as failed:
        ask(client, prompt)
    assert failed.value.code == "engine_failure"
    assert "/a/path" not in str(failed.value)
    with pytest.raises(openai.APIError, match="engine failed"):
        list(ask(client, prompt, stream=True))
    assert ask(client).choices[0].finish_reason == "length"
