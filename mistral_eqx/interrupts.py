"""Ctrl-C and SIGTERM while this package runs as a program: one end, whatever runs at that moment.

Python answers a signal between two of its own instructions, by an exception in the middle of whatever runs there. XLA
compiles for minutes without such an instruction, an exception inside a callback of native code or of the garbage
collector is lost or aborts the process, and an interpreter that shuts down beneath threads of native code crashes. So
here a signal raises nothing and nothing is shut down. A thread of its own learns of the signal at once, undoes what is
half written, says so in one line, and ends the process. Who has partial results to show asks to be told in place of
that, and has them shown; the second signal does not wait for it.

A program that uses the package as a library has Python's own signals: there nothing here has an effect.
"""

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn


_SAID = {signal.SIGINT: b"Interrupted.\n", signal.SIGTERM: b"Terminated.\n"}
# The cursor of a progress bar is hidden, and the bar stands on the last line.
_CLEAN_LINE = b"\r\x1b[K\x1b[?25h"

_stands_by = False
_came: int | None = None
_taken = False
_leaving = False
_wakes: list[Callable[[], None]] = []
_undoings: list[Callable[[], None]] = []
_lock = threading.RLock()
_end: Callable[[int], Any] = os._exit
_terminal: list[Any] | None = None


def is_program() -> bool:
    """Whether this process was started as this package's command, and not by a program that uses it."""
    program = os.path.basename((getattr(sys, "argv", None) or [""])[0])
    # Python puts "-m" there while it looks for the module to run, which is when the package is imported.
    return program == "-m" or program.removesuffix(".exe") == "mistral-eqx"


def stand_by():
    """Answers signals from now on; does nothing where they cannot be, or where it was called before.

    A signal that is ignored, as by `nohup`, stays ignored.
    """
    global _stands_by, _terminal
    if _stands_by or os.name != "posix" or threading.current_thread() is not threading.main_thread():
        return
    _stands_by = True
    reading, writing = (_above_streams(end) for end in os.pipe())
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in _SAID:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _nothing)
    # Registered first, so called last: after that Python takes the handlers away, and the command is complete.
    atexit.register(_ignore)
    with contextlib.suppress(Exception):  # stdin is closed, or no terminal
        import termios

        _terminal = termios.tcgetattr(0)
    threading.Thread(target=_watch, args=(reading,), name="signals", daemon=True).start()
    # A child has this process's pipe but not its thread.
    os.register_at_fork(after_in_child=_forget)


def _above_streams(file: int) -> int:
    """The same file by a number that is none of stdin's, stdout's and stderr's, which may be closed."""
    import fcntl

    moved = fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 3)
    os.close(file)
    return moved


def _nothing(number: int, frame: Any):
    """Python writes a signal's number into the pipe only if it has a handler of Python's."""


def _ignore():
    for number in _SAID:
        if signal.getsignal(number) is _nothing:
            signal.signal(number, signal.SIG_IGN)


def _forget():
    global _stands_by, _lock
    _stands_by, _lock = False, threading.RLock()
    _wakes.clear()
    _undoings.clear()
    signal.set_wakeup_fd(-1)
    for number in _SAID:
        if signal.getsignal(number) is _nothing:
            signal.signal(number, signal.SIG_DFL)


def _watch(reading: int):
    global _came, _leaving
    while signals := os.read(reading, 64):
        for number in signals:
            if number not in _SAID:
                continue
            if _came is not None:
                _restore_terminal()
                os._exit(128 + number)
            _came = number
            if _wakes:
                for wake in tuple(_wakes):
                    wake()
            else:
                _leaving = True
                # By a thread of its own, so that a second signal is still seen.
                threading.Thread(target=leave, daemon=True).start()


def came() -> int | None:
    """The number of the signal that came, or `None`."""
    return _came


def take() -> int | None:
    """As `came`, and from here on the signal counts as answered."""
    global _taken
    _taken = _came is not None
    return _came


def check():
    """Raises `KeyboardInterrupt` if a signal came that is not answered yet."""
    if not _taken and take() is not None:
        raise KeyboardInterrupt


def forgive():
    """Goes on after a signal that has been answered: the next one is the first again."""
    global _came, _taken
    _came, _taken = None, False


@contextlib.contextmanager
def answered(wake: Callable[[], None] = lambda: None) -> Iterator[None]:
    """While this is entered, a signal does not end the process: whoever entered it calls `check` or `take`.

    **Arguments:**

    - `wake`: called, by another thread, when a signal comes.

    **Raises:** `KeyboardInterrupt` at the end, if a signal came that nobody answered.
    """
    _wakes.append(wake)
    try:
        yield
    finally:
        _wakes.remove(wake)
    check()


@contextlib.contextmanager
def held() -> Iterator[None]:
    """While this is entered, the process does not end by a first signal: for what takes a moment and must be whole."""
    with _lock:
        yield


@contextlib.contextmanager
def undone_by(undo: Callable[[], None]) -> Iterator[None]:
    """While this is entered, `undo` is called before a signal ends the process; by another thread."""
    _undoings.append(undo)
    try:
        yield
    finally:
        _undoings.remove(undo)


def end_by(end: Callable[[int], Any]):
    """Ends the process by this function of its exit code, in place of `os._exit`."""
    global _end
    _end = end


def leave(said: bool = False) -> NoReturn:
    """Ends the process for the signal that came: undoes what is half done, says one line, and exits.

    **Arguments:**

    - `said`: whether a line about it was written already.
    """
    number = signal.SIGINT if _came is None else _came
    undo_all()
    _restore_terminal()
    with contextlib.suppress(OSError):
        os.write(2, b"" if said else _SAID[signal.Signals(number)])
    end(128 + number)


def undo_all():
    """Undoes what is half done, because the process ends."""
    # Never let go of: who waits for it ends with the process.
    _lock.acquire()
    for undo in reversed(_undoings):
        with contextlib.suppress(Exception):
            undo()


def end(code: int) -> NoReturn:
    """Ends the process at once: threads may be in native code, which a shutdown of the interpreter would crash."""
    _end(code)
    os._exit(code)


@contextlib.contextmanager
def unless_leaving() -> Iterator[None]:
    """Whatever ends this block while a signal ends the process is no news: it waits for that end."""
    try:
        yield
    finally:
        while _leaving:
            time.sleep(60)


def _restore_terminal():
    with contextlib.suppress(Exception):
        if os.isatty(2):
            os.write(2, _CLEAN_LINE)
        # A process in the background would be stopped for it.
        if _terminal is not None and os.tcgetpgrp(0) == os.getpgrp():
            import termios

            termios.tcsetattr(0, termios.TCSANOW, _terminal)


if is_program():
    stand_by()
