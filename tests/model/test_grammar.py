"""Answers that follow a grammar: what a guide allows, what trees keep, and what the engine refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast

from model.decoding import guided_trees, tree
from model.decoding.detokenize import Detokenizer, Vocabulary
from model.decoding.grammar import Grammars
from model.decoding.guided_trees import Guided, Worth
from model.engine.engine import Engine
from model.request import Grammar, RequestError
from tests.model import tiny

SCHEMA = {
    "type": "object",
    "properties": {"count": {"type": "integer", "minimum": 0, "maximum": 20}, "shape": {"enum": ["circle", "square"]}},
    "required": ["count", "shape"],
    "additionalProperties": False,
}
EVERY = Worth([1.0] * 16, lambda _: 1.0)  # node is worth verifying
JSON = Grammar("json_schema", json.dumps(SCHEMA))


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path) -> Engine:
    return Engine(tiny.config(tiny_checkpoint, drafter="ngram", max_num_seqs=4))


def grammars(engine: Engine, num_cached: int = 8, max_symbols: int = 100_000) -> Grammars:
    target = engine.target
    return Grammars(target.tokenizer, target.vocab_size, target.eos_ids, num_cached=num_cached, max_symbols=max_symbols)


def answer(engine: Engine, *, speculation: bool = True, **params: Any) -> tuple[list[int], str]:
    outputs = tiny.drain(engine, [tiny.ask("r", "red", speculation=speculation, **params)])["r"]
    assert outputs[-1].finish_reason in ("stop", "length"), outputs[-1].error
    return tiny.token_ids(outputs), tiny.text_of(outputs)


def ids(engine: Engine, text: str) -> list[int]:
    return list(engine.target.tokenizer(text, add_special_tokens=False).input_ids)


def test_a_guide_allows_what_continues_the_grammar(engine: Engine) -> None:
    """A copy that looked ahead and moved the guide would allow the tokens of another place."""
    guide = grammars(engine).begin(Grammar("regex", "ab|ac|xyz"))
    tokens = {letter: ids(engine, letter)[0] for letter in "abcxyz"}

    def allowed(path: str) -> str:
        place = guide.copy()
        for letter in path:
            place.advance(tokens[letter])
        mask = place.mask()
        assert mask is not None
        assert [bool(each) for each in mask] == [place.allows(token) for token in range(len(mask))]
        return "".join(letter for letter, token in tokens.items() if mask[token])

    for path, expected in {"": "ax", "a": "bc", "x": "y", "xy": "z", "ab": ""}.items():
        for _ in range(2):
            assert allowed(path) == expected, path
    assert guide.fitting([tokens["a"], tokens["c"]]) == 2
    assert guide.fitting([tokens["a"], tokens["x"], tokens["c"]]) == 1
    guide.advance(tokens["a"])
    assert allowed("") == "bc"
    assert guide.error is None


def test_a_guide_fails_at_the_token_that_leaves_the_grammar(engine: Engine) -> None:
    guide = grammars(engine).begin(Grammar("regex", "ab|ac|xyz"))
    guide.follow([ids(engine, letter)[0] for letter in "aab"])
    assert guide.mask() is None
    assert guide.forced() == []
    assert guide.error
    assert [bool(guide.failure(length)) for length in range(4)] == [False, False, True, True]


def test_forced_text_is_known_to_the_end(engine: Engine) -> None:
    guide = grammars(engine).begin(JSON)
    forced = guide.forced()
    assert engine.target.tokenizer.decode(forced).startswith('{"count')
    over = grammars(engine).begin(Grammar("choice", '["yes"]'))
    over.follow(ids(engine, "yes"))
    assert over.forced() == list(engine.target.eos_ids), "nothing can follow but the end"


def test_trees_lose_what_the_grammar_refuses_and_gain_what_it_forces(engine: Engine) -> None:
    guide = grammars(engine).begin(Grammar("regex", "(ab|ac)xyzq"))
    a, b, c, x = (ids(engine, letter)[0] for letter in "abcx")
    drafted = tree.chains(np.array([0, 0]), [[a, x, b], [a, b]])  # x cannot follow a
    untouched = drafted.paths(1)
    guided_trees.fit(drafted, {0: Guided(guide, 3)}, None, EVERY)
    assert drafted.paths(0)[1:] == [[a]], "b or c: nothing is forced, and nobody drafts on"
    assert drafted.paths(1) == untouched, "a sequence without a grammar is left alone"
    guide.advance(a)
    drafted = tree.chains(np.array([0, 0]), [[c], [x, b, a, a]])
    guided_trees.fit(drafted, {0: Guided(guide, 4)}, None, EVERY)
    paths = drafted.paths(0)
    assert [len(path) for path in paths] == [0, 1, 2, 3, 4]
    assert engine.target.tokenizer.decode(paths[-1]) == "cxyz"


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (Grammar("json_schema", '{"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}}'), "nowhere"),
        (Grammar("json_schema", '{"type": "strin"}', param="guided_json"), "strin"),
        (Grammar("json_schema", "{", param="guided_json"), "cannot be compiled"),
        (Grammar("regex", "(a", param="guided_regex"), "cannot be compiled"),
        (Grammar("lark", "start: undefined_rule", param="guided_grammar"), "undefined_rule"),
        (Grammar("gbnf", "root ::= nowhere", param="guided_grammar"), "nowhere"),
    ],
)
def test_a_grammar_that_cannot_be_compiled_is_refused_by_name(engine: Engine, grammar: Grammar, reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as caught:
        engine.prepare(tiny.ask("r", "red", grammar=grammar))
    assert caught.value.param == grammar.param
    assert caught.value.code == "invalid_grammar"
    assert caught.value.message.startswith(f"{grammar.param}: ")


def test_too_large_a_grammar_is_refused(engine: Engine) -> None:
    wide = json.dumps({"type": "object", "properties": {f"key{i}": {"type": "string"} for i in range(300)}})
    grammars(engine).begin(Grammar("json_schema", wide))
    with pytest.raises(RequestError, match="too big"):
        grammars(engine, max_symbols=1000).begin(Grammar("json_schema", wide))


def test_a_grammar_that_fails_at_its_first_token_is_refused_before(engine: Engine) -> None:
    with pytest.raises(RequestError, match="cannot be compiled"):
        grammars(engine).begin(Grammar("json_schema", '{"$ref": "#"}'))


def test_answers_with_one_grammar_do_not_share_their_place(engine: Engine) -> None:
    known, a = grammars(engine), ids(engine, "a")
    one, other = (known.begin(Grammar("regex", "ab|ac|xyz")) for _ in range(2))
    one.follow(a)
    third = known.begin(Grammar("regex", "ab|ac|xyz"))
    assert [guide.allows(a[0]) for guide in (one, other, third)] == [False, True, True]


def test_an_ambiguous_grammar_ends_its_own_answer_alone(engine: Engine) -> None:
    """Every way to read a text is an item of the parser, and there are more of them with every letter."""
    ambiguous = Grammar("lark", "start: s\ns: s s s | s s | /[a-z ]/ |")
    requests = [
        tiny.ask("ambiguous", "red", grammar=ambiguous, max_tokens=40, seed=1, temperature=1.0),
        tiny.ask("other", "red", max_tokens=30),
    ]
    outputs = tiny.drain(engine, requests)
    assert outputs["other"][-1].finish_reason == "length"
    assert outputs["ambiguous"][-1].finish_reason in ("stop", "length", "error")


def test_compiled_grammars_are_kept_up_to_a_number(engine: Engine) -> None:
    known = grammars(engine, num_cached=2)
    for pattern in ("a", "b", "a", "c", "a"):
        known.begin(Grammar("regex", pattern))
    assert [source for _, source in known._compiled] == ["c", "a"]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_matches_its_schema_with_and_without_speculation(engine: Engine, temperature: float) -> None:
    params: dict[str, Any] = {"max_tokens": 200, "temperature": temperature, "seed": 5, "grammar": JSON, "logprobs": 1}
    answers = [answer(engine, speculation=on, **params) for on in (True, False)]
    assert answers[0] == answers[1]
    jsonschema.validate(json.loads(answers[0][1]), SCHEMA)


def test_answers_that_follow_a_grammar_teach_nothing_about_others(tiny_checkpoint: Path, tiny_draft: Path) -> None:
    """Forced text is always right: counted, it would make a draft look better than it is, or hide that it is good."""
    engine = Engine(tiny.config(tiny_checkpoint, draft=str(tiny_draft)))
    answer(engine, max_tokens=30)
    load = engine.load
    known = load.tried.tolist(), load.hits.tolist(), load._tries, load._brought
    assert sum(known[0]) > 0
    _, text = answer(engine, max_tokens=60, grammar=JSON)
    assert text.startswith('{"count')
    assert (load.tried.tolist(), load.hits.tolist(), load._tries, load._brought) == known


def test_a_minimum_length_does_not_make_a_grammar_go_on(engine: Engine) -> None:
    grammar = Grammar("choice", '["yes", "no"]')
    for on in (True, False):
        _, text = answer(engine, speculation=on, max_tokens=50, min_tokens=20, ignore_eos=True, grammar=grammar)
        assert text in ("yes", "no")


def test_stop_token_ids_end_the_answer(engine: Engine) -> None:
    free, _ = answer(engine, max_tokens=30)
    third = free[2]
    cut, _ = answer(engine, max_tokens=30, stop_token_ids=(third,))
    assert cut == free[: free.index(third) + 1]
    late, _ = answer(engine, max_tokens=30, min_tokens=10, stop_token_ids=(third,))
    assert third not in late[:10]
    with pytest.raises(RequestError, match="stop_token_ids"):
        engine.prepare(tiny.ask("r", "red", stop_token_ids=(10**6,)))


def sentencepiece() -> Any:
    """A tokenizer as Llama has it: spaces in front of words, and bytes for unknown characters."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    spaces = decoders.Replace("\u2581", " ")
    backend.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    backend.train_from_iterator(['{"name": "yes", "count": 3} the red circle is a shape'] * 20, trainer)
    saved = json.loads(backend.to_str())
    vocabulary = saved["model"]["vocab"]
    vocabulary.update({f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)})
    whole = Tokenizer.from_str(json.dumps(saved))
    return PreTrainedTokenizerFast(tokenizer_object=whole, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("choice", '["sch\u00f6n \u9f9c", "red circle", "yes"]'),
        Grammar("json_schema", '{"enum": [{"name": "\u9f9c"}, {"count": 3}, [1, "sch\u00f6n"]]}'),
        Grammar("regex", "[a-z]{1,9} [0-9] \u00e9+x"),
    ],
)
def test_spaces_and_bytes_of_sentencepiece_follow_grammars(grammar: Grammar) -> None:
    tokenizer = sentencepiece()
    end, vocabulary = tokenizer.eos_token_id, Vocabulary(tokenizer)
    known = Grammars(tokenizer, len(tokenizer), [end], num_cached=4, max_symbols=100_000)
    texts = set()
    for seed in range(8):
        guide, detokenizer = known.begin(grammar), Detokenizer(vocabulary, frozenset([end]))
        rng, text, token = np.random.default_rng(seed), "", -1
        while token != end:
            mask = guide.mask()
            assert mask is not None
            token = int(rng.choice(np.flatnonzero(mask)))
            guide.advance(token)
            text += detokenizer.decode(token)
        assert guide.error is None
        texts.add(text + detokenizer.flush())
    assert len(texts) > 1
    for text in texts:
        if grammar.kind == "json_schema":
            jsonschema.validate(json.loads(text), json.loads(grammar.source))
        else:
            assert (
                text in json.loads(grammar.source) if grammar.kind == "choice" else re.fullmatch(grammar.source, text)
            )
