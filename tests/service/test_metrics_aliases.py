"""Metrics under vLLM's names: the names, types and labels that its V1 engine has, and the figures of ours."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from model.request import EngineInfo, EngineStats, Geometry, RequestOutput, RequestStats, SamplingParams, Token
from service.metrics import Metrics
from service.metrics_aliases import VllmAliases
from service.pool.generation import Generation
from service.pool.messages import Submit
from service.request_record import Choice, RequestRecord
from tests.service.server import Server

GAUGES = {"num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "gpu_cache_usage_perc"}
COUNTERS = {
    *("prompt_tokens", "generation_tokens", "request_success", "num_preemptions", "prompt_tokens_cached"),
    *("prefix_cache_queries", "prefix_cache_hits", "gpu_prefix_cache_queries", "gpu_prefix_cache_hits"),
    *("mm_cache_queries", "mm_cache_hits"),
    *("spec_decode_num_drafts", "spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens"),
    "spec_decode_num_accepted_tokens_per_pos",
}
HISTOGRAMS = {
    *("time_to_first_token_seconds", "inter_token_latency_seconds", "time_per_output_token_seconds"),
    *("request_time_per_output_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"),
    *("request_prefill_time_seconds", "request_decode_time_seconds", "request_inference_time_seconds"),
    *("request_prompt_tokens", "request_generation_tokens", "request_max_num_generation_tokens"),
    *("request_params_max_tokens", "request_params_n", "request_prefill_kv_computed_tokens", "iteration_tokens_total"),
}
MORE_LABELS = {"request_success": {"finished_reason"}, "spec_decode_num_accepted_tokens_per_pos": {"position"}}
INFO = EngineInfo(
    *("fake", "cpu", "float32", "torch", "flash"),
    max_model_len=4096,
    max_num_seqs=8,
    tokens_per_image=16,
    geometry=Geometry(),
    max_frames=200,
)


def aliased(num_engines: int = 1) -> Metrics:
    metrics = Metrics("demo")
    metrics.aliases = VllmAliases(
        metrics.registry, "demo", INFO, num_engines=num_engines, prefix_cache=True, memory_utilization=0.9
    )
    for worker in range(num_engines):
        metrics.worker_up(worker, True)
    return metrics


def series(text: str | bytes, name: str) -> dict[tuple[tuple[str, str], ...], float]:
    """The samples of a name, by their labels without the model."""
    text = text.decode() if isinstance(text, bytes) else text
    return {
        tuple(sorted((key, value) for key, value in sample.labels.items() if key != "model_name")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == f"vllm:{name}"
    }


def choice(
    *, finish: str | None = "stop", num_tokens: int = 5, stats: RequestStats | None = None, max_tokens: int = 99
) -> Choice:
    generation = Generation(Submit("r", (), SamplingParams(max_tokens=max_tokens), True), lambda _: None)
    answer = Choice(generation)
    answer.add(RequestOutput("r", "", (Token(1, "", "target"),)), 10.0)
    rest = (Token(1, "", "target"),) * (num_tokens - 1)
    answer.add(RequestOutput("r", "", rest, finish, stats or RequestStats(30, 5, 2, 6, 3, 0.25, 1.0, 2.0, 10)), 12.0)  # type: ignore[arg-type]
    return answer


def record(*choices: Choice, outcome: str = "abort", num_prompts: int = 1) -> RequestRecord:
    return RequestRecord(
        id="r",
        client_id=None,
        route="/v1/chat/completions",
        trace=None,
        arrived=5.0,
        load_at=5.0,
        loaded_at=5.0,
        submitted_at=5.0,
        ended=13.0,
        outcome=outcome,
        error=None,
        choices=choices,
        num_prompts=num_prompts,
        num_media=0,
        media_seconds=0.0,
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("aliases"), {}, {"metrics_aliases": "vllm", "workers": 2})
    server.wait(lambda: len([one for one in server.health()["workers"] if one["state"] == "ready"]) == 2)
    server.chat("one two three", max_tokens=21)
    server.chat("one two", max_tokens=50, n=2)
    server.wait(lambda: server.metric("flash_generation_tokens_total") == 101)
    yield server
    assert server.close() == 0, server.log_text()


def test_names_types_and_labels_are_those_of_vllm(server: Server) -> None:
    families = text_string_to_metric_families(server.http.get("/metrics").text)
    theirs = {family.name.removeprefix("vllm:"): family for family in families if family.name.startswith("vllm:")}
    info = theirs.pop("cache_config_info")
    types = dict.fromkeys(GAUGES, "gauge") | dict.fromkeys(COUNTERS, "counter") | dict.fromkeys(HISTOGRAMS, "histogram")
    assert {name: family.type for name, family in theirs.items()} == types
    for name, family in theirs.items():
        assert family.samples, name
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == {"model_name", "engine"} | MORE_LABELS.get(name, set()), name
            assert sample.labels["model_name"] == "demo"
            assert sample.labels["engine"] in ("0", "1")
    labels = {
        *("block_size", "num_gpu_blocks", "cache_dtype", "enable_prefix_caching", "gpu_memory_utilization", "engine")
    }
    assert [set(sample.labels) for sample in info.samples] == [labels, labels]


def test_figures_are_those_of_ours(server: Server) -> None:
    text = server.http.get("/metrics").text
    for name in ("prompt_tokens_total", "generation_tokens_total", "spec_decode_num_drafts_total"):
        assert set(series(text, name)) == {(("engine", "0"),), (("engine", "1"),)}
        ours = f"flash_{name}".replace("_decode_num_", "_")
        assert sum(series(text, name).values()) == server.metric(ours) > 0
    assert sum(series(text, "iteration_tokens_total_sum").values()) == 101
    assert series(text, "request_success_total")[("engine", "0"), ("finished_reason", "length")] == 1
    assert series(text, "request_success_total")[("engine", "0"), ("finished_reason", "stop")] == 2
    one = (("engine", "0"),)
    for name, count, total in [
        ("time_to_first_token_seconds", 3, None),
        ("e2e_request_latency_seconds", 3, None),
        ("request_generation_tokens", 3, 21 + 40 + 40),
        ("request_max_num_generation_tokens", 2, 21 + 40),
        ("request_params_max_tokens", 3, 21 + 50 + 50),
        ("request_params_n", 2, 3),
    ]:
        assert series(text, f"{name}_count")[one] == count, name
        assert total is None or series(text, f"{name}_sum")[one] == total, name
    outputs = server.metric("flash_batch_size_sum")  # one per sequence and step; the first of each has none before it
    assert series(text, "inter_token_latency_seconds_count")[one] == outputs - 3
    assert series(text, "time_per_output_token_seconds_count")[one] == outputs - 3


def test_there_are_none_unless_they_are_wanted() -> None:
    assert b"vllm" not in Metrics("demo").render()


def test_requests_without_a_worker_wait_at_the_first() -> None:
    metrics = aliased(2)
    metrics.watch_unassigned(lambda: 3)
    metrics.engine_stats(0, EngineStats(running=1, waiting=4, kv_cache_usage=0.5))
    metrics.engine_stats(1, EngineStats(running=2, waiting=0, kv_cache_usage=0.25))
    text = metrics.render()
    assert series(text, "num_requests_waiting") == {(("engine", "0"),): 7, (("engine", "1"),): 0}
    assert series(text, "num_requests_running") == {(("engine", "0"),): 1, (("engine", "1"),): 2}
    for name in ("kv_cache_usage_perc", "gpu_cache_usage_perc"):
        assert series(text, name) == {(("engine", "0"),): 0.5, (("engine", "1"),): 0.25}


def test_times_of_an_answer_add_up() -> None:
    metrics = aliased()
    metrics.request_ended(record(choice()))
    text, one = metrics.render(), (("engine", "0"),)
    seconds = {"queue": 0.25, "prefill": 0.75, "decode": 2.0, "inference": 2.75}
    for name, expected in seconds.items():
        assert series(text, f"request_{name}_time_seconds_sum")[one] == expected
    assert series(text, "e2e_request_latency_seconds_sum")[one] == 8.0
    assert series(text, "request_time_per_output_token_seconds_sum")[one] == 0.5
    assert series(text, "request_prompt_tokens_sum")[one] == 30
    assert series(text, "request_prefill_kv_computed_tokens_sum")[one] == 20
    buckets = series(text, "request_prompt_tokens_bucket")
    assert [dict(key)["le"] for key in buckets] == [
        *("1.0", "2.0", "5.0", "10.0", "20.0", "50.0", "100.0", "200.0", "500.0", "1000.0", "2000.0", "+Inf")
    ]
    assert series(text, "request_prompt_tokens_bucket")[("engine", "0"), ("le", "20.0")] == 0
    assert series(text, "request_prompt_tokens_bucket")[("engine", "0"), ("le", "50.0")] == 1


@pytest.mark.parametrize(
    ("choices", "outcome", "counted", "observed"),
    [
        ([choice(), choice(finish="length")], "abort", {"stop": 1, "length": 1}, 2),
        ([choice(), choice(finish=None)], "timeout", {"stop": 1, "abort": 1}, 1),
        ([choice(finish=None)], "error", {"error": 1}, 0),
        ([], "abort", {"abort": 1}, 0),
        ([], "timeout", {"abort": 1}, 0),
        ([], "refused", {}, 0),
    ],
)
def test_only_answers_that_the_engine_finished_are_observed(
    choices: list[Choice], outcome: str, counted: dict[str, int], observed: int
) -> None:
    metrics = aliased()
    metrics.request_ended(record(*choices, outcome=outcome))
    text = metrics.render()
    found = {dict(key)["finished_reason"]: value for key, value in series(text, "request_success_total").items()}
    assert found == dict.fromkeys(("stop", "length", "abort", "error"), 0) | counted
    assert series(text, "request_generation_tokens_count") == {(("engine", "0"),): observed}


def test_prompts_of_a_request_are_counted_one_by_one() -> None:
    """Two prompts with three answers each: n is 3, twice."""
    metrics = aliased()
    lengths = (2, 7, 3, 4, 4, 5)
    metrics.request_ended(record(*(choice(num_tokens=length) for length in lengths), num_prompts=2))
    text, one = metrics.render(), (("engine", "0"),)
    assert series(text, "request_params_n_count")[one] == 2
    assert series(text, "request_params_n_sum")[one] == 6
    assert series(text, "request_max_num_generation_tokens_sum")[one] == 7 + 5
    assert series(text, "request_generation_tokens_sum")[one] == sum(lengths)


def test_capacity_of_the_cache_is_blocks_times_their_size() -> None:
    (labels,) = (dict(key) for key in series(aliased().render(), "cache_config_info"))
    assert int(labels["block_size"]) * int(labels["num_gpu_blocks"]) == 8 * 4096
    assert (labels["enable_prefix_caching"], labels["gpu_memory_utilization"]) == ("True", "0.9")


def test_an_unknown_kind_of_alias_is_refused_by_name() -> None:
    from pydantic import ValidationError

    from service.settings import Settings, error_messages

    with pytest.raises(ValidationError) as caught:
        Settings.model_validate({"metrics_aliases": "sglang"})
    assert re.match(r"--metrics-aliases \(FLASH_METRICS_ALIASES\): .*vllm", error_messages(caught.value)[0])
