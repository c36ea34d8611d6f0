"""Client libraries, unchanged but for their base URL: each completes rounds with an image.

What a user would write is in scripts/. A script runs in an environment that has the libraries, and prints the result of
each of its rounds.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.clients import bodies
from tests.clients.recorder import Recorder
from tests.e2e.server import EngineServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SCRIPTS = Path(__file__).parent / "scripts"
SCENE = Path(__file__).parents[2] / "model" / "demo" / "media" / "scene.png"
# No library looks for anything elsewhere: prices, traces, hubs.
QUIET = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LANGSMITH_TRACING": "false", "HF_HUB_OFFLINE": "1"}
CAPTION = "what the model answers a plain request"
TOOLS = ["area", {"width": 6, "height": 7}, "The area is 42."]
ROUNDS: dict[str, dict[str, Any]] = {
    "openai": {
        "models": ["demo"],
        "caption": CAPTION,
        "caption_streamed": CAPTION,
        "caption_helper": CAPTION,
        "caption_async": CAPTION,
        "caption_again_after_history": "There are five objects in the image.",
        "error": "max_completion_tokens",
    },
    "langchain": {"caption": CAPTION, "caption_standard": CAPTION, "caption_streamed": CAPTION},
    "litellm": {"caption": CAPTION, "caption_vllm": CAPTION, "caption_streamed": CAPTION, "error": "context window"},
    "pydantic_ai": {"caption": CAPTION, "caption_streamed": CAPTION},
    "smolagents": {"caption": CAPTION, "caption_streamed": CAPTION},
}
OWN = ("openai",)  # the project's environment has these, in their newest versions


@pytest.fixture(scope="module")
def caption(demo_server: EngineServer) -> str:
    uri = "data:image/png;base64," + base64.b64encode(SCENE.read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": "Describe the image."}]
    system = {"role": "system", "content": "You describe pictures."}
    response = demo_server.chat(messages=[system, {"role": "user", "content": content}])
    answer: str = response.json()["choices"][0]["message"]["content"]
    assert "A medium orange dotted diamond is in the center" in answer
    return answer


@pytest.mark.parametrize("library", ROUNDS)
def test_a_library_completes_its_rounds(
    library: str, client_python: Path, demo_server: EngineServer, scripted_server: EngineServer, caption: str
) -> None:
    results, requests = run(library, client_python, demo_server.url, scripted_server.url)
    check(results, library, caption)
    recorded = bodies.read()
    sent = bodies.reduced(requests)
    if os.environ.get("RECORD_CLIENT_BODIES"):
        bodies.write(recorded | {library: sent})
        return
    unknown = fields_of(sent) - fields_of(recorded.get(library, []))
    assert not unknown, "it sends what tests/service/client_bodies.json lacks: run this with RECORD_CLIENT_BODIES=1"


@pytest.mark.parametrize("library", OWN)
def test_its_newest_version_does_too(
    library: str, demo_server: EngineServer, scripted_server: EngineServer, caption: str
) -> None:
    results, _ = run(library, Path(sys.executable), demo_server.url, scripted_server.url)
    check(results, library, caption)


def run(library: str, python: Path, url: str, scripted_url: str) -> tuple[dict[str, Any], list[bodies.Recorded]]:
    """Run a script, with proxies that record its requests. Return the results of its rounds, and the requests."""
    demo, scripted = Recorder(url), Recorder(scripted_url)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | QUIET
    try:
        process = subprocess.run(
            [python, SCRIPTS / f"use_{library}.py", demo.url, scripted.url, SCENE, *ROUNDS[library]],
            capture_output=True,
            text=True,
            env=env,
            timeout=300,
        )
    finally:
        demo.close()
        scripted.close()
    assert not process.returncode, process.stderr
    return json.loads(process.stdout.splitlines()[-1]), demo.requests + scripted.requests


def check(results: dict[str, Any], library: str, caption: str) -> None:
    errors = [f"{name}:\n{outcome['error']}" for name, outcome in results.items() if "error" in outcome]
    assert not errors, "\n".join(errors)
    for name, expected in ROUNDS[library].items():
        assert results[name]["result"] == (caption if expected is CAPTION else expected), name
    print(library, {name: outcome["seconds"] for name, outcome in results.items()})


def fields_of(requests: list[dict[str, Any]]) -> set[tuple[str, str]]:
    return {(request["path"], field) for request in requests for field in bodies.fields(request["body"])}
