"""Prometheus metrics, under the names that dashboards rely on. All live in the API process.

Workers send their engines' counts (`EngineStats`); request contexts report times and what has ended.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.exposition import generate_latest

from model.request import EngineStats
from service.metrics_aliases import VllmAliases
from service.request_record import RequestRecord

# The `_created` series would be a third of all lines, and nobody uses them.
disable_created_metrics()  # type: ignore[no-untyped-call]

RATE_WINDOW = 10.0  # seconds
PHASES = ("vision", "prefill", "draft", "verify")

SHORT = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
LONG = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0)
PER_TOKEN = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0)
BATCH = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256)
ACCEPTANCE = tuple(range(1, 18))


class Metrics:
    """Every metric of one service; implements `PoolObserver`."""

    def __init__(self, model: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.registry = CollectorRegistry()
        self.aliases: VllmAliases | None = None  # the same under other names, from when the model is loaded
        self._model = model
        self._clock = clock
        self._recent: deque[tuple[float, int]] = deque()  # (time, tokens) of the last RATE_WINDOW seconds

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, ("model", *labels), registry=self.registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(name, text, ("model", *labels), registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            metric = Histogram(name, text, ("model", *labels), registry=self.registry, buckets=buckets)
            return metric if labels else metric.labels(model)  # looked up once: every request observes these

        # Speculation
        self._acceptance_length = histogram(
            "flash_acceptance_length", "Tokens emitted per verify step, bonus token included.", ACCEPTANCE
        )
        self._drafts = counter("flash_spec_drafts_total", "Verify steps with a draft.", "worker")
        self._draft_tokens = counter("flash_spec_draft_tokens_total", "Draft tokens verified.", "worker")
        self._accepted = counter("flash_spec_accepted_tokens_total", "Draft tokens accepted.", "worker")
        self._accepted_at = counter(
            "flash_spec_accepted_tokens_per_position_total",
            "Draft tokens accepted, by position in the draft.",
            "position",
        )

        # Work
        self._tokens_per_second = gauge("flash_tokens_per_second", "Tokens generated per second over the last 10 s.")
        self._prompt_tokens = counter("flash_prompt_tokens_total", "Prompt tokens prefilled.", "worker")
        self._generated = counter("flash_generation_tokens_total", "Tokens generated.", "worker")
        self._requests = counter("flash_requests_total", "Answers that have ended, by outcome.", "outcome")
        self._rejected = counter("flash_requests_rejected_total", "Requests rejected, by reason.", "reason")
        self._cache_queries = counter(
            "flash_encoder_cache_queries_total", "Media looked up in the encoder cache.", "worker"
        )
        self._cache_hits = counter("flash_encoder_cache_hits_total", "Media found in the encoder cache.", "worker")
        self._prefix_queries = counter(
            "flash_prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache.", "worker"
        )
        self._prefix_hits = counter(
            "flash_prefix_cache_hits_total", "Prompt tokens found in the prefix cache.", "worker"
        )

        self._media_cache_queries = counter("flash_media_cache_queries_total", "Media looked up by their uuid.")
        self._media_cache_hits = counter("flash_media_cache_hits_total", "Media found by their uuid.")

        # State
        self._running = gauge("flash_requests_running", "Requests being decoded.", "worker")
        self._waiting = gauge("flash_requests_waiting", "Requests admitted and not yet decoded.", "worker")
        self._kv_usage = gauge("flash_kv_cache_usage_ratio", "Share of the KV cache in use, 0 to 1.", "worker")
        self._media_cache_usage = gauge("flash_media_cache_usage_ratio", "Share of the media cache in use, 0 to 1.")
        self._worker_up = gauge("flash_worker_up", "1 if the worker accepts requests, else 0.", "worker")
        self._restarts = counter("flash_worker_restarts_total", "Restarts of workers that died.", "worker")

        # Times
        self._ttft = histogram(
            "flash_time_to_first_token_seconds", "Seconds from a request's arrival to its first token.", LONG
        )
        self._tpot = histogram(
            "flash_time_per_output_token_seconds", "Mean seconds per token after the first output.", PER_TOKEN
        )
        self._latency = histogram(
            "flash_request_latency_seconds", "Seconds from a request's arrival to the end of its answer.", LONG
        )
        self._queue = histogram("flash_queue_seconds", "Seconds a request waits in the engine for its prefill.", SHORT)
        self._media = histogram("flash_media_seconds", "Seconds to fetch and decode one medium.", SHORT, "kind")
        self._step = histogram("flash_step_seconds", "Seconds of each phase of an engine step.", SHORT, "phase")
        self._batch_size = histogram("flash_batch_size", "Sequences decoded together in a step.", BATCH)

        # A series that first appears with its first event has no rate, so create all known ones at the start.
        self._tokens_per_second.labels(model).set_function(self.tokens_per_second)
        self._media_cache_queries.labels(model)
        self._media_cache_hits.labels(model)
        for outcome in ("stop", "length", "abort", "error", "timeout"):
            self._requests.labels(model, outcome)
        full = ("queue_full", "uploads_full", "bodies_full")
        for reason in (*full, "draining", "loading", "no_worker", "invalid_request"):
            self._rejected.labels(model, reason)
        for kind in ("image", "video"):
            self._media.labels(model, kind)
        for phase in PHASES:
            self._step.labels(model, phase)

    def render(self) -> bytes:
        """Return the text that Prometheus reads."""
        return generate_latest(self.registry) + (self.aliases.render() if self.aliases else b"")

    def tokens_per_second(self) -> float:
        """Return the mean over the last RATE_WINDOW seconds."""
        while self._recent and self._recent[0][0] <= self._clock() - RATE_WINDOW:
            self._recent.popleft()
        return sum(tokens for _, tokens in self._recent) / RATE_WINDOW

    # Called by the pool

    def worker_up(self, worker: int, up: bool) -> None:
        """Set whether a worker is up, and create its series."""
        name = (self._model, str(worker))
        self._worker_up.labels(*name).set(up)
        for counted in (
            *(self._drafts, self._draft_tokens, self._accepted, self._prompt_tokens, self._generated),
            *(self._cache_queries, self._cache_hits, self._restarts),
        ):
            counted.labels(*name)
        if not up:  # a dead worker has no requests
            for gauge in (self._running, self._waiting, self._kv_usage):
                gauge.labels(*name).set(0)

    def worker_restarting(self, worker: int) -> None:
        self._restarts.labels(self._model, str(worker)).inc()

    def engine_stats(self, worker: int, stats: EngineStats) -> None:
        """Add the counts of a worker's engine, and set its gauges."""
        model, name = self._model, (self._model, str(worker))
        self._running.labels(*name).set(stats.running)
        self._waiting.labels(*name).set(stats.waiting)
        self._kv_usage.labels(*name).set(stats.kv_cache_usage)
        self._prompt_tokens.labels(*name).inc(stats.prompt_tokens)
        self._generated.labels(*name).inc(stats.generation_tokens)
        self._drafts.labels(*name).inc(stats.drafts)
        self._draft_tokens.labels(*name).inc(stats.draft_tokens)
        self._accepted.labels(*name).inc(stats.accepted_tokens)
        self._cache_queries.labels(*name).inc(stats.encoder_cache_queries)
        self._cache_hits.labels(*name).inc(stats.encoder_cache_hits)
        self._prefix_queries.labels(*name).inc(stats.prefix_cache_queries)
        self._prefix_hits.labels(*name).inc(stats.prefix_cache_hits)
        for position, accepted in enumerate(stats.accepted_per_position):
            self._accepted_at.labels(model, str(position)).inc(accepted)
        for length in stats.acceptance_lengths:
            self._acceptance_length.observe(length)
        for size in stats.batch_sizes:
            self._batch_size.observe(size)
        for phase, seconds in stats.step_seconds:
            self._step.labels(model, phase).observe(seconds)
        if self.aliases:
            self.aliases.engine_stats(worker, stats)
        if stats.generation_tokens:
            self._recent.append((self._clock(), stats.generation_tokens))

    # Called by the service and its requests

    def watch_unassigned(self, count: Callable[[], float]) -> None:
        """Report requests that no worker has yet (loading media, no worker up) as waiting at the worker ''."""
        self._waiting.labels(self._model, "").set_function(count)

    def watch_media_cache(self, usage: Callable[[], float]) -> None:
        self._media_cache_usage.labels(self._model).set_function(usage)

    def media_cache_query(self, hit: bool) -> None:
        self._media_cache_queries.labels(self._model).inc()
        self._media_cache_hits.labels(self._model).inc(hit)

    def rejected(self, reason: str) -> None:
        self._rejected.labels(self._model, reason).inc()

    def media_done(self, kind: str, seconds: float) -> None:
        self._media.labels(self._model, kind).observe(seconds)

    def first_output(self, seconds: float) -> None:
        """Observe the seconds from a request's arrival to the first output of an answer."""
        self._ttft.observe(seconds)
        if self.aliases:
            self.aliases.first_output(seconds)

    def next_output(self, seconds: float) -> None:
        """Observe the seconds between two outputs of an answer."""
        if self.aliases:
            self.aliases.next_output(seconds)

    def request_ended(self, record: RequestRecord) -> None:
        """Count the answers of a request, or the request where it was accepted and has none."""
        for choice in record.choices:
            self._answered(choice.finish_reason or record.outcome, record.latency)
            if choice.seconds_per_token is not None:
                self._tpot.observe(choice.seconds_per_token)
            if choice.finish_reason is not None:
                self._queue.observe(choice.stats.queue)
        if not record.choices and record.outcome != "refused":
            self._answered(record.outcome, record.latency)
        if self.aliases:
            self.aliases.request_ended(record)

    def _answered(self, outcome: str, latency: float) -> None:
        self._requests.labels(self._model, outcome).inc()
        self._latency.observe(latency)
