"""Convert log-probabilities of tokens to OpenAI's formats: that of chats, and the older one of completions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from model.request import Token, TokenLogprob, TokenLogprobs
from service.schemas.answers import ChatLogprob, CompletionLogprobs, TopLogprob

MIN_LOGPROB = -9999.0  # stands for minus infinity, as at OpenAI: JSON has none


def to_openai(tokens: Iterable[TokenLogprobs], *, as_ids: bool = False) -> list[ChatLogprob]:
    """Convert to the format of chats. as_ids: tokens are named by their ids, as vLLM does on request."""

    def entry(one: TokenLogprob) -> TopLogprob:
        # The concatenated `bytes` are the text; a single token may be only a part of a character.
        name = _id_name(one) if as_ids else one.bytes.decode(errors="replace")
        return {"token": name, "logprob": _finite(one), "bytes": list(one.bytes)}

    return [{**entry(token.chosen), "top_logprobs": [entry(one) for one in token.top]} for token in tokens]


class TextLogprobs:
    """Converts the tokens of one answer to the format of completions, piece by piece."""

    def __init__(self, offset: int, *, as_ids: bool = False) -> None:
        """offset: of the answer in the text that is sent, characters; as_ids: tokens are named by their ids."""
        self._offset = offset
        self._name = _id_name if as_ids else _name

    def add(self, tokens: Sequence[Token], logprobs: Iterable[TokenLogprobs]) -> CompletionLogprobs:
        """Return the columns of the next tokens. A token that ends inside a character begins where that one begins."""
        columns: CompletionLogprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, each in zip(tokens, logprobs, strict=True):
            columns["tokens"].append(self._name(each.chosen))
            columns["token_logprobs"].append(_finite(each.chosen))
            columns["top_logprobs"].append({self._name(one): _finite(one) for one in (each.chosen, *each.top)})
            columns["text_offset"].append(self._offset)
            self._offset += len(token.text)
        return columns


def _name(one: TokenLogprob) -> str:
    """Return a token's text; for a part of a character its bytes, as OpenAI writes them."""
    try:
        return one.bytes.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in one.bytes)


def _id_name(one: TokenLogprob) -> str:
    return f"token_id:{one.id}"


def _finite(one: TokenLogprob) -> float:
    return max(one.logprob, MIN_LOGPROB)
