"""The KV cache fits into the memory that is free, or the engine says what would, before it loads anything."""

from __future__ import annotations

import logging
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from model.backends import free_memory, memory
from model.backends.kv_cache import KVCache, uniform
from model.backends.native import library
from model.engine.engine import Engine
from model.engine.sizing import Sizing
from model.errors import ConfigError
from model.targets import checkpoint, registry
from model.targets.stored import stored_weights
from tests.model import tiny, tiny_qwen

MIB = 1 << 20
GIB = 1 << 30


def config(model: Path, free: int, **settings: Any) -> Any:
    given = {"free_host_memory": free, "memory_utilization": 1.0, "encoder_cache_bytes": 0, **settings}
    return tiny.config(model, **given)


def needs(engine: Engine) -> tuple[int, int]:
    """Bytes that weights take, and each slot."""
    parts = engine.info.memory
    slots = parts["kv_cache"] + parts.get("draft_kv_cache", 0)
    return parts["weights"] + parts.get("draft_weights", 0), slots // engine.info.max_num_seqs


@pytest.mark.parametrize("name", ["off", "flash", "eagle", "medusa"])
def test_as_many_slots_as_fit_beside_the_weights(
    name: str, tiny_checkpoint: Path, drafts: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """They were allocated whatever was free: a step into swap, or a kill by the kernel in the middle of an answer."""
    whole = tiny.engine_of(name, tiny_checkpoint, drafts, max_num_seqs=16, encoder_cache_bytes=MIB)
    weights, slot = needs(whole)
    assert whole.info.max_num_seqs == 16
    free = weights + MIB + 5 * slot
    with caplog.at_level(logging.WARNING, "flashserve.engine"):
        engine = tiny.engine_of(
            name,
            tiny_checkpoint,
            drafts,
            max_num_seqs=16,
            encoder_cache_bytes=MIB,
            free_host_memory=2 * free,
            memory_utilization=0.5,
        )
    taken = sum(engine.info.memory.values())
    assert engine.info.max_num_seqs in range(4, 7)  # a draft's weights are larger or smaller packed than stored
    assert taken <= free + slot
    (line,) = caplog.messages
    assert f"not --max-num-seqs {16}" in line
    assert "--memory-utilization (now 0.5)" in line
    assert len(tiny.answers(engine, [tiny.ask(f"r{i}", "Hi", max_tokens=3) for i in range(8)])) == 8


def test_nothing_is_said_where_all_fit(tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert Engine(config(tiny_checkpoint, GIB, max_num_seqs=16)).info.max_num_seqs == 16
    assert caplog.messages == []


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_what_would_fit_is_said_before_weights_are_read(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = tiny.save_checkpoint if family == "llava" else tiny_qwen.save_checkpoint
    folder = save(tmp_path / "target")
    engine = Engine(config(folder, GIB, max_num_seqs=1, max_model_len=448))
    weights, slot = needs(engine)
    stored = stored_weights(str(folder), torch.float32, torch.float32)
    assert stored is not None
    assert 0.5 * weights < stored.num_bytes <= weights
    resolved = config(folder, GIB, max_num_seqs=1, max_model_len=448).resolved()
    planned = Sizing.read(resolved, None).check_before_loading(registry.open_checkpoint(resolved)).needs.weights
    tight = config(folder, planned + slot // 2, max_num_seqs=1, max_model_len=448)
    with monkeypatch.context() as patched:
        patched.setattr("model.engine.engine.load_target", lambda *_: pytest.fail("it reads weights"))
        with pytest.raises(ConfigError, match="not even one sequence of 448 tokens") as refused:
            Engine(tight)
    found = re.search(r"give --max-model-len (\d+) or less", str(refused.value))
    assert found
    length = int(found[1])
    assert 64 <= length < 448
    fitting = config(folder, weights + slot // 2, max_num_seqs=1, max_model_len=length)
    assert Engine(fitting).info.max_model_len == length


@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "tied"])
def test_the_plan_is_what_is_allocated(
    family: str, native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if not native:
        monkeypatch.setattr(library, "supports", lambda *_: False)
    if family == "tied":
        folder = tiny_qwen.save_checkpoint(tmp_path, tied=True)
    else:
        folder = (tiny.save_checkpoint if family == "llava" else tiny_qwen.save_checkpoint)(tmp_path)
    wanted = config(folder, GIB, max_num_seqs=3)
    resolved = wanted.resolved()
    opened = registry.open_checkpoint(resolved)
    plan = Sizing.read(resolved, None).check_before_loading(opened)
    with caplog.at_level(logging.INFO, "flashserve.engine"):
        engine = Engine(wanted)
    memory = engine.info.memory
    # The native library's tables and padding count for more beside so few weights than beside a real model's.
    assert plan.needs.weights == pytest.approx(memory["weights"], rel=0.2 if native else 0.001)
    assert plan.num_sequences * plan.kv_bytes(engine.max_model_len) == memory["kv_cache"]
    (text,) = (message for message in caplog.messages if message.startswith("memory in MiB"))
    rows = {line.split()[0]: line for line in text.splitlines()[1:]}
    assert f"3 sequences of {engine.max_model_len} tokens" in rows["KV"]
    assert float(rows["weights"].split()[1]) == pytest.approx(memory["weights"] / MIB, abs=0.1)
    assert "of 1024 (1 of 1024 free)" in rows["total"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_alone_that_do_not_fit_are_refused_at_once(
    dtype: str, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = stored_weights(str(tiny_checkpoint), getattr(torch, dtype), None)
    assert stored is not None
    monkeypatch.setattr(checkpoint, "build_skeleton", lambda *_: pytest.fail("it is built"))
    with pytest.raises(ConfigError, match=f"the weights do not fit into memory.* in {dtype}; .*--dtype"):
        Engine(config(tiny_checkpoint, stored.num_bytes - 1, dtype=dtype))


def test_weights_that_do_not_fit_are_refused(tiny_checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="free some memory"):
        Engine(config(tiny_checkpoint, 100_000))


def test_an_explicit_cap_is_nobody_elses_business(tiny_checkpoint: Path) -> None:
    weights, slot = needs(Engine(config(tiny_checkpoint, GIB, max_num_seqs=1)))
    engine = Engine(config(tiny_checkpoint, 1, max_num_seqs=16, kv_cache_bytes=3 * slot))
    assert engine.info.max_num_seqs == 3


def test_a_target_that_is_loaded_counts_as_free(tiny_checkpoint: Path) -> None:
    engine = Engine(config(tiny_checkpoint, GIB, max_num_seqs=2))
    _, slot = needs(engine)
    again = Engine(config(tiny_checkpoint, 2 * slot, max_num_seqs=16), engine.target)
    assert again.info.max_num_seqs == 2


def test_where_nobody_says_what_is_free_nothing_is_refused(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(free_memory, "of_machine", lambda: None)
    assert Engine(tiny.config(tiny_checkpoint, max_num_seqs=16)).info.max_num_seqs == 16


def test_a_sharded_checkpoints_index_says_what_it_takes(tmp_path: Path) -> None:
    """In the dtype that it is loaded in, not the one that it is stored in."""
    from transformers import LlavaForConditionalGeneration

    folder = tiny.save_checkpoint(tmp_path / "whole")
    single = stored_weights(str(folder), torch.float32, torch.float32)
    LlavaForConditionalGeneration.from_pretrained(folder).save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    shards = stored_weights(str(tmp_path / "shards"), torch.bfloat16, torch.float32)
    assert single is not None
    assert shards is not None
    assert shards.names == single.names
    assert 2 * shards.num_bytes == single.num_bytes
    assert stored_weights(str(tmp_path), torch.float32, None) is None


@pytest.mark.parametrize("value", [0.0, -0.1, 1.1])
def test_a_share_is_a_share(value: float) -> None:
    with pytest.raises(ConfigError, match="memory_utilization"):
        tiny.config(Path("demo"), memory_utilization=value)


# -- what is free


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": "MemTotal: 9999 kB\nMemAvailable:    4096 kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V2 = "sys/fs/cgroup"
V1 = "sys/fs/cgroup/memory"
MACHINES: dict[str, tuple[dict[str, str], int | None]] = {
    "no groups": ({}, 4096 * 1024),
    "version 2, no limit": (
        {
            "proc/self/cgroup": "0::/\n",
            f"{V2}/memory.max": "max\n",
            f"{V2}/memory.current": "5\n",
            f"{V2}/memory.stat": "anon 1\ninactive_file 7\n",
        },
        4096 * 1024,
    ),
    "version 2, cached files are given back": (
        {
            "proc/self/cgroup": "0::/\n",
            f"{V2}/memory.max": "1000\n",
            f"{V2}/memory.current": "600\n",
            f"{V2}/memory.stat": "anon 1\ninactive_file 100\n",
        },
        500,
    ),
    "version 2, the group around has less": (
        {
            "proc/self/cgroup": "0::/pod/box\n",
            f"{V2}/pod/box/memory.max": "max\n",
            f"{V2}/pod/memory.max": "900\n",
            f"{V2}/pod/memory.current": "600\n",
            f"{V2}/pod/memory.stat": "anon 1\n",
        },
        300,
    ),
    "version 1": (
        {
            "proc/self/cgroup": "9:cpu:/\n4:memory:/box\n0::/\n",
            f"{V1}/box/memory.limit_in_bytes": "2000\n",
            f"{V1}/box/memory.usage_in_bytes": "1500\n",
            f"{V1}/box/memory.stat": "cache 3\ntotal_inactive_file 250\n",
        },
        750,
    ),
    "version 1, the path is the host's": (
        {
            "proc/self/cgroup": "4:memory:/kubepods/pod1/box\n",
            f"{V1}/memory.limit_in_bytes": "2000\n",
            f"{V1}/memory.usage_in_bytes": "1500\n",
            f"{V1}/memory.stat": "total_inactive_file 0\n",
        },
        500,
    ),
    "more is used than allowed": (
        {
            "proc/self/cgroup": "0::/\n",
            f"{V2}/memory.max": "1000\n",
            f"{V2}/memory.current": "1600\n",
            f"{V2}/memory.stat": "inactive_file 100\n",
        },
        0,
    ),
    "none that can be read": ({"proc/meminfo": "", "proc/self/cgroup": "0::/\n"}, None),
}


@pytest.mark.skipif(
    resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY, reason="has a limit of its own"
)
@pytest.mark.parametrize("name", MACHINES)
def test_the_least_of_all_limits_is_free(name: str, tmp_path: Path) -> None:
    files, free = MACHINES[name]
    assert free_memory.of_machine(machine(tmp_path, files)) == free


def test_this_machine_has_some(tmp_path: Path) -> None:
    free = free_memory.of_machine()
    assert free is None or free > MIB


LIMITED = """
import resource, sys
from pathlib import Path
from model.backends import free_memory
from model.engine.engine import Engine
from model.errors import ConfigError
from tests.model import tiny

folder, megabytes = Path(sys.argv[1]), int(sys.argv[2])
Engine(tiny.config(folder, max_num_seqs=1))  # what libraries take at first use
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (megabytes << 20), resource.RLIM_INFINITY))
try:
    engine = Engine(tiny.config(folder, max_model_len=4096, max_num_seqs=200, memory_utilization=0.7))
except ConfigError as error:
    sys.exit(str(error))
print(engine.info.max_num_seqs, len(tiny.answers(engine, [tiny.ask("r", "Hi", max_tokens=3)])["r"]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of Linux")
@pytest.mark.parametrize(("megabytes", "fits"), [(1000, True), (0, False)])
def test_under_a_real_limit_the_engine_takes_less_or_says_so(megabytes: int, fits: bool, tmp_path: Path) -> None:
    """200 slots of 8 MiB are more than 1000 MiB: they were allocated, and the process failed with no word of why."""
    folder = tiny.save_checkpoint(tmp_path, positions=4096)
    command = [sys.executable, "-c", LIMITED, str(folder), str(megabytes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)  # noqa: S603
    if not fits:
        assert "the weights do not fit into memory" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    slots, tokens = map(int, done.stdout.split())
    assert 40 <= slots < 100
    assert tokens == 3


def test_a_new_cache_takes_no_memory_until_it_is_written() -> None:
    """Zeroing it took all of it at once, and seconds where it is large."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    before = resident()
    cache = KVCache(
        layers=uniform(8, 8, 64),
        num_slots=16,
        capacity=4096,
        margin=16,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    assert cache.data.nbytes > GIB
    assert resident() - before < GIB // 8
    assert not cache.data[3, 1, 5].any()


def test_memory_is_zero_however_often_it_is_taken() -> None:
    for _ in range(3):
        for numbers in (1000, 3 * MIB):
            assert not memory.zeros(numbers, torch.float32).any()
            memory.zeros(numbers, torch.float32).fill_(1)


def test_sizes_are_read_once_a_start(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the engine itself has allocated must not count as lacking."""
    read: list[int] = []

    def of_machine() -> int:
        read.append(1)
        return GIB

    monkeypatch.setattr(free_memory, "of_machine", of_machine)
    resolved = tiny.config(tiny_checkpoint).resolved()
    Sizing.read(resolved, None).check_before_loading(registry.open_checkpoint(resolved))
    assert read == [1]
    assert registry.read_checkpoint(resolved)[1] is not None
