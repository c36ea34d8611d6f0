"""Implements LLaVA (1.5 style): a CLIP tower, a projector, a Llama-like language model, one-dimensional positions.

A video is written as its frames: the marker <|video|> if the checkpoint has one, then every frame's tokens.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from model.backends.native import library
from model.config import EngineConfig
from model.errors import ConfigError
from model.request import Geometry, Kind, Medium, Message, TemplateOptions
from model.targets import packed, pixels
from model.targets.chat_template import ChatTemplate
from model.targets.checkpoint import load_model, load_processor
from model.targets.language import LanguageModel
from model.targets.parallel import Group, loading
from model.targets.prompt import PLAIN, Conversations, Place, TokenizedPrompt, media_of, widened

FRAMES_AT_ONCE = 8  # frames that pass through the tower together


class LlavaTarget(LanguageModel):
    """Implements `model.targets.base.Target`."""

    def __init__(
        self,
        config: EngineConfig,
        model: Any = None,
        processor: Any = None,
        aux_layers: tuple[int, ...] | None = None,
        group: Group | None = None,
    ) -> None:
        """Load the checkpoint that a resolved config names, or use `model` and `processor`, which need not be on disk.

        aux_layers: see `model.targets.registry.load_target`. Raises ConfigError if the checkpoint cannot be served.
        """
        self.processor = processor or load_processor(config, backend="pil")
        self.geometry = self._geometry(config.model)
        model = model or load_model(config, LlavaForConditionalGeneration, **loading(config))
        super().__init__(config, model, self.processor.tokenizer, aux_layers, num_axes=1, group=group)
        self.tower = packed.tower(self.model.model, self.model.config)
        self.native = self.decoder is not None and self.tower is not None
        self.image_id: int = self.model.config.image_token_index
        self.placeholders = {"image": self.image_id}
        self.tokens_per_image = self._features_of_an_image(config.model)
        self.template = ChatTemplate(self.processor, self.tokenizer)
        self._conversations = Conversations(self.tokenizer, self.template, self._parts)

    @property
    def num_bytes(self) -> int:
        return self.bytes_beside(self.tower)

    def _geometry(self, name: str) -> Geometry:
        """Read the one size to which the image processor brings every picture. Raises ConfigError if there is none."""
        images = self.processor.image_processor
        size = images.size
        exact = (int(size["height"]), int(size["width"])) if size.get("height") else None
        if not (exact or (size.get("shortest_edge") and images.do_center_crop)):
            raise ConfigError(
                f"model {name!r} cannot be served: its image processor (size {dict(size)}, no do_center_crop) leaves "
                "pictures at different sizes; use one that brings all to one size"
            )
        return Geometry(
            exact=exact,
            shortest_edge=None if exact else int(size["shortest_edge"]),
            crop=(int(images.crop_size["height"]), int(images.crop_size["width"])) if images.do_center_crop else None,
            resample=int(images.resample),
            default_num_frames=6,
        )

    @torch.inference_mode()
    def _features_of_an_image(self, name: str) -> int:
        """Count the features that the tower makes of a picture, with or without a class token. A prompt reserves as
        many places.

        Raises ConfigError if the tower cannot read pictures of the processor's size.
        """
        size = self.geometry.crop or self.geometry.exact
        assert size is not None
        try:
            return len(self.encode(Medium("image", np.zeros((1, *size, 3), np.uint8)), 0, 1))
        except (RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(
                f"model {name!r} cannot be served: its vision tower ({type(self.model.model.vision_tower).__name__}) "
                f"does not read pictures of {size[0]} x {size[1]} pixels as its image processor makes them: {error}"
            ) from error

    # --- prompt

    @staticmethod
    def _parts(medium: Medium) -> list[dict[str, str]]:
        """Return the template's parts for a medium."""
        return [{"type": "video"}] * (medium.kind == "video") + [{"type": "image"}] * len(medium.frames)

    def prompt(self, messages: tuple[Message, ...], options: TemplateOptions = PLAIN) -> TokenizedPrompt:
        media, placeholder = media_of(messages), Place(self.image_id, self.tokens_per_image)
        places = [[placeholder] * len(medium.frames) for medium in media]
        return widened(self._conversations.ids(messages, options), media, places, frozenset([self.image_id]))

    def positions(self, prompt: TokenizedPrompt) -> np.ndarray:
        return np.arange(len(prompt.ids), dtype=np.int32)[None]

    # --- tensors

    def stream(self, kind: Kind) -> str:  # noqa: ARG002
        """Return "image": a video is its frames."""
        return "image"

    def pieces(self, medium: Medium) -> int:
        """Return the number of frames."""
        return len(medium.frames)

    def encode(self, medium: Medium, first: int, last: int) -> Tensor:
        """Encode frames first..last, FRAMES_AT_ONCE of them at a time: (tokens, hidden)."""
        features = []
        for start in range(first, last, FRAMES_AT_ONCE):
            frames = medium.frames[start : min(last, start + FRAMES_AT_ONCE)]
            if self.tower is not None:
                features.append(self.tower(self._patches(frames)))
            else:
                made = self._pixels(frames).to(self.device, self.dtype)
                features += self.model.model.get_image_features(pixel_values=made).pooler_output
        return torch.cat([f.flatten(0, -2) for f in features])

    def _ready(self, frames: np.ndarray) -> bool:
        """Return whether the media decoder has already resized the frames, so that only the processor's arithmetic is
        left. A lookup table does it, since the processor takes longer than the tower."""
        images, size = self.processor.image_processor, self.geometry.crop or self.geometry.exact
        return bool(
            frames.dtype == np.uint8 and frames.shape[1:3] == size and images.do_rescale and images.do_normalize
        )

    def _patches(self, frames: np.ndarray) -> Tensor:
        """Cut frames into patches for the native tower: (images, patches, numbers)."""
        assert self.tower is not None
        if self._ready(frames):
            return library.patches(frames, self.tower.patch, self._shades, self.dtype)
        return pixels.cut(self._pixels(frames).to(self.dtype), self.tower.patch)

    def _pixels(self, frames: np.ndarray) -> Tensor:
        """Compute pixel values as the checkpoint's own processor does: (images, 3, height, width) float32."""
        if self._ready(frames):
            return pixels.shown(frames, self._shades)
        pictures = [Image.fromarray(frame) for frame in frames]
        made: Tensor = self.processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
        return made

    @cached_property
    def _shades(self) -> Tensor:
        """Compute the processor's table (see pixels.py) once."""
        return pixels.shades(self.processor.image_processor)
