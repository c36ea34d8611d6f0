"""Reads the names and sizes of a checkpoint's weights from its files, without reading the weights."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

LENGTH_BYTES = 8  # at the start of a safetensors file, with the length of its header
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # converted to the configured dtype when loaded


@dataclass(frozen=True)
class StoredWeights:
    """names: of all tensors; num_bytes: bytes of all tensors once loaded."""

    names: frozenset[str]
    num_bytes: int


def stored_weights(model: str, dtype: torch.dtype, stored_dtype: Any) -> StoredWeights | None:
    """Read the names and size of the weights of `model`, a folder or a hub id, as loaded in `dtype`.

    stored_dtype: the dtype in the checkpoint's config. Returns None if nothing is known before loading: there are no
    safetensors, or there is one large file that is not downloaded yet.
    """
    try:
        if (file := _file(model, SAFE_WEIGHTS_INDEX_NAME)) is not None:
            index = json.loads(file.read_text())
            sizes = dtype.itemsize, (stored_dtype or dtype).itemsize
            return StoredWeights(frozenset(index["weight_map"]), index["metadata"]["total_size"] * sizes[0] // sizes[1])
        if (file := _file(model, SAFE_WEIGHTS_NAME, local=True)) is not None:
            tensors = _header(file)
            return StoredWeights(frozenset(tensors), sum(_loaded_bytes(tensor, dtype) for tensor in tensors.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # loading reports the error
    return None


def _file(model: str, name: str, *, local: bool = False) -> Path | None:
    """Return the path of a file of the checkpoint, or None. local: do not download it."""
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
    """Read the header of a safetensors file: name -> dtype, shape and offsets. Raises ValueError if it is not one."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(LENGTH_BYTES), "little")
        if length > file.stat().st_size:
            raise ValueError("not a safetensors file")
        tensors: dict[str, Any] = json.loads(opened.read(length))
    tensors.pop("__metadata__", None)
    return tensors


def _loaded_bytes(tensor: dict[str, Any], dtype: torch.dtype) -> int:
    """Return the bytes of a tensor once loaded; only floats are converted to `dtype`."""
    begin, end = tensor["data_offsets"]
    if tensor["dtype"] in FLOATS:
        return math.prod(tensor["shape"]) * dtype.itemsize
    return int(end - begin)
