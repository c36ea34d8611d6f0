"""Turns a conversation into token ids, by the checkpoint's own chat template. Knows no model family and no tensors.

User text is never more than text: the template is rendered around stand-ins for the texts, and replacing them must not
create special tokens. Tokens that the tokenizer adds by itself (BOS, for most) surround the whole prompt once, as in
transformers' `processor.apply_chat_template`, unless the template already begins with BOS.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from model.request import Medium, Message, RequestError, TemplateOptions, ToolCall
from model.targets.chat_template import ChatTemplate
from model.targets.described_tools import Markup, with_described_tools

PLAIN = TemplateOptions()
# The number of a text, and a quote that shows how often the template writes JSON around it.
STAND_IN = re.compile('\ue000(\\d+)(\\\\*)"\ue001')
SHORT_ID = re.compile(r"[A-Za-z0-9]{9}\Z")


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
        template: ChatTemplate,
        parts: Callable[[Medium], list[dict[str, str]]],
    ) -> None:
        """Set up for a tokenizer. parts: returns the template's parts for a medium."""
        self.template = template
        self._tokenizer, self._parts = tokenizer, parts
        # User text must not be read as these. The whole string may only be tokenised at once if no text contains one.
        specials = sorted(tokenizer.added_tokens_encoder, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, specials))) if specials else None
        self._hazards = Hazards(specials)
        self._before, self._behind = _added_tokens(tokenizer)

    def ids(
        self,
        messages: Sequence[Message],
        options: TemplateOptions = PLAIN,
        fill: Callable[[str], str] = str,
    ) -> list[int]:
        """Return the token ids, with each medium as its placeholders. Raises RequestError if the template refuses.

        fill: replaces placeholders in the rendered template, which holds no text of the user yet.
        """
        rendered, texts = self._rendered(messages, options)
        ids = self._tokenised(fill(rendered), texts)
        bos = self._tokenizer.bos_token
        # `rendered` has no user text, so a text that begins with the characters of BOS does not count as BOS.
        return ids if bos is not None and rendered.startswith(bos) else [*self._before, *ids, *self._behind]

    def _rendered(self, messages: Sequence[Message], options: TemplateOptions) -> tuple[str, list[str]]:
        """Apply the template to stand-ins for the user's texts; return the texts, too."""
        template, texts = self.template, _Texts(self._hazards)
        tools = json.loads(options.tools) if options.tools else []
        if not template.knows_tools:
            messages, tools = with_described_tools(messages, tools, takes_system=template.takes_system), []
        names = {call.id: call.name for message in messages for call in message.tool_calls}
        try:
            turns = [self._turn(message, names, texts) for message in messages]
            last = len(texts.all) - 1
            tools = texts.guarded(tools)
            variables = texts.guarded(json.loads(options.variables) if options.variables else {})
        except RecursionError:
            raise RequestError("a call, a tool or a variable is nested too deeply", param="messages") from None
        try:
            rendered = template.render(
                turns,
                tools=tools,
                variables=variables,
                add_generation_prompt=options.add_generation_prompt and not options.continue_final_message,
            )
        except Exception as error:  # a template may raise any error
            raise RequestError(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from error
        if options.continue_final_message:
            rendered = self._continued(rendered, messages[-1], last)
        return rendered, texts.all

    def _turn(self, message: Message, names: Mapping[str, str], texts: _Texts) -> dict[str, Any]:
        """Return a message as the template takes it. names: of the tools that were called, by id."""
        template = self.template
        turn: dict[str, Any] = {"role": message.role}
        if message.role == "assistant" and message.reasoning is None:
            message = self._with_reasoning(message)
        if message.reasoning is not None:
            turn["reasoning_content"] = texts.stand_in(message.reasoning)
        if message.tool_calls:
            turn["tool_calls"] = [self._call(call, texts) for call in message.tool_calls]
        if message.tool_call_id is not None:
            turn["tool_call_id"] = self._call_id(message.tool_call_id, texts)
        if name := message.name or (names.get(message.tool_call_id or "") if message.role == "tool" else None):
            turn["name"] = texts.guarded(name)
        parts: list[dict[str, str]] = []
        joined = any(isinstance(part, Markup) for part in message.content)  # a template may strip each part
        for part in message.content:
            if isinstance(part, Medium):
                parts += self._parts(part)
                continue
            text = str(part) if isinstance(part, Markup) else texts.stand_in(part)
            if joined and parts and parts[-1]["type"] == "text":
                parts[-1]["text"] += text
            else:
                parts.append({"type": "text", "text": text})
        as_text = message.role in template.text_roles and all(part["type"] == "text" for part in parts)
        turn["content"] = "".join(part["text"] for part in parts) if as_text else parts
        return turn

    def _with_reasoning(self, message: Message) -> Message:
        """Return an answer with its reasoning apart, where it stands between marks before the content. Templates look
        for the marks, and see none in a stand-in."""
        markers = self.template.markers
        text = message.content[0] if message.content else None
        if markers is None or not isinstance(text, str) or "reasoning_content" not in self.template.source:
            return message
        begin, end = markers
        before, _, rest = text.partition(end)
        if not rest.strip() or not before.lstrip().startswith(begin):
            return message
        thought = before.lstrip().removeprefix(begin).strip()
        return replace(message, content=(rest.lstrip(), *message.content[1:]), reasoning=thought)

    def _call(self, call: ToolCall, texts: _Texts) -> dict[str, Any]:
        """Return a call as the template takes it."""
        try:
            arguments: Any = json.loads(call.arguments)
        except ValueError:
            raise RequestError(f"the arguments of the call {call.id!r} are not JSON", param="messages") from None
        arguments = texts.stand_in(call.arguments) if self.template.text_arguments else texts.guarded(arguments)
        function = {"name": texts.guarded(call.name), "arguments": arguments}
        return {"id": self._call_id(call.id, texts), "type": "function", "function": function}

    def _call_id(self, id: str, texts: _Texts) -> str:
        """Return the id of a call, or one derived from it where the template takes only short ones."""
        if self.template.short_ids and not SHORT_ID.match(id):
            return hashlib.sha256(id.encode(errors="replace")).hexdigest()[:9]
        return str(texts.guarded(id))

    @staticmethod
    def _continued(rendered: str, message: Message, last: int) -> str:
        """Cut a rendered conversation behind the text of its last message. Raises RequestError if it has none."""
        text = message.content[-1] if message.content else None
        ends = [found.end() for found in STAND_IN.finditer(rendered) if int(found[1]) == last]
        if not isinstance(text, str) or not text.strip() or not ends:
            raise RequestError(
                "continue_final_message: the last message does not end with a text that the chat template writes",
                param="continue_final_message",
            )
        blank = text[len(text.rstrip()) :]  # the template may have stripped it
        return rendered[: ends[-1]] + (blank if rendered.startswith(blank, ends[-1]) else "")

    def _tokenised(self, rendered: str, texts: list[str]) -> list[int]:
        """Fill the texts into the rendered template and tokenise. If a text contains a special token, texts are
        tokenised one by one, so that it is split."""
        filled = STAND_IN.sub(lambda match: _written(texts[int(match[1])], match[2]), rendered)
        # Count in the whole string: two adjacent texts may also spell a special token together.
        if self._special is None or len(self._special.findall(filled)) == len(self._special.findall(rendered)):
            return list(self._tokenizer(filled, add_special_tokens=False).input_ids)
        ids: list[int] = []
        at = 0
        for match in STAND_IN.finditer(rendered):
            ids += self._tokenizer(rendered[at : match.start()], add_special_tokens=False).input_ids
            text = _written(texts[int(match[1])], match[2])
            ids += self._tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
            at = match.end()
        return ids + list(self._tokenizer(rendered[at:], add_special_tokens=False).input_ids)


class _Texts:
    """The user's texts of one conversation, and the stand-ins that the template gets for them."""

    def __init__(self, hazards: Hazards) -> None:
        self.all: list[str] = []
        self._hazards = hazards

    def stand_in(self, text: str) -> str:
        """Return the stand-in for a text. White space around it stays in the template, since some templates strip
        it."""
        core = checked(text).strip()
        if not core:
            return text
        start = text.index(core)
        self.all.append(core)
        return f'{text[:start]}\ue000{len(self.all) - 1}"\ue001{text[start + len(core) :]}'

    def guarded(self, value: Any) -> Any:
        """Return a JSON value with stand-ins for those texts alone that could make a special token. Templates may
        compare the others."""
        if isinstance(value, str):
            return self.stand_in(value) if self._hazards.has(checked(value)) else value
        if isinstance(value, dict):
            return {self.guarded(key): self.guarded(each) for key, each in value.items()}
        return [self.guarded(each) for each in value] if isinstance(value, list) else value


class Hazards:
    """Finds texts that could make a special token, by themselves or with what stands around them."""

    def __init__(self, specials: Sequence[str]) -> None:
        """specials: texts of special tokens. Those with white space or of letters alone are no markup."""
        marks = [text for text in specials if not (text.isalnum() or any(map(str.isspace, text)))]
        self._within = re.compile("|".join(["\ue000", *map(re.escape, marks)]))
        self._begins = {text[:length] for text in marks for length in range(1, len(text))}
        self._ends = {text[-length:] for text in marks for length in range(1, len(text))}
        self._longest = max(map(len, marks), default=0)
        self._all = "\n".join(marks)

    def has(self, text: str) -> bool:
        """Return whether a text contains a special token, begins or ends with a part of one, or is a part of one that
        no word is."""
        lengths = range(1, min(len(text), self._longest) + 1)
        return bool(
            self._within.search(text)
            or any(text[-length:] in self._begins or text[:length] in self._ends for length in lengths)
            or (text in self._all and not text.isidentifier())
        )


def _written(text: str, slashes: str) -> str:
    """Return a text as the template writes it: as JSON within JSON, as often as the slashes before a quote tell."""
    for _ in range((len(slashes) + 1).bit_length() - 1):
        text = json.dumps(text, ensure_ascii=False)[1:-1]
    return text


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
