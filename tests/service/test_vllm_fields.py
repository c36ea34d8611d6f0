"""Fields of vLLM's that OpenAI's API lacks: token ids of prompts and answers, what text shows, prompts that are cut."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.schemas.sampling import NOT_BUILT
from tests.model.scripted import say
from tests.service.server import Server
from tests.service.test_openai import image_part

CHAT, RAW = "/v1/chat/completions", "/v1/completions"
END = "<|im_end|>"
TOOL = {"type": "function", "function": {"name": "clock"}}
MAX_MODEL_LEN = 1024


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    settings = {"engine": "tests.service.scripted_engine:load", "max_model_len": MAX_MODEL_LEN}
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), {"kind": "hermes"}, settings)
        yield server
        assert server.close() == 0, server.log_text()


def post(server: Server, path: str, prompt: Any, **fields: Any) -> Any:
    """Return an answer; of a stream its events."""
    body: dict[str, Any] = {"temperature": 0, "max_tokens": 60} | fields
    body |= {"prompt": prompt} if path == RAW else {"messages": [{"role": "user", "content": prompt}]}
    response = server.http.post(path, json=body)
    assert response.status_code == 200, response.text
    if not body.get("stream"):
        return response.json()
    return [
        json.loads(line.removeprefix("data: ")) for line in response.text.splitlines() if line.startswith("data: {")
    ]


def text_of(choice: dict[str, Any]) -> str:
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


def tokenized(server: Server, **fields: Any) -> list[int]:
    return list(server.http.post("/tokenize", json=fields).json()["tokens"])


def detokenized(server: Server, tokens: list[int]) -> str:
    return str(server.http.post("/detokenize", json={"tokens": tokens}).json()["prompt"])


@pytest.mark.parametrize(
    ("content", "fields"),
    [
        (say("Good day."), {}),
        (say("Good day to <|im_start|> you.", "x"), {"n": 2, "logprobs": True}),
        ([image_part(), {"type": "text", "text": say("A red square, 4 × 4.")}], {}),
        (say('<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'), {"tools": [TOOL]}),
    ],
    ids=["text", "two choices", "image", "call"],
)
def test_a_chat_has_the_token_ids_of_prompt_and_answers(server: Server, content: Any, fields: dict[str, Any]) -> None:
    whole = post(server, CHAT, content, return_token_ids=True, **fields)
    shown = {name: value for name, value in fields.items() if name == "tools"}
    messages = [{"role": "user", "content": content}]
    assert whole["prompt_token_ids"] == tokenized(server, messages=messages, **shown)
    assert len(whole["prompt_token_ids"]) == whole["usage"]["prompt_tokens"]
    assert sum(len(choice["token_ids"]) for choice in whole["choices"]) == whole["usage"]["completion_tokens"]
    for choice in whole["choices"]:
        text = detokenized(server, choice["token_ids"])
        assert text.endswith(END)
        if "tools" not in fields:
            assert text.removesuffix(END).replace("<|im_start|>", "") == text_of(choice)
    events = post(server, CHAT, content, return_token_ids=True, stream=True, **fields)
    assert events[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    streamed: dict[int, list[int]] = {}
    for event in events:
        for part in event["choices"]:
            streamed.setdefault(part["index"], []).extend(part.get("token_ids", ()))
    assert [streamed[index] for index in sorted(streamed)] == [choice["token_ids"] for choice in whole["choices"]]


@pytest.mark.parametrize(
    ("prompt", "fields"),
    [
        ("Say it. " + say("Good day."), {}),
        (["Say it. " + say("One."), say("Two and three.")], {}),
        ([say("One."), say("Two.")], {"n": 2, "echo": True}),
        (say("One."), {"add_special_tokens": False, "logprobs": 1}),
    ],
    ids=["text", "two prompts", "echo", "no special tokens"],
)
def test_a_raw_prompt_has_the_token_ids_in_each_choice(server: Server, prompt: Any, fields: dict[str, Any]) -> None:
    whole = post(server, RAW, prompt, return_token_ids=True, **fields)
    prompts, n = ([prompt] if isinstance(prompt, str) else prompt), fields.get("n", 1)
    adds = {name: value for name, value in fields.items() if name == "add_special_tokens"}
    for index, choice in enumerate(whole["choices"]):
        assert choice["prompt_token_ids"] == tokenized(server, prompt=prompts[index // n], **adds)
        echoed = prompts[index // n] if "echo" in fields else ""
        assert echoed + detokenized(server, choice["token_ids"]) == text_of(choice) + END
    again = post(
        server, RAW, [choice["prompt_token_ids"] for choice in whole["choices"]][::n], **fields | {"echo": None}
    )
    assert [text_of(choice) for choice in again["choices"]] == [
        text_of(choice).removeprefix(prompts[index // n] if "echo" in fields else "")
        for index, choice in enumerate(whole["choices"])
    ], "the ids are the prompt"
    streamed: dict[int, list[int]] = {}
    opening: dict[int, list[int]] = {}
    for event in post(server, RAW, prompt, return_token_ids=True, stream=True, **fields):
        for part in event["choices"]:
            streamed.setdefault(part["index"], []).extend(part["token_ids"])
            opening |= {part["index"]: part["prompt_token_ids"]} if "prompt_token_ids" in part else {}
    assert [opening[index] for index in sorted(opening)] == [choice["prompt_token_ids"] for choice in whole["choices"]]
    assert [streamed[index] for index in sorted(streamed)] == [choice["token_ids"] for choice in whole["choices"]]


@pytest.mark.parametrize("path", [CHAT, RAW])
def test_token_ids_come_only_where_they_are_wanted(server: Server, path: str) -> None:
    for fields in ({}, {"return_token_ids": False}, {"return_token_ids": None}):
        assert "token_ids" not in json.dumps(post(server, path, say("Good day."), **fields))
        assert "token_ids" not in json.dumps(post(server, path, say("Good day."), stream=True, **fields))


def test_log_probabilities_name_tokens_by_their_ids_where_wanted(server: Server) -> None:
    fields = {"return_token_ids": True, "return_tokens_as_token_ids": True}
    (choice,) = post(server, CHAT, say("Good day."), logprobs=True, top_logprobs=2, **fields)["choices"]
    names = [f"token_id:{token}" for token in choice["token_ids"]]
    entries = choice["logprobs"]["content"]
    assert [entry["token"] for entry in entries] == names
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == "Good day." + END
    assert all(top["token"].startswith("token_id:") for entry in entries for top in entry["top_logprobs"])
    streamed = post(server, CHAT, say("Good day."), logprobs=True, stream=True, return_tokens_as_token_ids=True)
    parts = [part["logprobs"]["content"] for event in streamed for part in event["choices"] if part["logprobs"]]
    assert [entry["token"] for part in parts for entry in part] == names
    (choice,) = post(server, RAW, say("Good day."), logprobs=1, **fields)["choices"]
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in choice["token_ids"]]
    assert choice["logprobs"]["tokens"][0] in choice["logprobs"]["top_logprobs"][0]
    (choice,) = post(server, CHAT, say("Good day."), logprobs=True)["choices"]
    assert "token_id" not in json.dumps(choice)


@pytest.mark.parametrize("path", [CHAT, RAW])
@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"stop": "two"}, "One "),
        ({"stop": "two", "include_stop_str_in_output": True}, "One two"),
        ({"stop": ["thr", "ee four"], "include_stop_str_in_output": True}, "One two thr"),
        ({"stop": ["never"], "include_stop_str_in_output": True}, "One two three four."),
        ({"include_stop_str_in_output": True}, "One two three four."),
    ],
    ids=str,
)
def test_an_answer_ends_with_its_stop_string_where_wanted(
    server: Server, path: str, fields: dict[str, Any], text: str
) -> None:
    prompt = say("One two three four.")
    (choice,) = post(server, path, prompt, **fields)["choices"]
    assert (text_of(choice), choice["finish_reason"]) == (text, "stop")
    events = post(server, path, prompt, stream=True, **fields)
    parts = [part for event in events for part in event["choices"]]
    assert "".join(part.get("text") or part.get("delta", {}).get("content") or "" for part in parts) == text


@pytest.mark.parametrize("path", [CHAT, RAW])
@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "One  two <think>."),
        ({"skip_special_tokens": True}, "One  two <think>."),
        ({"skip_special_tokens": False}, "One <|im_start|> two <think>[/INST]."),
        (
            {"skip_special_tokens": False, "include_stop_str_in_output": True},
            f"One <|im_start|> two <think>[/INST].{END}",
        ),
        ({"skip_special_tokens": False, "stop": ["<|im_start|>"]}, "One "),
    ],
    ids=str,
)
def test_special_tokens_are_text_where_wanted(server: Server, path: str, fields: dict[str, Any], text: str) -> None:
    (choice,) = post(server, path, say("One <|im_start|> two <think>[/INST]."), **fields)["choices"]
    assert (text_of(choice), choice["finish_reason"]) == (text, "stop")


def test_a_prompt_is_cut_to_its_last_tokens(server: Server) -> None:
    tokens = tokenized(server, prompt="The quick brown fox jumps over the lazy dog. " + say("Good day."))
    for number in (1, 7, len(tokens) - 1, len(tokens), 500):
        fields = {"return_token_ids": True, "max_tokens": 5}
        cut = post(server, RAW, tokens, truncate_prompt_tokens=number, **fields)
        assert cut["choices"][0]["prompt_token_ids"] == tokens[-number:]
        assert cut["usage"]["prompt_tokens"] == min(number, len(tokens))
        assert text_of(cut["choices"][0]) == text_of(post(server, RAW, tokens[-number:], max_tokens=5)["choices"][0])
    whole = post(server, CHAT, say("Good day."), return_token_ids=True)["prompt_token_ids"]
    cut = post(server, CHAT, say("Good day."), return_token_ids=True, truncate_prompt_tokens=5)
    assert cut["prompt_token_ids"] == whole[-5:]


@pytest.mark.parametrize("path", [CHAT, RAW])
def test_a_prompt_that_is_too_long_is_cut_to_what_fits(server: Server, path: str) -> None:
    long = "word " * 2 * MAX_MODEL_LEN + say("Good day.")
    answer = post(server, path, long, truncate_prompt_tokens=-1, max_tokens=100)
    assert answer["usage"]["prompt_tokens"] == MAX_MODEL_LEN - 100
    assert post(server, path, "word " + say("Good day."), truncate_prompt_tokens=-1)["usage"]["prompt_tokens"] < 100


def test_media_are_not_cut(server: Server) -> None:
    content = [image_part(), {"type": "text", "text": say("Good day.")}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 5}
    refused = server.http.post(CHAT, json=body | {"truncate_prompt_tokens": 8})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "truncate_prompt_tokens"
    assert server.http.post(CHAT, json=body | {"truncate_prompt_tokens": 500}).status_code == 200


@pytest.mark.parametrize("path", [CHAT, RAW])
def test_what_neither_route_does_is_refused_by_both(server: Server, path: str) -> None:
    """Raw prompts once ignored what chats refused."""
    prompt = {"prompt": "hello"} if path == RAW else {"messages": [{"role": "user", "content": "hello"}]}
    for name in NOT_BUILT:
        refused = server.http.post(path, json=prompt | {"max_tokens": 1, name: {"some": "value"}})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, name)
        assert refused.json()["error"]["code"] == "not_built"
    for index in range(max(map(len, NOT_BUILT.values()))):
        nothing = {name: harmless[index] for name, harmless in NOT_BUILT.items() if len(harmless) > index}
        assert server.http.post(path, json=prompt | {"max_tokens": 1} | nothing).status_code == 200
