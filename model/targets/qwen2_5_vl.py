"""Qwen2.5-VL: a tower for pictures of any size, frames of a video two by two, a Qwen2 language model; positions on
three axes (time, height, width).

transformers' video processor needs torchvision; so pixels are made here, by its rules.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.video_processing_utils import BaseVideoProcessor

from model.backends.native import library
from model.config import EngineConfig
from model.request import Area, Geometry, Medium, Message, RequestError
from model.targets import pixels, windows
from model.targets.language import LanguageModel
from model.targets.parallel import Group, loading
from model.targets.prompt import Conversations, Place, TokenizedPrompt, media_of, widened

PATCHES_AT_ONCE = 8192  # that pass through the tower together
SECONDS_PER_FRAME = 0.5  # of a video of which nobody knows it: two frames a second, as Qwen samples them
NUM_FRAMES = 16  # taken of a video where neither its sender nor the checkpoint says how many
BEYOND_ALL = np.float32(1 << 30)  # a position that no model knows, and an int32 can hold
CONTEXT_SHARE = 0.9  # of the context, that one medium may take
# What the video processor assumes where a checkpoint says nothing.
VIDEO_DEFAULTS = {
    "size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 768 * 28 * 28},
    "max_video_tokens": 128_000,
}


class Qwen25VLTarget(LanguageModel):
    """See `model.targets.base.Target`."""

    def __init__(
        self, config: EngineConfig, aux_layers: tuple[int, ...] | None = None, group: Group | None = None
    ) -> None:
        """The checkpoint that a resolved config names. For `aux_layers` see `load`."""
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            config.model, dtype=getattr(torch, config.dtype), attn_implementation="sdpa", **loading(config)
        )
        super().__init__(
            config, model, AutoTokenizer.from_pretrained(config.model), aux_layers, num_axes=3, group=group
        )
        vision = self.model.config.vision_config
        self.patch, self.merge, self.together = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        self._time_scale = np.float32(vision.tokens_per_second)
        self._placeholders = {"image": self.model.config.image_token_id, "video": self.model.config.video_token_id}
        images = Qwen2VLImageProcessorPil.from_pretrained(config.model)
        videos: dict[str, Any] = VIDEO_DEFAULTS | BaseVideoProcessor.get_video_processor_dict(config.model)[0]
        self._shades = pixels.shades(images)
        self._areas = self._sizes(images, videos, config.context(self.max_positions))
        self.geometry = Geometry(
            exact=None,
            shortest_edge=None,
            crop=None,
            resample=int(images.resample),
            default_num_frames=int(videos.get("num_frames") or NUM_FRAMES),
            image=self._areas["image"],
            video=self._areas["video"],
        )
        self.tokens_per_image = self._areas["image"].max_pixels // self._areas["image"].multiple ** 2
        longest = max(area.longest for area in self._areas.values())
        self.tower = windows.tower(self.model.model.visual, longest // self.patch)
        self.native = self.decoder is not None and self.tower is not None
        template = Qwen2_5_VLProcessor.get_processor_dict(config.model)[0].get("chat_template")
        render = partial(
            self.tokenizer.apply_chat_template, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        self._conversations = Conversations(self.tokenizer, render, lambda medium: [{"type": medium.kind}])

    @property
    def num_bytes(self) -> int:
        return self.bytes_beside(self.tower)

    def _sizes(self, images: Any, videos: dict[str, Any], context: int) -> dict[str, Area]:
        """As the checkpoint's processors have them; but what could not fit the context is scaled down to it."""
        unit = self.patch * self.merge
        fitting = int(CONTEXT_SHARE * context) * unit**2
        total = None
        if videos.get("cap_pixels_per_frame") is not False:  # the processor is about to make this its default
            total = self.together * int(min(videos["max_video_tokens"], context) * unit * unit * CONTEXT_SHARE)

        def area(least: int, most: int, all_frames: int | None = None) -> Area:
            return Area(unit, least, max(least, min(most, fitting)), all_frames)

        size = videos["size"]
        least, most = (
            videos.get(f"{name}_pixels") for name in ("min", "max")
        )  # where a checkpoint has its older names
        return {
            "image": area(images.size["shortest_edge"], images.size["longest_edge"]),
            "video": area(least or size["shortest_edge"], most or size["longest_edge"], total),
        }

    # --- prompt

    def prompt(self, messages: tuple[Message, ...]) -> TokenizedPrompt:
        media = tuple(map(self._at_geometry, media_of(messages)))
        places = [[Place(self._placeholders[medium.kind], math.prod(self.grid(medium)))] for medium in media]
        ids = self._conversations.ids(messages)
        prompt = widened(ids, media, places, frozenset(self._placeholders.values()))
        reach = int(self.positions(prompt).max()) if media else 0
        if max(self.max_positions, len(prompt.ids)) <= reach:
            raise RequestError(
                f"the prompt is too long: its videos span so much time that positions reach {reach}, and the model "
                f"knows {self.max_positions}; send shorter ones",
                param="messages",
                code="context_length_exceeded",
            )
        return prompt

    def _at_geometry(self, medium: Medium) -> Medium:
        """The medium itself, where decoding has brought it to the target's geometry. Raises RequestError."""
        num_frames, height, width = medium.frames.shape[:3]
        if medium.kind == "image" and num_frames != 1:
            raise RequestError(f"an image has {num_frames} frames", param="messages")
        area = self._areas[medium.kind]
        if area.holds(height, width, num_frames):
            return medium
        if max(height, width) > area.MAX_RATIO * min(height, width):
            raise RequestError(f"sides of {width} and {height} pixels differ too much", param="messages")
        down, across = area.fitted(height, width, num_frames)
        filter_ = Image.Resampling(self.geometry.resample)
        frames = [np.asarray(Image.fromarray(frame).resize((across, down), filter_)) for frame in medium.frames]
        return replace(medium, frames=np.stack(frames))

    def grid(self, medium: Medium) -> tuple[int, int, int]:
        """How many tokens a medium at the target's geometry has along time, height and width."""
        num_frames, height, width = medium.frames.shape[:3]
        unit = self.patch * self.merge
        return -(-num_frames // self.together), height // unit, width // unit

    def positions(self, prompt: TokenizedPrompt) -> np.ndarray:
        """Text counts on all axes alike. A medium's tokens count along each axis from where the text has come to, time
        in parts of a second; what follows goes on behind its height and width, whatever time it took."""
        places = np.empty((3, len(prompt.ids)), np.int32)
        at = following = 0  # token; its position
        for medium, (first, last) in zip(prompt.media, prompt.spans, strict=True):
            places[:, at:first] = np.arange(following, following + first - at)
            following += first - at
            grid = self.grid(medium)
            seconds = self.together * (medium.seconds_per_frame or SECONDS_PER_FRAME)
            times = np.arange(grid[0], dtype=np.float32) * (self._time_scale * np.float32(seconds))
            times = np.minimum(times, BEYOND_ALL).astype(np.int32)
            axes = np.meshgrid(times, np.arange(grid[1]), np.arange(grid[2]), indexing="ij")
            places[:, first:last] = np.stack(axes).reshape(3, -1) + following
            following += max(grid[1:])
            at = last
        places[:, at:] = np.arange(following, following + len(prompt.ids) - at)
        return places

    # --- vision

    def pieces(self, medium: Medium) -> int:
        """Steps in time: no frame looks at those of another step."""
        return self.grid(medium)[0]

    def encode(self, medium: Medium, first: int, last: int) -> Tensor:
        _, down, across = (self.merge * side for side in self.grid(medium))
        steps = max(1, PATCHES_AT_ONCE // (down * across))
        features = []
        for start in range(first, last, steps):
            patches = self.patches(medium, start, min(last, start + steps))
            if self.tower is not None:
                features.append(self.tower(patches, down, across).flatten(0, 1))
            else:
                grid = torch.tensor([[len(patches), down, across]], device=self.device)
                entering = patches.flatten(0, 1).to(self.device, self.dtype)
                features.append(self.model.model.visual(entering, grid_thw=grid).pooler_output)
        return torch.cat(features)

    def patches(self, medium: Medium, first: int, last: int) -> Tensor:
        """Of steps first..last: (steps, patches, numbers), those that are merged side by side; numbers by channel,
        frame, y and x. Where frames lack for the last step, the last one is repeated."""
        frames, steps = medium.frames[first * self.together : last * self.together], last - first
        if medium.kind == "video" and (missing := steps * self.together - len(frames)):
            frames = np.concatenate((frames, np.repeat(frames[-1:], missing, 0)))
        if self.tower is not None:
            cut = library.patches(frames, self.patch, self._shades, self.dtype)
        else:
            cut = pixels.cut(pixels.shown(frames, self._shades), self.patch)
        down, across = (side // (self.patch * self.merge) for side in frames.shape[1:3])
        cut = cut.view(steps, -1, down, self.merge, across, self.merge, 3, self.patch**2)
        cut = cut.expand(-1, self.together, *cut.shape[2:])  # an image is a still: its frame is all of a step's
        return cut.permute(0, 2, 4, 3, 5, 6, 1, 7).flatten(5).flatten(1, 4)
