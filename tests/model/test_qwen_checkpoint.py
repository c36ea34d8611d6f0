"""Test that a checkpoint with the files, names and shapes of the published Qwen2.5-VL loads and runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch

from model.backends.native import library
from model.engine.engine import Engine
from model.request import Medium
from tests.model import tiny, tiny_qwen
from tests.model.oracle import with_oracle
from tests.model.test_qwen2_5_vl import Theirs


def as_on_the_hub(folder: Path, made: Path) -> Path:
    """Convert a checkpoint to the published layout: flat config, older weight names, legacy template file."""
    folder.mkdir()
    config = json.loads((made / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    for name in ("layer_types", "model_type", "dtype"):
        text.pop(name, None)
    kept = {name: value for name, value in config.items() if name not in text}
    flat = (
        text
        | kept
        | {
            "rope_theta": rope["rope_theta"],
            "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
            "use_sliding_window": False,
            "sliding_window": 32768,
            "max_window_layers": 2,
            "model_type": "qwen2_5_vl",
            "tie_word_embeddings": config["tie_word_embeddings"],
        }
    )
    flat["vision_config"] = {k: v for k, v in flat["vision_config"].items() if k != "rope_parameters"}
    (folder / "config.json").write_text(json.dumps(flat))
    weights = safetensors.torch.load_file(made / "model.safetensors")
    renamed = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): value
        for name, value in weights.items()
    }
    safetensors.torch.save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    processor = json.loads((made / "preprocessor_config.json").read_text())
    size = processor.pop("size")
    processor |= {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    processor |= {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": tiny_qwen.CHAT_TEMPLATE}))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).write_text((made / name).read_text())
    return folder


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_checkpoint_of_the_published_shape_loads_and_runs(tied: bool, tmp_path: Path) -> None:
    """Heads of 128 in sections of 16, 24 and 24, those of the tower of 80, patches of 14, windows of 112 pixels, seven
    query heads to one of keys, two ends of answers: all but the number of layers and of heads."""
    made = tiny_qwen.save_checkpoint(
        tmp_path / "made",
        tied=tied,
        text={
            "hidden_size": 896,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 7,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        vision={
            "hidden_size": 160,
            "intermediate_size": 100,
            "patch_size": 14,
            "window_size": 112,
            "depth": 3,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        },
    )
    folder = as_on_the_hub(tmp_path / "target", made)
    reference = Theirs(made)
    engine = Engine(tiny.config(folder, max_num_seqs=4, max_model_len=1024))
    if library.load() is not None:
        assert engine.target.native
    assert engine.target.eos_ids == {2, 0}
    shown = np.random.default_rng(0).integers(0, 256, (1, 150, 260, 3), np.uint8)
    clip = np.random.default_rng(1).integers(0, 256, (5, 84, 56, 3), np.uint8)
    contents: tuple[tuple[str | Medium, ...], ...] = (
        (Medium("image", shown), "Describe the image."),
        (Medium("video", clip, 0.8), "What?"),
        ("How many?",),
    )
    requests = [tiny.ask(str(i), *content, max_tokens=12) for i, content in enumerate(contents)]
    requests = [replace(r, params=replace(r.params, ignore_eos=False)) for r in requests]
    answers = tiny.answers(engine, requests)
    for request in requests:
        assert answers[request.request_id] == reference.answer(request.messages, 12)
    with_oracle(engine, answers)
    assert tiny.answers(engine, requests) == answers
