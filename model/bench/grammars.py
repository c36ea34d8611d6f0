"""`python -m model.bench.grammars`: what a grammar costs, and what speculation gains under it.

Answers the same prompts as free text and under each schema, with and without speculation, in turns. Time per token is
the decode time of an answer divided by its tokens after the first; each ratio is the median over the repeats of the
ratio taken within one repeat. Knows nothing of HTTP.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from model.bench import options as bench_options
from model.bench.workload import requests_of, scene
from model.config import EngineConfig
from model.demo import prompts
from model.demo.scenes import COLOURS, SHAPES
from model.engine.engine import Engine
from model.request import Grammar, Request, SamplingParams

FREE = "free text"
TASK: prompts.Task = "image caption"


def _record(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties),
        "additionalProperties": False,
    }


OBJECT = {"color": {"enum": list(COLOURS)}, "shape": {"enum": list(SHAPES)}}
BOX = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 999}, "minItems": 4, "maxItems": 4}
SCHEMAS: dict[str, dict[str, Any]] = {
    "caption": _record({"caption": {"type": "string", "maxLength": 200}}),
    "count and kind": _record({"count": {"type": "integer", "minimum": 0, "maximum": 9}, **OBJECT}),
    "objects": _record({"objects": {"type": "array", "items": _record(OBJECT), "minItems": 3, "maxItems": 5}}),
    "boxes": _record(
        {
            "detections": {
                "type": "array",
                "items": _record({"label": {"enum": list(SHAPES)}, "box": BOX}),
                "maxItems": 4,
            }
        }
    ),
    "text lines": _record(
        {
            "lines": {
                "type": "array",
                "items": _record({"text": {"type": "string", "maxLength": 40}, "confidence": {"enum": [0.5, 0.9]}}),
                "minItems": 2,
                "maxItems": 3,
            }
        }
    ),
}


@dataclass(frozen=True)
class Figures:
    """Figures of all answers of one kind in one repeat. seconds: per token; acceptance: tokens per verify step."""

    seconds: float
    acceptance: float
    tokens: float


def measure(engine: Engine, requests: list[Request], batch: int) -> tuple[Figures, list[list[int]]]:
    """Answer requests, `batch` at a time. Returns the figures and the token ids of every answer."""
    answers: dict[str, list[int]] = {request.request_id: [] for request in requests}
    seconds, steps, accepted, later = 0.0, 0, 0, 0
    for first in range(0, len(requests), batch):
        for request in requests[first : first + batch]:
            engine.add(request)
        while engine.has_work:
            for output in engine.step():
                answers[output.request_id] += [token.id for token in output.tokens]
                if output.finish_reason is not None and output.stats is not None:
                    stats = output.stats
                    seconds += stats.decode / batch
                    steps, accepted = steps + stats.drafts, accepted + stats.accepted_tokens
                    later += stats.completion_tokens - 1
    length = 1.0 + accepted / steps if steps else 1.0
    return Figures(seconds / max(1, later), length, (later + len(requests)) / len(requests)), list(answers.values())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m model.bench.grammars", description=__doc__)
    parser.add_argument("--model", default=EngineConfig.model)
    parser.add_argument("--draft", help="folder of a draft; default: the bundled one of a bundled model")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--schema", type=Path, action="append", default=[], help="file with a JSON schema of your own")
    chosen = parser.parse_args()
    schemas = {path.stem: json.loads(path.read_text()) for path in chosen.schema} or SCHEMAS
    engine = Engine(
        EngineConfig(model=chosen.model, draft=chosen.draft, threads=chosen.threads, max_num_seqs=chosen.batch)
    )
    kinds: dict[str, Grammar | None] = {FREE: None}
    kinds |= {name: Grammar("json_schema", json.dumps(schema)) for name, schema in schemas.items()}
    samples = [scene(number, TASK, chosen.max_tokens) for number in range(chosen.prompts)]

    def requests(grammar: Grammar | None, *, speculation: bool) -> list[Request]:
        """Build the requests of one kind of answer."""
        params = SamplingParams(max_tokens=chosen.max_tokens, temperature=chosen.temperature, grammar=grammar)
        return [replace(request, speculation=speculation) for request in requests_of(samples, params)]

    found: dict[str, list[tuple[Figures, Figures]]] = {name: [] for name in kinds}
    for repeat in range(1 + chosen.repeats):  # the first warms up
        for name, grammar in kinds.items():
            on, answers = measure(engine, requests(grammar, speculation=True), chosen.batch)
            off, plain = measure(engine, requests(grammar, speculation=False), chosen.batch)
            if answers != plain:
                raise SystemExit(f"{name}: answers differ with and without speculation")
            if repeat:
                found[name].append((on, off))
            print(f"\rrepeat {repeat} of {chosen.repeats}: {name:<20}", end="", flush=True)  # noqa: T201
    print("\r" + " " * 50)  # noqa: T201
    _print(found)


def _print(found: Mapping[str, list[tuple[Figures, Figures]]]) -> None:
    """Print a row for each kind of answer."""
    rows = [("answers", "tokens", "acceptance", "ms/token", "to free", "off: ms/token", "to free", "speed-up")]
    for name, repeats in found.items():
        free = found[FREE]
        on, off = repeats[-1]
        rows.append(
            (
                name,
                f"{on.tokens:.0f}",
                f"{on.acceptance:.2f}",
                f"{1e3 * statistics.median(o.seconds for o, _ in repeats):.2f}",
                f"{statistics.median(o.seconds / f.seconds for (o, _), (f, _) in zip(repeats, free, strict=True)):.2f}",
                f"{1e3 * statistics.median(o.seconds for _, o in repeats):.2f}",
                f"{statistics.median(o.seconds / f.seconds for (_, o), (_, f) in zip(repeats, free, strict=True)):.2f}",
                f"{statistics.median(p.seconds / o.seconds for o, p in repeats):.2f}",
            )
        )
    for row in rows:
        print(f"{row[0]:<16}" + "".join(f"{cell:>15}" for cell in row[1:]))  # noqa: T201


if __name__ == "__main__":
    bench_options.run_program(lambda _: main())
