"""The configurations of checkpoints that people use, in tests/families/configs, written from memory of the hub's.

`build` makes a checkpoint of one: whole, or with fewer layers and a small vocabulary. Tokenizers are the tiny families'
own, so the ids of special tokens differ from the published ones.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

from tests.families import zoo
from tests.families.zoo import Checkpoint

FOLDER = Path(__file__).parent / "configs"
LAYER_FIELDS = ("num_hidden_layers", "depth")
ID_FIELDS = ("_token_id", "_token_index")


@dataclass(frozen=True)
class Published:
    """A published checkpoint. family: of the tiny checkpoint with its processor; parameters: billions; token_bytes: of
    the KV cache a token, in bfloat16, where no layer has a window; layers: that `build` leaves."""

    name: str
    family: str
    parameters: float
    token_bytes: int | None
    layers: int = 2
    sizes: Any = None

    @property
    def described(self) -> dict[str, Any]:
        described: dict[str, Any] = json.loads((FOLDER / f"{self.name}.json").read_text())
        return described


def tiles(side: int, tokens: int) -> Any:
    """Set the size of tiles or pictures of a processor, and the number of tokens of each."""

    def change(processor: Any) -> None:
        images = processor.image_processor
        for field in ("size", "max_image_size"):
            value = getattr(images, field, None)
            if value is not None:
                key = {name: side for name in ("longest_edge", "height", "width") if value.get(name)}
                setattr(images, field, type(value)(**key))
        for field in ("image_seq_length", "image_seq_len"):
            if hasattr(processor, field):
                setattr(processor, field, tokens)

    return change


def soft_tokens(processor: Any) -> None:
    """Give Gemma 4's processors the sizes that checkpoints have."""
    for part, tokens in ((processor.image_processor, 280), (processor.video_processor, 70)):
        part.patch_size, part.pooling_kernel_size, part.max_soft_tokens = 16, 3, tokens
    processor.image_seq_length = 280


PUBLISHED = (
    Published("Qwen3-VL-2B-Instruct", "qwen3_vl", 2.13, 28 * 2 * 8 * 128 * 2),
    Published("Qwen3-VL-8B-Instruct", "qwen3_vl", 8.77, 36 * 2 * 8 * 128 * 2),
    Published("Qwen3.5-4B", "qwen3_5", 4.54, 8 * 2 * 4 * 256 * 2),
    Published("Qwen2.5-VL-7B-Instruct", "qwen2_5_vl", 8.29, 28 * 2 * 4 * 128 * 2),
    Published("gemma-3-4b-it", "gemma3", 4.30, None, 4, tiles(896, 256)),
    Published("gemma-4-E4B-it", "gemma4", 7.63, None, sizes=soft_tokens),
    Published("InternVL3_5-8B-HF", "internvl_qwen3", 8.53, 36 * 2 * 8 * 128 * 2, sizes=tiles(448, 256)),
    Published("SmolVLM2-2.2B-Instruct", "smolvlm", 2.25, 24 * 2 * 32 * 64 * 2, sizes=tiles(384, 81)),
    Published("GLM-4.1V-9B-Thinking", "glm4v", 10.29, 40 * 2 * 2 * 128 * 2),
    Published("PaddleOCR-VL", "paddleocr_vl", 0.91, 18 * 2 * 2 * 128 * 2),
    Published("Mistral-Small-3.1-24B-Instruct-2503", "mistral3", 24.01, 40 * 2 * 8 * 128 * 2, 1),
)


def config_of(published: Published, tiny: Checkpoint) -> Any:
    """Return the config with few layers, one of each kind at least, and with the tokens of a tiny checkpoint."""
    described = published.described
    kinds = getattr(AutoConfig.for_model(**published.described).get_text_config(), "layer_types", None)
    text, vision = described.get("text_config", described), described["vision_config"]
    vocabulary = zoo.vocabulary(tiny.processor.tokenizer)
    text |= {"vocab_size": vocabulary, "num_hidden_layers": published.layers}
    for field, value in (("vocab_size_per_layer_input", vocabulary), ("num_kv_shared_layers", 0)):
        if field in text:
            text[field] = value
    if kinds is not None:
        text["layer_types"] = [*dict.fromkeys(kinds), *kinds][: published.layers]
        assert set(text["layer_types"]) == set(kinds)
    for field in LAYER_FIELDS:
        if field in vision:
            vision[field] = 2
    for field in ("deepstack_visual_indexes", "fullatt_block_indexes"):
        if vision.get(field):
            vision[field] = [0, 1]
    config = AutoConfig.for_model(**described)
    for ours, theirs in ((config, tiny.config), (config.get_text_config(), tiny.config.get_text_config())):
        for field, value in theirs.to_dict().items():
            if field.endswith(ID_FIELDS) and hasattr(ours, field):
                setattr(ours, field, value)
    return config


def build(published: Published, folder: Path) -> Path:
    """Save a checkpoint with few layers to `folder`, in bfloat16."""
    tiny = zoo.families()[published.family].build()
    config = config_of(published, tiny)
    if published.sizes is not None:
        published.sizes(tiny.processor)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device="cpu")
    model.tie_weights()
    fill(model)
    words = tiny.processor.tokenizer
    model.generation_config = GenerationConfig(eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id)
    model.save_pretrained(folder)
    tiny.processor.save_pretrained(folder)
    return folder


def fill(model: torch.nn.Module) -> None:
    """Fill weights with random numbers, of which there are only a million: drawing billions would take minutes."""
    numbers = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim < 2:
                weight.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
                continue
            flat, scale = weight.view(-1), (weight.numel() / weight.shape[0]) ** -0.5
            for start in range(0, len(flat), len(numbers)):
                part = flat[start : start + len(numbers)]
                torch.mul(numbers[: len(part)], scale, out=part)
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.fill_(1.0)
