"""The requests of POST /tokenize and /detokenize, in vLLM's form and in llama.cpp's."""

from __future__ import annotations

from typing import Any

import msgspec

from service.errors import BadRequest
from service.schemas import sampling
from service.schemas.media_options import MediaFields
from service.schemas.openai import ChatMessage, ChatRequest
from service.schemas.sampling import TokenId
from service.settings import Settings

# What the conversation is rendered with, by the names of the same fields of chats.
OF_CHATS = ("tools", "chat_template", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")


class TokenizeRequest(MediaFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /tokenize: one of prompt, content and messages."""

    model: str | None = None
    prompt: str | None = None
    content: str | None = None  # llama.cpp's name of prompt
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None  # None: for a prompt
    add_special: bool | None = None  # llama.cpp's; None: not for its content
    parse_special: bool | None = None
    with_pieces: bool | None = None
    return_token_strs: bool | None = None

    tools: list[Any] | None = None
    chat_template: Any = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @property
    def text(self) -> str | None:
        """The raw prompt, if it is one."""
        return self.content if self.prompt is None else self.prompt

    @property
    def adds_special_tokens(self) -> bool:
        """Whether the tokenizer adds its own tokens to the raw prompt."""
        if self.prompt is None:
            return bool(self.add_special)
        return self.add_special_tokens is not False

    def chat(self) -> ChatRequest:
        """The same conversation as a chat."""
        fields: dict[str, Any] = {name: getattr(self, name) for name in (*MediaFields.__struct_fields__, *OF_CHATS)}
        known = {name: value for name, value in fields.items() if name in ChatRequest.__struct_fields__}
        return ChatRequest(messages=self.messages or [], **known)


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /detokenize."""

    tokens: list[TokenId]
    model: str | None = None


def check(request: TokenizeRequest, settings: Settings) -> None:
    """Raise BadRequest for what is invalid before the conversation is looked at."""
    sampling.check_model(request.model, settings)
    sent = [name for name in ("prompt", "content", "messages") if getattr(request, name) is not None]
    if len(sent) != 1:
        problem = f"{' and '.join(sent)} were sent" if sent else "there is none"
        raise BadRequest(f"send one of prompt, content and messages; {problem}", param=sent[-1] if sent else "prompt")
    if request.text is not None:
        sampling.check_prompt_chars(len(request.text), settings, param=sent[0])
        for name in (*MediaFields.__struct_fields__, *OF_CHATS):
            if getattr(request, name) is not None:
                raise BadRequest(f"{name} is for messages, and there are none", param=name)
    if request.messages is not None and request.add_special_tokens:
        raise BadRequest(
            "add_special_tokens is for a prompt; the chat template adds its own to messages", param="add_special_tokens"
        )
    if request.parse_special is False:
        raise BadRequest(
            "parse_special: special tokens in a prompt are always special", param="parse_special", code="not_built"
        )
    if request.with_pieces:
        raise BadRequest(
            "with_pieces is not supported; return_token_strs sends the tokens' names",
            param="with_pieces",
            code="not_built",
        )
