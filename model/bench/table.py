"""Every way of drafting beside every other: targets x tasks x sampling, in one run, as text, JSON and plots.

    python -m model.bench.table --drafts demo=runs/drafts --drafts demo-qwen=runs/drafts-qwen --output runs/table

--drafts TARGET=FOLDER: folders in FOLDER that hold a draft are that target's; its FLASH draft is the bundled one unless
there is another. What has no draft is left out. Speeds are those of decoding (without vision and prefill, which no
draft changes), ratios medians over interleaved repeats as in `python -m model.bench`. "of ideal" is speed-up over
acceptance length: 1 where drafting and the wider verification cost nothing. replay:ALPHA is a simulation: a draft that
costs nothing and is right with probability ALPHA a token.

--vllm PYTHON=CHECKPOINT: vLLM beside it, run by that interpreter on that copy of the first target, whole requests, for
greedy image tasks.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from model.bench import options as asked
from model.bench import vllm_peer

TASKS = ("image caption", "image question", "video caption")
SAMPLING = ("greedy", "seeded")
TRAINED = ("flash", "flash-paper", "eagle", "medusa")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default="demo,demo-qwen", help="bundled names or paths (default: demo,demo-qwen)")
    parser.add_argument("--drafts", action="append", default=[], metavar="TARGET=FOLDER")
    parser.add_argument("--replay", default="0.8", help="accuracies of simulated drafts (default: 0.8)")
    parser.add_argument("--batches", default="1", help="how many requests at once (default: 1)")
    parser.add_argument("--prompts", type=int, default=16, help="of each task (default: 16)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--vllm", metavar="PYTHON=CHECKPOINT")
    parser.add_argument("--output", type=Path, help="folder for table.txt, table.json and the plots")
    given = parser.parse_args(argv)
    folders = dict(pair.partition("=")[::2] for pair in given.drafts)
    targets = given.targets.split(",")
    if unknown := set(folders) - set(targets):
        parser.error(f"--drafts names targets that are not measured: {', '.join(sorted(unknown))}")

    from model.bench.run import measure

    rows: list[dict[str, Any]] = []
    machine: dict[str, Any] = {}
    for target in targets:
        for sampling in SAMPLING:
            machine, more = measure(_options(given, target, sampling, Path(folders.get(target, "/nowhere"))))
            rows += more
            print(f"{target}, {sampling}: measured", file=sys.stderr, flush=True)
    if given.vllm:
        python, _, checkpoint = given.vllm.partition("=")
        batches = [int(batch) for batch in given.batches.split(",")]
        rows += vllm_peer.rows(python, checkpoint, targets[0], batches, given.prompts, given.repeats)
    command = shlex.join(["python", "-m", "model.bench.table", *argv])
    result = {"machine": machine, "command": command, "summary": summary(rows), "rows": rows}
    shown = text(result)
    print(shown)
    if given.output:
        given.output.mkdir(parents=True, exist_ok=True)
        (given.output / "table.txt").write_text(shown + "\n")
        (given.output / "table.json").write_text(json.dumps(result, indent=1) + "\n")
        _plot(rows, given.output)
    print(json.dumps(result))


def _options(given: argparse.Namespace, target: str, sampling: str, folder: Path) -> asked.Options:
    from model.config import BUNDLED, drafter_of

    drafts = {drafter_of(found.parent): str(found.parent) for found in sorted(folder.glob("*/config.json"))}
    arms = ["generate", "off", *(n for n in TRAINED if n in drafts or (n == "flash" and target in BUNDLED)), "ngram"]
    arms += [f"{asked.REPLAY}{accuracy}" for accuracy in given.replay.split(",") if accuracy]
    made = asked.parser("python -m model.bench.table")
    argv = ["--model", target, "--drafters", ",".join(arms), "--batches", given.batches, "--sampling", sampling]
    argv += ["--prompts", str(given.prompts), "--repeats", str(given.repeats), "--tasks", ",".join(TASKS)]
    argv += ["--device", given.device, "--dtype", given.dtype]
    return asked.read(made, made.parse_args([*argv, *(part for path in drafts.values() for part in ("--draft", path))]))


Cell = tuple[str, str, str, int]  # target, task, sampling, batch


def cells(rows: list[dict[str, Any]]) -> dict[Cell, dict[str, dict[str, Any]]]:
    """Rows by cell, and in it by drafter."""
    found: dict[Cell, dict[str, dict[str, Any]]] = {}
    for row in rows:
        cell = (row["target"], row["task"], row["sampling"], row["batch"])
        found.setdefault(cell, {})[row["drafter"]] = row
    return found


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How FLASH stands: against each cell's best other drafter, simulations left out, and against plain decoding."""
    leads, greedy, ideal = {}, {}, {}
    for cell, by_drafter in cells(rows).items():
        others = {n: r for n, r in by_drafter.items() if n in (*TRAINED, "ngram") and n != "flash"}
        flash, name = by_drafter.get("flash"), ", ".join(map(str, cell))
        if flash is None or not others:
            continue
        best = max(others, key=lambda n: others[n]["decode_tokens_per_second"])
        lead = flash["decode_tokens_per_second"] / others[best]["decode_tokens_per_second"]
        leads[name] = {"best_other": best, "lead": round(lead, 3)}
        if cell[2] == "greedy" and cell[3] == 1:
            greedy[name] = flash["decode_speedup_over_plain"]
            ideal[name] = round(flash["decode_speedup_over_plain"] / flash["acceptance_length"], 3)
    return {
        "lead": leads,
        "lead_average": round(mean(each["lead"] for each in leads.values()), 3) if leads else None,
        "greedy_speedup": greedy,
        "greedy_speedup_average": round(mean(greedy.values()), 3) if greedy else None,
        "share_of_ideal": ideal,
    }


def text(result: dict[str, Any]) -> str:
    from model.bench.report import aligned

    parts = []
    for (target, task, sampling, batch), by_drafter in cells(result["rows"]).items():
        lines: list[tuple[str, ...]] = [
            ("drafter", "decode/s", "x plain", "x generate", "accept", "of ideal", "tokens/s", "accepted at 1, 2, ...")
        ]
        for name, row in by_drafter.items():
            plain, generate, length = (
                row.get(key)
                for key in ("decode_speedup_over_plain", "decode_speedup_over_generate", "acceptance_length")
            )
            drafted = bool(row.get("accepted_at"))
            lines.append((
                name,
                _number(row.get("decode_tokens_per_second"), 0),
                _number(plain, 2),
                _number(generate, 1),
                _number(length if drafted else None, 2),
                _number(plain / length if drafted and plain else None, 2),
                _number(row["tokens_per_second"], 0),
                " ".join(f"{share:.2f}" for share in row.get("accepted_at", ())),
            ))  # fmt: skip
        parts.append(f"{target}: {task}, {sampling}, {batch} at once\n\n{aligned(lines)}")
    machine = ", ".join(f"{name} {value}" for name, value in result["machine"].items() if value is not None)
    return "\n\n".join([*parts, json.dumps(result["summary"], indent=1), machine])


def _number(value: float | None, places: int) -> str:
    return "-" if value is None else f"{value:.{places}f}"


def _plot(rows: list[dict[str, Any]], folder: Path) -> None:
    """Speed-ups as bars and acceptance by position as lines, a panel for each cell at the smallest batch."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plots: matplotlib is not installed", file=sys.stderr)
        return
    first = min(row["batch"] for row in rows)
    shown = {cell: found for cell, found in cells(rows).items() if cell[3] == first and "off" in found}
    across = len(TASKS)
    down = -(-len(shown) // across)
    names = [n for n in dict.fromkeys(row["drafter"] for row in rows) if n not in ("generate", "off", "vllm")]
    colours = {name: f"C{number}" for number, name in enumerate(names)}
    for file, title in (("speedup.png", "decoding speed over plain"), ("positions.png", "share of drafts accepted")):
        figure = Figure(figsize=(4.2 * across, 2.9 * down), layout="constrained")
        for number, ((target, task, sampling, _), found) in enumerate(shown.items()):
            panel = figure.add_subplot(down, across, 1 + number)
            panel.set_title(f"{target}: {task}, {sampling.partition(' ')[0]}", fontsize=9)
            present = [name for name in names if name in found]
            if file == "speedup.png":
                values = [found[name]["decode_speedup_over_plain"] for name in present]
                panel.bar_label(
                    panel.bar(present, values, color=[colours[name] for name in present]), fmt="%.2f", fontsize=7
                )
                panel.axhline(1.0, color="grey", linewidth=0.8)
                panel.margins(y=0.12)  # room for the numbers on top
                panel.tick_params(axis="x", labelrotation=30, labelsize=7)
            else:
                for name in present:
                    shares = found[name]["accepted_at"]
                    panel.plot(range(1, len(shares) + 1), shares, marker=".", color=colours[name], label=name)
                panel.set_ylim(0, 1.02)
                panel.set_xlabel("position in the draft", fontsize=7)
                panel.legend(fontsize=6)
            panel.tick_params(labelsize=7)
        figure.suptitle(f"{title}, {first} request{'s' * (first > 1)} at once", fontsize=10)
        figure.savefig(folder / file, dpi=80)


if __name__ == "__main__":
    asked.program(main)
