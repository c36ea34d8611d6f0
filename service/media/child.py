"""A decoding child: `python -m service.media.child SETUP`; decodes one job after another from the socket on fd 0 and 1.

Hostile bytes meet native decoders only here. So before its first job this process limits its memory and processor time
and gives up core dumps, writing files and gaining privileges; and, once everything is imported, opening anything: with
a limit of no file descriptors there can be no file, other socket or pipe.

SETUP is a wire.Setup as JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from typing import BinaryIO

import msgspec
import numpy as np

from model.request import VideoMetadata
from service.media import wire
from service.media.limits import MediaLimits
from service.media.refusal import Refusal, errors_as_refusals
from service.media.sampling import Choose

PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38  # <linux/prctl.h>
BUFFER_BYTES = 1024 * 1024
START_CPU_SECONDS = 60
QUICK_SECONDS = 0.002  # of processor time: too short to have filled more than some megabytes

libc = ctypes.CDLL(None, use_errno=True)
trim = getattr(libc, "malloc_trim", None)  # glibc's


def main() -> None:
    """Confine this process, warm up, and serve jobs."""
    setup = msgspec.json.decode(sys.argv[1], type=wire.Setup)
    confine(setup.limits)
    warm_up(setup)
    # Large buffers: most files arrive with one read, and most pictures leave with one write.
    with open(0, "rb", BUFFER_BYTES, closefd=False) as source, open(silence(), "wb", BUFFER_BYTES) as sink:
        gc.freeze()
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
        serve(setup, source, sink)


def confine(limits: MediaLimits) -> None:
    """Set every limit that the imports do not need lifted."""
    with contextlib.suppress(AttributeError):  # Linux only
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # ends this process with a killed service
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (limits.memory_bytes, limits.memory_bytes))
    lifetime = START_CPU_SECONDS + limits.cpu_seconds * limits.decodes_per_child
    resource.setrlimit(resource.RLIMIT_CPU, (lifetime, lifetime))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)


def warm_up(setup: wire.Setup) -> None:
    """Do all imports now, lazy ones included."""
    from PIL import Image

    from service.media import image, stills, video  # noqa: F401

    warnings.simplefilter("ignore")
    Image.MAX_IMAGE_PIXELS = None  # check_size() refuses before load(), where Pillow would only warn
    image.warm_up(setup.geometry)
    video.warm_up(setup.geometry)


def silence() -> int:
    """Point file descriptors 1 and 2 to /dev/null, since decoders print; return a duplicate of 1, for replies."""
    null, replies = os.open(os.devnull, os.O_WRONLY), os.dup(1)
    os.dup2(null, 1)
    os.dup2(null, 2)
    return replies


def serve(setup: wire.Setup, source: BinaryIO, sink: BinaryIO) -> None:
    """Decode jobs until the parent closes the socket."""

    def send(reply: wire.Reply, frames: Sequence[np.ndarray] = ()) -> None:
        sink.write(wire.pack(reply, sum(frame.nbytes for frame in frames)))
        for frame in frames:
            sink.write(np.ascontiguousarray(frame).data)
        sink.flush()

    def choose(video: VideoMetadata) -> Sequence[int] | None:
        """Ask the parent which frames of a video are wanted."""
        send(wire.Choose(video))
        num_message, _ = wire.unpack_prefix(source.read(wire.PREFIX.size), max_payload=0)
        return wire.unpack_chosen(source.read(num_message)).indices

    send(wire.Started())
    while prefix := source.read(wire.PREFIX.size):
        num_message, num_payload = wire.unpack_prefix(prefix, max_payload=setup.limits.max_bytes)
        job, data = wire.unpack_job(source.read(num_message)), source.read(num_payload)
        started = time.process_time()
        limit_cpu(job.cpu_seconds)
        send(*decode(setup, job, data, choose))
        limit_cpu(0)
        del data
        if time.process_time() - started > QUICK_SECONDS:
            release_memory()


def limit_cpu(seconds: float) -> None:
    """Have SIGPROF end this process after so many seconds of processor time; 0: no limit."""
    signal.setitimer(signal.ITIMER_PROF, seconds)


def release_memory() -> None:
    """Return free memory to the system; without this, some files leave 200 MiB in an idle child."""
    gc.collect()  # quick, since the imports are frozen
    if trim is not None:
        trim(0)


def decode(setup: wire.Setup, job: wire.Job, data: bytes, choose: Choose) -> tuple[wire.Reply, Sequence[np.ndarray]]:
    """Decode one job: the reply, and the frames, each (height, width, 3) uint8, where it succeeds."""
    from service.media.image import decode_image
    from service.media.stills import decode_frame_list
    from service.media.video import decode_video

    limits, geometry = setup.limits, setup.geometry
    try:
        with errors_as_refusals(job.kind):
            if job.kind == "image":
                pixels = decode_image(data, job.format, limits=limits, geometry=geometry)
                num_frames, height, width, channels = pixels.shape
                return wire.Decoded((num_frames, height, width, channels)), [pixels]
            if job.format == "FRAME LIST":
                video = decode_frame_list(data, job, limits=limits, geometry=geometry)
            else:
                choice = choose if job.choose else None
                video = decode_video(data, job, limits=limits, geometry=geometry, choose=choice)
    except Refusal as refusal:
        return wire.Failed(refusal.name, refusal.numbers), ()
    height, width, channels = video.pixels[0].shape
    shape = len(video.pixels), height, width, channels
    return wire.Decoded(shape, video.seconds_per_frame, video.frame_times, video.source), video.pixels


if __name__ == "__main__":
    main()
