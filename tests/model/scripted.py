"""A target that says what a test wrote down, as a large model would: token by token, by its logits alone.

It is a tiny checkpoint of random weights whose logits get an addition: at every row whose text so far begins a script,
the token that continues the script is raised by `margin`. A row that has left the script has the logits of the random
weights, which depend on everything before it. All that the engine does holds for it: batches, draft trees, prompts in
chunks, shared prefixes, sampling, penalties, grammars. What a row's text is comes from the KV cache: one layer more
than the decoder has keeps the tokens, so that the text is wrong wherever the cache is.

The script is in the conversation. `say("a text")` or `say("first answer", "second answer")`, anywhere in a message's
text, holds it, and `say_named("name")` names one of `ScriptedTarget.scripts`. The latest message with one counts; of
several texts, the first answers it, the second follows when one assistant message has, and so on, so that a whole round
with tools can be written down. Where no message has one, `ScriptedTarget.default` is said.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from model.backends.attention import AttentionMetadata, MaskKind
from model.config import EngineConfig
from model.decoding.detokenize import Vocabulary
from model.demo import checkpoint as demo
from model.engine.engine import Engine
from model.request import Message
from model.targets.base import Features, Pass
from model.targets.llava import LlavaTarget
from model.targets.prompt import TokenizedPrompt
from tests.model import tiny
from tests.model.chat_templates import END, ENDS, TEMPLATES

MERGED = 1200  # tokens of the vocabulary that are bytes or merges
VOCABULARY = 1280  # a multiple of 64, as published ones are; the last ones have no text
POSITIONS = 8192
PAD, BOS, EOS, IMAGE, VIDEO = "<pad>", "<s>", "</s>", "<image>", "<|video|>"
# Tokens that detokenizers leave out, and added ones that are text, both as published families have them.
SPECIAL = (
    *(PAD, BOS, EOS, "<|endoftext|>", "<|im_start|>", "<|im_end|>", IMAGE, VIDEO),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>"),
    *("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]"),
    *("[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[THINK]", "[/THINK]"),
)
TEXTUAL = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
# How the vocabularies of Llama 3 and Qwen split a text before they merge bytes.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MARGIN = 40.0  # no sampling and hardly any penalty leaves the script
HABIT = 2.0  # added to tokens that close strings, objects and lists: random answers of a grammar come to an end
KNOWN = 4096  # prompts whose scripts are remembered
MARKER = re.compile(r"say(?:((?:<<<.*?>>>(?!>))+)|\[\[(.+?)\]\])", re.DOTALL)
TEXTS = re.compile(r"<<<(.*?)>>>(?!>)", re.DOTALL)


def say(*texts: str) -> str:
    """Write a script into a message: one text for each answer of the conversation."""
    assert texts
    assert not any("<<<" in text or ">>>" in text for text in texts)
    return "say" + "".join(f"<<<{text}>>>" for text in texts)


def say_named(name: str) -> str:
    """Name a script in a message."""
    return f"say[[{name}]]"


class Script:
    """A text to be said, and the token that continues it from each of its bytes."""

    def __init__(self, text: str, tokens: Tokens) -> None:
        """Tokenise the text, special tokens included, as the vocabulary's own tokenizer does."""
        self.text, self._tokens = text.encode(), tokens
        self._written: dict[int, int] = {}  # token by the byte at which it begins
        at = 0
        for token in tokens.tokenizer(text, add_special_tokens=False).input_ids:
            self._written[at] = token
            at += len(tokens.written[token])
        assert at == len(self.text), f"the vocabulary cannot write {text!r}"

    def after(self, at: int | None, token: int) -> int | None:
        """Return how many bytes are said once `token` follows the first `at`; None if that leaves the script."""
        written = self._tokens.written[token]
        return at + len(written) if at is not None and written and self.text.startswith(written, at) else None

    def next(self, at: int) -> int:
        """Return the token that continues after `at` bytes: the tokenizer's own, or the longest that fits if other
        tokens have led here; the end of sequence after the last."""
        if at == len(self.text):
            return self._tokens.end
        return self._written[at] if at in self._written else self._tokens.longest(self.text, at)


@dataclass(frozen=True)
class Tokens:
    """The tokens of a vocabulary as bytes. written: the bytes of each; end: the end of sequence."""

    tokenizer: PreTrainedTokenizerBase
    written: Sequence[bytes]
    end: int

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        return {written: token for token, written in enumerate(self.written) if written}

    def longest(self, text: bytes, at: int) -> int:
        """Return the longest token that `text` has at `at`."""
        most = min(len(text) - at, max(map(len, self._ids)))
        return next(self._ids[piece] for n in range(most, 0, -1) if (piece := text[at : at + n]) in self._ids)


class ScriptedTarget(LlavaTarget):
    """Implements `model.targets.base.Target`. See the module's docstring.

    scripts: by name, a text or one text for each answer; default: what is said where a conversation has no script, None
    for the random weights' own text; margin: what is added to the logit of the script's next token.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        scripts: Mapping[str, str | Sequence[str]] | None = None,
        default: str | None = None,
        margin: float = MARGIN,
        **options: Any,
    ) -> None:
        super().__init__(config, **options)
        assert self.dtype is torch.float32, "token ids must fit a number of the KV cache"
        self.scripts, self.default, self.margin = dict(scripts or {}), default, margin
        self.layers = (*self.layers, self.layers[-1])  # the last one keeps tokens
        self.verifier, self.recordable = None, False
        vocabulary = Vocabulary(self.tokenizer)
        self.tokens = Tokens(
            self.tokenizer, [vocabulary.bytes_of(token) for token in range(self.vocab_size)], min(self.eos_ids)
        )
        closing = [bool(written) and not written.strip(b'"}], :') for written in self.tokens.written]
        self._habit = torch.tensor(closing) * HABIT
        self._known: dict[int, dict[tuple[int, ...], Script | None]] = {}  # scripts by length of prompt, and prompt
        self._latest: dict[int, tuple[int, ...]] = {}  # by slot, the prompt of the latest pass

    # --- which script

    def prompt(self, messages: tuple[Message, ...], *options: Any, **named: Any) -> TokenizedPrompt:
        """Tokenise a conversation, and remember its script."""
        prompt = super().prompt(messages, *options, **named)
        goes_on = any(getattr(each, "continue_final_message", False) for each in (*options, *named.values()))
        self._remember(prompt.ids, self._script(messages, goes_on=goes_on))
        return prompt

    def positions(self, prompt: TokenizedPrompt) -> np.ndarray:
        """Return position ids. A prompt that came as text or tokens is seen here first."""
        if tuple(prompt.ids) not in self._known.get(len(prompt.ids), {}):
            text = self.tokenizer.decode(prompt.ids)
            self._remember(prompt.ids, self._script((Message("user", (text,)),)))
        return super().positions(prompt)

    def _remember(self, ids: Sequence[int], script: Script | None) -> None:
        if sum(map(len, self._known.values())) >= KNOWN:
            self._known.clear()
        self._known.setdefault(len(ids), {})[tuple(ids)] = script

    def _script(self, messages: Sequence[Message], *, goes_on: bool = False) -> Script | None:
        """Find a conversation's script. goes_on: the answer continues the last message."""
        texts: Sequence[str] = [] if self.default is None else [self.default]
        count = 0
        for message in reversed(messages[:-1] if goes_on else messages):
            written = "".join(part for part in message.content if isinstance(part, str))
            if found := list(MARKER.finditer(written)):
                literal, name = found[-1].groups()
                named = [] if literal else self.scripts.get(name, f"there is no script {name}")
                texts = TEXTS.findall(literal) if literal else [named] if isinstance(named, str) else named
                break
            count += message.role == "assistant"
        else:
            count = 0
        if not texts:
            return None
        text = texts[min(count, len(texts) - 1)]
        if goes_on:
            begun = "".join(part for part in messages[-1].content if isinstance(part, str))
            text = text.removeprefix(begun.rstrip())
        return Script(text, self.tokens)

    # --- what follows a row

    def forward(
        self, ids: Tensor, positions: np.ndarray, rows: AttentionMetadata, features: Features | None = None
    ) -> Pass:
        """Run the decoder. Each hidden state is followed by one number: the token to say next, -1 for none."""
        done = super().forward(ids, positions, rows, features)
        layer = len(self.layers) - 1
        storage, _ = rows.cache.storage(layer)
        shape = (ids.shape[0], storage.heads, ids.shape[1], storage.data.shape[-1])
        written = ids[:, None, :, None].to(self.dtype).expand(shape)
        rows.cache.write(layer, rows.plan.locations(layer), written, written)
        following = [self._following(tokens, rows, b) for b, tokens in enumerate(ids.tolist())]
        upcoming = torch.tensor(following, dtype=self.dtype)[..., None]
        return done._replace(hidden=torch.cat((done.hidden, upcoming), -1))

    def _following(self, tokens: list[int], rows: AttentionMetadata, b: int) -> list[int]:
        """Return the token to say behind each row of the b-th slot."""
        none, count, start, slot = [-1] * len(tokens), int(rows.counts[b]), int(rows.starts[b]), rows.first_slot + b
        if not count:
            return none
        keys, _ = rows.cache.read(len(self.layers) - 1, slot, 1, start)
        before = [int(number) for number in keys[0, 0, :, 0].tolist()]
        if rows.mask_kind is MaskKind.CAUSAL:  # a part of a prompt; a token may follow its last row
            context = [*before, *tokens[:count]]
            self._latest.pop(slot, None)
            prompt = self._prompt(slot, context)
            script = None if prompt is None else self._known[len(prompt)][prompt]
            if script is None or prompt is None or len(prompt) != len(context):
                return none
            return [*none[: count - 1], script.next(0), *none[count:]]
        prompt = self._prompt(slot, before)
        script = None if prompt is None else self._known[len(prompt)][prompt]
        if script is None or prompt is None:
            return none
        assert rows.parents is not None
        at: int | None = 0
        for token in before[len(prompt) :]:
            at = script.after(at, token)
        places: list[int | None] = []
        for row, parent in enumerate(rows.parents[b, :count].tolist()):
            places.append(script.after(at if parent < 0 else places[parent], tokens[row]))
        return [-1 if place is None else script.next(place) for place in places] + none[count:]

    def _prompt(self, slot: int, context: list[int]) -> tuple[int, ...] | None:
        """Return the prompt with which a context begins: the slot's latest, or the longest known."""
        latest = self._latest.get(slot)
        if (
            latest is not None
            and tuple(context[: len(latest)]) == latest
            and latest in self._known.get(len(latest), {})
        ):
            return latest
        for length in sorted(self._known, reverse=True):
            if length <= len(context) and (prompt := tuple(context[:length])) in self._known[length]:
                self._latest[slot] = prompt
                return prompt
        return None

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the random weights' logits, with the script's token raised."""
        logits = super().logits(hidden[..., :-1].contiguous()) + self._habit
        upcoming = hidden[..., -1:].long()
        return logits.scatter_add(-1, upcoming.clamp(min=0), (upcoming >= 0) * self.margin)


def engine_of(
    folder: Path,
    scripts: Mapping[str, str | Sequence[str]] | None = None,
    default: str | None = None,
    *,
    margin: float = MARGIN,
    **settings: Any,
) -> Engine:
    """Start an engine on a saved scripted checkpoint. settings: of EngineConfig, on those of `tiny.config`."""
    config = tiny.config(folder, **{"max_model_len": 2048, "max_num_seqs": 16, "drafter": "off", **settings})
    target = ScriptedTarget(config.resolved(), scripts=scripts, default=default, margin=margin)
    return Engine(config, target)


# -- the checkpoint


def save(folder: Path, kind: str = "hermes", seed: int = 0) -> Path:
    """Save a checkpoint. kind: of its chat template, of `chat_templates.TEMPLATES`."""
    words = tokenizer(kind)
    ids = {name: words.convert_tokens_to_ids(name) for name in SPECIAL}
    special = {"bos_token_id": ids[BOS], "eos_token_id": words.eos_token_id, "pad_token_id": ids[PAD]}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=tiny.SIDE,
            patch_size=tiny.PATCH,
            projection_dim=32,
        ),
        text_config=LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=POSITIONS,
            tie_word_embeddings=False,
            **special,
        ),
        image_token_index=ids[IMAGE],
        vision_feature_layer=-1,
        image_seq_length=tiny.TOKENS_PER_IMAGE,
        tie_word_embeddings=False,
        **special,
    )
    torch.manual_seed(seed)
    target = LlavaForConditionalGeneration(config)
    silent = [*words.added_tokens_decoder, *range(len(words), VOCABULARY)]  # random answers do without
    with torch.no_grad():
        for name, weight in target.named_parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=0.3 if "embed_tokens" in name else 0.25)
        target.lm_head.weight[silent] = 0.0
    target.generation_config = GenerationConfig(**special)
    target.save_pretrained(folder)
    processor = demo.processor(words, tiny.SIDE, tiny.PATCH)
    processor.chat_template = TEMPLATES[kind]
    processor.save_pretrained(folder)
    return folder


def tokenizer(kind: str = "hermes") -> PreTrainedTokenizerFast:
    """Make a byte-level BPE with the words of JSON and the special tokens of all families.

    kind: decides the chat template and what ends an answer.
    """
    backend = Tokenizer.from_str(_merges())
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    backend.add_tokens([AddedToken(name, special=False, normalized=False) for name in TEXTUAL])
    assert backend.get_vocab_size() <= VOCABULARY
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=ENDS.get(kind, END),
        pad_token=PAD,
        chat_template=TEMPLATES[kind],
        clean_up_tokenization_spaces=False,
        model_max_length=POSITIONS,
    )


@cache
def _merges() -> str:
    """Train the merges; return the tokenizer as JSON."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MERGED, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    backend.train_from_iterator(_corpus(), trainer)
    return backend.to_str()


NAMES = (
    "name type id label text value items box x y width height confidence page lines blocks fields rows columns total "
    "date price currency quantity description title status error message arguments parameters function location city "
    "unit celsius temperature query url email phone address street country code color shape object score language"
).split()
WORDS = (
    "the of and to in is that it for was on are as with at be this have from or one had by word but not what all were "
    "we when your can said there use an each which she do how their if will up other about out many then them these so "
    "some her would make like him into time has look two more write go see number no way could people image picture "
    "shows red circle blue square green star invoice receipt table amount weather today Paris Berlin Tokyo"
).split()


def _corpus() -> Iterator[str]:
    """Yield documents as models read and write them: JSON, spaced as most programs write it or not, and sentences."""
    rng = random.Random(0)

    def value(depth: int) -> Any:
        which = rng.randrange(8 if depth else 5)
        if which < 2:
            return " ".join(rng.choices(WORDS, k=rng.randint(1, 5)))
        if which < 4:
            return rng.choice([rng.randint(0, 9999), round(rng.random() * 100, 2), True, False, None])
        if which == 4:
            return rng.choice(NAMES)
        if which < 7:
            return {name: value(depth - 1) for name in rng.sample(NAMES, rng.randint(1, 5))}
        return [value(depth - 1) for _ in range(rng.randint(0, 4))]

    for _ in range(400):
        document = {name: value(2) for name in rng.sample(NAMES, 4)}
        yield json.dumps(document)
        yield json.dumps(document, separators=(",", ":"))
        yield json.dumps(document, indent=rng.choice([2, 4]))
        yield " ".join(rng.choices(WORDS, k=30)).capitalize() + "."
