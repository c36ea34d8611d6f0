"""Makes targets of real sizes that are on no disk, and drafts for them.

A LLaVA with a language model of the size of a Qwen2.5 and a FLASH draft, made on the device with random weights: they
take as long as trained ones of that size. What they answer is worth nothing, but certain: after every token the next
one of the vocabulary, by a wide margin, in any precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config

from model.config import EngineConfig
from model.demo import checkpoint as demo
from model.drafters import checkpoint, presets
from model.targets.llava import LlavaTarget

TEMPLATE = 64  # positions at most of a conversation's template
LOUD = 50.0  # times the usual size of an embedding: it outweighs what all layers add to it


@dataclass(frozen=True)
class Size:
    """The shapes of a target, and with how much memory and which matrices the machine's limits are measured."""

    text: dict[str, Any]
    vision: dict[str, Any]
    bytes_moved: int
    matrix: int  # rows and columns


SIZES = {
    "7b": Size(
        text={
            "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
            "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 32768,
        },
        vision={
            "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
            "image_size": 336, "patch_size": 14, "projection_dim": 768,
        },
        bytes_moved=4 << 30,
        matrix=8192,
    ),
    "0.5b": Size(
        text={
            "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
            "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768,
        },
        vision={
            "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
            "image_size": 224, "patch_size": 16, "projection_dim": 512,
        },
        bytes_moved=1 << 30,
        matrix=2048,
    ),
    "tiny": Size(
        text={
            "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
        },
        vision={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 32, "patch_size": 8, "projection_dim": 32,
        },
        bytes_moved=1 << 24,
        matrix=256,
    ),
}  # fmt: skip


def make_target(size: Size, config: EngineConfig) -> tuple[LlavaTarget, int]:
    """Make the target; also returns how many bytes of its weights each pass must read. Its tokenizer writes every byte
    as a token."""
    tokenizer = demo.train_tokenizer((), vocabulary=256 + len(demo.SPECIAL))
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in demo.SPECIAL}
    special = {"bos_token_id": ids[demo.BOS], "eos_token_id": ids[demo.END], "pad_token_id": ids[demo.PAD]}
    family = Qwen2Config if size.text["hidden_size"] % 128 == 0 else LlamaConfig
    side, patch = size.vision["image_size"], size.vision["patch_size"]
    model_config = LlavaConfig(
        vision_config=CLIPVisionConfig(**size.vision),
        text_config=family(**size.text, tie_word_embeddings=False, **special),
        image_token_index=ids[demo.IMAGE],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=(side // patch) ** 2,
        tie_word_embeddings=False,
        **special,
    )
    with torch.device(config.device), torch.no_grad():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration._from_config(
            model_config, dtype=getattr(torch, config.dtype), attn_implementation="sdpa"
        )
        text = model.model.language_model
        model.lm_head.weight.copy_(text.embed_tokens.weight.roll(1, 0))
        text.embed_tokens.weight.mul_(LOUD)
    pass_bytes = sum(w.nbytes for module in (text.layers, text.norm, model.lm_head) for w in module.parameters())
    processor = demo.processor(tokenizer, side, patch)
    return LlavaTarget(config, model, processor, presets.TAP_LAYERS["flash"]), pass_bytes


def make_draft(target: LlavaTarget, folder: Path) -> None:
    """Write the FLASH draft with which `flashserve train` would begin."""
    checkpoint.save(folder, presets.new("flash", target).to(target.dtype), target)
