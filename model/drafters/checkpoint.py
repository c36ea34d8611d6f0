"""Reads and writes a trained draft: `config.json` (drafter, shape, target's fingerprint, versions, command) and
`model.safetensors`."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from safetensors import SafetensorError

from model import __version__
from model.drafters.eagle.network import EagleConfig, EagleNetwork
from model.drafters.flash.network import DraftConfig, DraftNetwork
from model.drafters.medusa.network import MedusaConfig, MedusaNetwork
from model.errors import ConfigError
from model.targets.base import Target

DraftShape = DraftConfig | EagleConfig | MedusaConfig
Network = DraftNetwork | EagleNetwork | MedusaNetwork
RENAMED = {"tap_layers": "aux_layers"}  # fields of a draft's shape as earlier versions named them
KINDS: dict[str, tuple[type[Any], type[Any]]] = {
    "flash": (DraftConfig, DraftNetwork),
    "flash-paper": (DraftConfig, DraftNetwork),
    "eagle": (EagleConfig, EagleNetwork),
    "medusa": (MedusaConfig, MedusaNetwork),
}
UNREADABLE = (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError)


@dataclass(frozen=True)
class Described:
    """The fields of a draft's config.json that are needed to load it."""

    drafter: str
    config: DraftShape
    target_fingerprint: str


def fingerprint(target: Target) -> str:
    """Compute the SHA-256 of the target's shape and of samples of its token embeddings. A draft only fits a target with
    the same fingerprint."""
    ids = torch.arange(0, target.vocab_size, max(1, target.vocab_size // 64), device=target.device)
    rows = target.embed(ids).to(torch.bfloat16).float().cpu()  # the same whatever dtype the target is loaded in
    shape = f"{target.num_layers} {target.hidden_size} {target.vocab_size} {target.num_kv_heads} {target.head_dim}"
    return hashlib.sha256(shape.encode() + rows.numpy().tobytes()).hexdigest()


def save(folder: Path, network: Network, target: Target, *, drafter: str | None = None, **notes: Any) -> None:
    """Write the draft, with its weights in bfloat16.

    drafter: the method's name, if several methods use this network; notes (command, data, figures, ...): copied into
    config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: (value.to(torch.bfloat16) if value.is_floating_point() else value).contiguous()
        for name, value in network.state_dict().items()
    }
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    written = {
        "drafter": drafter or next(name for name, (_, kind) in KINDS.items() if type(network) is kind),
        "draft": asdict(network.config),
        "target_fingerprint": fingerprint(target),
        "flashserve_version": __version__,
        "torch_version": torch.__version__,
        "transformers_version": transformers.__version__,
        **notes,
    }
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n")
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors lets only the owner read it


def described(folder: Path) -> Described:
    """Read the config.json of the draft in `folder`. Raises ConfigError if it cannot be read."""
    try:
        written = json.loads((folder / "config.json").read_text())
        config_type, _ = KINDS[written["drafter"]]
        shape = {RENAMED.get(name, name): value for name, value in written["draft"].items()}
        config = config_type(**{**shape, "aux_layers": tuple(shape["aux_layers"])})
        return Described(written["drafter"], config, written["target_fingerprint"])
    except UNREADABLE as error:
        raise _unreadable(folder, error) from error


def load(folder: Path, target: Target) -> Network:
    """Load the draft in `folder` to the target's device, in its dtype.

    Raises ConfigError if it cannot be read, was trained for another target, or has weights that are not finite in that
    dtype.
    """
    found = described(folder)
    _, network_type = KINDS[found.drafter]
    try:
        network: Network = network_type(found.config)
        weights = safetensors.torch.load_file(folder / "model.safetensors")
    except UNREADABLE as error:
        raise _unreadable(folder, error) from error
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise ConfigError(
            f"draft {str(folder)!r} must be trained again: this version has other weights in a {found.drafter!r} "
            f"of its shape; {error}"
        ) from error
    if found.target_fingerprint != fingerprint(target):
        raise ConfigError(
            f"draft {str(folder)!r} was trained for another target than the one being served; "
            "train one for this target, or serve with --drafter off"
        )
    if found.config.aux_layers != target.aux_layers:
        raise ConfigError(
            f"draft {str(folder)!r} reads layers {found.config.aux_layers}; the target offers {target.aux_layers}"
        )
    offered = network.offered
    if offered is not None and (offered.min() < 0 or offered.max() >= target.vocab_size):
        raise _unreadable(folder, ValueError("it proposes tokens that the target has not"))
    network.to(target.device, target.dtype).eval().requires_grad_(False)
    for name, weight in network.state_dict().items():
        if not weight.isfinite().all():
            raise ConfigError(
                f"draft {str(folder)!r} cannot be used: its {name} holds what is no finite number in {target.dtype}; "
                "train it again"
            )
    return network


def _unreadable(folder: Path, error: Exception) -> ConfigError:
    """Build the error for a draft that cannot be read."""
    return ConfigError(f"draft {str(folder)!r} cannot be read: {error}")
