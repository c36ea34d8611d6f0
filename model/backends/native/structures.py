"""The structures and functions of the native library, as ctypes sees them: field by field what structures.h has.

`Library` checks sizes, offsets and names of all fields against the library's own when it is loaded. Pointers to arrays
are addresses; whoever fills them in keeps the arrays.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from typing import Any, ClassVar


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class Fact(ctypes.Structure):
    """An entry of the library's own table: see structures.h."""

    _fields_: ClassVar = [("name", c_char_p), ("value", c_int64), ("offset", c_int64)]


class Structure(ctypes.Structure):
    """A structure that the library reads too."""


class Layer(Structure):
    _fields_ = [
        *_fields(c_void_p, "norm1 norm1_bias qkv qkv_bias q_norm k_norm out out_bias"),
        *_fields(c_void_p, "norm2 norm2_bias up up_bias down down_bias post1 post2"),
        *_fields(c_int32, "window table"),
    ]


class Stack(Structure):
    _fields_ = [
        *_fields(c_int32, "num_layers hidden heads kv_heads head_dim intermediate"),
        *_fields(c_int32, "norm activation gated num_aux num_tables num_positions"),
        *_fields(c_float, "eps scale"),
        ("layers", POINTER(Layer)),
        *_fields(c_void_p, "cos sin axes aux_layers final_norm final_bias"),
    ]


class LayerCache(Structure):
    _fields_ = [
        ("data", c_void_p),
        *_fields(c_int64, "values_stride slot_stride head_stride"),
        *_fields(c_int32, "ring capacity"),
    ]


class Cache(Structure):
    _fields_ = [
        ("data", c_void_p),
        *_fields(c_int64, "layer_stride values_stride slot_stride head_stride"),
        ("layers", POINTER(LayerCache)),
        *_fields(c_int32, "num_slots num_positions"),
        ("lengths", c_void_p),
    ]


class Rows(Structure):
    _fields_ = [
        *_fields(c_int32, "batch rows first_slot mask"),
        *_fields(c_void_p, "starts counts parents positions"),
        ("cache", Cache),
        *_fields(c_void_p, "blocks added"),
        *_fields(c_int32, "num_added whole"),
    ]


class Draft(Structure):
    _fields_ = [
        *_fields(c_int32, "block vocab width rank num_fixed num_eos num_tokens"),
        *_fields(c_void_p, "logits contexts before state after fixed eos_tokens draft_vocab"),
    ]


class Worth(Structure):
    _fields_ = _fields(c_void_p, "seconds chance tried accepted")


class Trees(Structure):
    _fields_ = [*_fields(c_int32, "batch rows"), *_fields(c_void_p, "budgets tokens sizes parents depths scores")]


class Linear(Structure):
    _fields_ = [*_fields(c_void_p, "packed bias"), *_fields(c_int32, "inputs outputs")]


class DraftNetwork(Structure):
    _fields_ = [
        ("stack", POINTER(Stack)),
        *_fields(c_void_p, "token_table embeddings masks input_norm"),
        *_fields(Linear, "embed out head"),
        *_fields(c_void_p, "aux_norms fuse_norm"),
        *_fields(Linear, "fuse feature context"),
        ("num_aux", c_int32),
        ("embedding_scale", c_float),
        ("candidates", Draft),
    ]


class Round(Structure):
    _fields_ = [
        ("target", POINTER(Stack)),
        ("embeddings", c_void_p),
        ("embedding_scale", c_float),
        ("head", Linear),
        ("draft", POINTER(DraftNetwork)),
        *_fields(Cache, "target_cache draft_cache"),
        *_fields(c_int32, "batch rows axes has_trees only_drafts num_tokens"),
        *_fields(c_void_p, "newest budgets roots"),
        ("trees", Trees),
        ("worth", Worth),
        *_fields(c_void_p, "counts positions paths accepted observed"),
        *_fields(c_void_p, "aux_hidden_states logits draft_logits last_context"),
        *_fields(c_void_p, "chosen emitted seconds"),
    ]


# What each function returns and takes, as in transformer.cpp. The first argument of most: whether numbers are bfloat16.
FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "flash_stamp": (c_char_p,),
    "flash_facts": (POINTER(Fact),),
    "flash_has_head_dim": (c_bool, c_int),
    "flash_begin": (c_bool, c_int),
    "flash_share_cores": (None, c_bool),
    "flash_pack": (None, c_bool, c_void_p, c_int, c_int, c_void_p),
    "flash_linear": (None, c_bool, c_void_p, c_int, c_int, c_int, c_void_p, c_void_p, c_void_p),
    "flash_patches": (None, c_bool, c_void_p, c_int, c_int, c_int, c_int, c_void_p, c_void_p),
    "flash_forward": (None, c_bool, POINTER(Stack), POINTER(Rows), c_void_p, c_void_p, c_void_p),
    "flash_write_kv": (None, c_bool, POINTER(Stack), POINTER(Rows), c_void_p),
    "flash_grow": (None, c_bool, POINTER(Draft), POINTER(Trees)),
    "flash_fuse": (None, c_bool, POINTER(DraftNetwork), c_void_p, c_int, c_void_p),
    "flash_propose": (None, c_bool, POINTER(DraftNetwork), POINTER(Rows), c_void_p, c_void_p, POINTER(Trees)),
    "flash_observe": (None, c_bool, POINTER(DraftNetwork), POINTER(Rows), c_void_p, c_int, c_void_p, c_void_p),
    "flash_draft_and_verify": (None, c_bool, POINTER(Round)),
    "flash_likeliest": (c_int64, c_bool, POINTER(Round), c_int32, c_int32, c_char_p),
    "flash_go_on": (c_int32, c_bool, POINTER(Round), c_int32, c_void_p, c_int32, c_char_p, c_int32, c_void_p, c_void_p),
    "flash_commit": (None, c_bool, POINTER(Round)),
}


class LayoutError(Exception):
    """The library and these declarations do not agree."""


def declare(functions: ctypes.CDLL) -> None:
    """Declare the types of all functions of a library."""
    for name, (result, *arguments) in FUNCTIONS.items():
        function = getattr(functions, name)
        function.restype, function.argtypes = result, arguments


def check_layout(functions: ctypes.CDLL, structures: Iterable[type[ctypes.Structure]]) -> dict[str, int]:
    """Compare structures with the library's own, and return the library's constants by name.

    Raises LayoutError where a field has another offset or size there, or is on one side only: each side would then
    write into what lies behind the other's.
    """
    theirs: dict[str, tuple[int, int]] = {}
    for fact in functions.flash_facts():
        if fact.name is None:
            break
        theirs[fact.name.decode()] = fact.value, fact.offset
    ours: dict[str, tuple[int, int]] = {}
    for structure in structures:
        ours[structure.__name__] = ctypes.sizeof(structure), -1
        for name, *_ in structure._fields_:
            field = getattr(structure, name)
            ours[f"{structure.__name__}.{name}"] = field.size, field.offset
    for name, (size, offset) in ours.items():
        if theirs.get(name) != (size, offset):
            there = "is not there" if name not in theirs else "has {} bytes at {} there".format(*theirs[name])
            raise LayoutError(
                f"{name} has {size} bytes at {offset} in structures.py, and {there} in the native library"
            )
    rest = {name: value for name, (value, _) in theirs.items() if name not in ours}
    if unknown := [name for name in rest if theirs[name][1] >= 0 or not name.isupper()]:
        raise LayoutError(f"structures.py lacks what the native library has: {', '.join(unknown)}")
    return rest
