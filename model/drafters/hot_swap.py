"""Loads a new draft for a running engine, in two steps: read and check it, then pack it for use.

Reading takes time but uses only torch, so any thread may do it while the engine steps. Packing calls the native
library, which only the engine's thread may do. Everything that can be refused is refused while reading, with nothing
changed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from model.backends.kv_cache import KVCache
from model.config import TRAINED, EngineConfig
from model.drafters import checkpoint, registry
from model.drafters.base import Drafter, Room
from model.errors import ConfigError
from model.targets.base import Target


@dataclass(frozen=True)
class Incoming:
    """A draft that was read and fits.

    config: the engine's config with this draft, resolved; cache: the drafter's KV cache, if it needs one. It is
    allocated early because a large one takes longer than all the rest.
    """

    config: EngineConfig
    network: checkpoint.Network
    cache: KVCache | None


@dataclass(frozen=True)
class Packed:
    """A draft that an engine may use from its next step on."""

    config: EngineConfig
    drafter: Drafter


def read(folder: str, requested: EngineConfig, serving: EngineConfig, target: Target, room: Room) -> Incoming:
    """Read the draft in `folder` for an engine whose config `requested` was resolved to `serving`.

    Raises ConfigError if it cannot be read, does not fit this target, or needs settings that are fixed when an engine
    starts.
    """
    if serving.drafter not in TRAINED:
        raise ConfigError(
            f"the engine runs with drafter {serving.drafter!r}, which uses no trained draft: "
            "start it with --draft PATH of one, then another can take its place"
        )
    config = replace(requested, draft=folder).resolved()
    if config.nodes > serving.nodes:
        raise ConfigError(
            f"draft {folder!r} is one for {config.drafter}, whose trees have {config.nodes} nodes, and the engine has "
            f"room for {serving.nodes}: start it with --max-nodes {config.nodes}, or with this draft"
        )
    if config.adaptive_drafting != serving.adaptive_drafting:
        raise ConfigError(
            f"draft {folder!r} is one for {config.drafter}, and {serving.drafter} is served: one drafts fixed trees, "
            "the other as much as pays, which is settled when the engine starts: start it with this draft"
        )
    network = checkpoint.load(Path(folder), target)
    return Incoming(config, network, registry.KINDS[config.drafter].new_cache(target, network, room))


def pack(incoming: Incoming, target: Target, room: Room) -> Packed:
    """Build the drafter. Must be called in the engine's thread, between two steps."""
    name = incoming.config.drafter
    return Packed(incoming.config, registry.KINDS[name](name, target, incoming.network, room, incoming.cache))
