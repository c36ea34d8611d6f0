"""GLM's families. A video is written with the token of images, between tokens that begin and end it."""

from __future__ import annotations

from typing import Any

from transformers import (
    Glm4vConfig,
    Glm4vImageProcessor,
    Glm4vMoeConfig,
    Glm4vProcessor,
    Glm4vVideoProcessor,
    Glm46VConfig,
    Glm46VImageProcessor,
    Glm46VProcessor,
    Glm46VVideoProcessor,
    GlmOcrConfig,
)

from tests.families.qwen import TOWER, axes, between
from tests.families.zoo import Checkpoint, chat, family, text, tokenizer

TOKENS = {
    "image_token_id": "<|image|>",
    "video_token_id": "<|video|>",
    "image_start_token_id": "<|begin_of_image|>",
    "image_end_token_id": "<|end_of_image|>",
    "video_start_token_id": "<|begin_of_video|>",
    "video_end_token_id": "<|end_of_video|>",
}
GLM_TOWER = TOWER | {"depth": 2, "patch_size": 14, "image_size": 56}
HALF = axes(2, 1, 1, partial_rotary_factor=0.5)
ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}


def glm(processor: Any, images: Any, videos: Any, answer: str = "<|assistant|>\n") -> Any:
    """Return one of GLM's processors."""
    words = tokenizer(
        "[gMASK]",
        "<sop>",
        "<|user|>",
        "<|assistant|>",
        "<|system|>",
        *TOKENS.values(),
        eos="<|endoftext|>",
        pad="<|endoftext|>",
    )
    return processor(
        images(patch_size=14, size={"shortest_edge": 2 * 4 * 28**2, "longest_edge": 2 * 20 * 28**2}),
        words,
        videos(patch_size=14, size=between(28, 4, 48)),
        chat_template=chat(
            "<|{{ role }}|>\n",
            "",
            answer,
            image="<|begin_of_image|><|image|><|end_of_image|>",
            video="<|begin_of_video|><|video|><|end_of_video|>",
            start="[gMASK]<sop>\n",
        ),
    )


def tokens(words: Any) -> dict[str, int]:
    """Return the ids of the tokens that a GLM config names."""
    return {name: words.convert_tokens_to_ids(token) for name, token in TOKENS.items()}


@family(video=True, mixed=False)
def glm4v() -> Checkpoint:
    processor = glm(Glm4vProcessor, Glm4vImageProcessor, Glm4vVideoProcessor, "<|assistant|>\n<think>")
    words = processor.tokenizer
    config = Glm4vConfig(
        text_config=text(words, **HALF), vision_config=GLM_TOWER, tie_word_embeddings=False, **tokens(words)
    )
    return Checkpoint(config, processor)


@family(video=True, mixed=False)
def glm4v_moe() -> Checkpoint:
    processor = glm(Glm4vProcessor, Glm4vImageProcessor, Glm4vVideoProcessor)
    words = processor.tokenizer
    config = Glm4vMoeConfig(
        text_config=text(words, **HALF, **ROUTED), vision_config=GLM_TOWER, tie_word_embeddings=False, **tokens(words)
    )
    return Checkpoint(config, processor)


@family(video=True, mixed=False)
def glm46v() -> Checkpoint:
    processor = glm(Glm46VProcessor, Glm46VImageProcessor, Glm46VVideoProcessor)
    words = processor.tokenizer
    config = Glm46VConfig(
        text_config=text(words, model_type="glm4v_text", **HALF),
        vision_config=GLM_TOWER | {"model_type": "glm4v_vision"},
        tie_word_embeddings=False,
        **tokens(words),
    )
    return Checkpoint(config, processor)


@family()
def glm_ocr() -> Checkpoint:
    processor = glm(Glm46VProcessor, Glm46VImageProcessor, Glm46VVideoProcessor)
    words = processor.tokenizer
    config = GlmOcrConfig(
        text_config=text(words, **axes(2, 3, 3, partial_rotary_factor=1.0)),
        vision_config=GLM_TOWER,
        tie_word_embeddings=False,
        **tokens(words),
    )
    return Checkpoint(config, processor)
