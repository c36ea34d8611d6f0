"""A checkpoint that is damaged, incomplete or of an unsupported kind is refused, with the file and the reason."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlavaForConditionalGeneration

from model.engine.engine import Engine
from model.errors import ConfigError
from model.targets import checkpoint
from model.targets.stored import stored_tensors
from tests.model import tiny

Damage = Callable[[Path], object]
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def shards(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint in several files."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("shards") / "target")
    (folder / "model.safetensors").unlink()
    LlavaForConditionalGeneration.from_pretrained(tiny_checkpoint).save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def fields(name: str = "config.json", **changes: Any) -> Damage:
    """Change fields of a JSON file; None removes one."""

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return change


def text_field(**changes: Any) -> Damage:
    """Change fields of the text config."""

    def change(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        content["text_config"] |= changes
        (folder / "config.json").write_text(json.dumps(content))

    return change


def of_type(kind: str) -> Damage:
    """Write the default config of another type."""
    return lambda folder: AutoConfig.for_model(kind).save_pretrained(folder)


def write(name: str, content: str) -> Damage:
    return lambda folder: (folder / name).write_text(content)


def remove(*names: str) -> Damage:
    def apply(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return apply


def cut(name: str, num_bytes: int) -> Damage:
    """Cut off the end of a file."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-num_bytes])


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    """Change the weights of a checkpoint in one file."""

    def apply(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def named(weights: dict[str, torch.Tensor], part: str) -> list[str]:
    found = sorted(name for name in weights if part in name)
    assert found, part
    return found


def drop(part: str) -> Damage:
    return tensors(lambda weights: [weights.pop(name) for name in named(weights, part)])


def header(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Change the header of the weights, and leave its length as it is."""

    def apply(folder: Path) -> None:
        file = folder / "model.safetensors"
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        content = json.loads(data[8 : 8 + length])
        change(content)
        file.write_bytes(
            data[:8] + json.dumps(content, separators=(",", ":")).encode().ljust(length) + data[8 + length :]
        )

    return apply


def set_header(part: str, **values: Any) -> Damage:
    return header(lambda content: [content[name].update(values) for name in named(content, part)])


def one_number_less(weights: dict[str, torch.Tensor]) -> None:
    name = named(weights, "layers.2.mlp.up_proj")[0]
    weights[name] = weights[name][:-1].contiguous()


def renamed(weights: dict[str, torch.Tensor]) -> None:
    for name in named(weights, "multi_modal_projector"):
        weights["connector." + name] = weights.pop(name)


ONE_FILE: dict[str, tuple[Damage, str]] = {
    # files
    "no weights": (remove("model.safetensors"), "model.safetensors"),
    "no config": (remove("config.json"), r"config\.json"),
    "config is no JSON": (write("config.json", '{"model_type": "llava",'), r"config\.json is not valid JSON"),
    "config is a list": (write("config.json", "[1, 2]"), r"config\.json"),
    "tokenizer is no JSON": (cut("tokenizer.json", 100), r"tokenizer\.json is not valid JSON"),
    "generation config is no JSON": (
        write("generation_config.json", "{"),
        r"generation_config\.json is not valid JSON",
    ),
    "no tokenizer": (remove("tokenizer.json", "tokenizer_config.json"), "tokenizer"),
    "no image processor": (remove("processor_config.json"), "processor"),
    "no chat template": (remove("chat_template.jinja"), "no chat template.*chat_template.jinja"),
    # weights
    "cut off": (cut("model.safetensors", 1), r"model\.safetensors is cut off: its header describes \d+ bytes"),
    "half": (cut("model.safetensors", 300_000), r"model\.safetensors is cut off"),
    "only the beginning of the header": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:500]),
        r"model\.safetensors is not a valid safetensors file: its header is longer than the file",
    ),
    "empty": (write("model.safetensors", ""), r"model\.safetensors is not a valid safetensors file"),
    "a web page": (write("model.safetensors", "<html>" * 100), r"model\.safetensors is not a valid safetensors file"),
    "a pointer of git-lfs": (
        write("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        r"model\.safetensors is not a valid safetensors file",
    ),
    "an unknown dtype": (set_header("lm_head", dtype="BF9"), r"lm_head.weight has the unknown dtype 'BF9'"),
    "integers for numbers": (
        set_header("lm_head", dtype="I32"),
        r"lm_head.weight is stored as I32.*quantization_config",
    ),
    # tensors
    "a tensor is missing": (drop("layers.1.mlp.gate_proj"), r"1 tensor is missing \(.*layers\.1\.mlp\.gate_proj"),
    "a layer is missing": (drop("layers.3."), r"9 tensors are missing \(.*layers\.3\..*, \.\.\.\)"),
    "the head is missing": (drop("lm_head"), r"1 tensor is missing \(lm_head\.weight\)"),
    "a tower is missing": (drop("vision_tower"), r"tensors are missing \(.*vision_tower"),
    "tensors of another family": (tensors(renamed), r"tensors are missing .*unknown ones instead \(connector"),
    "a tensor is too small": (
        tensors(one_number_less),
        r"of another shape .*layers\.2\.mlp\.up_proj.* \(95, 64\), not \(96, 64\)",
    ),
    # config against weights
    "another width": (text_field(intermediate_size=112), r"8 tensors|12 tensors are of another shape"),
    "more layers": (text_field(num_hidden_layers=5), r"9 tensors are missing \(.*layers\.4\."),
    "no text config": (fields(text_config=None), "missing|of another shape"),
    # kinds
    "another dtype": (fields(dtype="bfloat61"), r"bfloat61"),
    "no type": (fields(model_type=None), r"config\.json.*model_type"),
    "an unknown architecture": (
        fields(model_type="llava_9"),
        r"type 'llava_9', which transformers [\d.]+ does not know",
    ),
    "remote code": (
        fields(model_type="ours", auto_map={"AutoConfig": "configuration_ours.OursConfig"}),
        "Python code of its own.*--trust-remote-code true",
    ),
    "a text model": (fields(model_type="llama"), "type 'llama', a language model without vision"),
    "an image model": (fields(model_type="vit"), "type 'vit', no vision-language model"),
    "speech": (fields(model_type="whisper"), "type 'whisper', an encoder-decoder"),
    **{kind: (of_type(kind), f"type '{kind}', an encoder-decoder") for kind in ("florence2", "t5gemma2", "pix2struct")},
    **{
        kind: (fields(model_type=kind, text_config=None, vision_config=None), f"type '{kind}', and {reason}")
        for kind, reason in checkpoint.REFUSED.items()
    },
    # quantised weights
    **{
        method: (
            fields(quantization_config={"quant_method": method, **options}),
            rf"quant_method '{method}'.*{package}",
        )
        for method, options, package in (
            ("awq", {"bits": 4, "group_size": 128, "zero_point": True}, "gptqmodel"),
            ("gptq", {"bits": 4, "group_size": 128}, "optimum"),
            ("bitsandbytes", {"load_in_4bit": True}, "bitsandbytes"),
            ("compressed-tensors", {"format": "pack-quantized"}, "compressed-tensors"),
            ("thermal", {}, "thermal"),
        )
        if find_spec(package.replace("-", "_")) is None
    },
}


def refused(folder: Path, reason: str) -> None:
    with pytest.raises(ConfigError) as error:
        Engine(tiny.config(folder))
    assert re.search(reason, str(error.value)), str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fault", ONE_FILE)
def test_it_says_what_is_wrong(fault: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "target")
    damage, reason = ONE_FILE[fault]
    if "auto_map" in fault or fault == "remote code":
        (folder / "configuration_ours.py").write_text("raise SystemExit('this code ran')")
    damage(folder)
    refused(folder, reason)


def shard(folder: Path, place: int) -> str:
    return sorted(file.name for file in folder.glob("*.safetensors"))[place]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: (f / shard(f, 1)).unlink(), r"model-00002-of-\d+.safetensors is missing: .*index.json names it"),
        (lambda f: (f / shard(f, -1)).unlink(), r"model-\d+-of-\d+.safetensors is missing"),
        (lambda f: cut(shard(f, 0), 8)(f), r"model-00001-of-\d+.safetensors is cut off"),
        (lambda f: write(shard(f, 2), "oops")(f), r"model-00003-of-\d+.safetensors is not a valid safetensors file"),
        (write(INDEX, "{"), r"index.json"),
        (write(INDEX, "{}"), r"index.json is not a valid index of weights"),
        (fields(INDEX, weight_map={"lm_head.weight": "model-00001-of-00005.safetensors"}), "missing"),
    ],
    ids=["second", "last", "first cut off", "third is text", "index no JSON", "index empty", "index short"],
)  # fmt: skip
def test_a_sharded_one_too(damage: Damage, reason: str, shards: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(shards, tmp_path / "target")
    damage(folder)
    refused(folder, reason)


def test_a_whole_one_is_loaded(shards: Path, tiny_checkpoint: Path) -> None:
    request = tiny.ask("r", tiny.image(1), "What?", max_tokens=8)
    answers = [tiny.answers(Engine(tiny.config(folder)), [request]) for folder in (shards, tiny_checkpoint)]
    assert answers[0] == answers[1]


def test_a_large_one_is_checked_before_its_weights_are_read(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gigabytes would take minutes to be read."""
    monkeypatch.setattr("model.targets.llava.load_model", lambda *_, **__: pytest.fail("weights are read"))
    for fault in ("a tensor is missing", "a tensor is too small", "another width", "more layers"):
        folder = shutil.copytree(tiny_checkpoint, tmp_path / fault)
        damage, reason = ONE_FILE[fault]
        damage(folder)
        refused(folder, reason)


@pytest.mark.parametrize(
    "fault", ["a tensor is missing", "a tower is missing", "tensors of another family", "a tensor is too small"]
)
def test_one_that_is_in_no_safetensors_is_checked_when_loaded(
    fault: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "target")
    damage, reason = ONE_FILE[fault]
    damage(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused(folder, reason)


def test_tied_weights_are_not_missing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "target")
    drop("lm_head")(folder)
    refused(folder, "lm_head")
    fields(tie_word_embeddings=True)(folder)
    text_field(tie_word_embeddings=True)(folder)
    engine = Engine(tiny.config(folder))
    assert tiny.answers(engine, [tiny.ask("r", "Hi", max_tokens=3)])["r"]


def test_tensors_that_nobody_needs_are_no_problem(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Checkpoints bring heads for drafting, and tables that are computed."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "target")
    tensors(
        lambda weights: weights.update({"mtp.layers.0.weight": torch.zeros(3), "model.rope.inv_freq": torch.zeros(2)})
    )(folder)
    assert tiny.answers(Engine(tiny.config(folder)), [tiny.ask("r", "Hi", max_tokens=3)])["r"]


def test_the_skeleton_has_every_weight_and_takes_no_memory(tiny_checkpoint: Path, shards: Path) -> None:
    for folder in (tiny_checkpoint, shards):
        config = tiny.config(folder).resolved()
        model = checkpoint.build_skeleton(config, AutoConfig.from_pretrained(folder))
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        stored = stored_tensors(str(folder), {})
        assert stored is not None
        assert sum(p.nbytes for p in model.parameters()) == sum(each.num_bytes for each in stored.values())


def test_remote_code_runs_only_where_it_is_trusted(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "target")
    fields(model_type="ours", auto_map={"AutoConfig": "configuration_ours.OursConfig"})(folder)
    (folder / "configuration_ours.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\nraise ValueError('its code')"
    )
    refused(folder, "--trust-remote-code true")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ConfigError, match="its code"):
        Engine(tiny.config(folder, trust_remote_code=True))
    assert (tmp_path / "ran").exists()


def test_what_is_in_the_hubs_cache_is_found_offline_by_its_revision(
    tiny_checkpoint: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--ours--tiny"
    (repository / "refs").mkdir(parents=True)
    for commit, (name, source) in {"1" * 40: ("main", tiny_checkpoint), "2" * 40: ("v2", shards)}.items():
        (repository / "refs" / name).write_text(commit)
        shutil.copytree(source, repository / "snapshots" / commit)

    def answer(revision: str | None) -> list[int]:
        engine = Engine(tiny.config(Path("ours/tiny"), revision=revision))
        return tiny.answers(engine, [tiny.ask("r", tiny.image(2), "What?", max_tokens=6)])["r"]

    assert answer(None) == answer("v2") == answer("2" * 40)
    snapshot = repository / "snapshots" / ("2" * 40)
    missing = shard(snapshot, 1)
    (snapshot / missing).unlink()
    with pytest.raises(ConfigError, match=missing):
        answer("v2")
    with pytest.raises(ConfigError, match="ours/tiny"):
        answer("v3")
    fields(model_type="qwen4_exp")(repository / "snapshots" / ("1" * 40))
    with pytest.raises(ConfigError, match="qwen4_exp.*indexer"):
        answer(None)
