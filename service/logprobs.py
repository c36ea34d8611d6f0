"""Convert log-probabilities of tokens to OpenAI's formats: that of chats, and the older one of completions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from model.request import Token, TokenLogprob, TokenLogprobs
from service.schemas.answers import ChatLogprob, CompletionLogprobs, TopLogprob

MIN_LOGPROB = -9999.0  # stands for minus infinity, as at OpenAI: JSON has none


def to_openai(tokens: Iterable[TokenLogprobs]) -> list[ChatLogprob]:
    return [{**_entry(token.chosen), "top_logprobs": [_entry(one) for one in token.top]} for token in tokens]


class TextLogprobs:
    """Converts the tokens of one answer to the format of completions, piece by piece."""

    def __init__(self, offset: int) -> None:
        """offset: of the answer in the text that is sent, characters."""
        self._offset = offset

    def add(self, tokens: Sequence[Token], logprobs: Iterable[TokenLogprobs]) -> CompletionLogprobs:
        """Return the columns of the next tokens. A token that ends inside a character begins where that one begins."""
        columns: CompletionLogprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, each in zip(tokens, logprobs, strict=True):
            columns["tokens"].append(_name(each.chosen))
            columns["token_logprobs"].append(_finite(each.chosen))
            columns["top_logprobs"].append({_name(one): _finite(one) for one in (each.chosen, *each.top)})
            columns["text_offset"].append(self._offset)
            self._offset += len(token.text)
        return columns


def _name(one: TokenLogprob) -> str:
    """Return a token's text; for a part of a character its bytes, as OpenAI writes them."""
    try:
        return one.bytes.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in one.bytes)


def _finite(one: TokenLogprob) -> float:
    return max(one.logprob, MIN_LOGPROB)


def _entry(one: TokenLogprob) -> TopLogprob:
    """The concatenated `bytes` are the text; a single `token` may be only a part of a character."""
    return {
        "token": one.bytes.decode(errors="replace"),
        "logprob": _finite(one),
        "bytes": list(one.bytes),
    }
