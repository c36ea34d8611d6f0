"""Turns tokens into text one by one, never splits a character, and stops at stop strings. Knows nothing of models.

Feed tokens or text to `decode` in order, and call `flush` once at the end.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Collection
from collections.abc import Sequence as Seq

from transformers import PreTrainedTokenizerBase, TokenizersBackend

REPLACEMENT = "\ufffd"
UTF8 = codecs.getincrementaldecoder("utf-8")
LONGEST_CHARACTER = 8  # tokens
CONTEXT = 12  # tokens that are decoded again with the next one; more take longer
BYTE_FALLBACK = re.compile("<0x([0-9A-F]{2})>")  # SentencePiece's name for a token of one byte
WORD_BEGINS = "\u2581"  # SentencePiece's space


def _byte_level() -> dict[str, int]:
    """Map GPT-2's letters to bytes: printable bytes are their own letters, the others have the letters from 256 on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("\xa1"), ord("\xac") + 1), *range(ord("\xae"), ord("\xff") + 1)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + at): byte for at, byte in enumerate(unseen)}


BYTE_LEVEL = _byte_level()


class Vocabulary:
    """Maps token ids to text, for all requests. Several times as quick as transformers' own way."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Check which quick ways this tokenizer allows."""
        self._tokenizer = tokenizer
        kind = type(tokenizer)
        direct = isinstance(tokenizer, TokenizersBackend) and kind._decode is TokenizersBackend._decode
        self._backend = tokenizer.backend_tokenizer if direct else None
        # ByteLevel joins bytes, so that a token's text does not depend on the tokens before it. Other decoders may drop
        # a leading space at the start of a text.
        self.context_free = self._backend is not None and type(self._backend.decoder).__name__ == "ByteLevel"
        self._known: dict[int, bytes] = {}
        self.added = frozenset(tokenizer.added_tokens_decoder)  # special tokens, and others beside the vocabulary

    def text(self, ids: list[int]) -> str:
        """Decode ids to text, without special tokens."""
        if self._backend is not None:
            return str(self._backend.decode(ids, skip_special_tokens=True))
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def written_bytes(self, token: int) -> bytes:
        """Return the UTF-8 bytes that a token adds to any text; maybe a part of a character. Only for a context-free
        vocabulary."""
        cached = self._known.get(token)
        if cached is None:
            text = self.text([token])
            self._known[token] = cached = self.bytes_of(token) if REPLACEMENT in text else text.encode()
        return cached

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes that a token stands for, maybe a part of a character; for a special token its name. Empty if
        the id is not in the vocabulary."""
        name = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(name, str):
            return b""  # a model may have more outputs than its vocabulary has tokens
        if token in self.added:
            return name.encode()
        if self.context_free and all(character in BYTE_LEVEL for character in name):
            return bytes(BYTE_LEVEL[character] for character in name)
        if byte := BYTE_FALLBACK.fullmatch(name):
            return bytes([int(byte[1], 16)])
        return name.replace(WORD_BEGINS, " ").encode()


class Detokenizer:
    """Decodes one answer. A character that is spread over several tokens comes with the last of them."""

    def __init__(
        self, vocabulary: Vocabulary, skip: frozenset[int], follows: Seq[int] = (), named: Collection[int] = ()
    ) -> None:
        """Start an answer. skip: tokens without text, such as the end of sequence; follows: the tokens of a text that
        the answer continues, so that it keeps a leading space; named: special tokens whose names are text here."""
        self._vocabulary, self._skip, self._named = vocabulary, skip, frozenset(named)
        self._bytes = UTF8("replace")  # for a context-free vocabulary
        # For other vocabularies: the tokens whose text is still to come, and some before them, which it depends on.
        self._ids: list[int] = []
        self._shown = 0  # how many of these have been emitted
        self._emitted = ""
        if follows and not vocabulary.context_free:
            tail = [*follows[-CONTEXT:]]
            if not (text := vocabulary.text(tail)).endswith(REPLACEMENT):
                self._ids, self._shown, self._emitted = tail, len(tail), text

    def decode(self, token: int) -> str:
        """Return the text that this token completes; may be empty."""
        if token in self._skip:
            return ""
        if token in self._named:
            return self.flush() + self._vocabulary.bytes_of(token).decode(errors="replace")
        if self._vocabulary.context_free:
            return self._bytes.decode(self._vocabulary.written_bytes(token))
        return self._in_context(token)

    def _in_context(self, token: int) -> str:
        """Decode a token of a vocabulary whose text depends on the tokens before it, by decoding the latest tokens
        again."""
        vocabulary, ids = self._vocabulary, self._ids
        ids.append(token)
        text = vocabulary.text(ids)
        piece = text[len(self._emitted) :]
        if piece.endswith(REPLACEMENT) and len(ids) - self._shown < LONGEST_CHARACTER:
            return ""  # an unfinished character; emit it anyway if it is too long to be one
        # The kept tokens must have some text: otherwise the next token would be decoded as the start of a text.
        if len(ids) > CONTEXT and (latest := vocabulary.text(ids[self._shown :])):
            del ids[: self._shown]
            text = latest
        self._shown, self._emitted = len(ids), text
        return piece

    def flush(self) -> str:
        """Return the text of an unfinished character at the end of the answer, or before what is no part of it."""
        before, self._emitted = self._emitted, self._vocabulary.text(self._ids) if self._ids else ""
        self._shown = len(self._ids)
        return self._bytes.decode(b"", final=True) + self._emitted[len(before) :]


class StopStrings:
    """Passes text through until a stop string appears. Holds back text that may be the beginning of a stop string."""

    def __init__(self, stops: Seq[str], *, include: bool = False) -> None:
        """Search for these strings; none: pass everything. include: pass the one that is found, too."""
        self._stops, self._include = tuple(stops), include
        self._pending = ""
        self.found: str | None = None  # the stop string that appeared first; the shortest of those at one place

    @property
    def stopped(self) -> bool:
        return self.found is not None

    def decode(self, text: str) -> str:
        """Append text and return the part that can be emitted; nothing after a stop string."""
        if not self._stops or self.stopped:
            return "" if self.stopped else text
        self._pending += text
        found = [(at, len(stop), stop) for stop in self._stops if (at := self._pending.find(stop)) >= 0]
        if found:
            at, length, self.found = min(found)
            out, self._pending = self._pending[: at + length * self._include], ""
            return out
        keep = max(
            (n for stop in self._stops for n in range(1, len(stop)) if self._pending.endswith(stop[:n])), default=0
        )
        out, self._pending = self._pending[: len(self._pending) - keep], self._pending[len(self._pending) - keep :]
        return out

    def flush(self) -> str:
        """Return the text that was held back, at the end of an answer without a stop string."""
        out, self._pending = ("" if self.stopped else self._pending), ""
        return out
