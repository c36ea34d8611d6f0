"""Draw JSON schemas for answers about a scene, as people write them: strings, enums, counts, boxes, arrays of these.

The draft learns from answers under these. The benchmark's schemas (model/bench/grammars.py) have other keys.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from model.demo.scenes import COLOURS, COLUMNS, ROWS, SHAPES, SIZES, TEXTURES

Schema = dict[str, Any]

TEXTS = (
    "description",
    "summary",
    "answer",
    "title",
    "alt_text",
    "details",
    "scene",
    "observation",
    "reason",
    "content",
)
COUNTS = ("number", "total", "num_objects", "how_many", "n", "quantity")
LISTS = ("items", "elements", "things", "results", "entities", "findings", "regions", "annotations")
STRING_LISTS = ("tags", "sentences", "facts", "keywords", "notes", "paragraphs")
NAMES = ("name", "class", "category", "kind", "object")
BOXES = ("bbox", "bounding_box", "rect", "location", "bbox_2d")
GROUPS = ("image", "result", "data", "properties", "attributes")
SCORES = ("score", "certainty", "probability")
FLAGS = ("visible", "is_moving", "overlapping", "present")
ENUMS: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "main_color": tuple(COLOURS),
    "background": tuple(COLOURS),
    "form": tuple(SHAPES),
    "geometry": tuple(SHAPES),
    "size": tuple(SIZES),
    "texture": tuple(TEXTURES),
    "row": tuple(ROWS),
    "column": tuple(COLUMNS),
}


def record(properties: dict[str, Schema]) -> Schema:
    """Return the schema of an object that has just these properties."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def drawn(rng: random.Random) -> Schema:
    """Draw the schema of an answer: an object whose parts, keys and order vary."""
    form = rng.choices(list(FORMS), list(FORMS.values()))[0]
    schema = record(form(rng))
    return record({rng.choice(GROUPS): schema}) if rng.random() < 0.1 else schema


def _text(rng: random.Random) -> Schema:
    """Draw a string; most have a limit, since a small model may not end one by itself."""
    if rng.random() < 0.1:
        return {"type": "string"}
    return {"type": "string", "maxLength": rng.choice((20, 40, 60, 80, 100, 150, 200, 250, 300))}


def _enum(rng: random.Random, key: str) -> Schema:
    """Draw the values that a key may have, in any order."""
    values = ENUMS[key]
    return {"enum": rng.sample(values, rng.randint(min(3, len(values)), len(values)))}


def _number(rng: random.Random) -> Schema:
    return {"type": "integer", "minimum": 0, "maximum": rng.choice((5, 9, 10, 20, 100))}


def _score(rng: random.Random) -> Schema:
    if rng.random() < 0.5:
        return {"enum": rng.choice(([0.25, 0.5, 0.75, 1.0], [0.1, 0.5, 1.0], [0.3, 0.6, 0.8, 0.95]))}
    return {"type": "string", "enum": ["low", "medium", "high"]}


def _box(rng: random.Random) -> Schema:
    most = rng.choice((100, 191, 999, 1000))
    return {
        "type": "array",
        "items": {"type": "integer", "minimum": 0, "maximum": most},
        "minItems": 4,
        "maxItems": 4,
    }


def _list(rng: random.Random, items: Schema) -> Schema:
    """Draw the bounds of an array."""
    least = rng.choice((0, 1, 1, 2, 3))
    schema: Schema = {"type": "array", "items": items, "minItems": least}
    return schema | {"maxItems": least + rng.choice((1, 2, 3))} if rng.random() < 0.8 else schema


def _one_text(rng: random.Random) -> dict[str, Schema]:
    return {rng.choice(TEXTS): _text(rng)}


def _several_texts(rng: random.Random) -> dict[str, Schema]:
    return {key: _text(rng) for key in rng.sample(TEXTS, rng.randint(2, 3))}


def _facts(rng: random.Random) -> dict[str, Schema]:
    """Draw a record of an enum or two, often with a count, a flag or a text, in any order."""
    parts = {key: _enum(rng, key) for key in rng.sample(list(ENUMS), rng.randint(1, 3))}
    if rng.random() < 0.6:
        parts[rng.choice(COUNTS)] = _number(rng)
    if rng.random() < 0.3:
        parts[rng.choice(FLAGS)] = {"type": "boolean"}
    if rng.random() < 0.3:
        parts[rng.choice(TEXTS)] = _text(rng)
    return _shuffled(rng, parts)


def _things(rng: random.Random) -> dict[str, Schema]:
    """Draw an array of records, often with a text beside it."""
    each = {key: _enum(rng, key) for key in rng.sample(list(ENUMS), rng.randint(1, 3))}
    if rng.random() < 0.3:
        each[rng.choice(NAMES)] = {"type": "string", "maxLength": rng.choice((20, 30, 40))}
    parts = {rng.choice(LISTS): _list(rng, record(_shuffled(rng, each)))}
    if rng.random() < 0.4:
        parts[rng.choice(TEXTS)] = _text(rng)
    return _shuffled(rng, parts)


def _boxes(rng: random.Random) -> dict[str, Schema]:
    each = {rng.choice(NAMES): {"enum": list(SHAPES)}, rng.choice(BOXES): _box(rng)}
    if rng.random() < 0.4:
        each[rng.choice(SCORES)] = _score(rng)
    return {rng.choice(LISTS): _list(rng, record(_shuffled(rng, each)))}


def _texts(rng: random.Random) -> dict[str, Schema]:
    """Draw an array of texts, or of records with a text in them."""
    if rng.random() < 0.5:
        return {rng.choice(STRING_LISTS): _list(rng, _text(rng))}
    each = {rng.choice(TEXTS): _text(rng), rng.choice(SCORES): _score(rng)}
    return {rng.choice(LISTS): _list(rng, record(_shuffled(rng, each)))}


def _shuffled(rng: random.Random, parts: dict[str, Schema]) -> dict[str, Schema]:
    return dict(rng.sample(list(parts.items()), len(parts)))


# Weights: text is the hardest to draft.
FORMS: dict[Callable[[random.Random], dict[str, Schema]], float] = {
    _one_text: 3,
    _several_texts: 1,
    _facts: 2,
    _things: 2,
    _boxes: 2,
    _texts: 2,
}
