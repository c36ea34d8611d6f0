"""Read a video that is sent as a list of pictures: `data:video/jpeg;base64,FRAME,FRAME,...`, vLLM's format.

On the way to the decoding child the list is one byte string:

    MAGIC | frames per second (8 bytes; 0: unknown) | for each frame: its length (4 bytes), its file

stills.py decodes the pictures.
"""

from __future__ import annotations

import struct

from service.errors import BadRequest, ServiceError
from service.media.data_uri import DataUri, decode_base64, malformed
from service.media.limits import MediaLimits
from service.media.refusal import client_error
from service.media.sniff import FRAME_LIST_MAGIC

MEDIA_TYPE = "video/jpeg"
MAX_RATE = 1000.0  # frames per second

_RATE, _LENGTH = struct.Struct("!d"), struct.Struct("!I")


def from_uri(uri: DataUri, limits: MediaLimits) -> bytes:
    """Decode the frames of a URI and join them. Raises BadRequest and TooLarge; the message names the frame."""
    contents = uri.content.replace("%2C", ",").replace("%2c", ",").split(",", limits.max_source_frames)
    if len(contents) > limits.max_source_frames:
        numbers = {"frames": uri.content.count(",") + 1, "max_source_frames": limits.max_source_frames}
        raise client_error("too_many_source_frames", numbers)
    room, frames = limits.max_bytes, list[bytes]()
    for number, content in enumerate(contents, start=1):
        try:
            frame = decode_base64(content, room)
            if not frame:
                raise malformed("has an empty frame")
        except ServiceError as error:
            raise type(error)(f"frame {number}: {error.message}", code=error.code) from None
        room -= len(frame)
        frames.append(frame)
    return join(frames, _rate(uri))


def join(frames: list[bytes], rate: float | None) -> bytes:
    """Join frames and their rate to one byte string."""
    pieces = [FRAME_LIST_MAGIC, _RATE.pack(rate or 0.0)]
    for frame in frames:
        pieces += _LENGTH.pack(len(frame)), frame
    return b"".join(pieces)


def split(data: bytes) -> tuple[list[memoryview], float | None]:
    """Return the frames and their rate (None: unknown). Raises ValueError where lengths do not add up."""
    (rate,) = _RATE.unpack_from(data, at := len(FRAME_LIST_MAGIC))
    at += _RATE.size
    frames, view = [], memoryview(data)
    while at < len(data):
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        frames.append(view[at : at + length])
        at += length
    if at != len(data) or not frames or not 0 <= rate <= MAX_RATE:
        raise ValueError("not a list of frames")
    return frames, rate or None


def _rate(uri: DataUri) -> float | None:
    """Return the `fps` parameter of a URI, or None. Raises BadRequest."""
    if (text := uri.parameters.get("fps")) is None:
        return None
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate <= MAX_RATE:
        raise BadRequest(
            f"the data: URI's fps must be above 0 and at most {MAX_RATE:g}; got {text[:32]!r}",
            code="invalid_data_uri",
        )
    return rate
