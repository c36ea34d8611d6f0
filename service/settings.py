"""Every knob of the service: one frozen object, read once at start from the command line and `FLASH_*` variables.

A field here is an option of `flashserve serve` and an environment variable by the same name (an empty one is as good as
none); its description is the help text. Nothing here knows what the values are used for, and nothing reads the
environment later.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from model.config import DEFAULT_MAX_MODEL_LEN, MAX_NODES, PAPER_NODES, DrafterName, EngineConfig
from service import cores

MIB = 1024 * 1024
# What the engine is told as it stands; None leaves the choice to it.
ENGINE_OPTIONS = (
    *("model", "draft", "dtype", "drafter", "max_num_seqs", "max_model_len", "kv_cache_bytes"),
    *(
        "prefill_chunk",
        "prefill_stretch",
        "load_aware",
        "max_nodes",
        "max_rows",
        "encoder_cache_bytes",
        "prefix_cache",
        "tensor_parallel",
    ),
)


def option(panel: str, default: Any, description: str, *, hidden: bool = False, **bounds: Any) -> Any:
    return Field(default, description=description, json_schema_extra={"panel": panel, "hidden": hidden}, **bounds)


class Settings(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix="FLASH_",
        env_ignore_empty=True,  # what `${X:-}` leaves in a compose file or a chart
        frozen=True,
        extra="forbid",
        protected_namespaces=(),
    )

    # The model and where it runs
    model: str = option(
        "Model", "demo", "Path or id of the target model; 'demo' and 'demo-qwen' are bundled.", min_length=1
    )
    draft: str | None = option("Model", None, "Path of a trained draft; without it, the bundled model's own.")
    drafter: DrafterName = option(
        "Model",
        "auto",
        "How tokens are drafted: auto (as the draft was trained; off without one), flash, flash-paper, eagle, medusa, "
        "ngram (looks up what was said before; needs no draft), off.",
    )
    watch_draft: float | None = option(
        "Model",
        None,
        "Seconds between looks at the folder of --draft; a new draft there is used. By default nobody looks.",
        gt=0,
    )
    served_model_name: str | None = option("Model", None, "The name that clients use; by default the model's own.")
    device: str = option("Model", "auto", "auto, cpu, cuda, or cuda:0,1 for one worker on each of these.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "Model", "auto", "What the model computes in: auto, float32, bfloat16 or float16."
    )
    workers: int = option("Model", 1, "Engine processes that share the CPU (on GPUs: one per device).", ge=1, le=64)
    tensor_parallel: int = option(
        "Model", 1, "GPUs, side by side, that share a worker's model; --device lists those of all workers.", ge=1, le=64
    )
    threads: int | None = option("Model", None, "CPU threads per worker; by default cores / workers.", ge=1)
    max_num_seqs: int = option("Model", 16, "Sequences that a worker decodes in one batch.", ge=1, le=1024)
    max_model_len: int | None = option(
        "Model",
        None,
        f"Prompt and answer together, tokens; by default what the model has, up to {DEFAULT_MAX_MODEL_LEN}.",
        ge=16,
    )
    kv_cache_bytes: int | None = option(
        "Model", None, "KV memory per worker, bytes; by default for --max-num-seqs sequences.", ge=1
    )
    prefill_chunk: int | None = option(
        "Model",
        None,
        "Prompt tokens of one pass, after which running streams have their turn; by default "
        f"{EngineConfig.prefill_chunk}.",
        ge=16,
    )
    prefill_stretch: float | None = option(
        "Model",
        None,
        "How many times slower running streams may become while a long prompt is read; by default "
        f"{EngineConfig.prefill_stretch}.",
        ge=1.5,
    )
    load_aware: bool = option("Model", True, "Draft only as much as pays at the present load, or not at all.")
    max_nodes: int | None = option(
        "Model",
        None,
        f"Draft tokens verified per sequence and step; by default {MAX_NODES}, with flash-paper {PAPER_NODES}.",
        ge=0,
    )
    max_rows: int | None = option(
        "Model",
        None,
        f"Rows of one step, of all sequences: draft tokens stay within them; by default {EngineConfig.max_rows}.",
        ge=1,
    )
    encoder_cache_bytes: int | None = option(
        "Model",
        None,
        f"Memory for features of media seen before, bytes; by default {EngineConfig.encoder_cache_bytes}.",
        ge=0,
    )
    prefix_cache: bool = option("Model", True, "What prompts begin with in common is computed once.")

    # Where it listens and who may ask
    host: str = option("HTTP", "127.0.0.1", "Address to listen on.")
    port: int = option("HTTP", 8000, "Port to listen on; 0 picks a free one.", ge=0, le=65535)
    api_key: Annotated[tuple[SecretStr, ...], NoDecode] = option(
        "HTTP", (), "Keys of which each /v1 request must carry one (comma-separated); none: open to all."
    )
    admin_key: SecretStr | None = option(
        "HTTP", None, "Key for POST /admin/draft, which changes the draft; without one nobody may."
    )
    allowed_origins: Annotated[tuple[str, ...], NoDecode] = option(
        "HTTP",
        (),
        "Origins of web pages elsewhere that may use the service, as https://example.com (comma-separated; * is any); "
        "none: without keys no such page, with keys those that have one, whose browsers keep the answers from them.",
    )
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = option(
        "HTTP",
        (),
        "Names under which it answers, besides localhost, names without a dot and addresses (comma-separated; "
        "*.example.com too; * is any); none: on a loopback address without keys no other, else any.",
    )
    trusted_proxies: Annotated[tuple[str, ...], NoDecode] = option(
        "HTTP",
        (),
        "Addresses or networks of proxies (comma-separated) whose X-Forwarded-For says which client it is; none: it is "
        "who connects.",
    )
    allowed_media_domains: Annotated[tuple[str, ...], NoDecode] = option(
        "HTTP", (), "Domains from which http(s) media may be fetched (comma-separated); none: no fetching."
    )
    sse_keepalive_seconds: float = option(
        "HTTP", 10.0, "Seconds of silence after which a stream gets a comment, so that nobody hangs up; 0: none.", ge=0
    )
    log_level: Literal["debug", "info", "warning", "error"] = option(
        "HTTP", "info", "How much is logged: debug, info, warning or error."
    )

    # What one request may ask for
    max_connections: int = option(
        "Limits", 4096, "Connections; beyond, those that wait longest for their clients are closed.", ge=16
    )
    max_header_bytes: int = option("Limits", 32 * 1024, "Bytes of request line and headers.", ge=1024)
    head_timeout: int = option(
        "Limits", 30, "Seconds for request line and headers to arrive, since the connection or the last answer.", ge=1
    )
    max_body_bytes: int = option("Limits", 64 * MIB, "Bytes of a request's body.", ge=1024)
    max_text_bytes: int = option("Limits", 512 * 1024, "Bytes of a request's body beside its media.", ge=1024)
    max_media: int = option("Limits", 8, "Images and videos per request.", ge=0)
    max_media_bytes: int = option("Limits", 32 * MIB, "Bytes of one image or video, encoded.", ge=1)
    max_pixels: int = option("Limits", 50_000_000, "Pixels of one image, as sent.", ge=1)
    max_video_pixels: int = option("Limits", 4096 * 2304, "Pixels of one frame of a video, as sent.", ge=1)
    max_video_seconds: float = option("Limits", 600.0, "Seconds that a video may last.", gt=0)
    max_frames: int = option(
        "Limits", 32, "Frames sampled from one video; fewer where the model's context holds fewer.", ge=1
    )
    max_prompt_chars: int = option("Limits", 32_768, "Characters of text per request.", ge=1)
    max_messages: int = option("Limits", 64, "Chat messages per request.", ge=1)
    max_parts: int = option("Limits", 1024, "Texts, images and videos of all chat messages.", ge=1)
    max_new_tokens: int = option("Limits", 2048, "The largest max_tokens a request may ask for.", ge=1)
    default_max_tokens: int = option("Limits", 256, "max_tokens where a request does not say.", ge=1)
    max_n: int = option("Limits", 8, "Choices per request.", ge=1)
    max_stop: int = option("Limits", 8, "Stop strings per request.", ge=0)
    max_stop_chars: int = option("Limits", 128, "Characters of one stop string.", ge=1)
    max_logit_bias: int = option("Limits", 300, "Tokens that a request's logit_bias may name.", ge=0)
    max_top_logprobs: int = option("Limits", 20, "The largest top_logprobs a request may ask for.", ge=0)
    max_waiting: int = option("Limits", 64, "Requests that may wait beyond those decoded; then 503.", ge=0)
    max_waiting_media: int = option("Limits", 256, "Images and videos that may wait to be decoded; then 503.", ge=0)
    max_requests_per_key: int | None = option(
        "Limits", None, "Requests that one API key may have running or waiting; by default as many as fit.", ge=1
    )
    body_timeout: float = option("Limits", 60.0, "Seconds for a body to arrive.", gt=0)
    min_upload_rate: float = option("Limits", 1024, "Bytes a second at which a body must arrive.", gt=0)
    upload_grace: float = option(
        "Limits", 10.0, "Seconds that a body may fall behind --min-upload-rate; then 408.", ge=0
    )
    max_uploads: int = option(
        "Limits", 256, "Bodies that may be arriving for more than a second; then 503 to the slowest of them.", ge=1
    )
    max_uploads_per_client: int = option(
        "Limits",
        64,
        "The same of one API key; without keys, of one address (IPv6: a /64); then 429 to the slowest of them. Behind "
        "a proxy all clients have its address, unless --trusted-proxies names it.",
        ge=1,
    )
    max_bodies_bytes: int = option(
        "Limits",
        512 * MIB,
        "Bytes of all bodies and of what is fetched for them, until their media are decoded; then 503.",
        ge=1024,
    )
    request_timeout: float = option("Limits", 300.0, "Seconds for a whole request.", gt=0)

    # Keeping it up
    media_workers: int = option(
        "Processes",
        3,
        "Child processes that decode images. The last takes small ones only (with three or more: the last two).",
        ge=1,
        le=64,
    )
    video_workers: int = option(
        "Processes", 1, "Child processes that decode videos; 0: videos share those of images.", ge=0, le=64
    )
    spare_media_workers: int = option(
        "Processes", 1, "Warm child processes beside those, in place of any that died.", ge=0, le=64
    )
    media_timeout: float = option("Processes", 20.0, "Seconds for decoding one image or video.", gt=0)
    image_timeout: float = option(
        "Processes",
        8.0,
        "Seconds of processor time for the largest image allowed; smaller ones have less, down to an eighth.",
        gt=0,
    )
    media_queue_timeout: float = option(
        "Processes", 60.0, "Seconds that an image or video may wait to be decoded; then 503.", gt=0
    )
    fetch_timeout: float = option("Processes", 10.0, "Seconds for fetching one image or video by URL.", gt=0)
    media_memory_bytes: int = option("Processes", 1536 * MIB, "Address space of one decoding child.", ge=384 * MIB)
    shared_media_bytes: int = option(
        "Processes", 64 * MIB, "Memory for decoded media, shared with the workers; what finds no room is sent.", ge=0
    )
    load_timeout: float = option("Processes", 900.0, "Seconds for a worker to load its model.", gt=0)
    stall_timeout: float = option("Processes", 120.0, "Seconds of silence after which a busy worker is killed.", gt=0)
    max_worker_restarts: int = option(
        "Processes", 8, "Deaths in a row after which a worker is given up; with the last one the process ends.", ge=0
    )
    max_request_retries: int = option(
        "Processes", 2, "Times a request is taken up again after its worker died; the last time alone.", ge=0
    )
    drain_timeout: float = option("Processes", 30.0, "Seconds that running answers get at shutdown.", ge=0)
    engine: str = option(
        "Processes", "service.pool.worker:load_engine", "Engine factory, as module:callable.", hidden=True
    )

    @field_validator(
        *("api_key", "allowed_media_domains", "allowed_origins", "allowed_hosts", "trusted_proxies"), mode="before"
    )
    @classmethod
    def split_commas(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("api_key", "admin_key")
    @classmethod
    def keys_can_be_sent(cls, value: Any) -> Any:
        """In a header, by any client: what is not ASCII is encoded by each in its own way, if at all."""
        for key in value if isinstance(value, tuple) else [value] if value else []:
            text = key.get_secret_value()
            if not (text.isascii() and text.isprintable() and text == text.strip()):
                raise ValueError("a key must be of printable ASCII characters, with no space around it")
        return value

    @field_validator("device")
    @classmethod
    def device_is_known(cls, value: str) -> str:
        kind, _, indices = value.partition(":")
        if value not in ("auto", "cpu", "cuda") and not (
            kind == "cuda" and all(index.isdecimal() for index in indices.split(","))
        ):
            raise ValueError(f"{value!r} is none of auto, cpu, cuda, cuda:0,1")
        return value

    @model_validator(mode="after")
    def parts_agree(self) -> Self:
        if "," in self.device and self.workers != 1:
            raise ValueError("workers: with a list of devices there is one worker per device; leave workers out")
        if "," in self.device:
            every = [int(index) for index in self.device.partition(":")[2].split(",")]
            groups = [every[at : at + self.tensor_parallel] for at in range(0, len(every), self.tensor_parallel)]
            if any(group != list(range(group[0], group[0] + self.tensor_parallel)) for group in groups):
                raise ValueError(f"tensor_parallel: list the devices in groups of {self.tensor_parallel} side by side")
        if self.watch_draft is not None and self.draft is None:
            raise ValueError("watch_draft: there is no folder to look at; give --draft")
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
        """One set of engine options per worker."""
        kind, _, indices = self.device.partition(":")
        listed = indices.split(",")[:: self.tensor_parallel]  # of the others, the first knows
        devices = [f"{kind}:{index}" for index in listed] if indices else [self.device] * self.workers
        threads = self.threads or max(1, cores.available() // len(devices))
        shared = {name: getattr(self, name) for name in ENGINE_OPTIONS}
        options = [{**shared, "device": device, "threads": threads} for device in devices]
        return [{name: value for name, value in each.items() if value is not None} for each in options]


def holds_keys(variable: str) -> bool:
    """Say whether an environment variable is a setting with keys in it: nobody but the API process needs those."""
    field = Settings.model_fields.get(variable.lower().removeprefix("flash_"))
    return field is not None and "SecretStr" in str(field.annotation)


def complaints(error: ValidationError) -> list[str]:
    """What is wrong with settings: a line each, which names it as an option and as a variable."""
    return [_complaint(problem) for problem in error.errors()]


def _complaint(problem: Any) -> str:
    message = str(problem["msg"]).removeprefix("Value error, ")
    if not problem["loc"]:
        return message
    name = str(problem["loc"][0])
    return f"--{name.replace('_', '-')} (FLASH_{name.upper()}): {message}"
