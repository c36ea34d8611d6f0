"""Narrows JSON schemas, so that a model ends its objects instead of inventing properties."""

from __future__ import annotations

from typing import Any

# Where these stand beside properties, other schemas may name further ones.
COMBINING = ("allOf", "anyOf", "oneOf", "not", "if", "$ref", "additionalProperties", "unevaluatedProperties")


def named_only(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema whose objects have no properties but those that it names, as far as it does not say otherwise."""
    changed = dict(schema)
    properties = schema.get("properties")
    if isinstance(properties, dict):
        changed["properties"] = {
            name: named_only(each) if isinstance(each, dict) else each for name, each in properties.items()
        }
        if not any(word in schema for word in (*COMBINING, "patternProperties")):
            changed["additionalProperties"] = False
    if isinstance(items := schema.get("items"), dict):
        changed["items"] = named_only(items)
    return changed
