"""Client libraries, unchanged but for their base URL: each completes rounds with an image.

What a user would write is in scripts/. A script runs in an environment that has the libraries, and prints the result of
each of its rounds.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
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
THING = {"center": "a medium orange dotted diamond"}
ROUNDS: dict[str, dict[str, Any]] = {
    "openai": {
        "models": ["demo"],
        "caption": CAPTION,
        "caption_streamed": CAPTION,
        "caption_helper": CAPTION,
        "caption_async": CAPTION,
        "caption_of_a_plain_url": CAPTION,
        "caption_again_after_history": "There are five objects in the image.",
        "error": "max_completion_tokens",
        "scene": THING,
        "scene_streamed": THING,
        "json_object": {"center": "blue"},
        "tools": TOOLS,
        "tools_one_at_a_time": TOOLS,
        "tools_streamed": TOOLS,
        "tool_required": THING,
        "tool_named": THING,
        "completion": " short videos of colored",
        "response": CAPTION,
        "response_streamed": CAPTION,
        "response_scene": THING,
        "response_tools": TOOLS,
        "response_tools_streamed": TOOLS,
    },
    "anthropic": {
        "caption": CAPTION,
        "caption_streamed": CAPTION,
        "count_tokens": True,
        "thing": THING,
        "tools": TOOLS,
        "tools_streamed": TOOLS,
        "tool_runner": TOOLS,
        "tool_required": THING,
        "tool_named": THING,
        "error": "invalid_request_error",
    },
    "langchain": {
        "caption": CAPTION,
        "caption_standard": CAPTION,
        "caption_streamed": CAPTION,
        "thing": THING,
        "thing_by_function": THING,
        "thing_strict": THING,
        "thing_by_json": THING,
        "tools": TOOLS,
        "tools_streamed": TOOLS,
        "tool_required": THING,
        "tool_named": THING,
        "response": CAPTION,
        "response_tools": TOOLS,
        "claude_caption": CAPTION,
        "claude_caption_streamed": CAPTION,
        "claude_thing": THING,
        "claude_tools": TOOLS,
    },
    "litellm": {
        "caption": CAPTION,
        "caption_vllm": CAPTION,
        "caption_streamed": CAPTION,
        "thing": THING,
        "thing_vllm": THING,
        "tools": TOOLS,
        "tools_streamed": TOOLS,
        "tool_required": THING,
        "response": CAPTION,
        "error": "context window",
    },
    "instructor": {
        "thing": THING,
        "thing_strict": THING,
        "thing_by_responses": THING,
        "thing_streamed": THING,
        "thing_after_a_retry": THING,
    },
    "pydantic_ai": {
        "caption": CAPTION,
        "caption_streamed": CAPTION,
        "thing": THING,
        "thing_native": THING,
        "thing_prompted": THING,
        "tools": TOOLS,
        "response": CAPTION,
        "response_tools": TOOLS,
        "response_thing": THING,
        "claude_caption": CAPTION,
        "claude_thing": THING,
        "claude_tools": TOOLS,
    },
    "smolagents": {
        "caption": CAPTION,
        "caption_streamed": CAPTION,
        "tools": TOOLS,
        "tools_streamed": TOOLS,
        "code": TOOLS,
        "code_as_json": TOOLS,
    },
}
OWN = ("openai", "anthropic")  # the project's environment has these, in their newest versions


@pytest.fixture(scope="module")
def caption(demo_server: EngineServer) -> str:
    response = demo_server.http.post("/v1/chat/completions", json=question())
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


@pytest.mark.skipif(not shutil.which("curl"), reason="no curl")
@pytest.mark.parametrize("stream", [False, True])
def test_curl_does_too(demo_server: EngineServer, caption: str, tmp_path: Path, stream: bool) -> None:
    (tmp_path / "body.json").write_text(json.dumps({**question(), "stream": stream}))
    command = ["curl", "--silent", "--fail", f"{demo_server.url}/v1/chat/completions", "--data", "@body.json"]
    text = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    if not stream:
        assert json.loads(text)["choices"][0]["message"]["content"] == caption
        return
    *events, done = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert done == "[DONE]"
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("content") or "" for delta in deltas) == caption


def question() -> dict[str, Any]:
    uri = "data:image/png;base64," + base64.b64encode(SCENE.read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": "Describe the image."}]
    system = {"role": "system", "content": "You describe pictures."}
    return {"model": "demo", "temperature": 0, "messages": [system, {"role": "user", "content": content}]}


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
