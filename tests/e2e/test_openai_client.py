"""The official client, unchanged, against the real engine: what the issue's users will do first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from loadtest import media
from loadtest.client import Question, data_uri, parts
from tests.e2e.conftest import StartServer
from tests.e2e.server import EngineServer

RED, BLUE, CLIP = media.image(1), media.image(2), media.video(3)


@pytest.fixture(scope="module")
def client(server: EngineServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, prompt: str = "Describe it.", *files: media.File, **fields: Any) -> Any:
    settings: Any = {"max_tokens": 24, "temperature": 0, "extra_body": {"ignore_eos": True}} | fields
    content: Any = parts(Question(prompt, files))
    return client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": content}], **settings)


def said(answer: Any) -> str:
    (choice,) = answer.choices
    return str(choice.message.content)


def kinds(files: tuple[media.File, ...]) -> str:
    return "+".join(file.kind for file in files) or "text"


@pytest.mark.parametrize("files", [(), (RED,), (RED, BLUE), (CLIP,), (CLIP, RED)], ids=kinds)
@pytest.mark.parametrize("temperature", [0, 1])
def test_a_stream_says_and_counts_what_the_whole_answer_does(
    client: openai.OpenAI, files: tuple[media.File, ...], temperature: float
) -> None:
    fields: dict[str, Any] = {"temperature": temperature, "seed": 11}
    whole = ask(client, "Describe it.", *files, **fields)
    chunks = list(ask(client, "Describe it.", *files, stream=True, stream_options={"include_usage": True}, **fields))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == said(whole)
    assert [chunk.choices[0].finish_reason for chunk in chunks[-3:-1]] == [None, "length"]
    streamed, usage = chunks[-1].usage, whole.usage
    assert (streamed.prompt_tokens, streamed.completion_tokens) == (usage.prompt_tokens, usage.completion_tokens)
    assert streamed.total_tokens == usage.total_tokens == usage.prompt_tokens + 24


def test_what_is_shown_and_in_which_order_decides_the_answer(client: openai.OpenAI) -> None:
    """Else a wrong slot in the prompt, or a medium that is dropped, would go unnoticed."""
    shown: list[tuple[media.File, ...]] = [
        *((), (RED,), (BLUE,), (RED, BLUE), (BLUE, RED), (RED, RED)),
        *((CLIP,), (CLIP, RED), (RED, CLIP)),
    ]
    answers = [ask(client, "Describe it.", *files) for files in shown]
    assert len({said(answer) for answer in answers}) == len(shown)
    text = answers[0].usage.prompt_tokens
    frames = [1, 1, 2, 2, 2, 6, 7, 7]
    assert [round((a.usage.prompt_tokens - text) / 16) for a in answers[1:]] == frames, "16 tokens a frame, 6 a video"


def test_text_before_between_and_after_images_keeps_its_place(client: openai.OpenAI) -> None:
    image = {"type": "image_url", "image_url": {"url": data_uri(RED), "detail": "low"}}
    a, b = {"type": "text", "text": "What do"}, {"type": "text", "text": " you see?"}
    answers = set()
    for content in ([image, a, b], [a, image, b], [a, b, image]):
        messages: Any = [{"role": "system", "content": "the quick brown fox"}, {"role": "user", "content": content}]
        completion = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=16)
        answers.add(completion.choices[0].message.content)
    assert len(answers) == 3


def test_a_seed_repeats_an_answer_and_another_seed_does_not(client: openai.OpenAI) -> None:
    drawn = [said(ask(client, "Describe it.", RED, temperature=1.0, seed=seed)) for seed in (5, 5, 6, -1)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 3
    unseeded = {said(ask(client, temperature=1.0)) for _ in range(2)}
    assert len(unseeded) == 2


def test_choices_differ_and_the_first_is_that_of_a_request_for_one(client: openai.OpenAI) -> None:
    alone = ask(client, "Describe it.", RED, temperature=1.0, seed=7)
    three = ask(client, "Describe it.", RED, temperature=1.0, seed=7, n=3)
    texts = [choice.message.content for choice in three.choices]
    assert texts[0] == said(alone)
    assert len(set(texts)) == 3
    assert three.usage.completion_tokens == 72
    assert three.usage.prompt_tokens == alone.usage.prompt_tokens
    streamed = ["", "", ""]
    for chunk in ask(client, "Describe it.", RED, temperature=1.0, seed=7, n=3, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer_before_it(client: openai.OpenAI, stream: bool) -> None:
    whole = said(ask(client, "Describe it.", RED))
    stop = next(whole[i : i + 4] for i in range(8, len(whole)) if whole.index(whole[i : i + 4]) == i)
    answer = ask(client, "Describe it.", RED, stop=["never said", stop], stream=stream)
    if stream:
        chunks = list(answer)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        text, reason = said(answer), answer.choices[0].finish_reason
    assert (text, reason) == (whole[: whole.index(stop)], "stop")


def test_an_answer_can_be_sent_back_as_history(client: openai.OpenAI) -> None:
    first = ask(client, "Describe it.", RED)
    messages: Any = [
        {"role": "user", "content": parts(Question("Describe it.", (RED,)))},
        first.choices[0].message.model_dump(),
        {"role": "user", "content": "How many objects are there?"},
    ]
    again = client.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=8, temperature=0)
    assert again.usage is not None
    assert again.usage.prompt_tokens > first.usage.prompt_tokens + 8


# -- refusals, as the client's own exceptions


def test_errors_are_the_clients_typed_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        ask(client, temperature=3)
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "hi"}])
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.APIStatusError) as unread:
        ask(client, "Describe it.", media.File("image", "image/png", b"neither this nor that"))
    assert unread.value.status_code == 415


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_does_not_fit_is_refused_before_a_stream_begins(client: openai.OpenAI, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as long:
        ask(client, "word " * 500, stream=stream)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as wide:
        ask(client, "Describe it.", *[CLIP] * 8, stream=stream)
    assert wide.value.code == "context_length_exceeded"
    for error in (long.value, wide.value):
        assert "prompt is too long: this model's maximum context length is 512 tokens" in str(error)


@pytest.mark.parametrize(
    "field",
    [
        {"prediction": {"type": "content", "content": "x"}},
        {"modalities": ["text", "audio"]},
    ],
    ids=str,
)
def test_what_is_not_built_is_refused_and_not_ignored(client: openai.OpenAI, field: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, **field)
    assert refused.value.code == "not_built"


PENALISED: dict[str, Any] = {
    "presence_penalty": 0.6,
    "frequency_penalty": 0.9,
    "logit_bias": {"20": 30, "21": -100},
    "temperature": 1,
    "seed": 4,
}


@pytest.mark.parametrize("files", [(), (RED,), (CLIP, RED)], ids=kinds)
def test_penalties_and_log_probabilities_are_the_same_with_speculation_and_streamed(
    client: openai.OpenAI, files: tuple[media.File, ...]
) -> None:
    def asked(speculation: str, **fields: Any) -> Any:
        extra = {"ignore_eos": True, "repetition_penalty": 1.2, "speculation": speculation}
        return ask(
            client, "Describe it.", *files, logprobs=True, top_logprobs=2, extra_body=extra, **PENALISED, **fields
        )

    whole, plain = asked("auto"), asked("off")
    assert said(whole) == said(plain) != said(ask(client, "Describe it.", *files, temperature=1, seed=4))
    told = whole.choices[0].logprobs.content
    assert len(told) == whole.usage.completion_tokens == 24
    assert b"".join(bytes(one.bytes) for one in told).decode(errors="replace") == said(whole)
    for one, other in zip(told, plain.choices[0].logprobs.content, strict=True):
        assert (one.token, len(one.top_logprobs)) == (other.token, 2)
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert 0 >= one.top_logprobs[0].logprob >= one.top_logprobs[1].logprob
    chunks = list(asked("auto", stream=True))
    streamed = [one for chunk in chunks if chunk.choices[0].logprobs for one in chunk.choices[0].logprobs.content]
    assert [one.token for one in streamed] == [one.token for one in told]


def test_an_answer_ends_no_earlier_than_asked(client: openai.OpenAI) -> None:
    likely_end: dict[str, Any] = {"logit_bias": {"2": 100}}  # of the tiny model's tokens the one that ends an answer
    for fewest in (0, 9):
        answer = ask(client, **likely_end, extra_body={"min_tokens": fewest})
        assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (fewest + 1, "stop")


def test_a_length_that_was_not_asked_for_is_what_fits(client: openai.OpenAI) -> None:
    """The tiny model holds 512 tokens, and by default an answer may have 256."""
    prompt = "word " * 70
    tokens = ask(client, prompt, max_tokens=1).usage.prompt_tokens
    assert tokens + 256 > 512, "too short a prompt to show anything"
    answer = ask(client, prompt, max_tokens=openai.NOT_GIVEN)
    assert (answer.usage.total_tokens, answer.choices[0].finish_reason) == (512, "length")


def test_keys_and_sizes_are_checked(start_server: StartServer) -> None:
    server = start_server(api_key="one,two", max_body_bytes=100_000, max_media_bytes=40_000)
    wrong = openai.OpenAI(base_url=f"{server.url}/v1", api_key="three", max_retries=0)
    right = openai.OpenAI(base_url=f"{server.url}/v1", api_key="two", max_retries=0)
    assert ask(right, max_tokens=1).usage.completion_tokens == 1
    with pytest.raises(openai.AuthenticationError):
        ask(wrong)
    for side in (150, 400):  # a medium that is too large, and a body that is
        with pytest.raises(openai.APIStatusError) as large:
            ask(right, "Describe it.", media.noise(0, side, side))
        assert large.value.status_code == 413
    assert ask(right, max_tokens=1).usage.completion_tokens == 1
    for client in (right, wrong):
        client.close()
