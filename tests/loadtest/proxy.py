"""A small TCP proxy between clients and a real service, which does to streams what a test tells it to."""

from __future__ import annotations

import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

SECONDS = 60.0  # of silence after which a connection is given up


class Proxy(socketserver.ThreadingTCPServer):
    """Of every `every`-th POST (one a connection) the answer is paused or cut once `after_bytes` of it have passed."""

    def __init__(self, upstream: str, *, after_bytes: int, pause: float = 0.0, cut: bool = False, every: int = 1):
        super().__init__(("127.0.0.1", 0), Connection)
        host, port = upstream.removeprefix("http://").rsplit(":", 1)
        self.upstream = (host, int(port))
        self.after_bytes, self.pause, self.cut, self.every = after_bytes, pause, cut, every
        self.num_posts = self.num_done = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def chosen(self) -> bool:
        with self.lock:
            self.num_posts += 1
            return self.num_posts % self.every == 0


class Connection(socketserver.BaseRequestHandler):
    server: Proxy

    def handle(self) -> None:
        with suppress(OSError), socket.create_connection(self.server.upstream, SECONDS) as upstream:
            self.request.settimeout(SECONDS)
            asked = self.request.recv(65536)
            upstream.sendall(asked)
            asking = threading.Thread(target=self._pass_on, args=(upstream,))
            asking.start()
            try:
                self._answer(upstream, asked.startswith(b"POST") and self.server.chosen())
            finally:
                for each in (self.request, upstream):
                    with suppress(OSError):
                        each.shutdown(socket.SHUT_RDWR)
                asking.join()

    def _pass_on(self, upstream: socket.socket) -> None:
        with suppress(OSError):
            while data := self.request.recv(65536):
                upstream.sendall(data)
            upstream.shutdown(socket.SHUT_WR)

    def _answer(self, upstream: socket.socket, chosen: bool) -> None:
        passed = 0
        while data := upstream.recv(65536):
            due = self.server.after_bytes - passed
            passed += len(data)
            if chosen and 0 <= due < len(data):
                self.request.sendall(data[:due])
                with self.server.lock:
                    self.server.num_done += 1
                if self.server.cut:
                    return
                time.sleep(self.server.pause)
                data = data[due:]
            self.request.sendall(data)


@contextmanager
def proxy(upstream: str, *, after_bytes: int, pause: float = 0.0, cut: bool = False, every: int = 1) -> Iterator[Proxy]:
    with Proxy(upstream, after_bytes=after_bytes, pause=pause, cut=cut, every=every) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield running
        running.shutdown()
        thread.join()
