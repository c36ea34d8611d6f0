"""An OpenTelemetry collector for tests: takes OTLP over HTTP on loopback and keeps the spans."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Collector:
    """A context manager; `answer` decides the status of each delivery, and may wait."""

    def __init__(self, answer: Callable[[], int] = lambda: 200, port: int = 0) -> None:
        self.spans: list[Span] = []
        self.bodies: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.resource: dict[str, Any] = {}
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status = answer()
                if status == 200:
                    collector._take(self.path, dict(self.headers), body)
                self.send_response(status)
                self.send_header("Content-Type", "application/x-protobuf")
                self.end_headers()
                self.wfile.write(ExportTraceServiceResponse().SerializeToString())

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def wait(self, number: int, seconds: float = 30.0) -> list[Span]:
        """Wait until so many requests have arrived, and return their spans without stages."""
        deadline = time.monotonic() + seconds
        while len(self.requests) < number:
            assert time.monotonic() < deadline, f"{len(self.requests)} of {number} came"
            time.sleep(0.02)
        return self.requests

    @property
    def requests(self) -> list[Span]:
        return [span for span in self.spans if span.kind == Span.SPAN_KIND_SERVER]

    def stages(self, request: Span) -> list[Span]:
        found = [span for span in self.spans if span.parent_span_id == request.span_id]
        return sorted(found, key=lambda span: (span.start_time_unix_nano, span.end_time_unix_nano))

    def _take(self, path: str, headers: dict[str, str], body: bytes) -> None:
        plain = gzip.decompress(body) if headers.get("Content-Encoding") == "gzip" else body
        message = ExportTraceServiceRequest.FromString(plain)
        for resource in message.resource_spans:
            self.resource = {each.key: value(each.value) for each in resource.resource.attributes}
            spans = [span for scope in resource.scope_spans for span in scope.spans]
            self.spans += sorted(spans, key=lambda span: span.kind == Span.SPAN_KIND_SERVER)  # requests last
        self.paths.append(path)
        self.headers.append(headers)
        self.bodies.append(plain)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def value(sent: AnyValue) -> Any:
    kind = sent.WhichOneof("value")
    return [value(each) for each in sent.array_value.values] if kind == "array_value" else getattr(sent, str(kind))


def attributes(span: Span) -> dict[str, Any]:
    return {each.key: value(each.value) for each in span.attributes}
