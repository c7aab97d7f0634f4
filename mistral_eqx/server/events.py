"""Server-sent events, and clients that go away."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from .bodies import dumps


DONE = b"data: [DONE]\n\n"
# Seconds after which a client that does not read what was sent counts as gone.
_PATIENCE = 60


def event(content: Any) -> bytes:
    """An event of JSON data."""
    return b"data: " + dumps(content) + b"\n\n"


async def unless_gone(http: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """The result of `work`, which is cancelled as soon as the client goes away."""
    working, gone = asyncio.create_task(work), asyncio.create_task(_gone(http.receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else Response(status_code=499)
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


class EventStream(Response):
    """A stream of events.

    **Arguments:**

    - `events`: the bytes of events.
    - `end`: called at the end, whether the client read all, went away, or never began.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], end: Callable[[], None]):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._end = events, end

    async def __call__(self, scope: Scope, receive: Receive, send: Send):
        sending, gone = asyncio.create_task(self._send(send)), asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            self._end()
            sending.cancel()
            gone.cancel()
            await asyncio.gather(sending, gone, return_exceptions=True)
            await self._events.aclose()

    async def _send(self, send: Send):
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for some in self._events:
                async with asyncio.timeout(_PATIENCE):
                    await send({"type": "http.response.body", "body": some, "more_body": True})
        except TimeoutError:
            return  # uvicorn closes the connection, because the answer has no end
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _gone(receive: Receive):
    while (await receive())["type"] != "http.disconnect":
        pass
