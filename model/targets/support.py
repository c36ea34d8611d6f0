"""Refuses checkpoints, by their config alone, that our decoder would compute differently from transformers.

Load checks (load_check.py) compare short prompts. What shows only in long ones has to be refused by name: a rotation
that depends on more than the position, and windows that attention does not hear of. Such a model would answer with
wrong tokens and no error. A window, or a switch of rope, beyond `max_model_len` never applies and is accepted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from model.backends.kv_cache import LayerShape
from model.config import EngineConfig
from model.errors import ConfigError

FIXED_ROPE = ("default", "linear", "llama3", "yarn")
# The config field with the attention window of each type of layer, in positions.
WINDOW_FIELDS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
NO_TOWERS = ("pixtral",)  # their pictures keep their own sizes
WITH_SINKS = ("gpt_oss",)  # decoders whose attention has sinks


def windows(text: Any) -> dict[str, int]:
    """Return the attention windows of a language model's layers in positions, by config field."""
    kinds = getattr(text, "layer_types", None)
    if kinds is None:  # a family without layer types: every layer has the window, if there is one
        kinds = ["sliding_attention"] if getattr(text, "use_sliding_window", True) else []
    fields = {WINDOW_FIELDS[kind] for kind in kinds if kind in WINDOW_FIELDS}
    return {field: size for field in sorted(fields) if (size := getattr(text, field, None)) is not None}


def rope_parameters(text: Any) -> list[dict[str, Any]]:
    """Return the rope's parameters; some models have several sets, one per type of layer."""
    parameters = getattr(text, "rope_parameters", None) or {}
    return [one for one in parameters.values() if isinstance(one, dict)] or [parameters]


def rope_limits(text: Any) -> dict[str, int]:
    """Return the number of positions below which a language model's rope is fixed, by rope type; empty if it always is.

    `dynamic` and `longrope` choose all frequencies by the largest position of a pass.
    """
    limits = {}
    for one in rope_parameters(text):
        kind = one.get("rope_type", "default")
        if kind == "longrope":
            limits[kind] = int(one.get("original_max_position_embeddings") or text.max_position_embeddings)
        elif "dynamic" in kind:
            limits[kind] = int(text.max_position_embeddings)
    return limits


def rope_is_fixed(text: Any) -> bool:
    """Return whether a position's rotation depends on the position alone, and on nothing else in a pass."""
    return all(one.get("rope_type", "default") in FIXED_ROPE for one in rope_parameters(text))


def is_plain(config: EngineConfig, checkpoint: Any) -> bool:
    """Return whether a family's own class can serve a checkpoint: a tower that it knows, and a decoder whose layers all
    attend to everything before them, with plain scores."""
    text = checkpoint.get_text_config()
    if getattr(getattr(checkpoint, "vision_config", None), "model_type", None) in NO_TOWERS:
        return False
    context = config.context(text.max_position_embeddings)
    if any(size < context for size in windows(text).values()):
        return False
    softcap = any("softcap" in field and value for field, value in text.to_dict().items())
    types = set(getattr(text, "layer_types", None) or ())
    return not softcap and text.model_type not in WITH_SINKS and types <= {"full_attention", *WINDOW_FIELDS}


def check(config: EngineConfig, checkpoint: Any) -> None:
    """Raise ConfigError if a checkpoint needs an unsupported feature.

    config: a resolved one, which names the checkpoint; checkpoint: its transformers config.
    """
    for problem, cure in _problems(config, checkpoint):
        raise ConfigError(f"model {config.model!r} cannot be served: {problem}; {cure}")


def check_windows(config: EngineConfig, text: Any, shapes: Sequence[LayerShape | None]) -> None:
    """Raise ConfigError if layers have a window that their attention is not called with.

    text: transformers' config of the decoder; shapes: of its layers, as they were seen.
    """
    types = getattr(text, "layer_types", None) or ()
    sizes, context = windows(text), config.context(text.max_position_embeddings)
    for kind, shape in zip(types, shapes, strict=False):
        size = sizes.get(WINDOW_FIELDS.get(kind, ""), None)
        if shape is not None and shape.window is None and size is not None and size < context:
            raise ConfigError(
                f"model {config.model!r} cannot be served: its layers of type {kind!r} see {size} positions, by a mask "
                f"of their own, where max_model_len, here {context}, is larger; give --max-model-len {size} or less"
            )


def _problems(config: EngineConfig, checkpoint: Any) -> Iterator[tuple[str, str]]:
    """Yield each problem and its remedy."""
    text = checkpoint.get_text_config()
    context = config.context(text.max_position_embeddings)
    # Draft nodes have positions beyond the last token; those of a video may lie anywhere below the model's limit.
    several_axes = any("mrope_section" in one for one in rope_parameters(text))
    reach = (text.max_position_embeddings if several_axes else context) + config.nodes
    for rope_type, limit in rope_limits(text).items():
        if reach > limit:
            yield (
                f"its rope type {rope_type!r} (text_config.rope_parameters) chooses frequencies by the longest "
                f"sequence of a batch once positions reach {limit}, so an answer would depend on its neighbours",
                "use a model with another rope type"
                if several_axes or limit - config.nodes < 16
                else f"give --max-model-len {limit - config.nodes} or less",
            )
