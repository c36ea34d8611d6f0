"""A real server for the tests: `flashserve serve` in a process of its own, on the fake engine, asked over HTTP."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.service import forking


class Server:
    """One server process; `settings` are FLASH_* variables, `fake` FAKE_* ones.

    It is forked from a process that has everything imported, unless a test needs one with a command line of its own.
    """

    def __init__(
        self, folder: Path, fake: dict[str, Any], settings: dict[str, Any], *, wait: bool = True, forked: bool = True
    ) -> None:
        self.log = folder / "server.log"
        env = {key: value for key, value in os.environ.items() if not key.startswith("FLASH_")}
        env |= {"PYTHONPATH": forking.PATH, "FLASH_ENGINE": "fake_engine:load", "FLASH_PORT": "0"}
        env |= {"FLASH_MEDIA_WORKERS": "1", "FLASH_VIDEO_WORKERS": "0", "FLASH_SPARE_MEDIA_WORKERS": "0"}
        env |= {"FAKE_CRASH_DIR": str(folder)}
        env |= {f"FLASH_{name.upper()}": str(value) for name, value in settings.items()}
        env |= {f"FAKE_{name.upper()}": str(value) for name, value in fake.items()}
        self.process: subprocess.Popen[bytes] | forking.Popen
        with self.log.open("wb") as log:
            if forked:
                modules = forking.ENGINE if "engine" in settings else forking.SERVICE
                self.process = forking.Popen(modules, env, folder, log)
            else:
                command = [sys.executable, "-m", "service.cli", "serve"]
                self.process = subprocess.Popen(command, env=env, cwd=folder, stdout=log, stderr=log)
        self.http = httpx.Client(timeout=30)
        try:
            port = self._await(lambda: re.search(r"running on http://[\d.]+:(\d+)", self.log_text()))[1]
            self.url = f"http://127.0.0.1:{port}"
            self.http.base_url = httpx.URL(self.url)
            if wait:
                self.wait_ready()
        except BaseException:
            self.close()
            raise

    def wait_ready(self) -> None:
        self._await(lambda: self.http.get("/readyz").status_code == 200)

    def wait(self, condition: Callable[[], Any], seconds: float = 60.0) -> Any:
        return self._await(condition, seconds)

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def health(self) -> dict[str, Any]:
        answer: dict[str, Any] = self.http.get("/health").json()
        return answer

    def worker_pids(self) -> list[int]:
        return [worker["pid"] for worker in self.health()["workers"]]

    def chat(self, prompt: str = "hello", **fields: Any) -> httpx.Response:
        return self.http.post("/v1/chat/completions", json=chat_body(prompt, **fields))

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the series of that name which carry these labels."""
        total = 0.0
        for line in self.http.get("/metrics").text.splitlines():
            found = re.fullmatch(rf"{name}(?:{{(.*)}})? (\S+)", line)
            if found and all(f'{key}="{value}"' in (found[1] or "") for key, value in labels.items()):
                total += float(found[2])
        return total

    def terminate(self, sig: int = signal.SIGTERM) -> None:
        self.process.send_signal(sig)

    def close(self) -> int:
        """Ends the server and returns its exit code; no child of it may be left."""
        children = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        self.terminate()
        try:
            code = self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        finally:
            self.http.close()
            _, left = psutil.wait_procs(children, timeout=5)
            for child in left:
                child.kill()
        assert not left, f"children outlive the server: {left}"
        return code

    def _await(self, condition: Callable[[], Any], seconds: float = 60.0) -> Any:
        deadline = time.monotonic() + seconds
        while not (result := condition()):
            assert self.process.poll() is None, f"the server ended with {self.process.returncode}:\n{self.log_text()}"
            assert time.monotonic() < deadline, f"waited in vain:\n{self.log_text()}"
            time.sleep(0.02)
        return result


def chat_body(prompt: str = "hello", **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}], "temperature": 0, **fields}
