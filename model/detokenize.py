"""Token by token to text, never splitting a character, and stopping at stop strings. Knows nothing of models.

Both classes are fed in order and flushed once at the end.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"


class Detokenizer:
    """`decode(id)` gives the text a token completes. A character spread over tokens comes with the last of them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, skip: frozenset[int]) -> None:
        self._tokenizer, self._skip = tokenizer, skip
        self._ids: list[int] = []
        # ids[start:shown] give context to, but are not part of, what is still to come: some tokenizers
        # drop a leading space at the start of a text.
        self._start = self._shown = 0

    def decode(self, token: int) -> str:
        if token in self._skip:
            return ""
        self._ids.append(token)
        text = self._new_text()
        if text.endswith(REPLACEMENT) and len(self._ids) - self._shown < 8:
            return ""  # an unfinished character; one that never ends is let through after 8 tokens
        self._start, self._shown = self._shown, len(self._ids)
        return text

    def flush(self) -> str:
        text = self._new_text()
        self._shown = len(self._ids)
        return text

    def _new_text(self) -> str:
        before = self._text(self._ids[self._start : self._shown])
        return self._text(self._ids[self._start :])[len(before) :]

    def _text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class StopStrings:
    """Passes text through until one of the stop strings appears; what might be the beginning of one is held back."""

    def __init__(self, stops: Seq[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def decode(self, text: str) -> str:
        if not self._stops or self.stopped:
            return "" if self.stopped else text
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped = True
            out, self._held = self._held[: min(found)], ""
            return out
        keep = max((n for stop in self._stops for n in range(1, len(stop)) if self._held.endswith(stop[:n])), default=0)
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out

    def flush(self) -> str:
        out, self._held = ("" if self.stopped else self._held), ""
        return out
