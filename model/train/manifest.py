"""Read a user's data for training and for benchmarks: a folder of images and videos, or a JSONL file (a manifest).

This module decodes no media; a `Decode` function does. A manifest has one conversation a line, with paths relative to
its folder:

    {"image": "cat.jpg", "prompt": "What is this?"}                    one file, or a list of them; also "video", or
    {"media": ["a.png", "b.mp4"], "prompt": "Compare the two."}        "media", whose kind is detected from the file
    {"messages": [{"role": "user", "content": [                        a conversation of any length
        {"type": "image", "image": "cat.jpg"}, {"type": "text", "text": "What is this?"}]}]}

Answers at the end of "messages" are dropped, because the target writes its own. A line may also have "task", a name
under which its figures are reported, and "max_tokens", the longest answer in a benchmark (training has one limit for
all lines). Where `Forms` are passed, it may have the fields of a request that bind the answer to a form, such as
"response_format". A line with any other key is rejected.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from model.errors import ConfigError
from model.request import Grammar, GrammarKind, Medium, Message
from model.train.data import Unusable

Kind = Literal["image", "video"]
Decode = Callable[[Path, Kind | None], Medium]  # kind None: detect it; raises Unusable without naming the path
KINDS: dict[str, Kind | None] = {"image": "image", "video": "video", "media": None}  # manifest key -> kind
FORM_NAMES: dict[GrammarKind, str] = {  # in the names of groups
    **{"json_schema": "JSON", "json_object": "JSON", "regex": "regex", "choice": "choice"},
    **{"lark": "grammar", "gbnf": "grammar"},
}
SUFFIXES: dict[str, Kind] = {
    **dict.fromkeys((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"), "image"),
    **dict.fromkeys((".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi"), "video"),
}
# Prompts for the files of a folder if the user passes none; they ask for long answers first, then shorter ones.
DEFAULT_PROMPTS: dict[Kind, tuple[str, ...]] = {
    "image": (
        "Describe the image.",
        "What is in the image? Answer in detail.",
        "What is the most striking thing here?",
    ),
    "video": ("Describe the video.", "What happens in the video, from first to last?", "What moves in the video?"),
}


@dataclass(frozen=True)
class Forms:
    """Know the fields of a request that bind its answer to a form.

    fields: their names. grammar: returns what a line's fields say; raises ValueError, naming the field.
    """

    fields: frozenset[str] = frozenset()
    grammar: Callable[[Mapping[str, Any]], Grammar | None] = lambda _: None


@dataclass(frozen=True)
class File:
    """Name a media file and its kind; None means that the decoder detects the kind."""

    path: Path
    kind: Kind | None


@dataclass(frozen=True)
class Turn:
    """Hold one message of a conversation, with files that are not yet decoded."""

    role: Literal["system", "user", "assistant"]
    content: tuple[str | File, ...]


@dataclass(frozen=True)
class Item:
    """Hold one conversation up to the point where the target answers.

    where: its file and line, for error messages. grammar: of its answer, None if that may be any text.
    """

    turns: tuple[Turn, ...]
    where: str
    task: str | None = None
    max_tokens: int | None = None
    grammar: Grammar | None = None

    @property
    def files(self) -> tuple[File, ...]:
        """List the media files of all turns, in order."""
        return tuple(part for turn in self.turns for part in turn.content if isinstance(part, File))

    @property
    def kind(self) -> str:
        """Name the group in which its figures are reported: its task, else its media and form, such as "image",
        "2 media" or "image, JSON"."""
        if self.task is not None:
            return self.task
        return self._media if self.grammar is None else f"{self._media}, {FORM_NAMES[self.grammar.kind]}"

    @property
    def _media(self) -> str:
        if len(self.files) != 1:
            return f"{len(self.files)} media" if self.files else "text"
        return self.files[0].kind or SUFFIXES.get(self.files[0].path.suffix.lower(), "image")

    def messages(self, decode: Decode) -> tuple[Message, ...]:
        """Decode the media and return the messages. Raises Unusable, naming line and file."""
        return tuple(
            Message(turn.role, tuple(self._decoded(part, decode) for part in turn.content)) for turn in self.turns
        )

    def _decoded(self, part: str | File, decode: Decode) -> str | Medium:
        """Decode one part if it is a file. Raises Unusable, naming the line and the file."""
        if isinstance(part, str):
            return part
        try:
            return decode(part.path, part.kind)
        except Unusable as error:
            named = self.where if self.where == str(part.path) else f"{self.where}: {part.path}"
            raise Unusable(f"{named}: {error}") from error


@dataclass(frozen=True)
class Data:
    """Hold the items that were read, and one line for each line of the manifest that could not be used."""

    items: tuple[Item, ...]
    problems: tuple[str, ...]
    root: Path


def read(
    path: Path,
    prompts: Sequence[str] = (),
    *,
    forms: Forms | None = None,
    grammars: Sequence[Grammar] = (),
    grammar_share: float = 0.0,
) -> Data:
    """Read a folder, combining each of its files with each prompt; or read a manifest.

    Without prompts, each file of a folder gets one of DEFAULT_PROMPTS in turn. forms: the fields that a line of a
    manifest may have to bind its answer. grammars, grammar_share: the answers to this share of a folder's prompts
    follow one of these grammars each. Raises ConfigError if `path` does not exist, if prompts or grammars are passed
    together with a manifest, or if no prompt can be used.
    """
    if path.is_dir():
        data = Data(tuple(_bound(_of_folder(path, prompts), grammars, grammar_share)), (), path)
    elif path.is_file():
        if prompts:
            raise ConfigError("--prompt goes with a folder; a manifest says itself what is asked")
        if grammars:
            raise ConfigError("--json-schema goes with a folder; a line of a manifest has its own response_format")
        data = _of_manifest(path, forms or Forms())
    else:
        raise ConfigError(f"data {str(path)!r} is neither a folder nor a JSONL file")
    if not data.items:
        lines = "".join(f"\n  {problem}" for problem in data.problems[:10])
        raise ConfigError(f"data {str(path)!r} holds no prompt that can be used{lines}")
    return data


def _of_folder(folder: Path, prompts: Sequence[str]) -> Iterator[Item]:
    """Yield an item for each media file of a folder and its subfolders, and for each prompt."""
    number = 0
    for path in sorted(folder.rglob("*")):
        kind = SUFFIXES.get(path.suffix.lower())
        if kind is None or not path.is_file():
            continue
        known = DEFAULT_PROMPTS[kind]
        for prompt in prompts or (known[number % len(known)],):
            yield Item((Turn("user", (File(path, kind), prompt)),), str(path))
        number += 1


def _bound(items: Iterator[Item], grammars: Sequence[Grammar], share: float) -> Iterator[Item]:
    """Let a share of the items, drawn by number, have answers that follow one of the grammars."""
    for number, item in enumerate(items):
        rng = random.Random(number)
        yield replace(item, grammar=rng.choice(grammars)) if grammars and rng.random() < share else item


def _of_manifest(manifest: Path, forms: Forms) -> Data:
    """Parse a manifest line by line; a bad line becomes a problem and does not stop the others."""
    items: list[Item] = []
    problems: list[str] = []
    for number, line in enumerate(manifest.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        where = f"{manifest.name}:{number}"
        try:
            item = _item(json.loads(line), where, manifest.parent, forms)
            if missing := [file for file in item.files if not file.path.is_file()]:
                raise ValueError(f"{missing[0].kind or 'media'}: no such file: {missing[0].path}")
        except json.JSONDecodeError as error:
            problems.append(f"{where}: not JSON: {error.msg} (column {error.colno})")
        except ValueError as error:  # json.loads also raises it for bytes that are not UTF-8
            problems.append(f"{where}: {error}")
        else:
            items.append(item)
    return Data(tuple(items), tuple(problems), manifest.parent)


def _item(row: Any, where: str, folder: Path, forms: Forms) -> Item:
    """Check one parsed line and convert it to an item. Raises ValueError, naming the field."""
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    known = {"task", "max_tokens"} | ({"messages"} if "messages" in row else {"prompt", *KINDS})
    # A misspelt "image" would train on answers written without the image.
    if unknown := sorted(row.keys() - known - forms.fields):
        others = "; and a request's fields for the form of its answer, such as response_format" if forms.fields else ""
        raise ValueError(f"unknown key {unknown[0]!r}; known here: {', '.join(sorted(known))}{others}")
    task, max_tokens = row.get("task"), row.get("max_tokens")
    if "task" in row:
        _text(row, "task")
    if "max_tokens" in row and (type(max_tokens) is not int or max_tokens < 1):
        raise ValueError(f"max_tokens: must be a whole number, at least 1; got {max_tokens!r}")
    grammar = forms.grammar({name: row[name] for name in row if name in forms.fields})
    return Item(_turns(row, folder), where, task, max_tokens, grammar)


def _turns(row: dict[str, Any], folder: Path) -> tuple[Turn, ...]:
    """Convert one line's fields to turns, without the assistant's last answers. Paths are relative to `folder`.

    Raises ValueError where a field is wrong, or where the user did not speak last.
    """
    if "messages" in row:
        if not isinstance(row["messages"], list):
            raise ValueError("messages: must be a list")
        turns = [_turn(message, folder) for message in row["messages"]]
        while turns and turns[-1].role == "assistant":
            turns.pop()
    else:
        prompt = _text(row, "prompt")
        files = [File(folder / path, kind) for name, kind in KINDS.items() for path in _paths(row, name)]
        turns = [Turn("user", (*files, prompt))]
    if not turns or turns[-1].role != "user":
        raise ValueError("nothing for the target to answer: the last message must be the user's")
    return tuple(turns)


def _text(row: dict[str, Any], name: str) -> str:
    """Return a field that must be a text and not empty. Raises ValueError, naming the field."""
    value = row.get(name)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name}: must be a text that is not empty" if name in row else f"{name}: is missing")
    return value


def _paths(row: dict[str, Any], name: str) -> list[str]:
    """Return the paths of a field, one or a list, or none if it is missing. Raises ValueError, naming the field."""
    value = row.get(name, [])
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise ValueError(f"{name}: must be a path or a list of paths; got {json.dumps(value)}")
    return paths


def _turn(message: Any, folder: Path) -> Turn:
    """Check one entry of "messages" and convert it to a turn. Raises ValueError, naming the field."""
    if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
        raise ValueError('messages: each needs a "role": system, user or assistant')
    role, content = message["role"], message.get("content")
    if isinstance(content, str):
        return Turn(role, (content,))
    if not isinstance(content, list):
        raise ValueError("messages: content must be a text or a list of parts")
    parts: list[str | File] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "image", "video"):
            raise ValueError('messages: a part\'s "type" must be text, image or video')
        value = _text(part, kind)
        parts.append(value if kind == "text" else File(folder / value, kind))
    return Turn(role, tuple(parts))


class FilePrompts:
    """Offer items as `model.train.data.Prompts`: split by hash, decoded on demand."""

    def __init__(self, data: Data, decode: Decode, held_out: float) -> None:
        """Split the items into training and held-out prompts.

        held_out: share of the data that is only measured on. Items with the same first file are on the same side of the
        split. Raises ConfigError if the share is not between 0 and 1, or if all items have the same first file.
        """
        if not 0.0 < held_out < 1.0:
            raise ConfigError(f"--held-out must be between 0 and 1; got {held_out}")
        self._data, self._decode = data, decode
        places = [self._place(item) for item in data.items]
        distinct = sorted(set(places))
        if len(distinct) < 2:
            raise ConfigError("the data are too few: one file to learn from and another to measure on are the least")
        border = min(max(held_out, distinct[0]), distinct[-2])  # so that neither side is empty
        self.held_out = [number for number, place in enumerate(places) if place <= border]
        self.train = [number for number, place in enumerate(places) if place > border]

    def _place(self, item: Item) -> float:
        """Hash an item to a number from 0 to 1 by its first file, or by its text if it has no file."""
        lines = self._named(item.files[0]) if item.files else str(item.turns)
        return int.from_bytes(hashlib.sha256(lines.encode()).digest()[:6], "big") / (1 << 48)

    def _named(self, file: File) -> str:
        """Return a file's path relative to the data's root, so that moving the data does not change the split."""
        inside = file.path.is_relative_to(self._data.root)
        return (file.path.relative_to(self._data.root) if inside else file.path).as_posix()

    @cached_property
    def digest(self) -> str:
        """Hash prompts, tasks, grammars, file names and file sizes, together with the split."""
        digest = hashlib.sha256(json.dumps([self.held_out]).encode())
        for item in self._data.items:
            for turn in item.turns:
                parts = [
                    [self._named(p), p.kind, p.path.stat().st_size] if isinstance(p, File) else p for p in turn.content
                ]
                digest.update(json.dumps([turn.role, parts]).encode())
            if item.task is not None:
                digest.update(json.dumps([item.task]).encode())
            if item.grammar is not None:
                digest.update(json.dumps([item.grammar.kind, item.grammar.source]).encode())
        return digest.hexdigest()[:16]

    @property
    def summary(self) -> str:
        """Describe the data in one line for the model card."""
        kinds = [self.kind(number) for number in range(len(self._data.items))]
        counts = ", ".join(f"{kinds.count(kind)} of {kind}" for kind in sorted(set(kinds)))
        return (
            f"{len(kinds)} prompts ({counts}); {len(self.train)} learnt from, {len(self.held_out)} held out; "
            f"{len(self._data.problems)} left out when read"
        )

    def kind(self, number: int) -> str:
        """Return the group, such as "image" or a task, in which an item's figures are reported."""
        return self._data.items[number].kind

    def grammar(self, number: int) -> Grammar | None:
        """Return the grammar of one item's answer. Its errors name the line."""
        item = self._data.items[number]
        return item.grammar and replace(item.grammar, param=f"{item.where}: {item.grammar.param}")

    def messages(self, number: int) -> tuple[Message, ...]:
        """Decode the media of one item. Raises Unusable, naming line and file."""
        return self._data.items[number].messages(self._decode)
