"""Turns a request into the sequence that the engine schedules: prompt, limits, detokenizer. Knows no cache."""

from __future__ import annotations

from dataclasses import replace

from model.decoding.detokenize import Detokenizer, StopStrings, Vocabulary
from model.decoding.grammar import Grammars
from model.engine.sequence import Sequence
from model.request import Medium, Request, RequestError
from model.targets.base import Target
from model.targets.frames import fitting_frames
from model.targets.prompt import TokenizedPrompt, checked
from model.targets.raw_prompt import raw_prompt

CHARS_PER_TOKEN = 16  # texts with fewer are tokenised at once; hardly any has more on average


def prepare(
    request: Request, target: Target, vocabulary: Vocabulary, grammars: Grammars, max_model_len: int
) -> Sequence:
    """Tokenise a request's conversation and check it against the limits.

    max_model_len: limit of prompt and answer together, tokens. Raises RequestError if the request cannot be served.
    """
    for medium in (part for message in request.messages for part in message.content if isinstance(part, Medium)):
        if unknown_names := {name for name, _ in medium.options} - {*target.geometry.options(medium.kind)}:
            raise RequestError(
                f"this model's {medium.kind} processor does not take {min(unknown_names)}", code="unknown_option"
            )
    _check_beginning(request, target, max_model_len)
    prompt = tokenize(request, target)
    length, max_tokens = len(prompt.ids), request.params.max_tokens
    if request.clamp_max_tokens and 0 < (room := max_model_len - length) < max_tokens:
        max_tokens = room
        min_tokens = min(request.params.min_tokens, room)
        request = replace(request, params=replace(request.params, max_tokens=room, min_tokens=min_tokens))
    if length + max_tokens > max_model_len:
        hint = _frames_hint(request, target, max_tokens, max_model_len)
        raise _too_long(request, length, max_tokens, max_model_len, hint)
    if unknown := [token for token, _ in request.params.logit_bias if not 0 <= token < target.vocab_size]:
        raise RequestError(
            f"logit_bias names token {unknown[0]}; tokens are 0 to {target.vocab_size - 1}", param="logit_bias"
        )
    if unknown := [token for token in request.params.stop_token_ids if not 0 <= token < target.vocab_size]:
        raise RequestError(
            f"stop_token_ids names token {unknown[0]}; tokens are 0 to {target.vocab_size - 1}", param="stop_token_ids"
        )
    guide = None if request.params.grammar is None else grammars.begin(request.params.grammar)
    for medium in prompt.media:
        _ = medium.digest  # computed here, off the engine's thread, and cached for the encoder cache
    goes_on = request.prompt is not None or request.template.continue_final_message
    params, follows = request.params, prompt.ids if goes_on else ()
    if params.skip_special_tokens:
        detokenizer = Detokenizer(vocabulary, target.eos_ids, follows, params.shown_tokens)
    else:  # but not the token that ends the answer, as the stop string does not show
        ends = frozenset[int]() if params.include_stop else params.ends(target.eos_ids)
        detokenizer = Detokenizer(vocabulary, ends, follows, vocabulary.added)
    return Sequence(request, prompt, detokenizer, StopStrings(params.stop, include=params.include_stop), guide)


def _check_beginning(request: Request, target: Target, max_model_len: int) -> None:
    """Refuse a text that is much too long by its beginning: all of it takes up to seconds, in which no other request is
    prepared. Raises RequestError."""
    if request.template.max_tokens is not None or isinstance(request.prompt, tuple):
        return
    parts = (part for message in request.messages for part in message.content if isinstance(part, str))
    texts = list(parts) if request.prompt is None else [request.prompt]
    most = max_model_len * CHARS_PER_TOKEN
    if sum(map(len, texts)) <= most:
        return
    beginning = "\n".join(texts)[:most]
    beginning = checked(beginning, "messages" if request.prompt is None else "prompt")
    length = len(target.tokenizer(beginning, add_special_tokens=False).input_ids) - len(texts)
    if length >= max_model_len:
        raise _too_long(request, f"more than {length}", request.params.max_tokens, max_model_len)


def _too_long(request: Request, length: int | str, max_tokens: int, max_model_len: int, hint: str = "") -> RequestError:
    """Return the error for a prompt that does not fit. length: tokens; hint: what would fit."""
    is_short = isinstance(length, int) and length < max_model_len
    return RequestError(
        # Clients know the case by these words, up to "is".
        f"the prompt is too long: this model's maximum context length is {max_model_len} tokens, the "
        f"prompt takes {length} and max_tokens is {max_tokens}; send fewer or shorter media, a shorter prompt, "
        f"or a smaller max_tokens{hint}",
        param="max_tokens" if is_short else "messages" if request.prompt is None else "prompt",
        code="context_length_exceeded",
    )


def tokenize(request: Request, target: Target) -> TokenizedPrompt:
    """Tokenise a request's conversation, or the raw prompt in place of one. Raises RequestError."""
    template = request.template
    if request.prompt is None:
        prompt = target.prompt(request.messages, template)
    else:
        prompt = raw_prompt(request.prompt, target, add_special_tokens=template.add_special_tokens)
    if template.max_tokens is None or len(prompt.ids) <= template.max_tokens:
        return prompt
    if prompt.media:
        raise RequestError(
            f"truncate_prompt_tokens: the prompt has {len(prompt.ids)} tokens, and one with images or videos cannot be "
            "cut",
            param="truncate_prompt_tokens",
        )
    return TokenizedPrompt(prompt.ids[-template.max_tokens :], (), ())


def _frames_hint(request: Request, target: Target, max_tokens: int, max_model_len: int) -> str:
    """Suggest the number of frames that would fit, for a request whose videos make the prompt too long; otherwise
    ""."""
    answer = min(max_tokens, max_model_len // 4) if request.clamp_max_tokens else max_tokens
    fitting = fitting_frames(target, request.messages, max_model_len - answer)
    return f"; with num_frames {fitting} it would fit" if fitting else ""
