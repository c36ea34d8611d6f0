"""Every build of the native library that can run here, whichever of them setup compiled."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

from model.native.builds import BUILDS, compile_all, compiler
from model.native.library import Library, lacking_features, opened

# Included before all else, it computes what the processor cannot: by the build, which must otherwise run here.
EMULATED = {"amx": ("avx512bf16", Path(__file__).with_name("amx.h"))}


@functools.cache
def every_library() -> dict[str, Library]:
    """By name: those of this processor, and those emulated. What is not there is compiled, in a hurry."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    real = [build for build in BUILDS if not lacking_features(build) and (build.is_current() or compiler())]
    paths = {build: build.path if build.is_current() else folder / build.path.name for build in real}
    compile_all(paths, ("-O1",))
    found = {build.name: opened(build, path) for build, path in paths.items()}
    for build in BUILDS:
        on, header = EMULATED.get(build.name, ("", Path()))
        if found.get(build.name) is None and found.get(on) is not None and compiler():
            path = folder / f"emulated_{build.name}.so"
            build.compile(path, ("-O1", "-include", str(header)))
            found[build.name] = opened(build, path)
    return {name: library for name, library in found.items() if library is not None}
