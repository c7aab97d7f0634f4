"""Chat templates, rendered within limits of time, memory and length."""

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


# Seconds of a processor, seconds in all, and bytes. Templates in use take milliseconds and a few megabytes.
PROCESSOR_TIME, TIME = 2, 30
MEMORY = 512 * 2**20
# A text may have so many characters beside ten times those of what the template sees.
LONGEST = 2**20
LONGEST_TEMPLATE = 2**20

_WORKER = Path(__file__).with_name("template_worker.py")


def render(template: str, variables: Mapping[str, Any], name: str) -> str:
    """Renders a template.

    It runs in a process of its own, which is kept for the next call: one that takes too much of anything is ended from
    outside.

    **Arguments:**

    - `template`: of jinja2, with what templates of Hugging Face may use.
    - `variables`: nothing but JSON's types.
    - `name`: of the template, at the beginning of messages.

    **Returns:** the text.

    **Raises:** `InputError` if the template is wrong, does what none may do, refuses the variables, or takes more than
    `PROCESSOR_TIME`, `MEMORY` or `LONGEST`.
    """
    if len(template) > LONGEST_TEMPLATE:
        raise InputError(f"{name} has {len(template)} characters, more than any template has; fetch it again.")
    longest = LONGEST + 10 * len(json.dumps(variables))
    told = _process.ask({"template": template, "variables": variables, "longest": longest})
    if "text" in told:
        return told["text"]
    said = " ".join(told["said"].split()).rstrip(".")
    line = "" if told["line"] is None else f" (line {told['line']})"
    remedy = "use another template, or put a chat_template.jinja of your own beside the tokenizer"
    sentences = {
        "refusal": f" refuses these messages: {said}.",
        "syntax": f" is no valid jinja2{line}: {said}.",
        "forbidden": f" does what no chat template may do: {said}{line}.",
        "failed": f"{line} cannot be applied to these messages: {said}.",
        "long": f" writes more than {longest} characters{line}; {remedy}.",
        "memory": f" takes more than {MEMORY // 2**20} MB of memory{line}; {remedy}.",
        "deep": f" calls itself without end, or nests too deeply{line}; {remedy}.",
        "time": f" takes more than {PROCESSOR_TIME} s of processor time or {TIME} s in all{line}; {remedy}.",
    }
    raise InputError(name + sentences[told["kind"]], key="chat_template")


class _Process:
    """The process that renders, started at the first request."""

    def __init__(self):
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._lock = threading.Lock()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Sends a request and waits for its answer, within the limits; `{"kind": "time"}` if there is none."""
        with self._lock:
            # After a fork the pipes are the other process's.
            if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
                self._start()
            try:
                answer = self._exchange(request)
            except BaseException:  # ctrl-C too: an answer that is still to come belongs to no later request
                self.stop()
                raise
            if answer is None:
                self.stop()
                return {"kind": "time", "said": "", "line": None}
            return answer

    def _start(self):
        if self._process is not None and self._owner == os.getpid():
            self.stop()
        # It finds modules where this program does, but not in its own folder (-P), and leaves ctrl-C to this program.
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
                        with contextlib.suppress(BrokenPipeError):  # what it said before it ended is still read
                            unsent = unsent[os.write(process.stdin.fileno(), unsent[: 2**16]) :]
                            if unsent:
                                continue
                        selector.unregister(process.stdin)
        return json.loads(bytes(received[4:]))

    def stop(self):
        """Ends the process, if this one started it."""
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
            process.wait()


_process = _Process()
atexit.register(_process.stop)
