# mypy: ignore-errors
"""What every script here shares: its arguments, and how it prints what came of each round.

    python use_openai.py URL SCRIPTED_URL IMAGE

URL serves the bundled model. SCRIPTED_URL serves a model that says what a prompt writes down with `say`, so that tools
get called that a model is free to call.
"""

from __future__ import annotations

import base64
import inspect
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

URL, SCRIPTED_URL = sys.argv[1:3]
IMAGE = Path(sys.argv[3])
IMAGE_BASE64 = base64.b64encode(IMAGE.read_bytes()).decode()
IMAGE_URI = f"data:image/png;base64,{IMAGE_BASE64}"
QUESTION = "Describe the image."
TOOL_CALL = '<tool_call>\n{"name": "area", "arguments": {"width": 6, "height": 7}}\n</tool_call>'
ANSWER = "The area is 42."

ROUNDS: list[Callable[[], Any]] = []


def say(*texts: str) -> str:
    """Write down what the scripted model says: one text for each of its turns."""
    return "say" + "".join(f"<<<{text}>>>" for text in texts)


TOOL_PROMPT = f"How large is the thing in the picture? {say(TOOL_CALL, ANSWER)}"


def a_round(function: Callable[[], Any]) -> Callable[[], Any]:
    """Add a function to those that `run` calls; its result can be written as JSON."""
    ROUNDS.append(function)
    return function


def run() -> None:
    """Run all rounds, and print their results as one JSON object: {name: {"result" or "error", "seconds"}}."""
    import asyncio

    names = sys.argv[4:]
    results = {}
    for function in ROUNDS:
        if names and function.__name__ not in names:
            continue
        began = time.monotonic()
        try:
            result = function()
            outcome = {"result": asyncio.run(result) if inspect.iscoroutine(result) else result}
        except Exception:
            outcome = {"error": traceback.format_exc()}
        results[function.__name__] = outcome | {"seconds": round(time.monotonic() - began, 2)}
    print("\n" + json.dumps(results))
