"""Reads a user's data, for training and for the benchmark: a folder of images and videos, or a JSONL file that names
them with prompts. Decodes nothing itself.

A JSONL file (a manifest) has one conversation a line; paths are relative to its folder:

    {"image": "cat.jpg", "prompt": "What is this?"}                    one file, or a list of them; also "video", or
    {"media": ["a.png", "b.mp4"], "prompt": "Compare the two."}        "media", told apart by what they are
    {"messages": [{"role": "user", "content": [                        a conversation of any length
        {"type": "image", "image": "cat.jpg"}, {"type": "text", "text": "What is this?"}]}]}

Answers at the end of "messages" are dropped: the target writes its own. Each line may also have "task", a name under
which its figures are shown, and "max_tokens", the longest answer when it is measured (training has one for all lines).
A line with any other key cannot be used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from model.errors import ConfigError
from model.request import Medium, Message
from model.train.data import Unusable

Kind = Literal["image", "video"]
Decode = Callable[[Path, Kind | None], Medium]  # None: whatever it is; raises Unusable, which names no path
KINDS: dict[str, Kind | None] = {"image": "image", "video": "video", "media": None}  # by a manifest's key
SUFFIXES: dict[str, Kind] = {
    **dict.fromkeys((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"), "image"),
    **dict.fromkeys((".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi"), "video"),
}
# Asked of the files of a folder where nobody says what to ask: long answers, then short ones.
DEFAULT_PROMPTS: dict[Kind, tuple[str, ...]] = {
    "image": (
        "Describe the image.",
        "What is in the image? Answer in detail.",
        "What is the most striking thing here?",
    ),
    "video": ("Describe the video.", "What happens in the video, from first to last?", "What moves in the video?"),
}


@dataclass(frozen=True)
class File:
    path: Path
    kind: Kind | None


@dataclass(frozen=True)
class Turn:
    role: Literal["system", "user", "assistant"]
    content: tuple[str | File, ...]


@dataclass(frozen=True)
class Item:
    """One conversation up to where the target answers. `where` names its file and line in messages."""

    turns: tuple[Turn, ...]
    where: str
    task: str | None = None
    max_tokens: int | None = None

    @property
    def files(self) -> tuple[File, ...]:
        return tuple(part for turn in self.turns for part in turn.content if isinstance(part, File))

    @property
    def kind(self) -> str:
        """The name under which figures of such prompts are put together: the task, else what the media are."""
        if self.task is not None:
            return self.task
        if len(self.files) != 1:
            return f"{len(self.files)} media" if self.files else "text"
        return self.files[0].kind or SUFFIXES.get(self.files[0].path.suffix.lower(), "image")

    def messages(self, decode: Decode) -> tuple[Message, ...]:
        """Decode the media. Raises Unusable, which names line and file."""
        return tuple(
            Message(turn.role, tuple(self._decoded(part, decode) for part in turn.content)) for turn in self.turns
        )

    def _decoded(self, part: str | File, decode: Decode) -> str | Medium:
        if isinstance(part, str):
            return part
        try:
            return decode(part.path, part.kind)
        except Unusable as error:
            named = self.where if self.where == str(part.path) else f"{self.where}: {part.path}"
            raise Unusable(f"{named}: {error}") from error


@dataclass(frozen=True)
class Data:
    """What was read: items, and what could not be used, one line each."""

    items: tuple[Item, ...]
    problems: tuple[str, ...]
    root: Path


def read(path: Path, prompts: Sequence[str] = ()) -> Data:
    """A folder, each of its files with each of the prompts; or a manifest. ConfigError where nothing can be read."""
    if path.is_dir():
        data = Data(tuple(_of_folder(path, prompts)), (), path)
    elif path.is_file():
        if prompts:
            raise ConfigError("--prompt goes with a folder; a manifest says itself what is asked")
        data = _of_manifest(path)
    else:
        raise ConfigError(f"data {str(path)!r} is neither a folder nor a JSONL file")
    if not data.items:
        lines = "".join(f"\n  {problem}" for problem in data.problems[:10])
        raise ConfigError(f"data {str(path)!r} holds no prompt that can be used{lines}")
    return data


def _of_folder(folder: Path, prompts: Sequence[str]) -> Iterator[Item]:
    number = 0
    for path in sorted(folder.rglob("*")):
        kind = SUFFIXES.get(path.suffix.lower())
        if kind is None or not path.is_file():
            continue
        known = DEFAULT_PROMPTS[kind]
        for prompt in prompts or (known[number % len(known)],):
            yield Item((Turn("user", (File(path, kind), prompt)),), str(path))
        number += 1


def _of_manifest(manifest: Path) -> Data:
    items: list[Item] = []
    problems: list[str] = []
    for number, line in enumerate(manifest.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        where = f"{manifest.name}:{number}"
        try:
            item = _item(json.loads(line), where, manifest.parent)
            if missing := [file for file in item.files if not file.path.is_file()]:
                raise ValueError(f"{missing[0].kind or 'media'}: no such file: {missing[0].path}")
        except json.JSONDecodeError as error:
            problems.append(f"{where}: not JSON: {error.msg} (column {error.colno})")
        except ValueError as error:  # also of bytes that are not UTF-8
            problems.append(f"{where}: {error}")
        else:
            items.append(item)
    return Data(tuple(items), tuple(problems), manifest.parent)


def _item(row: Any, where: str, folder: Path) -> Item:
    """Check one line. Raises ValueError, which names the field."""
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    known = {"task", "max_tokens"} | ({"messages"} if "messages" in row else {"prompt", *KINDS})
    if unknown := sorted(row.keys() - known):  # a misspelt "image" would teach to answer without it
        raise ValueError(f"unknown key {unknown[0]!r}; known here: {', '.join(sorted(known))}")
    task, max_tokens = row.get("task"), row.get("max_tokens")
    if "task" in row:
        _text(row, "task")
    if "max_tokens" in row and (type(max_tokens) is not int or max_tokens < 1):
        raise ValueError(f"max_tokens: must be a whole number, at least 1; got {max_tokens!r}")
    return Item(_turns(row, folder), where, task, max_tokens)


def _turns(row: dict[str, Any], folder: Path) -> tuple[Turn, ...]:
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
    value = row.get(name)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name}: must be a text that is not empty" if name in row else f"{name}: is missing")
    return value


def _paths(row: dict[str, Any], name: str) -> list[str]:
    value = row.get(name, [])
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise ValueError(f"{name}: must be a path or a list of paths; got {json.dumps(value)}")
    return paths


def _turn(message: Any, folder: Path) -> Turn:
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
    """Items as `model.train.data.Prompts`: split by hash, decoded when asked for."""

    def __init__(self, data: Data, decode: Decode, held_out: float) -> None:
        """held_out: share of the data that is only measured on. What shares a file is on one side of the split."""
        if not 0.0 < held_out < 1.0:
            raise ConfigError(f"--held-out must be between 0 and 1; got {held_out}")
        self._data, self._decode = data, decode
        places = [self._place(item) for item in data.items]
        distinct = sorted(set(places))
        if len(distinct) < 2:
            raise ConfigError("the data are too few: one file to learn from and another to measure on are the least")
        border = min(max(held_out, distinct[0]), distinct[-2])  # there is something on either side
        self.held_out = [number for number, place in enumerate(places) if place <= border]
        self.train = [number for number, place in enumerate(places) if place > border]

    def _place(self, item: Item) -> float:
        """From 0 to 1, by the first file, or where there is none by the text."""
        lines = self._named(item.files[0]) if item.files else str(item.turns)
        return int.from_bytes(hashlib.sha256(lines.encode()).digest()[:6], "big") / (1 << 48)

    def _named(self, file: File) -> str:
        """Its path as seen from the data, so that these may be moved."""
        inside = file.path.is_relative_to(self._data.root)
        return (file.path.relative_to(self._data.root) if inside else file.path).as_posix()

    @cached_property
    def digest(self) -> str:
        """Of what is asked about which files, and of the files' sizes."""
        digest = hashlib.sha256(json.dumps([self.held_out]).encode())
        for item in self._data.items:
            for turn in item.turns:
                parts = [
                    [self._named(p), p.kind, p.path.stat().st_size] if isinstance(p, File) else p for p in turn.content
                ]
                digest.update(json.dumps([turn.role, parts]).encode())
            if item.task is not None:
                digest.update(json.dumps([item.task]).encode())
        return digest.hexdigest()[:16]

    @property
    def summary(self) -> str:
        kinds = [self.kind(number) for number in range(len(self._data.items))]
        counts = ", ".join(f"{kinds.count(kind)} of {kind}" for kind in sorted(set(kinds)))
        return (
            f"{len(kinds)} prompts ({counts}); {len(self.train)} learnt from, {len(self.held_out)} held out; "
            f"{len(self._data.problems)} left out when read"
        )

    def kind(self, number: int) -> str:
        return self._data.items[number].kind

    def messages(self, number: int) -> tuple[Message, ...]:
        return self._data.items[number].messages(self._decode)
