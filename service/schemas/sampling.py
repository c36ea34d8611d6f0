"""The sampling fields that both POST routes share, and their limits."""

from __future__ import annotations

import hashlib
import re
import secrets
from typing import Annotated, Any, Literal

import msgspec

from model.request import EngineInfo, RequestError, SamplingParams
from service.errors import BadRequest, UnknownModel
from service.media.sniff import Kind
from service.schemas import media_options, structured
from service.schemas.media_options import ImageFields, MediaOptions
from service.schemas.structured import StructuredFields
from service.settings import Settings

SEED_MASK = 2**63 - 1  # maps seeds to non-negative signed 64-bit integers

TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**31)]
Penalty = Annotated[float, msgspec.Meta(ge=-2.0, le=2.0)]
LEAST_TOP_P = 1e-9  # a nucleus of the likeliest token alone: in any vocabulary it is likelier than this
MAX_BIAS = 100.0
MAX_NAMED = 8  # invalid keys that an error lists
TOKEN_ID = re.compile(r"(?:0|[1-9][0-9]{0,17})\Z")
# By field, the values that ask for nothing; others are refused. vLLM's, then SGLang's.
NOT_BUILT: dict[str, tuple[Any, ...]] = {
    "use_beam_search": (False,),
    "prompt_logprobs": (False,),
    "logprob_token_ids": ([],),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "thinking_token_budget": (),
    "watermarking": (False,),
    "repetition_detection": (),
    "logits_processors": ([],),
    "return_token_offsets": (False,),
    "return_prompt_text": (False,),
    "stop_regex": ("", []),
    "no_stop_trim": (False,),
    "lora_path": ("",),
    "custom_logit_processor": ("",),
}


class SamplingFields(StructuredFields, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Fields of a request body; None means the default."""

    model: str | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] | None = None  # 0: only the likeliest token
    top_k: Annotated[int, msgspec.Meta(ge=-1, le=2**31)] | None = None  # 0 and -1: no limit
    min_p: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] | None = None
    seed: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[TokenId] | None = None
    n: Annotated[int, msgspec.Meta(ge=1)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, msgspec.Meta(ge=0)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0.0, le=100.0)] | None = None
    logit_bias: dict[str, Any] | None = None  # checked by _logit_bias, so that errors name the key
    logprobs: bool | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0)] | None = None
    stream: bool | None = None
    include_stop_str_in_output: bool | None = None  # vLLM's, as is the next
    skip_special_tokens: bool | None = None  # None: true
    cache_salt: Annotated[str, msgspec.Meta(max_length=1024)] | None = None  # parts the caches, as vLLM's
    speculation: Literal["auto", "off"] | None = None  # None: auto

    def requested_max_tokens(self) -> int | None:
        """The maximum number of tokens that the client set, if any."""
        return self.max_tokens

    def requested_logprobs(self) -> int | None:
        """The number of likeliest tokens to report with each token; None: no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # vLLM's: usage so far, in every chunk
    include_obfuscation: bool | None = None


class EngineFields(SamplingFields, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Fields that chats and raw prompts have in common."""

    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None  # vLLM's, as are the next ones
    return_tokens_as_token_ids: bool | None = None
    truncate_prompt_tokens: Annotated[int, msgspec.Meta(ge=-1)] | None = None  # keep the last ones; -1: what fits

    use_beam_search: Any = None
    prompt_logprobs: Any = None
    logprob_token_ids: Any = None
    allowed_token_ids: Any = None
    bad_words: Any = None
    thinking_token_budget: Any = None
    watermarking: Any = None
    repetition_detection: Any = None
    logits_processors: Any = None
    return_token_offsets: Any = None
    return_prompt_text: Any = None
    stop_regex: Any = None
    no_stop_trim: Any = None
    lora_path: Any = None
    custom_logit_processor: Any = None

    def with_usage(self) -> tuple[bool, bool]:
        """Return whether a stream tells the usage at its end, and whether it does in every chunk."""
        options = self.stream_options or StreamOptions()
        return bool(options.include_usage), bool(options.include_usage and options.continuous_usage_stats)


def refuse_not_built(struct: msgspec.Struct, fields: dict[str, tuple[Any, ...]], prefix: str = "") -> None:
    """Raise BadRequest for a field with a value that is not one of those that mean "none"."""
    for name, harmless in fields.items():
        value = getattr(struct, name)
        if value is not None and not any(value == each and type(value) is type(each) for each in harmless):
            raise not_built(f"{prefix}{name}", "leave it out")


def not_built(param: str, instead: str, value: str = "") -> BadRequest:
    """Return the error for what this service does not do. instead: what to do."""
    return BadRequest(f"{param}{value} is not supported yet; {instead}", param=param, code="not_built")


def max_prompt_tokens(fields: EngineFields, info: EngineInfo | None, max_tokens: int) -> int | None:
    """Return how many of the prompt's tokens are kept, the last ones; None for all. Raises BadRequest."""
    number = fields.truncate_prompt_tokens
    if number == 0:
        raise BadRequest("truncate_prompt_tokens must be at least 1, or -1", param="truncate_prompt_tokens")
    if number == -1:
        return None if info is None else max(1, info.max_model_len - max_tokens)
    return number


def check_model(name: str | None, settings: Settings) -> None:
    """Raise UnknownModel for a name other than the served model's."""
    if name is not None and name != settings.model_name:
        raise unknown_model(name, settings)


def unknown_model(name: str, settings: Settings) -> UnknownModel:
    return UnknownModel(
        f"the model {name[:128]!r} is not served here; send {settings.model_name!r} or leave model out", param="model"
    )


def check_prompt_chars(number: int, settings: Settings, *, param: str) -> None:
    """Raise BadRequest for too long a prompt."""
    if number > settings.max_prompt_chars:
        raise BadRequest(
            f"the prompt is too long: it has {number} characters; at most {settings.max_prompt_chars} are allowed",
            param=param,
            code="prompt_too_long",
        )


def max_frames(settings: Settings, info: EngineInfo) -> int:
    """Return the frames of one video that the settings allow and the model's context has room for."""
    return min(settings.max_frames, info.max_frames)


def check_media_options(
    fields: ImageFields, settings: Settings, info: EngineInfo | None, *, kind: Kind | None = None, path: str = ""
) -> MediaOptions:
    """Return the options for media that a request or part sets. info: None before it is known; path: of the part.

    Raises BadRequest for options that the model's processors do not take, for this kind of medium or for any (None),
    and for more frames than are allowed or fit the model's context.
    """
    options = media_options.read(fields, path)
    if info is None:
        return options
    media_options.check_known(options, info.geometry, ("image", "video") if kind is None else (kind,))
    if options.num_frames is None or options.num_frames <= max_frames(settings, info):
        return options
    param = options.param("num_frames")
    if settings.max_frames <= info.max_frames:
        raise BadRequest(f"num_frames must be at most {settings.max_frames}", param=param)
    raise BadRequest(
        f"num_frames: at most {info.max_frames} frames fit this model's context of {info.max_model_len} tokens",
        param=param,
    )


def sampling_params(fields: SamplingFields, settings: Settings, *, default_temperature: float) -> SamplingParams:
    """Convert to the engine's type, for the first choice. Without a seed a random one is drawn."""
    max_tokens = fields.requested_max_tokens() or max(settings.default_max_tokens, fields.min_tokens or 0)
    if max_tokens > settings.max_new_tokens:
        raise BadRequest(f"max_tokens must be at most {settings.max_new_tokens}", param="max_tokens")
    if (fields.min_tokens or 0) > max_tokens:
        raise BadRequest(f"min_tokens must be at most max_tokens, {max_tokens}", param="min_tokens")
    try:
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=default_temperature if fields.temperature is None else fields.temperature,
            top_p=1.0 if fields.top_p is None else max(fields.top_p, LEAST_TOP_P),
            top_k=max(0, fields.top_k or 0),
            min_p=fields.min_p or 0.0,
            seed=(secrets.randbits(63) if fields.seed is None else fields.seed) & SEED_MASK,
            stop=_stop_strings(fields.stop, settings),
            ignore_eos=bool(fields.ignore_eos),
            min_tokens=fields.min_tokens or 0,
            presence_penalty=fields.presence_penalty or 0.0,
            frequency_penalty=fields.frequency_penalty or 0.0,
            repetition_penalty=1.0 if fields.repetition_penalty is None else fields.repetition_penalty,
            logit_bias=_logit_bias(fields.logit_bias or {}, settings),
            logprobs=_logprobs(fields, settings),
            include_stop=bool(fields.include_stop_str_in_output),
            skip_special_tokens=fields.skip_special_tokens is not False,
            stop_token_ids=_stop_token_ids(fields.stop_token_ids or [], settings),
            grammar=structured.grammar(fields, settings),
        )
    except RequestError as error:
        raise BadRequest(error.message, param=error.param, code=error.code) from None


def seed_of_choice(seed: int, choice: int) -> int:
    """Return a choice's seed: choice 0 has the request's own, so that `n` does not change it; others a derived one."""
    if choice == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/{choice}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") & SEED_MASK


def _stop_strings(stop: str | list[str] | None, settings: Settings) -> tuple[str, ...]:
    """Validate `stop`."""
    strings = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(strings) > settings.max_stop:
        raise BadRequest(f"at most {settings.max_stop} stop strings are allowed", param="stop")
    if any(not 0 < len(string) <= settings.max_stop_chars for string in strings):
        raise BadRequest(f"a stop string must have 1 to {settings.max_stop_chars} characters", param="stop")
    return strings


def _stop_token_ids(ids: list[int], settings: Settings) -> tuple[int, ...]:
    if len(ids) > settings.max_stop_token_ids:
        most = settings.max_stop_token_ids
        raise BadRequest(f"at most {most} stop_token_ids are allowed", param="stop_token_ids")
    return tuple(dict.fromkeys(ids))


def _logit_bias(bias: dict[str, Any], settings: Settings) -> tuple[tuple[int, float], ...]:
    """Validate `logit_bias`; its keys are token ids as text."""
    if len(bias) > settings.max_logit_bias:
        raise BadRequest(f"logit_bias may name at most {settings.max_logit_bias} tokens", param="logit_bias")
    if unknown := [key for key in bias if not TOKEN_ID.match(key)]:
        problem = "is not a token id" if len(unknown) == 1 else "are not token ids"
        raise BadRequest(f"logit_bias: {_list(unknown)} {problem}; keys are numbers such as '15'", param="logit_bias")
    wrong = [key for key, value in bias.items() if not (_is_number(value) and abs(value) <= MAX_BIAS)]
    if wrong:
        bounds = f"{-MAX_BIAS:g} to {MAX_BIAS:g}"
        raise BadRequest(
            f"logit_bias: a bias is a number from {bounds}; that of {_list(wrong)} is not", param="logit_bias"
        )
    return tuple((int(key), float(value)) for key, value in bias.items())


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _list(keys: list[str]) -> str:
    """List keys as they were sent, the first few of many."""
    more = f" and {len(keys) - MAX_NAMED} more" if len(keys) > MAX_NAMED else ""
    return ", ".join(repr(key[:64]) for key in keys[:MAX_NAMED]) + more


def _logprobs(fields: SamplingFields, settings: Settings) -> int | None:
    """Validate `logprobs` and `top_logprobs`; return how many likeliest tokens to report, or None."""
    top = fields.top_logprobs or 0
    if top > settings.max_top_logprobs:
        raise BadRequest(f"top_logprobs must be at most {settings.max_top_logprobs}", param="top_logprobs")
    if top and not fields.logprobs:
        raise BadRequest("top_logprobs needs logprobs; set logprobs too", param="top_logprobs")
    return fields.requested_logprobs()
