"""The builds of the native library: what each needs of a processor, and how one is compiled, here or into a wheel.

    python -m model.backends.native.builds       compile what FLASH_BUILDS says into this folder

FLASH_BUILDS is `auto` (the default: the best build that this machine runs), `all`, `none`, or names separated by
commas. A build that is there and current is not compiled again, and one that is not current is removed. With
FLASH_SANITIZE=1, libraries with AddressSanitizer, UndefinedBehaviorSanitizer and checks of what Python hands over are
compiled, and loaded, beside the others (`make sanitize`). Python's own library is all that this takes: setup.py imports
it before anything is installed.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

CHOICE = "FLASH_BUILDS"
SANITIZED = os.environ.get("FLASH_SANITIZE") == "1"
FOLDER = Path(__file__).parent
SOURCE = FOLDER / "transformer.cpp"
# -ffp-contract=off: what rounds once says so (simd.h), and everything else rounds alike wherever the compiler puts it.
FLAGS: tuple[str, ...] = (
    "-std=c++17",
    "-O2",
    "-ffp-contract=off",
    "-fno-exceptions",
    "-fno-rtti",
    "-Wno-psabi",
    "-fPIC",
    "-pthread",
    "-shared",
)
SANITIZERS = (
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
    "-DFLASH_CHECKS",
    "-O1",
    "-g",
)
FLAGS += SANITIZERS if SANITIZED else ()
SUFFIX = "_sanitized.so" if SANITIZED else ".so"
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma")
COMPILERS = ("c++", "g++", "clang++")

INSTALL = "(Debian and Ubuntu: apt-get install g++)"
SLOWER = "Models run through torch, several times slower on a CPU."


class BuildError(Exception):
    """A library cannot be compiled; the message says what to do."""


@dataclass(frozen=True)
class Build:
    name: str
    flags: tuple[str, ...]
    features: tuple[str, ...]  # of the processor, as torch.cpu.get_capabilities names them

    @property
    def path(self) -> Path:
        return FOLDER / f"_{self.name}{SUFFIX}"

    def stamp(self) -> str:
        """Name what a library is compiled from: this build, its flags, and the sources as they are now."""
        digest = hashlib.sha256(repr((self.name, FLAGS, self.flags)).encode())
        for source in sorted((SOURCE, *FOLDER.glob("*.h"))):
            digest.update(b"\0" + source.name.encode() + b"\0" + source.read_bytes())
        return f"{self.name}-{digest.hexdigest()}"

    def is_current(self) -> bool:
        """Whether it was compiled, and from the sources as they are now."""
        return self.path.exists() and self.stamp().encode() in self.path.read_bytes()

    def compile(self, path: Path, options: Sequence[str] = ()) -> None:
        """Compile it to `path`, which changes in one go: a process that has it loaded keeps what it has."""
        new = path.with_name(f".{path.name}.{os.getpid()}")
        stamp = f'-DFLASH_STAMP="{self.stamp()}"'
        command = [*compiler(), *FLAGS, *self.flags, stamp, *options, str(SOURCE), "-o", str(new)]
        try:
            done = _run(command)
            if done.returncode:
                raise BuildError(
                    f"{shlex.join(command)}\n{done.stdout}{done.stderr}\n"
                    f"The native library (build {self.name}) does not compile: see above. It takes GCC 12 or newer; "
                    f"CXX names another compiler; with {CHOICE}=none it is left out, and models run through torch."
                )
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)


BUILDS = (  # best first
    Build(
        "amx",
        (*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
        ("amx_tile", "amx_bf16", "avx512_bf16", "avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "fma3"),
    ),
    Build(
        "avx512bf16",
        (*AVX512, "-mavx512bf16"),
        ("avx512_bf16", "avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "fma3"),
    ),
    Build("avx512", AVX512, ("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "fma3")),
    Build("avx2", ("-mavx2", "-mfma", "-mf16c"), ("avx2", "fma3", "f16c")),
)
NAMES = tuple(build.name for build in BUILDS)


def compiler() -> list[str]:
    """The command that CXX names, or the C++ compiler that is there; empty where there is none."""
    if chosen := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(chosen[0]) is None:
            raise BuildError(f"CXX={os.environ['CXX']}: there is no such program. Unset CXX, or name a C++ compiler")
        return chosen
    return next(([name] for name in COMPILERS if shutil.which(name)), [])


def plan(choice: str) -> tuple[list[Build], str]:
    """Say which builds to compile, and why those, or why none."""
    names = {name.strip() for name in choice.split(",")}
    if choice not in ("auto", "all", "none") and not names <= {*NAMES}:
        raise BuildError(f"{CHOICE}={choice} is none of auto, all, none, or some of {','.join(NAMES)}")
    if choice == "none":
        return [], f"{CHOICE}=none: nothing is compiled. {SLOWER}"
    if platform.machine() not in ("x86_64", "AMD64"):
        return [], f"The native library has no build for {platform.machine()}. {SLOWER}"
    if not compiler():
        if choice != "auto":
            raise BuildError(f"{CHOICE}={choice} takes a C++ compiler, and there is none {INSTALL}")
        return [], f"There is no C++ compiler. {SLOWER} Install one {INSTALL} and run 'make setup' again."
    if choice == "all":
        return list(BUILDS), f"{CHOICE}=all"
    if choice != "auto":
        return [build for build in BUILDS if build.name in names], f"{CHOICE}={choice}"
    best = next((build for build in BUILDS if _runs_here(build)), None)
    if best is None:
        return [], f"This processor runs no build of the native library: the least of them takes AVX2. {SLOWER}"
    return [best], "the best that this processor runs"


def _runs_here(build: Build) -> bool:
    """Whether the compiler finds in this machine's processor whatever the build's flags let it use."""
    always, here, used = _macros(), _macros("-march=native"), _macros(*build.flags)
    return bool(used) and used - always <= here


@cache
def _macros(*flags: str) -> frozenset[str]:
    """What the compiler predefines with these flags; nothing where it does not know one of them."""
    command = [*compiler(), *flags, "-dM", "-E", "-x", "c++", os.devnull]
    done = _run(command)
    if done.returncode and flags in ((), ("-march=native",)):
        raise BuildError(
            f"{shlex.join(command)}\n{done.stdout}{done.stderr}\nThe C++ compiler does not work: see above. "
            f"CXX names another; with {CHOICE}=none none is needed, and models run through torch."
        )
    return frozenset(line.split()[1] for line in done.stdout.splitlines()) if done.returncode == 0 else frozenset()


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - the user's own compiler


def compile_all(paths: Mapping[Build, Path], options: Sequence[str] = ()) -> None:
    """Compile each build to its path, side by side; one that is here and current is copied."""

    def make(build: Build, path: Path) -> None:
        if not build.is_current():
            build.compile(path, options)
        elif path != build.path:
            shutil.copy(build.path, path)

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        list(pool.map(make, paths.keys(), paths.values()))


def remove_stale() -> None:
    """Remove libraries of other sources, flags or builds than there are now."""
    current = {build.path for build in BUILDS if build.is_current()}
    for path in FOLDER.glob(f"_*{SUFFIX}"):
        if path not in current and (SANITIZED or "sanitized" not in path.name):
            path.unlink()


def main() -> int:
    try:
        remove_stale()
        chosen, why = plan(os.environ.get(CHOICE) or "auto")
        if missing := [build.name for build in chosen if not build.is_current()]:
            print(f"Compiling the native library for {', '.join(missing)} ({why})", flush=True)  # noqa: T201
            compile_all({build: build.path for build in chosen})
        if not chosen:
            print(why)  # noqa: T201
    except BuildError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
