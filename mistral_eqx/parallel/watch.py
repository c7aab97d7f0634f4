"""The processes of one run meet before JAX connects them, and learn at once when one of them is gone.

JAX alone would end a process whose peers do not come, or die, with a page of its C++ runtime's, and a death would
pass unnoticed until a heartbeat is missed. So each process keeps one connection to process 0, over which little is
said: that a process has ended or failed, and texts that process 0 shares.
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


# How long a process that learns of another's failure may still take to report its own, which says more.
_GRACE = 1.0
# An address that is not answered yet is tried again after this long.
_PAUSE = 0.1
# The longest a stranger may hold up the others at the door.
_GREETING = 5.0


class Watch:
    """One process's connections to its peers: process 0 has one to each, the others have one to process 0.

    **Arguments:**

    - `process`: this process's number.
    - `processes`: how many there are.
    - `peers`: the number and the connection of each peer.
    """

    def __init__(self, process: int, processes: int, peers: dict[int, socket.socket]):
        self.process = process
        self.processes = processes
        self._peers = peers
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._leaving = False
        self._texts: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._listen, args=(peer,), daemon=True) for peer in peers]

    def start(self):
        """Begins to watch."""
        for thread in self._threads:
            thread.start()

    def share(self, text: str | None) -> str | None:
        """Process 0's text, on every process; the others wait for it as long as it takes."""
        if self.process:
            return self._texts.get()
        self._tell("text", text)
        return text

    def end(self):
        """Tells the others that this process is done, at its ordinary end.

        If it ends by an exception that nobody caught, it goes without waiting for the others, as JAX would.
        """
        # A session at a prompt goes on after an exception.
        if getattr(sys, "last_value", None) is None or hasattr(sys, "ps1"):
            self._tell("ended", self.process)
        elif self._over.wait(_GRACE / 2):
            # The exception came of a peer's end, of which the thread that saw it has the last word.
            time.sleep(10 * _GRACE)
        else:
            self.leave(1)

    def leave(self, code: int) -> NoReturn:
        """Ends this process for a failure of its own; the others learn of it and end as well."""
        self._leaving = True
        self._over.set()
        self._tell("failed", self.process)
        if self.process == 0:
            # JAX aborts the others if its service, which is here, ends before they do.
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
                    self._lose(content, kind == "failed")
                    return
        if not ended:
            self._lose(peer, failed=False)

    def _lose(self, peer: int, failed: bool):
        with self._lock:
            if self._over.is_set():
                return
            self._over.set()
        if self.process == 0:
            self._tell("failed" if failed else "gone", peer)
        # Process 0 goes last: JAX aborts the others when its service, which is there, is gone.
        time.sleep(_GRACE if self.process else 2 * _GRACE)
        if self._leaving:
            return
        why = (
            f"has failed, so process {self.process} ends too; the error of process {peer} says why"
            if failed
            else f"is gone, so process {self.process} ends too; it was killed, or its machine or the network failed"
        )
        with contextlib.suppress(OSError):
            os.write(2, f"Error: Process {peer} {why}.\n".encode())
        _exit(1)

    def _tell(self, kind: str, content: Any):
        message = (json.dumps([kind, content]) + "\n").encode()
        for connection in self._peers.values():
            # A peer that cannot be told is noticed by the thread that listens to it.
            with contextlib.suppress(OSError):
                connection.sendall(message)


_running: list[Watch] = []


def run(watch: Watch):
    """Makes a watch the one of this process, and begins to watch."""
    _running.append(watch)
    interrupts.end_by(watch.leave)
    if os.name == "posix" and watch.process > 0:
        _put_off_aborts()
    watch.start()


def _put_off_aborts():
    """Lets the watch have the last word where JAX ends the process, which it does when process 0 dies.

    It does so by SIGABRT, within milliseconds. The C library's own `sleep` becomes the handler of that signal, whose
    number, 6, is then the seconds it sleeps; after them the process is aborted as it would have been.
    """
    library = ctypes.CDLL(None)
    library.signal.argtypes, library.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    library.signal(signal.SIGABRT, ctypes.cast(library.sleep, ctypes.c_void_p))


def running() -> Watch | None:
    """The watch of this process, if there is one."""
    return _running[-1] if _running else None


def _exit(code: int) -> NoReturn:
    """Ends the process without what runs at an ordinary exit: JAX would wait there for the others."""
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
    """Waits until all processes are there, at the address at which JAX's own service is going to be.

    **Arguments:**

    - `coordinator`: the address of process 0, as `"host:port"`.
    - `processes`: how many there are.
    - `process`: the number of this one.
    - `timeout`: after how many seconds to give up.

    **Returns:** the connections, not watched yet.

    **Raises:** `ValueError`, on all processes that did come, if one does not come in time, two have one number, or
    they do not agree on how many they are.
    """
    deadline = time.monotonic() + timeout
    if process == 0:
        return Watch(0, processes, _receive(coordinator, processes, timeout, deadline))
    return Watch(process, processes, {0: _join(coordinator, processes, process, timeout, deadline)})


def _receive(coordinator: str, processes: int, timeout: float, deadline: float) -> dict[int, socket.socket]:
    # Where JAX is told to listen elsewhere than at the address that the others know, so do we.
    _, port = address(os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", coordinator))
    try:
        door = _open_door(port)
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise InputError(
            f"Process 0 cannot listen at port {port} of the coordinator {coordinator!r} ({why}); choose another port, "
            "the same on all processes."
        ) from error
    peers: dict[int, socket.socket] = {}
    wrong, refused = None, None
    with door:
        while len(peers) < processes - 1 and wrong is None:
            door.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection, _ = door.accept()
            except TimeoutError:
                missing = ", ".join(str(number) for number in range(1, processes) if number not in peers)
                wrong = (
                    f"Of {processes} processes, number {missing} did not come to the coordinator {coordinator!r} "
                    f"within {timeout:g} s; start all of them with the same coordinator, and look for their own errors."
                )
                continue
            greeting = _greeting(connection)
            if greeting is None:
                connection.close()
                continue
            wrong = _misplaced(*greeting, processes, peers)
            if wrong is None:
                peers[greeting[0]] = connection
            else:
                refused = connection
    # Only now, with the door closed, is the port free for JAX's service.
    answered = [*peers.values(), *([] if refused is None else [refused])]
    for connection in answered:
        _answer(connection, wrong or "")
    if wrong is not None:
        for connection in answered:
            connection.close()
        raise InputError(wrong)
    return peers


def _misplaced(number: int, count: int, version: str, processes: int, peers: dict[int, socket.socket]) -> str | None:
    """What is wrong with who has come, if anything."""
    if count != processes:
        wrong = f"Process {number} was told of {count} processes and process 0 of {processes}"
    elif number in peers:
        wrong = f"Two processes have the number {number}"
    elif version != _version():
        wrong = f"Process {number} has {version} and process 0 has {_version()}"
    else:
        return None
    return f"{wrong}; start all of them alike, numbered from 0 to {processes - 1}."


def _open_door(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=256)
    return socket.create_server(("", port), backlog=256)


def _greeting(connection: socket.socket) -> tuple[int, int, str] | None:
    """Number, count and version of who has come; `None` of a stranger."""
    connection.settimeout(_GREETING)
    try:
        kind, number, count, version = json.loads(_line(connection))
    except (OSError, ValueError, TypeError):
        return None
    _keep(connection)
    return (number, count, version) if kind == "mistral_eqx" else None


def _join(coordinator: str, processes: int, process: int, timeout: float, deadline: float) -> socket.socket:
    greeting = (json.dumps(["mistral_eqx", process, processes, _version()]) + "\n").encode()
    reason = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        connection = None
        try:
            connection = socket.create_connection(address(coordinator), timeout=left)
            connection.sendall(greeting)
            # Process 0 gives up at about the same time, and knows more about why.
            connection.settimeout(left + 2 * _GREETING)
            wrong = json.loads(_line(connection))
        except (OSError, ValueError) as error:
            # Nobody is there yet, or something else than process 0.
            reason = (isinstance(error, OSError) and error.strerror) or reason
            if connection is not None:
                connection.close()
            time.sleep(_PAUSE)
            continue
        if wrong:
            connection.close()
            raise InputError(wrong)
        _keep(connection)
        return connection
    raise InputError(
        f"Process 0 was not found at the coordinator {coordinator!r} within {timeout:g} s ({reason}); start it there, "
        "and give its address and port to all processes."
    )


def _answer(connection: socket.socket, wrong: str):
    with contextlib.suppress(OSError):
        connection.sendall((json.dumps(wrong) + "\n").encode())


def _line(connection: socket.socket) -> bytes:
    """One line, and not a byte more: what follows is for the watch."""
    line = b""
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte or len(line) > 2000:
            raise InputError("This is no line.")
        line += byte
    return line


def _keep(connection: socket.socket):
    """Lets the connection live on without a word, and notice within half a minute if the other machine is off."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4), ("TCP_NODELAY", 1)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _version() -> str:
    return f"jax {importlib.metadata.version('jax')}"
