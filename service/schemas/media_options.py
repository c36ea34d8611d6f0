"""What a request may say of its images and videos: the frames of a video, and options of the model's processors.

The same fields stand in a request, for all its media, and in a part of a chat message, for that one. Processor options
may also come in `mm_processor_kwargs`, and the frames of videos in `media_io_kwargs`, as vLLM takes them. Which options
the model's processors know is not decided here: see `check_known`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec

from model.request import Geometry, OptionValue
from service.errors import BadRequest
from service.media.sniff import Kind

KWARGS = "mm_processor_kwargs"
IO_KWARGS = "media_io_kwargs"
EVERY_FRAME = 1000.0  # frames per second: no video has more
NumFrames = Annotated[int, msgspec.Meta(ge=1)]
Fps = Annotated[float, msgspec.Meta(gt=0.0, le=1000.0)]
Pixels = Annotated[int, msgspec.Meta(ge=1, le=2**31)]
# The options that a request may set, by the names in model.request.MEDIA_OPTIONS, with the types of their values. The
# bounds keep processors, which work outside the confined children, from making far more of a picture than was sent.
TYPES: dict[str, Any] = {
    "min_pixels": Pixels,
    "max_pixels": Pixels,
    "size": dict[str, Annotated[int, msgspec.Meta(ge=1, le=2**31)]],
    "do_image_splitting": bool,
    "crop_to_patches": bool,
    "min_patches": Annotated[int, msgspec.Meta(ge=1, le=64)],
    "max_patches": Annotated[int, msgspec.Meta(ge=1, le=64)],
    "do_pan_and_scan": bool,
    "pan_and_scan_min_crop_size": Annotated[int, msgspec.Meta(ge=1, le=16_384)],
    "pan_and_scan_max_num_crops": Annotated[int, msgspec.Meta(ge=1, le=16)],
    "pan_and_scan_min_ratio_to_activate": Annotated[float, msgspec.Meta(ge=1.0, le=1000.0)],
    "max_soft_tokens": Annotated[int, msgspec.Meta(ge=1, le=4096)],
    "min_image_tokens": Annotated[int, msgspec.Meta(ge=1, le=16_384)],
    "max_image_tokens": Annotated[int, msgspec.Meta(ge=1, le=16_384)],
    "max_num_patches": Annotated[int, msgspec.Meta(ge=1, le=16_384)],
}
SAMPLING: dict[str, Any] = {"num_frames": NumFrames, "fps": Fps}
SIZES = ({"height", "width"}, {"longest_edge"}, {"shortest_edge", "longest_edge"})


class ImageFields(msgspec.Struct, kw_only=True, frozen=True):
    """The fields of an image; None means the default."""

    min_pixels: Pixels | None = None
    max_pixels: Pixels | None = None
    mm_processor_kwargs: dict[str, Any] | None = None  # checked by `read`, so that errors name the key
    media_io_kwargs: dict[str, dict[str, Any] | None] | None = None  # likewise


class MediaFields(ImageFields, kw_only=True, frozen=True):
    """The fields of a video, and of a request for all its media."""

    num_frames: NumFrames | None = None
    fps: Fps | None = None


@dataclass(frozen=True)
class MediaOptions:
    """What is wanted of a medium. values: options of the processor, by name; params: where each came from, by name.

    With fps, num_frames is the maximum of frames.
    """

    num_frames: int | None = None
    fps: float | None = None
    values: Mapping[str, OptionValue] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)

    def param(self, name: str) -> str:
        return self.params.get(name, name)

    def over(self, base: MediaOptions) -> MediaOptions:
        """Return these options with those of `base` that they do not set."""
        samples = self.num_frames is not None or self.fps is not None
        return MediaOptions(
            self.num_frames if samples else base.num_frames,
            self.fps if samples else base.fps,
            {**base.values, **self.values},
            {**base.params, **self.params},
        )

    def known_to(self, geometry: Geometry, kind: Kind) -> tuple[tuple[str, OptionValue], ...]:
        """Return the options that the processor for this kind of medium takes, in a fixed order."""
        return tuple((name, self.values[name]) for name in geometry.options(kind) if name in self.values)


def read(fields: ImageFields, path: str = "") -> MediaOptions:
    """Check the fields and put them together. path: of the part in the request, with a dot at its end.

    Raises BadRequest, which names the field.
    """
    sent: dict[str, tuple[Any, str]] = {}  # value and where it stands, by name
    for name in ("num_frames", "fps", "min_pixels", "max_pixels"):
        if (value := getattr(fields, name, None)) is not None:
            sent[name] = value, f"{path}{name}"
    for name, value in (fields.mm_processor_kwargs or {}).items():
        param = f"{path}{KWARGS}.{name[:64]}"
        if (type_ := TYPES.get(name) or SAMPLING.get(name)) is None:
            known = ", ".join((*TYPES, *SAMPLING))
            raise BadRequest(f"{param} is not a known option; known are {known}", param=param, code="unknown_field")
        _add(sent, name, _converted(value, type_, param), param)
    if "num_frames" in sent and "fps" in sent:
        raise BadRequest("send num_frames or fps, not both", param=sent["fps"][1])
    for name, (value, param) in _loading(fields.media_io_kwargs or {}, path).items():
        _add(sent, name, value, param)
    values = {name: value for name, (value, _) in sent.items() if name in TYPES}
    if values.get("min_pixels", 0) > values.get("max_pixels", math.inf):
        raise BadRequest("min_pixels must not be above max_pixels", param=sent["min_pixels"][1])
    if "size" in values:
        values["size"] = _size(values["size"], sent["size"][1])
    num_frames, fps = (sent[name][0] if name in sent else None for name in SAMPLING)
    return MediaOptions(num_frames, fps, values, {name: param for name, (_, param) in sent.items()})


def _add(sent: dict[str, tuple[Any, str]], name: str, value: Any, param: str) -> None:
    """Add an option. Raises BadRequest where another field gives it another value."""
    if name in sent and sent[name][0] != value:
        raise BadRequest(f"{sent[name][1]} and {param} differ; send one", param=param)
    sent[name] = value, param


def _loading(kwargs: Mapping[str, Mapping[str, Any] | None], path: str) -> dict[str, tuple[Any, str]]:
    """Return the frames that vLLM's `media_io_kwargs` want, as (value, param) by name. With both, as vLLM: frames at
    this rate, but at most so many. Raises BadRequest."""
    found: dict[str, tuple[Any, str]] = {}
    for kind, options in kwargs.items():
        for name, value in (options or {}).items():
            param = f"{path}{IO_KWARGS}.{kind[:64]}.{name[:64]}"
            if kind == "video" and name in SAMPLING:
                if value is not None and (name, value) != ("num_frames", -1):
                    found[name] = _converted(value, SAMPLING[name], param), param
                elif value is not None:
                    found.setdefault("fps", (EVERY_FRAME, param))
            elif (kind, name, value) != ("image", "image_mode", "RGB"):
                raise BadRequest(
                    f"{param} is not a known option; known are video.num_frames and video.fps",
                    param=param,
                    code="unknown_field",
                )
    return found


def check_known(options: MediaOptions, geometry: Geometry, kinds: Iterable[Kind]) -> None:
    """Raise BadRequest for an option that the model's processors for all of these kinds do not take."""
    kinds = tuple(kinds)
    known = {name for kind in kinds for name in geometry.options(kind)}
    for name in options.values:
        if name not in known:
            takes = f"it takes {', '.join(sorted(known))}" if known else "it takes no options"
            whose = f"{kinds[0]} processor" if len(kinds) == 1 else "processor"
            raise BadRequest(
                f"{options.param(name)}: this model's {whose} does not take {name}; {takes}",
                param=options.param(name),
                code="unknown_option",
            )


def check_used(options: MediaOptions, geometry: Geometry, kinds: Iterable[Kind]) -> None:
    """Raise BadRequest for a field of a request that none of its media is for. kinds: of its media."""
    kinds = set(kinds)
    for name in SAMPLING:
        if getattr(options, name) is not None and "video" not in kinds:
            raise BadRequest(f"{name} is for videos, and there is none", param=options.param(name))
    for name in options.values:
        takers: list[Kind] = [kind for kind in ("image", "video") if name in geometry.options(kind)]
        if not kinds.intersection(takers):
            whom = " and ".join(f"{kind}s" for kind in takers)
            raise BadRequest(f"{name} is for {whom}, and there is none", param=options.param(name))


def check_pixels(options: MediaOptions, geometry: Geometry, shape: tuple[int, int, int], most: int) -> None:
    """Raise BadRequest for options that make the processor enlarge a medium beyond `most` pixels in all its frames.

    shape: (frames, height, width), decoded.
    """
    num_frames, height, width = shape
    for name, pixels in _enlarged(options.values, geometry, max(height, width) / min(height, width)).items():
        if pixels * num_frames > most:
            raise BadRequest(
                f"{options.param(name)} makes the model's processor enlarge this medium to {num_frames} x {pixels:.0f} "
                f"pixels; at most {most} are allowed",
                param=options.param(name),
            )


def _enlarged(values: Mapping[str, Any], geometry: Geometry, ratio: float) -> dict[str, float]:
    """Return how many pixels at least each option makes of a picture, by the option's name. ratio: of its sides."""
    pixels: dict[str, float] = {}
    if "min_pixels" in values:
        pixels["min_pixels"] = values["min_pixels"]
    if "size" in values:
        size = dict(values["size"])
        longest, shortest = size.get("longest_edge", math.inf), size.get("shortest_edge", math.inf)
        if "height" in size:
            pixels["size"] = size["height"] * size["width"]
        elif geometry.size_is_area:
            pixels["size"] = shortest if shortest < math.inf else 0
        else:
            pixels["size"] = min(longest**2 / ratio, shortest**2 * ratio)
    return pixels


def _converted(value: Any, type_: Any, param: str) -> Any:
    """Check a value's type and bounds. Raises BadRequest."""
    try:
        return msgspec.convert(value, type_)
    except msgspec.ValidationError as error:
        raise BadRequest(f"{param}: {str(error).partition(' - at ')[0]}", param=param) from None


def _size(size: dict[str, int], param: str) -> tuple[tuple[str, int], ...]:
    if set(size) not in SIZES:
        forms = "; ".join(" and ".join(sorted(form)) for form in SIZES)
        raise BadRequest(f"{param} must have one of these sets of keys: {forms}", param=param)
    if size.get("shortest_edge", 0) > size.get("longest_edge", math.inf):
        raise BadRequest(f"{param}: shortest_edge must not be above longest_edge", param=param)
    return tuple(sorted(size.items()))
