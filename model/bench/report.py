"""Shows figures: the machine that they were measured on, an aligned table, the JSON object."""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

HEADINGS = (
    "task", "batch", "drafter", "tokens/s", "x plain", "x generate", "decode/s", "x plain", "x generate",
    "accept", "vision/prefill/draft/verify/other", "same",
)  # fmt: skip


def machine(device: str, dtype: str) -> dict[str, Any]:
    """Describe the machine and the versions of torch and transformers."""
    gpu = torch.device(device).type == "cuda"
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name(torch.device(device)) if gpu else None,
        "device": device,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),  # at the start: what else was running
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def show(result: dict[str, Any], table: str, output: Path | None) -> None:
    """Print the table with the machine and, last, the JSON object; write that to `output`, too."""
    description = ", ".join(f"{name} {value}" for name, value in result["machine"].items() if value is not None)
    print(f"\n{table}\n\n{description}\n")
    if output:
        output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))
    sys.stdout.flush()


def target_name(model: str) -> str:
    """Name a target: a folder by its last part, since figures get published and paths need not be."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def table(rows: list[dict[str, Any]]) -> str:
    """Write the benchmark's rows as a table."""
    lines: list[tuple[str, ...]] = [HEADINGS]
    for row in rows:
        share = row["share"]
        lines.append((
            row["task"],
            str(row["batch"]),
            row["drafter"],
            f"{row['tokens_per_second']:.1f}",
            _ratio(row, "speedup_over_plain"),
            _ratio(row, "speedup_over_generate"),
            f"{row['decode_tokens_per_second']:.1f}",
            _ratio(row, "decode_speedup_over_plain"),
            _ratio(row, "decode_speedup_over_generate"),
            f"{row['acceptance_length']:.2f}" if row["drafter"] not in ("generate", "off") else "-",
            " ".join(f"{value:.0%}" for value in share.values()) if share else "-",
            "-" if row["same_tokens_as_plain"] is None else f"{row['same_tokens_as_plain']:.0%}",
        ))  # fmt: skip
    return aligned(lines)


def _ratio(row: dict[str, Any], name: str) -> str:
    if row[name] is None:
        return "-"
    low, high = row[f"{name}_range"]
    return f"{row[name]:.2f} [{low:.2f}-{high:.2f}]"


def aligned(lines: list[tuple[str, ...]]) -> str:
    """Align columns: words to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = [not any(line[i][:1].isdigit() for line in lines[1:]) for i in range(len(widths))]
    padded = (
        "  ".join(
            cell.ljust(w) if to_left else cell.rjust(w) for cell, w, to_left in zip(line, widths, left, strict=True)
        )
        for line in lines
    )
    return "\n".join(line.rstrip() for line in padded)
