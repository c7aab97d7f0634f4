"""Progress bars, on stderr only, so that stdout carries nothing but the product."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from . import processes


class Report(Protocol):
    """Tells a bar how far things are, and perhaps what they are called now."""

    def __call__(self, done: int, total: int | None, /, *, title: str | None = None) -> None: ...


@contextlib.contextmanager
def waiting(title: str) -> Iterator[Callable[[], None]]:
    """A line that moves while something of unknown length goes on; none without a terminal.

    **Returns:** a context that gives a function that removes the line, to be called before anything is printed.
    """
    console = Console(stderr=True)
    if processes.number() > 0 or not console.is_terminal:
        yield lambda: None
        return
    with console.status(Text(title)) as status:
        yield status.stop


@contextlib.contextmanager
def progress_bar(title: str, *, counts: bool = False, shown: bool = True) -> Iterator[Report]:
    """A bar that appears at the first report and is gone at the end; none without a terminal, or if another prints.

    **Arguments:**

    - `title`: what is going on.
    - `counts`: whether things are counted, and not bytes.
    - `shown`: whether there is to be one at all.

    **Returns:** a context that gives a function of the bytes done and the bytes there are in all, `None` if nobody
    knows.
    """
    console = Console(stderr=True)
    amount = [MofNCompleteColumn()] if counts else [DownloadColumn(), TransferSpeedColumn()]
    hidden = processes.number() > 0 or not console.is_terminal or not shown
    bar = Progress(
        # A file's name may have what rich takes for markup.
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        *amount,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=hidden,
        # What is printed meanwhile would go to stderr.
        redirect_stdout=False,
    )
    task = bar.add_task(title, total=None, start=False)

    def report(done: int, total: int | None, /, *, title: str | None = None):
        if not bar.live.is_started:
            bar.start()
            bar.start_task(task)
        bar.update(task, completed=done, total=total, description=title)

    try:
        yield report
    finally:
        bar.stop()
