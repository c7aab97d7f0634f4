"""The command line. What a command needs is imported inside it, so that help is there at once."""

import contextlib
import importlib.metadata
import io
import os
import sys
import traceback
from typing import Annotated, NoReturn

import typer

from .. import interrupts
from ..kernel_library import open_library
from .chat import chat
from .convert import convert
from .errors import Command, OneSentence
from .evaluate import evaluate
from .generate import generate
from .inspect import inspect
from .merge import merge
from .options import Debug
from .plan import plan
from .processes import drop
from .quantize import quantize
from .serve import serve
from .train import train


app = typer.Typer(
    cls=OneSentence,
    help="Language models of the Mistral family, from a checkpoint to text.",
    epilog="Fetched models and compiled programs are kept in a folder that the variable MISTRAL_EQX_CACHE moves.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
for command in (generate, chat, serve, inspect, convert, quantize, merge, plan, train):
    app.command(cls=Command)(command)
app.add_typer(evaluate, name="evaluate")


def _show_version(wanted: bool) -> bool:
    if wanted:
        kernels = open_library()
        with_kernels = "without C++ kernels" if kernels is None else f"C++ kernels for {kernels[1]}"
        typer.echo(f"mistral-eqx {importlib.metadata.version('mistral-eqx')}, {with_kernels}")
        raise typer.Exit
    return wanted


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and stop.")
    ] = False,
    debug: Debug = False,
):
    pass


def main():
    """Runs the command line on this process's arguments."""
    interrupts.stand_by()
    _open_closed_streams()
    # A terminal that cannot show a character gets a question mark in its place, not an end in the middle of a text.
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):
            output.reconfigure(errors="replace")
    try:
        with interrupts.unless_leaving():
            app()
    except SystemExit as ended:
        _write_out()
        if not ended.code:
            raise
        if interrupts.came() is not None:
            interrupts.leave(said=True)
        _fail(ended.code if isinstance(ended.code, int) else 1)
    except BaseException:  # which `--debug` lets through
        traceback.print_exc()
        _write_out()
        _fail(1)


def _fail(code: int) -> NoReturn:
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    interrupts.end(code)


def _write_out():
    """Writes what waits in stdout; what cannot be written is dropped, for which Python would print a traceback."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        drop(sys.stdout)


def _open_closed_streams():
    """Puts something in the place of a stream that was closed before the process began (`<&-`, `>&-`, `2>&-`).

    Each takes the lowest number that is free, its own, before another file does.
    """
    if sys.stdin is None:
        sys.stdin = os.fdopen(os.open(os.devnull, os.O_RDONLY))
    if sys.stdout is None:
        # Nobody reads what is written there, so it ends as a pipe does that nobody reads any more.
        reading, writing = os.pipe()
        os.close(reading)
        sys.stdout = os.fdopen(os.dup(writing), "w")
        os.close(writing)
    if sys.stderr is None:
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
