"""Turns a raw prompt, a text or token ids, into the tokens of a prompt without a chat template. Knows no model family.

Whoever writes a raw prompt writes its template too, so special tokens in the text are special tokens. But those that
stand for visual tokens are refused: there is no medium for them.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from model.request import RequestError
from model.targets.base import Target
from model.targets.prompt import TokenizedPrompt, checked


def raw_prompt(prompt: str | Sequence[int], target: Target, *, add_special_tokens: bool = True) -> TokenizedPrompt:
    """Tokenise a text, or check token ids.

    add_special_tokens: add the tokens that the tokenizer adds by itself, unless the text begins with BOS. Raises
    RequestError for an empty prompt, for tokens that the model does not have, and for placeholders of media.
    """
    if isinstance(prompt, str):
        bos = target.tokenizer.bos_token
        adds = add_special_tokens and not (bos and prompt.startswith(bos))
        ids = list(target.tokenizer(checked(prompt, "prompt"), add_special_tokens=adds).input_ids)
    else:
        ids = checked_ids(prompt, target.vocab_size)
    if not ids:
        raise RequestError("the prompt is empty: it has no token", param="prompt")
    placeholders = {number: stream for stream, number in target.placeholders.items()}
    if (found := next((token for token in ids if token in placeholders), None)) is not None:
        name = token_names(target.tokenizer, [found])[0]
        raise RequestError(
            f"the prompt has the token {name} ({found}), which stands for an {placeholders[found]}; a raw prompt is "
            "text alone: send images and videos as messages",
            param="prompt",
        )
    return TokenizedPrompt(ids, (), ())


def checked_ids(ids: Sequence[int], vocab_size: int, *, param: str = "prompt") -> list[int]:
    """Return token ids. Raises RequestError if the model has no such token."""
    if (unknown := next((token for token in ids if not 0 <= token < vocab_size), None)) is not None:
        raise RequestError(f"{param} names token {unknown}; tokens are 0 to {vocab_size - 1}", param=param)
    return list(ids)


def token_names(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Return the names of tokens in the vocabulary; "" for one that only the model has."""
    return [name or "" for name in tokenizer.convert_ids_to_tokens(list(ids))]
