"""Test that a prompt's ids equal those of the family's own `processor.apply_chat_template`, called as users call it.

This covers tokens that the tokenizer adds by itself, and templates with and without BOS. No flag is passed that might
hide a difference.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoProcessor, AutoTokenizer

from model.bench.reference import Reference
from model.demo import checkpoint as demo
from model.engine.engine import Engine
from model.request import Medium, Message, SamplingParams
from model.targets.base import Target
from model.targets.qwen2_5_vl import Qwen25VLTarget
from model.targets.registry import load_target
from tests.model import tiny, tiny_qwen
from tests.model.test_prompt import HOSTILE

BOS = {"llava": demo.BOS, "qwen": tiny_qwen.PAD}
EOS = {"llava": demo.END, "qwen": tiny_qwen.END}
ADDED = {"nothing": "$A", "bos": "{bos} $A", "eos": "$A {eos}", "both": "{bos} $A {eos}", "twice": "{bos} {bos} $A"}
# Like LLaVA-1.5's: words for the roles, and no BOS.
WORDS = {
    "llava": (
        "{% for m in messages %}{{ m['role'].upper() }}: {% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<image>\n{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %} "
        "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
    "qwen": tiny_qwen.CHAT_TEMPLATE,
}
# The prompt begins with the first message's text, if it has one first.
BARE = {
    family: "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}"
    + "".join("{% elif c['type'] == '" + kind + "' %}" + mark for kind, mark in marks.items())
    + "{% endif %}{% endfor %}{% endfor %}"
    for family, marks in {
        "llava": {"image": demo.IMAGE},
        "qwen": {"image": tiny_qwen.IMAGE, "video": tiny_qwen.VIDEO},
    }.items()
}
TEMPLATES: dict[str, Callable[[str], str]] = {
    "words": WORDS.__getitem__,
    "bos": lambda family: "{{ bos_token }}" + WORDS[family],
    "bos in letters": lambda family: BOS[family] + WORDS[family],
    "line, bos": lambda family: "{{ '\\n' + bos_token }}" + WORDS[family],
    "bare": BARE.__getitem__,
}


def variant(made: Path, folder: Path, family: str, added: str, template: str, *, bos: bool = True) -> Path:
    """Save the checkpoint with a tokenizer that adds `added` by itself, and with this chat template.

    bos: whether the tokenizer has a BOS token.
    """
    shutil.copytree(made, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token = BOS[family] if bos else None
    marks = {"bos": BOS[family], "eos": EOS[family]}
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=ADDED[added].format(**marks),
        special_tokens=[(mark, tokenizer.convert_tokens_to_ids(mark)) for mark in marks.values()],
    )
    tokenizer.chat_template = TEMPLATES[template](family)
    if family == "llava":
        processor = AutoProcessor.from_pretrained(made)
        processor.tokenizer, processor.chat_template = tokenizer, tokenizer.chat_template
        processor.save_pretrained(folder)
    else:
        tokenizer.save_pretrained(folder)
    return folder


def target_of(folder: Path) -> Target:
    return load_target(tiny.config(folder).resolved())


def image(family: str, seed: int) -> Medium:
    return tiny.image(seed) if family == "llava" else tiny_qwen.image(seed)


def video(family: str, seed: int) -> Medium:
    return tiny.video(seed, 3) if family == "llava" else tiny_qwen.video(seed, 5)


def conversations(family: str) -> dict[str, tuple[Message, ...]]:
    picture, clip = (image(family, 1), video(family, 2))
    return {
        "text": (Message("user", ("Describe the image.",)),),
        "nothing": (Message("user", ("",)),),
        "spaces": (Message("user", ("  a\n",)),),
        "image": (Message("user", (picture, "What do you see?")),),
        "image last": (Message("user", ("What do you see?", picture)),),
        "video": (Message("user", (clip, "What do you see in the video?")),),
        "turns": (
            Message("system", ("Be brief.",)),
            Message("user", (picture, "Describe.", clip)),
            Message("assistant", ("The red circle.",)),
            Message("user", ("And here?", image(family, 3))),
        ),
    }


def processor_of(folder: Path, family: str) -> Callable[[tuple[Message, ...]], list[int]]:
    processor = AutoProcessor.from_pretrained(folder) if family == "llava" else tiny_qwen.Processor.of(folder)
    return partial(tiny.ids_by_processor, processor, split=family == "llava")


@pytest.fixture
def made(family: str, tiny_checkpoint: Path, qwen_checkpoint: Path) -> Path:
    return tiny_checkpoint if family == "llava" else qwen_checkpoint


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("added", ADDED)
@pytest.mark.parametrize("family", ["llava", "qwen"])
def test_ids_are_those_of_the_familys_own_processor(
    made: Path, tmp_path: Path, family: str, added: str, template: str
) -> None:
    folder = variant(made, tmp_path / "target", family, added, template)
    target, theirs = target_of(folder), processor_of(folder, family)
    assert len(target.tokenizer("a").input_ids) == len(ADDED[added].split()), "the tokenizer adds it"
    begins: set[bool] = set()
    for name, messages in conversations(family).items():
        prompt = target.prompt(messages)
        if name == "nothing" and template == "bare" and added == "nothing":
            assert prompt.ids == []
            continue
        assert prompt.ids == theirs(messages), name
        check(target, prompt.ids, prompt.spans, prompt.media)
        begins.add(prompt.ids[:1] == target.tokenizer.convert_tokens_to_ids([BOS[family]]))
    assert begins == {added in ("bos", "both", "twice") or template.startswith("bos")}


def check(target: Target, ids: list[int], spans: tuple[tuple[int, int], ...], media: tuple[Medium, ...]) -> None:
    """Check that spans consist of placeholders, and that none are outside."""
    marks = {demo.IMAGE, tiny_qwen.IMAGE, tiny_qwen.VIDEO}
    holders = {target.tokenizer.convert_tokens_to_ids(mark) for mark in marks if mark in target.tokenizer.get_vocab()}
    inside = [i for first, last in spans for i in range(first, last)]
    assert inside == [i for i, token in enumerate(ids) if token in holders]
    assert [last - first for first, last in spans] == [tokens(target, medium) for medium in media]


def tokens(target: Target, medium: Medium) -> int:
    if isinstance(target, Qwen25VLTarget):
        return int(np.prod(target.grid(medium)))
    return tiny.TOKENS_PER_IMAGE * len(medium.frames)


@pytest.mark.parametrize("added", ["eos", "nothing"])
def test_a_tokenizer_may_have_no_bos(qwen_checkpoint: Path, tmp_path: Path, added: str) -> None:
    """Qwen's own has none; its other additions stay."""
    folder = variant(qwen_checkpoint, tmp_path / "target", "qwen", added, "words", bos=False)
    target, theirs = target_of(folder), processor_of(folder, "qwen")
    assert target.tokenizer.bos_token is None
    for messages in conversations("qwen").values():
        assert target.prompt(messages).ids == theirs(messages)


@pytest.mark.parametrize("family", ["llava", "qwen"])
def test_a_users_text_is_neither_bos_nor_taken_for_it(made: Path, tmp_path: Path, family: str) -> None:
    """transformers compares the first characters of a prompt, whoever wrote them.

    So a user could remove BOS or double it there. Here a user's text stays text.
    """
    bos = BOS[family]
    for template in ("bare", "words"):
        target = target_of(variant(made, tmp_path / template, family, "both", template))
        known = set(target.tokenizer.convert_tokens_to_ids([bos, EOS[family]]))
        for text in (bos, f"{bos}Describe", f" {bos}", f"{bos}{bos}", EOS[family], f"a{EOS[family]}", *HOSTILE):
            for media in ((), (image(family, 1),)):
                hostile, plain = (target.prompt((Message("user", (said, *media)),)) for said in (text, "harmless"))
                assert [i for i in hostile.ids if i in known] == [i for i in plain.ids if i in known], text
                assert hostile.ids[0] == plain.ids[0] == target.tokenizer.convert_tokens_to_ids(bos)
                assert hostile.ids[-1] == plain.ids[-1] == target.tokenizer.convert_tokens_to_ids(EOS[family])
                assert text in target.tokenizer.decode([i for i in hostile.ids if i not in known]), "text, all of it"


def test_positions_and_spans_move_along(qwen_checkpoint: Path, tmp_path: Path) -> None:
    """They move by one if BOS precedes the prompt; offsets in time, height and width stay."""
    with_bos = target_of(variant(qwen_checkpoint, tmp_path / "bos", "qwen", "bos", "words"))
    without = target_of(variant(qwen_checkpoint, tmp_path / "none", "qwen", "nothing", "words"))
    for messages in conversations("qwen").values():
        longer, shorter = with_bos.prompt(messages), without.prompt(messages)
        assert longer.ids[1:] == shorter.ids
        assert longer.spans == tuple((first + 1, last + 1) for first, last in shorter.spans)
        places = with_bos.positions(longer)
        np.testing.assert_array_equal(places[:, 0], 0)
        np.testing.assert_array_equal(places[:, 1:], without.positions(shorter) + 1)


@pytest.mark.parametrize("family", ["llava", "qwen"])
def test_answers_are_those_of_transformers_generate(made: Path, tmp_path: Path, family: str) -> None:
    """Compare whole answers, from messages to tokens, on a checkpoint like LLaVA-1.5."""
    folder = variant(made, tmp_path / "target", family, "bos", "words")
    reference = Reference(str(folder), device="cpu", dtype="float32")
    engine, theirs = Engine(tiny.config(folder, drafter="off", max_num_seqs=2)), processor_of(folder, family)
    for name, messages in conversations(family).items():
        assert reference.inputs([messages])["input_ids"][0].tolist() == theirs(messages)
        params: dict[str, Any] = {"max_tokens": 12, "ignore_eos": False}
        ask = tiny.ask("r", *messages[-1].content, **params)
        answer = tiny.answers(engine, [ask])["r"]
        assert answer == list(reference.generate([ask.messages], SamplingParams(12)).tokens[0]), name


@pytest.mark.parametrize(("family", "name"), [("llava", "target"), ("qwen", "qwen-target")])
def test_the_bundled_models_prompts_begin_as_their_drafts_were_trained(family: str, name: str) -> None:
    """The template writes BOS once, if there is one; their tokenizers add nothing."""
    folder = Path(demo.__file__).parent / "weights" / name
    target, messages = target_of(folder), (Message("user", ("Describe it.",)),)
    ids = target.prompt(messages).ids
    assert ids == processor_of(folder, family)(messages)
    begin = [demo.BOS, demo.USER] if family == "llava" else ["<|im_start|>"]
    assert target.tokenizer.convert_ids_to_tokens(ids[: len(begin)]) == begin
    assert target.tokenizer.convert_ids_to_tokens(ids).count(target.tokenizer.bos_token) == (family == "llava")
