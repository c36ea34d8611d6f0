"""Test memory in huge pages: tensors that share it never overlap, and unused memory returns to the system."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from model.backends import memory

MIB = 1 << 20


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_small_ones_share_pages_and_no_bytes() -> None:
    sizes = [1, 7, 100, 3 * MIB // 2, MIB, 33, MIB]
    tensors = [memory.zeros(size, torch.bfloat16).fill_(i) for i, size in enumerate(sizes)]
    for i, (size, tensor) in enumerate(zip(sizes, tensors, strict=True)):
        assert tensor.shape == (size,)
        assert tensor.data_ptr() % memory.ALIGNED == 0
        assert (tensor == i).all(), "another one lies in it"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_a_large_one_begins_with_a_page(dtype: torch.dtype) -> None:
    large = memory.zeros(9 * MIB, dtype).zero_()
    assert large.dtype is dtype
    assert len(large) == 9 * MIB
    assert large.data_ptr() % memory.PAGE == 0


def test_what_nobody_holds_goes_back() -> None:
    before = resident()
    held = [memory.zeros(64 * MIB, torch.uint8).fill_(1) for _ in range(2)]
    small = [memory.zeros(MIB, torch.uint8).fill_(1) for _ in range(64)]
    assert resident() - before > 180 * MIB
    del held, small
    gc.collect()
    assert resident() - before < 16 * MIB


def test_pages_are_huge_where_the_system_has_them() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this system gives no huge pages")
    held = memory.zeros(32 * MIB, torch.uint8).fill_(1)
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in (ends := line.split()[0]) and not ends.endswith(":"):
            first, end = (int(part, 16) for part in ends.split("-"))
            inside = first <= held.data_ptr() < end
        elif inside and line.startswith("AnonHugePages:"):
            assert int(line.split()[1]) * 1024 >= len(held) // 2
            return
    pytest.fail("the memory is not among this process's own")
