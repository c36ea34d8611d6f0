"""Test that the emulated instructions of the native library (avx512.h) compute what processors do, bit for bit."""

from __future__ import annotations

import ctypes
import subprocess
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from model.backends.attention import MaskKind
from model.backends.native import library
from model.backends.native.builds import BUILDS, FLAGS, NAMES, compiler
from model.backends.native.library import Library, PackedLinear
from model.backends.native.stack import Shape, Stack
from tests.model.libraries import AVX512_BF16, emulated, every_library
from tests.model.test_native import HIDDEN, INNER, cache, cast, decoded, layer, normal, rotary, some_tree

BF16 = BUILDS[NAMES.index("avx512bf16")]
SOURCE = """
#include <immintrin.h>
#include <string.h>
extern "C" void dot(float* sums, const void* a, const void* b) {
  _mm512_storeu_ps(sums, _mm512_dpbf16_ps(_mm512_loadu_ps(sums), (__m512bh)_mm512_loadu_si512(a), (__m512bh)_mm512_loadu_si512(b)));
}
extern "C" void narrow(const float* x, void* y) {
  const auto rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(x));
  memcpy(y, &rounded, sizeof rounded);
}
"""  # noqa: E501


def compiled(folder: Path, *options: str) -> ctypes.CDLL:
    (folder / "source.cpp").write_text(SOURCE)
    command = [*compiler(), *FLAGS, *BF16.flags, *options, "source.cpp", "-o", "made.so"]
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "made.so"))


def nearest(x: Fraction) -> float:
    """Round to the nearest float32, ties to even; denormal results become zero."""
    if x == 0:
        return 0.0
    exponent = abs(x.numerator).bit_length() - x.denominator.bit_length()
    if abs(x) < Fraction(2) ** exponent:
        exponent -= 1
    step = Fraction(2) ** (exponent - 23)
    rounded = round(x / step) * step
    return float(rounded) if abs(rounded) >= Fraction(2) ** -126 else 0.0


def exact(x: np.ndarray) -> list[Fraction]:
    """Convert float32 to fractions; denormals become zero."""
    return [Fraction(float(one)) if abs(one) >= 2.0**-126 else Fraction(0) for one in x]


def wide(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.uint32) << 16).view(np.float32)


def expected(sums: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Compute VDPBF16PS as Intel's manual defines it: of each pair the second product first."""
    left, right = exact(wide(a)), exact(wide(b))
    out = []
    for i, x in enumerate(exact(sums)):
        for at in (2 * i + 1, 2 * i):
            x = Fraction(nearest(x + left[at] * right[at]))
        out.append(float(x))
    return np.array(out, np.float32)


def cases() -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Draw sums and factors of similar size, of all sizes, and so small that sums and products are denormal."""
    rng = np.random.default_rng(3)
    found = []
    for spread, center in ((0, 0), (3, 0), (12, 0), (30, 0), (4, -62), (3, -63), (2, -126)):
        for _ in range(20):
            factors = [
                np.ldexp(rng.standard_normal(32), rng.integers(center - spread, center + spread + 1, 32)).astype(
                    np.float32
                )
                for _ in range(2)
            ]
            size = max(2 * center, -126)
            sums = np.ldexp(rng.standard_normal(16), rng.integers(size - 2 * spread, size + 2 * spread + 1, 16))
            a, b = ((one.view(np.uint32) >> 16).astype(np.uint16) for one in factors)
            found.append((sums.astype(np.float32), a, b))
    return found


def dots(functions: ctypes.CDLL) -> list[np.ndarray]:
    out = []
    for sums, a, b in cases():
        into = sums.copy()
        functions.dot(*(ctypes.c_void_p(array.ctypes.data) for array in (into, a, b)))
        out.append(into)
    return out


@pytest.fixture
def feigned(tmp_path: Path) -> ctypes.CDLL:
    if not compiler() or library.lacking_features(BUILDS[NAMES.index("avx2")]):
        pytest.skip("no compiler, or no AVX2 to emulate on")
    return compiled(tmp_path, *AVX512_BF16)


def test_products_of_bfloat16_are_made_as_the_manual_says(feigned: ctypes.CDLL) -> None:
    seen = dots(feigned)
    small = 0
    for (sums, a, b), mine in zip(cases(), seen, strict=True):
        assert np.array_equal(mine, expected(sums, a, b))
        small += int(np.count_nonzero(mine == 0))
    assert small > 10, "none was flushed"


def test_numbers_are_rounded_to_bfloat16_as_the_manual_says(feigned: ctypes.CDLL) -> None:
    special = [
        0x00000001,
        0x807FFFFF,
        0x00800000,
        0x3F808000,
        0x3F818000,
        0x3F807FFF,
        0x7F7FFFFF,
        0x7F800000,
        0xFF800000,
    ]
    nans = {0x7F800001: 0x7FC0, 0xFFC12345: 0xFFC1, 0x7FBFFFFF: 0x7FFF}
    bits = np.array([*special, *nans, *range(0x3F800000, 0x3F840000, 0xFFF)], np.uint32)
    bits = np.concatenate([bits, np.zeros(-len(bits) % 16, np.uint32)])
    mine = np.empty(len(bits), np.uint16)
    for i in range(0, len(bits), 16):
        feigned.narrow(ctypes.c_void_p(bits[i:].ctypes.data), ctypes.c_void_p(mine[i:].ctypes.data))
    rounded = (
        torch.from_numpy(bits.view(np.float32).copy()).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    )
    rounded[:2] = 0, 0x8000  # denormals
    rounded[len(special) : len(special) + len(nans)] = list(nans.values())
    assert mine.tolist() == rounded.tolist()


def test_an_intel_that_multiplies_bfloat16_does_it_like_that(feigned: ctypes.CDLL, tmp_path: Path) -> None:
    if library.lacking_features(BF16) or "Intel" not in torch.cpu.get_capabilities().get("cpu_name", ""):
        pytest.skip("no Intel with AVX512-BF16")
    (tmp_path / "real").mkdir()
    for mine, theirs in zip(dots(feigned), dots(compiled(tmp_path / "real")), strict=True):
        assert np.array_equal(mine, theirs)


def test_a_library_in_emulation_computes_the_bits_that_the_processor_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare products, norms, attention and activations on processors that can do both."""
    real, feigned = every_library().get("avx512"), emulated("avx512")
    if library.lacking_features(BUILDS[NAMES.index("avx512")]) or real is None or feigned is None:
        pytest.skip("no AVX512, or no compiler")
    for dtype in library.DTYPES:
        for mine, theirs in zip(outputs(real, dtype, monkeypatch), outputs(feigned, dtype, monkeypatch), strict=True):
            assert torch.equal(mine, theirs)


def outputs(one: Library, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Compute layers of either kind, on a prompt and on the branches of a tree, and a linear layer."""
    monkeypatch.setattr(library, "load", lambda: one)
    library.use_threads(2)
    found = []
    for clip in (False, True):
        settings = {"norm": "layer", "activation": "quick_gelu", "gated": False} if clip else {}
        shape = Shape(HIDDEN, 4, 2, 32, INNER, 1e-5, **settings)  # type: ignore[arg-type]
        weights = [cast(layer(i, 4, 2, 32, bias=clip, clip=clip), dtype) for i in (1, 20)]
        stack = Stack(shape, weights, rotary=None if clip else rotary(32, 300))
        starts, parents = np.array([17, 95], np.int32), some_tree(21, 2, seed=3)
        x, depths = normal(2, 21, HIDDEN, seed=2).to(dtype), np.tile(np.arange(21), (2, 1))
        for mask_kind, more in ((MaskKind.CAUSAL, {}), (MaskKind.TREE, {"parents": parents})):
            found.append(decoded(stack, cache(shape, 2, dtype), starts, x, depths, mask_kind, **more).clone())
    matrix = PackedLinear(normal(100, 96, seed=1).to(dtype), normal(100, seed=2).to(dtype))
    return [*found, *(matrix(normal(rows, 96, seed=3).to(dtype)) for rows in (1, 5, 40))]
