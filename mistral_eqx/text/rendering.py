"""The process in which chat templates are rendered, as seen from this one."""

import atexit
import contextlib
import json
import os
import selectors
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from ..documents import MiB
from ..errors import InputError


# Templates in use take milliseconds and a few megabytes.
SECONDS, BYTES = 2, 512 * MiB
# A text may be so much longer than what the template sees.
LONGER, MORE = 10, MiB
# By the clock, for a process that is not let run.
_PATIENCE = 60


def render(template: str, variables: dict[str, Any], name: str, marks: tuple[str, str] = ("", "")) -> str:
    """The text that a template makes. Its time, its memory and the length of its text are limited.

    **Arguments:**

    - `template`: jinja2, which may do anything.
    - `variables`: what it sees; of nothing but the types of JSON.
    - `name`: what messages call the template.
    - `marks`: written before and behind each `{% generation %}` block, which is what the assistant says.

    **Raises:** `ValueError` that names the line, if the template is wrong, forbidden or takes too much, or refuses the
    variables.
    """
    most = MORE + LONGER * len(json.dumps(variables))
    request = {"template": template, "variables": variables, "marks": marks, "seconds": SECONDS, "characters": most}
    answer = _process.ask(request)
    if "text" in answer:
        return answer["text"]
    reason, line = " ".join(answer["reason"].split()).rstrip("."), answer.get("line")
    where = "" if line is None else f" (line {line})"
    spent = {
        "seconds": f"takes longer than {SECONDS} seconds",
        "memory": f"takes more than {BYTES // MiB} MB of memory",
        "characters": f"writes more than {most} characters",
        "depth": "calls itself or nests too deeply",
        "crash": "ends the process that renders it",
    }
    sentence = {
        "spent": f" {spent.get(reason)}{where}; correct the template.",
        "refusal": f" refuses these messages: {reason}.",
        "syntax": f" is no valid jinja2{where}: {reason}.",
        "forbidden": f" does what no chat template may do: {reason}{where}.",
        "failure": f"{where} cannot be applied to these messages: {reason}.",
    }
    raise InputError(name + sentence[answer["error"]], key="chat_template")


class _Process:
    """A process that renders templates, started when it is first asked and kept until the program ends."""

    def __init__(self):
        self._lock = threading.Lock()
        self._running: subprocess.Popen[bytes] | None = None

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Its answer; a reason of its own if it does not answer."""
        content = json.dumps(request).encode()
        with self._lock:
            try:
                running = self._started()
                _write(running, struct.pack("<Q", len(content)) + content)
                deadline = time.monotonic() + _PATIENCE
                (length,) = struct.unpack("<Q", _read(running, 8, deadline))
                return json.loads(_read(running, length, deadline))
            except TimeoutError:
                self.end()
                return {"error": "spent", "reason": "seconds"}
            except (EOFError, BrokenPipeError):
                # The system ends it when its time is over.
                status = self.end()
                late = status in (-signal.SIGXCPU, -signal.SIGKILL)
                return {"error": "spent", "reason": "seconds" if late else "crash"}
            except BaseException:
                # What it answers now would be taken for the next answer.
                self.end()
                raise

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._running is None or self._running.poll() is not None:
            self.end()
            script = str(Path(__file__).with_name("sandbox.py"))
            # It finds modules where this program does, and leaves ctrl-C to this program.
            self._running = subprocess.Popen(
                [sys.executable, "-c", _START, json.dumps(sys.path), script, str(BYTES)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                start_new_session=True,
            )
        return self._running

    def end(self) -> int | None:
        """Ends the process, if there is one, and returns the status with which it ended."""
        running, self._running = self._running, None
        if running is None:
            return None
        # By itself, if it is about to: then the status says why.
        with contextlib.suppress(subprocess.TimeoutExpired):
            _close(running)
            return running.wait(0.05)
        running.kill()
        return running.wait()

    def forget(self):
        """In a copy of this program: the process is the other one's."""
        self._lock = threading.Lock()
        running, self._running = self._running, None
        if running is not None:
            running.returncode = 0
            _close(running)


def _close(running: "subprocess.Popen[bytes]"):
    for pipe in (running.stdin, running.stdout):
        if pipe is not None:
            pipe.close()


def _write(running: "subprocess.Popen[bytes]", content: bytes):
    assert running.stdin is not None
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(running.stdin.fileno(), rest) :]


def _read(running: "subprocess.Popen[bytes]", length: int, deadline: float) -> bytes:
    assert running.stdout is not None
    pipe, content = running.stdout.fileno(), bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while len(content) < length:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise TimeoutError
            part = os.read(pipe, length - len(content))
            if not part:
                raise EOFError
            content += part
    return bytes(content)


_START = "import sys, json, runpy; sys.path[:] = json.loads(sys.argv[1]); sys.argv[:] = sys.argv[2:]; "
_START += "runpy.run_path(sys.argv[0], run_name='__main__')"

_process = _Process()
atexit.register(_process.end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_process.forget)
