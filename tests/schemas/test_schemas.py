"""The twenty schemas themselves: their documents are valid, others are not, and llguidance compiles all of each."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import llguidance.hf
import pytest
from llguidance import LLMatcher, LLTokenizer

from tests.model import scripted
from tests.schemas.documents import cases, exact
from tests.schemas.proof import FORMS


@pytest.fixture(scope="module")
def matcher() -> Callable[[str], LLMatcher]:
    """Compiles a grammar, for documents as json.dumps writes them."""
    vocabulary: LLTokenizer = llguidance.hf.from_tokenizer(scripted.tokenizer(), n_vocab=scripted.VOCABULARY)
    written: Any = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}

    def compiled(schema: str) -> LLMatcher:
        found = LLMatcher(vocabulary, LLMatcher.grammar_from_json_schema(schema, defaults=written), log_level=0)
        assert not found.is_error(), found.get_error()
        assert not found.get_grammar_warnings()
        return found

    return compiled


def test_there_are_twenty() -> None:
    assert len(cases()) == 20
    assert all(2 <= len(case.samples) <= 3 for case in cases().values())


@pytest.mark.parametrize("name", cases())
def test_documents_are_valid_and_follow_the_grammar(name: str, matcher: Callable[[str], LLMatcher]) -> None:
    case, tokenizer = cases()[name], scripted.tokenizer()
    for sample in case.samples:
        assert case.faults(sample) == []
        ids = tokenizer(sample, add_special_tokens=False).input_ids
        compiled = matcher(case.schema)
        assert compiled.try_consume_tokens(ids) == len(ids), "the grammar refuses a document"
        assert compiled.is_accepting(), "a document is not all that the grammar wants"


@pytest.mark.parametrize("name", cases())
def test_other_documents_are_refused(name: str) -> None:
    case = cases()[name]
    others = {"merged": {"person"}, "key_values": set(), "open_object": set()}  # open ones may take another's document
    wrong = ["", "{", "[NaN]", '"text"' if name != "expression" else "[]", f"{case.samples[0]}x"]
    for other in cases().values():
        if other.name not in {name, *others.get(name, set())}:
            wrong += other.samples
    assert [text for text in wrong if not case.faults(text)] == []


def _changed(name: str, path: tuple[Any, ...], value: Any) -> str:
    document = json.loads(cases()[name].samples[0])
    place = document
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return json.dumps(document)


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("invoice", ("lines", 0, "price"), 4.995),
        ("invoice", ("lines", 0, "price"), -0.01),
        ("invoice", ("date",), "2025-02-29"),
        ("measurements", ("angle",), 360),
        ("measurements", ("even",), 3),
        ("measurements", ("steps",), [5]),
        ("contact", ("id",), "123e4567"),
        ("contact", ("opens",), "24:00:00Z"),
        ("contact", ("seen",), "2025-11-31T10:20:30Z"),
        ("contact", ("stay",), "P"),
        ("contact", ("host",), "-x-"),
        ("codes", ("word",), "ab"),
        ("codes", ("plate",), "k-ab 1"),
        ("nullable", ("rating",), 0),
        ("tuples", ("coordinates",), [1, 2, 3]),
        ("detections", ("objects", 0, "box"), [1, 2, 3]),
        ("detections", ("objects", 0, "box", 0), 1.5),
        ("tree", ("children",), [{"value": 1}]),
        ("person", ("extra",), 1),
        ("receipt", ("payment", "last_four"), "12"),
    ],
)
def test_a_wrong_value_is_found(name: str, path: tuple[Any, ...], value: Any) -> None:
    assert cases()[name].faults(_changed(name, path, value))


def test_numbers_are_compared_as_written() -> None:
    assert exact("19.99") % exact("0.01") == 0
    assert exact("1e99999999999999999999") == float("inf")
    with pytest.raises(ValueError, match="NaN"):
        exact("[NaN]")


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_other_grammars_know_their_texts(form: Any) -> None:
    assert all(form.matches(sample) for sample in form.samples)
    assert not any(form.matches(text) for text in ("", "{", "a,", "12 +", "Note 123: x.", "maybe", "[1]"))
