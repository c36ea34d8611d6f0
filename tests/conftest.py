"""What holds for every test: no model hub is asked for anything, torch computes on one thread, and `gpu` tests run only
where there is one."""

import os
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # likewise triton: kernels for GPUs run without one
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Models this small only lose by being shared out. Engines that a test runs, a command's too, may choose otherwise:
    the next test begins with one thread again."""
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(1)
