"""Traces as a collector gets them: one span a request, one child a stage, and nothing of what was said."""

from __future__ import annotations

import asyncio
import base64
import io
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from PIL import Image
from pydantic import ValidationError

import model
from service import extras
from service.request_record import RequestRecord
from service.settings import Settings, error_messages, holds_keys
from service.spans import OtlpTracer
from service.trace_context import TraceContext
from service.tracing import start_tracer, traces_url
from tests.monitoring.prometheus import free_port
from tests.service.collector import Collector, attributes
from tests.service.conftest import StartServer
from tests.service.server import Server, chat_body
from tests.service.test_metrics_aliases import choice

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
WORDS = "an unspeakable secret"


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches go out at once, and the machine's own settings do not count."""
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_TRACES_SAMPLER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Collector]]:
    with pytest.MonkeyPatch.context() as patch, Collector() as collector:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
        patch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-team=vision")
        patch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
        server = Server(tmp_path_factory.mktemp("traced"), {}, {"otlp_endpoint": collector.url})
        yield server, collector
        assert server.close() == 0, server.log_text()
        assert "Traceback" not in server.log_text()


def image() -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def ask(server: Server, route: str, *, stream: bool, n: int = 1, media: bool = False, **headers: str) -> str:
    """Send a request to a route, whole or as a stream; return the id of its answer."""
    text, more = WORDS, {"max_tokens": 21, "stream": stream, **({"n": n} if n > 1 else {})}
    if route == "/v1/generate":
        files = {"media": ("x.png", base64.b64decode(image()["image_url"]["url"].partition(",")[2]))} if media else {}
        form = {name: (None, str(each)) for name, each in {"prompt": text, **more}.items()}
        response = server.http.post(route, files={**form, **files}, headers=headers)
    else:
        content = [{"type": "text", "text": text}, *([image()] if media else [])]
        body: dict[str, Any] = chat_body(content, **more)  # type: ignore[arg-type]
        if route == "/v1/completions":
            body = {"prompt": text, **more}
        elif route == "/v1/responses":
            body = {"input": text, "stream": stream, "max_output_tokens": 21, "temperature": 0}
        response = server.http.post(route, json=body, headers=headers)
    assert response.status_code == 200, response.text
    found = re.search(r'"id": ?"([^"]+)"', response.text)
    assert found
    return found[1]


def trace_of(collector: Collector, answer: str) -> Span:
    """Wait for the span of the request with this answer."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for span in collector.requests:
            if attributes(span)["gen_ai.response.id"] == answer:
                return span
        time.sleep(0.02)
    raise AssertionError(f"no trace of {answer}")


@pytest.mark.parametrize(
    ("route", "operation", "stream", "n", "media"),
    [
        ("/v1/chat/completions", "chat", False, 1, False),
        ("/v1/chat/completions", "chat", True, 1, True),
        ("/v1/chat/completions", "chat", False, 3, True),
        ("/v1/completions", "text_completion", False, 1, False),
        ("/v1/completions", "text_completion", True, 2, False),
        ("/v1/generate", "generate_content", True, 1, True),
        ("/v1/generate", "generate_content", False, 1, False),
        ("/v1/responses", "chat", False, 1, False),
        ("/v1/responses", "chat", True, 1, False),
        ("/v1/messages", "chat", False, 1, False),
        ("/v1/messages", "chat", True, 1, False),
    ],
)
def test_a_request_is_one_span_with_its_stages(
    traced: tuple[Server, Collector], route: str, operation: str, stream: bool, n: int, media: bool
) -> None:
    server, collector = traced
    answer = ask(server, route, stream=stream, n=n, media=media, traceparent=f"00-{TRACE}-{PARENT}-01")
    span = trace_of(collector, answer)
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert span.name == f"{operation} demo"
    stages = collector.stages(span)
    assert [stage.name for stage in stages] == ["upload", *(["media"] if media else []), "queue", "prefill", "decode"]
    times = [(stage.start_time_unix_nano, stage.end_time_unix_nano) for stage in stages]
    assert times[0][0] == span.start_time_unix_nano
    assert all(begin <= end for begin, end in times)
    assert all(end <= begin for (_, end), (begin, _) in zip(times, times[1:], strict=False)), "one after another"
    assert times[-1][1] <= span.end_time_unix_nano
    assert abs(span.start_time_unix_nano / 1e9 - time.time()) < 60
    assert {stage.trace_id for stage in stages} == {span.trace_id}
    told = attributes(span)
    assert (
        told.items()
        >= {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "flashserve",
            "gen_ai.request.model": "demo",
            "gen_ai.response.model": "demo",
            "gen_ai.request.max_tokens": 21,
            "gen_ai.request.temperature": 1.0 if route == "/v1/completions" else 0.0,
            "gen_ai.request.top_p": 1.0,
            "gen_ai.request.choice.count": n,
            "gen_ai.output.type": "text",
            "gen_ai.response.finish_reasons": ["length"] * n,
            "gen_ai.usage.output_tokens": 21 * n,
            "flashserve.speculation.drafts": 5 * n,
            "flashserve.speculation.draft_tokens": 35 * n,
            "flashserve.speculation.accepted_tokens": 15 * n,
            "flashserve.speculation.acceptance_length": 4.0,
            "flashserve.media.count": int(media),
            "http.route": route,
        }.items()
    )
    assert told["gen_ai.usage.input_tokens"] > 0
    assert 0 < told["gen_ai.server.time_to_first_token"] < 60
    assert 0 < told["gen_ai.server.time_per_output_token"] < 60
    assert "error.type" not in told
    assert span.status.code == Status.STATUS_CODE_UNSET


def test_nothing_of_what_was_said_is_sent(traced: tuple[Server, Collector]) -> None:
    server, collector = traced
    body = chat_body(WORDS, max_tokens=5, stop=["unlikely stop"], user="somebody")
    answer = server.http.post("/v1/chat/completions", json=body).json()
    trace_of(collector, answer["id"])
    sent = b"".join(collector.bodies)
    words = answer["choices"][0]["message"]["content"].strip()
    for private in (WORDS, words, "unlikely stop", "somebody"):
        assert private.encode() not in sent
    assert answer["id"].encode() in sent


def test_the_collector_learns_who_sends(traced: tuple[Server, Collector]) -> None:
    server, collector = traced
    trace_of(collector, ask(server, "/v1/completions", stream=False))
    assert set(collector.paths) == {"/v1/traces"}
    assert {each["x-team"] for each in collector.headers} == {"vision"}
    assert collector.resource["service.name"] == "flashserve"
    assert collector.resource["service.version"] == model.__version__
    assert collector.resource["deployment.environment.name"] == "test"


def test_a_request_without_a_parent_begins_a_trace(traced: tuple[Server, Collector]) -> None:
    server, collector = traced
    sent = ["", "nonsense", f"00-{'0' * 32}-{PARENT}-01"]
    spans = [trace_of(collector, ask(server, "/v1/completions", stream=False, traceparent=each)) for each in sent]
    assert all(not span.parent_span_id for span in spans)
    assert len({span.trace_id for span in spans}) == 3


def test_a_parent_that_is_not_recorded_has_no_children(traced: tuple[Server, Collector]) -> None:
    server, collector = traced
    skipped = ask(server, "/v1/completions", stream=False, traceparent=f"00-{TRACE}-{PARENT}-00")
    trace_of(collector, ask(server, "/v1/completions", stream=False, traceparent=f"00-{TRACE}-{PARENT}-01"))
    assert skipped not in {attributes(span)["gen_ai.response.id"] for span in collector.requests}


@pytest.mark.parametrize(
    ("prompt", "fields", "status", "error", "failed", "stages"),
    [
        ("x", {"temperature": 9}, 400, "invalid_request", False, ["upload"]),
        ("FAIL AT 3", {}, 500, "engine_failure", True, ["upload", "queue and prefill", "decode"]),
        ("FAIL AT 0", {}, 500, "engine_failure", True, ["upload", "queue and prefill"]),
        ("word " * 2001, {}, 400, "context_length_exceeded", False, ["upload", "queue and prefill"]),
    ],
)
def test_what_fails_says_why(
    traced: tuple[Server, Collector],
    prompt: str,
    fields: dict[str, Any],
    status: int,
    error: str,
    failed: bool,
    stages: list[str],
) -> None:
    server, collector = traced
    response = server.chat(prompt, **fields)
    assert response.status_code == status
    span = trace_of(collector, response.headers["X-Request-Id"])
    assert attributes(span)["error.type"] == error == response.json()["error"]["code"]
    assert (span.status.code == Status.STATUS_CODE_ERROR) == failed
    assert [stage.name for stage in collector.stages(span)] == stages


def test_a_client_that_leaves_ends_its_span(traced: tuple[Server, Collector]) -> None:
    server, collector = traced
    body = chat_body("go on", max_tokens=2000, stream=True, ignore_eos=True)
    with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
        next(response.iter_lines())
        answer = response.headers["X-Request-Id"]
    span = trace_of(collector, answer)
    assert attributes(span)["gen_ai.response.finish_reasons"] == ["abort"]
    assert attributes(span)["error.type"] == "abort"


def test_what_was_not_sent_is_sent_at_shutdown(start_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "600000")
    with Collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url + "/")  # instead of the option
        monkeypatch.setenv("OTEL_SERVICE_NAME", "captions")
        server = start_server()
        for number in range(3):
            server.chat(f"number {number}", max_tokens=2)
        assert collector.spans == []
        assert server.close() == 0
        assert len(collector.requests) == 3
        assert collector.paths == ["/v1/traces"]
        assert collector.resource["service.name"] == "captions"


def test_a_dead_collector_costs_nothing_and_is_logged_once(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")  # the exporter's retries
    port = free_port()
    server = start_server(otlp_endpoint=f"http://user:hunter2@127.0.0.1:{port}", drain_timeout=2)
    assert all(server.chat(f"{number}", max_tokens=2).status_code == 200 for number in range(5))
    server.wait(lambda: "traces cannot be sent" in server.log_text())
    for number in range(5):
        assert server.chat(f"again {number}", max_tokens=2).status_code == 200
        time.sleep(0.1)
    begun = time.monotonic()
    assert server.close() == 0
    assert time.monotonic() - begun < 15
    log = server.log_text()
    assert log.count("traces cannot be sent") == 1
    assert f"127.0.0.1:{port} and are dropped" in log
    assert "hunter2" not in log
    assert not re.search("Traceback|opentelemetry|urllib3|Max retries.*Max retries", log), log


# -- without a server


def record(trace: TraceContext | None = None) -> RequestRecord:
    now = time.monotonic()
    return RequestRecord(
        id="chatcmpl-1",
        client_id="theirs",
        route="/v1/chat/completions",
        trace=trace,
        arrived=now - 8,
        load_at=now - 8,
        loaded_at=now - 8,
        submitted_at=now - 8,
        ended=now,
        outcome="abort",
        error=None,
        choices=[choice()],
        num_prompts=1,
        num_media=0,
        media_seconds=0.0,
    )


@pytest.mark.parametrize(
    ("sampler", "argument", "trace", "recorded"),
    [
        ("always_off", "", None, False),
        ("always_on", "", TraceContext(TRACE, PARENT, 0), True),
        ("traceidratio", "0", None, False),
        ("traceidratio", "1", TraceContext(TRACE, PARENT, 0), True),
        ("parentbased_always_off", "", TraceContext(TRACE, PARENT, 1), True),
        ("parentbased_always_off", "", None, False),
    ],
)
def test_opentelemetrys_sampler_decides(
    monkeypatch: pytest.MonkeyPatch, sampler: str, argument: str, trace: TraceContext | None, recorded: bool
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", sampler)
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", argument)
    with Collector() as collector:
        tracer = OtlpTracer("demo", f"{collector.url}/v1/traces")
        tracer.request_ended(record(trace))
        asyncio.run(tracer.close(10))
        assert len(collector.requests) == recorded


def test_the_state_of_a_trace_is_passed_on() -> None:
    with Collector() as collector:
        tracer = OtlpTracer("demo", f"{collector.url}/v1/traces")
        tracer.request_ended(record(TraceContext(TRACE, PARENT, 1, "vendor=a,other=b")))
        asyncio.run(tracer.close(10))
        (span,) = collector.requests
        assert span.trace_state == "vendor=a,other=b"
        assert attributes(span)["flashserve.request_id"] == "theirs"


def test_a_collector_that_comes_back_gets_traces_again(caplog: pytest.LogCaptureFixture) -> None:
    answers = iter([400, 400, 200])
    with Collector(lambda: next(answers, 200)) as collector:
        tracer = OtlpTracer("demo", f"{collector.url}/v1/traces")
        for number in range(4):
            tracer.request_ended(record())
            tracer._provider.force_flush()
            assert len(collector.requests) == max(0, number - 1)
        asyncio.run(tracer.close(10))
    messages = [entry.message for entry in caplog.records]
    assert len(messages) == 2
    assert "cannot be sent" in messages[0]
    assert "400" in messages[0]
    assert "again" in messages[1]


def test_a_collector_that_hangs_delays_the_end_no_longer_than_it_may(caplog: pytest.LogCaptureFixture) -> None:
    released = threading.Event()
    with Collector(lambda: 200 if released.wait(20) else 500) as collector:
        tracer = OtlpTracer("demo", f"{collector.url}/v1/traces")
        tracer.request_ended(record())
        begun = time.monotonic()
        asyncio.run(tracer.close(0.3))
        assert time.monotonic() - begun < 10
        assert "could not be sent in 0.3 s" in caplog.text
        released.set()


def test_a_queue_that_is_full_drops_spans_and_blocks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "8")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "8")
    released = threading.Event()
    with Collector(lambda: 200 if released.wait(20) else 500) as collector:
        tracer = OtlpTracer("demo", f"{collector.url}/v1/traces")
        for _ in range(200):
            tracer.request_ended(record())
        released.set()
        asyncio.run(tracer.close(10))
        assert 8 <= len(collector.spans) < 200


@pytest.mark.parametrize(
    ("option", "variables", "url"),
    [
        (None, {}, None),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, None),
        ("http://c:4318", {}, "http://c:4318/v1/traces"),
        ("http://c:4318/v1/traces/", {}, "http://c:4318/v1/traces"),
        ("https://c/otlp", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://d"}, "https://c/otlp/v1/traces"),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://d:4318/"}, "http://d:4318/v1/traces"),
        (
            None,
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://d", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://e/own"},
            "http://e/own",
        ),
    ],
)
def test_the_option_comes_before_opentelemetrys_variables(
    monkeypatch: pytest.MonkeyPatch, option: str | None, variables: dict[str, str], url: str | None
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert traces_url(option) == url


@pytest.mark.parametrize(
    ("name", "value"), [("OTEL_SDK_DISABLED", "true"), ("OTEL_SDK_DISABLED", "True"), ("OTEL_TRACES_EXPORTER", "none")]
)
def test_opentelemetrys_variables_can_turn_traces_off(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert start_tracer(Settings(otlp_endpoint="http://127.0.0.1:4318")) is None


def test_without_a_collector_nothing_of_opentelemetry_is_loaded() -> None:
    code = """
import sys
import service.server
from service.settings import Settings
from service.tracing import start_tracer
assert start_tracer(Settings()) is None
print([name for name in sys.modules if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter"))])
assert start_tracer(Settings(otlp_endpoint="http://127.0.0.1:1")) is not None
print("opentelemetry.sdk.trace" in sys.modules)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    assert ran.stdout.split("\n")[:2] == ["[]", "True"]


@pytest.mark.parametrize(
    "url", ["collector:4318", "grpc://c:4317", "http://", "http://c:port", "http://c:4318?x=1", "/v1/traces"]
)
def test_what_is_no_url_is_refused_by_name(url: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Settings(otlp_endpoint=url)
    (message,) = error_messages(caught.value)
    assert message == "--otlp-endpoint (FLASH_OTLP_ENDPOINT): must be a URL such as http://collector:4318"


def test_without_the_extra_the_option_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A platform may set the variables for every pod: then it is only a warning."""
    monkeypatch.setattr(extras, "has_otel", lambda: False)
    with pytest.raises(ValidationError) as caught:
        Settings(otlp_endpoint="http://collector:4318")
    assert "pip install 'flashserve[otel]'" in error_messages(caught.value)[0]
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318")
    assert start_tracer(Settings()) is None
    assert "the extra otel is not installed" in caplog.text


def test_workers_do_not_get_the_collectors_keys() -> None:
    names = ("OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS", "FLASH_API_KEY")
    assert all(map(holds_keys, names))
    assert not any(map(holds_keys, ("OTEL_SERVICE_NAME", "FLASH_OTLP_ENDPOINT", "HEADERS")))
