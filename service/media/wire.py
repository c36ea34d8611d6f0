"""Everything that passes between the service and a decoding child: frames of

    length of message (4 bytes) | length of payload (8 bytes) | message | payload

The message is JSON of one of the types below, the payload raw bytes: a file one way, pixels the other. No pickle, and
every field is checked on arrival: a child that decodes hostile bytes is not trusted.

    parent -> child   Job, with the file
    child  -> parent  Ready once; then for each job Decoded (with the pixels) or Refused
"""

from __future__ import annotations

import struct

import msgspec

from model.request import Geometry
from service.media.limits import MediaLimits
from service.media.sniff import Format, Kind

PREFIX = struct.Struct("!IQ")
MAX_MESSAGE = 64 * 1024  # bytes


class WireError(ValueError):
    """The other side did not speak this protocol."""


class Setup(msgspec.Struct, frozen=True):
    """What a child is told on its command line."""

    limits: MediaLimits
    geometry: Geometry


class Job(msgspec.Struct, frozen=True, tag="job"):
    """`kind` is what the file is decoded to: a GIF may be either. Exactly one of `num_frames` and `fps` is set
    for a video, but neither for a list of frames of which all are taken."""

    kind: Kind
    format: Format
    num_frames: int | None = None
    fps: float | None = None
    cpu_seconds: float = 0.0  # processor time that it may use; 0: no limit


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The child has started and waits for its first job."""


class Decoded(msgspec.Struct, frozen=True, tag="decoded"):
    shape: tuple[int, int, int, int]  # (frames, height, width, 3), uint8
    seconds_per_frame: float | None = None  # of a video, see model.request.Medium


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """A key of refusal.py's table, and the numbers of its sentence."""

    name: str
    numbers: dict[str, int] = {}


Reply = Ready | Decoded | Refused

_jobs = msgspec.json.Decoder(Job)
_replies: msgspec.json.Decoder[Reply] = msgspec.json.Decoder(Reply)


def pack(message: Job | Reply, num_payload: int = 0) -> bytes:
    """All of a frame up to its payload."""
    text = msgspec.json.encode(message)
    return PREFIX.pack(len(text), num_payload) + text


def unpack_prefix(prefix: bytes | bytearray, *, max_payload: int) -> tuple[int, int]:
    """(bytes of message, bytes of payload) that follow. Raises WireError where they are more than expected."""
    num_message, num_payload = PREFIX.unpack(prefix)
    if num_message > MAX_MESSAGE or num_payload > max_payload:
        raise WireError("oversized frame")
    return num_message, num_payload


def unpack_job(text: bytes) -> Job:
    try:
        return _jobs.decode(text)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise WireError("not a job") from error


def unpack_reply(text: bytes | bytearray) -> Reply:
    try:
        return _replies.decode(text)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise WireError("not a reply") from error
