"""What holds for every test: no model hub is asked for anything, torch computes on one thread, `gpu` tests run only
where there is one, and `alone` ones while no other runs."""

import fcntl
import os
import sys
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

HERE = Path(__file__)

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # likewise triton: kernels for GPUs run without one
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import model  # noqa: E402, F401  (before anything imports torchvision, which `model` lets run over a CPU build of torch)


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


@pytest.hookimpl(wrapper=True, tryfirst=True)  # outermost: a test's timeout begins after the wait
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, bool, bool]:
    """Runs a test marked `alone` while no other worker of pytest-xdist runs one.

    Those that may run side by side share a lock. Whoever waits for the whole of it holds up those that come later.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return (yield)
    with ExitStack() as stack:
        with locked(HERE.parent, fcntl.LOCK_EX):
            how = fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH
            stack.enter_context(locked(HERE, how))
        return (yield)


@contextmanager
def locked(path: Path, how: int) -> Iterator[None]:
    file = os.open(path, os.O_RDONLY)
    fcntl.flock(file, how)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough where a process that was forked has it open too
        os.close(file)
