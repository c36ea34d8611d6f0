"""Run requests that join and leave an engine, one of them aborted and slots moved, and print all answers as JSON.

    python -m tests.model.comings OPTIONS FAMILY

OPTIONS are those of an engine, as JSON; FAMILY is `llava` or `qwen`. The requests run three times: without a draft,
with the engine's draft, and with an oracle's. An engine whose layers are spread over processes needs a process of its
own.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from model.config import EngineConfig
from model.engine.engine import Engine
from tests.model import tiny, tiny_qwen
from tests.model.oracle import OracleDrafter


class Comings:
    """Send requests to an engine at fixed steps and collect their answers."""

    def __init__(self, engine: Engine, family: Any, *, speculation: bool = True) -> None:
        self.engine, self.family, self.speculation = engine, family, speculation
        self.said: dict[str, list[int]] = {}

    def ask(self, number: int, **params: Any) -> None:
        """Add request `number`; `params` are sampling parameters besides its length, seed and end of sequence."""
        medium = self.family.video(number) if number % 3 == 2 else self.family.image(number)
        self.said[str(number)] = []
        params |= {"max_tokens": 8 + 3 * number, "seed": number, "ignore_eos": False}
        content = (medium, f"What is it, number {number}?")
        self.engine.add(tiny.ask(str(number), *content, speculation=self.speculation, **params))

    def steps(self, count: int) -> None:
        """Run up to `count` steps, or all until the engine is idle if `count` is negative."""
        while count and self.engine.has_work:
            for output in self.engine.step():
                self.said[output.request_id] += [token.id for token in output.tokens]
            count -= 1

    def play(self) -> dict[str, list[int]]:
        """Run the whole sequence of requests and return the tokens of each, without the aborted one."""
        for number in range(3):
            self.ask(number)
        self.steps(5)
        self.ask(3, temperature=0.8, top_p=0.9)
        self.ask(4)
        self.steps(4)
        self.engine.abort("1")
        self.steps(3)
        self.ask(5, temperature=1.0)
        self.steps(-1)
        del self.said["1"]  # its length at the abort depends on the tokens of each step
        self.engine.cache.check_integrity()
        return self.said


def answers(options: dict[str, Any], family: str) -> dict[str, Any]:
    """Run the requests three times on a new engine; return all answers, its number of KV heads and its free slots."""
    engine, kind = Engine(EngineConfig(**options)), {"llava": tiny, "qwen": tiny_qwen}[family]
    plain = Comings(engine, kind, speculation=False).play()
    said = Comings(engine, kind).play()
    # Its trees have paths of every length accepted at times.
    engine.use(OracleDrafter(engine, {**said, "1": [0] * 64}, 0, truth=0.6))
    guided = Comings(engine, kind).play()
    free = engine.cache.num_free
    return {"plain": plain, "said": said, "guided": guided, "heads": engine.cache.num_heads, "free": free}


if __name__ == "__main__":
    print(json.dumps(answers(json.loads(sys.argv[1]), sys.argv[2])))
