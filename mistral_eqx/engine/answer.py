"""What an engine answers, event by event."""

import asyncio
import collections
import contextlib
import dataclasses
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Literal


Finish = Literal["stop", "length", "cancelled", "timeout", "error"]


@dataclasses.dataclass(frozen=True)
class LogProb:
    """The model's own log-probability of a token, before processors and sampler.

    **Attributes:**

    - `id`, `log_prob`: the chosen token.
    - `top`: the likeliest tokens and their log-probabilities, likeliest first.
    """

    id: int
    log_prob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Event:
    """What is new in an answer.

    **Attributes:**

    - `ids`: new tokens, an end token included.
    - `text`: the new text; a text that may be the beginning of a stop string is held back.
    - `log_probs`: one for each of `ids`, if the request asks for them.
    - `finish`: why the answer ends with this event: `"stop"` after an end token or a stop string, `"length"` after
        `max_new_tokens`, `"cancelled"`, `"timeout"` or `"error"`; `None` if it goes on.
    - `stopped`: the stop string that was found.
    - `error`: one sentence, if `finish` is `"error"`.
    """

    ids: tuple[int, ...] = ()
    text: str = ""
    log_probs: tuple[LogProb, ...] = ()
    finish: Finish | None = None
    stopped: str | None = None
    error: str | None = None


class Answer:
    """An answer while it is decoded: an iterator over [`mistral_eqx.engine.Event`][], plain or asynchronous.

    ```python
    for event in engine.submit(mx.Request("The capital of France is", max_new_tokens=8)):
        print(event.text, end="")
    ```

    The last event has `finish`. Only one iterator may take the events.

    **Attributes:**

    - `prompt`: the prompt's token ids.
    - `cached`: how many of them were not prefilled, because their keys and values were in the prefix cache.
    - `proposed`, `accepted`: how many tokens were proposed, with `speculate`, and how many of them the model chose too.
    - `cancelled`: whether `cancel` was called.
    """

    prompt: tuple[int, ...]
    cached: int
    proposed: int
    accepted: int
    cancelled: bool

    def __init__(self, prompt: tuple[int, ...]):
        self.prompt = prompt
        self.cached = self.proposed = self.accepted = 0
        self.cancelled = False
        self._events: collections.deque[Event] = collections.deque()
        self._came = threading.Condition()
        self._wake: Callable[[], object] | None = None
        self._finished = False

    def cancel(self):
        """Ends the answer before its next token; the last event then has `finish="cancelled"`."""
        self.cancelled = True

    def put(self, event: Event):
        """Adds an event; the engine calls this."""
        with self._came:
            self._events.append(event)
            self._finished |= event.finish is not None
            self._came.notify_all()
            wake = self._wake
        if wake is not None:
            wake()

    @property
    def finished(self) -> bool:
        """Whether the last event came."""
        return self._finished

    def __iter__(self) -> Iterator[Event]:
        while True:
            with self._came:
                while not self._events:
                    self._came.wait()
                event = self._events.popleft()
            yield event
            if event.finish is not None:
                return

    async def __aiter__(self) -> AsyncIterator[Event]:
        loop, ready = asyncio.get_running_loop(), asyncio.Event()

        def wake():
            # The loop may have ended before the answer; that must not reach the engine.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(ready.set)

        with self._came:
            self._wake = wake
        while True:
            ready.clear()
            while self._events:
                event = self._events.popleft()
                yield event
                if event.finish is not None:
                    return
            await ready.wait()

    def result(self) -> Event:
        """Waits for the end, and returns all events as one."""
        return joined(list(self))


def joined(events: list[Event]) -> Event:
    """Several events as one."""
    return dataclasses.replace(
        events[-1],
        ids=tuple(id for event in events for id in event.ids),
        text="".join(event.text for event in events),
        log_probs=tuple(one for event in events for one in event.log_probs),
    )
