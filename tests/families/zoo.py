"""Saves tiny random checkpoints of vision-language families to disk, as a user's checkpoint would be.

A family is a function that returns a `Checkpoint`: the config, and the processor with its tokenizer and chat template.
Weights are random but wide, for the reasons in tests/model/tiny.py: attention, windows, positions and pictures matter,
and greedy tokens do not tie.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForImageTextToText, GenerationConfig, PreTrainedTokenizerFast

from tests.model.tiny import CORPUS

HIDDEN, LAYERS, WINDOW = 64, 4, 12
POSITIONS = 2048
WORDS = 300  # tokens of the vocabulary that are neither special nor padding
ROUND_TO = 64  # published vocabularies are padded to a multiple
# Fields that most text configs have; a config class ignores what it does not know.
TEXT: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": POSITIONS,
    "tie_word_embeddings": False,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 14,
}
SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Checkpoint:
    """What a family's function returns: the config of the model, and the processor with tokenizer and chat template."""

    config: Any
    processor: Any


@dataclass(frozen=True)
class Family:
    """A family. video: whether it reads videos; several: whether one prompt may have several images;
    mixed: whether one prompt may have an image and a video, or transformers itself fails;
    unified: whether one file describes all its processors, as in checkpoints saved by transformers 5;
    backend: of transformers' image processors; None for its own choice;
    attention: how many times as much the decoder's attention adds, where other layers drown it."""

    name: str
    build: Callable[[], Checkpoint]
    video: bool = False
    several: bool = True
    mixed: bool = True
    unified: bool = False
    backend: str | None = None
    attention: float = 1.0
    seed: int = 0

    def save(self, folder: Path) -> Path:
        """Save the checkpoint to `folder`."""
        save(self.build(), folder, self.seed, self.attention)
        if not self.unified:
            split(folder)
        return folder


FAMILIES: dict[str, Family] = {}


def families() -> dict[str, Family]:
    """Return all families by name."""
    for module in ("qwen", "glm", "gemma", "llava", "tiles"):
        import_module(f"tests.families.{module}")
    return FAMILIES


def family(**traits: Any) -> Callable[[Callable[[], Checkpoint]], Callable[[], Checkpoint]]:
    """Enter a function into `FAMILIES` under its name."""

    def enter(build: Callable[[], Checkpoint]) -> Callable[[], Checkpoint]:
        FAMILIES[build.__name__] = Family(build.__name__, build, **traits)
        return build

    return enter


# -- tokenizers


@cache
def _words() -> str:
    """Train a byte-level BPE on the tiny corpus; return it as JSON."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


def tokenizer(
    *special: str,
    eos: str,
    pad: str | None = None,
    bos: str | None = None,
    adds_bos: bool = False,
    named: dict[str, str] | None = None,
    **options: Any,
) -> PreTrainedTokenizerFast:
    """Make a tokenizer of bytes, a few merges and special tokens.

    adds_bos: put `bos` before every text, as Llama's tokenizer does. named: attributes such as `image_token` that the
    family's processor reads from its tokenizer.
    """
    backend = Tokenizer.from_str(_words())
    tokens = dict.fromkeys(token for token in (pad, bos, eos, *special, *(named or {}).values()) if token)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    if adds_bos and bos:
        backend.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    extra = {"extra_special_tokens": named} if named else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=eos,
        pad_token=pad or eos,
        bos_token=bos,
        clean_up_tokenization_spaces=False,
        **extra,
        **options,
    )


def vocabulary(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the vocabulary's size, padded as published ones are."""
    return -(-len(tokenizer) // ROUND_TO) * ROUND_TO


def text(tokenizer: PreTrainedTokenizerFast, **fields: Any) -> dict[str, Any]:
    """Return the fields of a text config for this tokenizer."""
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return {**TEXT, "vocab_size": vocabulary(tokenizer), **ids, **fields}


# -- chat templates


def chat(
    before: str,
    after: str,
    answer: str,
    *,
    image: str = "",
    video: str = "",
    start: str = "",
    roles: dict[str, str] | None = None,
    text: str = "part['text']",
    media_first: bool = False,
) -> str:
    """Return a chat template. `before` and `after` surround a turn and may use the Jinja variable `role`.

    roles: names of roles that differ from the usual ones. text: Jinja expression for a text part. media_first: write
    all media of a turn before its texts.
    """
    names = "".join(
        f"{{% if role == '{role}' %}}{{% set role = '{name}' %}}{{% endif %}}" for role, name in (roles or {}).items()
    )
    medium = (
        f"{{% if part['type'] == 'image' %}}{image}"
        + (f"{{% elif part['type'] == 'video' %}}{video}" if video else "")
        + "{% endif %}"
    )
    words = f"{{% if part['type'] == 'text' %}}{{{{ {text} }}}}{{% endif %}}"
    each = "{{% for part in message['content'] %}}{}{{% endfor %}}"
    content = each.format(medium) + each.format(words) if media_first else each.format(medium + words)
    plain = f"{{% set part = {{'text': message['content']}} %}}{{{{ {text} }}}}"
    return (
        f"{start}{{% for message in messages %}}{{% set role = message['role'] %}}{names}{before}"
        f"{{% if message['content'] is string %}}{plain}{{% else %}}{content}{{% endif %}}{after}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{answer}{{% endif %}}"
    )


# -- weights


def randomise(model: Any, seed: int, silent: Sequence[int]) -> None:
    """Draw wide weights; the rows of the head for `silent` tokens, which no answer should have, become zero."""
    torch.manual_seed(seed)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    head = model.get_output_embeddings()
    tied = id(head.weight) in embeddings
    scale = float(getattr(model.get_input_embeddings(), "scalar_embed_scale", 1.0))  # Gemma multiplies by it
    last_norm = ("language_model.norm.weight", "text_model.norm.weight", "embedding_norm.weight")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            last = name.rsplit(".", 1)[-1]
            if weight is head.weight and tied:
                weight.normal_(std=0.1 if scale == 1.0 else 0.15 / scale)
            elif id(weight) in embeddings:
                weight.normal_(std=0.3)
            elif last == "A_log":  # a state forgets slowly enough for a picture to matter behind twenty tokens
                weight.uniform_(0.02, 0.5).log_()
            elif last == "dt_bias":
                weight.fill_(-2.0)
            elif "experts" in name and weight.ndim == 3:
                weight.normal_(std=0.25)
            elif weight.ndim > 1:
                weight.normal_(std=min(0.5, 2.0 / (weight.numel() / weight.shape[0]) ** 0.5))
            elif last == "bias":
                weight.normal_(std=0.2)
            elif "norm" in name or last == "sinks":
                weight.add_(torch.randn_like(weight) * (0.5 if last == "sinks" else 0.1))
        if not tied:
            head.weight.mul_(2.0)
        else:  # or every token would predict itself
            for name, weight in model.named_parameters():
                if name.endswith(last_norm):
                    plain = float(weight.mean() > 0.5)  # Gemma's norms multiply by 1 + weight
                    signs = torch.randint(0, 2, weight.shape) * 2.0 - 1.0
                    weight.copy_((weight + 1.0 - plain) * signs - 1.0 + plain)
        head.weight[list(silent)] = 0.0


def save(checkpoint: Checkpoint, folder: Path, seed: int = 0, attention: float = 1.0) -> None:
    """Save weights, configs, tokenizer, processors and chat template to `folder`."""
    processor, words = checkpoint.processor, checkpoint.processor.tokenizer
    model = AutoModelForImageTextToText.from_config(checkpoint.config, dtype=torch.float32).eval()
    width = model.get_output_embeddings().weight.shape[0]
    silent = {*words.added_tokens_decoder, *range(len(words), width)} - {words.eos_token_id}
    randomise(model, seed, sorted(silent))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "language_model" in name and ".self_attn.o" in name:
                weight.mul_(attention)
    model.generation_config = GenerationConfig(
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def split(folder: Path) -> None:
    """Write the processors of images and videos to files of their own, as most published checkpoints have them."""
    path = folder / "processor_config.json"
    described = json.loads(path.read_text())
    for part, name in (
        ("image_processor", "preprocessor_config.json"),
        ("video_processor", "video_preprocessor_config.json"),
    ):
        if part in described:
            (folder / name).write_text(json.dumps(described.pop(part), indent=2))
    path.write_text(json.dumps(described, indent=2))
