"""Turns conversations into prompts by a checkpoint's own processor and chat template, for every family.

Media are processed one by one, so that caches can keep what belongs to each. User text never becomes a special token:
see prompt.py.
"""

from __future__ import annotations

import inspect
import logging
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.video_utils import VideoMetadata as FamilyMetadata

from model.errors import ConfigError
from model.request import MEDIA_OPTIONS, Geometry, Kind, Medium, Message, RequestError, TemplateOptions, VideoMetadata
from model.targets.blocks import Rule
from model.targets.chat_template import ChatTemplate
from model.targets.prompt import PLAIN, Conversations, TokenizedPrompt, media_of

log = logging.getLogger("flashserve.targets")

KINDS: tuple[Kind, ...] = ("image", "video")
TICKS = 1000  # per second: how finely processors learn the times of frames
SECONDS_PER_FRAME = 0.5  # if unknown
EVEN = 0.05  # frames whose times are off by less, in frames, come from a video of even rate
PIXELS = ("min_pixels", "max_pixels")
NUM_FRAMES = 16  # of a video, if neither request nor processor sets it
SAMPLE, LARGE = 224, 1024  # sides of pictures that are processed to learn about the processor, pixels
COUNT = "batch_num_images"  # the encoder's argument with the number of pictures of a prompt
# Outputs of a processor that belong to the text.
TEXT_OUTPUTS = frozenset(
    {
        "input_ids",
        "attention_mask",
        "token_type_ids",
        "mm_token_type_ids",
        "moe_mm_token_type_ids",
        "text_replacement_offsets",
        "position_ids",
    }
)


@dataclass(frozen=True, eq=False)
class ProcessedMedium(Medium):
    """A medium with what the family's processor made of it.

    tensors: the encoder's arguments by name; text: what replaces its placeholder in the prompt; num_visual: visual
    tokens in that text.
    """

    tensors: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""
    num_visual: int = 0

    def kept_rows(self, num: int) -> Tensor:
        """Return which of the encoder's `num` rows are visual tokens: (num,) bool.

        Some processors leave out what hardly changes in a video; a mask among their tensors says so, and the family's
        base model applies it to the encoder's rows. Raises ValueError if there is none.
        """
        for mask in self.tensors.values():
            if isinstance(mask, Tensor) and mask.dtype is torch.bool and mask.shape == (num,):
                return mask
        raise ValueError(f"the encoder made {num} rows for {self.num_visual} visual tokens")


class ChatProcessor:
    """The processor and chat template of one checkpoint.

    visual: token ids that stand for visual tokens, ascending; tokens_per_image: visual tokens of a large picture;
    markers: the processor's methods that mark the tokens of media, by name; rule: which tokens see each other in both
    directions, None if none do.
    """

    def __init__(self, name: str, processor: Any, config: Any) -> None:
        """Set up for a checkpoint. name: for errors; config: the model's.

        Raises ConfigError if the processor or the chat template takes no image.
        """
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.rule: Rule | None = None
        self._kind = config.model_type
        self._prefix: list[int] = []  # tokens that the processor puts before every prompt
        self._no_videos: str | None = None  # why
        self._jointly = False  # whether the text for a medium depends on the others
        self.markers = {
            name: getattr(processor, f"create_{name}")
            for name in ("mm_token_type_ids", "moe_mm_token_type_ids")
            if _takes_ids_alone(getattr(processor, f"create_{name}", None))
        }
        self._set_up(name, config)

    def _set_up(self, name: str, config: Any) -> None:
        """Find placeholders and streams, and set up the chat template. Raises ConfigError if there is no template, or
        none for images."""
        found = {
            kind: getattr(config, f"{kind}_token_id", None) or getattr(config, f"{kind}_token_index", None)
            for kind in KINDS
        }
        self.placeholders: dict[str, int] = {kind: number for kind, number in found.items() if number is not None}
        self.visual = np.array(sorted(set(self.placeholders.values())), np.int64)
        self.geometry = Geometry(
            default_num_frames=NUM_FRAMES,
            samples_frames=True,
            image_options=self._options_of("image_processor"),
            video_options=self._options_of("video_processor"),
            size_is_area=_size_is_area(self.processor.image_processor),
        )
        self.template = ChatTemplate(self.processor, self.tokenizer)
        self._conversations = Conversations(self.tokenizer, self.template, lambda medium: [{"type": medium.kind}])
        self._contexts: dict[str, str] = {}  # by kind: a conversation with one medium
        self._tokens: dict[str, str] = {}  # by kind: its placeholder in the template
        for kind in KINDS:
            if kind == "video" and getattr(self.processor, "video_processor", None) is None:
                continue
            try:
                parts = [{"type": kind}, {"type": "text", "text": "?"}]
                self._contexts[kind] = self.template.render([{"role": "user", "content": parts}])
                outputs = self._called(_sample(kind))
                self._tokens[kind] = outputs["text_replacement_offsets"][0][0]["text"]
            except Exception as error:  # a template and a processor may raise any error
                if kind == "image":
                    raise ConfigError(
                        f"model {name!r} cannot be served: its processor ({type(self.processor).__name__}) or chat "
                        f"template takes no image: {type(error).__name__}: {error}"
                    ) from error
                self._contexts.pop(kind, None)
        self.tokens_per_image = self.processed(_sample("image", LARGE)).num_visual

    def _options_of(self, part: str) -> tuple[str, ...]:
        """Return the options that a client may set of a part of the processor."""
        found = getattr(self.processor, part, None)
        if found is None:
            return ()
        known = {*found.valid_kwargs.__annotations__, *(PIXELS if _size_is_area(found) else ())}
        return tuple(name for name in MEDIA_OPTIONS if name in known)

    @property
    def takes_videos(self) -> bool:
        """Return whether the family's processor takes videos; otherwise their frames are images."""
        return "video" in self._tokens

    def sample_frames(self, source: VideoMetadata, num_frames: int | None, fps: float | None) -> list[int] | None:
        """Ask the family's video processor, with its defaults, for frames; None if it does not sample by itself, or
        cannot: some raise for a clip that is shorter than their default, or without a default that they need."""
        if not self.takes_videos or self._no_videos is not None:
            return None
        videos = self.processor.video_processor
        known = inspect.signature(videos.sample_frames).parameters
        names = [name for name in videos.valid_kwargs.__annotations__ if name in known]
        options: dict[str, Any] = {name: getattr(videos, name, None) for name in names}
        if num_frames is not None and "num_frames" not in known:  # it would be ignored
            return None
        if num_frames is not None:
            options = {name: value for name, value in options.items() if name != "fps"} | {"num_frames": num_frames}
        elif fps is not None:
            options = {name: value for name, value in options.items() if name != "num_frames"} | {"fps": fps}
        elif not (options.get("num_frames") or options.get("fps")):  # it would take every frame
            return None
        if (wanted := options.get("num_frames")) is not None:
            options["num_frames"] = min(wanted, source.total_frames)
        metadata = FamilyMetadata(
            total_num_frames=source.total_frames,
            fps=source.fps,
            width=source.width,
            height=source.height,
            duration=source.duration,
        )
        try:
            return [int(index) for index in videos.sample_frames(metadata=metadata, **options)] or None
        except Exception:  # a processor may raise any error
            log.info("the model's processor does not sample %s with %s", source, options, exc_info=True)
            return None

    def prompt(self, messages: tuple[Message, ...], options: TemplateOptions = PLAIN) -> TokenizedPrompt:
        """Apply the chat template, process the media and tokenise. Raises RequestError."""
        if not self.takes_videos:
            messages = tuple(map(_frames_as_images, messages))
        if self._no_videos is not None and any(medium.kind == "video" for medium in media_of(messages)):
            raise RequestError(f"this model takes no videos here: {self._no_videos}", param="messages")
        media = tuple(map(self.processed, media_of(messages)))
        if self._jointly and len(media) > 1:
            media = self._processed_jointly(media)
        ids = self._conversations.ids(messages, options, partial(self._fill, media))
        if self._prefix and ids[: len(self._prefix)] != self._prefix:
            ids = [*self._prefix, *ids]
        visual = np.flatnonzero(np.isin(ids, self.visual))
        if sum(medium.num_visual for medium in media) != len(visual):
            raise RequestError("the model's chat template has no place for these media", param="messages")
        each = np.split(visual, np.cumsum([medium.num_visual for medium in media])[:-1]) if media else []
        spans = tuple((int(at[0]), int(at[-1]) + 1) for at in each)
        return self.with_blocks(TokenizedPrompt(ids, media, spans, tuple(each)), self.rule)

    def _fill(self, media: Sequence[ProcessedMedium], rendered: str) -> str:
        """Replace the placeholders of media in the rendered template. Raises RequestError if they do not match."""
        pieces: list[str] = []
        coming, at = iter(media), 0
        for start, token in _found(rendered, set(self._tokens.values())):
            medium = next(coming, None)
            if medium is None or self._tokens[medium.kind] != token:
                raise RequestError("the model's chat template has no place for these media", param="messages")
            pieces += [rendered[at:start], medium.text]
            at = start + len(token)
        if next(coming, None) is not None:
            raise RequestError("the model's chat template has no place for these media", param="messages")
        return "".join([*pieces, rendered[at:]])

    def with_blocks(self, prompt: TokenizedPrompt, rule: Rule | None) -> TokenizedPrompt:
        """Return a prompt with the ranges whose tokens see each other by a rule."""
        if rule is None:
            return prompt
        mark = self.markers.get("mm_token_type_ids")
        marked = np.isin(prompt.ids, self.visual) if mark is None else np.array(mark([prompt.ids])[0]) != 0
        return rule.applied(prompt, marked)

    def refuse_videos(self, reason: str) -> None:
        """Serve this model without videos."""
        log.warning("model %s takes no videos here: %s", self._kind, reason)
        self._no_videos = reason

    def learn(self, ours: list[int], theirs: list[int], messages: tuple[Message, ...]) -> TokenizedPrompt | None:
        """Learn from a prompt whose tokens differ from those of the family's processor. Returns the prompt anew; None
        if the difference shows nothing that is known.

        A processor may put tokens of its own before a prompt, and its text for a medium may depend on the others.
        """
        if len(theirs) > len(ours) and theirs[len(theirs) - len(ours) :] == ours:
            self._prefix = theirs[: len(theirs) - len(ours)]
        elif sum(isinstance(part, Medium) for message in messages for part in message.content) > 1:
            self._jointly = True
        else:
            return None
        return self.prompt(messages)

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
            media["images"] = [images]
        if videos:
            media |= {
                "videos": [[video.frames for video in videos]],
                "video_metadata": [[self._metadata(video) for video in videos]],
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
        try:
            outputs = self._called(medium)
        except (ValueError, RuntimeError, TypeError) as error:
            raise RequestError(
                f"the model's processor refuses this {medium.kind}: {error}", param="messages"
            ) from error
        text = outputs["text_replacement_offsets"][0][0]["replacement"]
        num_visual = int(np.isin(outputs["input_ids"].numpy(), self.visual).sum())
        if not num_visual:
            raise RequestError(f"the model's processor makes no tokens of this {medium.kind}", param="messages")
        tensors = {name: value for name, value in outputs.items() if name not in TEXT_OUTPUTS}
        own = {each.name: getattr(medium, each.name) for each in fields(Medium)}
        return ProcessedMedium(**own, tensors=tensors, text=text, num_visual=num_visual)

    def _called(self, *media: Medium, text: str | None = None) -> dict[str, Any]:
        """Call the processor with media, and a text that has their placeholders; None for a conversation with one."""
        inputs: dict[str, Any] = {}
        images = [medium for medium in media if medium.kind == "image"]
        videos = [medium for medium in media if medium.kind == "video"]
        if images:
            inputs["images"] = [[Image.fromarray(np.ascontiguousarray(image.frames[0])) for image in images]]
        if videos:
            inputs |= {"videos": [[video.frames for video in videos]], "do_sample_frames": False}
            inputs["video_metadata"] = [[self._metadata(video) for video in videos]]
        for medium in media:
            inputs |= self._options(medium)
        return dict(
            self.processor(
                text=[self._contexts[media[0].kind] if text is None else text],
                return_tensors="pt",
                return_text_replacement_offsets=True,
                return_mm_token_type_ids=True,
                **inputs,
            )
        )

    def _options(self, medium: Medium) -> dict[str, Any]:
        """Return the client's options as the processor takes them. Where the edges of `size` are numbers of pixels,
        they are what `min_pixels` and `max_pixels` mean; some processors know only `size`, and others warn."""
        options: dict[str, Any] = {
            name: dict(value) if isinstance(value, tuple) else value for name, value in medium.options
        }
        part = self.processor.image_processor if medium.kind == "image" else self.processor.video_processor
        if not options.keys() & set(PIXELS) or not _size_is_area(part):
            return options
        size = dict(options.pop("size", None) or part.size)
        fewest, most = (options.pop(name, None) for name in PIXELS)
        size["shortest_edge"] = fewest or min(size["shortest_edge"], most)
        size["longest_edge"] = most or max(size["longest_edge"], fewest)
        return options | {"size": size}

    def _processed_jointly(self, media: tuple[ProcessedMedium, ...]) -> tuple[ProcessedMedium, ...]:
        """Process media once more, together, for families whose text for a medium depends on the others."""
        text = "".join(self._contexts[medium.kind] for medium in media)
        outputs = self._called(*media, text=text)
        tokens = np.isin(outputs["input_ids"][0].numpy(), self.visual)
        found: list[ProcessedMedium] = []
        for medium, offsets in zip(media, outputs["text_replacement_offsets"][0], strict=True):
            own = self.tokenizer(offsets["replacement"], add_special_tokens=False).input_ids
            tensors = dict(medium.tensors)
            if COUNT in tensors:  # its pixels and its encoder, too, are others for one picture than for several
                at = len([one for one in found if one.kind == "image"])
                tensors = {name: outputs[name] if name == COUNT else outputs[name][at : at + 1] for name in tensors}
            found.append(
                replace(
                    medium,
                    text=offsets["replacement"],
                    num_visual=int(np.isin(own, self.visual).sum()),
                    tensors=tensors,
                    options=(*medium.options, ("media", len(media))),  # so that caches tell them apart
                )
            )
        assert sum(medium.num_visual for medium in found) == int(tokens.sum())
        return tuple(found)

    @staticmethod
    def _metadata(video: Medium) -> FamilyMetadata:
        """Describe the sampled frames of a video, with their times."""
        num, seconds = len(video.frames), video.seconds_per_frame or SECONDS_PER_FRAME
        times = video.frame_times or tuple(number * seconds for number in range(num))
        height, width = video.frames.shape[1:3]
        source = video.source
        if source is not None and source.fps:
            numbers = [time * source.fps for time in times]
            if all(abs(number - round(number)) < EVEN for number in numbers):
                return FamilyMetadata(
                    total_num_frames=source.total_frames,
                    fps=source.fps,
                    width=source.width,
                    height=source.height,
                    duration=source.duration,
                    frames_indices=[round(number) for number in numbers],
                )
        return FamilyMetadata(
            total_num_frames=round(num * seconds * TICKS),
            fps=float(TICKS),
            width=width,
            height=height,
            duration=num * seconds,
            frames_indices=[round(time * TICKS) for time in times],
        )

    def most_frames(self, tokens: int) -> int:
        """Return about how many small frames of a video fit into so many tokens."""
        if not self.takes_videos:
            return max(1, tokens // self.processed(_sample("image")).num_visual)
        few, many = (
            self.processed(
                replace(_sample("video"), frames=np.full((num, SAMPLE, SAMPLE, 3), 128, np.uint8))
            ).num_visual
            for num in (4, 12)
        )
        return max(1, tokens * 8 // max(1, many - few))


def _found(text: str, tokens: Collection[str]) -> list[tuple[int, str]]:
    """Find placeholders in a text: (start, token), in order."""
    pattern = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))
    return [(match.start(), match[0]) for match in re.finditer(pattern, text)]


def _takes_ids_alone(method: Any) -> bool:
    """Return whether a method needs no argument but one."""
    if method is None:
        return False
    needed = [each for each in inspect.signature(method).parameters.values() if each.default is each.empty]
    return len(needed) == 1


def _frames_as_images(message: Message) -> Message:
    """Replace the videos of a message by their frames, for families that know only images."""
    content: list[str | Medium] = []
    for part in message.content:
        if isinstance(part, Medium) and part.kind == "video":
            content += [Medium("image", part.frames[i : i + 1]) for i in range(len(part.frames))]
        else:
            content.append(part)
    return replace(message, content=tuple(content))


def _size_is_area(part: Any) -> bool:
    """Return whether the edges of a processor's `size` are numbers of pixels, as in Qwen's and those like it."""
    resizes_by_area = hasattr(sys.modules[type(part).__module__], "smart_resize")
    return resizes_by_area and {"shortest_edge", "longest_edge"} <= dict(part.size or {}).keys()


def _sample(kind: str, side: int = SAMPLE) -> Medium:
    """Return a grey picture, or a grey clip of two frames."""
    if kind == "image":
        return Medium("image", np.full((1, side, side, 3), 128, np.uint8))
    return Medium("video", np.full((2, side, side, 3), 128, np.uint8), SECONDS_PER_FRAME)
