"""The service's metrics under the names, types and labels of vLLM's, for dashboards and autoscalers that ask for those.

What `Metrics` counts under a name of its own is renamed when it is read. What only vLLM reports, or reports in other
buckets, is observed here. What belongs to no one worker has the engine "0": the times of requests, and requests that no
worker has yet.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from model.request import EngineInfo, EngineStats
from service.request_record import RequestRecord

PREFIX = "vllm:"
LABELS = ("model_name", "engine")
LABEL_NAMES = {"model": "model_name", "worker": "engine", "outcome": "finished_reason"}
BLOCK_SIZE = 16  # tokens; a unit in which the size of the KV cache is reported, vLLM's default

# Ours and theirs, counters without `_total`. The later ones of several are former names.
RENAMED = {
    "flash_requests_running": ["num_requests_running"],
    "flash_requests_waiting": ["num_requests_waiting"],
    "flash_kv_cache_usage_ratio": ["kv_cache_usage_perc", "gpu_cache_usage_perc"],
    "flash_prompt_tokens": ["prompt_tokens"],
    "flash_generation_tokens": ["generation_tokens"],
    "flash_requests": ["request_success"],
    "flash_prefix_cache_queries": ["prefix_cache_queries", "gpu_prefix_cache_queries"],
    "flash_prefix_cache_hits": ["prefix_cache_hits", "prompt_tokens_cached", "gpu_prefix_cache_hits"],
    "flash_encoder_cache_queries": ["mm_cache_queries"],
    "flash_encoder_cache_hits": ["mm_cache_hits"],
    "flash_spec_drafts": ["spec_decode_num_drafts"],
    "flash_spec_draft_tokens": ["spec_decode_num_draft_tokens"],
    "flash_spec_accepted_tokens": ["spec_decode_num_accepted_tokens"],
    "flash_spec_accepted_tokens_per_position": ["spec_decode_num_accepted_tokens_per_pos"],
}

FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
    *(160.0, 640.0, 2560.0),
)
NEXT_TOKEN = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0),
    *(1920.0, 7680.0),
)
STEP = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
NUM_CHOICES = (1, 2, 5, 10, 20)


class VllmAliases:
    """Metrics of one service, under vLLM's names."""

    def __init__(
        self,
        ours: CollectorRegistry,
        model: str,
        info: EngineInfo,
        *,
        num_engines: int,
        prefix_cache: bool,
        memory_utilization: float,
    ) -> None:
        """Rename what is in `ours` and observe the rest. The last two are settings that vLLM publishes."""
        self._registry = CollectorRegistry()
        self._registry.register(_Renamed(ours))

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            metric = Histogram(PREFIX + name, text, LABELS, registry=self._registry, buckets=buckets)
            return metric.labels(model, "0")

        lengths = _1_2_5(info.max_model_len)
        self._first_token = histogram("time_to_first_token_seconds", "Seconds to the first token.", FIRST_TOKEN)
        self._next_token = [
            histogram(name, "Seconds between two outputs of an answer.", NEXT_TOKEN)
            for name in ("inter_token_latency_seconds", "time_per_output_token_seconds")  # the second: its former name
        ]
        self._per_token = histogram(
            "request_time_per_output_token_seconds", "Mean seconds per token of an answer.", NEXT_TOKEN
        )
        self._latency = histogram("e2e_request_latency_seconds", "Seconds from arrival to the end.", REQUEST)
        self._queue = histogram("request_queue_time_seconds", "Seconds until the prefill.", REQUEST)
        self._prefill = histogram("request_prefill_time_seconds", "Seconds of the prefill.", REQUEST)
        self._decode = histogram("request_decode_time_seconds", "Seconds from the first token to the last.", REQUEST)
        self._inference = histogram("request_inference_time_seconds", "Seconds of prefill and decoding.", REQUEST)
        self._prompt = histogram("request_prompt_tokens", "Prompt tokens of an answer.", lengths)
        self._computed = histogram("request_prefill_kv_computed_tokens", "Prompt tokens that were not cached.", lengths)
        self._generated = histogram("request_generation_tokens", "Tokens of an answer.", lengths)
        self._longest = histogram("request_max_num_generation_tokens", "Tokens of a request's longest answer.", lengths)
        self._max_tokens = histogram("request_params_max_tokens", "max_tokens of an answer.", lengths)
        self._n = histogram("request_params_n", "n of a request.", NUM_CHOICES)
        step = Histogram(
            PREFIX + "iteration_tokens_total",
            "Tokens of an engine step.",
            LABELS,
            registry=self._registry,
            buckets=STEP,
        )
        cache = {
            "block_size": BLOCK_SIZE,
            "num_gpu_blocks": info.max_num_seqs * info.max_model_len // BLOCK_SIZE,
            "cache_dtype": info.dtype,
            "enable_prefix_caching": prefix_cache,
            "gpu_memory_utilization": memory_utilization,
        }
        size = Gauge(PREFIX + "cache_config_info", "The KV cache.", (*cache, "engine"), registry=self._registry)
        preemptions = Counter(PREFIX + "num_preemptions", "There are none.", LABELS, registry=self._registry)
        self._step = [step.labels(model, str(engine)) for engine in range(num_engines)]
        for engine in range(num_engines):
            size.labels(*cache.values(), engine).set(1)
            preemptions.labels(model, engine)

    def render(self) -> bytes:
        """Return the text that Prometheus reads."""
        return generate_latest(self._registry)

    def engine_stats(self, worker: int, stats: EngineStats) -> None:
        """Observe the tokens of a worker's steps."""
        for tokens in stats.step_tokens:
            self._step[worker].observe(tokens)

    def first_output(self, seconds: float) -> None:
        """Observe the seconds from a request's arrival to the first output of an answer."""
        self._first_token.observe(seconds)

    def next_output(self, seconds: float) -> None:
        """Observe the seconds between two outputs of an answer."""
        for histogram in self._next_token:
            histogram.observe(seconds)

    def request_ended(self, record: RequestRecord) -> None:
        """Observe the answers of a request that the engine finished."""
        finished = [choice for choice in record.choices if choice.finish_reason is not None]
        if not finished:
            return
        n = len(record.choices) // record.num_prompts
        for at in range(0, len(record.choices), n):
            self._n.observe(n)
            self._longest.observe(max(choice.num_tokens for choice in record.choices[at : at + n]))
        for choice in finished:
            stats = choice.stats
            prefill = max(0.0, stats.time_to_first_token - stats.queue)
            self._latency.observe(record.latency)
            self._queue.observe(stats.queue)
            self._prefill.observe(prefill)
            self._decode.observe(stats.decode)
            self._inference.observe(prefill + stats.decode)
            self._per_token.observe(choice.seconds_per_token or 0.0)
            self._prompt.observe(stats.prompt_tokens)
            self._computed.observe(stats.prompt_tokens - stats.cached_tokens)
            self._generated.observe(choice.num_tokens)
            self._max_tokens.observe(choice.generation.submit.params.max_tokens)


class _Renamed(Collector):
    """Yields the metrics of another registry under vLLM's names."""

    def __init__(self, ours: CollectorRegistry) -> None:
        self._ours = ours

    def collect(self) -> Iterator[Metric]:
        for metric in self._ours.collect():
            for name in RENAMED.get(metric.name, ()):
                yield _renamed(metric, PREFIX + name)


def _renamed(metric: Metric, name: str) -> Metric:
    """Return a counter or gauge with vLLM's name and labels; series that then have the same labels are added up."""
    totals: dict[tuple[tuple[str, str], ...], float] = defaultdict(float)
    for sample in metric.samples:
        labels = {LABEL_NAMES.get(label, label): value for label, value in sample.labels.items()}
        labels["engine"] = labels.get("engine") or "0"
        if labels.get("finished_reason") == "timeout":
            labels["finished_reason"] = "abort"
        totals[tuple(labels.items())] += sample.value
    renamed = Metric(name, metric.documentation, metric.type)
    for key, total in totals.items():
        renamed.add_sample(name + ("_total" if metric.type == "counter" else ""), dict(key), total)
    return renamed


def _1_2_5(maximum: int) -> list[int]:
    """Return 1, 2, 5, 10, 20, 50 and so on, up to a maximum."""
    steps = (digit * 10**power for power in range(len(str(maximum))) for digit in (1, 2, 5))
    return [step for step in steps if step <= maximum]
