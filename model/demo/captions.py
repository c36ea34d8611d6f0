"""Write captions, questions and answers about a scene in varied wording. This module knows nothing of pixels.

Objects are *introduced* with "a" or "an" and referred to with "the", so that a caption can be parsed: `named_objects`
finds the objects that an answer claims, for the evaluation.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from model.demo.scenes import COLOURS, COLUMNS, ROWS, SHAPES, SIZES, TEXTURES, Scene, Thing

NUMBERS = ("no", "one", "two", "three", "four", "five")
PLURALS = {"cross": "crosses"}


@dataclass(frozen=True)
class Turn:
    """Hold a question and its answer."""

    question: str
    answer: str


def cell_name(row: int, column: int) -> str:
    """Name a cell of the 3 x 3 grid, such as "top left"; the middle one is "center"."""
    if row == 1 and column == 1:
        return "center"
    return f"{ROWS[row]} {COLUMNS[column]}"


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _plural(shape: str) -> str:
    return PLURALS.get(shape, shape + "s")


def described(thing: Thing) -> str:
    """Return the object's full noun phrase without an article, such as "large red striped star"."""
    return " ".join(
        w for w in (thing.size, thing.colour, thing.texture if thing.texture != "solid" else "", thing.shape) if w
    )


def introduced(thing: Thing) -> str:
    """Return the object's noun phrase with an indefinite article."""
    phrase = described(thing)
    return f"{_article(phrase)} {phrase}"


def referred(thing: Thing) -> str:
    """Refer back to an object by colour and shape, which are unique in a scene."""
    return f"the {thing.colour} {thing.shape}"


def _sentence(text: str) -> str:
    """Capitalise the first letter and append a full stop."""
    return text[0].upper() + text[1:] + "."


def _counted(n: int, noun: str = "object") -> str:
    """Return a number word and its noun, such as "two objects"."""
    return f"{NUMBERS[n]} {noun}" + ("" if n == 1 else "s")


def _listed(parts: list[str]) -> str:
    """Join parts with commas and "and"."""
    if len(parts) == 1:
        return parts[0]
    return ", ".join(parts[:-1]) + (", and " if len(parts) > 2 else " and ") + parts[-1]


def relation(a: Thing, b: Thing) -> str:
    """Say where `a` is, seen from `b`, by grid cells: "above and to the left of".

    The text is empty only if both are in the same cell.
    """
    parts = []
    if a.row != b.row:
        parts.append("above" if a.row < b.row else "below")
    if a.column != b.column:
        parts.append("to the left of" if a.column < b.column else "to the right of")
    return " and ".join(parts)


# --- captions of images


def detailed_caption(scene: Scene, rng: random.Random) -> str:
    """Write a caption of one sentence for each object, with the relation of the first to the last and the largest."""
    n, where = len(scene.things), f"on a {scene.background} background"
    opening = rng.choice(
        (
            f"The image shows {_counted(n)} {where}.",
            f"There {'is' if n == 1 else 'are'} {_counted(n)} {where}.",
            f"This picture contains {_counted(n)} {where}.",
        )
    )
    sentences = [opening]
    verb = rng.choice(("is", "is", "sits", "appears"))
    turned = rng.random() < 0.25
    for thing in scene.things:
        place = f"{'in' if (thing.row, thing.column) == (1, 1) else 'at'} the {cell_name(thing.row, thing.column)}"
        sentences.append(
            _sentence(f"{place} there is {introduced(thing)}" if turned else f"{introduced(thing)} {verb} {place}")
        )
    if n > 1:
        first, last = scene.things[0], scene.things[-1]
        sentences.append(_sentence(f"{referred(first)} is {relation(first, last)} {referred(last)}"))
        largest = [t for t in scene.things if t.size == "large"]
        if len(largest) == 1:
            sentences.append(_sentence(f"{referred(largest[0])} is the largest object"))
    return " ".join(sentences)


def brief_caption(scene: Scene, rng: random.Random) -> str:
    """Write a caption of one sentence."""
    opening = rng.choice((f"A {scene.background} background with ", f"On a {scene.background} background, "))
    parts = [
        f"{introduced(t)} {'in' if (t.row, t.column) == (1, 1) else 'at'} the {cell_name(t.row, t.column)}"
        for t in scene.things
    ]
    return opening + _listed(parts) + "."


def item_list(scene: Scene, _rng: random.Random) -> str:
    """Write a numbered list of the objects, one a line."""
    return "\n".join(
        f"{i}. {_article(described(t)).capitalize()} {described(t)}, {cell_name(t.row, t.column)}."
        for i, t in enumerate(scene.things, 1)
    )


DETAILED = (
    "Describe the image.",
    "Describe this image in detail.",
    "What do you see in this image?",
    "What is in the image?",
    "Describe the picture.",
    "What does the picture show?",
    "Tell me what you see.",
)
BRIEF = ("Write a short caption.", "Caption this image.", "Describe the image briefly.", "Give a one sentence caption.")
LISTING = ("List the objects.", "List all objects in the image.", "Make a list of everything in the picture.")


# --- questions about images


def _unique(things: tuple[Thing, ...], key: str) -> list[Thing]:
    """Return the things whose attribute `key` no other thing shares."""
    values = [getattr(t, key) for t in things]
    return [t for t in things if values.count(getattr(t, key)) == 1]


def _ask_attribute(scene: Scene, rng: random.Random) -> Turn | None:
    """Ask for an attribute of an object with a unique shape; None if every shape occurs more than once."""
    by_shape = _unique(scene.things, "shape")
    if not by_shape:
        return None
    t = rng.choice(by_shape)
    attribute = rng.choice(("colour", "size", "texture", "place"))
    if attribute == "colour":
        q = rng.choice((f"What color is the {t.shape}?", f"Which color does the {t.shape} have?"))
        return Turn(q, f"The {t.shape} is {t.colour}.")
    if attribute == "size":
        return Turn(
            rng.choice((f"How big is the {t.shape}?", f"What size is the {t.shape}?")),
            f"The {t.colour} {t.shape} is {t.size}.",
        )
    if attribute == "texture":
        q = rng.choice((f"What texture does the {t.shape} have?", f"What pattern is on the {t.shape}?"))
        return Turn(q, f"The {t.colour} {t.shape} is {t.texture}.")
    q = rng.choice((f"Where is the {t.shape}?", f"In which part of the image is the {t.shape}?"))
    at = "in" if (t.row, t.column) == (1, 1) else "at"
    return Turn(q, f"The {t.colour} {t.shape} is {at} the {cell_name(t.row, t.column)} of the image.")


def _ask_cell(scene: Scene, rng: random.Random) -> Turn:
    """Return a question about the content of a random cell, and its answer. Three of four cells hold an object."""
    if rng.random() < 0.75:
        t = rng.choice(scene.things)
        row, column = t.row, t.column
    else:
        row, column = rng.randrange(3), rng.randrange(3)
    place = f"{'in' if (row, column) == (1, 1) else 'at'} the {cell_name(row, column)}"
    here = [t for t in scene.things if (t.row, t.column) == (row, column)]
    answer = f"{introduced(here[0])} is {place}" if here else f"there is nothing {place}"
    return Turn(rng.choice((f"What is {place}?", f"What do you see {place}?")), _sentence(answer))


def _ask_count(scene: Scene, rng: random.Random) -> Turn:
    """Ask for the number of objects: of all, of one colour, or of one shape."""
    if rng.random() < 0.5:
        n = len(scene.things)
        return Turn(
            rng.choice(("How many objects are there?", "How many objects are in the image?", "Count the objects.")),
            f"There {'is' if n == 1 else 'are'} {_counted(n)} in the image.",
        )
    if rng.random() < 0.6:
        colour = rng.choice([t.colour for t in scene.things] + [rng.choice(list(COLOURS))])
        matching, noun = [t for t in scene.things if t.colour == colour], f"{colour} object"
        question = f"How many {colour} objects are there?"
    else:
        shape = rng.choice([t.shape for t in scene.things] + [rng.choice(SHAPES)])
        matching, noun = [t for t in scene.things if t.shape == shape], shape
        question = f"How many {_plural(shape)} are there?"
    n = len(matching)
    if n == 0:
        return Turn(question, f"There are no {_plural(noun) if noun in SHAPES else noun + 's'} in the image.")
    number = f"{NUMBERS[n]} {noun if n == 1 else (_plural(noun) if noun in SHAPES else noun + 's')}"
    return Turn(question, f"There {'is' if n == 1 else 'are'} {number}: {_listed([introduced(t) for t in matching])}.")


def _ask_relation(scene: Scene, rng: random.Random) -> Turn | None:
    """Ask for the relative place or size of two objects; None if there is only one."""
    if len(scene.things) < 2:
        return None
    a, b = rng.sample(scene.things, 2)
    if rng.random() < 0.5:
        q = f"Where is {referred(a)} relative to {referred(b)}?"
        return Turn(q, _sentence(f"{referred(a)} is {relation(a, b)} {referred(b)}"))
    ranks = list(SIZES)
    question = f"Which is larger, {referred(a)} or {referred(b)}?"
    if a.size == b.size:
        return Turn(question, _sentence(f"{referred(a)} and {referred(b)} are about the same size: both are {a.size}"))
    big, little = (a, b) if ranks.index(a.size) > ranks.index(b.size) else (b, a)
    return Turn(
        question, _sentence(f"{referred(big)} is {big.size} and larger than {referred(little)}, which is {little.size}")
    )


def _ask_presence(scene: Scene, rng: random.Random) -> Turn:
    """Ask whether there is an object of some colour and shape; half of the questions take those of a real one."""
    if rng.random() < 0.5:
        t = rng.choice(scene.things)
        at = "in" if (t.row, t.column) == (1, 1) else "at"
        colour, shape = t.colour, t.shape
        answer = f"Yes, there is {introduced(t)} {at} the {cell_name(t.row, t.column)}."
    else:
        colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
        found = [t for t in scene.things if (t.colour, t.shape) == (colour, shape)]
        if found:
            t = found[0]
            at = "in" if (t.row, t.column) == (1, 1) else "at"
            answer = f"Yes, there is {introduced(t)} {at} the {cell_name(t.row, t.column)}."
        else:
            answer = f"No, there is no {colour} {shape} in the image."
    return Turn(f"Is there {_article(colour)} {colour} {shape}?", answer)


def _ask_background(scene: Scene, rng: random.Random) -> Turn:
    """Ask for the colour of the background."""
    return Turn(
        rng.choice(("What color is the background?", "Describe the background.")),
        f"The background is {scene.background}.",
    )


# --- clips


def _lane_name(scene: Scene, thing: Thing) -> str:
    """Name the row or column along which an object moves."""
    if scene.lanes == "rows":
        return f"along the {ROWS[thing.row]}"
    return f"along the {COLUMNS[thing.column]}" + ("" if thing.column == 1 else " side")


def _toward(direction: str) -> str:
    return f"to the {direction}" if direction in ("left", "right") else direction + "ward"


def _side(direction: str, *, behind: bool) -> str:
    """Name the edge of the frame that a motion heads for, or comes from if `behind`."""
    ahead = {"left": "left", "right": "right", "up": "top", "down": "bottom"}
    origin = {"left": "right", "right": "left", "up": "bottom", "down": "top"}
    return (origin if behind else ahead)[direction]


def moving(scene: Scene, thing: Thing) -> str:
    """Describe an object's motion as a verb phrase."""
    m, lane = thing.motion, _lane_name(scene, thing)
    if m.kind == "still":
        at = "in" if (thing.row, thing.column) == (1, 1) else "at"
        return f"stays still {at} the {cell_name(thing.row, thing.column)}"
    assert m.direction is not None
    if m.kind == "move":
        return f"moves {m.speed} {_toward(m.direction)} {lane}"
    if m.kind == "enter":
        return f"enters from the {_side(m.direction, behind=True)} {lane}"
    if m.kind == "leave":
        return f"leaves at the {_side(m.direction, behind=False)} {lane}"
    other = next(o for o in scene.things if o.motion.kind == "collide" and o is not thing)
    return f"moves {_toward(m.direction)} {lane}, collides with {referred(other)} and bounces back"


def video_caption(scene: Scene, rng: random.Random) -> str:
    """Write a caption of a clip with one sentence for each object."""
    n, where = len(scene.things), f"on a {scene.background} background"
    opening = rng.choice(
        (
            f"The video shows {_counted(n)} {where}.",
            f"In this clip there {'is' if n == 1 else 'are'} {_counted(n)} {where}.",
        )
    )
    return " ".join([opening, *(_sentence(f"{introduced(t)} {moving(scene, t)}") for t in scene.things)])


def brief_video_caption(scene: Scene, _rng: random.Random) -> str:
    """Write a caption of a clip in one sentence."""
    return (
        f"On a {scene.background} background, "
        + _listed([f"{introduced(t)} {moving(scene, t)}" for t in scene.things])
        + "."
    )


VIDEO = (
    "Describe the video.",
    "Describe this video in detail.",
    "What happens in the video?",
    "What happens in this clip?",
    "Caption this video.",
    "What do you see in the video?",
)
BRIEF_VIDEO = ("Write a short caption for the video.", "Describe the video briefly.")


def _ask_motion(scene: Scene, rng: random.Random) -> Turn:
    """Ask for the motion of an object."""
    t = rng.choice(scene.things)
    subject = referred(t)
    question = rng.choice((f"What does {subject} do?", f"How does {subject} move?", f"Where does {subject} go?"))
    return Turn(question, _sentence(f"{subject} {moving(scene, t)}"))


def _ask_event(scene: Scene, rng: random.Random) -> Turn:
    """Ask whether any object collides, enters, leaves or stays still."""
    kind, verb = rng.choice((("collide", "collide"), ("enter", "enter"), ("leave", "leave"), ("still", "stay still")))
    doing = [t for t in scene.things if t.motion.kind == kind]
    question = {
        "collide": "Do any objects collide?",
        "enter": "Does any object enter the frame?",
        "leave": "Does any object leave the frame?",
        "still": "Does any object stay still?",
    }[kind]
    if not doing:
        return Turn(
            question,
            f"No, no object{'s' if kind == 'collide' else ''} {verb if kind == 'collide' else moving_verb(kind)}.",
        )
    names = _listed([referred(t) for t in doing])
    plural = len(doing) > 1
    return Turn(question, f"Yes, {names} {verb if plural else moving_verb(kind)}.")


def moving_verb(kind: str) -> str:
    """Return the third person of the verb for a kind of motion."""
    return {"enter": "enters", "leave": "leaves", "still": "stays still", "collide": "collides"}[kind]


def _ask_video_count(scene: Scene, rng: random.Random) -> Turn:
    """Ask for the number of objects in a clip."""
    n = len(scene.things)
    question = rng.choice(("How many objects are in the video?", "How many objects appear in the clip?"))
    return Turn(
        question, f"There {'is' if n == 1 else 'are'} {_counted(n)}: {_listed([introduced(t) for t in scene.things])}."
    )


SMALL_TALK = (
    Turn("Hello!", "Hello! Show me an image or a short video of colored shapes and ask me about it."),
    Turn("Hi", "Hello! Show me an image or a short video of colored shapes and ask me about it."),
    Turn("Who are you?", "I am a small demo model. I describe images and short videos of colored shapes."),
    Turn("What can you do?", "I can describe images and short videos of colored shapes, count them and compare them."),
    Turn("Which shapes do you know?", f"I know {len(SHAPES)} shapes: {_listed([_plural(s) for s in SHAPES])}."),
    Turn("Which colors do you know?", f"I know {len(COLOURS)} colors: {_listed(list(COLOURS))}."),
)


def image_turn(scene: Scene, rng: random.Random, *, caption: bool = False) -> Turn:
    """Return a question about an image and its answer; it asks for a caption if `caption`, else for a detail."""
    kind = rng.random()
    if caption:
        if kind < 0.6:
            return Turn(rng.choice(DETAILED), detailed_caption(scene, rng))
        if kind < 0.85:
            return Turn(rng.choice(BRIEF), brief_caption(scene, rng))
        return Turn(rng.choice(LISTING), item_list(scene, rng))
    ask = rng.choices(
        (_ask_attribute, _ask_cell, _ask_count, _ask_relation, _ask_presence, _ask_background), (5, 3, 4, 4, 3, 1)
    )[0]
    return ask(scene, rng) or _ask_cell(scene, rng)


def video_turn(scene: Scene, rng: random.Random, *, caption: bool = False) -> Turn:
    """Return a question about a clip and its answer; it asks for a caption if `caption`, else for a detail."""
    if caption:
        if rng.random() < 0.75:
            return Turn(rng.choice(VIDEO), video_caption(scene, rng))
        return Turn(rng.choice(BRIEF_VIDEO), brief_video_caption(scene, rng))
    ask = rng.choices((_ask_motion, _ask_event, _ask_video_count, _ask_background), (6, 3, 1, 0.5))[0]
    return ask(scene, rng)


# --- parsing answers


@dataclass(frozen=True)
class Claim:
    """Hold an object that a caption introduces. `rest` is the rest of its clause: a place or a motion."""

    size: str
    colour: str
    texture: str
    shape: str
    rest: str


_INTRODUCTION = re.compile(
    rf"\ban? ({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) (?:({'|'.join(TEXTURES[1:])}) )?({'|'.join(SHAPES)})\b",
    re.IGNORECASE,
)


def named_objects(text: str) -> list[Claim]:
    """Parse every object that an answer introduces, with the rest of its clause.

    In "At the top left there is a ..." the rest is the start of the clause.
    """
    claims = []
    found = list(_INTRODUCTION.finditer(text))
    for i, match in enumerate(found):
        sentence_start = max(text.rfind(". ", 0, match.start()) + 1, text.rfind("\n", 0, match.start()) + 1)
        lead = text[sentence_start : match.start()].strip()
        end = found[i + 1].start() if i + 1 < len(found) else len(text)
        stop = text.find(".", match.end(), end)
        rest = text[match.end() : stop if stop >= 0 else end]
        if lead.lower().endswith("there is"):
            rest = lead[: -len("there is")]
        size, colour, texture, shape = match.groups()
        rest = re.sub(r",? and$", "", rest.strip()).strip(" ,")
        claims.append(Claim(size.lower(), colour.lower(), (texture or "solid").lower(), shape.lower(), rest))
    return claims


def claimed_place(claim: Claim) -> str | None:
    """Return the cell that a claim names, or None if it names none."""
    match = re.search(rf"\b(?:({'|'.join(ROWS)}) ({'|'.join(COLUMNS)})|(center))\b", claim.rest, re.IGNORECASE)
    return match.group(0).lower() if match else None
