"""Turns a conversation into token ids, by the checkpoint's own chat template. Knows no model family and no tensors.

User text is never more than text: the template is rendered around stand-ins for the texts, and replacing them must not
create special tokens. Tokens that the tokenizer adds by itself (BOS, for most) surround the whole prompt once, as in
transformers' `processor.apply_chat_template`, unless the template already begins with BOS.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from model.request import Medium, Message, RequestError

Turns = list[dict[str, Any]]
STAND_IN = re.compile("\ue000(\\d+)\ue001")


@dataclass(frozen=True)
class TokenizedPrompt:
    """A tokenised conversation.

    spans[i]: the half-open range of `ids` that media[i] takes, from its first visual token to its last; media: those of
    the conversation, but LLaVA's video with text between its frames is split into several; visual[i]: the positions of
    the visual tokens of media[i], ascending, or () if they are all of its span; blocks: ranges whose tokens see each
    other in both directions, so that no pass may end within one; outside: positions in these ranges that do not.
    """

    ids: list[int]
    media: tuple[Medium, ...]
    spans: tuple[tuple[int, int], ...]
    visual: tuple[np.ndarray, ...] = ()
    blocks: tuple[tuple[int, int], ...] = ()
    outside: np.ndarray | None = None

    def visual_tokens(self, index: int) -> np.ndarray:
        """Return the positions of the visual tokens of a medium, ascending."""
        return self.visual[index] if self.visual else np.arange(*self.spans[index])

    def cut(self, start: int, end: int) -> int:
        """Return where a pass that begins at `start` ends: at `end`, or before a block that `end` would cut, or behind
        it if it begins at `start`."""
        for first, last in self.blocks:
            if first < end < last:
                return first if first > start else last
        return min(end, len(self.ids))

    def cut_before(self, length: int) -> int:
        """Return the largest number of tokens, at most `length`, that ends within no block."""
        return next((first for first, last in self.blocks if first < length < last), length)

    def block_numbers(self, start: int, end: int) -> np.ndarray | None:
        """Number the blocks of positions start..end: (positions,) int32, -1 outside of all; None if there is none."""
        numbers = np.full(end - start, -1, np.int32)
        for number, (first, last) in enumerate(self.blocks):
            if first < end and last > start:
                numbers[max(first, start) - start : last - start] = number
        if self.outside is not None:
            numbers[self.outside[(self.outside >= start) & (self.outside < end)] - start] = -1
        return numbers if (numbers >= 0).any() else None


@dataclass(frozen=True)
class Place:
    """One placeholder in the template's text: its token, and the number of tokens that replace it."""

    token: int
    width: int


class Conversations:
    """Renders and tokenises conversations for one checkpoint."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        render: Callable[[Turns], str],
        parts: Callable[[Medium], list[dict[str, str]]],
    ) -> None:
        """Set up for a tokenizer. render: applies the chat template, with a prompt for the answer; parts: returns the
        template's parts for a medium."""
        self._tokenizer, self._render, self._parts = tokenizer, render, parts
        # User text must not be read as these. The whole string may only be tokenised at once if no text contains one.
        specials = sorted(tokenizer.added_tokens_encoder, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, specials))) if specials else None
        self._before, self._behind = _added_tokens(tokenizer)

    def ids(self, messages: Sequence[Message], fill: Callable[[str], str] = str) -> list[int]:
        """Return the token ids, with each medium as its placeholders. Raises RequestError if the template refuses.

        fill: replaces placeholders in the rendered template, which holds no text of the user yet.
        """
        texts: list[str] = []
        turns: Turns = []
        for message in messages:
            parts: list[dict[str, str]] = []
            for part in message.content:
                if isinstance(part, Medium):
                    parts += self._parts(part)
                else:
                    # White space around a text stays in the template, since some templates strip it.
                    text = checked(part)
                    before, core, behind = (
                        text[: len(text) - len(text.lstrip())],
                        text.strip(),
                        text[len(text.rstrip()) :],
                    )
                    parts.append(
                        {"type": "text", "text": f"{before}\ue000{len(texts)}\ue001{behind}" if core else text}
                    )
                    texts += [core] * bool(core)
            turns.append({"role": message.role, "content": parts})
        try:
            rendered = self._render(turns)
        except Exception as error:  # a template may raise any error
            raise RequestError(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from error
        ids = self._tokenised(fill(rendered), texts)
        bos = self._tokenizer.bos_token
        # `rendered` has no user text, so a text that begins with the characters of BOS does not count as BOS.
        return ids if bos is not None and rendered.startswith(bos) else [*self._before, *ids, *self._behind]

    def _tokenised(self, rendered: str, texts: list[str]) -> list[int]:
        """Fill the texts into the rendered template and tokenise. If a text contains a special token, texts are
        tokenised one by one, so that it is split."""
        filled = STAND_IN.sub(lambda match: texts[int(match[1])], rendered)
        # Count in the whole string: two adjacent texts may also spell a special token together.
        if self._special is None or len(self._special.findall(filled)) == len(self._special.findall(rendered)):
            return list(self._tokenizer(filled, add_special_tokens=False).input_ids)
        ids: list[int] = []
        for number, piece in enumerate(STAND_IN.split(rendered)):  # odd pieces are the numbers of texts
            text = texts[int(piece)] if number % 2 else piece
            ids += self._tokenizer(text, add_special_tokens=False, split_special_tokens=bool(number % 2)).input_ids
        return ids


def media_of(messages: Sequence[Message]) -> tuple[Medium, ...]:
    """Return all media in order. Raises RequestError for one without frames: it would have no placeholder, and all
    later media would get the wrong one."""
    media = tuple(part for message in messages for part in message.content if isinstance(part, Medium))
    for medium in media:
        if not len(medium.frames):
            raise RequestError(f"a {medium.kind} has no frames", param="messages")
    return media


def widened(
    ids: list[int], media: tuple[Medium, ...], places: Sequence[Sequence[Place]], placeholders: frozenset[int]
) -> TokenizedPrompt:
    """Replace every placeholder by as many tokens as its medium takes.

    places[i]: the placeholders of media[i], in order; placeholders: all tokens that are placeholders. A video with text
    between its frames, as LLaVA-1.5's template writes it, becomes several media. Raises RequestError if the template
    has not written these placeholders in this order.
    """
    expected = [(index, place) for index, each in enumerate(places) for place in each]
    if [token for token in ids if token in placeholders] != [place.token for _, place in expected]:
        raise RequestError("the model's chat template has no place for these media", param="messages")
    widths = iter(expected)
    wide: list[int] = []
    begins: list[list[int]] = [[] for _ in media]  # starts of each medium's placeholders
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
        parts += [medium] if len(cuts) == 2 else [medium.frames_between(i, j) for i, j in pairwise(cuts)]
    return TokenizedPrompt(wide, tuple(parts), tuple(spans))


def _added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Find the tokens that the tokenizer adds before and after a text by itself."""
    bare, whole = (list(tokenizer("a", add_special_tokens=adding).input_ids) for adding in (False, True))
    begin = next(at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
    return whole[:begin], whole[begin + len(bare) :]


def checked(text: str, param: str = "messages") -> str:
    """Return the text. Raises RequestError if it has half of a surrogate pair."""
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise RequestError("a text holds half of a surrogate pair, which is no character", param=param)
    return text
