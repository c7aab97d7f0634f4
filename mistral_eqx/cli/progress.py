"""Progress bars, on stderr only, so that stdout carries nothing but the product."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from . import processes


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar that appears at the first report and is gone at the end; none without a terminal, or if another prints.

    **Arguments:**

    - `title`: what is going on.

    **Returns:** a context that gives a function of the bytes done and the bytes there are in all.
    """
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    hidden = processes.number() > 0 or not console.is_terminal
    bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=hidden)
    task = bar.add_task(title, total=None, start=False)

    def report(done: int, total: int):
        if not bar.live.is_started:
            bar.start()
            bar.start_task(task)
        bar.update(task, completed=done, total=total)

    try:
        yield report
    finally:
        bar.stop()
