"""Implements Qwen2.5-VL: a tower for pictures of any size, video frames in pairs, a Qwen2 language model, positions on
three axes (time, height, width).

Pixels are computed here, by the rules of transformers' processors: sizes are chosen while media are decoded.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.video_processing_utils import BaseVideoProcessor

from model.backends.native import library
from model.config import EngineConfig
from model.request import Area, Geometry, Medium, Message, RequestError, TemplateOptions
from model.targets import pixels, windows
from model.targets.chat_template import ChatTemplate
from model.targets.checkpoint import hub_options, load_model, load_processor
from model.targets.language import LanguageModel
from model.targets.parallel import Group, loading
from model.targets.prompt import PLAIN, Conversations, Place, TokenizedPrompt, media_of, widened

PATCHES_AT_ONCE = 8192  # maximum patches per pass of the tower
SECONDS_PER_FRAME = 0.5  # if unknown: two frames a second, as Qwen samples them
NUM_FRAMES = 16  # of a video, if neither request nor checkpoint sets it
BEYOND_ALL = np.float32(1 << 30)  # beyond the positions of any model, and within int32
CONTEXT_SHARE = 0.9  # maximum share of the context for one medium
# Defaults of the video processor, for fields that a checkpoint does not set.
VIDEO_DEFAULTS = {
    "size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 768 * 28 * 28},
    "max_video_tokens": 128_000,
}


class Qwen25VLTarget(LanguageModel):
    """Implements `model.targets.base.Target`."""

    def __init__(
        self, config: EngineConfig, aux_layers: tuple[int, ...] | None = None, group: Group | None = None
    ) -> None:
        """Load the checkpoint that a resolved config names. aux_layers: see `model.targets.registry.load_target`."""
        processor = load_processor(config)
        model = load_model(config, Qwen2_5_VLForConditionalGeneration, **loading(config))
        super().__init__(config, model, processor.tokenizer, aux_layers, num_axes=3, group=group)
        vision = self.model.config.vision_config
        self.patch, self.merge, self.together = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        self._time_scale = np.float32(vision.tokens_per_second)
        self.placeholders = {"image": self.model.config.image_token_id, "video": self.model.config.video_token_id}
        hub = hub_options(config)
        images = Qwen2VLImageProcessorPil.from_pretrained(config.model, **hub)
        videos: dict[str, Any] = VIDEO_DEFAULTS | BaseVideoProcessor.get_video_processor_dict(config.model, **hub)[0]
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
        self.template = ChatTemplate(processor, self.tokenizer)
        self._conversations = Conversations(self.tokenizer, self.template, lambda medium: [{"type": medium.kind}])

    @property
    def num_bytes(self) -> int:
        return self.bytes_beside(self.tower)

    def _sizes(self, images: Any, videos: dict[str, Any], context: int) -> dict[str, Area]:
        """Return the bounds of images and videos from the checkpoint's processors, lowered to what fits the context
        (tokens)."""
        unit = self.patch * self.merge
        fitting = int(CONTEXT_SHARE * context) * unit**2
        total = None
        if videos.get("cap_pixels_per_frame") is not False:  # transformers plans to make this the default
            total = self.together * int(min(videos["max_video_tokens"], context) * unit * unit * CONTEXT_SHARE)

        def area(least: int, most: int, all_frames: int | None = None) -> Area:
            """Build bounds in pixels, the upper one lowered to the context."""
            return Area(unit, least, max(least, min(most, fitting)), all_frames)

        size = videos["size"]
        least, most = (videos.get(f"{name}_pixels") for name in ("min", "max"))  # older names of these fields
        return {
            "image": area(images.size["shortest_edge"], images.size["longest_edge"]),
            "video": area(least or size["shortest_edge"], most or size["longest_edge"], total),
        }

    # --- prompt

    def prompt(self, messages: tuple[Message, ...], options: TemplateOptions = PLAIN) -> TokenizedPrompt:
        """Apply the chat template and tokenise. Raises RequestError, also if videos span more positions than the model
        has."""
        media = tuple(map(self._at_geometry, media_of(messages)))
        places = [[Place(self.placeholders[medium.kind], math.prod(self.grid(medium)))] for medium in media]
        ids = self._conversations.ids(messages, options)
        prompt = widened(ids, media, places, frozenset(self.placeholders.values()))
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
        """Return the medium, resized if the media decoder has not done it. Raises RequestError if its shape is not
        allowed."""
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
        """Return the number of tokens along time, height and width of a medium at the target's geometry."""
        num_frames, height, width = medium.frames.shape[:3]
        unit = self.patch * self.merge
        return -(-num_frames // self.together), height // unit, width // unit

    def positions(self, prompt: TokenizedPrompt) -> np.ndarray:
        """Compute position ids: (3, tokens) int32.

        Text counts on all axes alike. A medium's tokens count along each axis from the current text position, with time
        scaled by the seconds between frames. The text after it continues behind the larger of its height and width,
        regardless of its time.
        """
        places = np.empty((3, len(prompt.ids)), np.int32)
        at = following = 0  # next token; its position
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
        """Return the number of steps in time: frames of different steps do not attend to each other."""
        return self.grid(medium)[0]

    def encode(self, medium: Medium, first: int, last: int) -> Tensor:
        """Encode steps in time first..last, about PATCHES_AT_ONCE patches at a time: (tokens, hidden)."""
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
        """Cut steps first..last into patches: (steps, patches, numbers), with the numbers of a patch by channel, frame,
        y and x.

        Patches that are merged lie side by side. If frames are missing for the last step, the last frame is repeated.
        """
        frames, steps = medium.frames[first * self.together : last * self.together], last - first
        if medium.kind == "video" and (missing := steps * self.together - len(frames)):
            frames = np.concatenate((frames, np.repeat(frames[-1:], missing, 0)))
        if self.tower is not None:
            cut = library.patches(frames, self.patch, self._shades, self.dtype)
        else:
            cut = pixels.cut(pixels.shown(frames, self._shades), self.patch)
        down, across = (side // (self.patch * self.merge) for side in frames.shape[1:3])
        cut = cut.view(steps, -1, down, self.merge, across, self.merge, 3, self.patch**2)
        cut = cut.expand(-1, self.together, *cut.shape[2:])  # an image has one frame, repeated for the whole step
        return cut.permute(0, 2, 4, 3, 5, 6, 1, 7).flatten(5).flatten(1, 4)
