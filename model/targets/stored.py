"""Reads the names, shapes and sizes of a checkpoint's weights from its files, without reading the weights.

Finds files that are missing, cut off or of an unknown format, and names them.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from model.errors import ConfigError

LENGTH_BYTES = 8  # at the start of a safetensors file, with the length of its header
# The dtypes of safetensors; None: packed, several numbers in a byte.
DTYPES: dict[str, torch.dtype | None] = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu},
    **{"F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "C64": torch.complex64},
    **{"F4": None, "F6_E2M3": None, "F6_E3M2": None},
}
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # converted to the configured dtype when loaded


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file. dtype: as the file names it; num_bytes: in the file."""

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int

    def loaded_bytes(self, dtype: torch.dtype) -> int:
        """Return the bytes once loaded; only floats are converted to `dtype`."""
        return math.prod(self.shape) * dtype.itemsize if self.dtype in FLOATS else self.num_bytes

    @property
    def on_meta(self) -> torch.Tensor:
        """Return a tensor of this shape and dtype without contents."""
        return torch.empty(self.shape, dtype=DTYPES[self.dtype], device="meta")


@dataclass(frozen=True)
class StoredWeights:
    """names: of all tensors; num_bytes: bytes of all tensors once loaded."""

    names: frozenset[str]
    num_bytes: int


def stored_weights(
    model: str, dtype: torch.dtype, stored_dtype: Any, hub: Mapping[str, Any] | None = None
) -> StoredWeights | None:
    """Read the names and size of the weights of `model`, a folder or a hub id, as loaded in `dtype`.

    stored_dtype: the dtype in the checkpoint's config; hub: arguments of `from_pretrained` such as revision. Returns
    None if nothing is known before loading: there are no safetensors, or there is one large file that is not downloaded
    yet. Raises ConfigError for a damaged file.
    """
    options = dict(hub or {})
    try:
        tensors = stored_tensors(model, options | {"local_files_only": True})
    except OSError:  # not all of its files are downloaded yet
        tensors = None
    if tensors is not None:
        return StoredWeights(frozenset(tensors), sum(each.loaded_bytes(dtype) for each in tensors.values()))
    if (index := _file(model, SAFE_WEIGHTS_INDEX_NAME, options)) is None:
        return None
    weight_map = _weight_map(index)
    try:
        total = json.loads(index.read_text())["metadata"]["total_size"]
    except (KeyError, TypeError):
        return None
    return StoredWeights(frozenset(weight_map), total * dtype.itemsize // (stored_dtype or dtype).itemsize)


def stored_tensors(model: str, hub: Mapping[str, Any]) -> dict[str, StoredTensor] | None:
    """Read the headers of all safetensors files of `model`, a folder or a hub id; downloads them first if need be.

    Returns None if it has no safetensors. Raises ConfigError, which names the file, if one is missing or cut off.
    """
    index = _file(model, SAFE_WEIGHTS_INDEX_NAME, hub)
    if index is None:
        single = _file(model, SAFE_WEIGHTS_NAME, hub)
        return None if single is None else read_header(single)
    weight_map = _weight_map(index)
    if Path(model).is_dir():
        shards = {name: index.parent / name for name in sorted(set(weight_map.values()))}
    else:
        paths, _ = get_checkpoint_shard_files(model, str(index), **hub)
        shards = {Path(path).name: Path(path) for path in paths}
    counts = Counter(weight_map.values())
    tensors: dict[str, StoredTensor] = {}
    for name in sorted(counts):
        file = shards.get(name)
        if file is None or not file.exists():
            raise ConfigError(
                f"{index.parent / name} is missing: {index.name} names it for {counts[name]} of {len(weight_map)} "
                "tensors; copy or download it again"
            )
        tensors |= read_header(file)
    return tensors


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Read the header of a safetensors file: its tensors by name. Raises ConfigError if the file is damaged."""
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(LENGTH_BYTES), "little")
            if length > size - LENGTH_BYTES:
                raise ValueError("its header is longer than the file")
            header: dict[str, Any] = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        tensors, end = {}, 0
        for name, each in header.items():
            first, last = each["data_offsets"]
            if each["dtype"] not in DTYPES:
                raise ValueError(f"{name} has the unknown dtype {each['dtype']!r}")
            tensors[name] = StoredTensor(each["dtype"], tuple(each["shape"]), last - first)
            end = max(end, last)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file} is not a valid safetensors file: {error}; copy or download it again") from error
    expected = LENGTH_BYTES + length + end
    if size != expected:
        state = "cut off" if size < expected else "too long"
        raise ConfigError(
            f"{file} is {state}: its header describes {expected} bytes and it has {size}; copy or download it again"
        )
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    """Read which shard holds each tensor. Raises ConfigError if the index is damaged."""
    try:
        weight_map: dict[str, str] = dict(json.loads(index.read_text())["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{index} is not a valid index of weights: {error!r}") from error
    return weight_map


def _file(model: str, name: str, hub: Mapping[str, Any]) -> Path | None:
    """Return the path of a file of the checkpoint, or None."""
    found = cached_file(
        model,
        name,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **hub,
    )
    return None if found is None else Path(found)
