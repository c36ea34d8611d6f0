"""What transformers' model classes take, made of conversations without our target adapters; a class for each way to it.

Each has the checkpoint's `tokenizer`, and makes of a list of conversations its left-padded ids, their mask, and pixels.
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
    """Where transformers' own processor can be had. A video is its frames, behind a marker."""

    def __init__(self, model: str) -> None:
        self.processor = AutoProcessor.from_pretrained(model)
        self.tokenizer: PreTrainedTokenizerBase = padded_left(self.processor.tokenizer)

    def __call__(self, conversations: list[Conversation]) -> dict[str, Tensor]:
        made = self.processor.apply_chat_template(
            [self._turns(conversation) for conversation in conversations],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            processor_kwargs={"padding": True},
        )
        return dict(made)

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
    """Its processor needs torchvision for the sake of videos; so they are cut here, at the size they have. Images are
    brought to size and cut by transformers."""

    SECONDS_PER_FRAME = 0.5  # of a video of which nothing is known

    def __init__(self, model: str) -> None:
        self.tokenizer: PreTrainedTokenizerBase = padded_left(AutoTokenizer.from_pretrained(model))
        self.images = Qwen2VLImageProcessorPil.from_pretrained(model)
        self._template = Qwen2_5_VLProcessor.get_processor_dict(model)[0].get("chat_template")
        self._pads = {kind: self.tokenizer.convert_tokens_to_ids(f"<|{kind}_pad|>") for kind in ("image", "video")}

    def __call__(self, conversations: list[Conversation]) -> dict[str, Tensor]:
        made: dict[str, list[Any]] = {}
        texts = [self._text(conversation, made) for conversation in conversations]
        bos = self.tokenizer.bos_token  # the tokenizer adds what it adds, but for a template that writes BOS itself
        adding = bos is None or not texts[0].startswith(bos)
        inputs = dict(self.tokenizer(texts, add_special_tokens=adding, padding=True, return_tensors="pt"))
        ids = inputs["input_ids"]
        inputs["mm_token_type_ids"] = 1 * (ids == self._pads["image"]) + 2 * (ids == self._pads["video"])
        for name, values in made.items():
            together = np.concatenate(values) if name.startswith("pixel") else np.array(values)
            inputs[name] = torch.tensor(together, dtype=torch.float32 if together.dtype.kind == "f" else torch.int64)
        return inputs

    def _text(self, conversation: Conversation, made: dict[str, list[Any]]) -> str:
        """The conversation as a text, its placeholders as many as there are tokens; its media go to `made`."""
        turns, sizes = [], []
        for message in conversation:
            parts: list[dict[str, str]] = []
            for part in message.content:
                if isinstance(part, Medium):
                    parts.append({"type": part.kind})
                    sizes.append((part.kind, self._show(part, made)))
                else:
                    parts.append({"type": "text", "text": part})
            turns.append({"role": message.role, "content": parts})
        text: str = self.tokenizer.apply_chat_template(
            turns, chat_template=self._template, tokenize=False, add_generation_prompt=True
        )
        for kind, size in sizes:
            text = text.replace(f"<|{kind}_pad|>", f"<{kind}>" * size, 1)
        return text.replace("<image>", "<|image_pad|>").replace("<video>", "<|video_pad|>")

    def _show(self, medium: Medium, made: dict[str, list[Any]]) -> int:
        """How many tokens it takes."""
        if medium.kind == "image":
            seen = self.images(images=[Image.fromarray(frame) for frame in medium.frames], return_tensors="np")
            patches, grid = seen["pixel_values"], seen["image_grid_thw"][0]
            made.setdefault("pixel_values", []).append(patches)
            made.setdefault("image_grid_thw", []).append(grid)
        else:
            patches, grid = self.cut(medium.frames)
            seconds = self.images.temporal_patch_size * (medium.seconds_per_frame or self.SECONDS_PER_FRAME)
            made.setdefault("pixel_values_videos", []).append(patches)
            made.setdefault("video_grid_thw", []).append(grid)
            made.setdefault("second_per_grid_ts", []).append(seconds)
        return int(np.prod(grid)) // self.images.merge_size**2

    def cut(self, frames: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """(frames, height, width, 3) uint8, of which the last is repeated to fill a step, to patches (patches, numbers)
        float32 by channel, frame, y and x, those of a token side by side; and their grid."""
        step, side, merge = self.images.temporal_patch_size, self.images.patch_size, self.images.merge_size
        if missing := -len(frames) % step:
            frames = np.concatenate((frames, np.repeat(frames[-1:], missing, 0)))
        mean, std = (np.array(of, np.float32) for of in (self.images.image_mean, self.images.image_std))
        pixels = (frames * np.float32(self.images.rescale_factor) - mean) / std
        down, across = (size // (side * merge) for size in frames.shape[1:3])
        split = pixels.reshape(-1, step, down, merge, side, across, merge, side, 3)
        patches = split.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, 3 * step * side * side)
        return patches, [len(frames) // step, down * merge, across * merge]


def padded_left(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
