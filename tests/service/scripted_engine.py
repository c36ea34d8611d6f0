"""A real engine whose target says what the messages write down (tests/model/scripted.py), for a real server.

    Server(folder, {"kind": "hermes"}, {"engine": "tests.service.scripted_engine:load"})

or by hand: FAKE_KIND=qwen3 flashserve serve --engine tests.service.scripted_engine:load

The environment: FAKE_KIND, of the chat template (tests/model/chat_templates.py; hermes unless set); FAKE_SCRIPTS, a
JSON file of scripts by name, each a text or a list of texts; FAKE_SAYS, what is said where the messages have no script;
FAKE_MARGIN, a number (see ScriptedTarget); FAKE_STEP, seconds that each step takes at least, so that a test can act
before an answer ends. `--model` may be a folder that `scripted.save` has made; FAKE_KIND then has no effect.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from model.config import BUNDLED, EngineConfig
from model.engine.engine import Engine
from model.request import RequestOutput
from tests.model import scripted

DEFAULT = "There is no script in these messages."


class SlowEngine(Engine):
    """An engine of which each step takes a while."""

    pause = 0.0

    def step(self) -> list[RequestOutput]:
        time.sleep(self.pause)
        return super().step()


def load(options: dict[str, Any]) -> Engine:
    """Load the engine: float32, drafting from repeated text unless a draft or drafter is named."""
    scripts = os.environ.get("FAKE_SCRIPTS")
    with tempfile.TemporaryDirectory() as folder:
        model = str(options.get("model"))
        if model in BUNDLED:
            model = str(scripted.save(Path(folder), os.environ.get("FAKE_KIND", "hermes")))
        if options.get("drafter") == "auto" and not options.get("draft"):
            options = {**options, "drafter": "ngram"}
        config = EngineConfig(**{**options, "model": model, "dtype": "float32", "share_cores": True})
        target = scripted.ScriptedTarget(
            config.resolved(),
            scripts=json.loads(Path(scripts).read_text()) if scripts else None,
            default=os.environ.get("FAKE_SAYS", DEFAULT),
            margin=float(os.environ.get("FAKE_MARGIN", scripted.MARGIN)),
        )
        engine = SlowEngine(config, target)
        engine.pause = float(os.environ.get("FAKE_STEP", "0"))
        return engine
