"""The limits on fetching and decoding untrusted media."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class MediaLimits:
    """Limits per medium; the first five are checked before anything is decoded.

    A frame's size is checked when the container announces it, and again when the decoder shows the real one.
    `memory_bytes` is address space, so it includes the child's libraries (about 250 MiB).
    """

    max_bytes: int = 64 * 1024 * 1024
    max_pixels: int = 50_000_000  # of an image, width * height
    max_video_pixels: int = 4096 * 2304  # of one frame of a video
    max_side: int = 16_384  # of images and frames
    min_side: int = 1
    max_parts: int = 100_000  # of one picture file: segments, chunks, blocks or boxes
    max_scans: int = 64  # of a JPEG: as many as mozjpeg tries at most; usual are 1 to 12
    min_decoded: float = 0.9  # share of a JPEG's pixels that its data must give
    max_profile_bytes: int = 4 * 1024 * 1024  # of an ICC profile; larger ones are ignored

    max_frames: int = 64  # sampled from one video
    max_clip_pixels: int = 64_000_000  # of all sampled frames together, where the target takes frames of any size
    max_source_frames: int = 36_000  # of a video file
    max_video_seconds: float = 600.0
    max_elements: int = 200_000  # boxes or elements of a video's container, as far as they are read
    max_decoded_pixels: int = 16_000_000_000  # of all frames decoded to reach the sampled ones; 20 s of work

    decode_seconds: float = 20.0  # wall clock: sending the file, decoding and receiving pixels
    cpu_seconds: int = 20  # processor time of one decode
    image_seconds: float = 8.0  # processor time of the largest image; smaller ones get less. 50 million pixels take 3
    queue_seconds: float = 60.0  # wall clock: waiting for a lane
    max_queued: int = 256  # files that wait for a lane
    memory_bytes: int = 1536 * 1024 * 1024  # RLIMIT_AS of a child; 50 million pixels of WebP take 1.1 GiB
    start_seconds: float = 60.0  # wall clock until a new child is warm
    decodes_per_child: int = 1000  # after which it is replaced, so that nothing accumulates in it

    fetch_seconds: float = 10.0  # wall clock of a fetch: name lookups, connections, redirects and body together
    max_redirects: int = 3

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0 and field.name not in ("max_redirects", "max_queued"):
                raise ValueError(f"{field.name} must be positive, not {getattr(self, field.name)!r}")
        if self.min_side > self.max_side:
            raise ValueError("min_side must not be above max_side")
