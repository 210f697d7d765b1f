"""Reaching a future on whatever event loop it belongs to."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_AT_ONCE = 8  # waiters woken in one turn of an event loop


class Monotonic:
    """The default clock."""

    time = staticmethod(time.monotonic)


def call_on(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: object) -> bool:
    """Run `function` on `loop`, now if it is the running one; False where the loop has closed."""
    if running_loop() is loop:
        function(*args)
        return True
    try:
        loop.call_soon_threadsafe(function, *args)
    except RuntimeError:
        return False
    return True


def running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the event loop of this thread, if it runs one."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


class Wakes:
    """Wakes those who were admitted, on each event loop in their order and a few at a time.

    A loop that hears hundreds of answers in one turn would begin as many requests in the next, and hear their
    answers in one turn again. What all of them need would be alive at once, time and again, and cost the
    garbage collector more than anything else: a quarter of the CPU with 1,000 in flight.
    """

    def __init__(self) -> None:
        self._queues: dict[asyncio.AbstractEventLoop, deque[asyncio.Future[None]]] = {}

    def wake(self, waiter: asyncio.Future[None]) -> None:
        """Wake who waits on the running loop, at one of its next turns."""
        loop = waiter.get_loop()
        queue = self._queues.get(loop)
        queue = self._new_queue(loop) if queue is None else queue
        if not queue:
            loop.call_soon(self._next, loop, queue)
        queue.append(waiter)  # last: an interrupt before it loses this one, and holds up nobody else

    def _new_queue(self, loop: asyncio.AbstractEventLoop) -> deque[asyncio.Future[None]]:
        for closed in [known for known in list(self._queues) if known.is_closed()]:
            self._queues.pop(closed, None)
        return self._queues.setdefault(loop, deque())

    def _next(self, loop: asyncio.AbstractEventLoop, queue: deque[asyncio.Future[None]]) -> None:
        try:
            for _ in range(min(_AT_ONCE, len(queue))):
                resolve(queue.popleft())
        finally:
            if queue:
                loop.call_soon(self._next, loop, queue)


def resolve(waiter: asyncio.Future[None]) -> None:
    """Wake who waits, unless they have been cancelled meanwhile."""
    if not waiter.done():
        waiter.set_result(None)


def refuse(waiter: asyncio.Future[None], error: Exception) -> None:
    """Raise an error where they wait, unless they have been cancelled meanwhile."""
    if not waiter.done():
        waiter.set_exception(error)
