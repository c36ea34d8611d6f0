"""Test prompts without a chat template: a text whose special tokens count, or token ids as they are."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from model.decoding.detokenize import CONTEXT, Detokenizer, Vocabulary
from model.demo import checkpoint as demo
from model.engine.engine import Engine
from model.request import Message, Request, RequestError, SamplingParams, TemplateOptions
from model.targets.base import Target
from model.targets.raw_prompt import raw_prompt
from tests.model import tiny

PARAMS = SamplingParams(max_tokens=24, ignore_eos=True)


def raw(request_id: str, prompt: str | tuple[int, ...], *, speculation: bool = True) -> Request:
    return Request(request_id, (), PARAMS, speculation, prompt=prompt)


def test_special_tokens_in_a_text_are_special_tokens(tiny_target: Target) -> None:
    """Whoever writes a raw prompt writes the template too; split into letters it would be another prompt."""
    tokenizer = tiny_target.tokenizer
    for special in sorted(set(tokenizer.added_tokens_encoder) - {demo.IMAGE}):
        number = tokenizer.convert_tokens_to_ids(special)
        assert raw_prompt(f"a{special}b", tiny_target).ids.count(number) == 1, special


def test_a_conversation_written_out_is_the_conversation(tiny_target: Target, crowd: Engine) -> None:
    conversation = Request("chat", (Message("user", ("what is red?",)),), PARAMS)
    ids = tuple(crowd.tokenize(conversation))
    text = crowd.detokenize(ids)
    assert "what is red?" in text
    assert crowd.tokenize(raw("again", text)) == list(ids)
    written = [raw("text", text), raw("ids", ids)]
    answers = tiny.answers(crowd, [conversation, *written])
    assert answers["text"] == answers["ids"] == answers["chat"]
    alone = tiny.answers(crowd, [raw("off", text, speculation=False)])
    assert alone["off"] == answers["chat"]


def test_a_batch_gives_what_each_prompt_gives_alone(crowd: Engine) -> None:
    prompts = ["red", "a blue box", "the " * 50, "red"]
    together = tiny.answers(crowd, [raw(f"{i}", prompt) for i, prompt in enumerate(prompts)])
    for i, prompt in enumerate(prompts):
        assert tiny.answers(crowd, [raw("one", prompt)])["one"] == together[f"{i}"]
    again = tiny.drain(crowd, [raw("again", "the " * 50)])["again"]
    stats = again[-1].stats
    assert stats is not None
    assert stats.cached_tokens > 16, "a raw prompt that was seen before is in the prefix cache"


@pytest.mark.parametrize("added", ["$A", "{bos} $A", "{bos} $A {eos}"])
def test_the_tokenizers_own_tokens_are_added_once(tiny_target: Target, added: str) -> None:
    tokenizer, before = tiny_target.tokenizer, tiny_target.tokenizer.backend_tokenizer.post_processor
    bos, eos = (tokenizer.convert_tokens_to_ids(token) for token in (demo.BOS, demo.END))
    bos_token = tokenizer.bos_token
    tokenizer.bos_token = demo.BOS
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=added.format(bos=demo.BOS, eos=demo.END), special_tokens=[(demo.BOS, bos), (demo.END, eos)]
    )
    try:
        bare = raw_prompt("red", tiny_target, add_special_tokens=False).ids
        assert bare == tokenizer("red", add_special_tokens=False).input_ids
        assert raw_prompt("red", tiny_target).ids == tokenizer("red").input_ids
        assert raw_prompt(f"{demo.BOS}red", tiny_target).ids == [bos, *bare]
        assert raw_prompt([bos, *bare], tiny_target).ids == [bos, *bare], "token ids are left as they are"
    finally:
        tokenizer.backend_tokenizer.post_processor, tokenizer.bos_token = before, bos_token


def test_what_stands_for_a_medium_is_refused(tiny_target: Target) -> None:
    """Without a medium behind it, positions and features would be those of nothing."""
    image = tiny_target.placeholders["image"]
    for prompt in (demo.IMAGE, f"see {demo.IMAGE} here", [5, image, 6], [image] * 16):
        with pytest.raises(RequestError, match="stands for an image") as refusal:
            raw_prompt(prompt, tiny_target)
        assert refusal.value.param == "prompt"


@pytest.mark.parametrize("qwen", ["<|image_pad|>", "<|video_pad|>"])
def test_every_stream_of_a_family_is_refused(qwen_plain: Engine, qwen: str) -> None:
    target = qwen_plain.target
    assert qwen in target.tokenizer.added_tokens_encoder
    with pytest.raises(RequestError, match="stands for an"):
        raw_prompt(f"a{qwen}b", target)


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("", "empty"),
        ([], "empty"),
        ([-1], "names token -1"),
        ([3, 2**40], f"names token {2**40}"),
        ("half \ud83d", "surrogate"),
    ],
    ids=repr,
)
def test_prompts_that_are_none_are_refused(tiny_target: Target, prompt: str | list[int], reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as refusal:
        raw_prompt(prompt, tiny_target, add_special_tokens=False)
    assert refusal.value.param == "prompt"
    with pytest.raises(RequestError, match=str(tiny_target.vocab_size)):
        raw_prompt([tiny_target.vocab_size], tiny_target)


def test_too_long_a_prompt_names_the_prompt(plain_engine: Engine) -> None:
    with pytest.raises(RequestError, match="the prompt is too long") as refusal:
        plain_engine.prepare(raw("r", (5,) * plain_engine.max_model_len))
    assert refusal.value.param == "prompt"


def test_without_special_tokens_where_that_is_wanted(plain_engine: Engine) -> None:
    bare = Request("r", (), prompt="red", template=TemplateOptions(add_special_tokens=False))
    assert plain_engine.tokenize(bare) == raw_prompt("red", plain_engine.target, add_special_tokens=False).ids
    assert plain_engine.token_names([10**6]) == [""]


def sentencepiece(text: str) -> PreTrainedTokenizerBase:
    """Build a tokenizer whose decoder drops the leading space of a text."""
    built = Tokenizer(models.BPE())
    built.pre_tokenizer, built.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    built.train_from_iterator([text] * 4, trainers.BpeTrainer(vocab_size=60, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=built)


def test_an_answer_continues_the_prompts_text() -> None:
    """A decoder that drops the leading space of a text would join "the" and "quick"."""
    text = "the quick brown fox jumps over the lazy dog and on and on until what is read again has been forgotten"
    tokenizer = sentencepiece(text)
    vocabulary = Vocabulary(tokenizer)
    assert not vocabulary.context_free
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) > 2 * CONTEXT
    for cut in range(len(ids)):
        detokenizer = Detokenizer(vocabulary, frozenset(), follows=ids[:cut])
        rest = "".join([*(detokenizer.decode(token) for token in ids[cut:]), detokenizer.flush()])
        assert tokenizer.decode(ids[:cut]) + rest == text
