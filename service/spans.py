"""Spans of requests, sent to an OpenTelemetry collector by OTLP over HTTP. Needs the extra `otel`.

A request is one span, with one child for each stage that it reached: upload, media, queue, prefill, decode. They are
made when the request has ended, with the times that were noted on its way, so that no token waits for them. Attributes
are those of the conventions for generative AI; nothing of what clients send or get is among them.

Sampling, headers, certificates, batches and limits of the queue are set by OpenTelemetry's own variables
(OTEL_TRACES_SAMPLER, OTEL_EXPORTER_OTLP_HEADERS, OTEL_BSP_MAX_QUEUE_SIZE, ...).
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from urllib.parse import urlsplit

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.span import TraceFlags, TraceState
from opentelemetry.util.types import AttributeValue

import model
from service.request_record import RequestRecord
from service.trace_context import TraceContext
from service.usage import usage

log = logging.getLogger("flashserve.traces")

OPERATIONS = {"/v1/completions": "text_completion", "/v1/generate": "generate_content"}  # others: chat
Attributes = dict[str, AttributeValue]


class OtlpTracer:
    """Makes spans of requests and hands them to a thread that sends them."""

    def __init__(self, model_name: str, url: str) -> None:
        """url: where the collector takes traces."""
        self._model = model_name
        self._exporter = _QuietExporter(url)
        self._provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("flashserve", model.__version__)

    def request_ended(self, record: RequestRecord) -> None:
        """Make the spans of a request, unless it is not sampled."""
        # To nanoseconds of the wall clock, as spans have them.
        offset = time.time_ns() - round(time.monotonic() * 1e9)
        operation = OPERATIONS.get(record.route, "chat")
        span = self._tracer.start_span(
            f"{operation} {self._model}",
            context=_parent(record.trace),
            kind=SpanKind.SERVER,
            attributes={"gen_ai.operation.name": operation, "gen_ai.request.model": self._model},
            start_time=offset + round(record.arrived * 1e9),
        )
        if not span.is_recording():
            return
        within = set_span_in_context(span, Context())
        for name, begun, ended in _stages(record):
            stage = self._tracer.start_span(name, context=within, start_time=offset + round(begun * 1e9))
            stage.end(offset + round(ended * 1e9))
        span.set_attributes(_attributes(record) | {"gen_ai.response.model": self._model})
        if record.error and record.outcome in ("error", "timeout"):
            span.set_status(Status(StatusCode.ERROR, record.error))
        span.end(offset + round(record.ended * 1e9))

    async def close(self, seconds: float) -> None:
        """Send what was not sent yet, for so long at most."""
        loop, sent = asyncio.get_running_loop(), asyncio.Event()

        def flush() -> None:
            self._provider.shutdown()
            with suppress(RuntimeError):  # too late: the loop is closed
                loop.call_soon_threadsafe(sent.set)

        threading.Thread(target=flush, name="last-traces", daemon=True).start()
        try:
            async with asyncio.timeout(seconds):
                await sent.wait()
        except TimeoutError:
            log.warning("the last traces could not be sent in %g s", seconds)
            self._exporter.shutdown()


class _QuietExporter(SpanExporter):
    """Sends spans, and logs only when that begins to fail and when it works again. What fails is dropped."""

    def __init__(self, url: str) -> None:
        self._exporter = OTLPSpanExporter(endpoint=url)
        self._works = True
        self._collector = urlsplit(url).netloc.rpartition("@")[2]  # without a password
        self._reasons = _LastMessage()
        library = logging.getLogger("opentelemetry")  # it would log every failure
        library.handlers, library.propagate = [self._reasons], False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        works = result is SpanExportResult.SUCCESS
        if self._works and not works:
            log.warning("traces cannot be sent to %s and are dropped: %s", self._collector, self._reasons.text)
        elif works and not self._works:
            log.warning("traces are sent to %s again", self._collector)
        self._works = works
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()  # type: ignore[no-untyped-call]

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)


class _LastMessage(logging.Handler):
    """Keeps the last warning of a library."""

    text = "the collector did not take them"

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            self.text = record.getMessage()[:200]


def _resource() -> Resource:
    """Describe this service, under the name and with the attributes that OpenTelemetry's variables say."""
    named = os.environ.get("OTEL_SERVICE_NAME") or "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    name: Attributes = {} if named else {"service.name": "flashserve"}
    return Resource.create({"service.version": model.__version__, **name})


def _parent(trace: TraceContext | None) -> Context:
    """Return the context of the client's span, or one without a span."""
    if trace is None:
        return Context()
    state = TraceState.from_header([trace.state]) if trace.state else None
    parent = SpanContext(int(trace.trace_id, 16), int(trace.parent_id, 16), True, TraceFlags(trace.flags), state)
    return set_span_in_context(NonRecordingSpan(parent), Context())


def _stages(record: RequestRecord) -> Iterator[tuple[str, float, float]]:
    """Yield the name, beginning and end of each stage that a request reached. Of several choices, the earliest one that
    begins a stage and the latest that ends it."""
    load_at, loaded_at, submitted_at = (
        record.ended if moment is None else moment for moment in (record.load_at, record.loaded_at, record.submitted_at)
    )
    yield "upload", record.arrived, load_at
    if record.num_media or (record.load_at is not None and record.submitted_at is None):
        yield "media", load_at, loaded_at
    if record.submitted_at is None:
        return
    first_at = min((one.first_at for one in record.choices if one.first_at is not None), default=record.ended)
    queued = [one.stats.queue for one in record.choices if one.finish_reason is not None]
    if queued:
        started_at = min(submitted_at + min(queued), first_at)
        yield "queue", submitted_at, started_at
        yield "prefill", started_at, first_at
    else:  # only the engine knows when it began, and reports it at the end
        yield "queue and prefill", submitted_at, first_at
    if first_at < record.ended:
        yield "decode", first_at, max(first_at, *(one.last_at for one in record.choices))


def _attributes(record: RequestRecord) -> Attributes:
    """Describe a request and its answers, without a word of them."""
    attributes: Attributes = {
        "gen_ai.provider.name": "flashserve",
        "gen_ai.response.id": record.id,
        "http.route": record.route,
        "flashserve.media.count": record.num_media,
    }
    if record.client_id is not None:
        attributes["flashserve.request_id"] = record.client_id
    if record.error is not None:
        attributes["error.type"] = record.error
    return attributes | (_answers(record) if record.choices else {})


def _answers(record: RequestRecord) -> Attributes:
    """Describe how answers were requested, and what became of them."""
    choices, params = record.choices, record.choices[0].generation.submit.params
    stats = [choice.stats for choice in choices]
    tokens = usage(stats, record.num_prompts)
    drafts, accepted = sum(one.drafts for one in stats), sum(one.accepted_tokens for one in stats)
    attributes: Attributes = {
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.frequency_penalty": params.frequency_penalty,
        "gen_ai.request.presence_penalty": params.presence_penalty,
        "gen_ai.request.choice.count": len(choices) // record.num_prompts,
        "gen_ai.output.type": "json" if params.grammar and params.grammar.kind.startswith("json") else "text",
        "gen_ai.response.finish_reasons": [choice.finish_reason or record.outcome for choice in choices],
        "gen_ai.usage.input_tokens": tokens["prompt_tokens"],
        "gen_ai.usage.output_tokens": sum(choice.num_tokens for choice in choices),
        "gen_ai.usage.cache_read.input_tokens": tokens["prompt_tokens_details"]["cached_tokens"],
        "flashserve.speculation.drafts": drafts,
        "flashserve.speculation.draft_tokens": sum(one.draft_tokens for one in stats),
        "flashserve.speculation.accepted_tokens": accepted,
    }
    if params.top_k:
        attributes["gen_ai.request.top_k"] = params.top_k
    if drafts:
        attributes["flashserve.speculation.acceptance_length"] = 1 + accepted / drafts
    if record.time_to_first_token is not None:
        attributes["gen_ai.server.time_to_first_token"] = record.time_to_first_token
    times = [choice.seconds_per_token for choice in choices if choice.seconds_per_token is not None]
    if times:
        attributes["gen_ai.server.time_per_output_token"] = sum(times) / len(times)
    return attributes
