"""Connects the processes of one run before JAX does, and ends all of them as soon as one fails or dies.

With JAX alone, a process whose peers die or do not connect ends with a page of messages from the C++ runtime, and it
notices a death only by a missed heartbeat. So each process keeps one connection to process 0. It carries two kinds of
messages: a process has ended or failed, and a text that process 0 broadcasts.
"""

import contextlib
import ctypes
import importlib.metadata
import json
import os
import queue
import re
import signal
import socket
import sys
import threading
import time
from typing import Any, NoReturn

from .. import interrupts
from ..errors import InputError


# Seconds that a process has to report its own error, which says more, after another process has failed.
_GRACE = 1.0
# Seconds between two attempts to connect.
_PAUSE = 0.1
# Seconds to wait for the greeting of a connection, which may come from a program that is not ours.
_GREETING_TIMEOUT = 5.0


class Watch:
    """One process's connections to its peers: process 0 has one to each, the others have one to process 0.

    **Arguments:**

    - `process`: the number of this process.
    - `processes`: the number of processes.
    - `peers`: the connection to each peer, by the peer's number.

    **Attributes:**

    - `trouble`: why this process is about to end, from the moment when it knows until it ends.
    """

    trouble: str | None = None

    def __init__(self, process: int, processes: int, peers: dict[int, socket.socket]):
        self.process = process
        self.processes = processes
        self._peers = peers
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._leaving = False
        self._texts: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._listen, args=(peer,), daemon=True) for peer in peers]

    def start(self):
        """Starts to listen to the peers."""
        for thread in self._threads:
            thread.start()

    def broadcast(self, text: str | None) -> str | None:
        """Broadcasts a text of process 0 to all processes; the others wait for it without a limit."""
        if self.process:
            return self._texts.get()
        self._send("text", text)
        return text

    def end(self):
        """Tells the others, at the exit of this process, that it has ended.

        After an uncaught exception, this process ends without waiting for the others, where JAX would wait.
        """
        # An interactive interpreter continues after an exception.
        if getattr(sys, "last_value", None) is None or hasattr(sys, "ps1"):
            self._send("ended", self.process)
        elif self._ending.wait(_GRACE / 2):
            # A peer's end caused the exception; the thread that noticed it ends this process with a message.
            time.sleep(10 * _GRACE)
        else:
            self.leave(1)

    def leave(self, code: int) -> NoReturn:
        """Ends this process after its own failure; the others are notified and end as well."""
        self._leaving = True
        self._ending.set()
        self._send("failed", self.process)
        if self.process == 0:
            # JAX's service runs in this process, and aborts the others if it ends before they do.
            deadline = time.monotonic() + 3 * _GRACE
            for thread in self._threads:
                thread.join(max(0.0, deadline - time.monotonic()))
        _exit(code)

    def _listen(self, peer: int):
        ended = False
        with contextlib.suppress(OSError, ValueError), self._peers[peer].makefile(encoding="utf-8") as lines:
            for line in lines:
                kind, content = json.loads(line)
                if kind == "ended":
                    ended = True
                elif kind == "text":
                    self._texts.put(content)
                else:
                    self._end_after(content, kind == "failed")
                    return
        if not ended:
            self._end_after(peer, failed=False)

    def _end_after(self, peer: int, failed: bool):
        with self._lock:
            if self._ending.is_set():
                return
            self._ending.set()
        why = (
            f"has failed, so process {self.process} ends too; the error of process {peer} says why"
            if failed
            else f"is gone, so process {self.process} ends too; it was killed, or its machine or the network failed"
        )
        self.trouble = f"Process {peer} {why}."
        if self.process == 0:
            self._send("failed" if failed else "gone", peer)
        # Process 0 ends last: JAX's service runs in it, and its end aborts the others.
        time.sleep(_GRACE if self.process else 2 * _GRACE)
        if self._leaving:
            return
        interrupts.undo_all()
        with contextlib.suppress(OSError):
            os.write(2, f"Error: {self.trouble}\n".encode())
        _exit(1)

    def _send(self, kind: str, content: Any):
        message = (json.dumps([kind, content]) + "\n").encode()
        for connection in self._peers.values():
            # The thread that listens to a peer notices if its connection is broken.
            with contextlib.suppress(OSError):
                connection.sendall(message)


_running: list[Watch] = []


def run(watch: Watch):
    """Makes `watch` the watch of this process, and starts it."""
    _running.append(watch)
    interrupts.end_by(watch.leave)
    if os.name == "posix" and watch.process > 0:
        _delay_aborts()
    watch.start()


def _delay_aborts():
    """Delays the abort of this process by JAX when process 0 dies, so that the watch can report the reason first.

    JAX aborts within milliseconds, by SIGABRT. The C library's `sleep` becomes the handler of that signal: it sleeps
    for 6 seconds, the number of the signal, and then the process is aborted.
    """
    library = ctypes.CDLL(None)
    library.signal.argtypes, library.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    library.signal(signal.SIGABRT, ctypes.cast(library.sleep, ctypes.c_void_p))


def running() -> Watch | None:
    """The watch of this process, or `None`."""
    return _running[-1] if _running else None


def _exit(code: int) -> NoReturn:
    """Ends the process without its exit handlers, in which JAX would wait for the others."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


def address(coordinator: str) -> tuple[str, int]:
    """Host and port of `"host:port"`."""
    match = re.fullmatch(r"\[?([^\s\[\]/]+?)\]?:(\d{1,5})", coordinator)
    if match is None or not 0 < int(match[2]) < 2**16:
        raise InputError(
            f"The coordinator {coordinator!r} must be the host of process 0 and a free port there, such as "
            "'10.0.0.1:8476'."
        )
    return match[1], int(match[2])


def meet(coordinator: str, processes: int, process: int, timeout: float) -> Watch:
    """Waits until all processes have connected, at the address that JAX's service uses afterwards.

    **Arguments:**

    - `coordinator`: the address of process 0, as `"host:port"`.
    - `processes`: the number of processes.
    - `process`: the number of this process.
    - `timeout`: how many seconds to wait.

    **Returns:** a watch that is not started yet.

    **Raises:** `ValueError`, on all processes that have connected, if a process does not connect in time, two have the
    same number, or they disagree on the number of processes.
    """
    deadline = time.monotonic() + timeout
    if process == 0:
        return Watch(0, processes, _receive(coordinator, processes, timeout, deadline))
    return Watch(process, processes, {0: _join(coordinator, processes, process, timeout, deadline)})


def _receive(coordinator: str, processes: int, timeout: float, deadline: float) -> dict[int, socket.socket]:
    # JAX reads this variable too: process 0 may listen at another address than the others connect to.
    _, port = address(os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", coordinator))
    try:
        listener = _listener(port)
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise InputError(
            f"Process 0 cannot listen at port {port} of the coordinator {coordinator!r} ({why}); choose another port, "
            "the same on all processes."
        ) from error
    peers: dict[int, socket.socket] = {}
    wrong, refused = None, None
    with listener:
        while len(peers) < processes - 1 and wrong is None:
            listener.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                missing = ", ".join(str(number) for number in range(1, processes) if number not in peers)
                wrong = (
                    f"Of {processes} processes, number {missing} did not connect to the coordinator {coordinator!r} "
                    f"within {timeout:g} s; start all of them with the same coordinator, and look for their own errors."
                )
                continue
            greeting = _greeting(connection)
            if greeting is None:
                connection.close()
                continue
            wrong = _refusal(*greeting, processes, peers)
            if wrong is None:
                peers[greeting[0]] = connection
            else:
                refused = connection
    # The answers come after the listener has closed, when the port is free for JAX's service.
    answered = [*peers.values(), *([] if refused is None else [refused])]
    for connection in answered:
        _answer(connection, wrong or "")
    if wrong is not None:
        for connection in answered:
            connection.close()
        raise InputError(wrong)
    return peers


def _refusal(number: int, count: int, version: str, processes: int, peers: dict[int, socket.socket]) -> str | None:
    """Why process 0 refuses a process that has connected, or `None`."""
    if count != processes:
        wrong = f"Process {number} was started for {count} processes and process 0 for {processes}"
    elif number in peers:
        wrong = f"Two processes have the number {number}"
    elif version != _version():
        wrong = f"Process {number} has {version} and process 0 has {_version()}"
    else:
        return None
    return f"{wrong}; start all of them alike, numbered from 0 to {processes - 1}."


def _listener(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=256)
    return socket.create_server(("", port), backlog=256)


def _greeting(connection: socket.socket) -> tuple[int, int, str] | None:
    """The number, count and version that a process sends; `None` from a program that is not ours."""
    connection.settimeout(_GREETING_TIMEOUT)
    try:
        kind, number, count, version = json.loads(_read_line(connection))
    except (OSError, ValueError, TypeError):
        return None
    _keep_alive(connection)
    return (number, count, version) if kind == "mistral_eqx" else None


def _join(coordinator: str, processes: int, process: int, timeout: float, deadline: float) -> socket.socket:
    greeting = (json.dumps(["mistral_eqx", process, processes, _version()]) + "\n").encode()
    reason = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        connection = None
        try:
            connection = socket.create_connection(address(coordinator), timeout=left)
            connection.sendall(greeting)
            # Process 0 stops waiting at about the same time; its message says which process is missing.
            connection.settimeout(left + 2 * _GREETING_TIMEOUT)
            wrong = json.loads(_read_line(connection))
        except (OSError, ValueError) as error:
            # Process 0 does not listen yet, or another program listens.
            reason = (isinstance(error, OSError) and error.strerror) or reason
            if connection is not None:
                connection.close()
            time.sleep(_PAUSE)
            continue
        if wrong:
            connection.close()
            raise InputError(wrong)
        _keep_alive(connection)
        return connection
    raise InputError(
        f"Process 0 was not found at the coordinator {coordinator!r} within {timeout:g} s ({reason}); start it there, "
        "and give its address and port to all processes."
    )


def _answer(connection: socket.socket, wrong: str):
    with contextlib.suppress(OSError):
        connection.sendall((json.dumps(wrong) + "\n").encode())


def _read_line(connection: socket.socket) -> bytes:
    """One line, and not a byte more: the watch reads what follows."""
    line = b""
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte or len(line) > 2000:
            raise InputError("The connection sent no line.")
        line += byte
    return line


def _keep_alive(connection: socket.socket):
    """Keeps a silent connection open, and detects within half a minute that the other machine is off."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4), ("TCP_NODELAY", 1)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _version() -> str:
    return f"jax {importlib.metadata.version('jax')}"
