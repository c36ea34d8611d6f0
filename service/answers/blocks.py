"""Groups the pieces of an answer into blocks of one kind, which APIs with typed output send one after another.

deltas    reasoning reasoning text text text call arguments arguments
blocks    |---------0--------|------1------|------------2-----------|
steps     Opened Added* Closed Opened ...
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from service.answers.events import ArgumentsDelta, Delta, ReasoningDelta, TextDelta, ToolCallStart

Kind = Literal["reasoning", "text", "call"]


@dataclass
class Block:
    """One block: its text, reasoning, or arguments. index: among all blocks of the answer, from 0."""

    index: int
    kind: Kind
    call: ToolCallStart | None = None  # of a block of kind "call"
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.pieces)


@dataclass(frozen=True, slots=True)
class Opened:
    """A block begins."""

    block: Block


@dataclass(frozen=True, slots=True)
class Added:
    """A piece was added to the last block."""

    block: Block
    text: str


@dataclass(frozen=True, slots=True)
class Closed:
    """A block is complete."""

    block: Block


Step = Opened | Added | Closed


class Blocks:
    """The blocks of an answer so far."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self._open: Block | None = None

    def feed(self, deltas: Iterable[Delta]) -> list[Step]:
        """Append what the parser found, and return what that did to the blocks."""
        steps: list[Step] = []
        for delta in deltas:
            match delta:
                case TextDelta():
                    steps += self._append("text", delta.text)
                case ReasoningDelta():
                    steps += self._append("reasoning", delta.text)
                case ToolCallStart():
                    steps += self._open_block("call", delta)
                case ArgumentsDelta():
                    steps += self._append("call", delta.text)
        return steps

    def finish(self) -> list[Step]:
        """Close the last block. An answer without any gets an empty text."""
        steps = [] if self.blocks else self._open_block("text")
        return steps + self._close()

    def _append(self, kind: Kind, text: str) -> list[Step]:
        steps = [] if self._open is not None and self._open.kind == kind else self._open_block(kind)
        block = self.blocks[-1]
        block.pieces.append(text)
        return [*steps, Added(block, text)]

    def _open_block(self, kind: Kind, call: ToolCallStart | None = None) -> list[Step]:
        steps = self._close()
        self._open = Block(len(self.blocks), kind, call)
        self.blocks.append(self._open)
        return [*steps, Opened(self._open)]

    def _close(self) -> list[Step]:
        block, self._open = self._open, None
        return [] if block is None else [Closed(block)]
