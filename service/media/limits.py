"""The limits under which media of strangers is fetched and decoded: one place, every path."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class MediaLimits:
    """Every limit is per medium; the first five are checked before anything is decoded.

    A frame is refused when its file or container says that it is over the limit, and again when the decoder
    shows that the header lied. `memory_bytes` is address space, so it counts the child's libraries (about 250 MiB) too.
    """

    max_bytes: int = 64 * 1024 * 1024
    max_pixels: int = 50_000_000  # of an image, width * height
    max_video_pixels: int = 4096 * 2304  # of one frame of a video
    max_side: int = 16_384  # of images and frames
    min_side: int = 1
    max_parts: int = 100_000  # of one picture file: segments, chunks, blocks or boxes
    max_scans: int = 64  # of a JPEG: mozjpeg, which searches for the best script, tries as many; usual are 1 to 12
    min_decoded: float = 0.9  # share of a JPEG's pixels that its data must give: browsers show what there is
    max_profile_bytes: int = 4 * 1024 * 1024  # of an ICC profile; larger ones are passed over

    max_frames: int = 64  # that one video may give to the model
    max_source_frames: int = 36_000  # that a video file may hold
    max_video_seconds: float = 600.0
    max_elements: int = 200_000  # boxes or elements that a video's container may consist of, as far as they are read
    max_decoded_pixels: int = (
        16_000_000_000  # of all frames that must be decoded to reach the wanted ones; 20 s of work
    )

    decode_seconds: float = 20.0  # wall clock: handing over, decoding and handing back
    cpu_seconds: int = 20  # processor time of one decode
    image_seconds: float = 8.0  # processor time of the largest image; smaller ones get less. 50 million pixels take 3
    queue_seconds: float = 60.0  # wall clock: waiting for a place
    max_queued: int = 256  # files that wait for a place
    memory_bytes: int = 1536 * 1024 * 1024  # RLIMIT_AS of a child; 50 million pixels of WebP take 1.1 GiB
    start_seconds: float = 60.0  # wall clock until a new child is ready
    decodes_per_child: int = 1000  # then it is replaced, so that nothing can pile up in it

    fetch_seconds: float = 10.0  # wall clock of a fetch: names, connections, redirects and body together
    max_redirects: int = 3

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0 and field.name not in ("max_redirects", "max_queued"):
                raise ValueError(f"{field.name} must be positive, not {getattr(self, field.name)!r}")
        if self.min_side > self.max_side:
            raise ValueError("min_side must not be above max_side")
