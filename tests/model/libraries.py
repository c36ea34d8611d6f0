"""Every build of the native library that this processor can run or feign, whichever of them setup compiled.

What it cannot run is emulated: AMX on AVX512-BF16 (amx.h), and AVX512 with and without BF16 on AVX2 (avx512.h).
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from model.backends.native.builds import BUILDS, NAMES, SANITIZED, Build, compiler
from model.backends.native.library import Library, lacking_features, opened

HERE = Path(__file__).parent
HURRIED = ("-Og",)  # a third of the time to compile, and the same bits: the compiler joins and reorders nothing
AMX = ("-include", str(HERE / "amx.h"))
AVX512 = ("-mno-avx512f", "-mavx2", "-mfma", "-mf16c", "-include", str(HERE / "avx512.h"))
AVX512_BF16 = ("-DEMULATED_BF16", *AVX512)
# With which options a build runs on another's processor: the first of these that this one is.
EMULATIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "amx": {"avx512bf16": AMX, "avx2": (*AVX512_BF16, *AMX)},
    "avx512bf16": {"avx2": AVX512_BF16},
    "avx512": {"avx2": AVX512},
}


@functools.cache
def every_library() -> dict[str, Library]:
    """Libraries by name, best first. What is not there is compiled, in a hurry; with sanitizers, nothing more is."""
    wanted = [job for build in BUILDS if (job := _real(build) or _emulated(build)) is not None]
    found = dict(zip((build.name for build, _, _ in wanted), _compiled(wanted), strict=True))
    return {name: library for name, library in found.items() if library is not None}


@functools.cache
def emulated(name: str) -> Library | None:
    """A build in emulation, though this processor may run it: None where it cannot feign it."""
    job = _emulated(BUILDS[NAMES.index(name)])
    return None if job is None else _compiled([job])[0]


Job = tuple[Build, Path, tuple[str, ...]]


def _real(build: Build) -> Job | None:
    if lacking_features(build) or not (build.is_current() or (compiler() and not SANITIZED)):
        return None
    return build, build.path if build.is_current() else _folder() / build.path.name, HURRIED


def _emulated(build: Build) -> Job | None:
    for name, options in EMULATIONS.get(build.name, {}).items():
        if compiler() and not SANITIZED and not lacking_features(BUILDS[NAMES.index(name)]):
            return build, _folder() / f"emulated_{build.name}.so", (*HURRIED, *options)
    return None


@functools.cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    return folder


def _compiled(jobs: list[Job]) -> list[Library | None]:
    """Compile what is not there, side by side, and load all."""

    def ready(build: Build, path: Path, options: tuple[str, ...]) -> Library | None:
        if not path.exists():
            build.compile(path, options)
        return opened(build, path)

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return list(pool.map(lambda job: ready(*job), jobs))
