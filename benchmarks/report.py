"""What is left of a run: a table in Markdown, all samples in JSON, a plot."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from .children import ROOT
from .results import Result

HEADER = ("measurement", "native", "ours", "ours / native (min-max)", "native / ours", "target", "met")
PACKAGES = ("torch", "transformers", "numpy", "tokenizers", "safetensors", "pillow")
BETTER, SAME, WORSE, BOUND = "#2a78b5", "#9aa5ad", "#c2571a", "#333333"
EQUAL = 0.03  # what differs by less is drawn in grey
WIDEST = 1.5  # end of the plot's axis


def environment(started_load: float) -> dict[str, Any]:
    """Machine, versions and commit; `started_load` is the load average before anything was measured."""
    import torch

    import cornstarch_hf

    return {
        "machine": platform.platform(),
        "processor": _processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average_before": round(started_load, 2),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "cornstarch_hf": cornstarch_hf.__version__,
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "command": " ".join(["python -m benchmarks.run", *sys.argv[1:]]),
    }


def _processor_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)
    return found or platform.processor()


def _git(*arguments: str) -> str | None:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _amount(values: Sequence[float], unit: str) -> str:
    value = median(values)
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def _row(result: Result) -> tuple[str, ...]:
    return (
        result.name,
        _amount(result.native, result.unit),
        _amount(result.ours, result.unit),
        f"{result.ratio:.3f} ({min(result.ratios):.3f}-{max(result.ratios):.3f})",
        f"{result.inverse:.2f}",
        str(result.target or ""),
        {True: "yes", False: "NO", None: ""}[result.met],
    )


def table(results: Sequence[Result], about: dict[str, Any]) -> str:
    """Medians in Markdown; ratios are medians over pairs, and below 1 ours is better."""
    rows = [HEADER, *(_row(result) for result in results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    head = (
        f"{about['processor']}, {about['cores']} cores, {about['threads']} threads, "
        f"load before {about['load_average_before']}; "
        f"torch {about['torch']}, transformers {about['transformers']}; commit {(about['commit'] or 'none')[:12]}"
        f"{' with uncommitted changes' if about['uncommitted_changes'] else ''}; {about['seconds']:.0f} s."
    )
    equal = "Logits, greedy tokens and, with all logits, losses and gradients were equal to the bit before anything was timed."
    return "\n".join([head, equal if about["checked"] else "", "", *lines, ""])


def plot(results: Sequence[Result], path: Path) -> None:
    """Ratios of ours to native with the middle half of their samples, a line at 1, and a mark at each target."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 1.4 + 0.3 * len(results)), layout="constrained")
    for place, result in enumerate(results):
        low, high = _middle_half(result.ratios)
        axes.barh(place, result.ratio, height=0.62, color=_color(result.ratio))
        axes.plot([low, high], [place, place], color=BOUND, linewidth=1.2)
        if result.bound is not None:
            axes.plot([result.bound] * 2, [place - 0.4, place + 0.4], color=BOUND, linewidth=2.2)
        axes.text(WIDEST + 0.02, place, f"{result.ratio:.2f}", va="center", fontsize=8)
    axes.axvline(1, color=BOUND, linestyle="--", linewidth=1)
    axes.set_yticks(range(len(results)), [result.name for result in results], fontsize=8)
    axes.set_ylim(len(results) - 0.4, -0.6)
    axes.set_xlim(0, WIDEST)
    axes.set_title("cost of ours / cost of native: below 1 ours is better", fontsize=10, loc="left")
    axes.set_xlabel("bar: median; thin line: middle half of the pairs; thick mark: target", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _color(ratio: float) -> str:
    if abs(ratio - 1) <= EQUAL:
        return SAME
    return BETTER if ratio < 1 else WORSE


def _middle_half(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = quantiles(values, n=4, method="inclusive")
    return low, high


def write(results: Sequence[Result], about: dict[str, Any], folder: Path) -> str:
    """Write results.md, results.json and results.png; returns the table."""
    folder.mkdir(parents=True, exist_ok=True)
    text = table(results, about)
    (folder / "results.md").write_text(text)
    data = {"about": about, "results": [_as_dict(result) for result in results]}
    (folder / "results.json").write_text(json.dumps(data, indent=1) + "\n")
    plot(results, folder / "results.png")
    return text


def _as_dict(result: Result) -> dict[str, Any]:
    return {
        "group": result.group,
        "name": result.name,
        "unit": result.unit,
        "native": result.native,
        "ours": result.ours,
        "ours_by_native": {"median": result.ratio, "min": min(result.ratios), "max": max(result.ratios)},
        "native_by_ours_median": result.inverse,
        "target": str(result.target) if result.target else None,
        "met": result.met,
        "notes": result.notes,
    }
