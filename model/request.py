"""Defines the engine's inputs and outputs: plain dataclasses, no tensors.

This module is the whole interface between `model/` and its callers (the service, the command line, the benchmark).
Importing it loads no torch.
"""

from __future__ import annotations

import builtins
import hashlib
import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar, Literal

import numpy as np

FinishReason = Literal["stop", "length", "abort", "error"]
TokenSource = Literal["draft", "target"]
Kind = Literal["image", "video"]  # of a medium


GrammarKind = Literal["json_schema", "json_object", "regex", "choice", "lark", "gbnf"]
# Options of llguidance for JSON, which is written as Python's json.dumps writes it. Free white space would let a model
# write blanks for ever, and would leave nothing between values that is sure to come.
JSON_OPTIONS: dict[str, Any] = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}


class RequestError(ValueError):
    """Reports an invalid request; the message tells its sender what to change.

    `param` names the field at fault, `code` is a short machine-readable reason.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str = "invalid_request") -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


@dataclass(frozen=True)
class Grammar:
    """Says which texts an answer may be (model/decoding/grammar.py).

    source: a JSON schema as JSON text; a regular expression; a JSON list of strings to choose from; a grammar in Lark's
    notation with llguidance's extensions, or in llama.cpp's GBNF; for `json_object` it is empty. param: the field of
    the request that errors name.
    """

    kind: GrammarKind
    source: str = ""
    param: str = "response_format"


@dataclass(frozen=True)
class SamplingParams:
    """Says how tokens are chosen. `temperature == 0` is greedy; all randomness depends on `seed` alone.

    Raises RequestError if a value is out of range.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0  # before this, neither an end-of-sequence token nor a stop string ends the answer
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, bias added to its logit), each token once
    logprobs: int | None = None  # number of likeliest tokens to report with each token; None: no log-probabilities
    grammar: Grammar | None = None  # None: the answer may be any text
    shown_tokens: tuple[int, ...] = ()  # special tokens whose text is part of the answer's
    stop_token_ids: tuple[int, ...] = ()  # these tokens end the answer, as an end-of-sequence token does
    include_stop: bool = False  # the text ends with the stop string that ended the answer, not before it
    skip_special_tokens: bool = True  # False: the names of all special tokens are part of the text

    @property
    def processes(self) -> bool:
        """Return whether logits processors apply (processors.py)."""
        return bool(
            self.logit_bias
            or self.min_tokens
            or self.presence_penalty
            or self.frequency_penalty
            or self.repetition_penalty != 1.0
            or self.grammar
        )

    def ends(self, eos_ids: frozenset[int]) -> frozenset[int]:
        """Return the tokens that end the answer. eos_ids: the target's end-of-sequence tokens, which always end a
        grammar."""
        eos = frozenset[int]() if self.ignore_eos and self.grammar is None else eos_ids
        return eos.union(self.stop_token_ids) if self.stop_token_ids else eos

    @property
    def is_greedy(self) -> bool:
        """Return whether the likeliest token is chosen as the target gives it, of those that the grammar allows."""
        return self.temperature == 0.0 and not replace(self, grammar=None).processes

    def __post_init__(self) -> None:
        checks = {
            "max_tokens": self.max_tokens >= 1,
            "temperature": 0.0 <= self.temperature <= 100.0,
            "top_p": 0.0 < self.top_p <= 1.0,
            "top_k": self.top_k >= 0,
            "min_p": 0.0 <= self.min_p <= 1.0,
            "stop": all(self.stop),
            "min_tokens": 0 <= self.min_tokens <= self.max_tokens,
            "presence_penalty": -2.0 <= self.presence_penalty <= 2.0,
            "frequency_penalty": -2.0 <= self.frequency_penalty <= 2.0,
            "repetition_penalty": 0.0 < self.repetition_penalty <= 100.0,
            "logit_bias": all(-100.0 <= bias <= 100.0 for _, bias in self.logit_bias),
            "logprobs": self.logprobs is None or self.logprobs >= 0,
        }
        for name, ok in checks.items():
            if not ok:
                raise RequestError(f"{name} is out of range: {getattr(self, name)!r}", param=name)


@dataclass(frozen=True)
class VideoMetadata:
    """Describes the video from which frames are sampled.

    fps: frames per second, the mean where they vary; None if unknown; duration: seconds, None if unknown; width and
    height: pixels, as the file stores them.
    """

    total_frames: int
    fps: float | None
    duration: float | None
    width: int
    height: int


OptionValue = bool | int | float | tuple[tuple[str, int], ...]  # the last one: a size such as {"height": 448}
# The options of processors that a request may set, as transformers names them. A target takes those that its own
# processors know. What chooses frames (num_frames, fps) is no option here: it is done when they have arrived.
MEDIA_OPTIONS = (
    *("min_pixels", "max_pixels", "size"),
    *("do_image_splitting", "crop_to_patches", "min_patches", "max_patches"),
    *("do_pan_and_scan", "pan_and_scan_min_crop_size", "pan_and_scan_max_num_crops"),
    "pan_and_scan_min_ratio_to_activate",
    *("max_soft_tokens", "min_image_tokens", "max_image_tokens", "max_num_patches"),
)


@dataclass(frozen=True, eq=False)
class Medium:
    """One image (one frame) or one video (its sampled frames), decoded.

    frames: (num_frames, height, width, 3) uint8 RGB; seconds_per_frame: mean seconds between the frames of a video,
    None if unknown (a target that uses it then assumes half a second); frame_times: seconds from the start of the video
    at which each frame appears, None if unknown; source: the video that the frames were sampled from, None for images
    and where nothing is known of it; options: the client's options for the model's processor, by name. Raises
    RequestError if a time is out of range.
    """

    kind: Kind
    frames: np.ndarray
    seconds_per_frame: float | None = None
    frame_times: tuple[float, ...] | None = None
    source: VideoMetadata | None = None
    options: tuple[tuple[str, OptionValue], ...] = ()

    def __post_init__(self) -> None:
        if self.seconds_per_frame is not None and not 0.0 < self.seconds_per_frame < math.inf:
            raise RequestError(f"seconds_per_frame is out of range: {self.seconds_per_frame!r}", param="messages")
        times = self.frame_times
        if times is None:
            return
        if len(times) != len(self.frames):
            raise RequestError(f"there are {len(times)} frame_times for {len(self.frames)} frames", param="messages")
        if not all(0.0 <= time < math.inf for time in times) or any(a > b for a, b in pairwise(times)):
            raise RequestError("frame_times must ascend from 0 or later", param="messages")

    def frames_between(self, first: int, end: int) -> Medium:
        """Return the medium with its frames first..end alone."""
        times = self.frame_times and self.frame_times[first:end]
        return replace(self, frames=self.frames[first:end], frame_times=times)

    @cached_property
    def digest(self) -> bytes:
        """Compute the SHA-256 of kind, shape, pixels and options, which features depend on. It is cached: for a video
        it takes milliseconds."""
        digest = hashlib.sha256(f"{self.kind}|{self.frames.shape}|{self.frames.dtype}|{self.options}|".encode())
        digest.update(np.ascontiguousarray(self.frames).data)
        return digest.digest()

    @cached_property
    def prompt_digest(self) -> bytes:
        """Compute the SHA-256 of all that the medium's part of a prompt depends on: features, positions, timestamps."""
        times = f"{self.seconds_per_frame}|{self.frame_times}|{self.source}"
        return hashlib.sha256(self.digest + times.encode()).digest()


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool that an assistant message made. arguments: a JSON object as JSON text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, eq=False)
class Message:
    """One chat turn. `content` has texts and media in the user's order.

    tool_calls and reasoning: of an assistant message; tool_call_id: of the call that a tool message answers; name: of
    the tool or speaker.
    """

    role: Literal["system", "user", "assistant", "tool"]
    content: tuple[str | Medium, ...]
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning: str | None = None
    tool_call_id: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class TemplateOptions:
    """What the chat template gets beside the messages.

    tools: a list of tools in OpenAI's form as JSON text, "" for none; variables: further variables of the template, a
    JSON object as JSON text, "" for none; continue_final_message: the answer continues the last message, whose turn
    stays open; add_generation_prompt: the prompt ends where an answer begins; add_special_tokens: for a text in place
    of messages, add the tokens that the tokenizer adds by itself; max_tokens: keep no more than the last so many tokens
    of the prompt, None for all.
    """

    tools: str = ""
    variables: str = ""
    continue_final_message: bool = False
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    max_tokens: int | None = None


@dataclass(frozen=True, eq=False)
class Request:
    """One conversation and how to decode its answer."""

    request_id: str
    messages: tuple[Message, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    speculation: bool = True
    running_stats: bool = False  # put `stats` into every output, not only the last
    salt: str = ""  # requests share the prefix and encoder caches only with those of the same salt
    clamp_max_tokens: bool = False  # lower max_tokens to the room left in the context
    template: TemplateOptions = field(default_factory=TemplateOptions)
    prompt: str | tuple[int, ...] | None = None  # a text or token ids that are used as they are, instead of messages


@dataclass(slots=True)  # not frozen: a frozen one takes three times as long to create, once per token
class Token:
    """One emitted token. `text` is the text that it adds to the answer (may be empty, see detokenize.py)."""

    id: int
    text: str
    source: TokenSource


@dataclass(slots=True)
class TokenLogprob:
    """A token's log-probability (natural) in the target's distribution, before logits processors."""

    id: int
    bytes: builtins.bytes  # of the token's text; may be a part of a character
    logprob: float


@dataclass(slots=True)
class TokenLogprobs:
    """The log-probabilities of a token of the answer and of the likeliest tokens at its position, likeliest first."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class RequestStats:
    """Counts and times of one request so far. Times in seconds, measured inside the engine."""

    prompt_tokens: int
    completion_tokens: int
    drafts: int  # verify steps with draft tokens
    draft_tokens: int  # draft tokens verified
    accepted_tokens: int
    queue: float  # from add() to the first prefill chunk
    time_to_first_token: float  # from add() to the first token
    decode: float  # from the first token to the last
    cached_tokens: int = 0  # prompt tokens found in the prefix cache


@dataclass(slots=True)  # not frozen, like Token
class RequestOutput:
    """The result of one step for one request. Exactly one output per request, the last, has a `finish_reason`."""

    request_id: str
    text: str  # added in this step
    tokens: tuple[Token, ...]
    finish_reason: FinishReason | None = None
    stats: RequestStats | None = None  # in the last output; with `running_stats` in every one
    error: str | None = None  # with finish_reason == "error"
    logprobs: tuple[TokenLogprobs, ...] | None = None  # one per token, where requested
    stop_reason: str | int | None = None  # the stop string, or the one of stop_token_ids, that ended the answer


@dataclass(frozen=True)
class Area:
    """Resizes by area, as transformers' Qwen2-VL processors do.

    Sides become multiples of `multiple`, the number of pixels lies between `min_pixels` and `max_pixels`, and the
    aspect ratio stays about the same.
    """

    multiple: int
    min_pixels: int
    max_pixels: int  # of an image, or of one frame of a video
    all_frames: int | None = None  # maximum pixels of all frames of a video together; None: no limit

    MAX_RATIO: ClassVar[int] = 200  # of the longer side to the shorter
    SLACK: ClassVar[float] = 1.05  # a frame may always have this many times `min_pixels`, regardless of `all_frames`

    def most(self, num_frames: int) -> int:
        """Return how many pixels each of `num_frames` frames may have at most."""
        if self.all_frames is None:
            return self.max_pixels
        return max(min(self.max_pixels, self.all_frames // num_frames), int(self.min_pixels * self.SLACK))

    def fitted(self, height: int, width: int, num_frames: int = 1) -> tuple[int, int]:
        """Return (height, width) after resizing. Rounding may exceed the bounds by one multiple."""
        sides, unit, max_pixels = (height, width), self.multiple, self.most(num_frames)
        new_height, new_width = (round(side / unit) * unit for side in sides)
        if new_height * new_width > max_pixels:
            shrink = math.sqrt(height * width / max_pixels)
            new_height, new_width = (max(unit, math.floor(side / shrink / unit) * unit) for side in sides)
        elif new_height * new_width < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            new_height, new_width = (math.ceil(side * grow / unit) * unit for side in sides)
        return new_height, new_width

    @property
    def longest(self) -> int:
        """Return an upper bound on a side, in pixels. Rounding may at most double a narrow picture's aspect ratio."""
        return math.isqrt(2 * self.MAX_RATIO * self.most(1)) + 2 * self.multiple

    def largest(self, num_frames: int) -> int:
        """Return an upper bound on the pixels of one of `num_frames` frames: rounding adds at most one strip."""
        return self.most(num_frames) + self.multiple * self.longest

    def holds(self, height: int, width: int, num_frames: int = 1) -> bool:
        """Return whether this size may be a result of `fitted`."""
        unit = self.multiple
        within = (height - unit) * (width - unit) < self.most(num_frames) and self.min_pixels < (height + unit) * (
            width + unit
        )
        return min(height, width) >= unit and height % unit == width % unit == 0 and within


@dataclass(frozen=True)
class Geometry:
    """Describes what the target wants of the media decoder: sizes, and who chooses the frames of a video.

    A size is that of the target's image processor, so that the media decoder can resize early. Where none is set,
    pictures keep their own size, and the target's processor resizes them.

    The steps are those of transformers' CLIP-style processors: resize (with PIL's `resample` filter), then centre-crop.
    `exact` resizes to (height, width); otherwise the shortest edge becomes `shortest_edge`. For resizing by area,
    `image` and `video` are set and the first three are None.
    """

    exact: tuple[int, int] | None = None  # (height, width)
    shortest_edge: int | None = None
    crop: tuple[int, int] | None = None  # (height, width)
    resample: int = 3  # PIL.Image.Resampling value
    default_num_frames: int = 8  # of a video, where neither the client nor the target chooses
    image: Area | None = None
    video: Area | None = None  # set together with `image`; applies to each frame of a video
    samples_frames: bool = False  # the target chooses the frames of a video (`sample_frames`), given its metadata
    image_options: tuple[str, ...] = ()  # of MEDIA_OPTIONS, what the target's image processor takes
    video_options: tuple[str, ...] = ()  # the same of its video processor
    size_is_area: bool = False  # the edges of the option `size` are numbers of pixels, as in Qwen's processors
    max_ratio: int = 200  # of the longer side to the shorter, for pictures that keep their size

    @property
    def depends_on_file(self) -> bool:
        """Return whether only the file's own size bounds that of a picture."""
        return self.crop is None and self.exact is None and self.image is None

    def options(self, kind: Kind) -> tuple[str, ...]:
        """Return the names of the options that a Medium of this kind may carry."""
        return self.image_options if kind == "image" else self.video_options

    def area(self, kind: Kind) -> Area | None:
        """Return the bounds for resizing by area; None if this geometry does not resize by area."""
        return self.image if kind == "image" else self.video

    def largest(self, kind: Kind, num_frames: int) -> int | None:
        """Return an upper bound on the pixels of one of `num_frames` frames; None where it depends on the file."""
        if (size := self.crop or self.exact) is not None:
            return size[0] * size[1]
        area = self.area(kind)
        return None if area is None else area.largest(num_frames)

    def fits(self, kind: Kind, num_frames: int, height: int, width: int) -> bool:
        """Return whether frames of this size may be a result of this geometry."""
        if (size := self.crop or self.exact) is not None:
            return (height, width) == size
        area = self.area(kind)
        return area is None or area.holds(height, width, num_frames)


@dataclass(frozen=True)
class ChatFormat:
    """Describes how answers show reasoning and tool calls, as the chat template has them.

    calls: the notation of calls, by its name in vLLM (hermes, qwen3_coder, llama3_json, pythonic, mistral, glm45); ""
    if requests cannot have tools; described: the template knows no tools, so that the system message describes them;
    reasoning: the texts that begin and end it, None if there is none; thinking: the template's variable that turns it
    on and off, "" if it has none; thinks, thinks_on, thinks_off: whether a prompt ends within the reasoning, without
    this variable and with it; tokens: those of these texts, and of the texts of calls, that are tokens of their own.
    """

    calls: str = ""
    described: bool = False
    reasoning: tuple[str, str] | None = None
    thinking: str = ""
    thinks: bool = False
    thinks_on: bool = False
    thinks_off: bool = False
    tokens: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class EngineInfo:
    """Properties of a loaded engine."""

    model: str  # name or path of the checkpoint
    device: str
    dtype: str
    backend: str  # "torch", or the build of the native library, and "vision torch" if that computes the decoder alone
    drafter: str  # its name, or "off"
    max_model_len: int  # prompt + answer, tokens
    max_num_seqs: int
    tokens_per_image: int  # the maximum, if it depends on the image
    geometry: Geometry
    max_frames: int  # of one video that fit the context, at the smallest frame size
    memory: dict[str, int] = field(default_factory=dict)  # maximum bytes, by purpose
    chat: ChatFormat = ChatFormat()


@dataclass(frozen=True)
class EngineStats:
    """Present gauges, and counts since the previous call of `Engine.pop_stats`."""

    running: int
    waiting: int
    kv_cache_usage: float  # 0..1: tokens in the cache / tokens that fit
    prompt_tokens: int = 0
    generation_tokens: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_per_position: tuple[int, ...] = ()  # index 0: first draft position
    encoder_cache_queries: int = 0
    encoder_cache_hits: int = 0
    prefix_cache_queries: int = 0  # prompt tokens
    prefix_cache_hits: int = 0
    acceptance_lengths: tuple[int, ...] = ()  # one per sequence with a draft and verify step; bonus token included
    batch_sizes: tuple[int, ...] = ()  # sequences decoded in each step
    step_tokens: tuple[int, ...] = ()  # prompt tokens and generated ones of each step
    step_seconds: tuple[tuple[str, float], ...] = ()  # ("vision"|"prefill"|"draft"|"verify", seconds)
