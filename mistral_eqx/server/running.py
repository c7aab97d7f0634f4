"""Runs an application until a signal ends it, and lets the answers that run come to their end."""

import asyncio
import contextlib
import ipaddress
import socket
import time
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI

from .. import interrupts
from ..documents import shown
from ..errors import InputError
from .service import LOG, Service


# The names by which programs on this machine call it.
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def listen(host: str, port: int) -> socket.socket:
    """Takes an address, so that a wrong one is refused before a model is loaded. Nobody can connect yet.

    **Arguments:**

    - `host`, `port`: the address; port 0 takes a free port.

    **Raises:** `InputError` if it cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        taken = socket.socket(family, kind, protocol)
        try:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind(address)
        except BaseException:
            taken.close()
            raise
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"The server cannot have port {port} of {shown(host)} ({reason}); give another host or port.", key="host"
        ) from error
    return taken


def is_loopback(taken: socket.socket) -> bool:
    """Whether only this machine reaches an address."""
    return ipaddress.ip_address(taken.getsockname()[0].partition("%")[0]).is_loopback


def url(taken: socket.socket) -> str:
    """The address of a server."""
    host, port = taken.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(app: FastAPI, taken: socket.socket, *, drain: float = 30.0, ready: Callable[[], object] = lambda: None):
    """Serves until SIGTERM or ctrl-C comes, then drains: refuses new requests, and waits for those that run.

    The second signal ends the process at once.

    **Arguments:**

    - `app`: from [`mistral_eqx.server.create_app`][].
    - `taken`: from [`mistral_eqx.server.listen`][]; closed at the end.
    - `drain`: for how many seconds it waits; then the answers that still run are cancelled.
    - `ready`: called when clients can connect.

    **Raises:** `KeyboardInterrupt` at the end, for the signal.
    """
    running = _Running(app, taken, drain, ready)
    with contextlib.closing(taken), interrupts.answered(running.stop):
        asyncio.run(running.serve())


class _Server(uvicorn.Server):
    """uvicorn's server without its answers to signals, for which `interrupts` has a thread."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], object]):
        super().__init__(config)
        self._ready = ready

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None):
        await super().startup(sockets)
        self._ready()


class _Running:
    """An application while it runs."""

    def __init__(self, app: FastAPI, taken: socket.socket, drain: float, ready: Callable[[], object]):
        # `critical`: what uvicorn writes of a fault may have a part of a prompt; the gate reports faults.
        config = uvicorn.Config(
            app,
            lifespan="off",
            ws="none",
            log_level="critical",
            access_log=False,
            # Longer than clients keep a connection, so that none is closed while a request is on its way.
            timeout_keep_alive=75,
            timeout_graceful_shutdown=5,
        )
        self._server = _Server(config, ready)
        self._service: Service = app.state.service
        self._taken, self._drain = taken, drain
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = asyncio.Event()

    def stop(self):
        """Begins the end; from any thread."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._stopping.set)

    async def serve(self):
        """Serves, drains and ends."""
        self._loop = asyncio.get_running_loop()
        if interrupts.came() is not None:
            return
        serving = asyncio.create_task(self._server.serve([self._taken]))
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not serving.done():
                await self._drained()
        finally:
            stopping.cancel()
            self._server.should_exit = True
            await serving

    async def _drained(self):
        self._service.draining = True
        end = time.monotonic() + self._drain
        if self._service.active:
            LOG.info("Draining: %d requests run; a second signal ends at once.", self._service.active)
        while self._service.active and time.monotonic() < end:
            await asyncio.sleep(0.05)
        if self._service.active:
            await asyncio.to_thread(self._service.engine.close)
            await asyncio.sleep(0.1)
