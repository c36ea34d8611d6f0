"""What goes into the engine and what comes out of it: plain frozen data, no tensors, no torch.

This module is the whole border between `model/` and whoever drives it (the service's worker, the
command line, the benchmark). It can be imported without torch.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Literal

import numpy as np

FinishReason = Literal["stop", "length", "abort", "error"]
TokenSource = Literal["draft", "target"]


class RequestError(ValueError):
    """The request cannot be served as asked; the message tells its sender what to change.

    `param` names the offending field, `code` is a short machine-readable reason.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str = "invalid_request") -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. `temperature == 0` is greedy; `seed` alone fixes all randomness."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0  # before so many the answer does not end by itself, nor at a stop string
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, what is added to its logit), each token once
    logprobs: int | None = None  # how many of the likeliest tokens are told with each of the answer's; None: nothing

    @property
    def processes(self) -> bool:
        """Whether logits are changed before a token is chosen (processors.py)."""
        return bool(
            self.logit_bias
            or self.min_tokens
            or self.presence_penalty
            or self.frequency_penalty
            or self.repetition_penalty != 1.0
        )

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


@dataclass(frozen=True, eq=False)
class Medium:
    """One image (one frame) or one video (its sampled frames), decoded and already at the target's geometry.

    frames: (num_frames, height, width, 3) uint8 RGB. seconds_per_frame: of a video, the time from one of its frames to
    the next, on average; None where nobody knows (a target that reads it then takes half a second).
    """

    kind: Literal["image", "video"]
    frames: np.ndarray
    seconds_per_frame: float | None = None

    def __post_init__(self) -> None:
        if self.seconds_per_frame is not None and not 0.0 < self.seconds_per_frame < math.inf:
            raise RequestError(f"seconds_per_frame is out of range: {self.seconds_per_frame!r}", param="messages")

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 over kind, shape and pixels: what features depend on. Takes milliseconds for a video: whoever has the
        time may ask early."""
        digest = hashlib.sha256(f"{self.kind}|{self.frames.shape}|{self.frames.dtype}|".encode())
        digest.update(np.ascontiguousarray(self.frames).data)
        return digest.digest()


@dataclass(frozen=True, eq=False)
class Message:
    """One chat turn. `content` holds text and media in the order in which the user gave them."""

    role: Literal["system", "user", "assistant"]
    content: tuple[str | Medium, ...]


@dataclass(frozen=True, eq=False)
class Request:
    request_id: str
    messages: tuple[Message, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    speculation: bool = True
    running_stats: bool = False  # whether every output says what the request has cost so far
    salt: str = ""  # only requests with the same one share what is computed or seen once
    fit: bool = False  # whether max_tokens may be lowered to what the context has room for


@dataclass(slots=True)  # not frozen: one is made for every token, and that would take three times as long
class Token:
    """One emitted token; `text` is what it added to the answer (may be empty, see detokenize.py)."""

    id: int
    text: str
    source: TokenSource


@dataclass(slots=True)
class Likelihood:
    """Of a token the natural logarithm of its probability, as the target has it: before its logits are processed."""

    id: int
    said: bytes  # what the token stands for; it may be a part of a character
    logprob: float


@dataclass(slots=True)
class Likelihoods:
    """Of a token of an answer; and of those that were likeliest there, the likeliest first."""

    chosen: Likelihood
    top: tuple[Likelihood, ...]


@dataclass(frozen=True)
class RequestStats:
    """What one request cost: a finished one, or one so far. Times in seconds, measured inside the engine."""

    prompt_tokens: int
    completion_tokens: int
    drafts: int  # verify steps that carried draft tokens
    draft_tokens: int  # tree nodes proposed and verified
    accepted_tokens: int
    queue: float  # from add() to the first prefill chunk
    time_to_first_token: float  # from add() to the first token
    decode: float  # from the first token to the last
    cached_tokens: int = 0  # of the prompt, taken over from a request that began alike


@dataclass(slots=True)  # not frozen, as Token
class RequestOutput:
    """What one step did for one request. Exactly one output per request carries a `finish_reason`; it is the last."""

    request_id: str
    text: str  # the text this step added
    tokens: tuple[Token, ...]
    finish_reason: FinishReason | None = None
    stats: RequestStats | None = None  # with finish_reason; with every output where the request asks for it
    error: str | None = None  # with finish_reason == "error"
    logprobs: tuple[Likelihoods, ...] | None = None  # one for every token, where the request asks for them


@dataclass(frozen=True)
class Area:
    """Sizes by area, as transformers' Qwen2-VL processors have them: sides become multiples of `multiple`, pixels a
    number from `min_pixels` to `max_pixels`, and proportions stay about what they were."""

    multiple: int
    min_pixels: int
    max_pixels: int  # of an image, or of a frame of a video
    all_frames: int | None = None  # pixels that the frames of a video may have together; None: no such limit

    MAX_RATIO: ClassVar[int] = 200  # of the longer side to the shorter
    SLACK: ClassVar[float] = 1.05  # many frames share `all_frames`, but each may have this many times `min_pixels`

    def most(self, num_frames: int) -> int:
        """Pixels of one frame of so many."""
        if self.all_frames is None:
            return self.max_pixels
        return max(min(self.max_pixels, self.all_frames // num_frames), int(self.min_pixels * self.SLACK))

    def fitted(self, height: int, width: int, num_frames: int = 1) -> tuple[int, int]:
        """(height, width) that a picture of this size is to have. Rounding may lead out of the bounds by a multiple."""
        sides, unit, most = (height, width), self.multiple, self.most(num_frames)
        down, across = (round(side / unit) * unit for side in sides)
        if down * across > most:
            shrink = math.sqrt(height * width / most)
            down, across = (max(unit, math.floor(side / shrink / unit) * unit) for side in sides)
        elif down * across < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            down, across = (math.ceil(side * grow / unit) * unit for side in sides)
        return down, across

    @property
    def longest(self) -> int:
        """Pixels along a side, at most: narrow pictures may be half as narrow again after rounding."""
        return math.isqrt(2 * self.MAX_RATIO * self.most(1)) + 2 * self.multiple

    def largest(self, num_frames: int) -> int:
        """Pixels of one frame of so many, at most: rounding may lead beyond `most`, but by no more than a strip."""
        return self.most(num_frames) + self.multiple * self.longest

    def holds(self, height: int, width: int, num_frames: int = 1) -> bool:
        """Whether `fitted` may have given this size."""
        unit = self.multiple
        within = (height - unit) * (width - unit) < self.most(num_frames) and self.min_pixels < (height + unit) * (
            width + unit
        )
        return min(height, width) >= unit and height % unit == width % unit == 0 and within


@dataclass(frozen=True)
class Geometry:
    """The size to which the target's image processor brings a frame, so that decoding can do it early.

    Same steps and order as transformers' CLIP-style processors: resize (with PIL's `resample` filter), then
    centre-crop. `exact` resizes to (height, width); otherwise the shortest edge becomes `shortest_edge`. Where sizes
    go by area, `image` and `video` say how, and the three others are None.
    """

    exact: tuple[int, int] | None  # (height, width)
    shortest_edge: int | None
    crop: tuple[int, int] | None  # (height, width)
    resample: int  # PIL.Image.Resampling value
    default_num_frames: int
    image: Area | None = None
    video: Area | None = None  # with `image`, of every frame of a video

    def area(self, kind: Literal["image", "video"]) -> Area | None:
        return self.image if kind == "image" else self.video

    def largest(self, kind: Literal["image", "video"], num_frames: int) -> int | None:
        """Pixels of one frame of so many, at most; None where that depends on the file alone."""
        if (size := self.crop or self.exact) is not None:
            return size[0] * size[1]
        area = self.area(kind)
        return None if area is None else area.largest(num_frames)

    def fits(self, kind: Literal["image", "video"], num_frames: int, height: int, width: int) -> bool:
        """Whether frames of this size may have been brought to it."""
        if (size := self.crop or self.exact) is not None:
            return (height, width) == size
        area = self.area(kind)
        return area is None or area.holds(height, width, num_frames)


@dataclass(frozen=True)
class EngineInfo:
    """What a loaded engine tells about itself."""

    model: str  # name or path it was loaded from
    device: str
    dtype: str
    backend: str  # what computes the layers: "torch", or the build of the native library
    drafter: str  # its name, or "off"
    max_model_len: int  # prompt + answer, tokens
    max_num_seqs: int
    tokens_per_image: int  # at most, where that depends on the image
    geometry: Geometry
    max_frames: int  # of one video, that the context has room for; fewer where frames are larger than they must be
    memory: dict[str, int] = field(default_factory=dict)  # bytes that it takes at most, by what for


@dataclass(frozen=True)
class EngineStats:
    """Gauges now, and everything counted since the previous call of `Engine.pop_stats`."""

    running: int
    waiting: int
    kv_cache_usage: float  # 0..1, exact: tokens held / tokens that fit
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
    acceptance_lengths: tuple[int, ...] = ()  # one per verify step and sequence that had a draft; bonus token included
    batch_sizes: tuple[int, ...] = ()  # sequences of each step that decoded
    step_seconds: tuple[tuple[str, float], ...] = ()  # ("vision"|"prefill"|"draft"|"verify", seconds)
