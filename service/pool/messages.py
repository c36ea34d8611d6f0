"""The whole protocol between the API process and a worker: plain structs as msgpack, each after its length.
Pixels lie in memory that both share (arena.py), where there is room.

    API                         worker
     |-- Load ------------------>|
     |<-------- Ready | LoadFailed
     |-- Submit ---------------->|
     |<--------------- Refused   |   cannot be served as asked; or else:
     |<--------------- Outputs   |   any number of times; the one with a finish_reason is the last
     |-- Abort ----------------->|   answered by Outputs with finish_reason "abort"
     |<--------------- Stats     |   unasked: ten times a second while it works, and when it falls idle
     |-- ReadDraft ------------->|   another draft, which is not used yet
     |<-- DraftReady | DraftRefused
     |-- UseDraft | DropDraft -->|   from the next step on; or never
     |<------------ DraftUsed    |   after UseDraft
     |-- Stop ------------------>|   the worker exits with 0

Every Submit ends in exactly one terminal message: Refused, or an output with a finish_reason. A worker that dies
ends nothing: its requests are sent to another one. What engine and service share is in model/request.py; this
module adds only what a socket needs.
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
)
from service.pool.arena import Arena, Shared

HEADER_BYTES = 4
MAX_FRAME_BYTES = 2**31


# API -> worker


class Load(msgspec.Struct, frozen=True, tag="load"):
    options: dict[str, Any]
    check: bool = False  # answer a request of our own before Ready


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    request_id: str
    messages: tuple[Message, ...]
    params: SamplingParams
    speculation: bool
    running_stats: bool = False
    salt: str = ""
    fit: bool = False

    @property
    def request(self) -> Request:
        own = (self.request_id, self.messages, self.params, self.speculation, self.running_stats, self.salt, self.fit)
        return Request(*own)


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    request_id: str


class ReadDraft(msgspec.Struct, frozen=True, tag="read_draft"):
    number: int  # of this change, in all messages about it
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


class DraftReady(msgspec.Struct, frozen=True, tag="draft_ready"):
    number: int


class DraftRefused(msgspec.Struct, frozen=True, tag="draft_refused"):
    number: int
    reason: str


class DraftUsed(msgspec.Struct, frozen=True, tag="draft_used"):
    number: int
    info: EngineInfo


DraftAnswer = DraftReady | DraftRefused | DraftUsed
ToWorker = Load | Submit | Abort | ReadDraft | UseDraft | DropDraft | Stop
FromWorker = Ready | LoadFailed | Refused | Outputs | Stats | DraftAnswer

from_worker: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)


class Pixels(msgspec.Struct, frozen=True, array_like=True):
    """How an array of frames is sent: as bytes, or as the place in the shared memory where they begin."""

    shape: tuple[int, int, int, int]
    frames: memoryview | int


def encoder(arena: Arena | None = None) -> msgspec.msgpack.Encoder:
    """Of what either side says; only the API sends pixels, and those that lie in the arena stay there."""

    def pixels(frames: Any) -> Pixels:
        if not isinstance(frames, np.ndarray):
            raise NotImplementedError(f"{type(frames)} cannot be sent")
        place = arena.place_of(frames) if arena is not None else None
        num_frames, height, width, channels = frames.shape
        data = np.ascontiguousarray(frames, np.uint8).reshape(-1).data if place is None else place
        return Pixels((num_frames, height, width, channels), data)

    return msgspec.msgpack.Encoder(enc_hook=pixels)


def to_worker(shared: Shared | None = None) -> msgspec.msgpack.Decoder[ToWorker]:
    """Reads what the API sends; pixels that did not come along are copied from the shared memory at once."""

    def frames(_: type[Any], sent: Any) -> np.ndarray:
        told = msgspec.convert(sent, Pixels)
        if isinstance(told.frames, int):
            if shared is None:
                raise ValueError("there is no shared memory")
            return shared.read(told.frames, math.prod(told.shape)).reshape(told.shape)
        return np.frombuffer(told.frames, np.uint8).reshape(told.shape)

    return msgspec.msgpack.Decoder(ToWorker, dec_hook=frames)


_plain = encoder()


def frame(message: ToWorker | FromWorker, encoder: msgspec.msgpack.Encoder = _plain) -> bytearray:
    buffer = bytearray(HEADER_BYTES)
    encoder.encode_into(message, buffer, HEADER_BYTES)
    buffer[:HEADER_BYTES] = _length(len(buffer) - HEADER_BYTES).to_bytes(HEADER_BYTES, "big")
    return buffer


class Frames:
    """Frames' payloads out of a stream of bytes that comes in pieces of any size."""

    def __init__(self) -> None:
        self._unread = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
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
    """One frame's payload from a blocking socket; None at the end of the stream."""
    header = _receive(sock, HEADER_BYTES)
    return None if header is None else _receive(sock, _length(int.from_bytes(header, "big")))


def _receive(sock: socket.socket, num_bytes: int) -> bytearray | None:
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
