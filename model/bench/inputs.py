"""Turns conversations into inputs of transformers' model classes, without our target adapters; a class for each way.

Each has the checkpoint's `tokenizer`, and turns a list of conversations into left-padded ids, their mask, and pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase, Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from model.request import Medium, Message

Conversation = tuple[Message, ...]


class ByProcessor:
    """Uses transformers' own processor, as `LlavaTarget` does. A video is a marker followed by its frames."""

    def __init__(self, model: str) -> None:
        self.processor = AutoProcessor.from_pretrained(model, backend="pil")
        self.tokenizer: PreTrainedTokenizerBase = pad_left(self.processor.tokenizer)

    def __call__(self, conversations: list[Conversation]) -> dict[str, Tensor]:
        inputs = self.processor.apply_chat_template(
            [self._turns(conversation) for conversation in conversations],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            processor_kwargs={"padding": True},
        )
        return dict(inputs)

    @staticmethod
    def _turns(conversation: Conversation) -> list[dict[str, Any]]:
        turns = []
        for message in conversation:
            parts: list[dict[str, Any]] = []
            for part in message.content:
                if isinstance(part, Medium):
                    parts += [{"type": "video"}] if part.kind == "video" else []  # a marker; the frames follow it
                    parts += [{"type": "image", "image": Image.fromarray(frame)} for frame in part.frames]
                else:
                    parts.append({"type": "text", "text": part})
            turns.append({"role": message.role, "content": parts})
        return turns


class Qwen25VL:
    """Qwen2.5-VL, whose video processor resizes frames itself: their patches are made here, at the size they have.
    Images are resized and made into patches by transformers."""

    SECONDS_PER_FRAME = 0.5  # of a video that does not say

    def __init__(self, model: str) -> None:
        self.tokenizer: PreTrainedTokenizerBase = pad_left(AutoTokenizer.from_pretrained(model))
        self.images = Qwen2VLImageProcessorPil.from_pretrained(model)
        self._template = Qwen2_5_VLProcessor.get_processor_dict(model)[0].get("chat_template")
        self._pads = {kind: self.tokenizer.convert_tokens_to_ids(f"<|{kind}_pad|>") for kind in ("image", "video")}

    def __call__(self, conversations: list[Conversation]) -> dict[str, Tensor]:
        media: dict[str, list[Any]] = {}
        texts = [self._text(conversation, media) for conversation in conversations]
        bos = self.tokenizer.bos_token  # a template that writes BOS itself must not get another from the tokenizer
        adds_special = bos is None or not texts[0].startswith(bos)
        inputs = dict(self.tokenizer(texts, add_special_tokens=adds_special, padding=True, return_tensors="pt"))
        ids = inputs["input_ids"]
        inputs["mm_token_type_ids"] = 1 * (ids == self._pads["image"]) + 2 * (ids == self._pads["video"])
        for name, values in media.items():
            stacked = np.concatenate(values) if name.startswith("pixel") else np.array(values)
            inputs[name] = torch.tensor(stacked, dtype=torch.float32 if stacked.dtype.kind == "f" else torch.int64)
        return inputs

    def _text(self, conversation: Conversation, media: dict[str, list[Any]]) -> str:
        """Write the conversation as a text with as many placeholders as visual tokens; add its pixels to `media`."""
        turns, sizes = [], []
        for message in conversation:
            parts: list[dict[str, str]] = []
            for part in message.content:
                if isinstance(part, Medium):
                    parts.append({"type": part.kind})
                    sizes.append((part.kind, self._add(part, media)))
                else:
                    parts.append({"type": "text", "text": part})
            turns.append({"role": message.role, "content": parts})
        text: str = self.tokenizer.apply_chat_template(
            turns, chat_template=self._template, tokenize=False, add_generation_prompt=True
        )
        for kind, size in sizes:
            text = text.replace(f"<|{kind}_pad|>", f"<{kind}>" * size, 1)
        return text.replace("<image>", "<|image_pad|>").replace("<video>", "<|video_pad|>")

    def _add(self, medium: Medium, media: dict[str, list[Any]]) -> int:
        """Add a medium's patches and grid to `media`; returns how many tokens it takes."""
        if medium.kind == "image":
            processed = self.images(images=[Image.fromarray(frame) for frame in medium.frames], return_tensors="np")
            patches, grid = processed["pixel_values"], processed["image_grid_thw"][0]
            media.setdefault("pixel_values", []).append(patches)
            media.setdefault("image_grid_thw", []).append(grid)
        else:
            patches, grid = self.patchify(medium.frames)
            seconds = self.images.temporal_patch_size * (medium.seconds_per_frame or self.SECONDS_PER_FRAME)
            media.setdefault("pixel_values_videos", []).append(patches)
            media.setdefault("video_grid_thw", []).append(grid)
            media.setdefault("second_per_grid_ts", []).append(seconds)
        return int(np.prod(grid)) // self.images.merge_size**2

    def patchify(self, frames: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """Cut frames (frames, height, width, 3) uint8 into patches (patches, numbers) float32, each by channel, frame,
        y and x, those of a token side by side; repeats the last frame to fill a step. Also returns the grid."""
        step, side, merge = self.images.temporal_patch_size, self.images.patch_size, self.images.merge_size
        if missing := -len(frames) % step:
            frames = np.concatenate((frames, np.repeat(frames[-1:], missing, 0)))
        mean, std = (np.array(of, np.float32) for of in (self.images.image_mean, self.images.image_std))
        pixels = (frames * np.float32(self.images.rescale_factor) - mean) / std
        grid_h, grid_w = (size // (side * merge) for size in frames.shape[1:3])
        split = pixels.reshape(-1, step, grid_h, merge, side, grid_w, merge, side, 3)
        patches = split.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, 3 * step * side * side)
        return patches, [len(frames) // step, grid_h * merge, grid_w * merge]


def pad_left(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Set a tokenizer to pad on the left, as batched generation needs it."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
