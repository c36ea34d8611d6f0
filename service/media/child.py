"""A decoding child: `python -m service.media.child SETUP`, one job after another through one socket, its fd 0 and 1.

Hostile bytes meet native decoders here and nowhere else. So this process gives up, before it reads the first job:
memory and processor time beyond the limits, core dumps, writing files, gaining privileges, and, once everything is
imported, opening anything at all: with no file descriptor to be had there is no file, no other socket and no pipe.

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
from typing import BinaryIO

import msgspec
import numpy as np

from service.media import wire
from service.media.limits import MediaLimits
from service.media.refusal import Refusal

PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38  # <linux/prctl.h>
BUFFER_BYTES = 1024 * 1024
START_CPU_SECONDS = 60
QUICK_SECONDS = 0.002  # of processor time: no more than some megabytes can have been filled in it

libc = ctypes.CDLL(None, use_errno=True)
trim = getattr(libc, "malloc_trim", None)  # glibc's


def main() -> None:
    setup = msgspec.json.decode(sys.argv[1], type=wire.Setup)
    confine(setup.limits)
    warm_up(setup)
    # Buffered well: most files come with one read, and most pictures go with one write.
    with open(0, "rb", BUFFER_BYTES, closefd=False) as source, open(silence(), "wb", BUFFER_BYTES) as sink:
        gc.freeze()
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
        serve(setup, source, sink)


def confine(limits: MediaLimits) -> None:
    """Everything that can be given up before the imports."""
    with contextlib.suppress(AttributeError):  # Linux only
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # not to outlive a service that was killed
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (limits.memory_bytes, limits.memory_bytes))
    lifetime = START_CPU_SECONDS + limits.cpu_seconds * limits.decodes_per_child
    resource.setrlimit(resource.RLIMIT_CPU, (lifetime, lifetime))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)


def warm_up(setup: wire.Setup) -> None:
    """All imports, early and late."""
    from PIL import Image

    from service.media import image, stills, video  # noqa: F401

    warnings.simplefilter("ignore")
    Image.MAX_IMAGE_PIXELS = None  # ours is checked before load(), and refuses instead of warning
    image.warm_up(setup.geometry)
    video.warm_up(setup.geometry)


def silence() -> int:
    """Point file descriptors 1 and 2 nowhere, since decoders print. Returns a new one for what 1 was: the answers."""
    null, answers = os.open(os.devnull, os.O_WRONLY), os.dup(1)
    os.dup2(null, 1)
    os.dup2(null, 2)
    return answers


def serve(setup: wire.Setup, source: BinaryIO, sink: BinaryIO) -> None:
    """Answer jobs until the parent closes the socket."""

    def send(reply: wire.Reply, pixels: np.ndarray | None = None) -> None:
        payload = b"" if pixels is None else np.ascontiguousarray(pixels).data
        sink.write(wire.pack(reply, len(payload) if pixels is None else pixels.nbytes))
        sink.write(payload)
        sink.flush()

    send(wire.Ready())
    while prefix := source.read(wire.PREFIX.size):
        num_message, num_payload = wire.unpack_prefix(prefix, max_payload=setup.limits.max_bytes)
        job, data = wire.unpack_job(source.read(num_message)), source.read(num_payload)
        begun = time.process_time()
        allow_cpu(job.cpu_seconds)
        send(*decode(setup, job, data))
        allow_cpu(0)
        del data
        if time.process_time() - begun > QUICK_SECONDS:
            give_memory_back()


def allow_cpu(seconds: float) -> None:
    """Start the clock of one decode: SIGPROF ends this process when so much processor time has been used; 0: never."""
    signal.setitimer(signal.ITIMER_PROF, seconds)


def give_memory_back() -> None:
    """An idle child shall not sit on what its largest file took: without this, some files leave 200 MiB behind."""
    gc.collect()  # quick, since the imports are frozen
    if trim is not None:
        trim(0)


def decode(setup: wire.Setup, job: wire.Job, data: bytes) -> tuple[wire.Reply, np.ndarray | None]:
    """The answer to one job, and pixels (frames, height, width, 3) uint8 where there are any."""
    from service.media.image import decode_image
    from service.media.stills import decode_frame_list
    from service.media.video import decode_video

    seconds: float | None = None
    try:
        if job.kind == "image":
            pixels = decode_image(data, job.format, limits=setup.limits, geometry=setup.geometry)
        elif job.format == "FRAME LIST":
            pixels, seconds = decode_frame_list(data, job, limits=setup.limits, geometry=setup.geometry)
        else:
            pixels, seconds = decode_video(data, job, limits=setup.limits, geometry=setup.geometry)
    except Refusal as refusal:
        return wire.Refused(refusal.name, refusal.numbers), None
    except MemoryError:
        return wire.Refused("out_of_memory"), None
    except Exception:  # a decoder may raise anything at all on a broken file, and its words stay here
        return wire.Refused(f"{job.kind}_not_decodable"), None
    num_frames, height, width, channels = pixels.shape
    return wire.Decoded((num_frames, height, width, channels), seconds), pixels


if __name__ == "__main__":
    main()
