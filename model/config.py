"""Everything the engine can be told at start. Frozen; "auto" becomes a new, resolved config."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, get_args

from model.errors import ConfigError

DEMO = "demo"
DEMO_WEIGHTS = Path(__file__).parent / "demo" / "weights"
# The bundled models by name: folders of target and draft in DEMO_WEIGHTS.
BUNDLED = {DEMO: ("target", "draft"), "demo-qwen": ("qwen-target", "qwen-draft")}
DrafterName = Literal["auto", "flash", "flash-paper", "eagle", "medusa", "ngram", "off"]
DRAFTERS: tuple[str, ...] = get_args(DrafterName)
TRAINED: tuple[DrafterName, ...] = ("flash", "flash-paper", "eagle", "medusa")  # a folder holds what they have learnt
MAX_NODES, PAPER_NODES = 15, 25  # draft nodes per sequence and step; of flash-paper's fixed tree
# Largest values of max_nodes, tree_width and max_verify_tokens: the native library keeps a tree's nodes on its stack.
MOST_NODES, WIDEST_TREE, MOST_VERIFY_TOKENS = 1024, 64, 65_536
DEFAULT_MAX_MODEL_LEN = 4096
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # "name" or "owner/name": what reads otherwise can only be a path
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class EngineConfig:
    model: str = DEMO  # "demo", "demo-qwen", a folder, or a hub id
    draft: str | None = None  # folder of a trained draft; None: the bundled one for a bundled model, else none
    device: str = "auto"  # "auto", "cpu", "cuda", "cuda:1"
    dtype: str = "auto"
    drafter: DrafterName = "auto"  # "auto": what the draft's folder says
    max_num_seqs: int = 16  # sequences decoded together; each has its slot of the KV cache
    max_model_len: int | None = None  # prompt + answer; None: what the model has, up to DEFAULT_MAX_MODEL_LEN
    kv_cache_bytes: int | None = None  # cap on the KV cache; fewer slots fit then. None: as memory_utilization allows
    memory_utilization: float = 0.9  # share of the free memory for weights, KV cache and encoder cache
    free_host_memory: int | None = None  # CPU: bytes that were free before any engine started; None: as it is now
    prefill_chunk: int = 512  # prompt tokens of a pass at most; after as many, those that decode have their turn
    max_decode_slowdown: float = 2.5  # how many times slower those may become while a long prompt is read
    adaptive_drafting: bool = True  # draft only what pays at the present load; a fixed tree is always verified whole
    max_verify_tokens: int = 512  # per step, over all sequences: a limit on draft tokens, not on newest tokens
    max_nodes: int | None = None  # draft nodes per sequence and step; None: MAX_NODES, or a fixed tree's
    tree_width: int = 4  # candidates kept at each depth
    encoder_cache_bytes: int = 256 << 20
    prefix_cache: bool = True  # what prompts have in common is computed once, as long as it is still there
    tensor_parallel: int = 1  # devices that share the decoder's layers, `device` being the first
    graphs: bool | None = None  # record the passes that torch computes, and replay them; None: on a GPU
    threads: int | None = None  # CPU threads; None: all
    share_cores: bool = False  # CPU: others, which give way, work on the same cores

    def __post_init__(self) -> None:
        if self.drafter not in DRAFTERS:
            raise ConfigError(f"drafter must be one of {', '.join(DRAFTERS)}; got {self.drafter!r}")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}")
        if not 0.0 < self.memory_utilization <= 1.0:
            raise ConfigError(f"memory_utilization must be above 0 and at most 1; got {self.memory_utilization}")
        bounds: dict[str, tuple[float, float]] = {
            "max_num_seqs": (1, math.inf),
            "max_model_len": (16, math.inf),
            "prefill_chunk": (16, math.inf),
            "max_decode_slowdown": (1.5, math.inf),
            "max_verify_tokens": (1, MOST_VERIFY_TOKENS),
            "max_nodes": (0, MOST_NODES),
            "tree_width": (1, WIDEST_TREE),
            "encoder_cache_bytes": (0, math.inf),
            "tensor_parallel": (1, math.inf),
            "threads": (1, math.inf),
        }
        for name, (least, most) in bounds.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} must be at least {least}; got {value}")
            if value is not None and value > most:
                raise ConfigError(f"{name} must be at most {most}; got {value}")

    @property
    def nodes(self) -> int:
        """Draft nodes per sequence and step at most."""
        if self.max_nodes is not None:
            return self.max_nodes
        return PAPER_NODES if self.drafter == "flash-paper" else MAX_NODES

    def resolved(self) -> EngineConfig:
        """The same configuration with bundled models' names and "auto" replaced by what they stand for here."""
        import torch

        from model.backends.native import library

        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ConfigError(f"device {device!r} was asked for, but torch sees no GPU; use --device cpu")
        dtype = self.dtype
        if dtype == "auto":
            on_cpu = torch.device("cpu")
            dtype = "bfloat16" if device != "cpu" or library.supports(torch.bfloat16, on_cpu) else "float32"
        model, draft = self.model, self.draft
        if model in BUNDLED:
            target_folder, draft_folder = BUNDLED[model]
            model = str(DEMO_WEIGHTS / target_folder)
            if draft is None and (DEMO_WEIGHTS / draft_folder / "config.json").exists():
                draft = str(DEMO_WEIGHTS / draft_folder)
        if not (Path(model).exists() or HUB_ID.fullmatch(model)):
            raise ConfigError(f"model {model!r} cannot be loaded: there is no such folder")
        graphs = device.startswith("cuda") if self.graphs is None else self.graphs
        drafter = self._drafter(draft)
        aware = self.adaptive_drafting and drafter != "flash-paper"
        return replace(
            self,
            model=model,
            draft=draft,
            device=device,
            dtype=dtype,
            drafter=drafter,
            graphs=graphs,
            adaptive_drafting=aware,
        )

    def _drafter(self, draft: str | None) -> DrafterName:
        """The one that is asked for, or with "auto" the one whose draft this is."""
        if self.drafter in ("ngram", "off"):
            return self.drafter
        if draft is None:
            if self.drafter == "auto":
                return "off"
            raise ConfigError(
                f"drafter {self.drafter!r} needs a trained draft for this model: give --draft PATH, or --drafter off"
            )
        found = drafter_of(Path(draft))
        if self.drafter not in ("auto", found):
            raise ConfigError(
                f"draft {draft!r} is one for --drafter {found}, not for {self.drafter!r}: give --draft PATH of such one"
            )
        return found

    def context(self, max_positions: int) -> int:
        """Tokens of prompt and answer together, for a model that knows so many positions. ConfigError where more are
        asked for."""
        if self.max_model_len is None:
            return min(DEFAULT_MAX_MODEL_LEN, max_positions)
        if self.max_model_len > max_positions:
            raise ConfigError(
                f"max_model_len must be at most {max_positions}, the positions that the model has; "
                f"got {self.max_model_len}"
            )
        return self.max_model_len

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(f.name for f in fields(cls))


def drafter_of(folder: Path) -> DrafterName:
    """Whose draft it is that this folder holds."""
    try:
        named = json.loads((folder / "config.json").read_text())["drafter"]
    except FileNotFoundError as error:
        raise ConfigError(f"draft {str(folder)!r} is not a folder with config.json and model.safetensors") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"draft {str(folder)!r} cannot be read: {error!r}") from error
    for known in TRAINED:
        if named == known:
            return known
    raise ConfigError(f"draft {str(folder)!r} is one for drafter {named!r}; known: {', '.join(TRAINED)}")
