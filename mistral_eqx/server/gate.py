"""What every HTTP request passes: keys, names of hosts, the end of the server, faults, metrics and the log."""

import hmac
import logging
import secrets
import time
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .bodies import error_response
from .errors import ApiError, internal
from .service import LOG, Service


# The page asks for the key, so it comes without one, and so do checks of health.
_OPEN = ("/", "/health")
# Other programs ask these again and again.
_ASKED_OFTEN = ("/health", "/metrics")


class Gate:
    """The outermost part of the app.

    **Arguments:**

    - `api_key`: what `Authorization: Bearer` must have.
    - `hosts`: the names by which this server may be called. A page of another site can have its own name lead to
        127.0.0.1, and would then read what this server answers.
    - `paths`: those that have metrics of their own.
    """

    def __init__(
        self,
        app: ASGIApp,
        service: Service,
        api_key: str | None,
        hosts: Collection[str] | None,
        paths: Collection[str],
    ):
        self._app, self._service, self._hosts, self._paths = app, service, hosts, paths
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send):
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status, id = time.perf_counter(), 0, secrets.token_hex(12)
        scope.setdefault("state", {})

        async def passed(message: Message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = id
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)

        self._service.active += 1
        try:
            refusal = self._refusal(scope)
            if refusal is None:
                await self._app(scope, receive, passed)
            else:
                await error_response(refusal)(scope, receive, passed)
        except Exception as error:
            self._service.report(error)
            if status:
                raise ConnectionError("The answer cannot be completed.") from None
            await error_response(internal())(scope, receive, passed)
        finally:
            self._service.active -= 1
            seconds, path = time.perf_counter() - start, scope["path"]
            self._service.metrics.count(path if path in self._paths else "other", status, seconds)
            if path in self._paths:
                did = scope["state"].get("did", id)
                level = logging.DEBUG if path in _ASKED_OFTEN else logging.INFO
                LOG.log(level, "%s %s %d in %.3f s, %s", scope["method"], path, status, seconds, did)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        if self._hosts is not None and _host(headers.get("host", "")) not in self._hosts:
            return ApiError(403, f"This server answers by the names {', '.join(self._hosts)} alone.", code="wrong_host")
        path = scope["path"]
        if self._key is not None and path not in _OPEN:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            # Headers are read as Latin-1.
            if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), self._key):
                message = "The API key is wrong or missing; send the header Authorization: Bearer KEY."
                return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if self._service.draining and path not in _ASKED_OFTEN:
            message = "The server ends, and takes no more requests; try another one."
            return ApiError(503, message, kind="server_error", code="shutting_down", headers={"Retry-After": "5"})
        return None


def _host(header: str) -> str | None:
    """The name in a `Host` header, without the port."""
    try:
        return urlsplit(f"//{header}").hostname
    except ValueError:
        return None
