"""The settings of the service: one frozen object, read at start from the command line and `FLASH_*` variables.

Each field is an option of `flashserve serve` and an environment variable of the same name (an empty one counts as
unset); its description is the help text. Nothing reads the environment later. They are one file because they are one
list: whoever looks for an option reads it from top to bottom.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from model.backends import free_memory
from model.config import (
    DEFAULT_MAX_MODEL_LEN,
    MAX_NODES,
    MOST_NODES,
    MOST_VERIFY_TOKENS,
    PAPER_NODES,
    DrafterName,
    EngineConfig,
    ReasoningParser,
    ToolCallParser,
)
from service import cores, extras

MIB = 1024 * 1024
# Fields that are passed to the engine unchanged; None means the engine's default.
ENGINE_OPTIONS = (
    "model",
    "revision",
    "trust_remote_code",
    "chat_template",
    "tool_call_parser",
    "reasoning_parser",
    "draft",
    "dtype",
    "drafter",
    "max_num_seqs",
    "max_model_len",
    "kv_cache_bytes",
    "prefill_chunk",
    "max_decode_slowdown",
    "adaptive_drafting",
    "max_nodes",
    "max_verify_tokens",
    "encoder_cache_bytes",
    "grammar_cache",
    "max_grammar_symbols",
    "prefix_cache",
    "tensor_parallel",
)
# Former names of fields, which still work as options, variables and arguments.
FORMER_NAMES = {
    "max_decode_slowdown": "prefill_stretch",
    "adaptive_drafting": "load_aware",
    "max_verify_tokens": "max_rows",
}


def option(panel: str, default: Any, description: str, *, hidden: bool = False, **bounds: Any) -> Any:
    """Declare a setting. panel: its heading in the help; bounds: pydantic's, such as `ge`."""
    return Field(default, description=description, json_schema_extra={"panel": panel, "hidden": hidden}, **bounds)


class Settings(BaseSettings):
    """All settings of `flashserve serve`."""

    model_config = SettingsConfigDict(
        env_prefix="FLASH_",
        env_ignore_empty=True,  # compose files and charts leave `${X:-}` empty
        frozen=True,
        extra="forbid",
        protected_namespaces=(),
    )

    # Model
    model: str = option(
        "Model", "demo", "Target model: a path, a hub id, or the bundled demo or demo-qwen.", min_length=1
    )
    revision: str | None = option(
        "Model", None, "Branch, tag or commit of a --model on the hub. Default: its main branch.", min_length=1
    )
    hf_token: SecretStr | None = option(
        "Model", None, "Token for private or gated models on the hub. Default: HF_TOKEN, or the saved login."
    )
    trust_remote_code: bool = option(
        "Model", False, "Run Python code that the checkpoint brings: only if you trust its author."
    )
    chat_template: str | None = option(
        "Model",
        None,
        "File of a chat template that replaces the checkpoint's. Default: the checkpoint's own.",
        min_length=1,
    )
    tool_call_parser: ToolCallParser = option(
        "Model",
        "auto",
        "How answers call tools: auto (as the chat template writes calls), off, hermes, qwen3_coder, glm45, "
        "llama3_json, pythonic or mistral.",
    )
    reasoning_parser: ReasoningParser = option(
        "Model",
        "auto",
        "How answers show reasoning: auto (as in the chat template), off, deepseek_r1, qwen3, glm45, mistral or kimi.",
    )
    draft: str | None = option("Model", None, "Folder of a trained draft. Default: the bundled model's own, else none.")
    drafter: DrafterName = option(
        "Model",
        "auto",
        "Drafting method: auto (as the draft was trained; off without one), flash, flash-paper, eagle, medusa, ngram "
        "(copies from the context, needs no draft) or off.",
    )
    watch_draft: float | None = option(
        "Model",
        None,
        "Check the folder of --draft every so many seconds, and serve a new draft there. Default: never.",
        gt=0,
    )
    served_model_name: str | None = option("Model", None, "Model name in the API. Default: the last part of --model.")
    device: str = option("Model", "auto", "auto, cpu, cuda, or cuda:0,1 for one worker per device.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "Model", "auto", "Data type of weights and computation: auto, float32, bfloat16 or float16."
    )
    workers: int = option("Model", 1, "Engine processes that share the CPU; on GPUs, one per device.", ge=1, le=64)
    tensor_parallel: int = option(
        "Model", 1, "Consecutive GPUs that share one worker's model; --device lists those of all workers.", ge=1, le=64
    )
    threads: int | None = option("Model", None, "CPU threads per worker. Default: cores / workers.", ge=1)
    max_num_seqs: int = option(
        "Model", 16, "Maximum sequences per worker that are decoded in one batch.", ge=1, le=1024
    )
    max_model_len: int | None = option(
        "Model",
        None,
        "Maximum tokens of prompt and answer together. Default: the model's own maximum, up to "
        f"{DEFAULT_MAX_MODEL_LEN}.",
        ge=16,
    )
    kv_cache_bytes: int | None = option(
        "Model",
        None,
        "Cap on the KV cache per worker, bytes. Default: enough for --max-num-seqs sequences, as far as "
        "--memory-utilization allows.",
        ge=1,
    )
    memory_utilization: float = option(
        "Model",
        EngineConfig.memory_utilization,
        "Share of the memory free at start for weights, KV cache and encoder cache; workers on one device divide it. "
        "Fewer sequences than --max-num-seqs are decoded together where no more fit.",
        gt=0,
        le=1,
    )
    prefill_chunk: int | None = option(
        "Model",
        None,
        "Chunked prefill: maximum prompt tokens per forward pass, between which running sequences are decoded. "
        f"Default: {EngineConfig.prefill_chunk}.",
        ge=16,
    )
    max_decode_slowdown: float | None = option(
        "Model",
        None,
        "Maximum slowdown of running sequences while a long prompt is prefilled, as a factor. Default: "
        f"{EngineConfig.max_decode_slowdown}.",
        ge=1.5,
    )
    adaptive_drafting: bool = option("Model", True, "Adapt the number of draft tokens to the load, down to none.")
    max_nodes: int | None = option(
        "Model",
        None,
        "Maximum draft tokens (tree nodes) verified per sequence and step. Default: "
        f"{MAX_NODES}; with flash-paper {PAPER_NODES}. At most {MOST_NODES}.",
        ge=0,
        le=MOST_NODES,
    )
    max_verify_tokens: int | None = option(
        "Model",
        None,
        f"Maximum tokens verified per step, over all sequences. Default: {EngineConfig.max_verify_tokens}.",
        ge=1,
        le=MOST_VERIFY_TOKENS,
    )
    encoder_cache_bytes: int | None = option(
        "Model",
        None,
        f"Encoder cache: memory for features of recent media, bytes. Default: {EngineConfig.encoder_cache_bytes}.",
        ge=0,
    )
    grammar_cache: int = option(
        "Model", EngineConfig.grammar_cache, "Number of compiled schemas and grammars that each worker keeps.", ge=1
    )
    max_grammar_symbols: int = option(
        "Limits", EngineConfig.max_grammar_symbols, "Maximum size of a compiled schema or grammar, symbols.", ge=1
    )
    prefix_cache: bool = option("Model", True, "Prefix caching: reuse the KV cache of a common beginning of prompts.")

    # HTTP
    host: str = option("HTTP", "127.0.0.1", "Address to listen on.")
    port: int = option("HTTP", 8000, "Port to listen on; 0: any free port.", ge=0, le=65535)
    api_key: Annotated[tuple[SecretStr, ...], NoDecode] = option(
        "HTTP", (), "API keys, comma-separated; each /v1 request must send one. Default: no key needed."
    )
    admin_key: SecretStr | None = option(
        "HTTP", None, "Key for POST /admin/draft, which changes the draft. Default: the route is disabled."
    )
    allowed_origins: Annotated[tuple[str, ...], NoDecode] = option(
        "HTTP",
        (),
        "Origins of web pages that may use the service, such as https://example.com, comma-separated; *: any. Default: "
        "none but the service's own page.",
    )
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = option(
        "HTTP",
        (),
        "Accepted Host names besides localhost, names without a dot and IP addresses, comma-separated, such as "
        "*.example.com; *: any. Default: no others on a loopback address without API keys, else any.",
    )
    trusted_proxies: Annotated[tuple[str, ...], NoDecode] = option(
        "HTTP",
        (),
        "Addresses or networks of proxies, comma-separated, whose X-Forwarded-For names the client. Default: none.",
    )
    allowed_media_domains: Annotated[tuple[str, ...], NoDecode] = option(
        "HTTP", (), "Domains from which http(s) media may be fetched, comma-separated. Default: none."
    )
    allowed_media_path: Annotated[tuple[Path, ...], NoDecode] = option(
        "HTTP",
        (),
        "Folders below which file:// media may be read, comma-separated: every client may then read every image and "
        "video there. Default: none.",
    )
    sse_keepalive_seconds: float = option(
        "HTTP", 10.0, "Send a comment in a stream after so many seconds of silence; 0: never.", ge=0
    )
    strict: bool = option(
        "HTTP", False, "Refuse requests with unknown fields instead of ignoring these with a warning."
    )
    docs: bool = option("HTTP", True, "Serve the OpenAPI document at /openapi.json, and a page of it at /docs.")
    log_level: Literal["debug", "info", "warning", "error"] = option(
        "HTTP", "info", "Log level: debug, info, warning or error."
    )

    # Monitoring
    metrics_aliases: Literal["vllm"] | None = option(
        "Monitoring", None, "Publish metrics also under vLLM's names, for its dashboards: vllm. Default: ours only."
    )

    otlp_endpoint: str | None = option(
        "Monitoring",
        None,
        "URL of an OpenTelemetry collector that gets traces by OTLP over HTTP, such as http://collector:4318; needs "
        "the extra otel. Default: OTEL_EXPORTER_OTLP_ENDPOINT, else no traces.",
    )

    # Limits
    max_connections: int = option(
        "Limits", 4096, "Maximum connections; beyond, those that wait longest for their clients are closed.", ge=16
    )
    max_header_bytes: int = option("Limits", 32 * 1024, "Maximum request line and headers, bytes.", ge=1024)
    head_timeout: int = option(
        "Limits", 30, "Seconds for request line and headers to arrive; also the keep-alive timeout.", ge=1
    )
    max_body_bytes: int = option("Limits", 64 * MIB, "Maximum request body, bytes.", ge=1024)
    max_text_bytes: int = option("Limits", 2 * MIB, "Maximum request body without its media, bytes.", ge=1024)
    max_media: int = option("Limits", 8, "Maximum images and videos per request.", ge=0)
    max_media_bytes: int = option("Limits", 32 * MIB, "Maximum size of one encoded image or video, bytes.", ge=1)
    max_pixels: int = option("Limits", 50_000_000, "Maximum pixels of one image, as sent.", ge=1)
    max_video_pixels: int = option("Limits", 4096 * 2304, "Maximum pixels of one video frame, as sent.", ge=1)
    max_clip_pixels: int = option(
        "Limits",
        64_000_000,
        "Maximum pixels of all frames sampled from one video, where the model takes frames of any size; larger frames "
        "are scaled down.",
        ge=1,
    )
    max_video_seconds: float = option("Limits", 600.0, "Maximum duration of a video, seconds.", gt=0)
    max_frames: int = option(
        "Limits", 32, "Maximum frames sampled from one video; fewer if the model's context holds fewer.", ge=1
    )
    max_prompt_chars: int = option("Limits", 1_000_000, "Maximum characters of text per request.", ge=1)
    max_messages: int = option("Limits", 2048, "Maximum chat messages per request.", ge=1)
    max_parts: int = option("Limits", 4096, "Maximum texts, images and videos of all messages of a request.", ge=1)
    max_new_tokens: int = option("Limits", 2048, "Largest max_tokens that a request may set.", ge=1)
    default_max_tokens: int = option("Limits", 256, "max_tokens of requests that do not set it.", ge=1)
    max_n: int = option("Limits", 8, "Maximum choices (n) per request.", ge=1)
    max_prompts: int = option("Limits", 32, "Maximum prompts of a request to /v1/completions.", ge=1)
    max_stop: int = option("Limits", 8, "Maximum stop strings per request.", ge=0)
    max_stop_chars: int = option("Limits", 128, "Maximum characters of one stop string.", ge=1)
    max_stop_token_ids: int = option("Limits", 64, "Maximum tokens in a request's stop_token_ids.", ge=0)
    max_logit_bias: int = option("Limits", 300, "Maximum tokens in a request's logit_bias.", ge=0)
    max_top_logprobs: int = option("Limits", 20, "Largest top_logprobs that a request may set.", ge=0)
    max_grammar_bytes: int = option(
        "Limits", 64 * 1024, "Maximum bytes of a schema or grammar that a request brings.", ge=1
    )
    max_grammar_depth: int = option("Limits", 64, "Maximum levels of nesting in a request's JSON schema.", ge=1, le=256)
    max_tools: int = option("Limits", 128, "Maximum tools per request.", ge=0)
    max_tools_bytes: int = option(
        "Limits", 128 * 1024, "Maximum names, descriptions and schemas of a request's tools, bytes of JSON.", ge=1
    )
    max_waiting: int = option("Limits", 64, "Maximum requests that wait besides those decoded; beyond: 503.", ge=0)
    max_waiting_media: int = option(
        "Limits", 256, "Maximum images and videos that wait for decoding; beyond: 503.", ge=0
    )
    max_requests_per_key: int | None = option(
        "Limits", None, "Maximum running and waiting requests per API key; beyond: 429. Default: no limit.", ge=1
    )
    body_timeout: float = option("Limits", 60.0, "Seconds for a body to arrive; then 408.", gt=0)
    min_upload_rate: float = option("Limits", 1024, "Minimum rate of an arriving body, bytes per second.", gt=0)
    upload_grace: float = option("Limits", 10.0, "Seconds that a body may be behind --min-upload-rate; then 408.", ge=0)
    max_uploads: int = option(
        "Limits", 256, "Maximum bodies that arrive for more than a second; beyond: 503 to the slowest.", ge=1
    )
    max_uploads_per_client: int = option(
        "Limits",
        64,
        "The same per API key or, without keys, per address (IPv6: per /64); beyond: 429 to the slowest. Behind a "
        "proxy, set --trusted-proxies, or all clients share its address.",
        ge=1,
    )
    max_bodies_bytes: int = option(
        "Limits",
        512 * MIB,
        "Maximum bytes of all bodies and fetched media until they are decoded; beyond: 503.",
        ge=1024,
    )
    max_decoded_bytes: int = option(
        "Limits",
        1024 * MIB,
        "Maximum bytes of the decoded images and videos of all requests, each choice counted, until they end; beyond: "
        "503. A worker holds as much again for its requests.",
        ge=1,
    )
    media_cache_bytes: int = option(
        "Limits",
        256 * MIB,
        "Memory for files of media that clients named by a uuid, so that they need not send them again, bytes; 0: none "
        "are remembered.",
        ge=0,
    )
    request_timeout: float = option("Limits", 300.0, "Seconds for a whole request; then 504.", gt=0)

    # Processes
    media_workers: int = option(
        "Processes",
        3,
        "Images decoded at once. With two or more, one decodes small images only; with three or more, two do.",
        ge=1,
        le=64,
    )
    video_workers: int = option(
        "Processes",
        1,
        "Videos decoded at once, besides images; 0: videos and images share --media-workers.",
        ge=0,
        le=64,
    )
    spare_media_workers: int = option(
        "Processes", 1, "Spare decoding processes, which replace those that fail.", ge=0, le=64
    )
    media_timeout: float = option("Processes", 20.0, "Seconds for decoding one image or video.", gt=0)
    image_timeout: float = option(
        "Processes",
        8.0,
        "Processor seconds for decoding the largest allowed image; smaller ones have proportionally less, at least an "
        "eighth.",
        gt=0,
    )
    media_queue_timeout: float = option(
        "Processes", 60.0, "Seconds that an image or video may wait for decoding; then 503.", gt=0
    )
    fetch_timeout: float = option("Processes", 10.0, "Seconds for fetching one image or video by URL.", gt=0)
    media_memory_bytes: int = option(
        "Processes", 1536 * MIB, "Address space of a decoding process, bytes.", ge=384 * MIB
    )
    shared_media_bytes: int = option(
        "Processes", 64 * MIB, "Memory for decoded media that is shared with the workers, bytes; 0: use sockets.", ge=0
    )
    load_timeout: float = option("Processes", 900.0, "Seconds for a worker to load its model.", gt=0)
    stall_timeout: float = option("Processes", 120.0, "Seconds of silence after which a busy worker is killed.", gt=0)
    max_worker_restarts: int = option(
        "Processes", 8, "Maximum restarts in a row of a worker that keeps dying; the service ends with its last.", ge=0
    )
    max_request_retries: int = option(
        "Processes", 2, "Retries of a request whose worker died; the last one runs alone on a worker.", ge=0
    )
    drain_timeout: float = option("Processes", 30.0, "Seconds for running requests to finish at shutdown.", ge=0)
    engine: str = option(
        "Processes", "service.pool.worker:load_engine", "Engine factory, as module:callable.", hidden=True
    )

    @model_validator(mode="before")
    @classmethod
    def accept_former_names(cls, values: dict[str, Any]) -> dict[str, Any]:
        for name, former in FORMER_NAMES.items():
            value = values.pop(former, os.environ.get(f"FLASH_{former.upper()}") or None)
            if value is not None:
                values.setdefault(name, value)
        return values

    @field_validator(
        *("api_key", "allowed_media_domains", "allowed_media_path"),
        *("allowed_origins", "allowed_hosts", "trusted_proxies"),
        mode="before",
    )
    @classmethod
    def split_commas(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("api_key", "admin_key", "hf_token")
    @classmethod
    def keys_can_be_sent(cls, value: Any) -> Any:
        """Refuse keys that are not printable ASCII: clients encode others differently in a header."""
        for key in value if isinstance(value, tuple) else [value] if value else []:
            text = key.get_secret_value()
            if not (text.isascii() and text.isprintable() and text == text.strip()):
                raise ValueError("a key must be printable ASCII without surrounding spaces")
        return value

    @field_validator("allowed_media_path")
    @classmethod
    def media_folders_exist(cls, folders: tuple[Path, ...]) -> tuple[Path, ...]:
        for folder in folders:
            if not folder.is_absolute() or not folder.is_dir() or folder.resolve() == Path("/"):
                raise ValueError(f"{folder} must be the absolute path of a folder, and not the root folder")
        return folders

    @field_validator("otlp_endpoint")
    @classmethod
    def collector_can_be_reached(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            url = urlsplit(value)
            usable = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
        except ValueError:  # a port that is no number
            usable = False
        if not usable or url.query or url.fragment:
            raise ValueError("must be a URL such as http://collector:4318")
        if not extras.has_otel():
            raise ValueError("traces need the extra otel: pip install 'flashserve[otel]'")
        return value

    @field_validator("device")
    @classmethod
    def device_is_known(cls, value: str) -> str:
        kind, _, indices = value.partition(":")
        if value not in ("auto", "cpu", "cuda") and not (
            kind == "cuda" and all(index.isdecimal() for index in indices.split(","))
        ):
            raise ValueError(f"must be auto, cpu, cuda or a list such as cuda:0,1; got {value!r}")
        return value

    @model_validator(mode="after")
    def parts_agree(self) -> Self:
        """Check settings that depend on each other."""
        if "," in self.device and self.workers != 1:
            raise ValueError("workers: leave it out with a list of devices, which has one worker per device")
        if "," in self.device:
            every = [int(index) for index in self.device.partition(":")[2].split(",")]
            groups = [every[at : at + self.tensor_parallel] for at in range(0, len(every), self.tensor_parallel)]
            if any(group != list(range(group[0], group[0] + self.tensor_parallel)) for group in groups):
                raise ValueError(f"tensor_parallel: list the devices in groups of {self.tensor_parallel} side by side")
        if self.watch_draft is not None and self.draft is None:
            raise ValueError("watch_draft: there is no folder to watch; give --draft")
        if self.default_max_tokens > self.max_new_tokens:
            raise ValueError("default_max_tokens: must not exceed max_new_tokens")
        if self.max_body_bytes > self.max_bodies_bytes:
            raise ValueError("max_body_bytes: must not exceed max_bodies_bytes")
        if self.max_prompt_chars > self.max_text_bytes:
            raise ValueError("max_prompt_chars: must not exceed max_text_bytes")
        return self

    @property
    def model_name(self) -> str:
        """The name that clients see: never a path of this machine."""
        return self.served_model_name or Path(self.model).name

    def engine_options(self) -> list[dict[str, Any]]:
        """Return the engine options of each worker."""
        kind, _, indices = self.device.partition(":")
        listed = indices.split(",")[:: self.tensor_parallel]  # the first device of each worker
        devices = [f"{kind}:{index}" for index in listed] if indices else [self.device] * self.workers
        threads = self.threads or max(1, cores.available() // len(devices))
        shared = {name: getattr(self, name) for name in ENGINE_OPTIONS}
        # Read once, here: a worker that starts again must not take what the others hold for its own lack.
        shared |= {"free_host_memory": free_memory.of_machine()}
        shared |= {"hf_token": self.hf_token.get_secret_value() if self.hf_token else None}
        options = [
            {
                **shared,
                "device": device,
                "threads": threads,
                "memory_utilization": self.memory_utilization / devices.count(device),
            }
            for device in devices
        ]
        return [{name: value for name, value in each.items() if value is not None} for each in options]


def holds_keys(variable: str) -> bool:
    """Return whether an environment variable holds keys, which only the API process needs: of ours, or those that
    OpenTelemetry sends as headers."""
    if variable.startswith("OTEL_") and variable.endswith("_HEADERS"):
        return True
    prefix, _, name = variable.lower().partition("_")
    field = Settings.model_fields.get(name) if prefix == "flash" else None
    return field is not None and "SecretStr" in str(field.annotation)


def error_messages(error: ValidationError) -> list[str]:
    """Return one message per invalid setting, which names it as option and as variable."""
    return [_message(problem) for problem in error.errors()]


def _message(problem: Any) -> str:
    message = str(problem["msg"]).removeprefix("Value error, ")
    if not problem["loc"]:
        return message
    name = str(problem["loc"][0])
    former = f"; formerly --{FORMER_NAMES[name].replace('_', '-')}" if name in FORMER_NAMES else ""
    return f"--{name.replace('_', '-')} (FLASH_{name.upper()}{former}): {message}"
