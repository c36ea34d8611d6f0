"""Load every build of the native library that this processor can run or emulate, whichever of them setup compiled.

A build for another processor is emulated: AMX on AVX512-BF16 (amx.h), and AVX512 with and without BF16 on AVX2
(avx512.h).
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from model.backends.native.builds import BUILDS, NAMES, SANITIZED, Build, compiler
from model.backends.native.library import Library, lacking_features, opened

HERE = Path(__file__).parent
HURRIED = ("-Og",)  # a third of the compile time, the same bits: compilers fuse and reorder no operations
AMX = ("-include", str(HERE / "amx.h"))
AVX512 = ("-mno-avx512f", "-mavx2", "-mfma", "-mf16c", "-include", str(HERE / "avx512.h"))
AVX512_BF16 = ("-DEMULATED_BF16", *AVX512)
# build -> processor of another build -> options for it; the first that this processor can run is used.
EMULATIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "amx": {"avx512bf16": AMX, "avx2": (*AVX512_BF16, *AMX)},
    "avx512bf16": {"avx2": AVX512_BF16},
    "avx512": {"avx2": AVX512},
}


@functools.cache
def every_library() -> dict[str, Library]:
    """Return all builds by name, the best first; missing ones are compiled with few optimisations."""
    wanted = [job for build in BUILDS if (job := _real(build) or _emulated(build)) is not None]
    found = dict(zip((build.name for build, _, _ in wanted), _compiled(wanted), strict=True))
    return {name: library for name, library in found.items() if library is not None}


@functools.cache
def emulated(name: str) -> Library | None:
    """Return a build in emulation, even if this processor can run it; None if it cannot emulate it."""
    job = _emulated(BUILDS[NAMES.index(name)])
    return None if job is None else _compiled([job])[0]


Job = tuple[Build, Path, tuple[str, ...]]


def _real(build: Build) -> Job | None:
    """Return the job for a build that this processor runs; None if it lacks features or nothing can compile it."""
    if lacking_features(build) or not (build.is_current() or (compiler() and not SANITIZED)):
        return None
    return build, build.path if build.is_current() else _folder() / build.path.name, HURRIED


def _emulated(build: Build) -> Job | None:
    """Return the job that compiles a build for emulation here; None if no emulation runs on this processor."""
    for name, options in EMULATIONS.get(build.name, {}).items():
        if compiler() and not SANITIZED and not lacking_features(BUILDS[NAMES.index(name)]):
            return build, _folder() / f"emulated_{build.name}.so", (*HURRIED, *options)
    return None


@functools.cache
def _folder() -> Path:
    """Create the folder of what these sources compile to: later runs find it there, and other processes of this one."""
    digest = hashlib.sha256(repr((compiler(), HURRIED, EMULATIONS, [build.stamp() for build in BUILDS])).encode())
    for header in sorted(HERE.glob("*.h")):
        digest.update(header.read_bytes())
    folder = HERE.parents[1] / ".pytest_cache" / f"native-{digest.hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    for other in {*folder.parent.glob("native-*")} - {folder}:
        shutil.rmtree(other, ignore_errors=True)
    return folder


def _compiled(jobs: list[Job]) -> list[Library | None]:
    """Compile the missing libraries in parallel, and load all."""

    def ready(build: Build, path: Path, options: tuple[str, ...]) -> Library | None:
        """Compile one library if its file is missing, and load it."""
        if not path.exists():
            build.compile(path, options)
        return opened(build, path)

    with (_folder() / "lock").open("w") as lock, ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process compiles the same
        return list(pool.map(lambda job: ready(*job), jobs))
