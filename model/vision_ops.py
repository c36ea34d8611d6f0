"""Lets torchvision's transforms run over a CPU build of torch, whichever build of torchvision is installed.

transformers' image and video processors resize with torchvision. Package registries have its CUDA build, whose library
`_C.so` does not load beside a CPU torch: the import then fails with "operator torchvision::nms does not exist", since
torchvision registers derivatives of operators that this library was to define. No transform uses these operators. So
they are declared, without an implementation, as soon as anything looks for torchvision. A torchvision whose library
loads is left as it is.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

DECLARED = ("nms", "qnms")  # the operators that `import torchvision` asks for by name
_libraries: list[Any] = []  # declarations last as long as the object that made them


def declare_missing_operators(package: Path) -> bool:
    """Declare the operators of the torchvision in the folder `package` if its library does not load. Return whether
    that was necessary."""
    import torch

    binaries = [file for pattern in ("_C.so", "_C.*.so", "_C.pyd") for file in package.glob(pattern)]
    try:
        for binary in binaries:
            torch.ops.load_library(str(binary))
        if binaries:
            return False
    except OSError:
        pass
    library = torch.library.Library("torchvision", "FRAGMENT")  # noqa: TOR901
    for name in DECLARED:
        if hasattr(torch.ops.torchvision, name):
            continue  # another program does the same
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)
    return True


class TorchvisionFinder:
    """Stands first in `sys.meta_path` and sees the first search for torchvision. Finds nothing itself."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:  # noqa: ARG003
        if name == "torchvision":
            sys.meta_path.remove(cls)
            spec = PathFinder.find_spec(name)
            if spec is not None and spec.origin is not None:
                declare_missing_operators(Path(spec.origin).parent)
        return None


def install() -> None:
    """Watch for the first import of torchvision. Imports nothing by itself."""
    if TorchvisionFinder not in sys.meta_path and "torchvision" not in sys.modules:
        sys.meta_path.insert(0, TorchvisionFinder)
