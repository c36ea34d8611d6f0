"""What a service says of itself: its /metrics, read before and after a load, and the difference in figures.

Several addresses are summed, so that replicas behind one load balancer can be asked each for itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx
from prometheus_client.parser import text_string_to_metric_families

Labels = tuple[tuple[str, str], ...]


@dataclass
class Scrape:
    """The samples of all addresses together, by name and labels."""

    samples: dict[str, dict[Labels, float]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(float)))

    def total(self, name: str, **labels: str) -> float:
        wanted = set(labels.items())
        return sum(value for found, value in self.samples.get(name, {}).items() if wanted <= set(found))

    def by(self, name: str, label: str) -> dict[str, float]:
        sums: dict[str, float] = defaultdict(float)
        for labels, value in self.samples.get(name, {}).items():
            sums[dict(labels).get(label, "")] += value
        return dict(sums)

    def __sub__(self, before: Scrape) -> Scrape:
        """What was counted in between. Of gauges it means nothing."""
        difference = Scrape()
        for name, series in self.samples.items():
            for labels, value in series.items():
                difference.samples[name][labels] = value - before.samples.get(name, {}).get(labels, 0.0)
        return difference


def scrape(urls: Sequence[str]) -> Scrape | None:
    """None where any of them does not answer with our metrics: half a sum would mislead."""
    found = Scrape()
    for url in urls:
        try:
            text = httpx.get(url, timeout=10).raise_for_status().text
            families = list(text_string_to_metric_families(text))
        except (httpx.HTTPError, ValueError):
            return None
        for family in families:
            for sample in family.samples:
                found.samples[sample.name][tuple(sorted(sample.labels.items()))] += sample.value
    return found if "flash_requests_total" in found.samples else None


def server_figures(counted: Scrape) -> dict[str, object]:
    """From the difference of two scrapes. Mean acceptance length: 1 + accepted / drafts, the bonus token included."""
    drafts = counted.total("flash_spec_drafts_total")
    draft_tokens = counted.total("flash_spec_draft_tokens_total")
    accepted = counted.total("flash_spec_accepted_tokens_total")
    tokens = counted.total("flash_generation_tokens_total")
    positions = counted.by("flash_spec_accepted_tokens_per_position_total", "position")
    queries = counted.total("flash_encoder_cache_queries_total")
    return {
        "acceptance_length": 1 + accepted / drafts if drafts else None,
        "drafts": drafts,
        "draft_tokens": draft_tokens,
        "accepted_tokens": accepted,
        "accepted_share": accepted / draft_tokens if draft_tokens else None,
        "share_of_output_drafted": accepted / tokens if tokens else None,
        "accepted_by_position": {
            position: positions[position] / drafts for position in sorted(positions, key=int) if drafts
        },
        "generation_tokens": tokens,
        "prompt_tokens": counted.total("flash_prompt_tokens_total"),
        "requests": {k: v for k, v in counted.by("flash_requests_total", "outcome").items() if v},
        "rejected": {k: v for k, v in counted.by("flash_requests_rejected_total", "reason").items() if v},
        "worker_restarts": counted.total("flash_worker_restarts_total"),
        "encoder_cache_hit_share": counted.total("flash_encoder_cache_hits_total") / queries if queries else None,
        "mean_ttft": _mean(counted, "flash_time_to_first_token_seconds"),
        "mean_seconds_per_token": _mean(counted, "flash_time_per_output_token_seconds"),
        "mean_queue": _mean(counted, "flash_queue_seconds"),
        "mean_batch": _mean(counted, "flash_batch_size"),
    }


def _mean(counted: Scrape, name: str) -> float | None:
    number = counted.total(f"{name}_count")
    return counted.total(f"{name}_sum") / number if number else None
