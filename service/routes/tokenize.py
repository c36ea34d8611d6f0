"""POST /tokenize and /detokenize: which tokens a prompt has, and which text tokens are. No request is decoded.

A conversation is tokenized as a chat would be: with its media, tools and the model's chat template.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from model.request import TemplateOptions
from service import chat_input
from service.auth import require_api_key
from service.body import read_json
from service.deps import service_of, with_request_id
from service.errors import BadRequest, TimedOut
from service.openapi.operation import Operation
from service.pool import messages as m
from service.schemas import openai, sampling, tools
from service.schemas import tokenize as schema
from service.schemas.answers import Detokenized, Tokenized
from service.state import Service
from service.stream import json_response
from service.uploads import Upload


@with_request_id("tok-")
@require_api_key
async def tokenize(request: Request) -> Response:
    service = service_of(request)
    async with admitted(request) as upload:
        body = await read_json(upload, schema.TokenizeRequest, service.settings)
        schema.check(body, service.settings)
        if body.text is None:
            found = await tokenize_chat(service, body.chat(), upload)
        else:
            template = TemplateOptions(add_special_tokens=body.adds_special_tokens)
            try:
                found = await service.pool.tokenize(template=template, prompt=body.text)
            except BadRequest as error:
                error.param = "content" if body.prompt is None else error.param
                raise
    info = service.pool.info
    answer: Tokenized = {
        "count": len(found.ids),
        "max_model_len": info.max_model_len if info else None,
        "tokens": list(found.ids),
        "token_strs": list(found.names) if body.return_token_strs else None,
    }
    return json_response(answer)


@with_request_id("tok-")
@require_api_key
async def detokenize(request: Request) -> Response:
    service = service_of(request)
    async with admitted(request) as upload:
        body = await read_json(upload, schema.DetokenizeRequest, service.settings)
        sampling.check_model(body.model, service.settings)
        text = await service.pool.detokenize(tuple(body.tokens))
    answer: Detokenized = {"prompt": text, "content": text}
    return json_response(answer)


async def tokenize_chat(service: Service, body: openai.ChatRequest, upload: Upload) -> m.Tokenized:
    """Load a conversation's media, whose number of tokens may depend on their size, and tokenize it."""
    openai.check(body, service.settings)
    offered = tools.read(body, service.settings)
    template = tools.template_options(body, offered, service.chat_format)
    options = openai.media_options(body, service.settings, service.pool.info)
    with ExitStack() as resources:
        decoded = service.decoded_media.open()
        resources.callback(decoded.close)
        chat = await chat_input.from_chat(body, options, upload, service.media_loader(decoded.add), template)
        return await service.pool.tokenize(chat.messages, template=chat.template)


@asynccontextmanager
async def admitted(request: Request) -> AsyncIterator[Upload]:
    """Refuse while requests are refused; otherwise read within the time of a request."""
    service = service_of(request)
    reservation = service.admission.enter(request.state.key)
    try:
        with service.uploads.open(request, request.state.key) as upload:
            async with asyncio.timeout(service.settings.request_timeout):
                yield upload
    except TimeoutError:
        raise TimedOut(f"the request took longer than {service.settings.request_timeout:g} s") from None
    finally:
        reservation.leave()


ROUTES = [
    Route("/tokenize", tokenize, methods=["POST"]),
    Route("/detokenize", detokenize, methods=["POST"]),
]
OPERATIONS = [
    Operation(
        "post",
        "/tokenize",
        "Count and list the tokens of a text or a conversation",
        {200: Tokenized},
        "Tokens",
        "Send one of prompt, content and messages.",
        body=schema.TokenizeRequest,
        example={"prompt": "Once upon a time"},
    ),
    Operation(
        "post",
        "/detokenize",
        "Return the text of tokens",
        {200: Detokenized},
        "Tokens",
        body=schema.DetokenizeRequest,
        example={"tokens": [15, 16, 17]},
    ),
]
