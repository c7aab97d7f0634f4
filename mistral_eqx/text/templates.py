"""Renders chat templates with limits of time, memory and length."""

import atexit
import contextlib
import json
import os
import selectors
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError


# Processor seconds, wall-clock seconds, and bytes. Templates in use take milliseconds and a few megabytes.
PROCESSOR_TIME, TIME = 2, 30
MEMORY = 512 * 2**20
# The largest number of characters of a text, in addition to ten times the size of the variables.
LONGEST = 2**20
LONGEST_TEMPLATE = 2**20

_WORKER = Path(__file__).with_name("template_worker.py")


def render(template: str, variables: Mapping[str, Any], name: str) -> str:
    """Renders a template.

    It runs in a separate process, which is kept for the next call, and is killed if it exceeds a limit.

    **Arguments:**

    - `template`: a jinja2 template, with the extensions of Hugging Face.
    - `variables`: values of JSON types only.
    - `name`: the name of the template, for error messages.

    **Returns:** the text.

    **Raises:** `InputError` if the template is invalid, uses a forbidden operation, refuses the variables, or exceeds
    `PROCESSOR_TIME`, `TIME`, `MEMORY` or `LONGEST`.
    """
    if len(template) > LONGEST_TEMPLATE:
        raise InputError(
            f"{name} has {len(template)} characters, but at most {LONGEST_TEMPLATE} are supported; fetch it again."
        )
    longest = LONGEST + 10 * len(json.dumps(variables))
    answer = _process.ask({"template": template, "variables": variables, "longest": longest})
    if "text" in answer:
        return answer["text"]
    message = " ".join(answer["message"].split()).rstrip(".")
    line = "" if answer["line"] is None else f" (line {answer['line']})"
    remedy = "use another template, or add your own chat_template.jinja to the tokenizer's folder"
    sentences = {
        "refusal": f" refuses these messages: {message}.",
        "syntax": f" is not valid jinja2{line}: {message}.",
        "forbidden": f" does what a chat template may not do: {message}{line}.",
        "failed": f"{line} cannot be applied to these messages: {message}.",
        "long": f" writes more than {longest} characters{line}; {remedy}.",
        "memory": f" takes more than {MEMORY // 2**20} MB of memory{line}; {remedy}.",
        "deep": f" has endless recursion, or nests too deeply{line}; {remedy}.",
        "time": f" takes more than {PROCESSOR_TIME} s of processor time or {TIME} s in all{line}; {remedy}.",
    }
    raise InputError(name + sentences[answer["kind"]], key="chat_template")


class _Process:
    """The process that renders, started at the first request."""

    def __init__(self):
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._lock = threading.Lock()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Sends a request and waits for its answer. Without an answer in time, the kind is `"time"`."""
        with self._lock:
            # After a fork the pipes belong to the parent process.
            if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
                self._start()
            try:
                answer = self._exchange(request)
            except BaseException:  # also ctrl-C: a later request must not get this answer
                self.stop()
                raise
            if answer is None:
                self.stop()
                return {"kind": "time", "message": "", "line": None}
            return answer

    def _start(self):
        if self._process is not None and self._owner == os.getpid():
            self.stop()
        # It imports from the same path as this program, except from its own folder (-P). Only this program gets ctrl-C.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER), str(PROCESSOR_TIME), str(MEMORY)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        self._owner = os.getpid()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)

    def _exchange(self, request: Mapping[str, Any]) -> dict[str, Any] | None:
        process, content = self._process, json.dumps(request).encode()
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        unsent, received = memoryview(struct.pack("<I", len(content)) + content), bytearray()
        deadline = time.monotonic() + TIME
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            selector.register(process.stdin, selectors.EVENT_WRITE)
            while len(received) < 4 or len(received) < 4 + struct.unpack_from("<I", received)[0]:
                ready = selector.select(max(deadline - time.monotonic(), 0))
                if not ready:
                    return None
                for key, _ in ready:
                    if key.fileobj is process.stdout:
                        part = os.read(process.stdout.fileno(), 2**16)
                        if not part:
                            return None
                        received += part
                    else:
                        with contextlib.suppress(BrokenPipeError):  # output from before its end is still read
                            unsent = unsent[os.write(process.stdin.fileno(), unsent[: 2**16]) :]
                            if unsent:
                                continue
                        selector.unregister(process.stdin)
        return json.loads(bytes(received[4:]))

    def stop(self):
        """Kills the rendering process, unless a parent process owns it."""
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
            process.wait()


_process = _Process()
atexit.register(_process.stop)
