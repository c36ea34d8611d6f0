"""Defines the configuration of an engine. It is frozen; `resolved` returns a new one without "auto"."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal, get_args

from model.errors import ConfigError

DEMO = "demo"
DEMO_WEIGHTS = Path(__file__).parent / "demo" / "weights"
# The bundled models by name: folders of target and draft in DEMO_WEIGHTS.
BUNDLED = {DEMO: ("target", "draft"), "demo-qwen": ("qwen-target", "qwen-draft")}
DrafterName = Literal["auto", "flash", "flash-paper", "eagle", "medusa", "ngram", "off"]
ToolCallParser = Literal["auto", "off", "hermes", "qwen3_coder", "glm45", "llama3_json", "pythonic", "mistral"]
ReasoningParser = Literal["auto", "off", "deepseek_r1", "qwen3", "glm45", "mistral", "kimi"]
DRAFTERS: tuple[str, ...] = get_args(DrafterName)
TRAINED: tuple[DrafterName, ...] = ("flash", "flash-paper", "eagle", "medusa")  # these need a trained draft
MAX_NODES, PAPER_NODES = 15, 25  # default draft nodes per sequence and step; those of flash-paper's fixed tree
# Largest values of max_nodes, tree_width and max_verify_tokens: the native library keeps a tree's nodes on its stack.
MOST_NODES, WIDEST_TREE, MOST_VERIFY_TOKENS = 1024, 64, 65_536
DEFAULT_MAX_MODEL_LEN = 4096
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # "name" or "owner/name"; anything else is a path
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class EngineConfig:
    """All options of an engine. Raises ConfigError, which names the option, if a value is out of range."""

    model: str = DEMO  # "demo", "demo-qwen", a folder, or a hub id
    revision: str | None = None  # branch, tag or commit of a hub id; None: its main branch
    hf_token: str | None = field(default=None, repr=False)  # for private models; None: HF_TOKEN, or the saved login
    trust_remote_code: bool = False  # run Python code that the checkpoint brings
    chat_template: str | None = None  # file of a chat template that replaces the checkpoint's
    tool_call_parser: ToolCallParser = "auto"  # how answers call tools; "auto": as the chat template writes calls
    reasoning_parser: ReasoningParser = "auto"  # how answers show reasoning; "auto": as in the chat template
    draft: str | None = None  # folder of a trained draft; None: the bundled one for a bundled model, else none
    device: str = "auto"  # "auto", "cpu", "cuda", "cuda:1"
    dtype: str = "auto"
    drafter: DrafterName = "auto"  # "auto": the one that the draft was trained for
    max_num_seqs: int = 16  # maximum sequences decoded together; each has a slot of the KV cache
    max_model_len: int | None = None  # prompt + answer, tokens; None: the model's limit, up to DEFAULT_MAX_MODEL_LEN
    kv_cache_bytes: int | None = None  # limit on the KV cache, so on its slots; None: memory_utilization decides
    memory_utilization: float = 0.9  # share of the free memory for weights, KV cache and encoder cache
    free_host_memory: int | None = None  # CPU: bytes that were free before any engine started; None: measure now
    prefill_chunk: int = 512  # maximum prompt tokens per pass, and about the most between two decode steps
    max_decode_slowdown: float = 2.5  # maximum factor by which a long prompt may slow down decoding
    adaptive_drafting: bool = True  # draft only as much as pays at the present load; not for fixed trees
    max_verify_tokens: int = 512  # maximum rows per step over all sequences; limits draft tokens, never newest tokens
    max_nodes: int | None = None  # maximum draft nodes per sequence and step; None: MAX_NODES, or a fixed tree's number
    tree_width: int = 4  # candidates kept at each depth
    encoder_cache_bytes: int = 256 << 20
    grammar_cache: int = 128  # compiled grammars that are kept
    max_grammar_symbols: int = 100_000  # maximum size of a compiled grammar
    prefix_cache: bool = True  # reuse keys and values of common prompt prefixes
    tensor_parallel: int = 1  # devices that share the decoder's layers; `device` is the first
    graphs: bool | None = None  # record torch's passes and replay them (CUDA graphs); None: on a GPU only
    threads: int | None = None  # CPU threads; None: all
    share_cores: bool = False  # CPU: other processes, which give way, use the same cores

    def __post_init__(self) -> None:
        if self.drafter not in DRAFTERS:
            raise ConfigError(f"drafter must be one of {', '.join(DRAFTERS)}; got {self.drafter!r}")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}")
        for name, names in (("tool_call_parser", ToolCallParser), ("reasoning_parser", ReasoningParser)):
            if getattr(self, name) not in get_args(names):
                raise ConfigError(f"{name} must be one of {', '.join(get_args(names))}; got {getattr(self, name)!r}")
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
            "grammar_cache": (1, math.inf),
            "max_grammar_symbols": (1, math.inf),
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
        """Return the maximum number of draft nodes per sequence and step."""
        if self.max_nodes is not None:
            return self.max_nodes
        return PAPER_NODES if self.drafter == "flash-paper" else MAX_NODES

    def resolved(self) -> EngineConfig:
        """Return a copy with names of bundled models and "auto" replaced by the values for this machine.

        Raises ConfigError if the device, the model or the draft is not there.
        """
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
        """Return the drafter for this draft; "auto" becomes the drafter that the draft was trained for. Raises
        ConfigError if they do not match."""
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
        """Return the limit of prompt and answer together, in tokens, for a model with `max_positions` positions.

        Raises ConfigError if `max_model_len` is larger.
        """
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
        """Return the names of all options."""
        return tuple(f.name for f in fields(cls))


def drafter_of(folder: Path) -> DrafterName:
    """Return the name of the drafter that the draft in `folder` is for. Raises ConfigError if it cannot be read."""
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
