"""The OpenAPI document says of the routes what is true of them: each one, each field, each limit."""

from __future__ import annotations

import re
from typing import Any

import jsonschema
import msgspec
import pytest
from starlette.routing import Route

from service.app import MODULES, create_app
from service.openapi.descriptions import FIELDS
from service.openapi.document import STATUSES
from service.openapi.operation import Operation
from service.openapi.page import page
from service.settings import Settings
from tests.service.conftest import StartServer
from tests.service.server import Server, chat_body

OPERATIONS: list[Operation] = [operation for module in MODULES for operation in module.OPERATIONS]
WITH_BODY = [operation for operation in OPERATIONS if operation.body is not None]


def built(**settings: Any) -> Any:
    return create_app(Settings(**settings), print).state.openapi


def body_schema(document: Any, operation: Operation) -> Any:
    path = re.sub(r":\w+\}", "}", operation.path)
    (content,) = document["paths"][path][operation.method]["requestBody"]["content"].values()
    schema = content["schema"]
    return document["components"]["schemas"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema


def test_every_route_is_in_the_document_and_nothing_else() -> None:
    app = create_app(Settings(), print)
    routes = {
        (method.lower(), re.sub(r":\w+\}", "}", route.path))
        for route in app.routes
        if isinstance(route, Route)
        for method in route.methods or ()
        if method != "HEAD"
    }
    described = {(method, path) for path, methods in built()["paths"].items() for method in methods}
    assert described == routes


@pytest.mark.parametrize("operation", WITH_BODY, ids=lambda operation: operation.path)
def test_every_field_that_is_read_is_in_the_document(operation: Operation) -> None:
    assert operation.body is not None
    names = {field.encode_name for field in msgspec.structs.fields(operation.body)}
    files = {operation.form.name} if operation.form else set()
    schema = body_schema(built(), operation)
    assert set(schema["properties"]) == names | files
    required = {field.encode_name for field in msgspec.structs.fields(operation.body) if field.required}
    assert set(schema.get("required", ())) == required


def test_unknown_fields_are_in_the_document_as_they_are_taken() -> None:
    for operation in WITH_BODY:
        assert operation.body is not None
        assert body_schema(built(), operation).get("additionalProperties", True)
        if operation.body.__struct_config__.forbid_unknown_fields:
            assert body_schema(built(strict=True), operation)["additionalProperties"] is False


def test_limits_that_are_settings_are_in_the_document() -> None:
    document = built(max_n=3, max_messages=5, max_new_tokens=300, max_media=2, max_top_logprobs=7)
    schemas = document["components"]["schemas"]
    chat, completion = schemas["ChatRequest"]["properties"], schemas["CompletionRequest"]["properties"]
    assert chat["n"]["anyOf"][0]["maximum"] == completion["n"]["anyOf"][0]["maximum"] == 3
    assert chat["messages"]["maxItems"] == 5
    assert chat["max_tokens"]["anyOf"][0]["maximum"] == 300
    assert chat["top_logprobs"]["anyOf"][0]["maximum"] == completion["logprobs"]["anyOf"][0]["maximum"] == 7
    assert "maximum" not in chat["logprobs"]["anyOf"][0]
    form = document["paths"]["/v1/generate"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert form["properties"]["media"]["maxItems"] == 2


def test_a_key_is_asked_for_where_it_is_needed() -> None:
    key: list[Any]
    for document, key in ((built(), []), (built(api_key="secret"), [{"api": []}])):
        assert document["paths"]["/v1/chat/completions"]["post"]["security"] == key
        assert document["paths"]["/v1/models"]["get"]["security"] == key
        assert document["paths"]["/livez"]["get"]["security"] == []
        assert document["paths"]["/admin/draft"]["post"]["security"] == [{"admin": []}]
    assert "secret" not in str(built(api_key="secret"))


def test_every_schema_is_one_and_every_reference_leads_somewhere() -> None:
    document = built()
    schemas = document["components"]["schemas"]
    for name, schema in schemas.items():
        jsonschema.Draft202012Validator.check_schema(schema)
        assert re.fullmatch(r"[a-zA-Z0-9._-]+", name)
    named = set(re.findall(r"#/components/schemas/([^']+)'", str(document)))
    assert named == set(schemas)
    ids = [operation["operationId"] for methods in document["paths"].values() for operation in methods.values()]
    assert len(set(ids)) == len(ids)


def test_every_status_that_is_promised_has_words() -> None:
    assert {status for operation in OPERATIONS for status in (*operation.answers, *operation.refusals)} <= set(STATUSES)


def test_no_description_is_of_a_field_that_is_gone() -> None:
    names = {name for schema in built()["components"]["schemas"].values() for name in schema.get("properties", {})}
    assert set(FIELDS) - {"max_output_tokens"} <= names


def test_fields_that_are_refused_or_without_effect_are_described_as_that() -> None:
    schemas = built()["components"]["schemas"]
    chat, completion = schemas["ChatRequest"]["properties"], schemas["CompletionRequest"]["properties"]
    for field in (
        chat["audio"],
        chat["use_beam_search"],
        completion["suffix"],
        schemas["MessagesRequest"]["properties"]["n"],
    ):
        assert field["description"].startswith("Not supported")
    assert chat["user"]["description"] == completion["user"]["description"] == "Without effect."
    assert chat["temperature"]["description"] == "0 is greedy."


def test_examples_are_what_they_are_examples_of(server: Server) -> None:
    document = server.http.get("/openapi.json").json()
    for operation in WITH_BODY:
        if operation.example is None or operation.key == "admin" or operation.body is None:
            continue
        schema = {"$ref": f"#/components/schemas/{operation.body.__name__}", "components": document["components"]}
        jsonschema.validate(operation.example, schema)
        answer = server.http.request(operation.method, operation.path, json=operation.example)
        assert answer.status_code == 200, answer.text


def test_the_served_document_is_that_of_the_settings(start_server: StartServer) -> None:
    server = start_server(max_n=3, api_key="secret")
    answer = server.http.get("/openapi.json")
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["components"]["schemas"]["ChatRequest"]["properties"]["n"]["anyOf"][0]["maximum"] == 3


def test_the_page_shows_every_route_and_loads_nothing_from_elsewhere(server: Server) -> None:
    answer = server.http.get("/docs")
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    for operation in OPERATIONS:
        assert f"<code>{operation.path.replace(':path', '')}</code>" in answer.text
    loaded = re.findall(r'(?:src|href)="([^"#][^"]*)"', answer.text)
    assert loaded
    for path in loaded:
        assert path.startswith("/")
        assert server.http.get(path).status_code == 200
    assert "<script" not in answer.text
    anchors = re.findall(r'href="#([^"]+)"', answer.text)
    assert set(anchors) <= set(re.findall(r' id="([^"]+)"', answer.text))


def test_the_page_escapes_what_the_document_says() -> None:
    document = built()
    document["info"]["title"] = "<script>alert(1)</script>"
    assert "<script>" not in page(document)


def test_both_can_be_switched_off(start_server: StartServer) -> None:
    server = start_server(docs=False)
    for path in ("/openapi.json", "/docs"):
        assert server.http.get(path).status_code == 404
    assert server.http.post("/v1/chat/completions", json=chat_body(max_tokens=1)).status_code == 200
