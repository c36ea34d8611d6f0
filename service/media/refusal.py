"""Why a medium was refused, in the few words that may cross from a decoding child to a client.

A child runs decoders on hostile bytes, so it is not trusted with free text: it sends the name of a refusal and numbers,
and the parent writes the sentence. Thus no library's message, path or address can reach a client.
"""

from __future__ import annotations

from collections.abc import Mapping

from service.errors import BadRequest, ServiceError, TooLarge

_SENTENCES: dict[str, tuple[type[ServiceError], str]] = {
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
        "the image file has more than {max_parts} segments, chunks or boxes; save it anew without metadata",
    ),
    "image_truncated": (
        BadRequest,
        "the JPEG ends too early: its data give less than {percent} % of the pixels that its header announces",
    ),
    "too_many_source_frames": (
        TooLarge,
        "the video holds more frames than the {max_source_frames} that are allowed",
    ),
    "too_many_elements": (
        TooLarge,
        "the video's container consists of more parts than the {max_elements} that are allowed",
    ),
    "no_video": (BadRequest, "the file has no video: none of its tracks is one (cover art does not count)"),
    "no_frames": (BadRequest, "the video has no frames that are shown"),
    "unsupported_codec": (
        BadRequest,
        "the video's codec is not supported; send H.264, HEVC, VP8, VP9, AV1, MPEG-4, MPEG-2 or MJPEG",
    ),
    "too_long": (
        TooLarge,
        "the video lasts {seconds} seconds; at most {max_video_seconds} are allowed",
    ),
    "not_an_image": (BadRequest, "it is none of the picture formats that are read here; send JPEG"),
    "no_frame_times": (
        BadRequest,
        "fps needs the frames' times, and the list has none: leave fps out, or say how many frames a second there are: "
        "data:video/jpeg;fps=2;base64,...",
    ),
    "out_of_memory": (TooLarge, "the medium needs more memory to decode than is allowed"),
    "too_much_work": (
        BadRequest,
        "the video takes longer to decode than is allowed; send a shorter one, or one of smaller frames",
    ),
    "out_of_time": (BadRequest, "the medium takes longer to decode than is allowed"),
    "decoder_crashed": (
        BadRequest,
        "the medium could not be decoded: it is truncated, corrupt or of a variant that is not supported",
    ),
}

# Refusals after which the child is replaced: it is stuck, or out of memory somewhere inside a library.
#
# All others are ordinary control flow, `*_not_decodable` included: a decoder saw that the file is broken, and raised.
# A file that is made to corrupt a decoder's memory may as well end as a picture without any error, so to kill the child
# of a broken one protects nobody from that, and costs a start of a process for a few bytes. What bounds the harm is the
# child's confinement, that each answer is checked by the parent, and that every child is replaced after
# `decodes_per_child` files, sound or not.
HARMFUL = frozenset({"out_of_memory", "out_of_time"})


class Refusal(Exception):
    """Raised by a decoder: `name` is a key of the table above, `numbers` fill its sentence."""

    def __init__(self, name: str, /, **numbers: int) -> None:
        super().__init__(name)
        self.name = name
        self.numbers = numbers


def client_error(name: str, numbers: Mapping[str, int]) -> ServiceError:
    """The error a client sees. Unknown names and wrong numbers (a child gone mad) give the most general one."""
    try:
        error, sentence = _SENTENCES[name]
        place = f"frame {numbers['frame']}: " if "frame" in numbers else ""  # of a list of frames
        return error(place + sentence.format(**numbers), code=name)
    except (KeyError, ValueError):
        return client_error("decoder_crashed", {})
