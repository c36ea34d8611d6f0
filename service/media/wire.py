"""The protocol between the service and a decoding child: frames of

    length of message (4 bytes) | length of payload (8 bytes) | message | payload

The message is one of the types below as JSON; the payload is raw bytes: a file for the child, pixels for the parent. No
pickle, and every field is checked on arrival, since a child that decodes hostile bytes is not trusted.

    parent -> child   Job, with the file; Chosen after each Choose
    child  -> parent  Started once; then for each job Decoded (with the pixels) or Failed. Before that, any number of
                      times, Choose: which frames of this video are wanted?
"""

from __future__ import annotations

import struct

import msgspec

from model.request import Geometry, VideoMetadata
from service.media.limits import MediaLimits
from service.media.sniff import Format, Kind

PREFIX = struct.Struct("!IQ")
MAX_MESSAGE = 1024 * 1024  # bytes; frames' times and indices take about 20 each


class WireError(ValueError):
    """The other side did not speak this protocol."""


class Setup(msgspec.Struct, frozen=True):
    """A child's configuration, from its command line."""

    limits: MediaLimits
    geometry: Geometry


class Job(msgspec.Struct, frozen=True, tag="job"):
    """One file to decode as `kind` (a GIF may be an image or a video).

    A video has either `num_frames` or `fps`. With neither, all frames of a list are used, and of other videos the
    target's default. choose: ask which frames are wanted (Choose).
    """

    kind: Kind
    format: Format
    num_frames: int | None = None
    fps: float | None = None
    cpu_seconds: float = 0.0  # limit on processor time; 0: none
    choose: bool = False


class Chosen(msgspec.Struct, frozen=True, tag="chosen"):
    """The indices of the wanted frames, ascending; None: as the Job says."""

    indices: tuple[int, ...] | None


class Started(msgspec.Struct, frozen=True, tag="started"):
    """The child is warm and waits for its first job."""


class Choose(msgspec.Struct, frozen=True, tag="choose"):
    source: VideoMetadata


class Decoded(msgspec.Struct, frozen=True, tag="decoded"):
    """The shape of the pixels: (frames, height, width, 3), uint8. The rest is a video's, see model.request.Medium."""

    shape: tuple[int, int, int, int]
    seconds_per_frame: float | None = None
    frame_times: tuple[float, ...] | None = None
    source: VideoMetadata | None = None


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """A key of refusal.py's table, and the numbers of its message."""

    name: str
    numbers: dict[str, int] = {}


Reply = Started | Choose | Decoded | Failed

_jobs = msgspec.json.Decoder(Job)
_chosen = msgspec.json.Decoder(Chosen)
_replies: msgspec.json.Decoder[Reply] = msgspec.json.Decoder(Reply)


def pack(message: Job | Chosen | Reply, num_payload: int = 0) -> bytes:
    """Encode a frame up to its payload."""
    text = msgspec.json.encode(message)
    return PREFIX.pack(len(text), num_payload) + text


def unpack_prefix(prefix: bytes | bytearray, *, max_payload: int) -> tuple[int, int]:
    """Return (bytes of message, bytes of payload). Raises WireError where they exceed the limits."""
    num_message, num_payload = PREFIX.unpack(prefix)
    if num_message > MAX_MESSAGE or num_payload > max_payload:
        raise WireError("oversized frame")
    return num_message, num_payload


def unpack_job(text: bytes) -> Job:
    try:
        return _jobs.decode(text)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise WireError("not a job") from error


def unpack_chosen(text: bytes) -> Chosen:
    try:
        return _chosen.decode(text)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise WireError("not a choice of frames") from error


def unpack_reply(text: bytes | bytearray) -> Reply:
    try:
        return _replies.decode(text)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise WireError("not a reply") from error
