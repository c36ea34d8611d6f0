"""Describes a loaded engine to its callers. Changes nothing."""

from __future__ import annotations

from model.backends.kv_cache import KVCache
from model.backends.native import library
from model.config import EngineConfig
from model.drafters.base import Drafter
from model.request import EngineInfo
from model.targets.base import Target
from model.targets.frames import most_frames


def describe(config: EngineConfig, target: Target, cache: KVCache, drafter: Drafter | None, context: int) -> EngineInfo:
    """Return the properties of an engine. context: maximum tokens of prompt and answer together."""
    return EngineInfo(
        model=config.model,
        device=config.device,
        dtype=config.dtype,
        backend=_backend(target),
        drafter=drafter.name if drafter else "off",
        max_model_len=context,
        max_num_seqs=cache.num_slots,
        tokens_per_image=target.tokens_per_image,
        geometry=target.geometry,
        max_frames=most_frames(target, context),
        memory=_memory(config, target, cache, drafter),
        chat=target.template.format(config.tool_call_parser, config.reasoning_parser),
    )


def _memory(config: EngineConfig, target: Target, cache: KVCache, drafter: Drafter | None) -> dict[str, int]:
    """Return bytes by purpose, known before the first request: allocated ones, and limits of caches."""
    found = {"weights": target.num_bytes, "kv_cache": cache.nbytes}
    if drafter is not None:
        found |= {"draft_weights": drafter.num_bytes, "draft_kv_cache": drafter.cache_bytes}
    return found | {"encoder_cache": config.encoder_cache_bytes}


def _backend(target: Target) -> str:
    """Say what computes the target."""
    if target.native:
        return library.name()
    return "torch" if target.verifier is None else f"{library.name()}, vision torch"
