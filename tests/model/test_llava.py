"""Test LLaVA checkpoints with towers other than CLIP: a prompt has one place for each feature, or is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    Dinov2Config,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    SiglipVisionConfig,
)

from model.engine.engine import Engine
from model.errors import ConfigError
from model.targets.registry import load_target
from tests.model import tiny
from tests.model.test_equality import CONTENTS, generated

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": tiny.SIDE,
    "patch_size": tiny.PATCH,
}
SIGLIP = SiglipVisionConfig(**SHAPE, intermediate_size=64, vision_use_head=False)
CLIP = CLIPVisionConfig(**SHAPE, intermediate_size=64, projection_dim=32)
DINO = Dinov2Config(**SHAPE, mlp_ratio=2)
# tower, vision_feature_select_strategy, class tokens -> features of a picture
TOWERS: dict[str, tuple[PreTrainedConfig, str, int, int]] = {
    "SigLIP, all patches": (SIGLIP, "full", 0, 16),
    "SigLIP, all but the first": (SIGLIP, "default", 0, 15),
    "CLIP, patches": (CLIP, "default", 1, 16),
    "CLIP, class token too": (CLIP, "full", 1, 17),
    "DINOv2, patches": (DINO, "default", 1, 16),
    "DINOv2, class token too": (DINO, "full", 1, 17),
}


@pytest.mark.parametrize("name", TOWERS)
def test_a_prompt_has_as_many_places_as_the_tower_makes_features(name: str, tmp_path: Path) -> None:
    """Towers without a class token were off by one: every picture failed. Ids and answers are transformers' own."""
    vision, strategy, class_tokens, features = TOWERS[name]
    folder = tiny.save_checkpoint(tmp_path, vision=vision, strategy=strategy, class_tokens=class_tokens)
    engine = Engine(tiny.config(folder, max_num_seqs=2))
    assert engine.info.tokens_per_image == features
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    pixels = AutoProcessor.from_pretrained(folder).image_processor(tiny.picture(1)[0], return_tensors="pt")
    with torch.inference_mode():
        assert len(model.get_image_features(**pixels).pooler_output[0]) == features
    requests = [tiny.ask(kind, *CONTENTS[kind], max_tokens=12, ignore_eos=False) for kind in ("image", "two images")]
    ours = tiny.answers(engine, requests)
    for kind, answer in ours.items():
        assert answer == generated(folder, CONTENTS[kind], 12), kind


def test_a_processor_that_counts_otherwise_does_not_shift_the_prompt(tmp_path: Path) -> None:
    """Older checkpoints do not mention class tokens, so the tower's number of features counts."""
    engine = Engine(tiny.config(tiny.save_checkpoint(tmp_path, class_tokens=0), max_num_seqs=1))
    assert engine.info.tokens_per_image == tiny.TOKENS_PER_IMAGE
    assert len(tiny.answers(engine, [tiny.ask("r", *CONTENTS["image"], max_tokens=4)])["r"]) == 4


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"size": {"longest_edge": 32}, "do_center_crop": False}, "leaves pictures at different sizes"),
        ({"size": {"shortest_edge": 32}, "do_center_crop": False}, "leaves pictures at different sizes"),
        ({"size": {"height": 48, "width": 48}, "do_center_crop": False}, "does not read pictures of 48 x 48 pixels"),
        ({"size": {"height": 24, "width": 48}, "do_center_crop": False}, "does not read pictures of 24 x 48 pixels"),
    ],
    ids=["longest edge", "shortest edge", "too large", "wide"],
)
def test_pictures_that_the_tower_cannot_read_are_refused_at_start(
    changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    """Otherwise each picture would fail, one by one, while the service reports that it is ready."""
    folder = tiny.save_checkpoint(tmp_path)
    file = next(file for file in folder.glob("*.json") if "do_center_crop" in file.read_text())
    settings = json.loads(file.read_text())
    settings.get("image_processor", settings).update(changes)
    file.write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=says):
        load_target(tiny.config(folder).resolved())
