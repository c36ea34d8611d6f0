"""Test that text is emitted whole: no split characters, no stop strings, whatever the tokens are."""

from __future__ import annotations

import random
import unicodedata
from itertools import pairwise

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from model.decoding.detokenize import REPLACEMENT, Detokenizer, StopStrings, Vocabulary
from model.demo import checkpoint as demo
from model.targets.base import Target
from tests.model import tiny

TEXTS = (
    "",
    "plain words, twice as many spaces  as   usual ",
    " a leading space",
    "na\u00efve fa\u00e7ade \u00df \u0153",
    "e\u0301 o\u0308 n\u0303 (combining)",
    "\u4f60\u597d\u4e16\u754c \u3053\u3093\u306b\u3061\u306f \uc548\ub155",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd",
    "\U0001f600\U0001f680\U0001f9d1\u200d\U0001f4bb\U0001f1e9\U0001f1ea\U0001f44d\U0001f3fd",
    "line\nline\r\n\ttab\x00nul\x7f",
    "\U0010ffff\ue000\ufeff\u2028",
    "ends in half a family: \U0001f468\u200d",
)


@pytest.fixture(scope="module")
def tokenizer(tiny_target: Target) -> PreTrainedTokenizerBase:
    return tiny_target.tokenizer


def pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int], skip: frozenset[int] = frozenset()) -> list[str]:
    detokenizer = Detokenizer(Vocabulary(tokenizer), skip)
    return [*(detokenizer.decode(i) for i in ids), detokenizer.flush()]


def random_text(rng: random.Random) -> str:
    """Draw code points that may occur in text, of every encoded length."""
    ranges = ((0x20, 0x7F), (0xA0, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFC), (0x1F300, 0x1FAFF), (0x20000, 0x2FFFF))
    return "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(0, 40)))


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_the_pieces_make_up_the_whole(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """Byte tokens shown one by one are U+FFFD in the stream and nonsense in the client."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    shown = pieces(tokenizer, ids)
    assert "".join(shown) == tokenizer.decode(ids) == text
    assert REPLACEMENT not in "".join(shown)


def test_random_text_of_every_script_comes_out_as_it_went_in(tokenizer: PreTrainedTokenizerBase) -> None:
    rng = random.Random(0)
    for _ in range(150):
        text = random_text(rng)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        shown = pieces(tokenizer, ids)
        assert "".join(shown) == text
        assert all(REPLACEMENT not in piece for piece in shown)
        assert all(unicodedata.category(c) != "Cs" for piece in shown for c in piece)


def test_a_character_comes_with_its_last_token_and_no_later(tokenizer: PreTrainedTokenizerBase) -> None:
    """A stream would stutter if characters were held back longer."""
    ids = tokenizer("a\U0001f680b", add_special_tokens=False).input_ids
    assert pieces(tokenizer, ids) == ["a", *[""] * (len(ids) - 3), "\U0001f680", "b", ""]


def test_an_answer_cut_inside_a_character_ends_with_what_it_has(tokenizer: PreTrainedTokenizerBase) -> None:
    """max_tokens may end an answer inside a character; the rest is flushed as the tokenizer itself would show it."""
    ids = tokenizer("so \U0001f680", add_special_tokens=False).input_ids[:-1]
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_bytes_that_never_become_a_character_hold_nothing_up(tokenizer: PreTrainedTokenizerBase) -> None:
    """A model may emit continuation bytes for ever; text after them must still appear, without loss."""
    lone = tokenizer("\u4f60", add_special_tokens=False).input_ids[-1]
    plain = tokenizer(" fine", add_special_tokens=False).input_ids
    for count in (1, 7, 8, 9, 30):
        shown = pieces(tokenizer, [lone] * count + plain)
        assert "".join(shown).endswith(" fine")
        assert "".join(shown) == tokenizer.decode([lone] * count + plain)
        assert any(shown[:8]) or count < 8


def test_a_character_right_behind_broken_bytes_is_whole(tokenizer: PreTrainedTokenizerBase) -> None:
    """Flushing invalid bytes must not flush the first bytes of the next character with them."""
    lone = tokenizer("\u4f60", add_special_tokens=False).input_ids[-1]
    rocket = tokenizer("\U0001f680", add_special_tokens=False).input_ids
    for count in range(1, 20):
        ids = [lone] * count + rocket
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_random_tokens_show_what_the_whole_decode_shows(tokenizer: PreTrainedTokenizerBase) -> None:
    """Sampled at a high temperature, a byte-level vocabulary yields broken UTF-8 often."""
    rng = random.Random(1)
    for _ in range(300):
        ids = [rng.randrange(len(demo.SPECIAL), tiny.VOCABULARY) for _ in range(rng.randint(1, 60))]
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_special_tokens_and_the_end_leave_no_text(tokenizer: PreTrainedTokenizerBase) -> None:
    """With ignore_eos the end marker comes in the middle, even in the middle of a character's bytes."""
    end, image = (tokenizer.convert_tokens_to_ids(t) for t in (demo.END, demo.IMAGE))
    rocket = tokenizer("\U0001f680", add_special_tokens=False).input_ids
    ids = [*rocket[:2], end, *rocket[2:], image, end, *tokenizer("go", add_special_tokens=False).input_ids]
    assert "".join(pieces(tokenizer, ids, frozenset([end]))) == "\U0001f680go"


# -- stop strings


def test_named_special_tokens_are_text_where_they_stand(tokenizer: PreTrainedTokenizerBase) -> None:
    """A call begins with one for some models; others stay out of the text."""
    image, end = tokenizer.convert_tokens_to_ids([demo.IMAGE, demo.END])
    rocket = tokenizer("\U0001f680", add_special_tokens=False).input_ids
    word = tokenizer("a red", add_special_tokens=False).input_ids
    for named in ([image], [image, end]):
        detokenizer = Detokenizer(Vocabulary(tokenizer), frozenset([end]), named=named)
        shown = [detokenizer.decode(token) for token in (*word, image, *rocket, image, *rocket[:-1], image, *word, end)]
        assert "".join([*shown, detokenizer.flush()]) == f"a red<image>\U0001f680<image>{REPLACEMENT}<image>a red"
    made = Tokenizer(models.BPE({"a": 0, "\u2581a": 1, "\u2581": 2, "[C]": 3}, [("\u2581", "a")], unk_token="a"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.add_special_tokens(["[C]"])
    pieces_of_words = Detokenizer(Vocabulary(PreTrainedTokenizerFast(tokenizer_object=made)), frozenset(), named=[3])
    assert [pieces_of_words.decode(token) for token in (1, 1, 3, 1, 0, 3, 3, 1)] == [
        "a",
        " a",
        "[C]",
        " a",
        "a",
        "[C]",
        "[C]",
        " a",
    ]


def through(stops: tuple[str, ...], chunks: list[str]) -> tuple[str, bool, list[str]]:
    filter_ = StopStrings(stops)
    shown = [filter_.decode(chunk) for chunk in chunks]
    return "".join(shown) + filter_.flush(), filter_.stopped, shown


def test_a_stop_string_is_found_across_any_split_of_the_text() -> None:
    """A stop string may be split over any tokens; neither it nor the text after it is shown."""
    rng = random.Random(0)
    text = "one two STOP three"
    for _ in range(200):
        cuts = sorted({0, len(text), *rng.sample(range(len(text)), rng.randint(0, 12))})
        chunks = [text[a:b] for a, b in pairwise(cuts)]
        out, stopped, _ = through(("STOP",), chunks)
        assert (out, stopped) == ("one two ", True)


@pytest.mark.parametrize(
    ("stops", "text", "found"),
    [
        (("two", "one"), "one two", "one"),
        (("never", "two"), "one two", "two"),
        (("STOPPED", "STOP"), "a STOPPED b", "STOP"),
        (("never",), "one two", None),
    ],
)
def test_it_is_known_which_stop_string_was_found(stops: tuple[str, ...], text: str, found: str | None) -> None:
    """However the text was split: else the same answer would be reported in two ways."""
    for size in (1, 3, len(text)):
        filter_ = StopStrings(stops)
        for at in range(0, len(text), size):
            filter_.decode(text[at : at + size])
        assert filter_.found == found


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    """Text that was shown cannot be taken back, and text held back without need makes the stream stutter."""
    out, stopped, shown = through(("###",), ["a", "#", "b", "##", "c#", "##d"])
    assert shown == ["a", "", "#b", "", "##c", ""]
    assert (out, stopped) == ("a#b##c", True)
    assert through(("###",), ["end##"]) == ("end##", False, ["end"])


def test_a_false_start_may_hide_a_true_one() -> None:
    """'aab' in 'aaab': after the first 'aa' the third 'a' makes the first of them free, not all."""
    for chunks in (list("xaaaby"), ["xaa", "aby"], ["xa", "aab", "y"], ["xaaaby"]):
        out, stopped, _ = through(("aab",), chunks)
        assert (out, stopped) == ("xa", True)


def test_of_several_stop_strings_the_earliest_ends_the_text() -> None:
    for chunks in (["a cat and a dog"], list("a cat and a dog")):
        assert through(("dog", "cat", "and"), chunks)[:2] == ("a ", True)
    for chunks in (["hello world"], ["hello wor", "ld"]):
        assert through(("world", "o world"), chunks)[:2] == ("hell", True)


def test_nothing_comes_after_the_stop() -> None:
    filter_ = StopStrings(("x",))
    assert filter_.decode("ax") == "a"
    assert [filter_.decode("more"), filter_.flush(), filter_.decode("x"), filter_.flush()] == ["", "", "", ""]


def test_without_stop_strings_text_passes_at_once() -> None:
    assert through((), ["a", "", "b"]) == ("ab", False, ["a", "", "b"])


def test_where_a_token_says_something_else_at_the_start_of_a_text_it_is_read_in_its_context() -> None:
    """SentencePiece drops a word's leading space at the start of a text, and a token decoded alone is at the start."""
    words = ("the quick brown fox jumps over the lazy dog", "a b  c   d", "over a fox")
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=60, show_progress=False)
    made.train_from_iterator(words[:1] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    assert not Vocabulary(tokenizer).context_free
    for text in (*words, " ".join(words * 3)):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)
        assert len(set(pieces(tokenizer, ids))) > 2, "piece by piece, not all at the end"


def test_a_space_behind_a_special_token_is_no_leading_one() -> None:
    """LLaMA drops one space at the start of a text.

    After many tokens the earlier ones are forgotten, and a special token has no text. So the next token would be at the
    start.
    """
    names = ["<unk>", "<s>", "</s>", "<image>", "\u2581", "\u2581on", "\u2581and", "a"]
    made = Tokenizer(models.BPE(vocab={name: at for at, name in enumerate(names)}, merges=[], unk_token="<unk>"))
    strip = decoders.Strip(" ", 1, 0)
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", additional_special_tokens=["<image>"])
    rng = random.Random(0)
    for _ in range(100):
        ids = [rng.choice([3, 4, 5, 6, 7]) for _ in range(60)]
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)
