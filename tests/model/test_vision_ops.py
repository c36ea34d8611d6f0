"""torchvision's transforms work over whichever build of torch is installed, whoever imports them first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]


def fresh(code: str) -> str:
    """Run code in a process of its own, in which nothing has been imported."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("first", ["model", "model.targets.registry", "model.bench.inputs", "model.config"])
def test_whoever_comes_first_processors_find_torchvision(first: str) -> None:
    code = f"import {first}; from transformers import AutoProcessor, CLIPImageProcessor as C; print(C().backend)"
    assert fresh(code).split()[-1] == "torchvision"


@pytest.mark.parametrize(
    "resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS], ids=lambda r: r.name
)
@pytest.mark.parametrize("size", [(20, 30), (97, 64)], ids=["smaller", "larger"])
def test_resizing_is_pillows_within_a_shade(resample: Image.Resampling, size: tuple[int, int]) -> None:
    from torchvision.transforms.v2 import InterpolationMode, functional

    picture = np.random.default_rng(1).integers(0, 256, (50, 40, 3), np.uint8)
    theirs = np.asarray(Image.fromarray(picture).resize(size[::-1], resample)).astype(int)
    mode = InterpolationMode(resample.name.lower())
    ours = functional.resize(torch.from_numpy(picture).permute(2, 0, 1), size, mode, antialias=True)
    assert np.abs(ours.permute(1, 2, 0).numpy().astype(int) - theirs).mean() < 1  # of noise: neighbours differ by 85


def test_only_a_library_that_does_not_load_is_replaced(tmp_path: Path) -> None:
    """A declared operator would clash with the real one of a library that loads."""
    loadable = Path(torch.__file__).parent / "lib" / "libtorch_global_deps.so"
    kinds = {"whole": loadable, "text": Path(__file__), "missing": None, "gone": tmp_path / "nowhere"}
    for kind, library in kinds.items():
        (tmp_path / kind).mkdir()
        if library is not None:
            (tmp_path / kind / "_C.so").symlink_to(library)
    for kind in kinds:
        package = str(tmp_path / kind)
        code = (
            "from pathlib import Path; from model.vision_ops import declare_missing_operators as declare; import torch;"
            f"print(declare(Path({package!r})), hasattr(torch.ops.torchvision, 'nms'))"
        )
        assert fresh(code).split() == (["False"] * 2 if kind == "whole" else ["True"] * 2), kind


def test_looking_for_torchvision_happens_once_and_imports_nothing_before() -> None:
    code = (
        "import sys, model; from model.vision_ops import TorchvisionFinder as F; import model.config;"
        "print(F in sys.meta_path, 'torch' in sys.modules); import torchvision; print(F in sys.meta_path);"
        "model.vision_ops.install(); print(F in sys.meta_path)"
    )
    assert fresh(code).split() == ["True", "False", "False", "False"]
