"""Draw the dashboard as one picture, for users without Grafana.

python -m docker.monitoring.draw --prometheus http://127.0.0.1:9090 --minutes 10 --output dashboard.png
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

from docker.monitoring.panels import DASHBOARD, Panel, Prometheus, Series, read

COLUMNS, COLUMN_INCHES, ROW_INCHES = 24, 0.62, 0.34
HEADER_INCHES = 0.75
STYLE: Any = {
    **{"font.size": 8, "font.family": "DejaVu Sans", "axes.titlesize": 9, "axes.titlelocation": "left"},
    **{"axes.titleweight": "bold", "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#8a8f98"},
    **{"axes.grid": True, "grid.color": "#e3e5e8", "grid.linewidth": 0.6, "axes.axisbelow": True},
    **{"xtick.color": "#5a5f68", "ytick.color": "#5a5f68", "legend.frameon": False, "legend.fontsize": 7.5},
}
COLORS = ("#3274d9", "#e0752d", "#56a64b", "#a352cc", "#e02f44", "#0f9d9d", "#b8860b", "#c15c8e", "#6c7a89", "#8ab8ff")
TEXT_COLORS = {"green": "#37872d", "orange": "#d9730d", "red": "#c4162a"}


def shown(value: float, unit: str, decimals: int | None = None) -> str:
    """Format a number in its unit, as Grafana does."""
    if math.isnan(value):
        return "no data"
    if unit == "percentunit":
        return f"{value * 100:.{decimals or 0}f} %"
    if unit == "s":
        for scale, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
            if abs(value) >= scale or (scale == 1e-6 and value):
                return f"{value / scale:.3g} {name}"
        return "0 s"
    suffix = unit.removeprefix("suffix:") if unit.startswith("suffix:") else ""
    number = (
        f"{value:,.{decimals}f}" if decimals is not None else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    )
    return number + suffix


def draw(panels: list[Panel], prometheus: Prometheus, *, start: float, end: float) -> Figure:
    """Draw all panels over the time from `start` to `end` (Unix time), with data from Prometheus."""
    scrape_interval = prometheus.scrape_interval()
    step = max(scrape_interval, (end - start) / 240)
    rows = max(y + height for _, y, _, height in (panel.grid for panel in panels))
    figure = Figure(figsize=(COLUMNS * COLUMN_INCHES, rows * ROW_INCHES + HEADER_INCHES), facecolor="#f4f5f6")
    inches = figure.get_figheight()

    def bottom(y: float) -> float:
        """Return the lower edge of a panel that ends at row y of the grid, as a fraction of the figure's height."""
        return 1 - (HEADER_INCHES + y * ROW_INCHES) / inches

    when = [datetime.fromtimestamp(at, UTC) for at in (start, end)]
    span = f"{when[0]:%Y-%m-%d %H:%M:%S} to {when[1]:%H:%M:%S} UTC"
    figure.text(0.012, 1 - 0.3 / inches, "FlashServe", fontsize=15, fontweight="bold", va="center")
    figure.text(0.988, 1 - 0.3 / inches, span, fontsize=9, color="#5a5f68", ha="right", va="center")
    titled: set[str] = set()
    for panel in panels:
        x, y, width, height = panel.grid
        if panel.row not in titled:
            titled.add(panel.row)
            figure.text(0.012, bottom(y - 0.45), panel.row, fontsize=11, color="#3274d9", va="center")
        left, wide, tall = x / COLUMNS, width / COLUMNS, height * ROW_INCHES / inches
        card = figure.add_axes((left + 0.004, bottom(y + height) + 0.04 / inches, wide - 0.008, tall - 0.08 / inches))
        card.set(xticks=[], yticks=[], facecolor="white")
        card.spines[:].set(visible=True, color="#dcdee2", linewidth=0.8)
        series = [
            replace(one, points=[((at - start) / 60, value) for at, value in one.points])
            for one in prometheus.data(panel, start, end, step, scrape_interval)
        ]
        if panel.kind == "stat":
            _stat(card, panel, series)
            continue
        margin = 0.62 / (COLUMNS * COLUMN_INCHES)
        axes = figure.add_axes(
            (left + margin, bottom(y + height) + 0.62 / inches, wide - margin - 0.012, tall - 0.98 / inches)
        )
        _, _, suffix = panel.unit.partition(":")  # a suffix is in the title, not at every tick
        axes.set_title(f"{panel.title} ({suffix.strip()})" if suffix else panel.title, x=-0.105, pad=7)
        if not any(one.points for one in series):
            axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center")
        else:
            {"timeseries": _lines, "heatmap": _heatmap, "bargauge": _bars}[panel.kind](axes, panel, series)
        if panel.kind != "bargauge":
            axes.set_xlim(0, (end - start) / 60)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda minutes, _: f"{minutes:g} min"))
    return figure


def _times(series: Series) -> list[float]:
    return [at for at, _ in series.points]


def _values(series: Series) -> list[float]:
    return [value for _, value in series.points]


def _unit_axis(axes: Axes, panel: Panel) -> None:
    """Format the ticks of the y axis in the panel's unit."""
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value, panel.unit.partition(":")[0])))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=panel.unit == "none" and axes.get_ylim()[1] > 5))


def _lines(axes: Axes, panel: Panel, series: list[Series]) -> None:
    """Draw a time series panel, with thresholds as dashed lines."""
    # Series that are always zero would only fill the legend.
    drawn = [one for one in series if len(series) <= 3 or any(value > 0 for value in _values(one))]
    times = sorted({at for one in drawn for at in _times(one)})
    below = [0.0] * len(times)
    for index, one in enumerate(drawn):
        color = COLORS[index % len(COLORS)]
        at = dict(zip(_times(one), _values(one), strict=True))
        if panel.stacked:
            top = [
                low + (0.0 if math.isnan(at.get(t, 0.0)) else at.get(t, 0.0))
                for t, low in zip(times, below, strict=True)
            ]
            axes.fill_between(times, below, top, color=color, alpha=0.45, linewidth=0)
            axes.plot(times, top, color=color, linewidth=0.9, label=one.name)
            below = top
        else:
            axes.plot(_times(one), _values(one), color=color, linewidth=1.3, label=one.name)
    largest = axes.get_ylim()[1]
    axes.set_ylim(0, panel.most or (1 if panel.unit == "none" and largest < 1 else largest))
    for limit, color in panel.steps:
        if limit is not None and limit <= axes.get_ylim()[1] * 1.5:
            axes.axhline(limit, color=TEXT_COLORS.get(color, color), linestyle="--", linewidth=1)
            axes.set_ylim(0, panel.most or max(axes.get_ylim()[1], limit * 1.1))
    _unit_axis(axes, panel)
    columns = min(4, max(1, len(drawn)))
    axes.legend(loc="upper left", bbox_to_anchor=(-0.115, -0.1), ncols=columns, handlelength=1.2, columnspacing=1.2)


def _heatmap(axes: Axes, _: Panel, series: list[Series]) -> None:
    """Draw a heatmap. Buckets are cumulative, so each cell shows the difference to the bucket below."""
    ordered = sorted(series, key=lambda one: float(one.labels["le"]))
    times = sorted({at for one in ordered for at in _times(one)})
    counts, below = [], [0.0] * len(times)
    for one in ordered:
        at = dict(zip(_times(one), _values(one), strict=True))
        reached = [at.get(t, math.nan) for t in times]
        counts.append([max(0.0, now - before) for now, before in zip(reached, below, strict=True)])
        below = reached
    while len(counts) > 2 and not any(value > 0 for value in counts[-1]):  # omit empty buckets at the top
        counts.pop()
    heights = [float(one.labels["le"]) for one in ordered[: len(counts)]]
    tops = [height if math.isfinite(height) else heights[-2] + 1 for height in heights]
    mesh = axes.pcolormesh(times, tops, counts, cmap="Blues", shading="nearest", vmin=0)
    axes.grid(visible=False)
    axes.set_yticks(tops, [f"{height:g}" if math.isfinite(height) else "more" for height in heights])
    axes.get_figure(root=True).colorbar(mesh, ax=axes, pad=0.02, aspect=25)  # type: ignore[union-attr]


def _bars(axes: Axes, panel: Panel, series: list[Series]) -> None:
    """Draw one horizontal bar for each series, as long as its mean."""
    names = [one.name for one in series]
    values = [
        sum(known) / len(known) if (known := [v for v in _values(one) if not math.isnan(v)]) else 0 for one in series
    ]
    axes.barh(names, values, color=COLORS[0], height=0.7)
    for place, value in enumerate(values):
        axes.text(value + 0.01, place, shown(value, panel.unit), va="center", fontsize=7.5)
    axes.invert_yaxis()
    axes.set_xlim(0, (panel.most or max(values)) * 1.06)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value, panel.unit)))
    axes.grid(visible=False, axis="y")


def _stat(card: Axes, panel: Panel, series: list[Series]) -> None:
    """Draw the last value of the first series in large type, above a small curve of its history."""
    card.text(0.05, 0.84, panel.title, transform=card.transAxes, fontweight="bold", va="center", fontsize=8)
    known = [value for one in series[:1] for value in _values(one) if not math.isnan(value)]
    last = known[-1] if known else math.nan
    color = "green"
    for limit, name in panel.steps:
        color = name if limit is None or last >= limit else color
    text = shown(last, panel.unit, panel.decimals)
    card.text(0.5, 0.5, text, transform=card.transAxes, fontsize=16, color=TEXT_COLORS[color], ha="center", va="center")
    if len(known) > 1:
        spark = card.inset_axes((0.0, 0.0, 1.0, 0.26))
        spark.fill_between(range(len(known)), known, color=TEXT_COLORS[color], alpha=0.18, linewidth=0)
        spark.plot(known, color=TEXT_COLORS[color], linewidth=0.9)
        spark.set(xlim=(0, len(known) - 1), ylim=(0, max(max(known) * 1.15, 1e-9)))
        spark.axis("off")


def main() -> None:
    """Parse the options, query Prometheus and save the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prometheus", required=True, metavar="URL")
    parser.add_argument("--minutes", type=float, default=15.0, help="how far back it looks (default: 15)")
    parser.add_argument("--until", type=float, help="Unix time at which it ends (default: now)")
    parser.add_argument("--dashboard", type=Path, default=DASHBOARD, help="default: dashboards/flashserve.json")
    parser.add_argument(
        "--output", type=Path, default=Path("dashboard.png"), help=".png or .svg (default: dashboard.png)"
    )
    told = parser.parse_args()
    end = told.until or time.time()
    with Prometheus(told.prometheus) as prometheus, mpl.rc_context(STYLE):
        figure = draw(read(told.dashboard), prometheus, start=end - 60 * told.minutes, end=end)
        figure.savefig(told.output, dpi=100)
    if told.output.suffix == ".png":  # a palette suffices and halves the file
        with Image.open(told.output) as picture:
            picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(told.output, optimize=True)


if __name__ == "__main__":
    main()
