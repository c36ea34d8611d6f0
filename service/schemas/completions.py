"""The request of POST /v1/completions, and its checks: a raw prompt, without media or a chat template."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from service.errors import BadRequest
from service.schemas import media_options, sampling
from service.schemas.sampling import EngineFields, TokenId
from service.settings import Settings

DEFAULT_MAX_TOKENS = 16  # as OpenAI's
# Refused unless the value means "none".
NOT_BUILT: dict[str, tuple[Any, ...]] = {"suffix": ("",), "prompt_embeds": (), **sampling.NOT_BUILT}

Prompt = str | tuple[int, ...]


class CompletionRequest(EngineFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/completions."""

    prompt: str | list[str | TokenId | list[TokenId]]  # one or several texts, or one or several lists of token ids
    echo: bool | None = None
    best_of: Annotated[int, msgspec.Meta(ge=1)] | None = None
    logprobs: Annotated[int, msgspec.Meta(ge=0)] | None = None  # type: ignore[assignment]  # chat: a boolean
    add_special_tokens: bool | None = None  # vLLM's; None: true

    suffix: Any = None
    prompt_embeds: Any = None

    user: Any = None

    def requested_max_tokens(self) -> int | None:
        return max(DEFAULT_MAX_TOKENS, self.min_tokens or 0) if self.max_tokens is None else self.max_tokens

    def requested_logprobs(self) -> int | None:
        return self.logprobs


def prompts(request: CompletionRequest, settings: Settings) -> tuple[Prompt, ...]:
    """Return the prompts of a request. Raises BadRequest for one that is none, or is too long, and for too many."""
    sent = request.prompt
    if isinstance(sent, str):
        found: tuple[Prompt, ...] = (sent,)
    elif sent and all(isinstance(each, str) for each in sent):
        found = tuple(each for each in sent if isinstance(each, str))
    elif sent and all(isinstance(each, int) for each in sent):
        found = (tuple(each for each in sent if isinstance(each, int)),)
    elif sent and all(isinstance(each, list) for each in sent):
        found = tuple(tuple(each) for each in sent if isinstance(each, list))
    elif sent:
        raise BadRequest(
            "prompt is a text, a list of texts, a list of token ids or a list of lists of them; this list is mixed",
            param="prompt",
        )
    else:
        raise BadRequest("prompt is an empty list", param="prompt")
    if () in found:
        raise BadRequest("prompt has an empty list of token ids", param="prompt")
    if len(found) > settings.max_prompts:
        raise BadRequest(f"{len(found)} prompts; at most {settings.max_prompts} are allowed", param="prompt")
    sampling.check_prompt_chars(sum(len(each) for each in found if isinstance(each, str)), settings, param="prompt")
    return found


def check(request: CompletionRequest, settings: Settings) -> None:
    """Raise BadRequest for whatever is invalid beside the prompt."""
    sampling.check_model(request.model, settings)
    sampling.refuse_not_built(request, NOT_BUILT)
    if request.best_of not in (None, request.n or 1):
        raise BadRequest(f"best_of must be equal to n, {request.n or 1}, or left out", param="best_of")
    if request.stream_options is not None and not request.stream:
        raise BadRequest("stream_options is for streams; set stream", param="stream_options")
    if request.top_logprobs is not None:
        raise BadRequest("top_logprobs is for chats; here logprobs is their number", param="top_logprobs")
    if (request.logprobs or 0) > settings.max_top_logprobs:
        raise BadRequest(f"logprobs must be at most {settings.max_top_logprobs}", param="logprobs")
    if request.echo and request.logprobs is not None:
        raise BadRequest(
            "echo together with logprobs is not supported: the prompt has no log-probabilities; leave one out",
            param="echo",
            code="not_built",
        )
    options = media_options.read(request)
    for name in ("num_frames", "fps", *options.values):
        if name in options.values or getattr(options, name) is not None:
            raise BadRequest(
                f"{options.param(name)} is for images and videos; send those to /v1/chat/completions",
                param=options.param(name),
            )
