"""The native library's structures, constants and functions are those that Python describes, or it is refused."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from typing import Any

import pytest

from model.backends.native import builds, library, structures
from tests.model.libraries import every_library

CHANGED: dict[str, Callable[[list[Any]], list[Any]]] = {
    "one is longer": lambda fields: [*fields, ("more", ctypes.c_int64)],
    "one lacks a field": lambda fields: fields[:-1],
    "two are exchanged": lambda fields: [fields[1], fields[0], *fields[2:]],
    "two are exchanged in the middle": lambda fields: [*fields[:2], fields[3], fields[2], *fields[4:]],
    "one has another name": lambda fields: [("other", fields[0][1]), *fields[1:]],
    "one is of another type": lambda fields: [(fields[0][0], ctypes.c_int16), *fields[1:]],
}


def first_library() -> library.Library:
    if not (libraries := every_library()):
        pytest.skip("no library here")
    return next(iter(libraries.values()))


def test_every_library_has_the_same_structures_and_constants() -> None:
    first = first_library()
    for one in every_library().values():
        assert (
            structures.check_layout(one.functions, structures.Structure.__subclasses__())
            == one.constants
            == first.constants
        )
    assert first.constants["K_STEP"] == 32


@pytest.mark.parametrize("change", CHANGED)
@pytest.mark.parametrize("name", ["Layer", "Rows", "Trees", "Worth"])
def test_a_structure_that_is_another_one_in_the_library_is_refused(change: str, name: str) -> None:
    """A structure of the same size is refused as well: both sides would read other fields."""
    functions = first_library().functions
    kinds: dict[str, Any] = {kind.__name__: kind for kind in structures.Structure.__subclasses__()}
    kinds[name] = type(name, (ctypes.Structure,), {"_fields_": CHANGED[change](list(kinds[name]._fields_))})
    with pytest.raises(structures.LayoutError, match=name):
        structures.check_layout(functions, kinds.values())


def test_a_structure_that_only_the_library_has_is_refused() -> None:
    kinds = [kind for kind in structures.Structure.__subclasses__() if kind is not structures.Worth]
    with pytest.raises(structures.LayoutError, match=r"lacks what the native library has: Worth, Worth\.seconds"):
        structures.check_layout(first_library().functions, kinds)


def test_every_function_that_is_called_is_declared() -> None:
    """Declared types let ctypes check every call."""
    source = builds.FOLDER.joinpath("transformer.cpp").read_text()
    declared = {name: len(types) - 1 for name, types in structures.FUNCTIONS.items()}
    found = re.findall(r"^[\w* ]+?\b(flash_\w+)\(([^)]*)\) \{", source, re.MULTILINE)
    assert {name: len([one for one in taken.split(",") if one.strip()]) for name, taken in found} == declared
    functions = first_library().functions
    with pytest.raises(ctypes.ArgumentError):
        functions.flash_commit(False, ctypes.byref(structures.Trees()))
    with pytest.raises(TypeError, match="arguments"):
        functions.flash_linear(False, None)
