"""Save a Qwen2.5-VL checkpoint small enough for tests; see tiny.py for why its weights are wide."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    BatchFeature,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.video_utils import make_batched_videos

from model.request import Medium
from tests.model import tiny

PATCH, MERGE, TOGETHER = 8, 2, 2
UNIT = PATCH * MERGE
FEWEST, MOST = 4, 36  # tokens of an image
TOKENS_PER_SECOND = 4
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
PAD, START, END, VISION_START, VISION_END, IMAGE, VIDEO = SPECIAL
# Like Qwen's own, it adds a system message to a conversation without one.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' or 'video' in content %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the tiny corpus, with Qwen's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=tiny.VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tiny.CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START, VISION_START, VISION_END, IMAGE, VIDEO],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def save_checkpoint(
    folder: Path,
    *,
    seed: int = 0,
    tied: bool = False,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
) -> Path:
    """Save a checkpoint of four layers of width 64, with two query heads and one KV head.

    The tower has four layers; the second and the last have no windows. A picture has 4 to 36 tokens of 16 x 16 pixels
    each.
    """
    tokenizer = train_tokenizer()
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    text_config = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        "bos_token_id": ids[PAD],
        "eos_token_id": ids[END],
        "pad_token_id": ids[PAD],
    } | (text or {})
    vision_config = {
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_heads": 2,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": TOGETHER,
        "tokens_per_second": TOKENS_PER_SECOND,
        "window_size": 2 * UNIT,
        "fullatt_block_indexes": [1, 3],
        "out_hidden_size": text_config["hidden_size"],
    } | (vision or {})
    config = Qwen2_5_VLConfig(
        text_config=text_config,
        vision_config=vision_config,
        image_token_id=ids[IMAGE],
        video_token_id=ids[VIDEO],
        vision_start_token_id=ids[VISION_START],
        vision_end_token_id=ids[VISION_END],
        bos_token_id=ids[PAD],
        eos_token_id=ids[END],
        pad_token_id=ids[PAD],
        tie_word_embeddings=tied,
    )
    torch.manual_seed(seed)
    target = Qwen2_5_VLForConditionalGeneration(config)
    wide = text_config["hidden_size"]
    with torch.no_grad():
        for name, weight in target.named_parameters():
            if weight.ndim > 1:
                std = 0.3 if "embed_tokens" in name else 0.25 * (64 / wide) ** 0.5
                torch.nn.init.normal_(weight, std=0.1 if "patch_embed" in name else std)
            elif name.endswith("bias"):
                torch.nn.init.normal_(weight, std=0.3)
        if not tied:
            target.lm_head.weight.mul_(2.0)
    target.generation_config.eos_token_id = [ids[END], ids[PAD]]  # two EOS tokens, as in Qwen's own
    target.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(
        min_pixels=FEWEST * UNIT**2,
        max_pixels=MOST * UNIT**2,
        patch_size=vision_config["patch_size"],
        merge_size=MERGE,
        temporal_patch_size=TOGETHER,
    ).save_pretrained(folder)
    return folder


class VideoGrids:
    """Replace transformers' video processor, which needs torchvision, for videos that need no resizing."""

    merge_size, temporal_patch_size = MERGE, TOGETHER

    def __call__(self, videos: Any, **_: Any) -> BatchFeature:
        shapes = [np.shape(video) for video in make_batched_videos(videos)]
        grids = [[-(-frames // TOGETHER), height // PATCH, width // PATCH] for frames, height, width, _ in shapes]
        metadata = [SimpleNamespace(sampled_fps=2.0) for _ in shapes]
        return BatchFeature({"video_grid_thw": np.array(grids), "video_metadata": metadata})

    def fetch_videos(self, videos: Any, **_: Any) -> Any:
        return videos


class Processor(Qwen2_5_VLProcessor):
    """Run transformers' own processor, except on the pixels of videos."""

    def check_argument_for_proper_class(self, *_: Any) -> None:
        """Skip a check that fails without torchvision."""

    @classmethod
    def of(cls, folder: Path) -> Processor:
        """Load the processor of a checkpoint."""
        tokenizer = AutoTokenizer.from_pretrained(folder)
        images = Qwen2VLImageProcessorPil.from_pretrained(folder)
        return cls(images, tokenizer, VideoGrids(), chat_template=tokenizer.chat_template)


def picture(seed: int, width: int, height: int, num_frames: int = 1) -> np.ndarray:
    """Return blocks of colour that differ for every seed: (num_frames, height, width, 3) uint8."""
    blocks = np.random.default_rng(seed).integers(0, 256, (num_frames, 8, 8, 3), np.uint8)
    return blocks[:, np.arange(height) * 8 // height][:, :, np.arange(width) * 8 // width]


def image(seed: int, across: int = 3, down: int = 2) -> Medium:
    """Return an image of `across` x `down` tokens that differs for every seed."""
    return Medium("image", picture(seed, across * UNIT, down * UNIT))


def video(seed: int, num_frames: int = 5, across: int = 2, down: int = 3, seconds: float | None = 0.4) -> Medium:
    """Return a video of `across` x `down` tokens a frame pair that differs for every seed."""
    return Medium("video", picture(seed, across * UNIT, down * UNIT, num_frames), seconds)
