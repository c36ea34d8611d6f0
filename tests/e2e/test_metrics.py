"""After real traffic every metric of the contract is there, with its type and labels, and agrees with `usage`."""

from __future__ import annotations

import re

import pytest

from loadtest import media
from loadtest.client import Question, Variant
from tests.e2e.server import EngineServer
from tests.service.test_ops import METRICS

LABELS = {
    "flash_requests_total": {"outcome"},
    "flash_requests_rejected_total": {"reason"},
    "flash_spec_accepted_tokens_per_position_total": {"position"},
    "flash_media_seconds": {"kind"},
    "flash_step_seconds": {"phase"},
}
PER_WORKER = {
    *("flash_spec_drafts_total", "flash_spec_draft_tokens_total", "flash_spec_accepted_tokens_total"),
    *("flash_prompt_tokens_total", "flash_generation_tokens_total", "flash_encoder_cache_queries_total"),
    *("flash_encoder_cache_hits_total", "flash_prefix_cache_queries_total", "flash_prefix_cache_hits_total"),
    *("flash_worker_restarts_total", "flash_requests_running"),
    *("flash_requests_waiting", "flash_kv_cache_usage_ratio", "flash_worker_up"),
}


@pytest.mark.parametrize("which", ["server", "demo_server"])
def test_metrics_have_their_types_and_labels_and_agree_with_usage(which: str, request: pytest.FixtureRequest) -> None:
    server: EngineServer = request.getfixturevalue(which)
    server.wait_idle()
    names = [
        *("flash_spec_drafts_total", "flash_spec_draft_tokens_total", "flash_spec_accepted_tokens_total"),
        *("flash_acceptance_length_count", "flash_acceptance_length_sum", "flash_generation_tokens_total"),
        *("flash_prompt_tokens_total", "flash_encoder_cache_queries_total", "flash_encoder_cache_hits_total"),
        *("flash_spec_accepted_tokens_per_position_total", "flash_batch_size_count", "flash_queue_seconds_count"),
        "flash_time_to_first_token_seconds_count",
    ]
    before = {name: server.metric(name) for name in names}

    files: list[tuple[media.File, ...]] = [(), (media.image(40),), (media.image(40),), (media.video(41),)]
    asked = [Question("Describe it.", shown, {"max_tokens": 40, "ignore_eos": True}) for shown in files]
    answers = [server.ask(question, Variant("generate", stream=i % 2 == 0)) for i, question in enumerate(asked)]
    answers += server.ask_all([(question, Variant("generate")) for question in asked])
    server.wait_idle()
    tokens = sum(answer.usage["completion_tokens"] for answer in answers)
    server.wait(
        lambda: server.metric("flash_generation_tokens_total") - before["flash_generation_tokens_total"] == tokens
    )
    grown = {name: server.metric(name) - before[name] for name in names}

    said = [answer.done["speculation"] for answer in answers]
    drafts, accepted = sum(one["drafts"] for one in said), sum(one["accepted_tokens"] for one in said)
    assert grown["flash_spec_drafts_total"] == drafts > 0
    assert grown["flash_spec_accepted_tokens_total"] == accepted
    assert grown["flash_spec_draft_tokens_total"] == sum(one["draft_tokens"] for one in said)
    assert grown["flash_spec_accepted_tokens_per_position_total"] == accepted, "what is accepted has a position"
    assert grown["flash_prompt_tokens_total"] == sum(answer.usage["prompt_tokens"] for answer in answers)
    details = [answer.usage["completion_tokens_details"] for answer in answers]
    assert sum(one["accepted_prediction_tokens"] for one in details) == accepted
    assert grown["flash_acceptance_length_count"] == drafts
    assert grown["flash_acceptance_length_sum"] == drafts + accepted
    assert (grown["flash_encoder_cache_queries_total"], grown["flash_encoder_cache_hits_total"]) == (6, 4)
    assert grown["flash_time_to_first_token_seconds_count"] == grown["flash_queue_seconds_count"] == 8

    text = server.http.get("/metrics").text
    assert dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE)) == METRICS
    for name, kind in METRICS.items():
        suffix = {"histogram": "_count"}.get(kind, "")
        series = re.findall(rf"^{name}{suffix}{{(.*)}} \S+$", text, re.MULTILINE)
        assert series, f"{name} has no series"
        expected = {"model"} | LABELS.get(name, set()) | ({"worker"} if name in PER_WORKER else set())
        for labels in series:
            assert set(re.findall(r'(\w+)="', labels)) == expected, name
    for phase in ("vision", "prefill", "draft", "verify"):
        assert server.metric("flash_step_seconds_count", phase=phase) > 0
    for kind in ("image", "video"):
        assert server.metric("flash_media_seconds_count", kind=kind) > 0
