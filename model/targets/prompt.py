"""From a conversation to token ids, by the checkpoint's own chat template. Knows no model family and no tensors.

What a user types is never more than text: the template is rendered around stand-ins for the texts, and no special token
may come into being by filling them in. What the tokenizer adds by itself (BOS, for most) stands once around the whole,
where transformers' `processor.apply_chat_template` has it: unless the template has begun with BOS already.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

from model.request import Medium, Message, RequestError

Turns = list[dict[str, Any]]
STAND_IN = re.compile("\ue000(\\d+)\ue001")


@dataclass(frozen=True)
class TokenizedPrompt:
    """A tokenised conversation. `spans[i]` is the half-open range of `ids` that media[i] takes: visual tokens and
    nothing else. media are the conversation's; a video with text between its frames is several."""

    ids: list[int]
    media: tuple[Medium, ...]
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Place:
    """One placeholder in the template's text: its token, and how many tokens are to stand there instead."""

    token: int
    width: int


class Conversations:
    """One checkpoint's way to write a conversation."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        render: Callable[[Turns], str],
        parts: Callable[[Medium], list[dict[str, str]]],
    ) -> None:
        """`render`: the chat template, with a prompt for the answer; `parts`: what stands for a medium in a turn."""
        self._tokenizer, self._render, self._parts = tokenizer, render, parts
        # User text must not be read as these; whole-string tokenising is only safe where none occurs in it.
        specials = sorted(tokenizer.added_tokens_encoder, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, specials))) if specials else None
        self._before, self._behind = _added_tokens(tokenizer)

    def ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids, every medium as its placeholders. Raises RequestError."""
        texts: list[str] = []
        turns: Turns = []
        for message in messages:
            parts: list[dict[str, str]] = []
            for part in message.content:
                if isinstance(part, Medium):
                    parts += self._parts(part)
                else:
                    parts.append({"type": "text", "text": f"\ue000{len(texts)}\ue001"})
                    texts.append(_checked(part))
            turns.append({"role": message.role, "content": parts})
        try:
            rendered = self._render(turns)
        except Exception as error:  # jinja raises what the template's author chose
            raise RequestError(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from error
        ids = self._tokenised(rendered, texts)
        bos = self._tokenizer.bos_token
        # `rendered` has no user's text: one that begins with the characters of BOS does not count as it.
        return ids if bos is not None and rendered.startswith(bos) else [*self._before, *ids, *self._behind]

    def _tokenised(self, rendered: str, texts: list[str]) -> list[int]:
        filled = STAND_IN.sub(lambda match: texts[int(match[1])], rendered)
        # Counted in the whole: a special token may also be spelt across two texts that stand side by side.
        if self._special is None or len(self._special.findall(filled)) == len(self._special.findall(rendered)):
            return list(self._tokenizer(filled, add_special_tokens=False).input_ids)
        ids: list[int] = []
        for number, piece in enumerate(STAND_IN.split(rendered)):  # odd pieces are the numbers of texts
            text = texts[int(piece)] if number % 2 else piece
            ids += self._tokenizer(text, add_special_tokens=False, split_special_tokens=bool(number % 2)).input_ids
        return ids


def media_of(messages: Sequence[Message]) -> tuple[Medium, ...]:
    """All media in order. Raises RequestError for one without frames: it would have no placeholder, and every later one
    would be taken for it."""
    media = tuple(part for message in messages for part in message.content if isinstance(part, Medium))
    for medium in media:
        if not len(medium.frames):
            raise RequestError(f"a {medium.kind} has no frames", param="messages")
    return media


def widened(
    ids: list[int], media: tuple[Medium, ...], places: Sequence[Sequence[Place]], placeholders: frozenset[int]
) -> TokenizedPrompt:
    """Make every placeholder as wide as what stands there. `places[i]`: those of media[i], in order; `placeholders`:
    all tokens that are one. A video with text between its frames, as LLaVA-1.5's template writes it, becomes several.
    Raises RequestError where the template has not written them so."""
    expected = [(index, place) for index, each in enumerate(places) for place in each]
    if [token for token in ids if token in placeholders] != [place.token for _, place in expected]:
        raise RequestError("the model's chat template has no place for these media", param="messages")
    widths = iter(expected)
    wide: list[int] = []
    begins: list[list[int]] = [[] for _ in media]  # of each medium's placeholders
    for token in ids:
        if token not in placeholders:
            wide.append(token)
            continue
        index, place = next(widths)
        begins[index].append(len(wide))
        wide += [token] * place.width
    parts: list[Medium] = []
    spans: list[tuple[int, int]] = []
    for medium, starts, each in zip(media, begins, places, strict=True):
        ends = [start + place.width for start, place in zip(starts, each, strict=True)]
        cuts = [0, *(i for i in range(1, len(each)) if ends[i - 1] != starts[i]), len(each)]
        spans += [(starts[i], ends[j - 1]) for i, j in pairwise(cuts)]
        parts += [medium] if len(cuts) == 2 else [replace(medium, frames=medium.frames[i:j]) for i, j in pairwise(cuts)]
    return TokenizedPrompt(wide, tuple(parts), tuple(spans))


def _added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Find what the tokenizer adds by itself before and behind a text."""
    bare, whole = (list(tokenizer("a", add_special_tokens=adding).input_ids) for adding in (False, True))
    begin = next(at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
    return whole[:begin], whole[begin + len(bare) :]


def _checked(text: str) -> str:
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise RequestError("a text holds half of a surrogate pair, which is no character", param="messages")
    return text
