"""`mistral-eqx inspect`: what is in a checkpoint, without its weights."""

import collections
import dataclasses
import json
import math
from typing import Annotated, Any

import typer

from ..documents import shown
from . import options
from .console import stdout_console


def inspect(
    model: Annotated[
        str, typer.Argument(help="A checkpoint's folder, a .gguf file, a preset or a hub id such as 'owner/name'.")
    ] = options.DEFAULT_MODEL,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON in place of tables.")] = False,
    debug: options.Debug = False,
):
    """Show a model's config, tensors, sizes and parameter count.

    Of a checkpoint only the headers are read. If its tensors are not those that its config asks for, it is shown and
    then refused. A preset that is only a shape has a config and a parameter count. What is not on this machine yet is
    fetched first.
    """
    from ..checkpoint import hub, open_checkpoint
    from ..checkpoint.source import specs_of
    from ..presets import PRESETS
    from .loading import locate

    checkpoint = None
    if hub.is_only_a_shape(model):
        description = {"preset": model, "parameters": PRESETS[model].parameters, "config": _config(PRESETS[model])}
    else:
        path = locate(model)
        checkpoint = open_checkpoint(path)
        tensors = [
            {"name": name, "shape": list(tensor.shape), "stored": tensor.stored, "bytes": tensor.nbytes}
            for name, tensor in checkpoint.tensors.items()
        ]
        description = {
            "path": str(path),
            "format": checkpoint.format,
            "parameters": checkpoint.config.parameters,
            "bytes": sum(tensor["bytes"] for tensor in tensors),
            "config": _config(checkpoint.config),
            "stored": _totals(tensors),
            "tensors": tensors,
        }
    if as_json:
        typer.echo(json.dumps(description, indent=2))
    else:
        _show(description)
    if checkpoint is not None:
        specs_of(checkpoint)


def _config(config: Any) -> dict[str, Any]:
    fields = dataclasses.asdict(config)
    fields["windows"] = list(config.windows)
    fields["eos_ids"] = list(config.eos_ids)
    return fields


def _totals(tensors: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Tensors, numbers and bytes for each stored dtype, the largest first."""
    totals = collections.defaultdict(lambda: {"tensors": 0, "numbers": 0, "bytes": 0})
    for tensor in tensors:
        total = totals[tensor["stored"]]
        total["tensors"] += 1
        total["numbers"] += math.prod(tensor["shape"])
        total["bytes"] += tensor["bytes"]
    return dict(sorted(totals.items(), key=lambda item: -item[1]["bytes"]))


def _show(description: dict[str, Any]):
    from rich.table import Table
    from rich.text import Text

    console = stdout_console()

    def show(title: str, columns: dict[str, str], rows: list[tuple[str, ...]]):
        table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
        for column, justify in columns.items():
            table.add_column(column, justify=justify, overflow="fold")  # pyright: ignore[reportArgumentType]
        for row in rows:
            # Names are the file's: brackets in them are no markup.
            table.add_row(*(Text(cell) for cell in row))
        console.print(table, "")

    if "tensors" in description:
        rows = [
            (
                _printable(tensor["name"]),
                " x ".join(map(str, tensor["shape"])),
                tensor["stored"],
                f"{tensor['bytes']:,}",
            )
            for tensor in description["tensors"]
        ]
        show("Tensors", {"name": "left", "shape": "right", "stored as": "left", "bytes": "right"}, rows)
        rows = [
            (stored, *(f"{total[column]:,}" for column in ("tensors", "numbers", "bytes")))
            for stored, total in description["stored"].items()
        ]
        columns = {"stored as": "left", "tensors": "right", "numbers": "right", "bytes": "right"}
        show("Totals", columns, rows)
    config = {**description["config"], "windows": _windows(description["config"]["windows"])}
    show("Config", {"field": "left", "value": "left"}, [(field, str(value)) for field, value in config.items()])
    for field in ("preset", "path", "format", "parameters", "bytes"):
        if field in description:
            value = description[field]
            text = f"{value:,}" if isinstance(value, int) else value
            if field == "parameters":
                text = f"{text} ({_short(value)})"
            console.print(f"{field}: {text}", markup=False, soft_wrap=True)


def _printable(name: str) -> str:
    """A name from a file, on one line of a terminal that it cannot command."""
    return name if name and name.isprintable() and len(name) <= 200 else shown(name, 200)


def _windows(windows: list[int | None]) -> str:
    """The windows of all layers, in few words."""
    kinds = collections.Counter(windows)
    if len(kinds) == 1:
        return "all positions" if windows[0] is None else f"{windows[0]} in every layer"
    return ", ".join(f"{'all positions' if size is None else size} in {count} layers" for size, count in kinds.items())


def _short(count: int) -> str:
    for size, name in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if count >= size:
            return f"{count / size:.3g} {name}"
    return str(count)
