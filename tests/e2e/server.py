"""`flashserve serve` on the real engine, and a crowd of clients that ask it all at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx

from loadtest.client import Answer, Question, Variant, ask
from tests.service.server import Server

CLIENT_SECONDS = 120


class EngineServer(Server):
    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.settings = settings
        super().__init__(folder, {}, {"engine": "service.pool.worker:load_engine", **settings})
        self.http.timeout = httpx.Timeout(CLIENT_SECONDS)

    def wait(self, condition: Callable[[], Any], seconds: float = 30.0) -> Any:
        return super().wait(condition, seconds)

    def _await(self, condition: Callable[[], Any], seconds: float = 240.0) -> Any:
        """torch and transformers take their time to load, above all on a machine that has other work."""
        return super()._await(condition, seconds)

    def ask(self, question: Question, way: Variant | None = None) -> Answer:
        (answer,) = self.ask_all([(question, way or Variant())])
        return answer

    def text(self, question: Question, way: Variant | None = None) -> str:
        answer = self.ask(question, way)
        assert answer.status == 200, answer.error
        assert not answer.error
        return answer.texts[0]

    def ask_all(self, questions: Sequence[tuple[Question, Variant]]) -> list[Answer]:
        """All at once; the answers in the order of the questions."""

        async def crowd() -> list[Answer]:
            async with httpx.AsyncClient(base_url=self.url, timeout=CLIENT_SECONDS) as client:
                return list(await asyncio.gather(*(ask(client, question, way) for question, way in questions)))

        return asyncio.run(crowd())

    def wait_idle(self) -> None:
        """Nothing is running, and what the engine counted has been reported."""
        self.wait(lambda: self.health()["requests"] == 0 and self.metric("flash_requests_running") == 0)
