"""Plots of reports."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from .report import Phase, Report
from .tables import label, title


_MEMORY = {
    "weights": ("weights", "#35618f"),
    "cache": ("keys and values", "#e0862f"),
    "optimizer": ("optimizer state", "#d4b13f"),
    "gradients": ("gradients", "#4f9a5b"),
    "other": ("other arguments", "#9a9a9a"),
    "temporary": ("temporary", "#c8443c"),
    "code": ("code", "#7a5c99"),
}
# Colours that no kind of memory has.
_TIMES = {
    "compute": ("compute", "#1f9e9e"),
    "memory": ("memory", "#8c564b"),
    "interconnect": ("links", "#d873b5"),
}

_TITLES = {
    "prefill": "The prompt takes at least, ms",
    "decode": "A new token takes at least, ms",
    "step": "A step takes at least, ms",
}

_BAR = 0.26
_BESIDE: Any = {"xytext": (3, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}


def picture(reports: Sequence[Report], path: str | Path):
    """Plots the memory of each device next to the memory of the chip, and the least times of its parts.

    **Arguments:**

    - `reports`: reports of one model on the same devices, one row each; virtual devices have no times.
    - `path`: the file of the picture; its suffix gives the format, such as `.png` or `.svg`.

    **Raises:** `ValueError` if there is no report, or as for `expect_picture`.
    """
    if not reports:
        raise InputError("There is no report to draw; give at least one.")
    expect_picture(path)
    from matplotlib.figure import Figure

    names = [name for name in _TITLES if name in {phase.name for phase in reports[0].phases}]
    timed = [name for name in names if any(report[name].roofline is not None for report in reports)]
    size = 6.5 + 4.2 * len(timed), 2 + 0.8 * len(reports)
    figure = Figure(figsize=size, layout="constrained")
    columns = figure.subplots(1, 1 + len(timed), squeeze=False, sharey=True, width_ratios=[1.3, *[1] * len(timed)])
    memory, *times = columns[0]
    figure.suptitle(title(reports[0]), fontsize=11)
    _draw_memory(memory, reports)
    for axes, name in zip(times, timed, strict=True):
        _draw_times(axes, reports, name)
    memory.set_yticks(range(len(reports)), [label(report).replace(" (", "\n(") for report in reports])
    memory.invert_yaxis()
    figure.savefig(path, dpi=150)


def expect_picture(path: str | Path):
    """Checks that a picture can be written to `path`, before anything is compiled.

    **Raises:** `ValueError` if matplotlib is not installed, it does not know the suffix, `path` is a folder, or its
        folder does not exist.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("A picture needs matplotlib, which is not installed; run pip install 'mistral-eqx[plot]'.")
    from matplotlib.figure import Figure

    path, formats = Path(path), Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in formats:
        known = ", ".join(f".{name}" for name in formats)
        raise InputError(f"The picture {str(path)!r} must end in one of {known}; rename it.", file=path)
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else "is in a folder that is not there"
        raise InputError(f"The picture {str(path)!r} {what}; give another path.", file=path)


def _draw_memory(axes: Any, reports: Sequence[Report]):
    """One stacked bar per phase."""
    bars = []
    for at, report in enumerate(reports):
        middle = (len(report.phases) - 1) / 2
        bars += [(at + (index - middle) * _BAR, phase) for index, phase in enumerate(report.phases)]
    heights = [height for height, _ in bars]
    left = [0.0] * len(bars)
    for field, (name, colour) in _MEMORY.items():
        sizes = [getattr(phase.memory, field) / 1e9 for _, phase in bars]
        if not any(sizes):
            continue
        axes.barh(heights, sizes, 0.92 * _BAR, left, color=colour, label=name)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    longest = max(left)
    for (height, phase), total in zip(bars, left, strict=True):
        axes.annotate(f"{phase.name} {total:.2f}", (total, height), **_BESIDE)
    heading, chip = "Memory of each device, GB", reports[0].chip
    if chip is not None:
        capacity = chip.hbm_bytes / 1e9
        heading += f"; a {chip.name} has {capacity:.1f}"
        # A line far to the right would make the bars too short.
        if capacity < 2.5 * longest:
            axes.axvline(capacity, color="black", linestyle="--", linewidth=1)
            longest = max(longest, capacity)
    axes.set_xlim(0, 1.25 * longest)
    axes.set_title(heading, fontsize=10)
    _finish(axes)


def _draw_times(axes: Any, reports: Sequence[Report], name: str):
    """The three least times of one phase, one bar each."""
    phases = [report[name] for report in reports]
    longest = 0.0
    for index, (field, (text, colour)) in enumerate(_TIMES.items()):
        heights = [at + (index - 1) * _BAR for at in range(len(reports))]
        values = [_milliseconds(phase, field) for phase in phases]
        longest = max(longest, *values)
        axes.barh(heights, values, 0.92 * _BAR, color=colour, label=text)
        for height, value, phase in zip(heights, values, phases, strict=True):
            beside = f"{value:.2f}" if phase.refused is None else "does not fit" if index == 1 else ""
            axes.annotate(beside, (value, height), **_BESIDE)
    axes.set_xlim(0, 1.2 * longest or 1)
    axes.set_title(_TITLES[name], fontsize=10)
    _finish(axes)


def _milliseconds(phase: Phase, field: str) -> float:
    return 0.0 if phase.roofline is None else 1e3 * phase.runs * getattr(phase.roofline, field)


def _finish(axes: Any):
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.5 / axes.figure.get_figheight()),
        ncols=5,
        columnspacing=1.2,
        frameon=False,
        fontsize=8,
    )
