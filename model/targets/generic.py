"""Implements every family that transformers ships, without code for any of them.

The family's own processor makes token ids and pixels, its own encoder makes features, and its own base model runs each
pass: it puts features into the place of visual tokens, scales embeddings, adds inputs per layer, and calls its decoder.
The decoder's attention is ours (attention.py), and reads and writes our KV cache. The family's own outer model makes
the logits.

What cannot be known is measured when a model is loaded: what each layer stores (probe.py), which tokens see each other
in both directions, how logits follow from hidden states. At the end a few passes of ours are compared with the family's
own forward. A model that does not agree is refused, so that an unknown family is never served wrong.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from model.backends.attention import AttentionMetadata, AttentionTensors
from model.config import EngineConfig
from model.errors import ConfigError
from model.request import Kind, Medium, Message, TemplateOptions, VideoMetadata
from model.targets import load_check, packed, probe, support
from model.targets.base import Features, Pass
from model.targets.chat_processor import ChatProcessor, ProcessedMedium
from model.targets.checkpoint import load_model, load_processor
from model.targets.encoder_form import EncoderForm
from model.targets.head import matching_head
from model.targets.language import LanguageModel, language_model
from model.targets.parallel import Group
from model.targets.prompt import PLAIN, TokenizedPrompt
from model.targets.states import States
from model.transfer import upload


class GenericTarget(LanguageModel):
    """Implements `model.targets.base.Target`."""

    def __init__(
        self, config: EngineConfig, aux_layers: tuple[int, ...] | None = None, group: Group | None = None
    ) -> None:
        """Load the checkpoint that a resolved config names. aux_layers: see `model.targets.registry.load_target`.

        Raises ConfigError if the family needs what the engine does not have, or does not agree with transformers.
        """
        if group is not None:
            raise ConfigError(f"model {config.model!r} cannot be spread over several devices yet: give one device")
        try:
            self._load(config, load_model(config), load_processor(config), aux_layers)
        except ConfigError as error:
            if config.model in str(error):
                raise
            raise ConfigError(f"model {config.model!r} cannot be served: {error}") from error

    def _load(self, config: EngineConfig, model: Any, processor: Any, aux_layers: tuple[int, ...] | None) -> None:
        """Measure the model, take it over, and check it."""
        self.device, self.dtype = torch.device(config.device), getattr(torch, config.dtype)
        self.model = model = model.to(self.device).eval().requires_grad_(False)
        self._base, language = model.base_model, language_model(model)
        self._forms: dict[str, EncoderForm] = {}
        text = model.config.get_text_config()
        shapes = probe.layer_shapes(model, language, text.num_hidden_layers)
        self.states = States.of(language)
        if None in shapes and self.states is None:
            raise ConfigError(f"model {config.model!r} cannot be served: layer {shapes.index(None)} has no attention")
        support.check_windows(config, text, shapes)
        accepted = inspect.signature(self._base.forward).parameters
        self.chat = chat = ChatProcessor(config.model, processor, model.config)
        self.template, self.geometry, self.tokens_per_image = chat.template, chat.geometry, chat.tokens_per_image
        self.placeholders = chat.placeholders
        self._markers = {name: mark for name, mark in chat.markers.items() if name in accepted}  # of use to a pass
        self._video_stream = "video" if hasattr(self._base, "get_video_features") else "image"
        num_axes = len(self._axes(model._prepare_position_ids_for_generation(torch.zeros(1, 3, dtype=torch.int64), {})))
        checks = load_check.reference(self, config)
        for medium in (medium for check in checks for medium in check.prompt.media):
            self.encode(medium, 0, 1)  # to learn the form of its features
        shapes, chat.rule = load_check.look_ahead(self, checks, shapes, getattr(text, "layer_types", None))
        # The prompts were made before the rule was known.
        checks = [replace(check, prompt=chat.with_blocks(check.prompt, chat.rule)) for check in checks]
        deep = any(form.layers for form in self._forms.values())
        super().__init__(
            config,
            model,
            processor.tokenizer,
            aux_layers,
            num_axes=num_axes,
            layers=shapes,
            natively=(not deep or packed.adds_rows(language)) and packed.sees_blocks(shapes, chat.rule),
        )
        if self.decoder is not None:
            language.forward = self._run_natively
        self.native = False  # torch computes the vision tower
        self.recordable &= self.states is None
        if chat.rule is not None:
            whole = chat.rule.who != "runs"
            self.largest_block = config.context(self.max_positions) if whole else self.tokens_per_image
        self.head = matching_head(self.model, text, self.head)
        if not self.head.is_matrix:
            self.verifier = None
        language.register_forward_pre_hook(self._keep_embeds, with_kwargs=True)
        load_check.compare(self, checks, config.model)

    def prompt(self, messages: tuple[Message, ...], options: TemplateOptions = PLAIN) -> TokenizedPrompt:
        return self.chat.prompt(messages, options)

    def sample_frames(self, source: VideoMetadata, num_frames: int | None, fps: float | None) -> list[int] | None:
        return self.chat.sample_frames(source, num_frames, fps)

    def most_frames(self, tokens: int) -> int:
        """Return about how many small frames of a video fit into so many tokens."""
        return self.chat.most_frames(tokens)

    @property
    def num_bytes(self) -> int:
        return self.bytes_beside(None)

    # --- prompt

    def stream(self, kind: Kind) -> str:
        return self._video_stream if kind == "video" else "image"

    def positions(self, prompt: TokenizedPrompt) -> np.ndarray:
        """Compute position ids by the family's own method: (axes, tokens) int32."""
        ids = torch.tensor([prompt.ids])
        known: dict[str, Any] = {}
        if (marker := self.chat.markers.get("mm_token_type_ids")) is not None:
            known["mm_token_type_ids"] = torch.tensor(marker([prompt.ids]))
        for medium in prompt.media:
            assert isinstance(medium, ProcessedMedium)
            for name, value in medium.tensors.items():
                if not name.startswith("pixel"):
                    known[name] = _joined(known[name], value) if name in known else value
        places = self._axes(self.model._prepare_position_ids_for_generation(ids, known))
        return np.ascontiguousarray(places[:, 0].cpu().numpy().astype(np.int32))

    def _axes(self, positions: Tensor) -> Tensor:
        """Return positions (axes, batch, tokens), without the row of Qwen's families that serves masks only."""
        if positions.ndim == 2:
            return positions[None]
        rope = getattr(self.model.config.get_text_config(), "rope_parameters", None) or {}
        return positions[1:] if len(positions) == 1 + len(rope.get("mrope_section") or ()) else positions

    # --- tensors

    def pieces(self, medium: Medium) -> int:  # noqa: ARG002
        """Return 1: only the family knows what of a medium is independent."""
        return 1

    def encode(self, medium: Medium, first: int, last: int) -> Tensor:  # noqa: ARG002
        """Encode a medium by the family's own encoder: (tokens, width), with rows for inner layers side by side."""
        assert isinstance(medium, ProcessedMedium)
        stream = self.stream(medium.kind)
        encoder = getattr(self._base, f"get_{stream}_features")
        accepted = inspect.signature(encoder).parameters
        arguments = {name: self.placed(value) for name, value in medium.tensors.items() if name in accepted}
        form, features = EncoderForm.read(encoder(**arguments, return_dict=True))
        self._forms[stream] = form
        return features if len(features) == medium.num_visual else features[medium.kept_rows(len(features))]

    def placed(self, value: Any) -> Any:
        """Move an encoder's argument to the target's device and dtype."""
        if not isinstance(value, Tensor):
            return value
        return value.to(self.device, self.dtype if value.is_floating_point() else value.dtype)

    def embed(self, ids: Tensor) -> Tensor:
        embedded: Tensor = self._base.get_input_embeddings()(ids)
        return embedded

    def forward(
        self, ids: Tensor, positions: np.ndarray, rows: AttentionMetadata, features: Features | None = None
    ) -> Pass:
        if self.decoder is not None:
            self._positions = positions
            return self._through_base(ids, upload(positions, self.device), rows, features)
        states = rows.cache.states
        with nullcontext() if states is None else states.begin(rows):
            return self.run(ids, upload(positions, self.device), rows.plan, features)

    def run(self, ids: Tensor, positions: Tensor, plan: AttentionTensors, features: Features | None = None) -> Pass:
        return self._through_base(ids, positions, plan, features)

    def _through_base(self, ids: Tensor, positions: Tensor, plan: Any, features: Features | None) -> Pass:
        """Run one pass through the family's own base model, which hands `plan` down to its decoder's attention."""
        places = positions.long()
        more: dict[str, Any] = {}
        if features is not None:
            for stream, form in self._forms.items():
                if form.rest and stream not in features:  # it may be of use without visual tokens
                    features = {**features, stream: form.nothing(self.head.like)}
        if features:
            more["mm_encoder_outputs"] = {
                stream: self._forms[stream].rebuilt(rows) for stream, rows in features.items()
            }
        if features is not None:
            rows = ids.tolist()
            more |= {name: torch.tensor(mark(rows), device=self.device) for name, mark in self._markers.items()}
        hidden = self._base(
            input_ids=ids,
            position_ids=places if self.num_axes > 1 else places[0],
            use_cache=False,
            plan=plan,
            **more,
        ).last_hidden_state
        return Pass(hidden, self._aux(), self._embeds)

    def _keep_embeds(self, _module: nn.Module, _arguments: Any, options: dict[str, Any]) -> None:
        """Keep what enters the decoder."""
        self._embeds = options["inputs_embeds"]

    def _run_natively(
        self,
        *,
        inputs_embeds: Tensor,
        plan: AttentionMetadata,
        visual_pos_masks: Tensor | None = None,
        deepstack_visual_embeds: list[Tensor] | None = None,
        **_: Any,
    ) -> Any:
        """Stand in for the decoder's own forward."""
        assert self.decoder is not None
        added = None
        if deepstack_visual_embeds:
            added = inputs_embeds.new_zeros(len(deepstack_visual_embeds), *inputs_embeds.shape)
            added[:, visual_pos_masks] = torch.stack(list(deepstack_visual_embeds))
        hidden, self._native_aux = self.decoder.forward(inputs_embeds, self._positions, plan, added)
        return BaseModelOutputWithPast(last_hidden_state=hidden)

    def _aux(self) -> Tensor:
        return super()._aux() if self.decoder is None else self._native_aux


def _joined(one: Any, other: Any) -> Any:
    """Join the arguments of two media."""
    return torch.cat((one, other)) if isinstance(one, Tensor) else [*one, *other]
