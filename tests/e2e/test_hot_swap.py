"""Another draft under live streams, on the real engine: no stream is dropped and none changes by a token."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from loadtest import media
from tests.e2e.conftest import StartServer
from tests.e2e.server import EngineServer
from tests.model import tiny

KEY = "a key for the admin"
LIVE, LATE = 16, 4
PROMPTS = ("Describe the image.", "How many objects are there?", "What do you see?", "Where is the red circle?")


class Drafts:
    """Untrained drafts: another FLASH, an EAGLE, and one for another target."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.flash = tiny.save_draft(folder / "flash-2", model, seed=7, block=6)
        self.eagle = tiny.save_network(folder / "eagle", "eagle", model)
        other = tiny.save_checkpoint(folder / "other", seed=3)
        self.foreign = tiny.save_draft(folder / "foreign", other)


@pytest.fixture(scope="module")
def drafts(tiny_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Drafts:
    return Drafts(tmp_path_factory.mktemp("drafts"), tiny_settings["model"])


class Stream(threading.Thread):
    """One streamed answer, read in the background, token by token. Half of them are greedy, half sampled."""

    def __init__(self, server: EngineServer, number: int) -> None:
        super().__init__(daemon=True)
        self.fields: dict[str, Any] = {"prompt": PROMPTS[number % 4], "stream": "true", "ignore_eos": "true"}
        self.fields |= {"max_tokens": str(400 - number), "temperature": str(number % 2), "seed": str(number)}
        self.file = media.image(number % 6)
        self.url, self.tokens, self.error = server.url, list[int](), ""
        self.done: dict[str, Any] = {}
        self.start()

    def run(self) -> None:
        with httpx.stream(
            "POST", f"{self.url}/v1/generate", data=self.fields, files={"media": self.file.data}, timeout=120
        ) as response:
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line.removeprefix("data: "))
                self.tokens += [token["id"] for token in event.get("tokens", ())]
                self.error = self.error or str(event.get("error", ""))
                if event.get("type") == "done":
                    self.done = event

    @property
    def live(self) -> bool:
        return self.is_alive() and len(self.tokens) > 0

    def whole(self) -> list[int]:
        self.join(120)
        assert not self.is_alive(), "the stream never ended"
        assert not self.error
        assert self.done["usage"]["completion_tokens"] == len(self.tokens) == int(self.fields["max_tokens"])
        return self.tokens


def change(server: EngineServer, draft: Path, key: str = KEY) -> httpx.Response:
    return server.http.post("/admin/draft", json={"draft": str(draft)}, headers={"Authorization": f"Bearer {key}"})


@pytest.mark.parametrize("workers", [1, 2])
def test_sixteen_live_streams_keep_every_token_while_the_draft_changes_twice(
    start_server: StartServer, drafts: Drafts, workers: int
) -> None:
    """Four more wait for a slot, where there is one worker: they have the new draft. In between, a draft that does
    not fit and a wrong key are refused."""
    server = start_server(admin_key=KEY, workers=workers)
    server.wait(lambda: server.metric("flash_worker_up") == workers)
    undisturbed = [stream.whole() for stream in [Stream(server, number) for number in range(LIVE + LATE)]]
    assert len({tuple(tokens[:50]) for tokens in undisturbed}) > 10

    live = [Stream(server, number) for number in range(LIVE)]
    server.wait(lambda: all(stream.tokens for stream in live))
    late = [Stream(server, number) for number in range(LIVE, LIVE + LATE)]
    first = change(server, drafts.flash)
    assert (first.status_code, first.json().get("workers")) == (200, workers), first.text
    refused = change(server, drafts.foreign)
    wrong_key = change(server, drafts.eagle, "wrong")
    second = change(server, drafts.eagle)
    assert all(stream.live for stream in live), "the test is to be longer"

    assert (second.status_code, second.json()["drafter"]) == (200, "eagle")
    assert wrong_key.status_code == 401
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (400, "draft_refused", "draft")
    assert "another target" in error["message"]
    assert str(drafts.foreign) in error["message"]
    health = server.health()
    assert (health["engine"]["drafter"], health["draft"]["name"], health["draft"]["changes"]) == ("eagle", "eagle", 2)
    assert [stream.whole() for stream in live + late] == undisturbed
    server.wait_idle()
    assert server.metric("flash_worker_restarts_total") == 0
    assert server.metric("flash_kv_cache_usage_ratio") == 0

    drafted = server.metric("flash_spec_drafts_total")
    after = [Stream(server, number) for number in range(4)]
    assert [stream.whole() for stream in after] == undisturbed[:4]
    server.wait_idle()
    assert server.metric("flash_spec_drafts_total") > drafted, "and it is the new one that drafts"


def test_a_worker_that_starts_again_has_the_draft_that_is_served(
    start_server: StartServer, drafts: Drafts, tmp_path: Path
) -> None:
    """Under a running stream, and with the draft's folder gone. What was refused before has left no trace."""
    server = start_server(admin_key=KEY)
    whole, before = Stream(server, 0).whole(), server.health()
    assert change(server, drafts.foreign).status_code == 400
    after = server.health()
    assert (after["draft"], after["engine"]) == (before["draft"], before["engine"])
    folder = shutil.copytree(drafts.eagle, tmp_path / "eagle")
    assert change(server, folder).json()["drafter"] == "eagle"
    shutil.rmtree(folder)
    stream = Stream(server, 0)
    server.wait(lambda: stream.tokens)
    os.kill(server.worker_pids()[0], signal.SIGKILL)
    assert stream.whole() == whole
    health = server.health()
    assert health["workers"][0]["restarts"] == 1
    assert (health["engine"]["drafter"], health["draft"]["name"], health["draft"]["changes"]) == ("eagle", "eagle", 1)


def test_a_watched_folder_is_read_when_it_is_complete(
    start_server: StartServer, tiny_settings: dict[str, Any], drafts: Drafts, tmp_path: Path
) -> None:
    """It is written piece by piece, under a running stream. What does not fit is told of once."""
    folder = shutil.copytree(tiny_settings["draft"], tmp_path / "draft")
    server = start_server(draft=folder, watch_draft=0.5)
    whole = Stream(server, 3).whole()
    stream = Stream(server, 3)

    shutil.copyfile(drafts.eagle / "config.json", folder / "config.json")
    weights = (drafts.eagle / "model.safetensors").read_bytes()
    with (folder / "model.safetensors").open("wb") as file:
        for piece in range(20):  # for two seconds it is never twice the same
            file.write(weights[piece * len(weights) // 20 : (piece + 1) * len(weights) // 20])
            file.flush()
            assert server.health()["draft"]["changes"] == 0
            time.sleep(0.1)
    server.wait(lambda: server.health()["engine"]["drafter"] == "eagle")
    assert server.health()["draft"]["changes"] == 1
    assert stream.whole() == whole

    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(drafts.foreign / name, folder / name)
    server.wait(lambda: "another target" in server.log_text())
    time.sleep(2.0)
    assert server.log_text().count("another target") == 1
    assert server.health()["draft"]["changes"] == 1
    assert Stream(server, 3).whole() == whole
