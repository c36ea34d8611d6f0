"""LLaVA (1.5 style): a CLIP tower, a projector, a Llama-like language model; one-dimensional positions.

A video is its frames: the marker <|video|> where the checkpoint has one, then every frame's tokens.
"""

from __future__ import annotations

import re
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration, PreTrainedTokenizerBase

from model import attention
from model.attention import Plan, Rows
from model.config import EngineConfig
from model.native import library
from model.native.library import Matrix
from model.native.step import Verifier
from model.request import Geometry, Medium, Message, RequestError
from model.targets import native
from model.targets.base import Prompt, tapped
from model.transfer import upload

FRAMES_AT_ONCE = 8  # frames that pass through the tower together


class LlavaTarget:
    """See `model.targets.base.Target`."""

    def __init__(
        self,
        config: EngineConfig,
        model: Any = None,
        processor: Any = None,
        tap_layers: tuple[int, ...] | None = None,
    ) -> None:
        """The checkpoint that a resolved config names; or these, which are on no disk. For `tap_layers` see `load`."""
        attention.register()
        self.device = torch.device(config.device)
        self.dtype = getattr(torch, config.dtype)
        self.processor = processor or AutoProcessor.from_pretrained(config.model)
        self.tokenizer: PreTrainedTokenizerBase = self.processor.tokenizer
        self.model = model or LlavaForConditionalGeneration.from_pretrained(
            config.model, dtype=self.dtype, attn_implementation="sdpa"
        )
        self.model.to(self.device).eval().requires_grad_(False)
        self.model.model.language_model.set_attn_implementation(attention.NAME)
        text = self.model.config.text_config
        self.num_layers, self.vocab_size = text.num_hidden_layers, text.vocab_size
        self.hidden_size, self.num_kv_heads = text.hidden_size, text.num_key_value_heads
        self.head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.max_positions, self.num_axes = text.max_position_embeddings, 1
        eos = self.model.generation_config.eos_token_id
        self.eos_ids = frozenset(
            eos if isinstance(eos, list) else [eos if eos is not None else self.tokenizer.eos_token_id]
        )
        self.image_id: int = self.model.config.image_token_index
        self.image_token = self.tokenizer.convert_ids_to_tokens(self.image_id)
        # User text must not be read as these; whole-string tokenising is only safe where none occurs in it.
        specials = sorted(self.tokenizer.added_tokens_encoder, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, specials))) if specials else None
        self.geometry = self._geometry()
        self.tap_layers = tapped(self.num_layers, tap_layers)
        decoder = self.model.model.language_model
        self.final_norm = decoder.norm.weight
        self.decoder = native.decoder(decoder, self.tap_layers, self.max_positions)
        self.tower = native.tower(self.model.model, self.model.config)
        self.native = self.decoder is not None and self.tower is not None
        rope = getattr(text, "rope_parameters", None) or {}
        # "dynamic" asks of every pass how long its longest sequence is, and waits for the answer.
        self.recordable = self.decoder is None and rope.get("rope_type") != "dynamic"
        # Drafts learn through the model's own output head; a packed matrix knows no gradient.
        head = self.model.lm_head
        self.head = Matrix(head.weight, head.bias) if library.supports(self.dtype, self.device) else None
        self.verifier = None
        if self.decoder is not None and self.head is not None:
            self.verifier = Verifier(self.decoder, decoder.embed_tokens.weight, self.head)
        self._taps: dict[int, Tensor] = {}
        for layer in self.tap_layers if self.decoder is None else ():
            decoder.layers[layer].register_forward_hook(self._tap(layer))
        vision = self.model.config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        self.tokens_per_image = patches + (self.model.config.vision_feature_select_strategy == "full")

    @property
    def num_bytes(self) -> int:
        """Weights that transformers' modules still hold, and those packed for the native library."""
        held = sum(parameter.nbytes for parameter in self.model.parameters())
        packed = sum(part.num_bytes for part in (self.decoder, self.tower) if part is not None)
        return held + packed + (self.head.packed.nbytes if self.head is not None else 0)

    def _tap(self, layer: int) -> Any:
        def keep(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
            self._taps[layer] = output[0] if isinstance(output, tuple) else output

        return keep

    def _geometry(self) -> Geometry:
        images = self.processor.image_processor
        size, crop = images.size, images.crop_size
        exact = (int(size["height"]), int(size["width"])) if size.get("height") else None
        return Geometry(
            exact=exact,
            shortest_edge=None if exact else int(size["shortest_edge"]),
            crop=(int(crop["height"]), int(crop["width"])) if images.do_center_crop else None,
            resample=int(images.resample),
            default_num_frames=6,
        )

    # --- prompt

    def prompt(self, messages: tuple[Message, ...]) -> Prompt:
        """Render the checkpoint's chat template around stand-ins for the users' texts, then tokenise."""
        media: list[Medium] = []
        texts: list[str] = []
        turns = []
        for message in messages:
            parts: list[dict[str, str]] = []
            for part in message.content:
                if isinstance(part, Medium):
                    if not len(part.frames):
                        raise RequestError(f"a {part.kind} has no frames", param="messages")
                    media.append(part)
                    if part.kind == "video":
                        parts.append({"type": "video"})
                    parts += [{"type": "image"}] * len(part.frames)
                else:
                    if not part.isascii() and any("\ud800" <= c <= "\udfff" for c in part):
                        raise RequestError(
                            "a text holds half of a surrogate pair, which is no character", param="messages"
                        )
                    parts.append({"type": "text", "text": self._stand_in(len(texts))})
                    texts.append(part)
            turns.append({"role": message.role, "content": parts})
        try:
            rendered = self.processor.apply_chat_template(turns, add_generation_prompt=True)
        except Exception as error:  # jinja raises what the template's author chose
            raise RequestError(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from error
        return self._placed(self._tokenised(rendered, texts), tuple(media))

    @staticmethod
    def _stand_in(number: int) -> str:
        return f"\ue000{number}\ue001"

    def _tokenised(self, rendered: str, texts: list[str]) -> list[int]:
        def fill(match: re.Match[str]) -> str:
            return texts[int(match[1])]

        mark = re.compile("\ue000(\\d+)\ue001")
        filled = mark.sub(fill, rendered)
        # Counted in the whole: a special token may also be spelt across two texts that stand side by side.
        if self._special is None or len(self._special.findall(filled)) == len(self._special.findall(rendered)):
            return list(self.tokenizer(filled, add_special_tokens=False).input_ids)
        ids: list[int] = []
        for number, piece in enumerate(mark.split(rendered)):  # odd pieces are the numbers of texts
            text = texts[int(piece)] if number % 2 else piece
            ids += self.tokenizer(text, add_special_tokens=False, split_special_tokens=bool(number % 2)).input_ids
        return ids

    def _placed(self, ids: list[int], media: tuple[Medium, ...]) -> Prompt:
        """Widen every image placeholder to as many tokens as an image has."""
        if ids.count(self.image_id) != sum(len(m.frames) for m in media):
            raise RequestError("the model's chat template has no place for these media", param="messages")
        placed: list[int] = []
        spans: list[tuple[int, int]] = []
        frames_left = 0
        following = iter(media)
        for token in ids:
            if token != self.image_id:
                placed.append(token)
                continue
            if frames_left == 0:
                frames_left = len(next(following).frames)
                start = len(placed)
            placed += [token] * self.tokens_per_image
            frames_left -= 1
            if frames_left == 0:
                spans.append((start, len(placed)))
        return Prompt(placed, media, tuple(spans))

    def positions(self, prompt: Prompt) -> np.ndarray:
        return np.arange(len(prompt.ids), dtype=np.int32)[None]

    # --- tensors

    def pieces(self, medium: Medium) -> int:
        return len(medium.frames)

    def encode(self, medium: Medium, first: int, last: int) -> Tensor:
        features = []
        for start in range(first, last, FRAMES_AT_ONCE):
            frames = medium.frames[start : min(last, start + FRAMES_AT_ONCE)]
            if self.tower is not None:
                features.append(self.tower(self._patches(frames)))
            else:
                pixels = self._pixels(frames).to(self.device, self.dtype)
                features += self.model.model.get_image_features(pixel_values=pixels).pooler_output
        return torch.cat([f.flatten(0, -2) for f in features])

    def _ready(self, frames: np.ndarray) -> bool:
        """Whether decoding has already brought them to the target's geometry, so that they only lack the processor's
        arithmetic. A table does that: the processor takes longer than the tower."""
        images, size = self.processor.image_processor, self.geometry.crop or self.geometry.exact
        return bool(
            frames.dtype == np.uint8 and frames.shape[1:3] == size and images.do_rescale and images.do_normalize
        )

    def _patches(self, frames: np.ndarray) -> Tensor:
        """(images, patches, numbers) for the native tower."""
        assert self.tower is not None
        if self._ready(frames):
            return library.patches(frames, self.tower.patch, self._shades, self.dtype)
        return self.tower.cut(self._pixels(frames).to(self.dtype))

    def _pixels(self, frames: np.ndarray) -> Tensor:
        """(images, 3, height, width) float32, as the checkpoint's own processor makes them."""
        if self._ready(frames):
            shown = torch.from_numpy(frames).long()
            return torch.stack([self._shades[channel][shown[..., channel]] for channel in range(3)], 1)
        pictures = [Image.fromarray(frame) for frame in frames]
        pixels: Tensor = self.processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
        return pixels

    @cached_property
    def _shades(self) -> Tensor:
        """(3, 256) float32: what the processor makes of a byte, by channel."""
        images = self.processor.image_processor
        mean, std = (torch.tensor(of, dtype=torch.float32)[:, None] for of in (images.image_mean, images.image_std))
        shades: Tensor = (torch.arange(256.0) - mean / images.rescale_factor) / (std / images.rescale_factor)
        return shades

    def embed(self, ids: Tensor) -> Tensor:
        embedded: Tensor = self.model.model.language_model.embed_tokens(ids)
        return embedded

    def forward(self, embeds: Tensor, positions: np.ndarray, rows: Rows) -> tuple[Tensor, Tensor]:
        if self.decoder is not None:
            return self.decoder.forward(embeds, positions, rows)
        return self.run(embeds, upload(positions, self.device), rows.plan)

    def run(self, embeds: Tensor, positions: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        hidden = self.model.model.language_model(
            inputs_embeds=embeds, position_ids=positions[0].long(), use_cache=False, plan=plan
        ).last_hidden_state
        return hidden, torch.cat([self._taps.pop(layer) for layer in self.tap_layers], -1)

    def logits(self, hidden: Tensor) -> Tensor:
        scores: Tensor = self.model.lm_head(hidden) if self.head is None or hidden.requires_grad else self.head(hidden)
        return scores
