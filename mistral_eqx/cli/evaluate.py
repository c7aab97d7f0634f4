"""`mistral-eqx evaluate`: how good a model is."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from typer.core import TyperGroup

from ..checks import Count
from ..errors import InputError
from . import options
from .background import interruptible
from .errors import Command
from .options import within
from .report import Metrics, show


if TYPE_CHECKING:
    from ..evaluate import Perplexity


class _Measures(TyperGroup):
    """A group within a group: without a command it shows help itself, and raises nothing that the outer one sees."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args:
            typer.echo(ctx.get_help(), err=True)
            raise typer.Exit(2)
        return super().parse_args(ctx, args)


evaluate = typer.Typer(cls=_Measures, help="Measure how good a model is.", rich_markup_mode=None)


@evaluate.callback()
def _options():
    """Makes a group of it, of one command as of several."""


@evaluate.command(cls=Command)
@options.flat
def perplexity(
    *,
    text: Annotated[Path, typer.Option(help="The file to measure on, UTF-8 and of any size.")],
    model: options.ModelOptions,
    context: Annotated[
        int | None,
        typer.Option(callback=within(Count), help="Tokens of a window; the model's whole context unless given."),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            callback=within(Count), help="Tokens from one window's start to the next's; half of a window unless given."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(callback=within(Count), help="How many windows are read together.")] = 1,
    cache_dtype: options.CacheDType = None,
    split: options.DeviceOptions,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
):
    """Measure how well a model foretells a text.

    Windows slide over the text. Each token is scored once, with at least --context less --stride tokens before it where
    the text has these; the first token of all is not. The perplexity, the bits per byte and the number of tokens go to
    stdout, metrics go to stderr. After ctrl-C they are those of the text so far.
    """
    import mistral_eqx as mx

    from ..checkpoint import open_checkpoint
    from ..evaluate.windows import encode_parts, window_sizes
    from .devices import Devices
    from .loading import load, locate, precision
    from .progress import progress_bar

    with open_text(text) as file:
        devices = Devices(options.ProcessOptions(split.mesh, split.strategy))
        model.check_adapter()
        path = locate(model.model)
        start = time.perf_counter()
        # All that can be refused without the weights is refused before they are read.
        config = open_checkpoint(path).config
        context, stride = window_sizes(config, context, stride)
        mesh, strategy, where = devices.place(config)
        tokenizer = mx.load_tokenizer(path)
        if file.seekable():
            next(encode_parts(tokenizer, file))
            file.seek(0)
        weights = load(path, model, mesh, strategy)
        metrics = [
            ("windows", f"of {context} tokens, one every {stride}"),
            ("loaded", f"in {time.perf_counter() - start:.2f} s as {precision(weights)}"),
            *([("strategy", where)] if where else []),
        ]

        found, total = None, os.fstat(file.fileno()).st_size
        start = time.perf_counter()
        try:
            with progress_bar("Measuring") as bar:

                def progress(so_far: Perplexity):
                    nonlocal found
                    found = so_far
                    bar(so_far.bytes, total or None, title=f"Perplexity {so_far.perplexity:.4g}")

                asked = {"context": context, "stride": stride, "batch": batch, "cache_dtype": cache_dtype}
                interruptible(lambda: mx.perplexity(weights, tokenizer, file, progress=progress, **asked))
        except KeyboardInterrupt:
            if found is None:
                raise
            interrupted = ("interrupted", f"after {found.bytes:,} of {total:,} bytes")
            _print(found, None if quiet else [*metrics, interrupted])
            raise typer.Exit(130) from None
    assert found is not None  # a text of which nothing can be scored was refused
    seconds = time.perf_counter() - start
    speed = ("speed", f"{found.tokens / seconds:.1f} tokens/s, compiling included")
    _print(found, None if quiet else [*metrics, speed])


def _print(found: Perplexity, metrics: Metrics | None):
    typer.echo(f"perplexity {found.perplexity:.6g}")
    typer.echo(f"bits per byte {found.bits_per_byte:.6g}")
    typer.echo(f"tokens {found.tokens}")
    if metrics is not None:
        show(metrics)


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """A text file, as it is but for a byte order mark: no end of a line is changed."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield file
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error.reason}; convert it, as by iconv -t UTF-8.") from error
