"""What operators rely on: metric names, quick health routes under load, a slim process, a page that loads nothing."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

import model
from tests.service.conftest import StartServer
from tests.service.server import Server

# As in the contract: dashboards, alerts and autoscalers ask for these by name.
METRICS = {
    "flash_acceptance_length": "histogram",
    "flash_tokens_per_second": "gauge",
    "flash_spec_drafts_total": "counter",
    "flash_spec_draft_tokens_total": "counter",
    "flash_spec_accepted_tokens_total": "counter",
    "flash_spec_accepted_tokens_per_position_total": "counter",
    "flash_prompt_tokens_total": "counter",
    "flash_generation_tokens_total": "counter",
    "flash_requests_total": "counter",
    "flash_requests_rejected_total": "counter",
    "flash_encoder_cache_queries_total": "counter",
    "flash_encoder_cache_hits_total": "counter",
    "flash_prefix_cache_queries_total": "counter",
    "flash_prefix_cache_hits_total": "counter",
    "flash_media_cache_queries_total": "counter",
    "flash_media_cache_hits_total": "counter",
    "flash_media_cache_usage_ratio": "gauge",
    "flash_worker_restarts_total": "counter",
    "flash_requests_running": "gauge",
    "flash_requests_waiting": "gauge",
    "flash_kv_cache_usage_ratio": "gauge",
    "flash_worker_up": "gauge",
    "flash_time_to_first_token_seconds": "histogram",
    "flash_time_per_output_token_seconds": "histogram",
    "flash_request_latency_seconds": "histogram",
    "flash_queue_seconds": "histogram",
    "flash_media_seconds": "histogram",
    "flash_step_seconds": "histogram",
    "flash_batch_size": "histogram",
}


def test_every_metric_of_the_contract_is_there_with_its_type_and_model(server: Server) -> None:
    text = server.http.get("/metrics").text
    types = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    assert types == METRICS
    samples = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all('model="demo"' in sample for sample in samples)
    assert re.search(r'^flash_worker_up\{model="demo",worker="0"\} 1\.0$', text, re.MULTILINE)
    for phase in ("vision", "prefill", "draft", "verify"):
        assert f'flash_step_seconds_count{{model="demo",phase="{phase}"}}' in text
    buckets = re.findall(r'flash_acceptance_length_bucket\{le="([^"]+)"', text)
    assert buckets == [f"{length}.0" for length in range(1, 18)] + ["+Inf"]


def test_metrics_count_what_happened(start_server: StartServer) -> None:
    server = start_server()
    server.chat("one two three", max_tokens=21)
    server.chat(temperature=9)
    server.wait(lambda: server.metric("flash_generation_tokens_total") == 21)
    counted = {
        "flash_prompt_tokens_total": 3,
        "flash_spec_drafts_total": 5,
        "flash_spec_draft_tokens_total": 35,
        "flash_spec_accepted_tokens_total": 15,
        "flash_acceptance_length_count": 5,
        "flash_acceptance_length_sum": 20,
        "flash_time_to_first_token_seconds_count": 1,
        "flash_time_per_output_token_seconds_count": 1,
        "flash_request_latency_seconds_count": 1,
        "flash_queue_seconds_count": 1,
        "flash_batch_size_count": 6,
        "flash_requests_running": 0,
        "flash_requests_waiting": 0,
    }
    assert {name: server.metric(name) for name in counted} == counted
    assert server.metric("flash_requests_total", outcome="length") == 1
    assert server.metric("flash_requests_rejected_total", reason="invalid_request") == 1
    assert server.metric("flash_spec_accepted_tokens_per_position_total", position="0") == 5
    assert server.metric("flash_tokens_per_second") == pytest.approx(2.1)


def test_the_gauges_follow_the_load(start_server: StartServer) -> None:
    server = start_server({"delay": 0.05}, max_num_seqs=2)
    with ThreadPoolExecutor(5) as pool:
        answers = [pool.submit(server.chat, f"number {i}", max_tokens=60, ignore_eos=True) for i in range(5)]
        server.wait(lambda: server.metric("flash_requests_running") == 2)
        server.wait(lambda: server.metric("flash_requests_waiting") == 3)
        assert server.metric("flash_kv_cache_usage_ratio") == 1
        assert all(answer.result().status_code == 200 for answer in answers)
    server.wait(lambda: server.metric("flash_requests_running") + server.metric("flash_requests_waiting") == 0)


@pytest.mark.alone
def test_health_routes_answer_within_100_ms_while_16_requests_with_large_media_run(
    start_server: StartServer, tmp_path: Path
) -> None:
    server = start_server({"delay": 0.01})
    noise = np.random.default_rng(0).integers(0, 256, (1500, 2000, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png", compress_level=0)  # 9 MB, or 12 as a data URI
    crowd = [sys.executable, str(Path(__file__).with_name("load_client.py")), server.url, str(tmp_path / "noise.png")]
    times: list[float] = []
    with subprocess.Popen([*crowd, "16", "48"]) as load:
        server.wait(lambda: server.health()["requests"] > 8)
        while load.poll() is None:
            started = time.perf_counter()
            assert server.http.get("/livez").status_code == 200
            times.append(time.perf_counter() - started)
            time.sleep(0.005)
    assert load.returncode == 0
    p50, p99, longest = np.quantile(times, [0.5, 0.99, 1]) * 1e3
    print(f"\n/livez: {len(times)} asked, p50 {p50:.1f} ms, p99 {p99:.1f} ms, longest {longest:.1f} ms")
    assert len(times) > 50
    assert p99 < 100


def test_the_api_process_has_no_torch_in_it(server: Server) -> None:
    server.chat(max_tokens=1)
    maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "/torch/" not in maps
    assert "transformers" not in maps
    assert psutil.Process(server.process.pid).memory_info().rss < 300 << 20


def test_version_and_health_tell_no_paths(server: Server) -> None:
    assert server.http.get("/version").json()["version"] == model.__version__
    health = server.http.get("/health")
    assert health.status_code == 200
    assert health.json()["workers"][0]["state"] == "ready"
    assert "path" not in health.text


def test_the_page_and_its_files_load_nothing_from_elsewhere(server: Server) -> None:
    page = server.http.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    files = re.findall(r'(?:src|href)="(/static/[^"]+)"', page.text)
    assert {"/static/app.js", "/static/style.css"} <= set(files)
    for path in files:
        assert server.http.get(path).status_code == 200, path
    everything = page.text + "".join(server.http.get(path).text for path in files)
    assert not re.findall(r"""(?:src|href)=["']?https?:|url\(["']?http|import .*http""", everything)
    assert not re.search(r"<script>|onclick=|style=", page.text), "inline code is forbidden by the policy"
    ids = set(re.findall(r'id="(\w+)"', page.text))
    assert set(re.findall(r'\$\("(\w+)"\)', everything)) <= ids, "the script asks for elements that the page has"


def test_logs_tell_of_a_request_but_not_what_was_said(server: Server) -> None:
    answer = server.chat("a secret wish", max_tokens=5).json()
    server.wait(lambda: f"id={answer['id']}" in server.log_text())
    log = server.log_text()
    assert re.search(rf"request id={answer['id']} outcome=length .*completion_tokens=5 ", log)
    assert "secret wish" not in log
    assert answer["choices"][0]["message"]["content"] not in log
