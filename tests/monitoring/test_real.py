"""A real Prometheus beside a real service: every panel and every rule has data, the figures are those that clients were
told, and alerts fire on a service that is ill."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from docker.monitoring import dashboard
from loadtest import media
from loadtest.client import Answer, Question, Variant, data_uri
from tests.e2e.server import EngineServer
from tests.e2e.test_bundled_model import CLIP, SCENE
from tests.monitoring import vllm_queries
from tests.monitoring.prometheus import (
    ProjectPrometheus,
    alerts,
    fill_in,
    needs_prometheus,
    panel_queries,
    records,
)
from tests.service.server import Server, chat_body

pytestmark = [needs_prometheus, pytest.mark.slow]

Asked = tuple[ProjectPrometheus, list[Answer], float, float]


@pytest.fixture(scope="module")
def asked(demo_server: EngineServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    """The bundled model was asked for captions of images and videos while Prometheus looked, from idle to idle."""
    target = demo_server.url.removeprefix("http://")
    prometheus = ProjectPrometheus(tmp_path_factory.mktemp("prometheus"), target)
    try:
        time.sleep(3)
        start = time.time()
        images = (SCENE, *(media.image(seed, 192, 192) for seed in range(6)))
        shown = [Question("Describe the image.", (image,)) for image in images] + [Question("Describe it.", (CLIP,))]
        ways = [Variant("generate", stream=True), Variant("generate"), Variant("generate", speculation="off")]
        answers: list[Answer] = []
        while time.time() < start + 12:
            answers += demo_server.ask_all([(question, way) for question in shown for way in ways])
            show_again_by_uuid(demo_server)
        demo_server.chat(temperature=9)
        demo_server.wait_idle()
        time.sleep(3)
        yield prometheus, answers, start, time.time()
    finally:
        prometheus.close()


def show_again_by_uuid(server: EngineServer) -> None:
    """Send a picture under a uuid, then the uuid alone; without speculation, whose figures tests compare."""
    for source in ({"image_url": {"url": data_uri(SCENE)}}, {}):
        content = [{"type": "image_url", "uuid": "a scene"} | source, {"type": "text", "text": "What is it?"}]
        answer = server.chat(messages=[{"role": "user", "content": content}], max_tokens=1, speculation="off")
        assert answer.status_code == 200, answer.text


def has_data(prometheus: ProjectPrometheus, expr: str, start: float, end: float) -> bool:
    """Whether the expression ever has a value; 0 / 0 is none."""
    return any(not math.isnan(value) for values in prometheus.over_time(expr, start, end, 1) for value in values)


def test_every_panel_has_data(asked: Asked) -> None:
    prometheus, _, start, end = asked
    queries = {name: fill_in(expr, rate_interval=6) for name, expr in panel_queries()}
    assert [name for name, expr in queries.items() if not has_data(prometheus, expr, start, end)] == []


def test_a_panel_shows_nothing_of_models_and_instances_that_were_not_chosen(asked: Asked) -> None:
    prometheus, _, start, end = asked
    for _, expr in panel_queries():
        if "$model" in expr:
            for choice in ({"model": "another"}, {"instance": "another"}):
                filled = fill_in(expr, rate_interval=6, **choice)
                assert not prometheus.over_time(filled, start, end, 5), filled


def test_dashboards_of_vllm_have_data(asked: Asked) -> None:
    prometheus, _, start, end = asked
    queries = [fill_in(expr, rate_interval=6) for expr in vllm_queries.queries("demo")]
    assert [expr for expr in queries if not has_data(prometheus, expr, start, end)] == []
    other = [fill_in(expr, rate_interval=6) for expr in vllm_queries.queries("another") if "another" in expr]
    assert not any(prometheus.over_time(expr, start, end, 5) for expr in other[:: len(other) // 20])


def test_every_recording_rule_has_data(asked: Asked) -> None:
    prometheus, *_ = asked
    empty = [rule["record"] for rule in records() if not prometheus.value(f"last_over_time({rule['record']}[1m])")]
    assert empty == []


def test_what_alerts_compare_has_data(asked: Asked) -> None:
    """Whether they fire or not: comparisons give 0 or 1, and the past that some look at begins now."""
    prometheus, _, start, end = asked
    empty = []
    for rule in alerts():
        expr = str(rule["expr"]).replace("offset 30m", "")
        if expr.startswith("absent("):  # has data where all else has none
            continue
        compared = re.sub(r"(==|>|<)", r"\1 bool", re.sub(r"#.*", "", expr))
        assert compared.count("bool"), rule["alert"]
        if not has_data(prometheus, compared, start, end):
            empty.append(f"{rule['alert']}: {compared}")
    assert empty == []


def test_nothing_fires_while_all_is_well(asked: Asked) -> None:
    assert asked[0].firing() == set()


def test_the_acceptance_length_on_the_dashboard_is_what_clients_were_told(asked: Asked) -> None:
    prometheus, answers, start, end = asked
    told = [answer.done["speculation"] for answer in answers]
    usages = [answer.usage["completion_tokens_details"] for answer in answers]
    expected = 1 + sum(one["accepted_tokens"] for one in told) / sum(one["drafts"] for one in told)
    (found,) = prometheus.value(fill_in(dashboard.ACCEPTANCE_LENGTH, rate_interval=end - start + 2), at=end)
    accepted = sum(usage["accepted_prediction_tokens"] for usage in usages)
    (counted,) = prometheus.value("sum (flash_spec_accepted_tokens_total)", at=end)
    assert counted[1] == accepted
    print(f"\nacceptance length: dashboard {found[1]:.4f}, told {expected:.4f}")
    assert found[1] == pytest.approx(expected, abs=0.005)


def test_alerts_fire_on_a_service_that_is_ill(tmp_path: Path) -> None:
    """Conditions as in alerts.yml, but without the time that they must hold for: that is in test_alerts.py."""
    folders = [tmp_path / name for name in ("service", "prometheus")]
    for folder in folders:
        folder.mkdir()
    settings = {"max_num_seqs": 8, "max_waiting": 24}
    server = Server(folders[0], {"delay": 1.0, "load_delay": 3.0}, settings)
    prometheus = ProjectPrometheus(folders[1], server.url.removeprefix("http://"), at_once=True)
    seen: set[tuple[str, str]] = set()
    notes: dict[str, dict[str, str]] = {}

    def fires(*names: str) -> None:
        def all_of_them() -> bool:
            seen.update(prometheus.firing())
            for one in prometheus.get("alerts")["alerts"]:
                notes[one["labels"]["alertname"]] = one["annotations"]
            return set(names) <= {name for name, _ in seen}

        try:
            prometheus.wait(all_of_them, 90)
        except AssertionError as error:
            raise AssertionError(f"expected {names}, saw {seen}") from error

    try:
        time.sleep(3)
        with ThreadPoolExecutor(60) as pool:
            # Four at a time, a second a token, more and more of them: some wait, some are refused, some fail.
            requests: list[Any] = []
            for number in range(60):
                text = "FAIL AT 1" if number % 4 == 3 else "go on"
                body = chat_body(f"{text} {number}", max_tokens=3, speculation="off")
                requests.append(pool.submit(httpx.post, f"{server.url}/v1/chat/completions", json=body, timeout=100))
                time.sleep(0.1)
            fires("FlashServeQueueGrowing", "FlashServeRefusing")
            statuses = {request.result().status_code for request in requests}
            assert statuses == {200, 500, 503}
            fires("FlashServeErrors", "FlashServeFirstTokenSlow", "FlashServeOutputSlow")
            assert ("FlashServeErrors", "critical") in seen
            assert ("FlashServeErrors", "warning") in seen
            assert not {name for name, _ in seen} & {"FlashServeDown", "FlashServeNoWorker", "FlashServeWorkerRestarts"}
            # Three deaths, the third of which the request does not outlive; each leaves no worker for three seconds.
            bad = httpx.post(f"{server.url}/v1/chat/completions", json=chat_body("ALWAYS CRASH"), timeout=100)
            assert bad.status_code == 500
            fires("FlashServeWorkerRestarts", "FlashServeNoWorker", "FlashServeWorkerDown")
        server.process.kill()
        server.process.wait()
        fires("FlashServeDown")
    finally:
        prometheus.close()
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()
        server.http.close()
    for name, said in notes.items():
        text = json.dumps(said)
        assert not re.search(r"no value|error (parsing|executing)|{{|%!", text), f"{name}: {text}"
