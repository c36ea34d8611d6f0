"""Reads what a checkpoint's files say about its weights, without the weights: their names and their size in memory."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

LENGTH_BYTES = 8  # of a safetensors file's header, which says how long the rest of it is
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # loaded in the dtype that is configured


@dataclass(frozen=True)
class StoredWeights:
    """names: of all tensors; num_bytes: of all of them once loaded."""

    names: frozenset[str]
    num_bytes: int


def stored_weights(model: str, dtype: torch.dtype, stored_dtype: Any) -> StoredWeights | None:
    """Those of a folder or a hub id, loaded in `dtype`; stored_dtype: what its config says they are stored in. None
    where nothing is known before they are loaded: no safetensors, or one large file that is still to be downloaded."""
    try:
        if (file := _file(model, SAFE_WEIGHTS_INDEX_NAME)) is not None:
            index = json.loads(file.read_text())
            sizes = dtype.itemsize, (stored_dtype or dtype).itemsize
            return StoredWeights(frozenset(index["weight_map"]), index["metadata"]["total_size"] * sizes[0] // sizes[1])
        if (file := _file(model, SAFE_WEIGHTS_NAME, local=True)) is not None:
            tensors = _header(file)
            return StoredWeights(frozenset(tensors), sum(_loaded_bytes(tensor, dtype) for tensor in tensors.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # loading will say what is wrong with them
    return None


def _file(model: str, name: str, *, local: bool = False) -> Path | None:
    """A file of the checkpoint; local: only if it need not be downloaded."""
    found = cached_file(
        model,
        name,
        local_files_only=local,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def _header(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(LENGTH_BYTES), "little")
        if length > file.stat().st_size:
            raise ValueError("not a safetensors file")
        tensors: dict[str, Any] = json.loads(opened.read(length))
    tensors.pop("__metadata__", None)
    return tensors


def _loaded_bytes(tensor: dict[str, Any], dtype: torch.dtype) -> int:
    begin, end = tensor["data_offsets"]
    if tensor["dtype"] in FLOATS:
        return math.prod(tensor["shape"]) * dtype.itemsize
    return int(end - begin)
