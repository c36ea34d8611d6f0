"""A proxy that keeps the JSON bodies of the requests that it passes on."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx

PASSED_ON = ("content-type", "authorization", "x-api-key", "anthropic-version", "anthropic-beta")


class Recorder:
    """Passes requests on to `target`. requests: the path and body of each that was answered, so far."""

    def __init__(self, target: str) -> None:
        self.requests: list[tuple[str, dict[str, Any]]] = []
        recorder = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.pass_on()

            def do_POST(self) -> None:
                self.pass_on()

            def pass_on(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                headers = {name: self.headers[name] for name in PASSED_ON if name in self.headers}
                with recorder.http.stream(self.command, self.path, content=body, headers=headers) as response:
                    if body and response.is_success:
                        recorder.requests.append((self.path.partition("?")[0], json.loads(body)))
                    self.send_response(response.status_code)
                    self.send_header("Content-Type", response.headers.get("content-type", ""))
                    self.send_header("Connection", "close")  # which ends the body
                    self.end_headers()
                    for piece in response.iter_bytes():
                        self.wfile.write(piece)

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        self.http = httpx.Client(base_url=target, timeout=60)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self.http.close()
