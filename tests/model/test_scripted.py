"""The scripted target says its script in every way that a request can run, and leaves it where something else must."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from model.engine.engine import Engine
from model.request import Message, Request, SamplingParams
from tests.model import scripted, tiny
from tests.model.chat_templates import TEMPLATES, call
from tests.model.oracle import with_oracle
from tests.model.scripted import say, say_named

DOCUMENT = json.dumps(
    {"name": "Anna Müller", "age": 31, "tags": ["a", "漢字", "🌍"], "nested": {"ok": True}}, ensure_ascii=False
)
SCRIPTS = {
    "document": DOCUMENT,
    "call": "<think>\nWhich city?\n</think>\n\n" + call("hermes", "weather", {"city": "Paris"}, ("time", {})),
    "brackets": '[[1, 2], [3, 4]] <b>bold</b>>, {"a": "<tool_call>"}',
    "spelled": "<tool_cal" + "l> \n\t é",
    "long": " ".join(f"{number} is the square of {number**0.5:.3f}." for number in range(20)),
    "empty": "",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scripted.save(tmp_path_factory.mktemp("scripted") / "hermes")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return scripted.engine_of(folder, SCRIPTS, prefill_chunk=16, drafter="ngram")


def requests(**params: Any) -> list[Request]:
    settings: dict[str, Any] = {"max_tokens": 400, "ignore_eos": False, **params}
    return [
        tiny.ask(name, f"Number {at}, please ", say(text), **settings)
        for at, (name, text) in enumerate(SCRIPTS.items())
    ]


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "seed": 5}, {"frequency_penalty": 0.1, "top_k": 3}])
def test_it_says_its_script(engine: Engine, params: dict[str, Any]) -> None:
    for every in (0, 1):
        outputs = tiny.drain(engine, requests(**params), every=every)
        assert {name: tiny.text_of(each) for name, each in outputs.items()} == SCRIPTS
        assert {each[-1].finish_reason for each in outputs.values()} == {"stop"}


def test_draft_trees_follow_their_own_paths(folder: Path) -> None:
    """Wrong nodes at every depth, and slots that are exchanged when others finish."""
    engine = scripted.engine_of(folder, max_num_seqs=4)
    known = tiny.answers(engine, requests())
    oracle = with_oracle(engine, known)
    outputs = tiny.drain(engine, requests(), every=1)
    assert {name: tiny.text_of(each) for name, each in outputs.items()} == SCRIPTS
    assert any(nodes > accepted > 2 for nodes, accepted in oracle.shapes)


def test_prompts_that_share_a_prefix(engine: Engine) -> None:
    """A conversation's answers come one after the other, and each prompt begins with the one before."""
    turns = [Message("user", (say("first", "second", "third"),))]
    for text in ("first", "second", "third", "third"):
        outputs = tiny.drain(engine, [Request("turn", tuple(turns), SamplingParams(max_tokens=9))])["turn"]
        assert tiny.text_of(outputs) == text
        turns += [Message("assistant", (text,)), Message("user", ("go on",))]
    assert outputs[-1].stats is not None
    assert outputs[-1].stats.cached_tokens > 16


def test_scripts_by_name_and_without_a_name(folder: Path) -> None:
    engine = scripted.engine_of(folder, {"one": DOCUMENT, "two": ["a", "b"]}, default="nothing to say")
    asked = {"1": say_named("one"), "2": f"system {say_named('two')}", "3": "hello", "4": say_named("three")}
    outputs = tiny.drain(
        engine, [tiny.ask(name, text, max_tokens=99, ignore_eos=False) for name, text in asked.items()]
    )
    texts = {name: tiny.text_of(each) for name, each in outputs.items()}
    assert texts == {"1": DOCUMENT, "2": "a", "3": "nothing to say", "4": "there is no script three"}


def test_a_path_that_leaves_the_script_goes_its_own_way(folder: Path) -> None:
    """A bias forbids a token of the script: what follows is the random weights' own, with drafts and without."""
    engine = scripted.engine_of(folder, drafter="ngram")
    token = engine.target.tokenizer(" 31").input_ids[-1]
    request = tiny.ask("left", say(DOCUMENT), logit_bias=((token, -100.0),), max_tokens=60)
    plain = tiny.text_of(tiny.drain(engine, [tiny.ask("left", say(DOCUMENT), max_tokens=90)])["left"])
    left = tiny.text_of(tiny.drain(engine, [request])["left"])
    assert plain.startswith(DOCUMENT)
    assert left.startswith(DOCUMENT.split("31")[0])
    assert not left.startswith(DOCUMENT)
    alone = tiny.drain(scripted.engine_of(folder), [request])["left"]
    assert tiny.text_of(alone) == left


def test_a_script_is_resumed_by_other_tokens(engine: Engine) -> None:
    """Where a token of the script was chosen in smaller pieces, the text goes on after them."""
    target = engine.target
    assert isinstance(target, scripted.ScriptedTarget)
    script = scripted.Script('{"name": "x"}', target.tokens)
    (quote,) = target.tokenizer("{").input_ids
    at = script.after(0, quote)
    assert at == 1
    assert target.tokens.written[script.next(at)].startswith(b'"')
    assert script.after(at, quote) is None


@pytest.mark.parametrize("kind", TEMPLATES)
def test_every_template_takes_a_conversation(tmp_path: Path, kind: str) -> None:
    """An image, and a second turn; a script with the family's own way of calling a tool."""
    text = "Done." if kind == "plain" else call(kind, "weather", {"city": "Paris", "days": 3})
    engine = scripted.engine_of(scripted.save(tmp_path / kind, kind), default=text)
    messages = (
        Message("system", ("Be brief.",)),
        Message("user", (tiny.image(0), "What is this?")),
        Message("assistant", ("A square.",)),
        Message("user", ("And now?",)),
    )
    outputs = tiny.drain(engine, [Request("a", messages, SamplingParams(max_tokens=99))])["a"]
    written = engine.target.tokenizer.decode(tiny.token_ids(outputs)[:-1])
    assert written == text
    assert outputs[-1].finish_reason == "stop"
