"""Test those parts of the benchmark for GPU machines that need no GPU."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model.backends.attention import AttentionTensors
from model.backends.kernels import choice
from model.backends.kernels.choice import Options
from model.backends.kv_cache import KVCache, LayerShape, uniform
from model.backends.native import library
from model.bench import gpu, layers, random_weights
from model.config import EngineConfig


def figures(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    gpu.main(["--size", "tiny", "--batches", "1,3", "--context", "40", "--repeats", "2", *options])
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def test_it_measures_graphs_against_plain_passes_and_both_against_the_floor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "load", lambda: None)
    output = tmp_path / "figures.json"
    found = figures(capsys, "--device", "cpu", "--dtype", "float32", "--output", str(output))
    assert json.loads(output.read_text()) == found
    assert all(value > 0 for value in found["limits"].values())
    # All weights except the tower and the embedding table, of which a pass reads a few rows.
    attention, mlp, norms = 64 * 64 * 2 + 64 * 32 * 2, 3 * 64 * 96, 2 * 64
    assert found["bytes_read_per_pass"] == 4 * (4 * (attention + mlp + norms) + 64 + 64 * 512)
    assert [row["batch"] for row in found["rows"]] == [1, 3]
    for row in found["rows"]:
        times = row["milliseconds"]
        assert set(times) == {
            "plain, 1", "plain, 16", "graph, 1", "graph, 16", "draft", "step", "speculating step",
        }  # fmt: skip
        assert row["idle_share"] is None, "nobody can tell without a GPU"
        assert row["pass_over_floor"] == pytest.approx(times["graph, 1"] / row["floor_milliseconds"], rel=0.1)
    assert set(found["attention"]) == set(layers.LAYERS)
    for times in found["attention"].values():
        assert set(times) == {"floor", "torch, 1", "torch, 16"}, "the kernel runs on GPUs only"
        assert all(value > 0 for value in times.values())
    one, three = (row["floor_milliseconds"] * found["limits"]["read_bytes_per_second"] for row in found["rows"])
    assert three > one, "three sequences have more keys and values to be read"


def test_a_native_target_has_no_graphs_to_measure(capsys: pytest.CaptureFixture[str]) -> None:
    if library.load() is None:
        pytest.skip("no native library here")
    found = figures(capsys, "--device", "cpu", "--dtype", "float32")
    assert {"graph, 1", "plain, torch attention, 1"}.isdisjoint(found["rows"][0]["milliseconds"])
    assert found["bytes_read_per_pass"] > 400_000, "weights that were handed to the native stack count too"


def test_layers_with_windows_need_not_read_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The floor of a window stays where it is, however long the context; our kernel is timed where there is one."""
    engine: Any = SimpleNamespace(
        target=SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32),
        config=SimpleNamespace(prefill_chunk=16),
    )
    monkeypatch.setattr(
        layers, "LAYERS", {"window": (2, LayerShape(1, 8, 100), True), "all": (2, LayerShape(1, 8), False)}
    )
    wanted = []

    def chosen(*kind: Any) -> Any:
        wanted.append(kind[-1])
        return lambda q, *_, **__: q

    monkeypatch.setattr(choice, "tree_attention", chosen)
    found = [layers.measure(2, context, engine, 1e9, 1) for context in (1000, 2000)]
    assert set(wanted) == {Options(window=True, ring=True, sinks=True), Options()}
    assert choice.tree_attention is chosen
    for times in found:
        assert list(times["window"]) == ["floor", "torch, 1", "torch, 16", "kernel, 1", "kernel, 16"]
    short, long = found
    assert long["window"]["floor"] == short["window"]["floor"] == round(1e3 * 2 * 100 * 2 * 8 * 4 / 1e9, 4)
    assert long["all"]["floor"] == pytest.approx(2 * short["all"]["floor"], abs=1e-4)
    assert layers.table(found[0]).count("\n") == 5


def test_the_large_target_has_the_size_it_says_and_its_pass_can_be_recorded() -> None:
    """Tensors are on the meta device: the target does not fit here, and reading a value fails."""
    size = random_weights.SIZES["7b"]
    target, read = random_weights.make_target(size, EngineConfig(model="7b", device="meta", dtype="bfloat16"))
    assert read == pytest.approx(2 * 7.07e9, rel=0.01), "Qwen2.5-7B has 7.6e9 weights, of which 0.54e9 are embeddings"
    assert target.recordable
    kv = KVCache(
        layers=uniform(28, 4, 128), num_slots=2, capacity=1000, margin=16,
        dtype=torch.bfloat16, device=target.device,
    )  # fmt: skip
    starts = torch.zeros(2, dtype=torch.int64, device="meta")
    plan = AttentionTensors(kv, 0, starts, starts, torch.ones(2, 16, 16, dtype=torch.bool, device="meta"), 512)
    ids = torch.zeros(2, 16, dtype=torch.int64, device="meta")
    hidden, aux_hidden_states, _ = target.run(ids, ids[None], plan)
    assert target.logits(hidden).shape == (2, 16, 152064)
    assert aux_hidden_states.shape == (2, 16, 3584), "of the last layer alone"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_every_way_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(capsys, "--device", "cuda")
    times = found["rows"][0]["milliseconds"]
    assert {"graph, 1", "graph, 16", "step, busy"} <= set(times)
    assert found["attention_kernel"] == ("graph, torch attention, 1" in times)
    for kind, by_way in found["attention"].items():
        assert {"kernel, 1", "kernel, 16"} <= set(by_way), f"the kernel is not believed here: {kind}"
    assert 0.0 <= found["rows"][0]["idle_share"] < 1.0
