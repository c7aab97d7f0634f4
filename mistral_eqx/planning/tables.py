"""Reports as tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ..parallel.mesh import show
from .fitting import Holding
from .ranking import SCHEDULES, Ranking
from .report import Exchange, Phase, Report


if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text


def table(reports: Sequence[Report]) -> Group:
    """The memory and the work of each device, for one or more reports.

    **Arguments:**

    - `reports`: reports of one model on the same devices.

    **Returns:** a group that rich can print: a table of memory, a table of work and times, and for each report a line
        that says whether it fits.
    """
    from rich.console import Group
    from rich.text import Text

    # A `Text` is not parsed as markup, which a name may contain.
    remarks = (Text(line) for report in reports for line in _remarks(report))
    return Group(Text(title(reports[0])), "", _memory(reports), "", _work(reports), "", *remarks)


def _memory(reports: Sequence[Report]) -> Table:
    known = any(report.chip is not None for report in reports)
    training = any(report.training is not None for report in reports)
    offloads = any(phase.memory.host for report in reports for phase in report.phases)
    columns = [
        "weights",
        *(["gradients", "optimizer"] if training else ["cache"]),
        *("other", "temporary", "code", "total"),
        *(["host"] if offloads else []),
    ]
    rows = _table("Memory of each device, MB", [*columns, "of the chip's"] if known else columns)
    for report, phase, head in _rows(reports):
        memory = phase.memory
        used = [] if report.chip is None else [f"{memory.total / report.chip.hbm_bytes:.1%}"]
        rows.add_row(*head, *(_megabytes(getattr(memory, column)) for column in columns), *used)
    return rows


def _work(reports: Sequence[Report]) -> Table:
    phases = [phase for report in reports for phase in report.phases]
    # If XLA merged or split exchanges, the table shows both counts.
    changed = any(phase.refused is not None or _count(phase.written) != _count(phase.exchanges) for phase in phases)
    timed = any(report.chip is not None for report in reports)
    columns = [
        *("GFLOP", "HBM MB", "exchanges", "MB"),
        *(["as written"] if changed else []),
        *(["compute ms", "HBM ms", "links ms", "at least ms"] if timed else []),
        "compiled in s",
    ]
    training = any(report.training is not None for report in reports)
    rows = _table(f"Work of each device: for {'a step' if training else 'the prompt, and for each new token'}", columns)
    for _, phase, head in _rows(reports):
        runs, times = phase.runs, phase.roofline
        work = [
            f"{runs * phase.flops / 1e9:,.1f}",
            _megabytes(runs * phase.hbm_bytes),
            f"{runs * _count(phase.exchanges)}",
            f"{runs * sum(exchange.bytes for exchange in phase.exchanges) / 1e6:,.2f}",
        ]
        limits = [] if times is None else [times.compute, times.memory, times.interconnect, times.seconds]
        rows.add_row(
            *head,
            *(work if phase.refused is None else [""] * len(work)),
            *([f"{runs * _count(phase.written)}"] if changed else []),
            *([f"{1e3 * runs * limit:.2f}" for limit in limits] or [""] * 4 * timed),
            f"{phase.compile_seconds:.1f}",
        )
    return rows


def _table(title: str, columns: Sequence[str]) -> Table:
    rows = _empty(title)
    rows.add_column("strategy", overflow="fold")
    rows.add_column("phase")
    for column in columns:
        rows.add_column(column, justify="right")
    return rows


def _empty(title: str) -> Table:
    from rich.table import Table

    return Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="bold")


def _rows(reports: Sequence[Report]) -> Iterator[tuple[Report, Phase, tuple[Text, str]]]:
    """Each phase of each report, with the cells that name it."""
    from rich.text import Text

    for report in reports:
        for phase in report.phases:
            name = label(report) if phase is report.phases[0] else ""
            yield report, phase, (Text(name), f"{phase.name} x {phase.runs}" if phase.runs > 1 else phase.name)


def label(report: Report) -> str:
    """A short name of a report: its strategy, its mesh, and the format of most quantized weights."""
    axes = ",".join(f"{axis}={size}" for axis, size in report.axes.items())
    words = [axes] if report.training is None else [axes, f"ZeRO {report.training.zero}"]
    if report.training is not None and "layers@" in report.layout:
        words.append(SCHEDULES[report.training.schedule])
    if report.formats:
        words.append(next(iter(report.formats)))
    if report.training is not None and report.training.offload:
        words.append("offload")
    return f"{report.strategy} ({', '.join(words)})"


def _remarks(report: Report) -> list[str]:
    lines = []
    if report.formats:
        sizes = ", ".join(f"{_megabytes(size)} MB in {name}" for name, size in report.formats.items())
        lines.append(f"{label(report)}: the weights of a device are {sizes}.")
    if report.chip is None or report.free is None:
        return lines
    room = f"{report.chip.hbm_bytes / 1e9:.2f} GB"
    if report.fits:
        return [*lines, f"{label(report)}: fits, with {report.free / 1e9:.2f} GB free of {room}."]
    return [
        *lines,
        f"{label(report)}: does not fit; {report.peak.name} takes {-report.free / 1e9:.2f} GB more than the {room} "
        f"that a {report.chip.name} has.",
    ]


def holdings_table(holdings: Sequence[Holding]) -> Table:
    """The smallest numbers of chips that hold a model, for one batch and cache; rich can print it."""
    from rich.text import Text

    first = holdings[0]
    rows = _empty(f"Batch {first.batch}, kv_seq {first.kv_seq}: memory of each chip, GB")
    rows.add_column("model", overflow="fold")
    rows.add_column("formats")
    for column in ("all weights", "chips"):
        rows.add_column(column, justify="right")
    rows.add_column("strategy", overflow="fold")
    for column in ("weights", "cache", "total", "of the chip's"):
        rows.add_column(column, justify="right")
    for one in holdings:
        sizes = (one.weights, one.cache, one.total)
        rows.add_row(
            Text(one.model),
            ", ".join(one.formats),
            f"{one.all_weights / 1e9:.1f}",
            f"{one.devices} {'halves of ' if one.chip.devices > 1 else ''}{one.chip.name}",
            Text(f"{one.strategy} ({show(one.axes)})"),
            *(f"{size / 1e9:.2f}" for size in sizes),
            f"{one.total / one.chip.hbm_bytes:.1%}",
        )
    return rows


def ranking_table(ranking: Ranking, most: int = 10) -> Group:
    """The best layouts of a ranking, and why others fall out; rich can print it.

    **Arguments:**

    - `ranking`: the result of [`mistral_eqx.planning.rank`][].
    - `most`: the number of layouts to show; the others that fit are counted.
    """
    from rich.console import Group
    from rich.text import Text

    training = ranking.training is not None
    what = "a step" if training else f"{ranking.prompt} tokens read and {ranking.new_tokens} written"
    rows = _empty(f"{ranking.model} on {ranking.place} by {ranking.objective}: {what}, estimated in seconds")
    rows.add_column("layout", overflow="fold")
    of_training = (["bubble"], ["MFU"]) if training else ([], [])
    for column in ("rows", "GB", "compute", "HBM", "links", *of_training[0], "total", "tokens/s", *of_training[1]):
        rows.add_column(column, justify="right")
    rows.add_column("bound by")
    for one in ranking.best[:most]:
        bubble = [one.times.bubble] if training else []
        times = (one.times.compute, one.times.memory, one.times.interconnect, *bubble, one.seconds)
        rows.add_row(
            Text(one.label),
            str(one.batch),
            f"{one.memory.total / 1e9:.1f}",
            *(f"{seconds:.3g}" for seconds in times),
            f"{one.tokens_per_second:,.0f}",
            *([f"{one.utilization:.0%}"] if training else []),
            {"memory": "HBM", "interconnect": "links"}.get(one.times.bound, one.times.bound),
        )
    more = len(ranking.best) - most
    remarks = [f"{more} more fit."] if more > 0 else []
    if ranking.too_large:
        least, count = ranking.too_large[0], len(ranking.too_large)
        room, needs = (f"{size / 1e9:.1f} GB" for size in (ranking.room, least.memory.total))
        what = "more take" if count > 1 else "more takes"
        remarks.append(
            f"{count} {what} more than the {room} of a chip that may be filled, from {needs} on ({least.label})."
        )
    reasons: dict[str, list[str]] = {}
    for label, reason in ranking.refused:
        reasons.setdefault(reason, []).append(label)
    for reason, (first, *others) in reasons.items():
        remarks.append(f"Not {first}{f' and {len(others)} others' if others else ''}: {reason.rstrip('.')}.")
    chosen = f"The first layout is chosen by {ranking.best[0].options}"
    return Group(rows, "", *(Text(line) for line in (*remarks, chosen)))


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f}"


def _count(exchanges: Sequence[Exchange]) -> int:
    return sum(exchange.count for exchange in exchanges)


def title(report: Report) -> str:
    """The heading of a table or a picture."""
    size, unit = (1e9, "billion") if report.parameters >= 1e9 else (1e6, "million")
    training = report.training
    if training is None:
        lengths = f"prompt {report.prompt}, kv_seq {report.kv_seq}"
    else:
        micro_batches = f", in {training.accumulate} micro-batches" if training.accumulate > 1 else ""
        lengths = f"{training.seq} tokens a row{micro_batches}, remat {training.remat}"
    codes = "" if report.cache_dtype is None else f", cache {report.cache_dtype}"
    return (
        f"{report.model} ({report.parameters / size:.1f} {unit} weights, {report.dtype}{codes}) on {report.place}, "
        f"batch {report.batch}, {lengths}"
    )
