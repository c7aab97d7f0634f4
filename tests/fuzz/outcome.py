"""Runs one damaged input in a child process with limits, and says how it ended."""

import contextlib
import dataclasses
import io
import json
import os
import resource
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path


# Seconds, and bytes above what the parent has.
TIME, MEMORY = 30, 2**30
# How a run may end. The rest are faults.
GOOD = ("refused", "accepted")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """**Attributes:**

    - `kind`: `"refused"` in one sentence that names what is wrong, or `"accepted"`; a fault otherwise: `"unnamed"`,
        `"wrong"`, `"traceback"`, `"memory"`, `"hang"`, `"crash"`.
    - `said`: the sentence, or what is wrong.
    """

    kind: str
    said: str

    @property
    def good(self) -> bool:
        return self.kind in GOOD


def outcome_of(run: Callable[[], str], names: tuple[str, ...], folder: Path) -> Outcome:
    """Forks, and runs a reader there; this process must not have used a device of JAX.

    **Arguments:**

    - `run`: reads the damaged input; returns what is wrong with the result, or `""`.
    - `names`: one of them must be in the sentence of a refusal.
    - `folder`: where the child works.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        outcome = _in_child(run, names, folder)
        os.write(writing, json.dumps(dataclasses.astuple(outcome)).encode()[:60_000])
        os._exit(0)
    os.close(writing)
    deadline, ended = time.monotonic() + TIME, 0
    while not ended and time.monotonic() < deadline:
        ended, status, used = os.wait4(child, os.WNOHANG)
        time.sleep(0.002)
    with contextlib.closing(os.fdopen(reading, "rb")) as pipe:
        if not ended:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return Outcome("hang", f"more than {TIME} s")
        told = pipe.read()
    if not told:
        return Outcome("crash", f"wait status {status}")
    extra = used.ru_maxrss * 1024 - resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if extra > MEMORY:
        return Outcome("memory", f"{extra / 2**20:.0f} MB more than before")
    return Outcome(*json.loads(told))


def _in_child(run: Callable[[], str], names: tuple[str, ...], folder: Path) -> Outcome:
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.chdir(folder)
    try:
        wrong = run()
        return Outcome("wrong", wrong) if wrong else Outcome("accepted", "")
    except Refused as refused:
        return _judged(str(refused), names)
    except Exception as error:
        return _of_exception(error, names)
    except BaseException as error:  # a panic of Rust's is no Exception
        return Outcome("traceback", _briefly(error))


def _of_exception(error: Exception, names: tuple[str, ...]) -> Outcome:
    from mistral_eqx import InputError

    if isinstance(error, InputError):
        return _judged(str(error), names)
    if isinstance(error, OSError) and error.filename is not None:
        return _judged(f"{error.filename}: {error.strerror}", names)
    return Outcome("traceback", _briefly(error))


def _judged(sentence: str, names: tuple[str, ...]) -> Outcome:
    if not sentence.isprintable() or len(sentence) > 1500:
        return Outcome("unnamed", f"no printable sentence: {sentence[:200]!r}")
    return Outcome("refused" if any(name in sentence for name in names) else "unnamed", sentence)


def _briefly(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/mistral_eqx/" in frame.filename and "/tests/" not in frame.filename]
    where = f" at {own[-1].filename.rpartition('mistral_eqx/')[2]}:{own[-1].lineno}" if own else ""
    return f"{type(error).__name__}{where}: {str(error)[:200]}"


class Refused(Exception):
    """A command ended with exit code 2; its message is the sentence on stderr."""


def command(*arguments: str) -> str:
    """Runs a command line as `mistral-eqx` does.

    **Returns:** what is wrong with how it ended, or `""` if it ended well.

    **Raises:** `Refused` if it ended with exit code 2 and one sentence.
    """
    import sys

    from mistral_eqx import interrupts
    from mistral_eqx.cli import main

    interrupts.end_by(sys.exit)
    errors = io.StringIO()
    sys.argv, code = ["mistral-eqx", *arguments], 0
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO())):
        try:
            main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    lines = [line for line in errors.getvalue().splitlines() if line.startswith("Error")]
    if code == 2 and len(lines) == 1:
        raise Refused(lines[0])
    return "" if code == 0 else f"exit code {code}: {errors.getvalue()[-300:]}"
