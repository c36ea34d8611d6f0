"""GET /v1/models: the served model, what it can do, and how much of it.

OpenAI defines little of this, so the names are those of others: vLLM's `max_model_len`, OpenRouter's `context_length`,
`architecture` and `supported_parameters`, Mistral's `capabilities`, LM Studio's `type`.
"""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from model.request import ChatFormat
from service.auth import require_api_key
from service.deps import service_of
from service.openapi.operation import LOOKUP_REFUSALS, Operation
from service.schemas import openai
from service.schemas.answers import Model, Models
from service.schemas.sampling import unknown_model
from service.stream import json_response

# Fields of a chat that are no parameters of its answer.
NO_PARAMETERS = {"model", "messages", "stream", "stream_options", *openai.IGNORED, *openai.NOT_BUILT}
# Fields that need a chat template with tools, and one that thinks.
OF_TOOLS = ("tools", "tool_choice", "parallel_tool_calls")
OF_REASONING = ("reasoning_effort", "include_reasoning", "thinking_token_budget")


@require_api_key
async def models(request: Request) -> Response:
    answer: Models = {"object": "list", "data": [_model(request)]}
    return json_response(answer)


@require_api_key
async def model(request: Request) -> Response:
    name = request.path_params["name"]
    if not name:
        raise HTTPException(404)
    settings = service_of(request).settings
    if name != settings.model_name:
        raise unknown_model(name, settings)
    return json_response(_model(request))


def _model(request: Request) -> Model:
    service = service_of(request)
    settings, info = service.settings, service.pool.info
    chat = info.chat if info else ChatFormat()
    unsupported = (() if chat.calls else OF_TOOLS) + (() if chat.reasoning else OF_REASONING)
    return {
        "id": settings.model_name,
        "object": "model",
        "created": int(request.app.state.started),
        "owned_by": "flashserve",
        "root": settings.model_name,
        "parent": None,
        "permission": [],
        "type": "vlm",
        "max_model_len": info.max_model_len if info else None,
        "context_length": info.max_model_len if info else None,
        "architecture": {
            "modality": "text+image+video->text",
            "input_modalities": ["text", "image", "video"],
            "output_modalities": ["text"],
        },
        "capabilities": {
            "completion": True,
            "completion_chat": True,
            "vision": True,
            "video": True,
            "structured_output": True,
            "function_calling": bool(chat.calls),
            "reasoning": chat.reasoning is not None,
        },
        "limits": {
            "max_completion_tokens": settings.max_new_tokens,
            "max_media": settings.max_media,
            "max_frames": service.media_limits.max_frames,
        },
        "supported_parameters": sorted(set(openai.ChatRequest.__struct_fields__) - NO_PARAMETERS - set(unsupported)),
    }


ROUTES = [
    Route("/v1/models", models),
    Route("/v1/models/{name:path}", model),
]
OPERATIONS = [
    Operation(
        "get",
        "/v1/models",
        "List the served model",
        {200: Models},
        "Models",
        refusals=LOOKUP_REFUSALS,
        request_id=None,
    ),
    Operation(
        "get",
        "/v1/models/{name:path}",
        "Return the served model",
        {200: Model},
        "Models",
        refusals=(*LOOKUP_REFUSALS, 404),
        request_id=None,
        parameters={"name": "The model's name, as served."},
    ),
]
