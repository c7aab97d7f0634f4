"""Which of several processes this is: process 0 prints, the others only what is wrong with them."""

import os
import sys
from typing import TextIO

import typer


_number = 0
_several = False


def number() -> int:
    """This process's number; 0 if it is alone."""
    return _number


def several() -> bool:
    """Whether there are others."""
    return _several


def become(process: int):
    """Makes this one of several processes, by its number.

    Process 0 keeps its stdout. What native libraries write there past Python, as gloo does when it connects, would
    get into the text, so it is dropped.
    """
    global _number, _several
    _number, _several = process, True
    nowhere = os.open(os.devnull, os.O_WRONLY)
    sys.stdout.flush()
    kept = os.dup(1) if process == 0 else os.dup(nowhere)
    os.dup2(nowhere, 1)
    sys.stdout = open(kept, "w", encoding=sys.stdout.encoding, errors="replace")  # noqa: SIM115


def say(line: str):
    """Writes a line to stderr, on process 0 alone; where nobody reads it any more, the work goes on without it."""
    if _number == 0:
        try:
            typer.echo(line, err=True)
        except BrokenPipeError:
            drop(sys.stderr)


def tell(line: str):
    """Writes a line to stdout, as `say` does to stderr, for a command whose product is not what it prints."""
    if _number == 0:
        try:
            typer.echo(line)
        except BrokenPipeError:
            drop(sys.stdout)


def drop(stream: TextIO):
    """Lets a stream lead nowhere, with what waits in it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
