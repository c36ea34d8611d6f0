"""Says which tokens may follow, for answers that must match a grammar. Knows tokens only.

A `Guide` follows one answer. Copies of it look ahead along the paths of a draft tree, so that a node is treated as it
would be without a draft. Grammars are compiled and matched by llguidance, which computes masks lazily and tells where
only one text can follow.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Collection, Sequence
from threading import Lock

import llguidance.hf
import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark
from transformers import PreTrainedTokenizerBase, TokenizersBackend

from model.request import JSON_OPTIONS, Grammar, RequestError

LONGEST_REASON = 400  # characters of an error that a client sees
# Items of llguidance's parser at one token. Ambiguous grammars have many, and may hold up a whole batch.
MOST_STEP_ITEMS = 5000


class Grammars:
    """Compiles grammars for one vocabulary, and keeps the latest compiled ones. Any thread may use it."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        eos_ids: Collection[int],
        *,
        num_cached: int,
        max_symbols: int,
    ) -> None:
        """Set the limits. num_cached: compiled grammars that are kept; max_symbols: of one grammar, compiled."""
        self._tokenizer, self._vocab_size, self._eos_ids = tokenizer, vocab_size, frozenset(eos_ids)
        self._num_cached = num_cached
        self._limits = LLParserLimits(
            max_grammar_size=max_symbols, step_max_items=MOST_STEP_ITEMS, verbose_errors=False
        )
        self._compiled: OrderedDict[tuple[str, str], LLMatcher] = OrderedDict()
        self._vocabulary: LLTokenizer | None = None  # made for the first grammar: a large one takes a second
        self._lock = Lock()

    def begin(self, grammar: Grammar) -> Guide:
        """Compile a grammar, unless it is cached, for one answer. Raises RequestError if it cannot be compiled."""
        key = grammar.kind, grammar.source
        with self._lock:
            matcher = self._compiled.pop(key, None)
            if matcher is None:
                matcher = self._compile(grammar)
            self._compiled[key] = matcher
            while len(self._compiled) > self._num_cached:
                self._compiled.popitem(last=False)
            return Guide(matcher.deep_copy(), self._vocab_size, self._eos_ids)

    def _compile(self, grammar: Grammar) -> LLMatcher:
        """Compile a grammar. The GIL is released meanwhile. Raises RequestError."""
        try:
            matcher = LLMatcher(self._known_vocabulary(grammar), _source(grammar), limits=self._limits, log_level=0)
        except ValueError as error:
            raise _not_compiled(grammar, str(error)) from None
        if not matcher.is_error():
            matcher.compute_bitmask()  # some grammars fail only here
        if matcher.is_error():
            raise _not_compiled(grammar, matcher.get_error())
        return matcher

    def _known_vocabulary(self, grammar: Grammar) -> LLTokenizer:
        """Return the vocabulary as llguidance knows it. Raises RequestError if it cannot read this tokenizer."""
        if self._vocabulary is None:
            if not isinstance(self._tokenizer, TokenizersBackend):
                raise RequestError(
                    f"{grammar.param}: this model's tokenizer does not work with grammars; leave {grammar.param} out",
                    param=grammar.param,
                    code="not_supported",
                )
            self._vocabulary = llguidance.hf.from_tokenizer(
                self._tokenizer, n_vocab=self._vocab_size, eos_token=sorted(self._eos_ids)
            )
        return self._vocabulary


def unpacked(bits: bytes, vocab_size: int) -> np.ndarray:
    """Return which tokens are allowed, (vocab,) bool. bits: one for each token, the lowest of a byte first."""
    return np.unpackbits(np.frombuffer(bits, np.uint8), count=vocab_size, bitorder="little").view(bool)


_Place = tuple[int, list[int], bytes | None]  # the token that comes next, what is forced, and which tokens may follow


class Guide:
    """Follows one answer through its grammar, token by token; copies of it look ahead.

    Once a token leaves the grammar, or a step is beyond llguidance's limits, `error` says so, and every token is
    allowed.
    """

    # llguidance could roll back instead of being copied, but its masks are then wrong at times.
    __slots__ = (
        "_ahead",
        "_bits",
        "_coming",
        "_eos_ids",
        "_length",
        "_matcher",
        "_right",
        "_trail",
        "_unread",
        "_vocab_size",
        "ended",
        "error",
    )

    def __init__(self, matcher: LLMatcher, vocab_size: int, eos_ids: frozenset[int]) -> None:
        self._matcher, self._vocab_size, self._eos_ids = matcher, vocab_size, eos_ids
        self._unread: list[int] = []  # the latest tokens, which the matcher has not consumed yet
        self._bits: bytes | None = None  # which tokens may follow, once computed
        self._coming: list[int] | None = None  # the rest of forced text, once looked for
        # Of a copy, the places that it has left; and those ahead that a copy has found, the last one first.
        self._trail: list[_Place] | None = None
        self._ahead: list[_Place] = []
        self._length, self._right = 0, 0  # tokens of the answer so far; those before the error
        self.ended = False  # whether a token that ends the answer has come since it was copied
        self.error: str | None = None

    def copy(self) -> Guide:
        """Return a guide that stands at the same place, and moves on by itself."""
        other = Guide(self._matcher.deep_copy(), self._vocab_size, self._eos_ids)
        other._unread, other._bits, other._coming = self._unread.copy(), self._bits, self._coming
        other._trail = []
        other._length, other._right, other.error = self._length, self._right, self.error
        return other

    def foresee(self, other: Guide) -> None:
        """Use what a copy that has moved on from here has found, as long as the answer goes the same way."""
        if other._trail:
            self._ahead = other._trail[::-1]
            _, self._coming, self._bits = self._ahead[-1]

    def forced(self) -> list[int]:
        """Return the tokens that must follow because the grammar leaves no other text; often none.

        Such text is written to its end with the tokens that were found at its start.
        """
        if self._coming is None:
            self._coming = []
            if (matcher := self._read()) is not None:
                self._coming = matcher.compute_ff_tokens()
                if not self._coming and len(self._eos_ids) == 1 and matcher.is_stopped():
                    self._coming = list(self._eos_ids)
        return self._coming

    def allows(self, token: int) -> bool:
        """Return whether a token may follow."""
        if forced := self.forced():
            return forced[0] == token
        bits = self.bits()
        return bits is None or bool(bits[token >> 3] >> (token & 7) & 1)

    def bits(self) -> bytes | None:
        """Return which tokens may follow, a bit for each, the lowest of a byte first; None if all may."""
        if self._bits is None and self.error is None:
            if forced := self.forced():
                self._bits = (1 << forced[0]).to_bytes(-(-self._vocab_size // 8), "little")
            elif (matcher := self._read()) is not None:
                bits = matcher.compute_bitmask()
                if matcher.is_error():
                    self._fail(self._length)
                else:
                    self._bits = bits
        return self._bits

    def mask(self) -> np.ndarray | None:
        """Return which tokens may follow, (vocab,) bool; None if all may."""
        if (bits := self.bits()) is None:
            return None
        return unpacked(bits, self._vocab_size)

    def fitting(self, tokens: list[int]) -> int:
        """Return how many of these tokens fit the grammar one after the other. Quicker than `allows`, which is the
        truth: forced text may pass here that is to be written with other tokens."""
        return 0 if (matcher := self._read()) is None else matcher.validate_tokens(tokens)

    def advance(self, token: int) -> None:
        """Append a token to the answer. One that ends it leaves the guide where it is."""
        self._length += 1
        if token in self._eos_ids:
            self.ended = True
            return
        forced = self.forced()
        self._unread.append(token)
        if self._trail is not None:
            self._trail.append((token, forced, self._bits))
        self._coming = forced[1:] or None if forced and forced[0] == token else None
        self._bits = None
        if self._ahead and self._ahead.pop()[0] != token:
            self._ahead = []
        if self._ahead:
            _, self._coming, self._bits = self._ahead[-1]

    def follow(self, tokens: Sequence[int]) -> None:
        """Append tokens to the answer that were chosen by copies' masks. Fails where those have failed."""
        for token in tokens:
            self.bits()
            self.advance(token)

    def failure(self, length: int) -> str | None:
        """Return the error if it concerns one of the first `length` tokens."""
        self._read()
        return self.error if self._right < length else None

    def _read(self) -> LLMatcher | None:
        """Return a matcher that has consumed the whole answer; None once that has failed."""
        if self._unread and self.error is None:
            num = self._matcher.try_consume_tokens(self._unread)
            if num < len(self._unread):
                self._fail(self._length - len(self._unread) + num)
        self._unread.clear()
        return self._matcher if self.error is None else None

    def _fail(self, right: int) -> None:
        self.error, self._right = self._matcher.get_error() or "the answer left the grammar", right


def _source(grammar: Grammar) -> str:
    """Write a grammar as llguidance reads it. Raises ValueError."""
    source = grammar.source
    match grammar.kind:
        case "json_object":
            return LLMatcher.grammar_from_json_schema({"type": "object"}, defaults=JSON_OPTIONS)  # type: ignore[arg-type]
        case "json_schema":
            return LLMatcher.grammar_from_json_schema(source, defaults=JSON_OPTIONS)  # type: ignore[arg-type]
        case "regex":
            return LLMatcher.grammar_from_regex(source)
        case "choice":
            choices = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in json.loads(source))
            return LLMatcher.grammar_from_lark(f"start: {choices}")
        case "gbnf":
            try:
                return LLMatcher.grammar_from_lark(any_to_lark(source))
            except Exception as error:  # its parser raises many kinds
                raise ValueError(str(error)) from None
        case "lark":
            # Several grammars that refer to each other are already written as llguidance reads them.
            return source if source.startswith('{"grammars":') else LLMatcher.grammar_from_lark(source)


def _not_compiled(grammar: Grammar, reason: str) -> RequestError:
    kind = grammar.kind.replace("_", " ")
    reason = " ".join(reason.split())[:LONGEST_REASON]
    return RequestError(
        f"{grammar.param}: the {kind} cannot be compiled: {reason}", param=grammar.param, code="invalid_grammar"
    )
