"""Load another draft in a worker while its engine runs: read it in a thread, pack it between steps, then swap it in.

Each ReadDraft is answered once, with DraftReady or DraftRefused, unless another ReadDraft follows; the engine keeps its
draft until UseDraft. UseDraft is answered with DraftUsed, or with DraftRefused where that draft is not ready.
"""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from model.errors import ConfigError
from model.request import EngineInfo
from service import cores
from service.pool import messages as m

log = logging.getLogger("flashserve.worker")


class SwappableEngine(Protocol):
    """The part of an engine that changes drafts."""

    info: EngineInfo

    def read_draft(self, folder: str) -> Any: ...
    def pack_draft(self, draft: Any) -> Any: ...
    def swap(self, draft: Any) -> None: ...


@dataclass(frozen=True)
class DraftRead:
    """The result of a reading thread: the draft, or why it cannot be used."""

    number: int
    draft: Any
    refusal: str | None = None


class DraftLoader:
    """Loads one draft at a time; a later ReadDraft replaces one that was not used."""

    def __init__(
        self, engine: SwappableEngine, post: Callable[[DraftRead], None], send: Callable[[m.DraftReply], None]
    ) -> None:
        """post: passes a reading thread's result to `pack` in the engine's thread; send: to the API process."""
        self._engine, self._post, self._send = engine, post, send
        self._number: int | None = None
        self._packed: Any = None

    def read(self, message: m.ReadDraft) -> None:
        """Start a thread that reads the draft's folder."""
        self._number, self._packed = message.number, None
        threading.Thread(target=self._read, args=(message,), name="draft", daemon=True).start()

    def _read(self, message: m.ReadDraft) -> None:
        """Read a draft in its own thread and post the result."""
        cores.set_batch_scheduling()
        try:
            read = DraftRead(message.number, self._engine.read_draft(message.folder))
        except ConfigError as error:
            read = DraftRead(message.number, None, str(error))
        except Exception as error:
            log.exception("a draft could not be read")
            read = DraftRead(message.number, None, f"the draft could not be read: {type(error).__name__}")
        self._post(read)

    def pack(self, read: DraftRead) -> None:
        """Pack a draft for the engine's backend and report it ready, unless a later ReadDraft has replaced it."""
        if read.number != self._number:
            return
        refusal = read.refusal
        if refusal is None:
            try:
                self._packed = self._engine.pack_draft(read.draft)
            except Exception as error:  # most likely out of memory; the draft in use is untouched
                log.exception("a draft could not be packed")
                refusal = f"the draft could not be packed: {type(error).__name__}"
        if refusal is None:
            self._send(m.DraftReady(read.number))
        else:
            self._number = None
            self._send(m.DraftRefused(read.number, refusal))

    def use(self, message: m.UseDraft) -> None:
        """Swap the packed draft in; it is used from the next step on."""
        if message.number != self._number or self._packed is None:
            self._send(m.DraftRefused(message.number, "this draft is not ready here"))
            return
        self._engine.swap(self._packed)
        self._number = self._packed = None
        self._send(m.DraftUsed(message.number, self._engine.info))
        if self._engine.info.device != "cpu":
            # Recorded graphs and their drafter refer to each other, and objects frozen at start are never collected.
            gc.unfreeze()
            gc.collect()
            gc.freeze()

    def drop(self, message: m.DropDraft) -> None:
        """Forget a draft that will not be used."""
        if message.number == self._number:
            self._number = self._packed = None
