"""Refuses checkpoints, by their config alone, that our attention would compute differently from transformers.

Our attention sees all earlier positions and adds nothing to the scores, and a position's rotation depends on the
position alone. A model that needs more would answer with wrong tokens and no error, so it is refused by name before its
weights are loaded. A window, or a switch of rope, beyond `max_model_len` never applies and is accepted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from model.config import EngineConfig
from model.errors import ConfigError

FIXED_ROPE = ("default", "linear", "llama3", "yarn")
# The config field with the attention window of each type of layer, in positions.
WINDOW_FIELDS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
NO_TOWERS = {"pixtral": "its pictures keep their own sizes"}


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


def check(config: EngineConfig, checkpoint: Any, weights: Collection[str] = ()) -> None:
    """Raise ConfigError if a checkpoint needs an unsupported feature.

    config: a resolved one, which names the checkpoint; checkpoint: its transformers config; weights: the names of its
    tensors.
    """
    for problem, cure in _problems(config, checkpoint, weights):
        raise ConfigError(f"model {config.model!r} cannot be served: {problem}; {cure}")


def _problems(config: EngineConfig, checkpoint: Any, weights: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield each problem and its remedy."""
    text = checkpoint.text_config
    context = config.context(text.max_position_embeddings)
    kind = getattr(checkpoint.vision_config, "model_type", None)
    if checkpoint.model_type == "llava" and kind in NO_TOWERS:
        yield f"vision_config.model_type is {kind!r}, and {NO_TOWERS[kind]}", "use one with a CLIP or SigLIP tower"
    known = {"full_attention", *WINDOW_FIELDS}
    for layer_type in dict.fromkeys(getattr(text, "layer_types", None) or ()):
        if layer_type not in known:
            yield (
                f"text_config.layer_types has {layer_type!r}, which is not supported",
                "use a model all of whose layers are 'full_attention'",
            )
    for field, size in windows(text).items():
        if size < context:
            yield (
                f"its layers see the last {size} positions only (text_config.{field}), which is not supported where "
                f"max_model_len, here {context}, is larger",
                f"give --max-model-len {size} or less",
            )
    for field, value in text.to_dict().items():
        if "softcap" in field and value:
            yield f"text_config.{field} is {value}, and soft-capping is not supported", "use a model without it"
    if sinks := next((name for name in weights if name.endswith(".sinks")), None):
        yield f"its attention has sinks ({sinks}), which are not supported", "use a model without them"
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
