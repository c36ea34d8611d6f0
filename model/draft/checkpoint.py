"""A trained draft on disk: `config.json` (shape, target's fingerprint, versions, command) and `model.safetensors`."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from safetensors import SafetensorError

from model import __version__
from model.config import ConfigError
from model.draft.network import DraftConfig, DraftNetwork
from model.targets.base import Target


def fingerprint(target: Target) -> str:
    """What a draft is bound to: SHA-256 over the target's shape and samples of its embeddings and output weights."""
    ids = torch.arange(0, target.vocab_size, max(1, target.vocab_size // 64), device=target.device)
    rows = target.embed(ids).to(torch.bfloat16).float().cpu()  # the same in every dtype that it may be loaded in
    shape = f"{target.num_layers} {target.hidden_size} {target.vocab_size} {target.num_kv_heads} {target.head_dim}"
    return hashlib.sha256(shape.encode() + rows.numpy().tobytes()).hexdigest()


def save(folder: Path, network: DraftNetwork, target: Target, **notes: Any) -> None:
    """Write the draft in bfloat16. `notes` (command, data, figures...) are kept in config.json as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().to(torch.bfloat16).contiguous() for name, value in network.state_dict().items()}
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    described = {
        "drafter": "flash",
        "draft": asdict(network.config),
        "target_fingerprint": fingerprint(target),
        "flashserve_version": __version__,
        "torch_version": torch.__version__,
        "transformers_version": transformers.__version__,
        **notes,
    }
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")


def load(folder: Path, target: Target) -> DraftNetwork:
    """The draft in `folder`, on the target's device and in its dtype. ConfigError if trained for another target."""
    try:
        described = json.loads((folder / "config.json").read_text())
        config = DraftConfig(**{**described["draft"], "tap_layers": tuple(described["draft"]["tap_layers"])})
        network = DraftNetwork(config)
        network.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
        trained_for = described["target_fingerprint"]
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"draft {str(folder)!r} cannot be read: {error}") from error
    if trained_for != fingerprint(target):
        raise ConfigError(
            f"draft {str(folder)!r} was trained for another target than the one being served; "
            "train one for this target, or serve with --drafter off"
        )
    if config.tap_layers != target.tap_layers:
        raise ConfigError(
            f"draft {str(folder)!r} reads layers {config.tap_layers}; the target offers {target.tap_layers}"
        )
    network.to(target.device, target.dtype).eval().requires_grad_(False)
    return network
