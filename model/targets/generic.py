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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.video_utils import VideoMetadata

from model.backends.attention import AttentionMetadata, AttentionTensors
from model.config import EngineConfig
from model.errors import ConfigError
from model.request import Geometry, Kind, Medium, Message, RequestError
from model.targets import load_check, probe
from model.targets.base import Features, Pass
from model.targets.head import matching_head
from model.targets.language import LanguageModel, language_model
from model.targets.parallel import Group
from model.targets.prompt import Conversations, TokenizedPrompt, media_of
from model.transfer import upload

TICKS = 1000  # per second: how finely processors learn the times of frames
SECONDS_PER_FRAME = 0.5  # if unknown
EVEN = 0.05  # frames whose times are off by less, in frames, come from a video of even rate
NUM_FRAMES = 16  # of a video, if neither request nor processor sets it
TEXT_INPUTS = frozenset({"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"})
MARKS = ("mm_token_type_ids", "token_type_ids")  # names under which processors mark visual tokens


@dataclass(frozen=True, eq=False)
class ProcessedMedium(Medium):
    """A medium with what the family's processor made of it.

    tensors: the encoder's arguments by name; text: what replaces its placeholder in the prompt; marks: (tokens,), the
    processor's mark of each token of `text`.
    """

    tensors: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""
    ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    marks: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))


@dataclass(frozen=True)
class EncoderForm:
    """The form in which a family's base model expects features.

    output: the class of its encoder's output; stacked: whether features are one tensor, or a list of tensors; layers:
    the decoder layers to which further rows are added, None where the family only counts them; width: of the features.
    """

    output: Any
    stacked: bool
    layers: tuple[int | None, ...]
    width: int

    @classmethod
    def read(cls, output: Any) -> tuple[EncoderForm, Tensor]:
        """Return the form of an encoder's output, and its features: (tokens, width * (1 + layers))."""
        pooled = output.pooler_output
        parts, layers = [_flat(pooled)], []
        for each in output.get("deepstack_features") or ():
            layer, rows = each if _numbered(each) else (None, each)
            layers.append(layer)
            parts.append(_flat(rows))
        form = cls(type(output), isinstance(pooled, Tensor), tuple(layers), parts[0].shape[-1])
        return form, torch.cat(parts, -1)

    def rebuilt(self, features: Tensor) -> Any:
        """Return an encoder's output that has these features, (tokens, width * (1 + layers))."""
        pooled, *further = features.split(self.width, -1)
        made: dict[str, Any] = {"pooler_output": pooled[None] if self.stacked else [pooled]}
        if further:
            made["deepstack_features"] = [
                [rows] if layer is None else (layer, [rows]) for layer, rows in zip(self.layers, further, strict=True)
            ]
        return self.output(**made)


def _flat(features: Any) -> Tensor:
    """Join the features of several pictures: (tokens, width)."""
    if isinstance(features, Tensor):
        return features.reshape(-1, features.shape[-1])
    return torch.cat([_flat(part) for part in features])


def _numbered(each: Any) -> bool:
    """Return whether an entry of deepstack features is a pair of a layer's number and features."""
    return isinstance(each, tuple | list) and len(each) == 2 and isinstance(each[0], int)


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
        self.processor = AutoProcessor.from_pretrained(config.model)
        tokenizer = self.processor.tokenizer
        model = AutoModelForImageTextToText.from_pretrained(
            config.model, dtype=getattr(torch, config.dtype), attn_implementation="sdpa"
        )
        self._load(config, model, tokenizer, aux_layers)

    def _load(self, config: EngineConfig, model: Any, tokenizer: Any, aux_layers: tuple[int, ...] | None) -> None:
        """Measure the model, take it over, and check it."""
        self.device, self.dtype = torch.device(config.device), getattr(torch, config.dtype)
        self.tokenizer = tokenizer
        self.model = model = model.to(self.device).eval().requires_grad_(False)
        self._base, language = model.base_model, language_model(model)
        self._arguments = frozenset(inspect.signature(self._base.forward).parameters)
        self._forms: dict[str, EncoderForm] = {}
        self._set_up_prompts(model.config)
        text = model.config.get_text_config()
        shapes = probe.layer_shapes(model, language, text.num_hidden_layers)
        num_axes = len(self._axes(model._prepare_position_ids_for_generation(torch.zeros(1, 3, dtype=torch.int64), {})))
        self._blocks: str | None = None
        checks = load_check.reference(self, config)
        shapes, self._blocks = load_check.look_ahead(checks, shapes, getattr(text, "layer_types", None))
        # The prompts were made before the rule was known.
        checks = [replace(check, prompt=self._with_blocks(check.prompt)) for check in checks]
        super().__init__(config, model, tokenizer, aux_layers, num_axes=num_axes)
        if self.decoder is None:
            self.layers = shapes
        else:
            language.forward = self._run_natively
        self.native = False  # torch computes the vision tower
        self.largest_block = self._largest_block(config)
        self.head = matching_head(self.model, text, self.head)
        if not self.head.is_matrix:
            self.verifier = None
        language.register_forward_pre_hook(self._keep_embeds, with_kwargs=True)
        load_check.compare(self, checks, config.model)

    def _largest_block(self, config: EngineConfig) -> int:
        """Return the most tokens that see each other in both directions."""
        return {None: 0, "runs": self.tokens_per_image, "prompt": config.context(self.max_positions)}[self._blocks]

    @property
    def num_bytes(self) -> int:
        return self.bytes_beside(None)

    # --- prompt

    def _set_up_prompts(self, config: Any) -> None:
        """Find placeholders and streams, and set up the chat template."""
        processor = self.processor
        self._tokens = {
            kind: token for kind in ("image", "video") if (token := getattr(processor, f"{kind}_token", None))
        }
        if "image" not in self._tokens:
            raise ConfigError(f"the processor {type(processor).__name__} names no image_token")
        if getattr(processor, "video_processor", None) is None:
            self._tokens.pop("video", None)
        ids = {
            kind: found
            for kind in ("image", "video")
            if (found := getattr(config, f"{kind}_token_id", None) or getattr(config, f"{kind}_token_index", None))
        }
        self.placeholders = ids
        self._visual = np.array(sorted(set(ids.values())), np.int64)
        self._video_stream = "video" if hasattr(self._base, "get_video_features") else "image"
        self.geometry = Geometry(
            exact=None, shortest_edge=None, crop=None, resample=Image.Resampling.BICUBIC, default_num_frames=NUM_FRAMES
        )
        self.tokens_per_image = 0
        render = partial(processor.apply_chat_template, add_generation_prompt=True, tokenize=False)
        self._conversations = Conversations(self.tokenizer, render, lambda medium: [{"type": medium.kind}])

    @property
    def takes_videos(self) -> bool:
        """Return whether the family's processor takes videos; otherwise their frames are images."""
        return "video" in self._tokens

    def stream(self, kind: Kind) -> str:
        return self._video_stream if kind == "video" else "image"

    def prompt(self, messages: tuple[Message, ...]) -> TokenizedPrompt:
        """Apply the chat template, process the media and tokenise. Raises RequestError."""
        if not self.takes_videos:
            messages = tuple(map(_frames_as_images, messages))
        media = tuple(map(self.processed, media_of(messages)))
        ids = np.array(self._conversations.ids(messages, partial(self._fill, media)), np.int64)
        visual = np.flatnonzero(np.isin(ids, self._visual))
        counts = [int(np.isin(medium.ids, self._visual).sum()) for medium in media]
        if sum(counts) != len(visual) or not all(counts):
            raise RequestError("the model's chat template has no place for these media", param="messages")
        each = np.split(visual, np.cumsum(counts)[:-1]) if media else []
        spans = tuple((int(at[0]), int(at[-1]) + 1) for at in each)
        return self._with_blocks(TokenizedPrompt(ids.tolist(), media, spans, tuple(each)))

    def _fill(self, media: Sequence[ProcessedMedium], rendered: str) -> str:
        """Replace the placeholders of media in the rendered template. Raises RequestError if they do not match."""
        pieces: list[str] = []
        coming, at = iter(media), 0
        for start, kind, token in _found(rendered, self._tokens):
            medium = next(coming, None)
            if medium is None or medium.kind != kind:
                raise RequestError("the model's chat template has no place for these media", param="messages")
            pieces += [rendered[at:start], medium.text]
            at = start + len(token)
        if next(coming, None) is not None:
            raise RequestError("the model's chat template has no place for these media", param="messages")
        return "".join([*pieces, rendered[at:]])

    def _with_blocks(self, prompt: TokenizedPrompt) -> TokenizedPrompt:
        """Return a prompt with the ranges whose tokens see each other."""
        return replace(prompt, blocks=load_check.blocks_of(self._blocks, len(prompt.ids), prompt.visual))

    def family_inputs(self, messages: tuple[Message, ...]) -> dict[str, Any]:
        """Let the family's processor make everything of a conversation, as its users do."""
        turns: list[dict[str, Any]] = []
        images: list[Image.Image] = []
        videos: list[Medium] = []
        if not self.takes_videos:
            messages = tuple(map(_frames_as_images, messages))
        for message in messages:
            parts: list[dict[str, str]] = []
            for part in message.content:
                if isinstance(part, str):
                    parts.append({"type": "text", "text": part})
                    continue
                parts.append({"type": part.kind})
                if part.kind == "image":
                    images.append(Image.fromarray(np.ascontiguousarray(part.frames[0])))
                else:
                    videos.append(part)
            turns.append({"role": message.role, "content": parts})
        rendered = self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        bos = self.tokenizer.bos_token
        media: dict[str, Any] = {}
        if images:
            media["images"] = images
        if videos:
            media |= {
                "videos": [video.frames for video in videos],
                "video_metadata": [self._metadata(video) for video in videos],
                "do_sample_frames": False,
            }
        return dict(
            self.processor(
                text=[rendered],
                return_tensors="pt",
                add_special_tokens=not (bos and rendered.startswith(bos)),
                **media,
            )
        )

    def processed(self, medium: Medium) -> ProcessedMedium:
        """Let the family's processor make pixels and text of a medium. Raises RequestError if it refuses."""
        token = self._tokens[medium.kind]
        if medium.kind == "image":
            inputs: dict[str, Any] = {"images": [Image.fromarray(np.ascontiguousarray(medium.frames[0]))]}
        else:
            inputs = {"videos": [medium.frames], "video_metadata": [self._metadata(medium)], "do_sample_frames": False}
        try:
            made = self.processor(
                text=[token],
                add_special_tokens=False,
                return_mm_token_type_ids=True,
                return_text_replacement_offsets=True,
                **inputs,
            )
        except (ValueError, RuntimeError, TypeError) as error:
            raise RequestError(
                f"the model's processor refuses this {medium.kind}: {error}", param="messages"
            ) from error
        text = made.pop("text_replacement_offsets")[0][0]["replacement"]
        ids = np.array(made["input_ids"][0], np.int64)
        marks = next(
            (np.array(made[name][0], np.int64) for name in MARKS if name in made), np.zeros(len(ids), np.int64)
        )
        tensors = {name: _as_tensor(value) for name, value in made.items() if name not in TEXT_INPUTS}
        own = {each.name: getattr(medium, each.name) for each in fields(Medium)}
        return ProcessedMedium(**own, tensors=tensors, text=text, ids=ids, marks=marks)

    @staticmethod
    def _metadata(video: Medium) -> VideoMetadata:
        """Describe the sampled frames of a video, with their times."""
        num, seconds = len(video.frames), video.seconds_per_frame or SECONDS_PER_FRAME
        times = video.frame_times or tuple(number * seconds for number in range(num))
        height, width = video.frames.shape[1:3]
        source = video.source
        if source is not None and source.fps:
            numbers = [time * source.fps for time in times]
            if all(abs(number - round(number)) < EVEN for number in numbers):
                return VideoMetadata(
                    total_num_frames=source.total_frames,
                    fps=source.fps,
                    width=source.width,
                    height=source.height,
                    duration=source.duration,
                    frames_indices=[round(number) for number in numbers],
                )
        return VideoMetadata(
            total_num_frames=round(num * seconds * TICKS),
            fps=float(TICKS),
            width=width,
            height=height,
            duration=num * seconds,
            frames_indices=[round(time * TICKS) for time in times],
        )

    def positions(self, prompt: TokenizedPrompt) -> np.ndarray:
        """Compute position ids by the family's own method: (axes, tokens) int32."""
        ids = torch.tensor([prompt.ids])
        known: dict[str, Any] = {"mm_token_type_ids": torch.from_numpy(self.marks(prompt))[None]}
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

    def marks(self, prompt: TokenizedPrompt) -> np.ndarray:
        """Return the processor's mark of every token: (tokens,), 0 for text."""
        marks = np.zeros(len(prompt.ids), np.int64)
        for index, medium in enumerate(prompt.media):
            assert isinstance(medium, ProcessedMedium)
            own = np.flatnonzero(np.isin(medium.ids, self._visual))
            marked = np.flatnonzero(medium.marks)
            marks[marked + prompt.visual_tokens(index)[0] - own[0]] = medium.marks[marked]
        return marks

    # --- tensors

    def pieces(self, medium: Medium) -> int:  # noqa: ARG002
        """Return 1: only the family knows what of a medium is independent."""
        return 1

    def encode(self, medium: Medium, first: int, last: int) -> Tensor:  # noqa: ARG002
        """Encode a medium by the family's own encoder: (tokens, width), with rows for inner layers side by side."""
        assert isinstance(medium, ProcessedMedium)
        stream = self.stream(medium.kind)
        encoder = getattr(self._base, f"get_{stream}_features")
        taken = inspect.signature(encoder).parameters
        arguments = {name: self.placed(value) for name, value in medium.tensors.items() if name in taken}
        form, features = EncoderForm.read(encoder(**arguments, return_dict=True))
        self._forms[stream] = form
        return features

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
        return self.run(ids, upload(positions, self.device), rows.plan, features)

    def run(self, ids: Tensor, positions: Tensor, plan: AttentionTensors, features: Features | None = None) -> Pass:
        return self._through_base(ids, positions, plan, features)

    def _through_base(self, ids: Tensor, positions: Tensor, plan: Any, features: Features | None) -> Pass:
        """Run one pass through the family's own base model, which hands `plan` down to its decoder's attention."""
        places = positions.long()
        more: dict[str, Any] = {}
        if features:
            more["mm_encoder_outputs"] = {
                stream: self._forms[stream].rebuilt(rows) for stream, rows in features.items()
            }
        if features is not None:
            marks = torch.isin(ids, torch.from_numpy(self._visual).to(ids.device)).int()
            more |= {name: marks for name in ("mm_token_type_ids", "moe_mm_token_type_ids") if name in self._arguments}
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

    def _run_natively(self, *, inputs_embeds: Tensor, plan: AttentionMetadata, **_: Any) -> Any:
        """Stand in for the decoder's own forward."""
        assert self.decoder is not None
        hidden, self._native_aux = self.decoder.forward(inputs_embeds, self._positions, plan)
        return BaseModelOutputWithPast(last_hidden_state=hidden)

    def _aux(self) -> Tensor:
        return super()._aux() if self.decoder is None else self._native_aux


def _found(text: str, tokens: Mapping[str, str]) -> list[tuple[int, Kind, str]]:
    """Find placeholders in a text: (start, kind, token), in order. A token that is part of a longer one is not found in
    it."""
    found: list[tuple[int, Kind, str]] = []
    at = 0
    order = sorted(tokens.items(), key=lambda item: -len(item[1]))
    while at < len(text):
        hits = [(start, kind, token) for kind, token in order if (start := text.find(token, at)) >= 0]
        if not hits:
            break
        start, kind, token = min(hits, key=lambda hit: hit[0])
        found.append((start, "video" if kind == "video" else "image", token))
        at = start + len(token)
    return found


def _frames_as_images(message: Message) -> Message:
    """Replace the videos of a message by their frames, for families that know only images."""
    content: list[str | Medium] = []
    for part in message.content:
        if isinstance(part, Medium) and part.kind == "video":
            content += [replace(part, kind="image", frames=part.frames[i : i + 1]) for i in range(len(part.frames))]
        else:
            content.append(part)
    return replace(message, content=tuple(content))


def _as_tensor(value: Any) -> Any:
    """Convert what a processor returns to tensors; leave what is none."""
    if isinstance(value, np.ndarray) and value.dtype != object:
        return torch.from_numpy(value)
    if isinstance(value, list | tuple) and value and all(isinstance(part, Tensor | np.ndarray) for part in value):
        parts = [torch.as_tensor(part) for part in value]
        return torch.stack(parts) if len({part.shape for part in parts}) == 1 else parts
    if isinstance(value, list | tuple) and value and all(isinstance(part, int | float | list) for part in value):
        try:
            return torch.tensor(value)
        except (ValueError, TypeError):
            return value
    return value


def _joined(one: Any, other: Any) -> Any:
    """Join the arguments of two media."""
    return torch.cat((one, other)) if isinstance(one, Tensor) else [*one, *other]
