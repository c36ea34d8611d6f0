"""POST /v1/completions by the official client, unchanged, against a real server: raw prompts, in every form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.service.server import Server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, prompt: Any = "hello", **fields: Any) -> Any:
    fields = {"temperature": 0} | fields
    return client.completions.create(model="demo", prompt=prompt, **fields)


def post(server: Server, prompt: Any = "hello", **fields: Any) -> httpx.Response:
    return server.http.post("/v1/completions", json={"prompt": prompt, "temperature": 0, **fields})


def test_a_completion_has_openais_shape(client: openai.OpenAI) -> None:
    answer = ask(client, "one two three")
    assert answer.id.startswith("cmpl-")
    assert answer._request_id == answer.id
    assert (answer.object, answer.model) == ("text_completion", "demo")
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert len(choice.text.split()) == 16, "as many tokens as at OpenAI, where max_tokens is left out"
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (3, 16, 19)
    assert usage.completion_tokens_details.accepted_prediction_tokens > 0


@pytest.mark.parametrize("prompt", ["hello", ["hello", "you there"], [5, 6, 7], [[5, 6, 7], [8], [5, 6, 7]]], ids=repr)
@pytest.mark.parametrize("n", [1, 2])
def test_a_stream_says_the_same_as_the_answer_in_one_piece(client: openai.OpenAI, prompt: Any, n: int) -> None:
    fields: dict[str, Any] = {"n": n, "temperature": 1, "seed": 3, "max_tokens": 9, "echo": True}
    whole = ask(client, prompt, **fields)
    chunks = list(ask(client, prompt, stream=True, stream_options={"include_usage": True}, **fields))
    texts = ["" for _ in whole.choices]
    reasons: list[list[str]] = [[] for _ in whole.choices]
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        assert chunk.usage is None
        texts[choice.index] += choice.text
        reasons[choice.index] += [choice.finish_reason] if choice.finish_reason else []
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [["length"]] * len(texts)
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)


def test_each_prompt_of_a_batch_is_answered_as_if_it_were_alone(client: openai.OpenAI) -> None:
    """Else who sends a whole test set at once would measure something else."""
    prompts = ["one", "one two", "one"]
    fields: dict[str, Any] = {"n": 2, "temperature": 1, "seed": 5}
    together = ask(client, prompts, **fields)
    assert [choice.index for choice in together.choices] == list(range(6))
    alone = [choice.text for prompt in prompts for choice in ask(client, prompt, **fields).choices]
    assert [choice.text for choice in together.choices] == alone
    assert together.usage.prompt_tokens == 1 + 2 + 1
    assert together.usage.completion_tokens == 6 * 16
    unseeded = ask(client, ["same"] * 4, temperature=1)
    assert len({choice.text for choice in unseeded.choices}) == 4, "without a seed, equal prompts differ"


def test_usage_so_far_counts_only_the_prompts_that_are_read(server: Server) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    stream = post(server, ["one", "one two three"], stream=True, stream_options=options).text
    assert stream.endswith("data: [DONE]\n\n")
    chunks = [httpx.Response(200, text=line[6:]).json() for line in stream.split("\n\n")[:-2]]
    prompt = [chunk["usage"]["prompt_tokens"] for chunk in chunks]
    assert set(prompt) <= {1, 3, 4}
    assert prompt[-1] == 4
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks][-1] == 32


def test_token_ids_are_echoed_as_their_text(server: Server) -> None:
    ids = server.http.post("/v1/completions", json={"prompt": [1, 2], "echo": True, "max_tokens": 1}).json()
    assert ids["choices"][0]["text"].startswith("t1 t2")


def test_fields_that_samplers_take_arrive(client: openai.OpenAI, server: Server) -> None:
    assert len(ask(client, max_tokens=40).choices[0].text.split()) == 40
    assert ask(client, extra_body={"min_tokens": 20}).usage.completion_tokens == 20
    first, second = ask(client).choices[0].text.split()[:2]
    assert ask(client, stop=[second]).choices[0].text == f"{first} "
    assert ask(client, best_of=2, n=2).choices[1].text
    nothing: dict[str, Any]
    for nothing in ({"suffix": None}, {"suffix": ""}, {"echo": False}, {"logit_bias": {}}, {"user": "me"}):
        assert post(server, **nothing).status_code == 200, nothing
    assert (
        post(server, speculation="off").json()["usage"]["completion_tokens_details"]["rejected_prediction_tokens"] == 0
    )


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"prompt": []}, "prompt", "empty list"),
        ({"prompt": [[]]}, "prompt", "empty"),
        ({"prompt": ["a", []]}, "prompt", "mixed"),
        ({"prompt": ["a", 5]}, "prompt", "mixed"),
        ({"prompt": [5, [5]]}, "prompt", "mixed"),
        ({"prompt": None}, "prompt", "got `null`"),
        ({"prompt": {}}, "prompt", "got `object`"),
        ({"prompt": [True]}, "prompt[0]", "got `bool`"),
        ({"prompt": [1.5]}, "prompt[0]", "got `float`"),
        ({"prompt": [1, -1]}, "prompt[1]", ">= 0"),
        ({"prompt": [[1], [2**63]]}, "prompt[1][0]", "<= 2147483648"),
        ({"prompt": ["a"] * 33}, "prompt", "33 prompts; at most 32"),
        ({"prompt": ["a"] * 30, "n": 4}, "prompt", "30 prompts with n 4 are 120 answers; at most 80"),
        ({"prompt": ["x" * 600_000] * 2}, "prompt", "1200000 characters"),
        ({"prompt": "x " * 2001}, "prompt", "too long"),
        ({"prompt": ["a", "x " * 2001]}, "prompt[1]", "too long"),
        ({"prompt": [[1], [2], [3] * 2001], "n": 2}, "prompt[2]", "too long"),
        ({"n": 9}, "n", "at most 8"),
        ({"suffix": "}"}, "suffix", "not supported"),
        ({"best_of": 3}, "best_of", "equal to n, 1"),
        ({"n": 2, "best_of": 3}, "best_of", "equal to n, 2"),
        ({"use_beam_search": True}, "use_beam_search", "not supported"),
        ({"prompt_logprobs": 0}, "prompt_logprobs", "not supported"),
        ({"prompt_logprobs": 1}, "prompt_logprobs", "not supported"),
        ({"allowed_token_ids": [5]}, "allowed_token_ids", "not supported"),
        ({"bad_words": ["no"]}, "bad_words", "not supported"),
        ({"lora_path": "x"}, "lora_path", "not supported"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "at least 1, or -1"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens", ">= -1"),
        ({"logprobs": True}, "logprobs", "got `bool`"),
        ({"logprobs": 21}, "logprobs", "at most 20"),
        ({"logprobs": 1, "echo": True}, "echo", "logprobs"),
        ({"top_logprobs": 1}, "top_logprobs", "for chats"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "set stream"),
        ({"max_tokens": 0}, "max_tokens", ">= 1"),
        ({"num_frames": 3}, "num_frames", "images and videos"),
        ({"mm_processor_kwargs": {"max_pixels": 5}}, "mm_processor_kwargs.max_pixels", "images and videos"),
        ({"model": "gpt"}, "model", "not served"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "at most max_tokens"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_cannot_be_done_is_refused_by_name(server: Server, fields: dict[str, Any], param: str, says: str) -> None:
    for stream in (False, True):
        answer = post(server, **{"stream": stream and "stream_options" not in fields, **fields})
        error = answer.json()["error"] if answer.status_code != 200 else {}
        if answer.status_code == 200:  # one prompt of several in a stream that has begun
            assert stream
            assert param.startswith("prompt[")
            error = httpx.Response(200, text=answer.text.split("\n\n")[-3][6:]).json()["error"]
        assert answer.status_code in ((404,) if param == "model" else (200, 400) if stream else (400,))
        assert error["param"] == param
        assert says in error["message"]


def test_a_missing_prompt_is_missed(server: Server) -> None:
    error = server.http.post("/v1/completions", json={}).json()["error"]
    assert (error["param"], error["code"]) == ("prompt", "missing_field")


def test_a_dead_worker_costs_no_prompt(server: Server) -> None:
    prompts = ["please CRASH AT 6 now", "another prompt", "please CRASH AT 6 now"]
    answer = post(server, prompts, max_tokens=12).json()
    alone = [post(server, prompt, max_tokens=12).json()["choices"][0]["text"] for prompt in prompts]
    assert [choice["text"] for choice in answer["choices"]] == alone
    server.wait(lambda: server.health()["requests"] == 0)
