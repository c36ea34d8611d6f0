"""Token by token to text, never splitting a character, and stopping at stop strings. Knows nothing of models.

Both classes are fed in order and flushed once at the end.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence as Seq

from transformers import PreTrainedTokenizerBase, TokenizersBackend

REPLACEMENT = "\ufffd"
UTF8 = codecs.getincrementaldecoder("utf-8")
LONGEST_CHARACTER = 8  # tokens
CONTEXT = 12  # tokens that are looked at again for the sake of the next; more take longer
BYTE_FALLBACK = re.compile("<0x([0-9A-F]{2})>")  # SentencePiece's name of a token for one byte
WORD_BEGINS = "\u2581"  # its space


def _byte_level() -> dict[str, int]:
    """GPT-2's letters for bytes: those that can be seen stand for themselves, the others for what follows 255."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("\xa1"), ord("\xac") + 1), *range(ord("\xae"), ord("\xff") + 1)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + at): byte for at, byte in enumerate(unseen)}


BYTE_LEVEL = _byte_level()


class Vocabulary:
    """A tokenizer's way from ids to text, for all requests. transformers' own way there is several times as long."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        kind = type(tokenizer)
        direct = isinstance(tokenizer, TokenizersBackend) and kind._decode is TokenizersBackend._decode
        self._backend = tokenizer.backend_tokenizer if direct else None
        # Bytes side by side, so that what a token says does not depend on what came before it. Others may, say, drop a
        # leading space at the start of a text.
        self.context_free = self._backend is not None and type(self._backend.decoder).__name__ == "ByteLevel"
        self._known: dict[int, bytes] = {}
        self._added = frozenset(tokenizer.added_tokens_decoder)

    def text(self, ids: list[int]) -> str:
        if self._backend is not None:
            return str(self._backend.decode(ids, skip_special_tokens=True))
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def written_bytes(self, token: int) -> bytes:
        """What a token adds to any text in UTF-8, maybe a part of a character, where the vocabulary is context-free."""
        cached = self._known.get(token)
        if cached is None:
            text = self.text([token])
            self._known[token] = cached = self.bytes_of(token) if REPLACEMENT in text else text.encode()
        return cached

    def bytes_of(self, token: int) -> bytes:
        """What a token stands for, a special one its name: of most vocabularies the very bytes, maybe of a part of a
        character."""
        name = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(name, str):
            return b""  # models may have more outputs than there are tokens
        if token in self._added:
            return name.encode()
        if self.context_free and all(character in BYTE_LEVEL for character in name):
            return bytes(BYTE_LEVEL[character] for character in name)
        if byte := BYTE_FALLBACK.fullmatch(name):
            return bytes([int(byte[1], 16)])
        return name.replace(WORD_BEGINS, " ").encode()


class Detokenizer:
    """`decode(id)` gives the text a token completes. A character spread over tokens comes with the last of them."""

    def __init__(self, vocabulary: Vocabulary, skip: frozenset[int]) -> None:
        self._vocabulary, self._skip = vocabulary, skip
        self._bytes = UTF8("replace")  # of a context-free vocabulary
        # Of others the latest tokens: those whose text is still to come, and some before those, on which it depends.
        self._ids: list[int] = []
        self._shown = 0  # of these; what they say is known
        self._emitted = ""

    def decode(self, token: int) -> str:
        if token in self._skip:
            return ""
        if self._vocabulary.context_free:
            return self._bytes.decode(self._vocabulary.written_bytes(token))
        return self._in_context(token)

    def _in_context(self, token: int) -> str:
        vocabulary, ids = self._vocabulary, self._ids
        ids.append(token)
        text = vocabulary.text(ids)
        piece = text[len(self._emitted) :]
        if piece.endswith(REPLACEMENT) and len(ids) - self._shown < LONGEST_CHARACTER:
            return ""  # an unfinished character; one that never ends is let through
        # What says nothing would not stand between the start of a text and what comes next.
        if len(ids) > CONTEXT and (latest := vocabulary.text(ids[self._shown :])):
            del ids[: self._shown]
            text = latest
        self._shown, self._emitted = len(ids), text
        return piece

    def flush(self) -> str:
        tail = self._vocabulary.text(self._ids)[len(self._emitted) :] if self._ids else ""
        return self._bytes.decode(b"", final=True) + tail


class StopStrings:
    """Passes text through until one of the stop strings appears; what might be the beginning of one is held back."""

    def __init__(self, stops: Seq[str]) -> None:
        self._stops = tuple(stops)
        self._pending = ""
        self.stopped = False

    def decode(self, text: str) -> str:
        if not self._stops or self.stopped:
            return "" if self.stopped else text
        self._pending += text
        found = [at for at in (self._pending.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped = True
            out, self._pending = self._pending[: min(found)], ""
            return out
        keep = max(
            (n for stop in self._stops for n in range(1, len(stop)) if self._pending.endswith(stop[:n])), default=0
        )
        out, self._pending = self._pending[: len(self._pending) - keep], self._pending[len(self._pending) - keep :]
        return out

    def flush(self) -> str:
        out, self._pending = ("" if self.stopped else self._pending), ""
        return out
