"""Write Grafana's dashboard. Run `python -m docker.monitoring.dashboard` after a change here.

Every panel is one entry of `ROWS`: its queries, its unit and its meaning. The dashboard is built with Grafana's own
library, so that field names are Grafana's. Expressions read the service's metrics directly and need no recording rules.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Literal

from grafana_foundation_sdk.builders import bargauge, common, dashboard, heatmap, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as names
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

OUTPUT = Path(__file__).parent / "dashboards" / "flashserve.json"
SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")

# The alerts' objectives (rules/recording.yml), in seconds.
TTFT_LIMIT, TPOT_LIMIT = 2.5, 0.1

SECONDS, SHARE, COUNT = "s", "percentunit", "none"
TOKENS_PER_SECOND, PER_SECOND = "suffix: tok/s", "suffix:/s"

GREEN, ORANGE, RED = "green", "orange", "red"
Step = tuple[float | None, str]  # colour for values from the first element up; None: from the bottom


@dataclass(frozen=True)
class Panel:
    """Describe one panel of the dashboard."""

    title: str
    unit: str
    description: str
    queries: dict[str, str]  # legend, with labels in {{}} -> expression
    kind: Literal["line", "stack", "stat", "heatmap", "bars"] = "line"
    steps: tuple[Step, ...] = ()
    most: float | None = None  # upper end of the axis
    decimals: int | None = None
    width: int = 8


def chosen(metric: str, *more: str) -> str:
    """Select the series of a metric by the dashboard's variables, and by the label matchers in `more`."""
    labels = ", ".join(('model=~"$model"', 'instance=~"$instance"', *more))
    return f"{metric}{{{labels}}}"


def rate(metric: str, *more: str, by: str = "model") -> str:
    """Sum the per-second rates of a counter's series by the labels `by`."""
    return f"sum by ({by}) (rate({chosen(metric, *more)}[$__rate_interval]))"


def mean(histogram: str, by: str = "model") -> str:
    """Compute the mean of a histogram's observations."""
    return f"{rate(f'{histogram}_sum', by=by)} / {rate(f'{histogram}_count', by=by)}"


def quantile(q: float, histogram: str, *more: str, by: str = "model") -> str:
    """Compute a quantile of a histogram by the labels `by`."""
    return f"histogram_quantile({q}, {rate(f'{histogram}_bucket', *more, by=f'{by}, le')})"


def quantiles(histogram: str) -> dict[str, str]:
    """Map legends to the queries of the 50 %, 95 % and 99 % quantiles of a histogram, by model."""
    return {f"{{{{model}}}} p{q * 100:.0f}": quantile(q, histogram) for q in (0.5, 0.95, 0.99)}


DRAFTS, ACCEPTED = rate("flash_spec_drafts_total"), rate("flash_spec_accepted_tokens_total")
GENERATED = rate("flash_generation_tokens_total")
ACCEPTANCE_LENGTH = f"1 + {ACCEPTED} / {DRAFTS}"
# Zero-padded, because legends are sorted as text: 10 would precede 2.
BY_POSITION = (
    f"label_replace({rate('flash_spec_accepted_tokens_per_position_total', by='position')} "
    f"/ on () group_left sum ({DRAFTS}), "
    '"position", "0$1", "position", "(.)")'
)

ROWS: dict[str, list[Panel]] = {
    "Now": [
        Panel(
            "Workers up",
            COUNT,
            "Engine processes that take requests. None: every request is answered with 503.",
            {"workers": f"sum ({chosen('flash_worker_up')})"},
            kind="stat",
            steps=((None, RED), (1, GREEN)),
            width=3,
        ),
        Panel(
            "Alerts firing",
            COUNT,
            "Of rules/alerts.yml, whatever is chosen above. RUNBOOK.md says what to do about each.",
            {"alerts": 'count (ALERTS{alertname=~"FlashServe.*", alertstate="firing"}) or vector(0)'},
            kind="stat",
            steps=((None, GREEN), (1, RED)),
            width=3,
        ),
        Panel(
            "Output",
            TOKENS_PER_SECOND,
            "Tokens generated in the last ten seconds, as the service counts them.",
            {"tokens/s": f"sum ({chosen('flash_tokens_per_second')})"},
            kind="stat",
            decimals=0,
            width=3,
        ),
        Panel(
            "Acceptance length",
            COUNT,
            "Tokens that a verify step with a draft gives on average, the target's own included. 1 is plain decoding.",
            {"{{model}}": ACCEPTANCE_LENGTH},
            kind="stat",
            decimals=2,
            steps=((None, RED), (1.5, ORANGE), (2, GREEN)),
            width=3,
        ),
        Panel(
            "Output from drafts",
            SHARE,
            "Part of the generated tokens that a draft proposed and the target agreed with.",
            {"{{model}}": f"{ACCEPTED} / {GENERATED}"},
            kind="stat",
            decimals=0,
            width=3,
        ),
        Panel(
            "First token, p95",
            SECONDS,
            f"From a request's arrival to its first token. Red from {TTFT_LIMIT:g} s on, the objective of the alert.",
            {"{{model}}": quantile(0.95, "flash_time_to_first_token_seconds")},
            kind="stat",
            decimals=2,
            steps=((None, GREEN), (TTFT_LIMIT / 2, ORANGE), (TTFT_LIMIT, RED)),
            width=3,
        ),
        Panel(
            "Time per token, p95",
            SECONDS,
            f"Between tokens of one answer, after its first. Red from {TPOT_LIMIT:g} s on, the objective of the alert.",
            {"{{model}}": quantile(0.95, "flash_time_per_output_token_seconds")},
            kind="stat",
            decimals=2,
            steps=((None, GREEN), (TPOT_LIMIT / 2, ORANGE), (TPOT_LIMIT, RED)),
            width=3,
        ),
        Panel(
            "KV memory in use",
            SHARE,
            "Of the fullest worker. When it is full, requests wait until others end.",
            {"kv": f"max ({chosen('flash_kv_cache_usage_ratio')})"},
            kind="stat",
            decimals=0,
            steps=((None, GREEN), (0.8, ORANGE), (0.9, RED)),
            width=3,
        ),
    ],
    "Speculation": [
        Panel(
            "Acceptance length",
            COUNT,
            "1 + accepted tokens / drafts, as answers tell it in `speculation`. It falls when less is drafted (a full "
            "batch) and when the draft is worse; the first token of a draft, below, tells which.",
            {"{{model}}": ACCEPTANCE_LENGTH},
        ),
        Panel(
            "Acceptance length, verify steps",
            COUNT,
            "How many verify steps gave how many tokens. The last step of an answer may give fewer than were accepted.",
            {
                "{{le}}": f"sum by (le) (increase({chosen('flash_acceptance_length_bucket')}[$__rate_interval]))",
            },
            kind="heatmap",
        ),
        Panel(
            "Output from drafts",
            SHARE,
            "Part of the generated tokens that a draft proposed. The rest are the target's own: one of each verify "
            "step, and all of those where nothing was drafted.",
            {"{{model}}": f"{ACCEPTED} / {GENERATED}"},
            most=1,
        ),
        Panel(
            "Accepted, by position in the draft",
            SHARE,
            "Part of all drafts whose token at that position was accepted, over the time shown. None after the first "
            "miss counts, so each bar is at most as long as the one before.",
            {"{{position}}": BY_POSITION},
            kind="bars",
            most=1,
        ),
        Panel(
            "Accepted, by position over time",
            SHARE,
            "The same over time. Position 00 hardly depends on how much is drafted: where it falls, the draft is worse "
            "or requests are of another kind.",
            {"{{position}}": BY_POSITION},
            most=1,
        ),
        Panel(
            "Draft tokens",
            TOKENS_PER_SECOND,
            "Verified: nodes of candidate trees that the target looked at. Accepted: those it agreed with. Trees offer "
            "alternatives, so most nodes are never accepted.",
            {"{{model}} verified": rate("flash_spec_draft_tokens_total"), "{{model}} accepted": ACCEPTED},
        ),
    ],
    "Traffic": [
        Panel(
            "Tokens",
            TOKENS_PER_SECOND,
            "Generated: of answers. Prompt: text and media, as far as they were computed.",
            {"{{model}} generated": GENERATED, "{{model}} prompt": rate("flash_prompt_tokens_total")},
        ),
        Panel(
            "Answers ended",
            PER_SECOND,
            "By how: stop (by itself or a stop string), length, abort (the client left), error, timeout.",
            {"{{outcome}}": rate("flash_requests_total", by="outcome")},
            kind="stack",
        ),
        Panel(
            "Requests refused",
            PER_SECOND,
            "By why. Those that end in _full, draining, loading and no_worker are want of room (503); the others are "
            "the client's.",
            {"{{reason}}": rate("flash_requests_rejected_total", by="reason")},
            kind="stack",
        ),
    ],
    "Time": [
        Panel(
            "Time to first token",
            SECONDS,
            "From arrival: upload, media, queue, vision and prefill. Resolution is that of the buckets.",
            quantiles("flash_time_to_first_token_seconds"),
            steps=((None, "transparent"), (TTFT_LIMIT, RED)),
        ),
        Panel(
            "Time per output token",
            SECONDS,
            "(last - first) / tokens after the first output, one value an answer.",
            {
                **quantiles("flash_time_per_output_token_seconds"),
                "{{model}} mean": mean("flash_time_per_output_token_seconds"),
            },
            steps=((None, "transparent"), (TPOT_LIMIT, RED)),
        ),
        Panel(
            "Latency",
            SECONDS,
            "From arrival to the end of the answer, however it ended.",
            quantiles("flash_request_latency_seconds"),
        ),
        Panel(
            "Queue time",
            SECONDS,
            "From the engine's taking a request to the first computation for it.",
            quantiles("flash_queue_seconds"),
        ),
        Panel(
            "Media time, p95",
            SECONDS,
            "Fetching and decoding one image or video, its waiting for a decoding process included.",
            {"{{kind}}": quantile(0.95, "flash_media_seconds", by="kind")},
        ),
        Panel(
            "Requests inside",
            COUNT,
            "Running: decoded now. Waiting: taken in, not yet decoded (media, queue, no worker). Beyond --max-waiting "
            "requests are refused.",
            {
                "{{model}} running": f"sum by (model) ({chosen('flash_requests_running')})",
                "{{model}} waiting": f"sum by (model) ({chosen('flash_requests_waiting')})",
            },
        ),
    ],
    "Engine": [
        Panel(
            "Batch size",
            COUNT,
            "Sequences decoded together in a step.",
            {
                "{{model}} mean": mean("flash_batch_size"),
                "{{model}} p95": quantile(0.95, "flash_batch_size"),
            },
        ),
        Panel(
            "Step time, by phase",
            SECONDS,
            "Mean time of one pass: of the vision tower, of a chunk of a prompt, of drafting and of verifying for all.",
            {"{{phase}}": mean("flash_step_seconds", by="phase")},
        ),
        Panel(
            "Where the engine's time goes",
            SHARE,
            "Seconds in each phase a second, of all workers. What is missing to the number of workers is idle time and "
            "what lies between phases.",
            {"{{phase}}": rate("flash_step_seconds_sum", by="phase")},
            kind="stack",
        ),
        Panel(
            "KV memory in use",
            SHARE,
            "By worker. When it is full, requests wait until others end.",
            {"{{instance}} worker {{worker}}": chosen("flash_kv_cache_usage_ratio")},
            steps=((None, "transparent"), (0.9, RED)),
            most=1,
        ),
        Panel(
            "Cache hits",
            SHARE,
            "Part of media whose features, of prompt tokens whose keys and values, and of uuids whose file an earlier "
            "request has left; and how full the memory for these files is.",
            {
                f"{{{{model}}}} {what}": f"{rate(f'flash_{cache}_cache_hits_total')} / "
                f"{rate(f'flash_{cache}_cache_queries_total')}"
                for what, cache in (("media", "encoder"), ("prompt tokens", "prefix"), ("uuids", "media"))
            }
            | {"{{instance}} files in memory": chosen("flash_media_cache_usage_ratio")},
            most=1,
        ),
        Panel(
            "Draft tokens per verify step",
            COUNT,
            "How much is drafted: nodes verified for a sequence in a step, where any were. It follows the load.",
            {"{{model}}": f"{rate('flash_spec_draft_tokens_total')} / {DRAFTS}"},
        ),
    ],
    "Processes": [
        Panel(
            "Workers up",
            COUNT,
            "By instance.",
            {"{{instance}}": f"sum by (instance) ({chosen('flash_worker_up')})"},
        ),
        Panel(
            "Workers restarted",
            COUNT,
            "Deaths of workers that were replaced, in the last five minutes. Their streams go on at another worker or "
            "at the new one.",
            {"{{instance}} worker {{worker}}": f"increase({chosen('flash_worker_restarts_total')}[5m])"},
        ),
        Panel(
            "Instances that answer",
            COUNT,
            "Targets of the job flashserve that Prometheus can read, and those it cannot.",
            {
                "up": 'sum (up{job="flashserve", instance=~"$instance"})',
                "down": 'count (up{job="flashserve", instance=~"$instance"}) '
                '- sum (up{job="flashserve", instance=~"$instance"})',
            },
        ),
    ],
}

Builder = timeseries.Panel | stat.Panel | heatmap.Panel | bargauge.Panel


def build() -> str:
    """Build the dashboard and return it as JSON."""
    made = (
        dashboard.Dashboard("FlashServe")
        .uid("flashserve")
        .description("Vision-language serving with FLASH speculation. Written by docker/monitoring/dashboard.py.")
        .tags(["flashserve", "llm", "speculative decoding"])
        .time("now-1h", "now")
        .refresh("10s")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(_choice("model", "Model", "label_values(flash_worker_up, model)"))
        .with_variable(_choice("instance", "Instance", 'label_values(flash_worker_up{model=~"$model"}, instance)'))
    )
    ids = count(1)
    for title, panels in ROWS.items():
        made.with_row(dashboard.Row(title).id(next(ids)))
        for panel in panels:
            made.with_panel(_panel(panel).id(next(ids)))
    return json.dumps(made.build(), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"


def _choice(name: str, label: str, query: str) -> dashboard.QueryVariable:
    """Create a variable whose values come from a query; several may be selected, and all are by default."""
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .query(query)
        .datasource(SOURCE)
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(models.VariableOption(selected=True, text=["All"], value=["$__all"]))
    )


def _panel(panel: Panel) -> Builder:
    """Convert a panel to Grafana's, with its queries, unit, axis and thresholds."""
    made = KINDS[panel.kind](panel)
    made.title(panel.title).description(panel.description).datasource(SOURCE).unit(panel.unit)
    made.height(4 if panel.kind == "stat" else 8).span(panel.width).min(0)
    if panel.most is not None:
        made.max(panel.most)
    if panel.decimals is not None:
        made.decimals(panel.decimals)
    if panel.steps:
        steps = [models.Threshold(value=value, color=color) for value, color in panel.steps]
        made.thresholds(dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps))
    for letter, (legend, expr) in zip("ABCDEF", panel.queries.items(), strict=False):
        query = prometheus.Dataquery().ref_id(letter).expr(expr).legend_format(legend).range().datasource(SOURCE)
        made.with_target(query.format(PromQueryFormat.HEATMAP) if panel.kind == "heatmap" else query)
    return made


def _line(panel: Panel) -> timeseries.Panel:
    """Create a time series panel, stacked or not, with thresholds as dashed lines."""
    made = (
        timeseries.Panel()
        .line_width(1)
        .show_points(names.VisibilityMode.NEVER)
        .tooltip(common.VizTooltipOptions().mode(names.TooltipDisplayMode.MULTI).sort(names.SortOrder.DESCENDING))
        .legend(
            common.VizLegendOptions()
            .show_legend(True)
            .display_mode(names.LegendDisplayMode.LIST)
            .placement(names.LegendPlacement.BOTTOM)
        )
    )
    if panel.kind == "stack":
        made.fill_opacity(40).stacking(common.StackingConfig().mode(names.StackingMode.NORMAL))
    if panel.steps:
        made.thresholds_style(common.GraphThresholdsStyleConfig().mode(names.GraphThresholdsStyleMode.DASHED))
    return made


def _reduce(how: str) -> common.ReduceDataOptions:
    return common.ReduceDataOptions().calcs([how]).values(False)


def _stat(_: Panel) -> stat.Panel:
    """Create a panel of one large number with a curve behind it."""
    return (
        stat.Panel()
        .reduce_options(_reduce("lastNotNull"))
        .graph_mode(names.BigValueGraphMode.AREA)
        .color_mode(names.BigValueColorMode.VALUE)
    )


def _heatmap(panel: Panel) -> heatmap.Panel:
    """Create a heatmap of a histogram's buckets."""
    color = heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Blues").reverse(False).steps(32)
    return heatmap.Panel().calculate(False).color(color).y_axis(heatmap.YAxisConfig().unit(panel.unit).decimals(0))


def _bars(_: Panel) -> bargauge.Panel:
    """Create a panel of horizontal bars, one for each series."""
    return (
        bargauge.Panel()
        .reduce_options(_reduce("mean"))
        .orientation(names.VizOrientation.HORIZONTAL)
        .display_mode(names.BarGaugeDisplayMode.BASIC)
    )


KINDS: dict[str, Callable[[Panel], Builder]] = {
    **{"line": _line, "stack": _line, "stat": _stat},
    **{"heatmap": _heatmap, "bars": _bars},
}


def main() -> None:
    """Write the dashboard to OUTPUT and print its path."""
    OUTPUT.write_text(build())
    sys.stdout.write(f"{OUTPUT}\n")


if __name__ == "__main__":
    main()
