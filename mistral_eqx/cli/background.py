"""Calls that compute for long outside Python, where ctrl-C would have to wait for their end."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

from .. import interrupts


Result = TypeVar("Result")

_END = object()
_WAKE = object()


class Background(Generic[Result]):
    """An iterable that a thread goes through, while this one waits for what it gives and for ctrl-C.

    Native code has no place for an exception, so ctrl-C ends the wait and not the thread. Then either the process ends
    without waiting for it, or `stop` does.

    **Arguments:**

    - `make`: gives the iterable; called by the thread.
    - `ahead`: whether the thread goes on before its last item is taken.

    **Raises:** `KeyboardInterrupt` from the iteration, between two items, after ctrl-C; and what the iterable raises.
    """

    def __init__(self, make: Callable[[], Iterable[Result]], *, ahead: bool = True):
        self._make = make
        self._ahead = ahead
        self._items: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._left = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __iter__(self) -> Iterator[Result]:
        # A signal that came just before is seen when the first item is taken.
        with interrupts.answered(lambda: self._items.put(_WAKE)):
            self._thread.start()
            try:
                while True:
                    self._wanted.put(True)
                    item = self._next()
                    if item is _END:
                        return
                    if isinstance(item, BaseException):
                        raise item
                    yield item[0]
            finally:
                self._left = True
                self._wanted.put(False)

    def stop(self):
        """Waits until the thread has ended, after the item that it is computing."""
        self._thread.join()

    def _next(self) -> Any:
        while True:
            interrupts.check()
            item = self._items.get()
            if item is not _WAKE:
                return item

    def _run(self):
        try:
            for item in self._given():
                self._items.put((item,))
            self._items.put(_END)
        except BaseException as error:
            self._items.put(error)

    def _given(self) -> Iterator[Result]:
        items = iter(self._make())
        while (self._ahead or self._wanted.get()) and not self._left:
            try:
                yield next(items)
            except StopIteration:
                return


def interruptible(call: Callable[[], Result]) -> Result:
    """The result of one call, or `KeyboardInterrupt` as soon as ctrl-C comes."""
    (result,) = Background(lambda: [call()])
    return result
