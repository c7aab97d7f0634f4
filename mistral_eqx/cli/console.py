"""Tables on stdout."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from rich.console import Console


def stdout_console() -> Console:
    """Writes tables to stdout; in a pipe or a file nothing is cut to the width of a terminal that is not there."""
    from rich.console import Console

    class Output(Console):
        def on_broken_pipe(self):
            raise BrokenPipeError  # the command ends as any other does that nobody reads

    return Output(width=None if sys.stdout.isatty() else 160, highlight=False)
