"""What client libraries send, made small. tests/service/client_bodies.json keeps it for a test without them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[1] / "service" / "client_bodies.json"
LONGEST_TEXT = 120
IMAGE, IMAGE_URI = "IMAGE", "data:image/png;base64,IMAGE"
SCHEMAS = {"parameters", "input_schema", "schema"}  # a schema's own fields are not the request's

Recorded = tuple[str, dict[str, Any]]  # path, body


def reduced(requests: Iterable[Recorded]) -> list[dict[str, Any]]:
    """Return one request of each set of fields. A word replaces images; long texts are cut."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for path, body in requests:
        found.setdefault((path, *sorted(fields(body))), {"path": path, "body": _shorter(body)})
    return list(found.values())


def restored(body: Any, image: str) -> Any:
    """Put the image back."""
    text = json.dumps(body).replace(IMAGE_URI, f"data:image/png;base64,{image}")
    return json.loads(text.replace(f'"{IMAGE}"', f'"{image}"'))


def fields(body: Any, path: str = "") -> Iterator[str]:
    """Yield the path of each value that is no object or list: `messages[].content[].type=text`."""
    if isinstance(body, dict):
        for name, value in body.items():
            if name in SCHEMAS:
                yield f"{path}{name}"
            else:
                yield from fields(value, f"{path}{name}.")
    elif isinstance(body, list):
        for value in body:
            yield from fields(value, f"{path.removesuffix('.')}[].")
    else:
        name = path.removesuffix(".")
        yield f"{name}={body}" if name.endswith(("type", "role", "tool_choice")) else name


def read() -> dict[str, list[dict[str, Any]]]:
    recorded: dict[str, list[dict[str, Any]]] = json.loads(FILE.read_text()) if FILE.exists() else {}
    return recorded


def write(recorded: dict[str, list[dict[str, Any]]]) -> None:
    """Write one request a line."""
    libraries = []
    for library, requests in sorted(recorded.items()):
        lines = ",\n  ".join(json.dumps(request, sort_keys=True) for request in requests)
        libraries.append(f'"{library}": [\n  {lines}\n ]')
    FILE.write_text("{\n " + ",\n ".join(libraries) + "\n}\n")


def _shorter(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _shorter(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_shorter(one) for one in value]
    if not isinstance(value, str):
        return value
    if value.startswith("data:"):
        return IMAGE_URI
    if len(value) > 1000 and value.isascii() and " " not in value:
        return IMAGE
    return value if len(value) <= LONGEST_TEXT else value[:LONGEST_TEXT] + "..."
