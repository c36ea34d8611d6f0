"""Says which tokens may follow, for answers that must match a grammar. Knows tokens only.

A `Guide` follows one answer. It also looks ahead along the paths of a draft tree, with a copy of its matcher, so that a
node is treated as it would be without a draft. Grammars are compiled and matched by llguidance, which computes masks
lazily and tells where only one text can follow.
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

Path = Sequence[int]  # tokens behind the answer so far

LONGEST_REASON = 400  # characters of an error that a client sees
WORD = 32  # bits of a mask's word
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


class Guide:
    """Follows one answer through its grammar.

    A path is the tokens of a draft tree between the answer so far and a node. `error` is set, and every token allowed
    from then on, once a step is beyond llguidance's limits.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int, eos_ids: frozenset[int]) -> None:
        # `_matcher` stands where the answer ends. `_ahead` is a copy that stands at the path `_at`. llguidance could
        # roll back instead, but its masks are then wrong at times.
        self._matcher, self._vocab_size, self._eos_ids = matcher, vocab_size, eos_ids
        self._ahead: LLMatcher | None = None
        self._at: tuple[int, ...] = ()
        self._masks: dict[tuple[int, ...], np.ndarray | None] = {}
        # Where text is forced: the path at its start and its tokens. And paths behind which none is.
        self._chains: list[tuple[tuple[int, ...], list[int]]] = []
        self._open: set[tuple[int, ...]] = set()
        self._errors: dict[tuple[int, ...], str] = {}  # of masks; they count once their token is in the answer
        self.error: str | None = None

    def forced(self, path: Path = ()) -> list[int]:
        """Return the tokens that must follow a path because the grammar leaves no other text; often none.

        Such text is written to its end with the tokens that were found at its start.
        """
        key = tuple(path)
        if key in self._open:
            return []
        for start, tokens in self._chains:
            if (rest := _behind(key, start, tokens)) is not None:
                return rest
        tokens = []
        if (matcher := self._moved(key)) is not None:
            tokens = matcher.compute_ff_tokens()
            if not tokens and len(self._eos_ids) == 1 and matcher.is_stopped():
                tokens = list(self._eos_ids)
        if tokens:
            self._chains.append((key, tokens))
        else:
            self._open.add(key)
        return tokens

    def allows(self, path: Path, token: int) -> bool:
        """Return whether a token may follow a path."""
        words = self._words(tuple(path))
        return words is None or bool(words[token // WORD] >> (token % WORD) & 1)

    def mask(self, path: Path) -> np.ndarray | None:
        """Return which tokens may follow a path, (vocab,) bool; None if all may, or if the path itself is none."""
        words = self._words(tuple(path))
        if words is None:
            return None
        return np.unpackbits(words.view(np.uint8), count=self._vocab_size, bitorder="little").view(bool)

    def accepts(self, path: Path, token: int) -> bool:
        """Return whether a token can continue a path. Cheaper than `allows`, which is the truth: a token of forced text
        may pass here although the text is to be written with other tokens."""
        if forced := self.forced(path):
            return forced[0] == token
        return self.allows(path, token) if token in self._eos_ids else self._moved((*path, token)) is not None

    def commit(self, tokens: Path) -> None:
        """Append tokens to the answer. An end-of-sequence token, which is the last, leaves the matcher where it is."""
        path = tuple(tokens[:-1] if tokens and tokens[-1] in self._eos_ids else tokens)
        num = len(path)
        for each, reason in self._errors.items():
            if len(each) < len(tokens) and path[: len(each)] == each:
                self.error = reason
        self._errors.clear()
        if self._ahead is not None and self._at == path:
            self._matcher = self._ahead  # it has computed masks on the way, and is quicker for that
        elif self._matcher.try_consume_tokens(list(path)) < num and self.error is None:
            self.error = self._matcher.get_error() or "the answer left the grammar"
        self._ahead = None
        self._open.clear()
        self._masks = {each[num:]: words for each, words in self._masks.items() if each[:num] == path}
        chains, self._chains = self._chains, []
        for start, forced in chains:
            if start[:num] == path:
                self._chains.append((start[num:], forced))
            elif rest := _behind(path, start, forced):
                self._chains.append(((), rest))

    def _words(self, path: tuple[int, ...]) -> np.ndarray | None:
        """Compute the mask behind a path as bits of 32-bit words; None if there is none."""
        if path in self._masks:
            return self._masks[path]
        words: np.ndarray | None = None
        if forced := self.forced(path):
            words = np.zeros(-(-self._vocab_size // WORD), np.uint32)
            words[forced[0] // WORD] = 1 << forced[0] % WORD
        elif (matcher := self._moved(path)) is not None:
            words = np.zeros(-(-self._vocab_size // WORD), np.uint32)
            matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
            if matcher.is_error():
                self._errors[path], words = matcher.get_error(), None
                self._ahead = None
        self._masks[path] = words
        return words

    def _moved(self, path: tuple[int, ...]) -> LLMatcher | None:
        """Return a matcher that stands at a path; None if the grammar has no such path."""
        if self.error is not None:
            return None
        if not path:
            return self._matcher
        if self._ahead is None or path[: len(self._at)] != self._at:
            self._ahead, self._at = self._matcher.deep_copy(), ()
        if rest := list(path[len(self._at) :]):
            self._at += tuple(rest[: self._ahead.try_consume_tokens(rest)])
        if self._ahead.is_error():
            self._ahead = None
            return None
        return self._ahead if self._at == path else None


def _behind(path: tuple[int, ...], start: tuple[int, ...], forced: list[int]) -> list[int] | None:
    """Return what follows a path of the text that is forced at `start`; None if the path does not end within it."""
    num = len(path) - len(start)
    if not 0 <= num < len(forced) or path[: len(start)] != start or list(path[len(start) :]) != forced[:num]:
        return None
    return forced[num:]


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
