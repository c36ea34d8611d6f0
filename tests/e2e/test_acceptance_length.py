"""`acceptance_length` is one figure: of an answer, of the histogram and of the counters, wherever an answer ends."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model.config import DEMO_WEIGHTS
from tests.e2e.conftest import FEW_SLOTS
from tests.e2e.server import EngineServer

MEDIA = DEMO_WEIGHTS.parent / "media"
COUNTS = (
    *("flash_generation_tokens_total", "flash_acceptance_length_sum", "flash_acceptance_length_count"),
    *("flash_spec_drafts_total", "flash_spec_draft_tokens_total", "flash_spec_accepted_tokens_total"),
    "flash_spec_accepted_tokens_per_position_total",
)


@pytest.fixture(scope="module")
def ngram_server() -> Iterator[EngineServer]:
    """Drafts of any length, and steps without one: it proposes what was said before, where anything was."""
    with tempfile.TemporaryDirectory() as folder:
        server = EngineServer(Path(folder), {"drafter": "ngram", "adaptive_drafting": False, **FEW_SLOTS})
        yield server
        assert server.close() == 0


def counted(server: EngineServer) -> dict[str, float]:
    return {name: server.metric(name) for name in COUNTS}


def growth(server: EngineServer, before: dict[str, float], num_tokens: int) -> dict[str, float]:
    """What was counted since, once the engine has reported all of these tokens."""
    name = "flash_generation_tokens_total"
    server.wait(lambda: server.metric(name) - before[name] == num_tokens)
    return {name: value - before[name] for name, value in counted(server).items()}


@pytest.mark.parametrize("which", ["demo_server", "ngram_server"])
@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 1},
        {"max_tokens": 2},
        {"max_tokens": 3},
        {"max_tokens": 8},
        {},
        {"temperature": 1.0, "seed": 7},
        {"temperature": 0.7, "top_p": 0.9, "seed": 8, "max_tokens": 13},
        {"ignore_eos": "true", "max_tokens": 90},
        {"stop": "on", "max_tokens": 40},
        {"speculation": "off", "max_tokens": 8},
    ],
    ids=lambda fields: ",".join(f"{name}={value}" for name, value in fields.items()) or "whole",
)
def test_an_answer_says_what_the_histogram_and_the_counters_say(
    which: str, fields: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    """Three tokens, of which one verify step gave two, were told as 3.0."""
    server: EngineServer = request.getfixturevalue(which)
    before = counted(server)
    files = {"media": (MEDIA / "scene.png").read_bytes()}
    answer = server.http.post("/v1/generate", data={"prompt": "Describe the image.", **fields}, files=files).json()
    speculation, num_tokens = answer["speculation"], answer["usage"]["completion_tokens"]
    grown = growth(server, before, num_tokens)
    drafts, emitted = grown["flash_acceptance_length_count"], grown["flash_acceptance_length_sum"]
    assert drafts == speculation["drafts"] == grown["flash_spec_drafts_total"]
    assert emitted == drafts + speculation["accepted_tokens"] <= num_tokens - 1, "the first token is of the prompt"
    assert speculation["accepted_tokens"] == grown["flash_spec_accepted_tokens_total"]
    assert speculation["accepted_tokens"] == grown["flash_spec_accepted_tokens_per_position_total"]
    assert speculation["acceptance_length"] == pytest.approx(emitted / drafts if drafts else 1.0, rel=1e-12)
    if which == "demo_server" and fields.get("speculation") != "off" and num_tokens > 2:
        assert drafts > 0
    if num_tokens == 3 and drafts == 1:
        assert speculation["acceptance_length"] in (1.0, 2.0)


@pytest.mark.parametrize("which", ["demo_server", "ngram_server"])
def test_several_choices_are_counted_together(which: str, request: pytest.FixtureRequest) -> None:
    server: EngineServer = request.getfixturevalue(which)
    before = counted(server)
    answer = server.chat("Describe a red circle.", n=2, temperature=1, seed=3, max_tokens=21, ignore_eos=True).json()
    details = answer["usage"]["completion_tokens_details"]
    grown = growth(server, before, answer["usage"]["completion_tokens"])
    assert answer["usage"]["completion_tokens"] == 42
    assert details["accepted_prediction_tokens"] == grown["flash_spec_accepted_tokens_total"]
    drafts, emitted = grown["flash_acceptance_length_count"], grown["flash_acceptance_length_sum"]
    assert emitted == drafts + details["accepted_prediction_tokens"] <= 40
    proposed = details["accepted_prediction_tokens"] + details["rejected_prediction_tokens"]
    assert proposed == grown["flash_spec_draft_tokens_total"]


def test_tokens_are_of_the_draft_as_they_are_counted(demo_server: EngineServer) -> None:
    """Also in the step that the end cuts short: its last token is the target's."""
    files = {"media": (MEDIA / "scene.png").read_bytes()}
    for max_tokens in (2, 3, 5, 8, 200):
        fields = {"prompt": "Describe the image.", "max_tokens": max_tokens, "stream": "true"}
        with demo_server.http.stream("POST", "/v1/generate", data=fields, files=files) as response:
            *events, done = map(json.loads, (line[6:] for line in response.iter_lines() if line.startswith("data: ")))
        sources = [[token["source"] for token in event["tokens"]] for event in events if event["tokens"]]
        assert all(each == ["draft"] * (len(each) - 1) + ["target"] for each in sources)
        assert sum(each.count("draft") for each in sources) == done["speculation"]["accepted_tokens"]
