"""Quantised checkpoints answer as transformers does with them; some are converted to ordinary weights when loaded.

Those of packages that are no dependency are tested where the package is installed: `pip install bitsandbytes
compressed-tensors`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from model.engine.engine import Engine
from model.errors import ConfigError
from model.request import Message
from tests.model import tiny

KEPT = ["lm_head", "vision_tower", "multi_modal_projector"]
REQUEST = tiny.ask("r", tiny.image(1), "What do you see?", max_tokens=12)

pytestmark = pytest.mark.filterwarnings("ignore")  # of quantisers


def quantised(
    source: Path, folder: Path, pack: Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]], **described: Any
) -> tuple[Path, Path]:
    """Save a checkpoint with quantised decoder layers, and one with ordinary weights of the same values.

    pack: returns the tensors to store, and the values they stand for.
    """
    stored: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if "language_model" in name and "_proj.weight" in name:
            packed, values[name] = pack(name.removesuffix("weight"), weight)
            stored |= packed
        else:
            stored[name] = values[name] = weight
    for part, tensors in (("quantised", stored), ("plain", values)):
        shutil.copytree(source, folder / part)
        save_file(
            {k: v.contiguous() for k, v in tensors.items()}, folder / part / "model.safetensors", {"format": "pt"}
        )
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": described}
    (folder / "quantised" / "config.json").write_text(json.dumps(config))
    return folder / "quantised", folder / "plain"


def fp8(prefix: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = weight.abs().max() / 448.0
    packed = (weight / scale).to(torch.float8_e4m3fn)
    return {f"{prefix}weight": packed, f"{prefix}weight_scale_inv": scale.reshape(1, 1)}, packed.float() * scale


def packed_integers(prefix: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Eight bits a number, four numbers in an int32, a scale for each row."""
    scale = weight.abs().amax(1, keepdim=True) / 127.0
    numbers = (weight / scale).round().clamp(-128, 127)
    shifted = (numbers + 128).to(torch.int32).view(weight.shape[0], -1, 4)
    packed = (shifted * torch.tensor([1, 1 << 8, 1 << 16, 1 << 24])).sum(-1).to(torch.int32)
    tensors = {"weight_packed": packed, "weight_scale": scale, "weight_shape": torch.tensor(weight.shape)}
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}, numbers * scale


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
INTEGERS = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}},
    "ignore": ["lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"],
}


@pytest.mark.parametrize("method", ["fp8", "compressed-tensors"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="fp8 has kernels there")
def test_without_kernels_weights_are_converted_and_run_like_any_others(
    method: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    if method == "fp8":
        folders = quantised(tiny_checkpoint, tmp_path, fp8, **FP8, modules_to_not_convert=KEPT)
    else:
        pytest.importorskip("compressed_tensors")
        folders = quantised(tiny_checkpoint, tmp_path, packed_integers, **INTEGERS)
    engines = [Engine(tiny.config(folder)) for folder in folders]
    answers = [tiny.answers(engine, [REQUEST])["r"] for engine in engines]
    assert answers[0] == answers[1]
    assert answers[0] != tiny.answers(Engine(tiny.config(tiny_checkpoint)), [REQUEST])["r"], "nothing was quantised"
    assert engines[0].info.memory == engines[1].info.memory
    assert engines[0].info.backend == engines[1].info.backend


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_answers_as_generate_does(bits: int, tiny_checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    folder = shutil.copytree(tiny_checkpoint, tmp_path / "target")
    how = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint, quantization_config=how, dtype=torch.float32)
    model.save_pretrained(folder)
    engine = Engine(tiny.config(folder))
    assert engine.info.backend == "torch"
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    inputs = tiny.by_processor(processor, (Message("user", (tiny.image(1), "What do you see?")),), return_tensors="pt")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    expected = out[0, inputs["input_ids"].shape[1] :].tolist()
    assert tiny.answers(engine, [REQUEST])["r"][: len(expected)] == expected
    plain = Engine(tiny.config(tiny_checkpoint))
    assert engine.info.memory["weights"] < plain.info.memory["weights"]


def test_fp8_without_its_scales_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    def forgetful(prefix: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        packed, values = fp8(prefix, weight)
        return {name: tensor for name, tensor in packed.items() if "scale" not in name}, values

    folder, _ = quantised(tiny_checkpoint, tmp_path, forgetful, **FP8, modules_to_not_convert=KEPT)
    with pytest.raises(ConfigError, match="scale"):
        Engine(tiny.config(folder))
