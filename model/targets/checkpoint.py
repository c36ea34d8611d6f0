"""Finds out, before weights are read, what is wrong with a checkpoint, and loads it: config, processor and weights.

Every error is a ConfigError that names the file or the field and the reason. transformers itself fills tensors that a
checkpoint lacks with random numbers and goes on; here that is an error. To know it early, the model is built on the
meta device and "loaded" from the names and shapes in the headers of the files (stored.py).
"""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedTokenizerBase
from transformers.models.auto import modeling_auto
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, cached_file
from transformers.utils import logging as transformers_logging

from model.config import EngineConfig
from model.errors import ConfigError
from model.targets.chat_template import ChatTemplate
from model.targets.stored import StoredTensor, stored_tensors

log = logging.getLogger("flashserve.loading")

COMPRESSED_TENSORS = "compressed-tensors"
ORDINARY = ("F64", "F32", "F16", "BF16")  # dtypes of weights that are not quantised
SCALES = ("_scale_inv", "_scale")  # endings of the names of float8 weights' scales
LISTED = 3  # names in an error about many tensors
INDEXER = "its attention picks positions by a learned indexer, which is not supported"
CROSS_ATTENTION = "its layers read images by cross-attention, which is not supported"
NO_CHAT = "it has no chat template and generates no answers to messages"
DISCRETE = "images are discrete tokens for it, which is not supported"
REFUSED = {
    **dict.fromkeys(("glm5_next", "qwen4_exp", "mistral_large4", "dots3_note"), INDEXER),
    "minimax_m3_vl": "its attention picks blocks of positions, which is not supported",
    **dict.fromkeys(("inkling_mm_model", "inkling2"), "its attention adds a bias for each position"),
    "diffusion_gemma": "it generates text by diffusion, not token by token",
    **dict.fromkeys(("mllama", "idefics"), CROSS_ATTENTION),
    **dict.fromkeys(("chameleon", "emu3"), DISCRETE),
    **dict.fromkeys(("instructblip", "instructblipvideo"), "its image features depend on the prompt"),
    **dict.fromkeys(("blip", "git", "pi0", "shieldgemma2", "evolla", "kosmos-2", "kosmos-2.5"), NO_CHAT),
}  # by model_type


def hub_options(config: EngineConfig) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that say from where files come."""
    options = {"revision": config.revision, "token": config.hf_token}
    return {name: value for name, value in options.items() if value is not None}


def _loading_options(config: EngineConfig) -> dict[str, Any]:
    return hub_options(config) | {"trust_remote_code": config.trust_remote_code}


@contextmanager
def _as_config_error(config: EngineConfig, part: str) -> Iterator[None]:
    """Turn whatever transformers raises while it reads `part` of a checkpoint into a ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # tokenizers raise plain Exceptions, and code of a checkpoint may raise any
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"model {config.model!r} brings Python code of its own, which is not run by default; use a checkpoint "
                "in transformers' own format (its name often ends in -hf), or, if you trust its author, give "
                "--trust-remote-code true"
            ) from error
        reason = _invalid_json(config) or _first_lines(error)
        raise ConfigError(f"model {config.model!r} cannot be loaded: {part}: {reason}") from error


def _first_lines(error: Exception) -> str:
    """Return the beginning of an error's message, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines else repr(error)


def _invalid_json(config: EngineConfig, pattern: str = "*.json") -> str | None:
    """Look for a damaged JSON file in the folder of a checkpoint; return its name and what is wrong with it."""
    folder = _folder(config)
    for file in sorted(folder.glob(pattern)) if folder is not None else ():
        try:
            json.loads(file.read_text())
        except (OSError, ValueError) as error:
            return f"{file} is not valid JSON: {error}"
    return None


def _folder(config: EngineConfig) -> Path | None:
    """Return the folder with the checkpoint's files, which may be in the hub's cache; None if there is none yet."""
    if Path(config.model).is_dir():
        return Path(config.model)
    found = cached_file(
        config.model,
        CONFIG_NAME,
        local_files_only=True,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **hub_options(config),
    )
    return None if found is None else Path(found).parent


# --- config


def read_config(config: EngineConfig) -> Any:
    """Read transformers' config of the target that a resolved config names.

    Raises ConfigError if it is no vision-language model, or of a kind that cannot be served.
    """
    _refuse(config, kind := _model_type(config))  # even if this transformers does not know it
    try:
        with _as_config_error(config, CONFIG_NAME):
            checkpoint = AutoConfig.from_pretrained(config.model, **_loading_options(config))
    except ConfigError as error:
        if "does not recognize this architecture" in str(error.__cause__):
            raise ConfigError(
                f"model {config.model!r} is of type {kind!r}, which transformers {transformers.__version__} does not "
                "know: give a checkpoint of a known type, or install a newer transformers"
            ) from error
        raise
    kind = checkpoint.model_type
    _refuse(config, kind)
    if checkpoint.is_encoder_decoder:
        raise ConfigError(
            f"model {config.model!r} is of type {kind!r}, an encoder-decoder, which is not supported: give a "
            "decoder-only vision-language model"
        )
    if kind not in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and not _has_remote_class(checkpoint):
        sort = "a language model without vision" if _is_causal(kind) else "no vision-language model"
        raise ConfigError(
            f"model {config.model!r} is of type {kind!r}, {sort}: give a checkpoint of transformers' kind "
            "image-text-to-text, such as llava, qwen2_5_vl or qwen3_vl"
        )
    text = checkpoint.get_text_config(decoder=True)
    if lacking := [
        name for name in ("num_hidden_layers", "hidden_size", "vocab_size") if getattr(text, name, None) is None
    ]:
        raise ConfigError(
            f"model {config.model!r} cannot be loaded: {CONFIG_NAME} describes no language model "
            f"(text_config.{lacking[0]} is missing)"
        )
    if not isinstance(checkpoint.dtype, torch.dtype | None):
        raise ConfigError(
            f"model {config.model!r} cannot be loaded: {CONFIG_NAME}: dtype {checkpoint.dtype!r} is no dtype of torch"
        )
    if (problem := _invalid_json(config, GENERATION_CONFIG_NAME)) is not None:  # transformers would go on without it
        raise ConfigError(f"model {config.model!r} cannot be loaded: {problem}")
    quantisation(config, checkpoint)
    return checkpoint


def _refuse(config: EngineConfig, kind: str | None) -> None:
    """Raise ConfigError if models of this type need what is not supported."""
    if kind in REFUSED:
        raise ConfigError(f"model {config.model!r} is of type {kind!r}, and {REFUSED[kind]}")


def _model_type(config: EngineConfig) -> str | None:
    """Read model_type from config.json; None if it is not there, or not downloaded yet."""
    folder = _folder(config)
    try:
        return None if folder is None else str(json.loads((folder / CONFIG_NAME).read_text())["model_type"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_causal(kind: str) -> bool:
    return kind in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def _has_remote_class(checkpoint: Any) -> bool:
    """Return whether a config that was read names a model class in the checkpoint's own code."""
    return "AutoModelForImageTextToText" in (getattr(checkpoint, "auto_map", None) or {})


# --- quantised weights


@dataclass(frozen=True)
class Quantisation:
    """How the weights of a checkpoint are quantised. dequantised: they are converted to the configured dtype when they
    are loaded, since no kernel for them is here; otherwise they stay as they are stored."""

    method: str
    dequantised: bool


def quantisation(config: EngineConfig, checkpoint: Any) -> Quantisation | None:
    """Return how the weights of a checkpoint are quantised; None if they are not.

    Raises ConfigError if that needs something which is not here.
    """
    described = getattr(checkpoint, "quantization_config", None)
    if described is None:
        return None
    method = str(described.get("quant_method") if isinstance(described, dict) else described.quant_method)
    try:
        quantizer = AutoHfQuantizer.from_config(described, pre_quantized=True)
        quantizer.validate_environment(device_map={"": config.device}, dtype=getattr(torch, config.dtype))
    except Exception as error:  # packages that are half installed raise any
        raise ConfigError(
            f"model {config.model!r} has quantised weights (quantization_config.quant_method {method!r}), and "
            f"something that they need is not here: {_first_lines(error)}; install it, or give a checkpoint whose "
            "weights are not quantised"
        ) from error
    dequantised = method == COMPRESSED_TENSORS or getattr(quantizer.quantization_config, "dequantize", False)
    return Quantisation(method, bool(dequantised))


def _quantised_options(quantised: Quantisation | None) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` for quantised weights. compressed-tensors would only convert them in
    the first pass of the whole model, which never runs here."""
    if quantised is None or quantised.method != COMPRESSED_TENSORS:
        return {}
    from transformers import CompressedTensorsConfig

    return {"quantization_config": CompressedTensorsConfig(dequantize=True)}


# --- processor


def load_processor(config: EngineConfig, **options: Any) -> Any:
    """Load the processor of a checkpoint, with its tokenizer and chat template.

    options: further arguments of `from_pretrained`. Raises ConfigError if a part of it is missing.
    """
    with _as_config_error(config, "processor"):
        processor = AutoProcessor.from_pretrained(config.model, **_loading_options(config), **options)
    if isinstance(processor, PreTrainedTokenizerBase) or not hasattr(processor, "image_processor"):
        raise ConfigError(
            f"model {config.model!r} cannot be loaded: it has no image processor (preprocessor_config.json or "
            "processor_config.json); copy these files from the checkpoint that it was made from"
        )
    if getattr(processor, "tokenizer", None) is None:
        raise ConfigError(
            f"model {config.model!r} cannot be loaded: it has no tokenizer (tokenizer.json); copy it from the "
            "checkpoint that it was made from"
        )
    if config.chat_template is not None:
        _replace_template(config.chat_template, processor)
    check_template(config, processor.chat_template or processor.tokenizer.chat_template)
    return processor


def _replace_template(file: str, processor: Any) -> None:
    """Give a processor the chat template of a file. Raises ConfigError if it cannot be read or refuses a greeting."""
    option = f"chat_template {file!r} cannot be used"
    try:
        processor.chat_template = processor.tokenizer.chat_template = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{option}: {error}") from error
    try:
        template = ChatTemplate(processor, processor.tokenizer)
        template.render([template.greeting])
    except Exception as error:  # a template may raise any error
        line = getattr(error, "lineno", None)
        place = "" if line is None else f"line {line}: "
        raise ConfigError(f"{option}: {place}{type(error).__name__}: {error}") from error


def check_template(config: EngineConfig, template: Any) -> None:
    """Raise ConfigError if a checkpoint has no chat template."""
    if not template:
        raise ConfigError(
            f"model {config.model!r} cannot be loaded: it has no chat template, which turns messages into a prompt; "
            "give an instruction-tuned checkpoint, or put that one's chat_template.jinja into the folder"
        )


# --- weights


def build_skeleton(config: EngineConfig, checkpoint: Any, *, download: bool = False) -> Any:
    """Build the model of a checkpoint on the meta device, as it will be loaded, and check that its files have every
    tensor in the right shape. Reads no weights.

    download: get files from the hub first; otherwise those that are not here are not checked. Quantised weights are not
    checked, and the model is built as if they were not. Returns None if the checkpoint brings code of its own. Raises
    ConfigError, which names files or tensors.
    """
    with _as_config_error(config, "weights"):
        try:
            tensors = stored_tensors(config.model, hub_options(config) | {"local_files_only": not download})
        except OSError:
            if download:
                raise
            tensors = None
    model_class = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(checkpoint), None)
    if model_class is None:
        return None
    dtype = getattr(torch, config.dtype)
    with _as_config_error(config, "weights"), _quiet():
        quantised = quantisation(config, checkpoint) is not None
        _check_dtypes(config, tensors or {}, quantised=quantised)
        if tensors is None or quantised:
            with torch.device("meta"):
                return model_class._from_config(without_quantisation(checkpoint), dtype=dtype)
        model, info = model_class.from_pretrained(
            None,
            config=checkpoint,
            state_dict={name: tensor.on_meta for name, tensor in tensors.items()},
            device_map="meta",
            dtype=dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    _check_loaded(config, info)
    return model


def without_quantisation(checkpoint: Any) -> Any:
    """Return a copy of a config that says nothing about quantised weights."""
    copied = copy.deepcopy(checkpoint)
    if hasattr(copied, "quantization_config"):
        del copied.quantization_config
    return copied


def load_model(config: EngineConfig, model_class: Any = AutoModelForImageTextToText, **options: Any) -> Any:
    """Load the model of a checkpoint, straight to the device that a resolved config names.

    options: further arguments of `from_pretrained`. Raises ConfigError if a tensor is missing or has another shape than
    the config says.
    """
    device = {} if config.device == "cpu" or "distributed_config" in options else {"device_map": {"": config.device}}
    quantised = quantisation(config, read_config(config))
    with _as_config_error(config, "weights"), _quiet():
        model, info = model_class.from_pretrained(
            config.model,
            dtype=getattr(torch, config.dtype),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **_loading_options(config),
            **_quantised_options(quantised),
            **device,
            **options,
        )
    _check_loaded(config, info)
    if quantised is not None:
        if quantised.dequantised:
            log.info("the weights are quantised (%s) and are converted to %s", quantised.method, config.dtype)
        elif type(model.get_output_embeddings()) is not torch.nn.Linear:
            raise ConfigError(
                f"model {config.model!r} cannot be served: its lm_head is quantised too; give a checkpoint that leaves "
                "lm_head as it is, as quantisers do by default"
            )
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from reporting about tensors and quantisers: what is wrong becomes an error."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)


def _check_dtypes(config: EngineConfig, tensors: dict[str, StoredTensor], *, quantised: bool) -> None:
    """Raise ConfigError if numbers are stored in a way that nothing explains, or without their scales."""
    for name, tensor in tensors.items():
        if not name.endswith("weight") or tensor.dtype in ORDINARY:
            continue
        if not quantised:
            raise ConfigError(
                f"model {config.model!r} cannot be loaded: {name} is stored as {tensor.dtype}, and {CONFIG_NAME} "
                "has no quantization_config that says what it means"
            )
        if tensor.dtype.startswith("F8") and not any(f"{name}{scale}" in tensors for scale in SCALES):
            raise ConfigError(
                f"model {config.model!r} cannot be loaded: {name} is stored as {tensor.dtype}, and its scale "
                f"({name}{SCALES[0]}) is missing"
            )


def _check_loaded(config: EngineConfig, info: dict[str, Any]) -> None:
    """Raise ConfigError if tensors were missing or of another shape. info: transformers' loading_info."""
    problems = []
    if missing := sorted(info["missing_keys"]):
        problems.append(f"{_count(missing)} missing ({_some(missing)})")
    if mismatched := sorted(info["mismatched_keys"]):
        described = [f"{name} is {tuple(stored)}, not {tuple(wanted)}" for name, stored, wanted in mismatched]
        problems.append(f"{_count(described)} of another shape than {CONFIG_NAME} says ({_some(described)})")
    if errors := info.get("error_msgs"):
        problems.append(_some(list(map(str, errors))))
    if problems:
        unknown = sorted(info["unexpected_keys"])
        hint = f"; it has {len(unknown)} unknown ones instead ({_some(unknown)})" if missing and unknown else ""
        raise ConfigError(f"model {config.model!r} cannot be loaded: {', '.join(problems)}{hint}")


def _count(names: list[str]) -> str:
    return "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"


def _some(names: list[str]) -> str:
    """List the first few of many names."""
    return ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")
