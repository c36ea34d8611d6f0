"""Define the second bundled target in the terms of transformers: Qwen2.5-VL's own architecture, small.

`save` writes a folder that `Qwen2_5_VLForConditionalGeneration` and the Auto classes load like any other Qwen2.5-VL
checkpoint. Its vocabulary is the first target's, with Qwen's special tokens in place of the first target's, so that the
weights can be initialised from the first target's.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from model.demo import checkpoint
from model.demo.prompts import NUM_FRAMES
from model.demo.vision import IMAGE_MEAN, IMAGE_STD, normalised

# In the order of the first target's special tokens: each takes over an embedding row.
PAD, START, END, IMAGE, VISION_START, VISION_END, VIDEO, SPARE = SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|image_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|video_pad|>",
    "<|object_ref_start|>",
)
PATCH, MERGE, FRAMES_PER_PATCH = 8, 2, 2
CELL = PATCH * MERGE  # side of one token in pixels
FEWEST, MOST = 64, 144  # tokens of an image or a pair of frames; 192 x 192 pixels are 12 x 12 tokens
TOKENS_PER_SECOND = 2

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def renamed_tokenizer(first: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Rename the special tokens of the first target's tokenizer to Qwen's; all token ids stay the same."""
    names = dict(zip(checkpoint.SPECIAL, SPECIAL, strict=True))
    stored = json.loads(first.backend_tokenizer.to_str())
    stored["model"]["vocab"] = {names.get(token, token): i for token, i in stored["model"]["vocab"].items()}
    for added in stored["added_tokens"]:
        added["content"] = names[added["content"]]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(stored)),
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START, IMAGE, VISION_START, VISION_END, VIDEO, SPARE],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


def image_processor() -> Qwen2VLImageProcessorPil:
    """Build the image processor, with the sizes of this checkpoint."""
    return Qwen2VLImageProcessorPil(
        min_pixels=FEWEST * CELL**2,
        max_pixels=MOST * CELL**2,
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=FRAMES_PER_PATCH,
        image_mean=list(IMAGE_MEAN),
        image_std=list(IMAGE_STD),
    )


def patches(frames: np.ndarray) -> torch.Tensor:
    """Cut one clip into patches, as rows for the tower's input.

    frames: (frames, H, W, 3) uint8, an even number of frames. Two frames are one step in time; an image is passed as
    its frame twice. Returns (patches, 3 * 2 * PATCH * PATCH) float32; patches that are merged into one token are
    adjacent.
    """
    pixels = normalised(frames)
    steps, down, across = len(pixels) // FRAMES_PER_PATCH, pixels.shape[2] // CELL, pixels.shape[3] // CELL
    split = pixels.reshape(steps, FRAMES_PER_PATCH, 3, down, MERGE, PATCH, across, MERGE, PATCH)
    return split.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).flatten(5, 8).flatten(0, 4)


def grid(frames: np.ndarray) -> list[int]:
    """Return a clip's size in patches, [time, height, width], as in `image_grid_thw` and `video_grid_thw`."""
    return [len(frames) // FRAMES_PER_PATCH, frames.shape[1] // PATCH, frames.shape[2] // PATCH]


def inputs(
    tokenizer: PreTrainedTokenizerFast, clips: list[np.ndarray], question: str, *, video: bool
) -> dict[str, torch.Tensor]:
    """Build the inputs of `generate`: the same question about each clip (frames, H, W, 3) or image (one frame).

    All clips must have the same size. This does not use transformers' video processor, which needs torchvision.
    """
    clips = [c if video else c.repeat(FRAMES_PER_PATCH, 0) for c in clips]
    places = torch.tensor([grid(c) for c in clips])
    part = {"type": "video" if video else "image"}
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": [part, {"type": "text", "text": question}]}],
        tokenize=False,
        add_generation_prompt=True,
    )
    pad = VIDEO if video else IMAGE
    text = text.replace(pad, pad * int(places[0].prod() // MERGE**2))
    ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids] * len(clips))
    pixels = torch.cat([patches(c) for c in clips])
    kinds = (ids == tokenizer.convert_tokens_to_ids(pad)).int()
    if not video:
        return {"input_ids": ids, "mm_token_type_ids": kinds, "pixel_values": pixels, "image_grid_thw": places}
    seconds = torch.ones(len(clips))
    return {
        "input_ids": ids,
        "mm_token_type_ids": 2 * kinds,
        "pixel_values_videos": pixels,
        "video_grid_thw": places,
        "second_per_grid_ts": seconds,
    }


def target_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
    """Return the configuration of the second target."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": checkpoint.VOCABULARY,
            "hidden_size": 256,
            "intermediate_size": 384,
            "num_hidden_layers": 10,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            # Time and rows get few of the fast frequencies, which leaves enough to distinguish twelve columns.
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 6, 23]},
            "bos_token_id": ids[PAD],
            "eos_token_id": ids[END],
            "pad_token_id": ids[PAD],
        },
        vision_config={
            "depth": 4,
            "hidden_size": 160,
            "intermediate_size": 352,
            "num_heads": 5,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": FRAMES_PER_PATCH,
            "tokens_per_second": TOKENS_PER_SECOND,
            "window_size": 4 * CELL,
            "fullatt_block_indexes": [2],
            "out_hidden_size": 256,
            "initializer_range": 0.05,
        },
        image_token_id=ids[IMAGE],
        video_token_id=ids[VIDEO],
        vision_start_token_id=ids[VISION_START],
        vision_end_token_id=ids[VISION_END],
        bos_token_id=ids[PAD],
        eos_token_id=ids[END],
        pad_token_id=ids[PAD],
        tie_word_embeddings=False,
    )


def new_target(config: Qwen2_5_VLConfig) -> Qwen2_5_VLForConditionalGeneration:
    """Create an untrained target. Residual branches start small, which suits a deep and narrow stack."""
    torch.manual_seed(0)
    target = Qwen2_5_VLForConditionalGeneration(config)
    decoder, tower = target.model.language_model, target.model.visual
    branches = [linear for layer in decoder.layers for linear in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    with torch.no_grad():
        for linear in branches:
            linear.weight.mul_(1.5 / math.sqrt(len(branches)))
        for linear in (linear for block in tower.blocks for linear in (block.attn.proj, block.mlp.down_proj)):
            linear.weight.mul_(1.5 / math.sqrt(2 * len(tower.blocks)))
    return target


def save(target: Qwen2_5_VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the checkpoint in bfloat16, with tokenizer and the configurations of the image and video processors."""
    shipped = new_target(target.config)
    shipped.load_state_dict(target.state_dict())
    shipped.to(torch.bfloat16).save_pretrained(folder)
    # safetensors makes its file readable by the owner only.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")
    tokenizer.save_pretrained(folder)
    images = image_processor()
    images.save_pretrained(folder)
    # Written by hand, because transformers' class needs torchvision. Sizes are those of images.
    shared = {name: value for name, value in images.to_dict().items() if name != "image_processor_type"}
    videos = {**shared, "video_processor_type": "Qwen2VLVideoProcessor"}
    videos |= {"min_frames": FRAMES_PER_PATCH, "num_frames": NUM_FRAMES}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(videos, indent=2, sort_keys=True) + "\n")
