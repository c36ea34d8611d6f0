"""What dashboards for vLLM ask of Prometheus: its metrics by name, in the forms in which panels use them.

Written from the names that vLLM documents. Its published dashboards (examples/observability in its repository,
Apache-2.0) ask these metrics in these forms; none of their text is here.
"""

from __future__ import annotations

from collections.abc import Iterator

RATE = "$__rate_interval"
TIMES = ("e2e_request_latency_seconds", "time_to_first_token_seconds", "inter_token_latency_seconds")
STAGES = (
    *("request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds"),
    *("request_inference_time_seconds", "time_per_output_token_seconds", "request_time_per_output_token_seconds"),
)
LENGTHS = (
    *("request_prompt_tokens", "request_generation_tokens", "request_max_num_generation_tokens"),
    *("request_params_max_tokens", "request_params_n", "iteration_tokens_total"),
)
TOKENS = ("prompt_tokens_total", "generation_tokens_total")
GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "gpu_cache_usage_perc")
SPECULATION = ("spec_decode_num_accepted_tokens_total", "spec_decode_num_draft_tokens_total")


def queries(model: str) -> Iterator[str]:
    """Yield every metric in every form, of one model: as a matcher, as a regular expression, and of all models."""
    for chosen in (f'{{model_name="{model}"}}', f'{{model_name=~"{model}|x"}}', ""):
        for name in (*TIMES, *STAGES, *LENGTHS):
            metric = f"vllm:{name}"
            for quantile in (0.5, 0.9, 0.95, 0.99):
                for labels in ("le", "le, model_name"):
                    buckets = f"sum by ({labels}) (rate({metric}_bucket{chosen}[{RATE}]))"
                    yield f"histogram_quantile({quantile}, {buckets})"
            yield f"rate({metric}_sum{chosen}[{RATE}]) / rate({metric}_count{chosen}[{RATE}])"
            yield f"sum(increase({metric}_sum{chosen}[{RATE}])) / sum(increase({metric}_count{chosen}[{RATE}]))"
            yield f"sum by (le) (increase({metric}_bucket{chosen}[{RATE}]))"
            yield f"rate({metric}_sum{chosen}[{RATE}])"
            yield f"rate({metric}_count{chosen}[{RATE}])"
        for name in TOKENS:
            yield f"rate(vllm:{name}{chosen}[{RATE}])"
            yield f"sum by (model_name) (rate(vllm:{name}{chosen}[{RATE}]))"
            answers = f"sum(rate(vllm:request_success_total{chosen}[{RATE}]))"
            yield f"sum(rate(vllm:{name}{chosen}[{RATE}])) / {answers}"
        for name in GAUGES:
            yield f"vllm:{name}{chosen}"
            yield f"sum(vllm:{name}{chosen})"
        yield f"sum by (finished_reason) (increase(vllm:request_success_total{chosen}[{RATE}]))"
        for cache in ("prefix_cache", "mm_cache"):
            hits, lookups = (f"rate(vllm:{cache}_{name}_total{chosen}[{RATE}])" for name in ("hits", "queries"))
            yield f"{hits} / {lookups}"
        accepted, drafted = (f"rate(vllm:{name}{chosen}[{RATE}])" for name in SPECULATION)
        drafts = f"rate(vllm:spec_decode_num_drafts_total{chosen}[{RATE}])"
        yield f"{accepted} / {drafted}"
        yield f"1 + {accepted} / {drafts}"
        positions = f"rate(vllm:spec_decode_num_accepted_tokens_per_pos_total{chosen}[{RATE}])"
        yield f"{positions} / ignoring (position) group_left () {drafts}"
        yield f"vllm:num_preemptions_total{chosen}"
    yield "vllm:cache_config_info"
