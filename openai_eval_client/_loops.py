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

    A loop that hears many answers at once would otherwise begin as many requests at once, and hear their
    answers at once again: for the garbage collector that is up to a third more work in all.
    """

    def __init__(self) -> None:
        self._queues: dict[asyncio.AbstractEventLoop, deque[asyncio.Future[None]]] = {}

    def wake(self, waiter: asyncio.Future[None]) -> None:
        """Wake who waits on the running loop, at one of its next turns."""
        loop = waiter.get_loop()
        if loop not in self._queues:
            self._queues[loop] = deque()
            loop.call_soon(self._next, loop)
        self._queues[loop].append(waiter)

    def _next(self, loop: asyncio.AbstractEventLoop) -> None:
        queue = self._queues[loop]
        for _ in range(min(_AT_ONCE, len(queue))):
            resolve(queue.popleft())
        if queue:
            loop.call_soon(self._next, loop)
        else:
            del self._queues[loop]


def resolve(waiter: asyncio.Future[None]) -> None:
    """Wake who waits, unless they have been cancelled meanwhile."""
    if not waiter.done():
        waiter.set_result(None)


def refuse(waiter: asyncio.Future[None], error: Exception) -> None:
    """Raise an error where they wait, unless they have been cancelled meanwhile."""
    if not waiter.done():
        waiter.set_exception(error)
