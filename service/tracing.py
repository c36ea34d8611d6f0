"""Traces of requests for an OpenTelemetry collector: whether they are wanted, and where they go.

They are on with `--otlp-endpoint`, or with the variables that OpenTelemetry defines for every program. Spans are made
in service/spans.py, which needs the extra `otel`.
"""

from __future__ import annotations

import logging
import os
from typing import Protocol

from service import extras
from service.request_record import RequestRecord
from service.settings import Settings

log = logging.getLogger("flashserve")

TRACES_PATH = "/v1/traces"


class Tracer(Protocol):
    """Sends what is known of requests to a collector."""

    def request_ended(self, record: RequestRecord) -> None: ...
    async def close(self, seconds: float) -> None: ...


def start_tracer(settings: Settings) -> Tracer | None:
    """Return a tracer; None where no collector is configured, or OpenTelemetry's variables turn traces off."""
    url = traces_url(settings.otlp_endpoint)
    if url is None:
        return None
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or os.environ.get("OTEL_TRACES_EXPORTER") == "none":
        return None
    if not extras.has_otel():  # with the option, Settings has refused to start
        log.warning("no traces: OpenTelemetry's variables name a collector, but the extra otel is not installed")
        return None
    from service.spans import OtlpTracer

    return OtlpTracer(settings.model_name, url)


def traces_url(endpoint: str | None) -> str | None:
    """Return where traces are sent. endpoint: a collector's URL, with or without the path of traces; None: as
    OpenTelemetry's variables say."""
    if not endpoint:
        if url := os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
            return url  # as it is
        endpoint = os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    return endpoint.rstrip("/").removesuffix(TRACES_PATH) + TRACES_PATH if endpoint else None
