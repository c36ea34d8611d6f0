"""A change of draft as the service has it: who may, all workers or none, restarts, and a folder that is watched."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from service.draft_watcher import DraftWatcher
from service.errors import BadRequest, NoCapacity
from service.pool import messages as m
from service.pool.drafts import Drafts
from service.settings import Settings
from tests.service.conftest import StartServer
from tests.service.server import Server
from tests.service.streams import LONG, streaming, text_of

KEY = "a key for the admin"


def write(folder: Path, weights: str, **config: Any) -> Path:
    """What the fake engine takes for a draft."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_text(weights)
    return folder


def change(server: Server, draft: Path | str, key: str | None = KEY) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return server.http.post("/admin/draft", json={"draft": str(draft)}, headers=headers)


def notes(server: Server, what: str) -> dict[int, str]:
    """By process: the draft that it has loaded, or used."""
    found = (path for path in server.log.parent.glob(f"{what}-*"))
    return {int(path.name.removeprefix(f"{what}-")): path.read_text() for path in found}


# -- who may


def test_without_an_admin_key_there_is_no_such_route(server: Server, tmp_path: Path) -> None:
    answer = change(server, tmp_path)
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert error["code"] == "admin_off"
    assert "--admin-key" in error["message"]
    assert server.http.get("/admin/draft").status_code == 405


def test_only_the_admin_key_opens_it(start_server: StartServer, tmp_path: Path) -> None:
    """Not a key of the API either; and the admin key does not open the API."""
    server = start_server(admin_key=KEY, api_key="one,two")
    draft = write(tmp_path / "new", "new")
    for key, code in ((None, "missing_api_key"), ("wrong", "invalid_api_key"), ("one", "invalid_api_key")):
        answer = change(server, draft, key)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, code)
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert server.http.get("/v1/models", headers={"Authorization": f"Bearer {KEY}"}).status_code == 401
    assert not notes(server, "used")
    assert change(server, draft).status_code == 200
    assert KEY not in server.log_text()


@pytest.mark.parametrize("body", ["{}", '{"draft": ""}', '{"draft": 3}', '{"draft": "x", "more": 1}', "["])
def test_a_body_that_says_something_else_is_a_400(start_server: StartServer, body: str) -> None:
    server = start_server(admin_key=KEY)
    answer = server.http.post("/admin/draft", content=body, headers={"Authorization": f"Bearer {KEY}"})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


# -- all or none


def test_all_workers_change_and_one_that_starts_later_has_the_new_one(
    start_server: StartServer, tmp_path: Path
) -> None:
    """Whatever has become of the folder by then."""
    old, new = write(tmp_path / "old", "old"), write(tmp_path / "new", "new")
    server = start_server(admin_key=KEY, workers=2, draft=old)
    server.wait(lambda: server.metric("flash_worker_up") == 2)
    pids = server.worker_pids()
    assert notes(server, "loaded") == dict.fromkeys(pids, "old")
    before = server.health()["draft"]
    assert (before["name"], before["changes"]) == ("old", 0)

    answer = change(server, new)
    assert answer.status_code == 200
    told = answer.json()
    assert (told["drafter"], told["draft"], told["workers"]) == ("flash", str(new), 2)
    assert 0 <= told["seconds"] < 10
    assert notes(server, "used") == dict.fromkeys(pids, "new")
    after = server.health()["draft"]
    assert (after["name"], after["changes"]) == ("new", 1)
    assert after["since"] > before["since"]
    assert str(tmp_path) not in server.http.get("/health").text

    write(new, "overwritten")
    os.kill(pids[0], signal.SIGKILL)
    server.wait(lambda: server.metric("flash_worker_restarts_total") == 1 and server.metric("flash_worker_up") == 2)
    (replaced,) = set(server.worker_pids()) - set(pids)
    assert notes(server, "loaded")[replaced] == "new"
    assert change(server, new).json()["workers"] == 2
    assert notes(server, "used") == dict.fromkeys((pids[0], pids[1], replaced), "overwritten") | {pids[0]: "new"}


def test_where_one_worker_refuses_none_changes(start_server: StartServer, tmp_path: Path) -> None:
    draft = write(tmp_path / "new", "new", refused_by_one=True)
    server = start_server(admin_key=KEY, workers=2)
    server.wait(lambda: server.metric("flash_worker_up") == 2)
    answer = change(server, draft)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("draft_refused", "draft")
    assert error["message"] == f"draft {str(draft)!r} is not to one worker's taste", "the folder as it was named to us"
    assert not notes(server, "used")
    assert server.health()["draft"]["changes"] == 0
    assert change(server, draft).json()["workers"] == 2, "and now that both take it, both have it"


def test_what_is_not_there_is_refused(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server(admin_key=KEY)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text("{}")
    for folder in (tmp_path / "nowhere", tmp_path / "half", "a\0b", tmp_path / "half" / "config.json"):
        answer = change(server, folder)
        assert answer.status_code == 400, folder
        assert answer.json()["error"]["code"] == "draft_refused"
        assert "config.json and model.safetensors" in answer.json()["error"]["message"]
    assert server.chat().status_code == 200


def test_a_worker_that_was_loading_the_old_draft_follows(start_server: StartServer, tmp_path: Path) -> None:
    """It was told the old one when it started, and is ready after the others have changed."""
    old, new = write(tmp_path / "old", "old"), write(tmp_path / "new", "new")
    server = start_server({"load_delay": 1.0}, admin_key=KEY, workers=2, draft=old)
    server.wait(lambda: server.metric("flash_worker_up") == 2)
    pids = server.worker_pids()
    os.kill(pids[0], signal.SIGKILL)
    server.wait(lambda: set(server.worker_pids()) - set(pids))
    server.wait(lambda: server.health()["workers"][0]["state"] == "loading")
    assert change(server, new).json()["workers"] == 1
    (late,) = set(server.worker_pids()) - set(pids)
    server.wait(lambda: notes(server, "used").get(late) == "new")


def test_a_copy_lives_as_long_as_a_worker_may_read_it(tmp_path: Path) -> None:
    """One that loads reads it late: while the target is read, others change, and it would find nothing there."""

    class Obedient:
        index = 0

        def __init__(self, drafts: Drafts, state: str) -> None:
            self.drafts, self.state = drafts, state

        def send(self, message: m.ToWorker) -> None:
            if isinstance(message, m.ReadDraft):
                self.drafts.on_reply(self, m.DraftReady(message.number))  # type: ignore[arg-type]
            if isinstance(message, m.UseDraft):
                self.drafts.on_reply(self, m.DraftUsed(message.number, None))  # type: ignore[arg-type]

    def weights_in(copy: Path) -> str | None:
        return (copy / "model.safetensors").read_text() if copy.exists() else None

    async def scenario() -> None:
        drafts = Drafts(str(write(tmp_path / "first", "first")), keep_copy=True)
        drafts.start()
        up: Any = Obedient(drafts, "ready")
        loading: Any = Obedient(drafts, "loading")
        first = Path(drafts.options_for(up)["draft"])
        assert Path(drafts.options_for(loading)["draft"]) == first
        assert await drafts.change(str(write(tmp_path / "second", "second")), lambda: [up]) == 1
        assert weights_in(first) == "first"
        drafts.on_death(loading)
        assert weights_in(first) is None
        assert weights_in(Path(drafts.options_for(loading)["draft"])) == "second"
        await drafts.stop()

    asyncio.run(scenario())


def test_a_worker_that_dies_while_it_reads_does_not_hold_up_the_others(
    start_server: StartServer, tmp_path: Path
) -> None:
    server = start_server(admin_key=KEY, workers=2)
    server.wait(lambda: server.metric("flash_worker_up") == 2)
    dying, other = server.worker_pids()
    draft = write(tmp_path / "new", "new", load=1.0)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(change, server, draft)
        time.sleep(0.3)  # it has begun, and takes a second
        os.kill(dying, signal.SIGKILL)
        assert answer.result().json()["workers"] == 1
    assert notes(server, "used")[other] == "new"
    server.wait(lambda: server.metric("flash_worker_up") == 2)
    (late,) = set(server.worker_pids()) - {other}
    server.wait(lambda: "new" in (notes(server, "loaded").get(late), notes(server, "used").get(late)))


def test_streams_flow_while_a_draft_is_read(start_server: StartServer, tmp_path: Path) -> None:
    """Reading takes a second; nobody waits for it."""
    server = start_server({"delay": 0.005}, admin_key=KEY)
    draft = write(tmp_path / "new", "new", load=1.0)
    whole = server.chat("go on", **LONG).json()["choices"][0]["message"]["content"]
    with ThreadPoolExecutor(1) as pool, streaming(server, "go on", **LONG) as stream:
        events = [next(stream)]
        answer = pool.submit(change, server, draft)
        while not answer.done():
            events.append(next(stream))
        assert answer.result().json()["workers"] == 1
        assert len(events) > 50
        events += list(stream)
    assert text_of(events) == whole


# -- a folder that is watched


def test_a_watch_needs_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="give --draft"):
        Settings(watch_draft=1.0)
    assert Settings(watch_draft=1.0, draft=str(tmp_path)).watch_draft == 1.0


def test_only_what_stays_the_same_over_two_looks_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A refused draft is tried once; one that met no worker, again."""
    folder, taken = write(tmp_path / "draft", "first"), list[str]()
    answers: list[Exception | None] = []

    async def change(named: str) -> None:
        if answers and (error := answers.pop(0)) is not None:
            raise error
        taken.append((Path(named) / "model.safetensors").read_text())

    watch = DraftWatcher(str(folder), 1.0, change)

    def looks(number: int) -> list[str]:
        for _ in range(number):
            asyncio.run(watch.check())
        return taken

    assert looks(3) == [], "what is there when the service starts is what it has"
    write(folder, "half")
    looks(1)
    write(folder, "half, and more")
    looks(1)
    (folder / "config.json").unlink()
    assert looks(3) == [], "no draft without both files"
    write(folder, "all of it")
    assert looks(1) == []
    assert looks(4) == ["all of it"]
    answers[:] = [NoCapacity("no worker"), None]
    write(folder, "next one")
    assert looks(2) == ["all of it"]
    assert looks(1) == ["all of it", "next one"]
    answers[:] = [BadRequest("it is for another target")]
    write(folder, "not for us")
    assert looks(6) == ["all of it", "next one"]
    warnings = [record for record in caplog.records if "another target" in record.getMessage()]
    assert len(warnings) == 1


def test_a_watched_folder_is_taken_by_the_service(start_server: StartServer, tmp_path: Path) -> None:
    folder = write(tmp_path / "draft", "first")
    server = start_server(draft=folder, watch_draft=0.05)
    write(folder, "second")
    server.wait(lambda: server.health()["draft"]["changes"] == 1)
    assert list(notes(server, "used").values()) == ["second"]
    write(folder, "third, which does not fit", refused="is for another target")
    server.wait(lambda: "is for another target" in server.log_text())
    pids = server.worker_pids()
    os.kill(pids[0], signal.SIGKILL)
    server.wait(lambda: server.metric("flash_worker_restarts_total") == 1 and server.metric("flash_worker_up") == 1)
    assert notes(server, "loaded")[server.worker_pids()[0]] == "second", "not what lies in the folder by now"
    assert server.log_text().count("is for another target") == 1
