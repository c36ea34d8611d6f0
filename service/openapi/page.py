"""Writes the OpenAPI document as a web page: plain HTML without scripts, whose style is the service's own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

Schema = Mapping[str, Any]
COMPONENTS = "#/components/schemas/"


def page(document: Schema) -> str:
    """Write the page of a document."""
    info, schemas = document["info"], document["components"]["schemas"]
    operations = [
        (method, path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    tags = list(dict.fromkeys(operation["tags"][0] for _, _, operation in operations))
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(info['title'])} API</title>",
        '<link rel="icon" href="/static/icon.svg" type="image/svg+xml">',
        '<link rel="stylesheet" href="/static/docs.css"></head><body>',
        f"<header><h1>{escape(info['title'])} API <small>{escape(info['version'])}</small></h1>",
        '<a href="/">playground</a> <a href="/openapi.json">openapi.json</a></header><main>',
        f"<p>{escape(info['description'])}</p>",
    ]
    for tag in tags:
        parts.append(f"<h2>{escape(tag)}</h2>")
        parts += [_operation(*each) for each in operations if each[2]["tags"][0] == tag]
    parts.append("<h2>Schemas</h2>")
    parts += [_component(name, schema) for name, schema in schemas.items()]
    return "\n".join([*parts, "</main></body></html>"])


def _operation(method: str, path: str, operation: Schema) -> str:
    parts = [
        f'<details class="operation" id="{operation["operationId"]}"><summary>',
        f'<b class="{method}">{method.upper()}</b> ',
        f"<code>{escape(path)}</code> {escape(operation['summary'])}</summary>",
        f"<p>{escape(operation.get('description', ''))}</p>",
    ]
    if operation["security"]:
        parts.append("<p>Needs a key: <code>Authorization: Bearer KEY</code></p>")
    for parameter in operation.get("parameters", ()):
        parts.append(f"<p><code>{escape(parameter['name'])}</code>: {escape(parameter['description'])}</p>")
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        parts.append(f"<h3>Body, <code>{kind}</code></h3>{_schema(content['schema'])}")
        if "example" in content:
            command = f"curl -X POST -H 'Content-Type: {kind}' -d '{json.dumps(content['example'])}' $HOST{path}"
            parts.append(f"<pre>{escape(command)}</pre>")
    parts.append("<h3>Answers</h3><table>")
    for status, response in operation["responses"].items():
        contents = "<br>".join(
            f"<code>{escape(kind)}</code> {_type(content['schema'])}" for kind, content in response["content"].items()
        )
        parts.append(f"<tr><th>{status}</th><td>{escape(response['description'])}</td><td>{contents}</td></tr>")
    return "".join([*parts, "</table></details>"])


def _component(name: str, schema: Schema) -> str:
    description = escape(schema.get("description", ""))
    anchor = escape(name, quote=True)
    return f'<section id="{anchor}"><h3><code>{anchor}</code></h3><p>{description}</p>{_schema(schema)}</section>'


def _schema(schema: Schema) -> str:
    """Write a schema: a table of its fields, or its type."""
    if "properties" not in schema:
        return f"<p>{_type(schema)}</p>"
    required = schema.get("required", ())
    rows = "".join(
        f"<tr><th><code>{escape(name)}</code>{' *' if name in required else ''}</th><td>{_type(field)}</td>"
        f"<td>{escape(field.get('description', ''))}</td></tr>"
        for name, field in schema["properties"].items()
    )
    return f"<table>{rows}</table>"


def _type(schema: Schema) -> str:
    """Write a type in one line, with links to the schemas that it names."""
    return " or ".join(dict.fromkeys(_types(schema)))


def _types(schema: Schema) -> Iterator[str]:
    if "$ref" in schema:
        name = escape(schema["$ref"].removeprefix(COMPONENTS), quote=True)
        yield f'<a href="#{name}">{name}</a>'
    elif "anyOf" in schema:
        for each in schema["anyOf"]:
            yield from _types(each)
    elif "enum" in schema or "const" in schema:
        yield " or ".join(escape(json.dumps(each)) for each in schema.get("enum", [schema.get("const")]))
    elif schema.get("type") == "array":
        yield f"list of {_type(schema.get('items', {}))}"
    elif "contentSchema" in schema:
        yield _type(schema["contentSchema"])
    elif schema.get("properties"):
        yield "{" + ", ".join(f"{escape(name)}: {_type(each)}" for name, each in schema["properties"].items()) + "}"
    else:
        yield escape(str(schema.get("type", "any"))) + _bounds(schema)


def _bounds(schema: Schema) -> str:
    signs = {"minimum": "&ge;", "exclusiveMinimum": "&gt;", "maximum": "&le;", "exclusiveMaximum": "&lt;"}
    found = [f" {sign} {schema[name]}" for name, sign in signs.items() if name in schema]
    return ",".join(found)
