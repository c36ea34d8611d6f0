"""The reasons why a medium is refused, and the error message of each.

A child decodes hostile bytes, so it is not trusted with free text: it sends the name of a refusal and numbers, and the
parent writes the message. So no library's message, path or address can reach a client.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from service.errors import BadRequest, ServiceError, TooLarge

_MESSAGES: dict[str, tuple[type[ServiceError], str]] = {
    "image_not_decodable": (
        BadRequest,
        "the image could not be decoded: it is truncated, corrupt or of a variant that is not supported",
    ),
    "video_not_decodable": (
        BadRequest,
        "the video could not be decoded: it has no frames, is truncated or corrupt, or has an unsupported codec",
    ),
    "too_small": (
        BadRequest,
        "the medium is {width}x{height} pixels; its smallest side must be at least {min_side} pixels",
    ),
    "too_many_pixels": (
        TooLarge,
        "the medium is {width}x{height} pixels; at most {max_pixels} pixels and {max_side} a side are allowed",
    ),
    "too_narrow": (
        BadRequest,
        "the medium is {width}x{height} pixels: its sides differ too much for the model, "
        "which takes pictures whose longer side is at most {max_ratio} times the shorter",
    ),
    "too_many_scans": (
        TooLarge,
        "the JPEG has more than {max_scans} scans; save it as a baseline JPEG",
    ),
    "too_many_parts": (
        TooLarge,
        "the image file has more than {max_parts} segments, chunks or boxes; save it again without metadata",
    ),
    "image_truncated": (
        BadRequest,
        "the JPEG is truncated: its data gives less than {percent} % of the pixels that its header announces",
    ),
    "too_many_source_frames": (
        TooLarge,
        "the video has more than the {max_source_frames} frames that are allowed",
    ),
    "too_many_elements": (
        TooLarge,
        "the video's container has more than the {max_elements} elements that are allowed",
    ),
    "no_video": (BadRequest, "the file has no video track (cover art does not count)"),
    "no_frames": (BadRequest, "the video has no visible frames"),
    "unsupported_codec": (
        BadRequest,
        "the video's codec is not supported; send H.264, HEVC, VP8, VP9, AV1, MPEG-4, MPEG-2 or MJPEG",
    ),
    "too_long": (
        TooLarge,
        "the video lasts {seconds} seconds; at most {max_video_seconds} are allowed",
    ),
    "not_sampled": (BadRequest, "the model could not say which frames of the video it takes"),
    "not_an_image": (BadRequest, "the picture format is not supported; send JPEG"),
    "no_frame_times": (
        BadRequest,
        "fps needs the frame rate of the list of frames: leave fps out, or add the rate to the URI: "
        "data:video/jpeg;fps=2;base64,...",
    ),
    "out_of_memory": (TooLarge, "decoding the medium needs more memory than is allowed"),
    "too_much_work": (
        BadRequest,
        "the video takes longer to decode than is allowed; send a shorter one, or smaller frames",
    ),
    "out_of_time": (BadRequest, "the medium takes longer to decode than is allowed"),
    "decoder_crashed": (
        BadRequest,
        "the medium could not be decoded: it is truncated, corrupt or of a variant that is not supported",
    ),
}

# Refusals after which the child is replaced: it hangs, or ran out of memory inside a library.
#
# All others are ordinary control flow, `*_not_decodable` included: a decoder noticed that the file is broken, and
# raised. Killing the child after those would protect nobody: a file that corrupts a decoder's memory may as well decode
# without an error. It would only cost a process start per broken file. The harm is bounded by the child's confinement,
# by the parent's checks of each reply, and by replacing each child after `decodes_per_child` files.
HARMFUL = frozenset({"out_of_memory", "out_of_time"})


class Refusal(Exception):
    """Raised by a decoder: `name` is a key of the table above, `numbers` fill its sentence."""

    def __init__(self, name: str, /, **numbers: int) -> None:
        super().__init__(name)
        self.name = name
        self.numbers = numbers


@contextmanager
def errors_as_refusals(kind: str) -> Iterator[None]:
    """Turn whatever decoders raise on a broken file into a Refusal; their messages stay here. kind: image or video."""
    try:
        yield
    except Refusal:
        raise
    except MemoryError:
        raise Refusal("out_of_memory") from None
    except Exception:
        raise Refusal(f"{kind}_not_decodable") from None


def client_error(name: str, numbers: Mapping[str, int]) -> ServiceError:
    """Return the error that a client sees; unknown names and wrong numbers, from a broken child, give a general one."""
    try:
        error, message = _MESSAGES[name]
        prefix = f"frame {numbers['frame']}: " if "frame" in numbers else ""  # of a list of frames
        return error(prefix + message.format(**numbers), code=name)
    except (KeyError, ValueError):
        return client_error("decoder_crashed", {})
