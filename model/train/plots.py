"""Plot the history of a training. Without matplotlib there are no plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

LOSS, ACCEPTANCE, POSITIONS, CALIBRATION = "loss.png", "acceptance.png", "positions.png", "calibration.png"


def draw(
    history: Sequence[dict[str, Any]],
    positions: Sequence[float],
    calibration: Sequence[tuple[float, float, int]],
    folder: Path,
) -> list[str]:
    """Write the plots for which there is data to `folder`, and return their file names.

    history: rows of the training. positions: acceptance rate by position. calibration: as returned by
    `model.engine.speculation.SpeculationController.calibration`. Returns an empty list if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []

    def picture(name: str, x_label: str, y_label: str) -> tuple[Any, Any]:
        figure = Figure(figsize=(6, 3.5), layout="constrained")
        axes = figure.add_subplot()
        axes.set(xlabel=x_label, ylabel=y_label, title=name)
        axes.grid(alpha=0.3)
        return figure, axes

    written = []
    steps = [row for row in history if "loss" in row]
    if steps:
        figure, axes = picture("Loss", "step", "loss")
        losses = [row["loss"] for row in steps]
        axes.plot([row["step"] for row in steps], losses, alpha=0.3, label="each step")
        axes.plot([row["step"] for row in steps], smooth(losses), label="smoothed")
        axes.legend()
        figure.savefig(folder / LOSS)
        written.append(LOSS)
    measured = [row for row in history if "acceptance" in row]
    if measured:
        figure, axes = picture("Held-out acceptance length", "step", "tokens per verify step")
        axes.plot([row["step"] for row in measured], [row["acceptance"]["length"] for row in measured], marker="o")
        axes.set_ylim(bottom=1.0)
        figure.savefig(folder / ACCEPTANCE)
        written.append(ACCEPTANCE)
    if positions:
        figure, axes = picture("Acceptance by position", "position in the draft", "share of drafts")
        axes.bar(range(1, len(positions) + 1), positions)
        axes.set_ylim(0.0, 1.0)
        figure.savefig(folder / POSITIONS)
        written.append(POSITIONS)
    if calibration:
        figure, axes = picture("Calibration", "chance that the draft gives a node", "share of such nodes accepted")
        confidence, seen, nodes = zip(*calibration, strict=True)
        axes.plot((0, 1), (0, 1), linestyle=":", color="grey")
        axes.plot(confidence, seen, alpha=0.3)
        axes.scatter(confidence, seen, [200 * count / max(nodes) for count in nodes])  # marker area: number of nodes
        axes.set(xlim=(0.0, 1.0), ylim=(0.0, 1.0))
        figure.savefig(folder / CALIBRATION)
        written.append(CALIBRATION)
    return written


def smooth(values: Sequence[float], keep: float = 0.95) -> list[float]:
    """Smooth values with an exponential moving average, corrected for the bias of its first values."""
    made, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        made.append(mean / weight)
    return made
