"""Reports as a picture."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .report import Phase, Report
from .table import label, title


_MEMORY = {
    "weights": ("weights", "#35618f"),
    "cache": ("keys and values", "#e0862f"),
    "other": ("other arguments", "#9a9a9a"),
    "temporary": ("temporary", "#c8443c"),
    "code": ("code", "#7a5c99"),
}
_TIMES = {
    "compute": ("compute", "#35618f"),
    "memory": ("memory", "#e0862f"),
    "interconnect": ("links", "#4f9a5b"),
}


def picture(reports: Sequence[Report], path: str | Path):
    """Draws the memory of each device against what the chip has, and the least time of each part of it.

    **Arguments:**

    - `reports`: of one model on the same devices, a row for each; virtual devices have no times.
    - `path`: where the picture goes; its suffix says in which format, such as `.png` or `.svg`.

    **Raises:** `ValueError` if there is no report, or matplotlib is not installed.
    """
    if not reports:
        raise ValueError("There is no report to draw; give at least one.")
    require_matplotlib()
    from matplotlib.figure import Figure

    timed = [name for name in ("prefill", "decode") if any(report[name].roofline is not None for report in reports)]
    figure = Figure(figsize=(6.5 + 4.2 * len(timed), 1.9 + 0.75 * len(reports)), layout="constrained")
    memory, *times = figure.subplots(
        1, 1 + len(timed), squeeze=False, sharey=True, width_ratios=[1.35, *[1] * len(timed)]
    )[0]
    figure.suptitle(title(reports[0]), fontsize=11)
    _draw_memory(memory, reports)
    for axes, name in zip(times, timed, strict=True):
        _draw_times(axes, reports, name)
    memory.set_yticks(range(len(reports)), [label(report).replace(" (", "\n(") for report in reports])
    memory.invert_yaxis()
    figure.savefig(path, dpi=150)


def require_matplotlib():
    """Tells who has no matplotlib how to get it.

    **Raises:** `ValueError` that says so.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("A picture takes matplotlib, which is not installed; run pip install 'mistral-eqx[plot]'.")


def _draw_memory(axes: Any, reports: Sequence[Report]):
    """The phase that takes the most, as stacked bars."""
    peaks = [report.peak for report in reports]
    left = [0.0] * len(reports)
    for field, (name, colour) in _MEMORY.items():
        sizes = [getattr(phase.memory, field) / 1e9 for phase in peaks]
        axes.barh(range(len(reports)), sizes, 0.62, left, color=colour, label=name)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    chip = reports[0].chip
    limit = max(left)
    for at, (phase, total) in enumerate(zip(peaks, left, strict=True)):
        axes.annotate(f"{total:.2f} ({phase.name})", (total, at), (4, 0), textcoords="offset points", va="center")
    if chip is not None:
        limit = max(limit, chip.hbm_bytes / 1e9)
        axes.axvline(chip.hbm_bytes / 1e9, color="black", linestyle="--", label=f"a {chip.name} has")
    axes.set_xlim(0, 1.18 * limit)
    axes.set_title("Memory of each device, GB, in the largest phase", fontsize=10)
    _finish(axes)


def _draw_times(axes: Any, reports: Sequence[Report], name: str):
    """The three limits of one phase, one under the other."""
    phases = [report[name] for report in reports]
    height, longest = 0.24, 0.0
    for index, (field, (text, colour)) in enumerate(_TIMES.items()):
        places = [at + (index - 1) * height for at in range(len(reports))]
        values = [_milliseconds(phase, field) for phase in phases]
        longest = max(longest, *values)
        axes.barh(places, values, height, color=colour, label=text)
        for at, value in zip(places, values, strict=True):
            axes.annotate(f"{value:.2f}", (value, at), (3, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_xlim(0, 1.18 * longest or 1)
    axes.set_title("Prompt, ms at least" if name == "prefill" else "Each new token, ms at least", fontsize=10)
    _finish(axes)


def _milliseconds(phase: Phase, field: str) -> float:
    return 0.0 if phase.roofline is None else 1e3 * phase.runs * getattr(phase.roofline, field)


def _finish(axes: Any):
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, frameon=False, fontsize=8)
