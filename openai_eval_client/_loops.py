"""Reaching a future on whatever event loop it belongs to."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


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


def resolve(waiter: asyncio.Future[None]) -> None:
    """Wake who waits, unless they have been cancelled meanwhile."""
    if not waiter.done():
        waiter.set_result(None)


def refuse(waiter: asyncio.Future[None], error: Exception) -> None:
    """Raise an error where they wait, unless they have been cancelled meanwhile."""
    if not waiter.done():
        waiter.set_exception(error)
