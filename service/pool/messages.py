"""The protocol between the API process and a worker: length-prefixed msgpack structs.

Pixels lie in memory that both share (arena.py), or in the message where that memory is full.

    API                         worker
     |-- Load ------------------>|
     |<-------- Ready | LoadFailed
     |-- Submit ---------------->|
     |<--------------- Refused   |   the request is invalid; otherwise:
     |<--------------- Outputs   |   any number of times; the one with a finish_reason is the last
     |-- Abort ----------------->|   answered by Outputs with finish_reason "abort"
     |<--------------- Stats     |   ten times a second while the engine works, and when it becomes idle
     |-- Sample ---------------->|   which frames of a video does the target want?
     |<------ Sampled | NotAnswered
     |-- Tokenize -------------->|   which tokens are these messages, or this text?
     |<---- Tokenized | NotAnswered
     |-- Detokenize ------------>|   which text are these tokens?
     |<-- Detokenized | NotAnswered
     |-- ReadDraft ------------->|   load another draft without using it
     |<-- DraftReady | DraftRefused
     |-- UseDraft | DropDraft -->|   use it from the next step on; or forget it
     |<------------ DraftUsed    |   after UseDraft
     |-- Stop ------------------>|   the worker exits with 0

Every Submit ends in exactly one terminal message: Refused, or an output with a finish_reason. When a worker dies, the
pool sends its requests to another one. The types that engine and service share are in model/request.py.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np

from model.request import (
    EngineInfo,
    EngineStats,
    Message,
    Request,
    RequestOutput,
    SamplingParams,
    TemplateOptions,
    VideoMetadata,
)
from service.pool.arena import Arena, ArenaReader

HEADER_BYTES = 4
MAX_FRAME_BYTES = 2**31


# API -> worker


class Load(msgspec.Struct, frozen=True, tag="load"):
    options: dict[str, Any]
    self_test: bool = False  # decode a few tokens before Ready


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    """One request; its fields are those of `model.request.Request`."""

    request_id: str
    messages: tuple[Message, ...]
    params: SamplingParams
    speculation: bool
    running_stats: bool = False
    salt: str = ""
    clamp_max_tokens: bool = False
    template: TemplateOptions = TemplateOptions()
    prompt: str | tuple[int, ...] | None = None

    @property
    def request(self) -> Request:
        """The same request in the engine's type."""
        return Request(*(getattr(self, name) for name in self.__struct_fields__))


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    request_id: str


class Sample(msgspec.Struct, frozen=True, tag="sample"):
    """Asks for the frames of a video; the client may have sent num_frames or fps."""

    number: int  # identifies this question
    source: VideoMetadata
    num_frames: int | None
    fps: float | None


class Tokenize(msgspec.Struct, frozen=True, tag="tokenize"):
    """Asks for the tokens of a prompt; its fields are those of Submit."""

    number: int  # identifies this question
    messages: tuple[Message, ...]
    template: TemplateOptions
    prompt: str | tuple[int, ...] | None

    @property
    def request(self) -> Request:
        """The request that would have this prompt."""
        return Request("", self.messages, template=self.template, prompt=self.prompt)


class Detokenize(msgspec.Struct, frozen=True, tag="detokenize"):
    """Asks for the text of tokens."""

    number: int  # identifies this question
    ids: tuple[int, ...]


class ReadDraft(msgspec.Struct, frozen=True, tag="read_draft"):
    number: int  # identifies this change in all messages about it
    folder: str


class UseDraft(msgspec.Struct, frozen=True, tag="use_draft"):
    number: int


class DropDraft(msgspec.Struct, frozen=True, tag="drop_draft"):
    number: int


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    pass


# worker -> API


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    info: EngineInfo


class LoadFailed(msgspec.Struct, frozen=True, tag="load_failed"):
    reason: str


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    request_id: str
    message: str
    param: str | None
    code: str


class Outputs(msgspec.Struct, frozen=True, tag="outputs"):
    outputs: tuple[RequestOutput, ...]


class Stats(msgspec.Struct, frozen=True, tag="stats"):
    stats: EngineStats


class Sampled(msgspec.Struct, frozen=True, tag="sampled"):
    number: int
    indices: tuple[int, ...] | None  # None: the target has no opinion


class Tokenized(msgspec.Struct, frozen=True, tag="tokenized"):
    number: int
    ids: tuple[int, ...]
    names: tuple[str, ...]  # of these tokens in the vocabulary


class Detokenized(msgspec.Struct, frozen=True, tag="detokenized"):
    number: int
    text: str


class NotAnswered(msgspec.Struct, frozen=True, tag="not_answered"):
    number: int
    reason: str | None  # for the client; None: the engine failed
    param: str | None = None
    code: str | None = None


class DraftReady(msgspec.Struct, frozen=True, tag="draft_ready"):
    number: int


class DraftRefused(msgspec.Struct, frozen=True, tag="draft_refused"):
    number: int
    reason: str


class DraftUsed(msgspec.Struct, frozen=True, tag="draft_used"):
    number: int
    info: EngineInfo


Question = Sample | Tokenize | Detokenize
Reply = Sampled | Tokenized | Detokenized | NotAnswered
DraftReply = DraftReady | DraftRefused | DraftUsed
ToWorker = Load | Submit | Abort | Question | ReadDraft | UseDraft | DropDraft | Stop
FromWorker = Ready | LoadFailed | Refused | Outputs | Stats | Reply | DraftReply

from_worker: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)


class Pixels(msgspec.Struct, frozen=True, array_like=True):
    """An array of frames: its bytes, or their offset in the shared memory."""

    shape: tuple[int, int, int, int]
    frames: memoryview | int


def encoder(arena: Arena | None = None) -> msgspec.msgpack.Encoder:
    """Return an encoder of all messages; it sends arrays that lie in `arena` as their offset."""

    def pixels(frames: Any) -> Pixels:
        if not isinstance(frames, np.ndarray):
            raise NotImplementedError(f"{type(frames)} cannot be sent")
        offset = arena.offset_of(frames) if arena is not None else None
        num_frames, height, width, channels = frames.shape
        data = np.ascontiguousarray(frames, np.uint8).reshape(-1).data if offset is None else offset
        return Pixels((num_frames, height, width, channels), data)

    return msgspec.msgpack.Encoder(enc_hook=pixels)


def to_worker(arena: ArenaReader | None = None) -> msgspec.msgpack.Decoder[ToWorker]:
    """Return a decoder of the API's messages; it copies pixels out of `arena` at once."""

    def frames(_: type[Any], value: Any) -> np.ndarray:
        pixels = msgspec.convert(value, Pixels)
        if isinstance(pixels.frames, int):
            if arena is None:
                raise ValueError("there is no shared memory")
            return arena.read(pixels.frames, math.prod(pixels.shape)).reshape(pixels.shape)
        return np.frombuffer(pixels.frames, np.uint8).reshape(pixels.shape)

    return msgspec.msgpack.Decoder(ToWorker, dec_hook=frames)


_plain = encoder()


def frame(message: ToWorker | FromWorker, encoder: msgspec.msgpack.Encoder = _plain) -> bytearray:
    """Encode a message behind its length."""
    buffer = bytearray(HEADER_BYTES)
    encoder.encode_into(message, buffer, HEADER_BYTES)
    buffer[:HEADER_BYTES] = _length(len(buffer) - HEADER_BYTES).to_bytes(HEADER_BYTES, "big")
    return buffer


class FrameReader:
    """Splits a stream of bytes into the payloads of its frames."""

    def __init__(self) -> None:
        self._unread = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Add bytes of any number; yield every payload that is now complete."""
        unread = self._unread
        unread += data
        while len(unread) >= HEADER_BYTES:
            end = HEADER_BYTES + _length(int.from_bytes(unread[:HEADER_BYTES], "big"))
            if len(unread) < end:
                break
            payload = bytes(unread[HEADER_BYTES:end])
            del unread[:end]
            yield payload


def receive_frame(sock: socket.socket) -> bytearray | None:
    """Read one frame's payload from a blocking socket; return None at the end of the stream."""
    header = _receive(sock, HEADER_BYTES)
    return None if header is None else _receive(sock, _length(int.from_bytes(header, "big")))


def _receive(sock: socket.socket, num_bytes: int) -> bytearray | None:
    """Receive exactly so many bytes; return None at the end of the stream."""
    buffer = bytearray(num_bytes)
    view = memoryview(buffer)
    while view:
        received = sock.recv_into(view)
        if received == 0:
            return None
        view = view[received:]
    return buffer


def _length(num_bytes: int) -> int:
    if num_bytes > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {num_bytes} bytes is over the limit of {MAX_FRAME_BYTES}")
    return num_bytes
