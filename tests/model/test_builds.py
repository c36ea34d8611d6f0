"""Test which builds of the native library are compiled and loaded, and what is reported if that fails.

Most tests use a stand-in for a compiler. It "finds" whatever processor a test wants, and "compiles" by writing its
command line to the output. tests/model/test_native.py tests the library itself.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from model.backends.native import builds, library
from model.backends.native.__main__ import report
from model.backends.native.builds import BUILDS, NAMES, compiler, plan
from model.config import EngineConfig
from model.errors import ConfigError

ROOT = Path(__file__).parents[2]
NATIVE = "model/backends/native/"
AVX2 = "__AVX2__ __FMA__ __F16C__"
AVX512 = f"{AVX2} __AVX512F__ __AVX512BW__ __AVX512VL__ __AVX512DQ__"
BF16 = f"{AVX512} __AVX512BF16__"
AMX = f"{BF16} __AMX_TILE__ __AMX_BF16__"
PROCESSORS = {"amx": AMX, "avx512bf16": BF16, "avx512": AVX512, "avx2": AVX2}
MACROS = {f"-m{name}": f"__{name.replace('-', '_').upper()}__" for name in (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512bf16", "amx-tile", "amx-bf16",
)}  # fmt: skip

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="stand-ins are scripts; processors are Linux's to tell")


def script(path: Path, body: str) -> str:
    path.write_text(f"#!{sys.executable} -IS\nimport sys\n{body}")
    path.chmod(0o755)
    return str(path)


def stand_in(folder: Path, processor: str) -> str:
    """Write a "compiler" that reports the macros of `processor`."""
    body = f"""
macros = {MACROS}
if "-E" in sys.argv:
    found = [macros[flag] for flag in sys.argv if flag in macros]
    for name in ["__x86_64__", *({processor!r}.split() if "-march=native" in sys.argv else found)]:
        print("#define", name, 1)
else:
    with open(sys.argv[sys.argv.index("-o") + 1], "w") as made:
        made.write(chr(10).join(sys.argv))
"""
    return script(folder / "c++", body)


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Copy the sources, but no compiled library, to a folder of their own."""
    folder = tmp_path / "model" / "backends" / "native"
    shutil.copytree(builds.FOLDER, folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for package in ("model", "model/backends"):
        shutil.copy(ROOT / package / "__init__.py", tmp_path / package)
    monkeypatch.setattr(builds, "FOLDER", folder)
    monkeypatch.setattr(builds, "SOURCE", folder / "transformer.cpp")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.delenv(builds.CHOICE, raising=False)
    builds._macros.cache_clear()
    library.load.cache_clear()
    yield folder
    monkeypatch.undo()
    builds._macros.cache_clear()
    library.load.cache_clear()


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Return a function that sets FLASH_NATIVE."""

    def choose(choice: str) -> None:
        """Set FLASH_NATIVE and forget the library loaded before."""
        monkeypatch.setenv(library.CHOICE, choice)
        library.load.cache_clear()

    yield choose
    monkeypatch.undo()
    library.load.cache_clear()


def has(monkeypatch: pytest.MonkeyPatch, *features: str) -> None:
    """Pretend that the processor has these features."""
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64", **dict.fromkeys(features, True)}
    )


def runs(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Pretend that this build is the best one for the processor."""
    place = NAMES.index(name)
    has(monkeypatch, *{feature for build in BUILDS[place:] for feature in build.features})


def make(folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Compile as the Makefile does, in the project of that folder."""
    root = folder.parents[2]
    clean = {key: value for key, value in os.environ.items() if key not in (builds.CHOICE, "CXX", "PYTHONPATH")}
    command = [sys.executable, "-m", "model.backends.native.builds"]
    return subprocess.run(command, cwd=root, env=clean | env, capture_output=True, text=True)


def compiled(folder: Path) -> set[str]:
    return {path.stem.removeprefix("_") for path in folder.glob("_*.so")}


@pytest.mark.parametrize("processor", PROCESSORS)
def test_by_default_the_best_that_the_machine_runs_is_compiled_and_nothing_else(
    copy: Path, tmp_path: Path, processor: str
) -> None:
    done = make(copy, CXX=stand_in(tmp_path, PROCESSORS[processor]))
    assert done.returncode == 0, done.stderr
    assert compiled(copy) == {processor}
    assert processor in done.stdout
    assert make(copy, CXX=stand_in(tmp_path, PROCESSORS[processor])).stdout == "", "it is current"


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("auto", {"avx512"}),
        ("all", {*NAMES}),
        ("none", set()),
        ("avx2", {"avx2"}),
        ("amx", {"amx"}),
        ("avx2,avx512bf16", {"avx2", "avx512bf16"}),
        ("avx512, avx2", {"avx2", "avx512"}),
    ],
)
def test_flash_builds_says_what_is_compiled(copy: Path, tmp_path: Path, choice: str, expected: set[str]) -> None:
    done = make(copy, CXX=stand_in(tmp_path, AVX512), FLASH_BUILDS=choice)
    assert done.returncode == 0, done.stderr
    assert compiled(copy) == expected
    for name in expected:
        build = next(build for build in BUILDS if build.name == name)
        command = build.path.read_text().splitlines()
        assert [flag for flag in command if flag in MACROS] == list(build.flags)
        assert {*builds.FLAGS} <= {*command}


@pytest.mark.parametrize("choice", ["avx3", "auto,avx2", "all,none", "avx2,", ","])
def test_a_choice_that_names_no_builds_is_refused(copy: Path, tmp_path: Path, choice: str) -> None:
    done = make(copy, CXX=stand_in(tmp_path, AVX512), FLASH_BUILDS=choice)
    assert done.returncode == 1
    assert f"FLASH_BUILDS={choice} is none of auto, all, none, or some of amx,avx512bf16,avx512,avx2" in done.stderr
    assert not compiled(copy)


def test_the_compiler_and_torch_know_this_processor_alike() -> None:
    """The build asks the compiler for the processor's features, loading asks torch."""
    if not compiler() or platform.machine() != "x86_64":
        pytest.skip("no compiler, or no x86-64")
    for build in BUILDS:
        assert builds._runs_here(build) == (not library.lacking_features(build)), build.name


@pytest.mark.parametrize("when", ["asked for the processor", "compiling"])
@pytest.mark.parametrize("choice", ["auto", "avx2", "all"])
def test_a_compiler_that_fails_fails_the_setup_in_its_own_words(
    copy: Path, tmp_path: Path, when: str, choice: str
) -> None:
    good = stand_in(tmp_path, AVX512)
    fails = "True" if when != "compiling" else "'-E' not in sys.argv"
    broken = script(
        tmp_path / "broken",
        f"""
if {fails}:
    if "-o" in sys.argv:
        open(sys.argv[sys.argv.index("-o") + 1], "w").write("half of it")
    sys.exit("cc1plus: fatal error: the disk is on fire")
import subprocess
sys.exit(subprocess.run([{good!r}, *sys.argv[1:]]).returncode)
""",
    )
    done = make(copy, CXX=broken, FLASH_BUILDS=choice)
    assert done.returncode == 1
    assert "the disk is on fire" in done.stderr
    assert "FLASH_BUILDS=none" in done.stderr
    assert "Traceback" not in done.stderr
    assert not compiled(copy)
    assert not [path for path in copy.iterdir() if ".so" in path.name], "something half made was left behind"
    assert make(copy, CXX=broken, FLASH_BUILDS="none").returncode == 0


def test_an_installation_by_pip_fails_in_the_compilers_own_words(copy: Path, tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    broken = script(tmp_path / "broken", 'sys.exit("cc1plus: fatal error: the disk is on fire")')
    pip = [sys.executable, "-m", "pip", "--quiet", "--quiet", "--disable-pip-version-check", "wheel", "--no-deps"]
    command = [*pip, "--no-build-isolation", "--wheel-dir", str(tmp_path / "wheels"), "."]

    def wheel(cxx: str, choice: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        env = os.environ | {"CXX": cxx, builds.CHOICE: choice}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        made = list((tmp_path / "wheels").glob("*.whl"))
        names = subprocess.run([sys.executable, "-m", "zipfile", "-l", *made], capture_output=True, text=True).stdout
        return done, names.split()

    done, _ = wheel(broken, "avx2,avx512")
    assert done.returncode != 0
    assert "the disk is on fire" in done.stderr + done.stdout
    assert "FLASH_BUILDS=none" in done.stderr + done.stdout
    done, names = wheel(stand_in(tmp_path, AVX2), "all")
    assert done.returncode == 0, done.stderr
    carried = {
        name.removeprefix("model/backends/native/") for name in names if name.startswith("model/backends/native/")
    }
    assert {f"_{name}.so" for name in NAMES} <= carried, "a wheel can carry every build"
    sources = {path.name for path in (*ROOT.glob(f"{NATIVE}*.h"), *ROOT.glob(f"{NATIVE}*.cpp"))}
    assert sources <= carried, "what a library was compiled from has to be there to be compared"


def test_without_a_compiler_setup_goes_on_and_says_so(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = make(copy, PATH=str(tmp_path / "empty"))
    assert done.returncode == 0, done.stderr
    assert "There is no C++ compiler. Models run through torch" in done.stdout
    assert "apt-get install g++" in done.stdout
    for choice in ("all", "avx2", "avx512,avx2"):
        done = make(copy, PATH=str(tmp_path / "empty"), FLASH_BUILDS=choice)
        assert done.returncode == 1, "what was asked for by name is not left out in silence"
        assert "there is none (Debian and Ubuntu: apt-get install g++)" in done.stderr
    done = make(copy, CXX=str(tmp_path / "nowhere"))
    assert done.returncode == 1
    assert "there is no such program" in done.stderr


@pytest.mark.parametrize("machine", ["aarch64", "arm64", "riscv64", "ppc64le"])
def test_elsewhere_than_on_x86_64_nothing_is_compiled(
    copy: Path, monkeypatch: pytest.MonkeyPatch, machine: str
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    for choice in ("auto", "all", "avx2"):
        chosen, why = plan(choice)
        assert chosen == []
        assert f"no build for {machine}" in why


def test_a_processor_that_runs_none_is_told_so(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = make(copy, CXX=stand_in(tmp_path, "__SSE4_2__"))
    assert done.returncode == 0
    assert "runs no build of the native library" in done.stdout
    has(monkeypatch)
    monkeypatch.delenv(library.CHOICE, raising=False)
    assert report().startswith("No native library: this processor runs none of its builds. Models run through torch")


CHANGES: dict[str, Callable[[Path], object]] = {
    "a header says something else": lambda folder: (folder / "step.h").write_text("// nothing"),
    "the source says something else": lambda folder: (folder / "transformer.cpp").write_text("// nothing"),
    "a header came": lambda folder: (folder / "new.h").write_text(""),
    "a header went": lambda folder: (folder / "candidates.h").unlink(),
    "a header has another name": lambda folder: (folder / "candidates.h").rename(folder / "candidate.h"),
    "it is another build's": lambda folder: shutil.copy(folder / "_avx512.so", folder / "_avx2.so"),
    "it was cut off": lambda folder: (folder / "_avx2.so").write_bytes(b"\x7fELF"),
    "it is of older times": lambda folder: (folder / "_avx2.so").write_text("before there were stamps"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_library_of_other_sources_is_never_loaded(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, choose: Callable[[str], None], change: str
) -> None:
    """It is not even opened, because its behaviour is unknown. `make setup` replaces it."""
    cxx = stand_in(tmp_path, AVX2)
    assert make(copy, CXX=cxx, FLASH_BUILDS="avx2,avx512").returncode == 0
    runs(monkeypatch, "avx2")
    loaded: list[str] = []
    monkeypatch.setattr(library, "opened", lambda build, path: loaded.append(build.name))
    choose("auto")
    assert library.load() is None
    assert loaded == ["avx2"], "it is current"
    CHANGES[change](copy)
    for choice in ("auto", "avx2"):
        choose(choice)
        with pytest.raises(ConfigError, match=r"_avx2\.so was compiled from other sources.* run 'make setup'"):
            library.load()
    assert loaded == ["avx2"]
    choose("off")
    assert library.load() is None, "torch needs none"
    assert make(copy, CXX=cxx).returncode == 0
    choose("auto")
    assert library.load() is None
    assert loaded == ["avx2", "avx2"]


@pytest.mark.parametrize("flags", [("-O3",), ("-std=c++17", "-O3", "-ffast-math"), ()])
def test_other_flags_make_another_library(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags) -> None:
    assert make(copy, CXX=stand_in(tmp_path, AVX2)).returncode == 0
    (avx2,) = (build for build in BUILDS if build.name == "avx2")
    assert avx2.is_current()
    monkeypatch.setattr(builds, "FLAGS", flags)
    assert not avx2.is_current()


def test_setup_removes_what_is_not_current(copy: Path, tmp_path: Path) -> None:
    """Setup removes libraries of other sources or older names, and keeps current ones, whatever build is chosen."""
    cxx = stand_in(tmp_path, AVX512)
    assert make(copy, CXX=cxx, FLASH_BUILDS="avx2,amx").returncode == 0
    for name in ("_avx512.cpython-311-x86_64-linux-gnu.so", "_sse2.so", "_avx512bf16.so"):
        (copy / name).write_text("old")
    assert make(copy, CXX=cxx).returncode == 0
    assert compiled(copy) == {"avx2", "amx", "avx512"}


def test_what_a_server_has_loaded_is_not_written_over(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", stand_in(tmp_path, AVX2))
    build = BUILDS[NAMES.index("avx2")]
    build.compile(build.path)
    with build.path.open("rb") as loaded:
        before = loaded.read()
        build.compile(build.path, ("-g",))
        loaded.seek(0)
        assert loaded.read() == before
        assert build.path.read_bytes() != before


def test_a_library_is_there(choose: Callable[[str], None]) -> None:
    """If the processor and a compiler allow one, a missing library would silently cost most of the speed."""
    runnable = [build for build in BUILDS if not library.lacking_features(build)]
    if not runnable or not compiler():
        pytest.skip("no build for this processor, or no compiler")
    choose("auto")
    found = library.load()
    assert found is not None
    assert EngineConfig().resolved().dtype in ("bfloat16", "float32")
    for build in runnable:
        choose(build.name)
        if build.is_current():
            again = library.load()
            assert again is not None
            assert again.name == build.name, "not the best one, but the one that was chosen"
        else:
            with pytest.raises(ConfigError, match=f"'FLASH_BUILDS={build.name} make setup' does that"):
                library.load()


def test_it_can_be_turned_off_for_comparison(choose: Callable[[str], None]) -> None:
    choose("off")
    assert library.load() is None
    assert EngineConfig().resolved().dtype == "float32"
    assert report().startswith("No native library: FLASH_NATIVE=off. Models run through torch")


def test_a_build_that_is_not_to_be_had_is_an_error(
    copy: Path, choose: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("avx3", "sse2", "on"):
        choose(name)
        with pytest.raises(
            ConfigError, match=f"FLASH_NATIVE={name} is none of auto, off, amx, avx512bf16, avx512, avx2"
        ):
            library.load()
    has(monkeypatch, "avx2", "fma3", "f16c", "amx_tile", "avx512_f")
    for name, lacking in (("amx", "amx_bf16, avx512_bf16, avx512_bw"), ("avx512", "avx512_bw, avx512_vl, avx512_dq")):
        choose(name)
        with pytest.raises(ConfigError, match=f"FLASH_NATIVE={name} does not run: this processor lacks {lacking}"):
            EngineConfig().resolved()
    choose("avx2")
    with pytest.raises(ConfigError, match="it is not compiled; 'FLASH_BUILDS=avx2 make setup' does that"):
        library.load()


def test_the_next_best_is_loaded_where_the_system_forbids_the_best(
    copy: Path, tmp_path: Path, choose: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux may forbid AMX, for example."""
    assert make(copy, CXX=stand_in(tmp_path, AMX), FLASH_BUILDS="all").returncode == 0
    runs(monkeypatch, "amx")
    real = library.Library("avx512bf16", ctypes.CDLL(None), {})
    monkeypatch.setattr(library, "opened", lambda build, path: None if build.name == "amx" else real)
    choose("auto")
    assert library.load() is real
    assert "avx512bf16, as the system does not let this process use amx." in report()
    choose("amx")
    with pytest.raises(ConfigError, match="FLASH_NATIVE=amx does not run: the system does not let this process"):
        library.load()


@pytest.mark.parametrize(
    ("processor", "compiles", "choice", "first"),
    [
        ("amx", "all", "auto", "The native library: amx, the best that this processor runs."),
        ("avx512", "auto", "auto", "The native library: avx512, the best that this processor runs."),
        ("avx512", "all", "avx2", "The native library: avx2, as FLASH_NATIVE says."),
        (
            "amx",
            "avx2,avx512",
            "auto",
            "The native library: avx512, the best that is compiled; 'FLASH_BUILDS=amx make setup' compiles a better",
        ),
        (
            "avx2",
            "none",
            "auto",
            "No native library: none is compiled; 'FLASH_BUILDS=auto make setup' does that. Models",
        ),
        (
            "avx2",
            "avx512",
            "auto",
            "No native library: none is compiled; 'FLASH_BUILDS=auto make setup' does that. Models",
        ),
    ],
)
def test_it_says_which_build_is_used_and_why(
    copy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    choose: Callable[[str], None],
    processor: str,
    compiles: str,
    choice: str,
    first: str,
) -> None:
    cxx = stand_in(tmp_path, PROCESSORS[processor])
    assert make(copy, CXX=cxx, FLASH_BUILDS=compiles).returncode == 0
    monkeypatch.setenv("CXX", cxx)
    runs(monkeypatch, processor)
    monkeypatch.setattr(library, "opened", lambda build, path: library.Library(build.name, ctypes.CDLL(None), {}))
    choose(choice)
    said = report().splitlines()
    assert said[0].startswith(first)
    assert [line.split()[0] for line in said[1:]] == list(NAMES)
    for line, build in zip(said[1:], BUILDS, strict=True):
        assert ("not compiled;" not in line) == (build.name in compiled(copy))
        lacking = library.lacking_features(build)
        assert line.endswith(f"this processor lacks {', '.join(lacking)}" if lacking else "this processor runs it")


def test_where_there_is_no_compiler_it_says_what_to_install(
    copy: Path, choose: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs(monkeypatch, "avx512")
    choose("auto")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert "there is no C++ compiler (Debian and Ubuntu: apt-get install g++)" in report()
