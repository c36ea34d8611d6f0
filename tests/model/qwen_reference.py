"""Qwen2.5-VL by transformers alone, from frames and texts to tokens: what the adapter is compared with.

transformers' image processor cuts images; videos are cut here, frame by frame and patch by patch, since its video
processor needs torchvision.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from model.request import Medium, Message

FRAMES_A_SECOND = 2.0  # of a video of which nothing else is known


class Reference:
    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.images = Qwen2VLImageProcessorPil.from_pretrained(folder)
        self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()

    def inputs(self, messages: tuple[Message, ...]) -> dict[str, Tensor]:
        """Batch 1; what transformers' processor would return."""
        turns = []
        made: dict[str, list[Any]] = {}
        for message in messages:
            parts: list[dict[str, str]] = []
            for part in message.content:
                if isinstance(part, Medium):
                    self._show(part, made)
                    parts.append({"type": part.kind})
                else:
                    parts.append({"type": "text", "text": part})
            turns.append({"role": message.role, "content": parts})
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        for kind in ("image", "video"):
            pad = f"<|{kind}_pad|>"
            for grid in made.get(f"{kind}_grid_thw", []):
                text = text.replace(pad, "<|one|>" * (int(np.prod(grid)) // self.images.merge_size**2), 1)
            text = text.replace("<|one|>", pad)
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        config = self.model.config
        types = 1 * (ids == config.image_token_id) + 2 * (ids == config.video_token_id)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types}
        for name, values in made.items():
            together = np.concatenate(values) if name.startswith("pixel") else np.array(values)
            inputs[name] = torch.tensor(together, dtype=torch.float32 if together.dtype.kind == "f" else None)
        return inputs

    def _show(self, medium: Medium, made: dict[str, list[Any]]) -> None:
        if medium.kind == "image":
            (frame,) = medium.frames
            seen = self.images(images=[Image.fromarray(frame)], return_tensors="np")
            made.setdefault("pixel_values", []).append(seen["pixel_values"])
            made.setdefault("image_grid_thw", []).append(seen["image_grid_thw"][0])
            return
        patches, grid = self.cut(medium.frames)
        made.setdefault("pixel_values_videos", []).append(patches)
        made.setdefault("video_grid_thw", []).append(grid)
        seconds = medium.seconds_per_frame or 1 / FRAMES_A_SECOND
        made.setdefault("second_per_grid_ts", []).append(self.images.temporal_patch_size * seconds)

    def cut(self, frames: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """(frames, height, width, 3) uint8 to patches (patches, numbers) float32 and their grid."""
        together, side, merge = self.images.temporal_patch_size, self.images.patch_size, self.images.merge_size
        while len(frames) % together:
            frames = np.concatenate((frames, frames[-1:]))
        mean, std = np.array(self.images.image_mean), np.array(self.images.image_std)
        pixels = ((frames / 255.0 - mean) / std).astype(np.float32)
        steps, down, across = len(frames) // together, frames.shape[1] // side, frames.shape[2] // side
        patches = []
        for step in range(steps):
            for block_y in range(0, down, merge):
                for block_x in range(0, across, merge):
                    for y in range(block_y, block_y + merge):
                        for x in range(block_x, block_x + merge):
                            patch = pixels[
                                step * together : (step + 1) * together,
                                y * side : (y + 1) * side,
                                x * side : (x + 1) * side,
                            ]
                            patches.append(patch.transpose(3, 0, 1, 2).ravel())  # channel, frame, y, x
        return np.stack(patches), [steps, down, across]

    @torch.inference_mode()
    def generate(self, messages: tuple[Message, ...], max_tokens: int) -> list[int]:
        inputs = self.inputs(messages)
        out = self.model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
        tokens: list[int] = out[0, inputs["input_ids"].shape[1] :].tolist()
        return tokens

    def positions(self, messages: tuple[Message, ...]) -> np.ndarray:
        """(3, tokens)."""
        inputs = self.inputs(messages)
        named = {k: v for k, v in inputs.items() if not k.startswith("pixel")}
        places, _ = self.model.model.get_rope_index(**named)
        return np.asarray(places[:, 0])

    @torch.inference_mode()
    def features(self, medium: Medium) -> Tensor:
        """(tokens, hidden), all of a medium in one pass of the tower."""
        inputs = self.inputs((Message("user", (medium,)),))
        if medium.kind == "image":
            made = self.model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        else:
            made = self.model.model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
        (features,) = made.pooler_output
        return features
