"""The worker's side of a change of draft: read beside the engine, packed between two steps, and used when told to.

Every ReadDraft is answered once, with DraftReady or DraftRefused, unless another follows; until UseDraft nothing has
changed. UseDraft is answered with DraftUsed, or with DraftRefused where that draft is not ready here.
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


class Engine(Protocol):
    """What a change asks of an engine."""

    info: EngineInfo

    def read_draft(self, folder: str) -> Any: ...
    def pack_draft(self, draft: Any) -> Any: ...
    def swap(self, draft: Any) -> None: ...


@dataclass(frozen=True)
class DraftRead:
    """What a reading thread has to say to the engine's: the draft, or why there is none."""

    number: int
    draft: Any
    refusal: str | None = None


class IncomingDraft:
    """At most one at a time: a later one takes the place of one that was not used."""

    def __init__(
        self, engine: Engine, tell: Callable[[DraftRead], None], send: Callable[[m.DraftAnswer], None]
    ) -> None:
        """`tell`: brings what a thread has read to `take`, in the engine's thread."""
        self._engine, self._tell, self._send = engine, tell, send
        self._number: int | None = None
        self._packed: Any = None

    def read(self, message: m.ReadDraft) -> None:
        self._number, self._packed = message.number, None
        threading.Thread(target=self._read, args=(message,), name="draft", daemon=True).start()

    def _read(self, message: m.ReadDraft) -> None:
        cores.give_way()
        try:
            read = DraftRead(message.number, self._engine.read_draft(message.folder))
        except ConfigError as error:
            read = DraftRead(message.number, None, str(error))
        except Exception as error:
            log.exception("a draft could not be read")
            read = DraftRead(message.number, None, f"the draft could not be read: {type(error).__name__}")
        self._tell(read)

    def take(self, read: DraftRead) -> None:
        """What was read is packed, if it is still wanted."""
        if read.number != self._number:
            return
        refusal = read.refusal
        if refusal is None:
            try:
                self._packed = self._engine.pack_draft(read.draft)
            except Exception as error:  # memory, above all; the old one is untouched
                log.exception("a draft could not be packed")
                refusal = f"the draft could not be packed: {type(error).__name__}"
        if refusal is None:
            self._send(m.DraftReady(read.number))
        else:
            self._number = None
            self._send(m.DraftRefused(read.number, refusal))

    def use(self, message: m.UseDraft) -> None:
        if message.number != self._number or self._packed is None:
            self._send(m.DraftRefused(message.number, "this draft is not ready here"))
            return
        self._engine.swap(self._packed)
        self._number = self._packed = None
        self._send(m.DraftUsed(message.number, self._engine.info))
        if self._engine.info.device != "cpu":
            # Recorded passes and their drafter hold each other, and what was frozen at start is never collected.
            gc.unfreeze()
            gc.collect()
            gc.freeze()

    def drop(self, message: m.DropDraft) -> None:
        if message.number == self._number:
            self._number = self._packed = None
