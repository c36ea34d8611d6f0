"""Builds the OpenAPI document from the descriptions of the routes and the types that check bodies and answers.

The schemas are msgspec's own of these types. Three things are changed: bounds that are settings are written in; unknown
fields are allowed where they are ignored; and in a form whatever is no plain value is JSON text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

import model
from service import unknown_fields
from service.openapi.descriptions import FIELDS
from service.openapi.operation import Files, Operation
from service.settings import Settings

Schema = dict[str, Any]
VERSION = "3.1.0"
REF = "#/components/schemas/{name}"
STATUSES = {
    200: "The answer.",
    400: "The request is invalid; `param` names the field.",
    401: "A valid key is missing.",
    403: "The web page's origin, or the host name, is not allowed.",
    404: "The model is not served here, or the route is switched off.",
    408: "The body arrived too slowly.",
    413: "Something is larger than allowed.",
    415: "The body's content type, or a medium's type, is not supported.",
    429: "A limit of one key or one client is reached.",
    500: "The engine failed on this request; others go on.",
    503: "There is no capacity now; `Retry-After` says when to try again.",
    504: "The request took longer than allowed.",
}
# Limits that are settings: keyword and setting, by field.
BOUNDS = {
    "messages": ("maxItems", "max_messages"),
    "max_tokens": ("maximum", "max_new_tokens"),
    "max_completion_tokens": ("maximum", "max_new_tokens"),
    "n": ("maximum", "max_n"),
    "logprobs": ("maximum", "max_top_logprobs"),
    "top_logprobs": ("maximum", "max_top_logprobs"),
}
NOT_SUPPORTED = "Not supported: refused, unless the value asks for nothing."
WITHOUT_EFFECT = "Without effect."
PLAIN = {"string", "integer", "number", "boolean"}


def document(operations: Iterable[Operation], settings: Settings) -> Schema:
    """Build the document of these routes, under these settings."""
    operations = tuple(operations)
    types = list({repr(each): each for operation in operations for each in operation.types}.values())
    schemas, components = msgspec.json.schema_components(types, ref_template=REF)
    by_type = dict(zip(map(repr, types), schemas, strict=True))
    requests = _reachable([by_type[repr(each.body)] for each in operations if each.body], components)
    for name in requests:
        _describe(components[name], strict=settings.strict)
    for operation in operations:
        if operation.body is not None:
            fields = components[_name(by_type[repr(operation.body)])]["properties"]
            for names, text in ((operation.not_supported, NOT_SUPPORTED), (operation.without_effect, WITHOUT_EFFECT)):
                for name in fields.keys() & names:
                    fields[name]["description"] = text
    bounded = {_name(by_type[repr(each.body)]) for each in operations if each.body and each.bounded}
    _write_bounds([components[name] for name in bounded], settings)
    paths: dict[str, Any] = {}
    for operation in operations:
        paths.setdefault(_template(operation.path), {})[operation.method] = _operation(
            operation, by_type, components, settings
        )
    keys = {"api": "An API key, where the service has some.", "admin": "The admin key."}
    return {
        "openapi": VERSION,
        "info": {
            "title": "FlashServe",
            "version": model.__version__,
            "description": "Inference for vision-language models: images and videos in, text out.",
        },
        "paths": paths,
        "components": {
            "schemas": {name: components[name] for name in sorted(_reachable([paths], components))},
            "securitySchemes": {
                name: {"type": "http", "scheme": "bearer", "description": text} for name, text in keys.items()
            },
        },
    }


def _operation(operation: Operation, by_type: Mapping[str, Schema], components: Schema, settings: Settings) -> Schema:
    found: Schema = {
        "operationId": re.sub(r"\W+", "_", f"{operation.method}{operation.path}").strip("_"),
        "summary": operation.summary,
        "tags": [operation.tag],
        "responses": _responses(operation, by_type),
        "security": _security(operation, settings),
    }
    if operation.description:
        found["description"] = operation.description
    if operation.parameters:
        found["parameters"] = [
            {"name": name, "in": "path", "required": True, "description": text, "schema": {"type": "string"}}
            for name, text in operation.parameters.items()
        ]
    if operation.body is not None:
        schema, kind = by_type[repr(operation.body)], "application/json"
        if operation.form is not None:
            kind = "multipart/form-data"
            schema = _form(components[_name(schema)], operation.form, settings)
        content: Schema = {"schema": schema}
        if operation.example is not None:
            content["example"] = operation.example
        found["requestBody"] = {"required": True, "content": {kind: content}}
    return found


def _security(operation: Operation, settings: Settings) -> list[dict[str, list[str]]]:
    """Return the key that an operation needs under these settings, if any."""
    if operation.key == "admin":
        return [{"admin": []}]
    return [{"api": []}] if operation.key and settings.api_key else []


def _responses(operation: Operation, by_type: Mapping[str, Schema]) -> Schema:
    responses: Schema = {}
    for status, answer in operation.answers.items():
        content: Schema
        if isinstance(answer, tuple):
            content = {kind: {"schema": {"type": "string"}} for kind in answer}
        else:
            content = {"application/json": {"schema": by_type[repr(answer)]}}
        if operation.events and status == 200:
            content["text/event-stream"] = {"schema": _events(operation, by_type)}
        responses[str(status)] = {"description": STATUSES[status], "content": content} | _headers(operation, status)
    error = {"application/json": {"schema": by_type[repr(operation.error)]}}
    for status in operation.refusals:
        if str(status) not in responses:
            responses[str(status)] = {"description": STATUSES[status], "content": error} | _headers(operation, status)
    return dict(sorted(responses.items()))


def _headers(operation: Operation, status: int) -> Schema:
    headers: Schema = {}
    if operation.request_id is not None:
        headers[operation.request_id] = _header("The client's own id of the request, or the answer's id.")
    if operation.body is not None:
        headers[unknown_fields.HEADER] = _header("The fields of the request that were ignored, if any.")
    if status == 401:
        headers["WWW-Authenticate"] = _header("How to send the key.", required=True)
    if status == 503 and operation.key is not None:
        headers["Retry-After"] = _header("Seconds until it is worth trying again.", kind="integer", required=True)
    return {"headers": headers} if headers else {}


def _header(description: str, *, kind: str = "string", required: bool = False) -> Schema:
    return {"description": description, "schema": {"type": kind}} | ({"required": True} if required else {})


def _events(operation: Operation, by_type: Mapping[str, Schema]) -> Schema:
    """Return the schema of one server-sent event: JSON, or the closing one."""
    types = [by_type[repr(each)] for each in (*operation.events, operation.error)]
    data: Schema = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": types}}
    if operation.closing_event is not None:
        data = {"anyOf": [{"const": operation.closing_event}, data]}
    properties: Schema = {"data": data}
    if operation.named_events:
        properties["event"] = {"type": "string"}
    return {
        "description": "One event of the stream.",
        "type": "object",
        "properties": properties,
        "required": [*properties],
    }


def _form(component: Schema, files: Files, settings: Settings) -> Schema:
    """Return the schema of a form with the fields of a JSON body, and its files."""
    properties = {name: _form_field(schema) for name, schema in component["properties"].items()}
    file = {"type": "string", "contentMediaType": "application/octet-stream"}
    properties[files.name] = {
        "description": files.description,
        "type": "array",
        "items": file,
        "maxItems": settings.max_media,
    }
    return {key: value for key, value in component.items() if key != "properties"} | {"properties": properties}


def _form_field(schema: Schema) -> Schema:
    """Return the schema of one field of a form: a plain value, a repeated text, or JSON text."""
    choices = [each for each in schema.get("anyOf", [schema]) if each.get("type") != "null"]
    kept = {key: value for key, value in schema.items() if key == "description"}
    if all(each.get("type") in PLAIN or "enum" in each for each in choices):
        return (choices[0] if len(choices) == 1 else {"anyOf": choices}) | kept
    texts = [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]
    if choices == texts or choices == texts[::-1]:
        return {"type": "array", "items": {"type": "string"}} | kept
    return {"type": "string", "contentMediaType": "application/json"} | kept


def _describe(component: Schema, *, strict: bool) -> None:
    """Write the descriptions of the fields into a schema of a body, and whether it takes unknown ones."""
    if not strict and component.get("additionalProperties") is False:
        del component["additionalProperties"]
    for name, schema in component.get("properties", {}).items():
        if name in FIELDS:
            schema.setdefault("description", FIELDS[name])
        if schema.get("default", 0) is None:
            del schema["default"]  # null, which is allowed, says nothing


def _write_bounds(components: Iterable[Schema], settings: Settings) -> None:
    """Write limits that are settings into the schemas of bodies."""
    for component in components:
        for name, schema in component.get("properties", {}).items():
            bound = BOUNDS.get(name)
            if bound is None:
                continue
            keyword, setting = bound
            for each in schema.get("anyOf", [schema]):
                if each.get("type") == ("array" if keyword == "maxItems" else "integer"):
                    each[keyword] = getattr(settings, setting)


def _reachable(roots: Iterable[Schema], components: Mapping[str, Any]) -> set[str]:
    """Return the names of the components that these schemas refer to, directly or not."""
    found: set[str] = set()
    unread = list(roots)
    while unread:
        for name in set(re.findall(r"'#/components/schemas/([^']+)'", repr(unread.pop()))) - found:
            found.add(name)
            unread.append(components[name])
    return found


def _name(reference: Schema) -> str:
    return str(reference["$ref"]).rpartition("/")[2]


def _template(path: str) -> str:
    """Return a route's path as OpenAPI writes it: `{name:path}` is `{name}`."""
    return re.sub(r"\{(\w+):\w+\}", r"{\1}", path)
