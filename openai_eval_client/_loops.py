"""Event loops: reaching a future on whatever loop it belongs to, and how many begin in one turn of it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

if TYPE_CHECKING:
    from collections.abc import Callable

_WAVE = 32  # requests that begin in one turn of an event loop, as long as nobody waits for the next
_AT_A_TIME = 8  # of those who wait


class Monotonic:
    """The default clock."""

    time = staticmethod(time.monotonic)


def call_on(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *args: object) -> bool:
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


class Starts:
    """Lets those who were admitted begin: on each event loop in their order, and a few in each of its turns.

    A loop that begins hundreds of requests in one turn hears nothing meanwhile, and may hear their answers in
    one turn again. What all of them need would be alive at once, time and again, and cost the garbage
    collector more than anything else: a quarter of the CPU with 1,000 in flight.
    """

    def __init__(self) -> None:
        # a loop that has more to do holds its own entry, and a closed one lets go of it
        self._by_loop: WeakValueDictionary[asyncio.AbstractEventLoop, _Stagger] = WeakValueDictionary()

    def now_or_later(self) -> asyncio.Future[None] | None:
        """Return what one more has to wait for on the running loop; None where it may begin in this turn."""
        loop = asyncio.get_running_loop()
        stagger = self._of(loop)
        if stagger.has_room():
            return None
        waiter = loop.create_future()
        stagger.add(waiter)
        return waiter

    def wake(self, waiter: asyncio.Future[None]) -> None:
        """Wake who waits on the running loop, at one of its next turns."""
        self._of(waiter.get_loop()).add(waiter)

    def _of(self, loop: asyncio.AbstractEventLoop) -> _Stagger:
        stagger = self._by_loop.get(loop)
        if stagger is None:
            stagger = self._by_loop[loop] = _Stagger(loop)
        return stagger


class _Stagger:
    """Who begins in this turn of an event loop, and who later."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._later: deque[asyncio.Future[None]] = deque()
        self._begun = 0
        self._goes_on = False

    def has_room(self) -> bool:
        """Return whether one more may begin, who is then counted."""
        if self._later or self._begun >= _WAVE:
            return False
        self._go_on()
        self._begun += 1
        return True

    def add(self, waiter: asyncio.Future[None]) -> None:
        """Let one begin in a later turn."""
        self._go_on()
        self._later.append(waiter)

    def _go_on(self) -> None:
        if not self._goes_on:
            self._loop.call_soon(self._next)
            self._goes_on = True

    def _next(self) -> None:
        try:
            self._goes_on, self._begun, woken = False, 0, 0
            while self._later and woken < _AT_A_TIME:
                if resolve(self._later.popleft()):
                    woken, self._begun = woken + 1, _WAVE  # nobody else passes them
        finally:
            if self._begun or self._later:
                self._go_on()


def resolve(waiter: asyncio.Future[None]) -> bool:
    """Wake who waits; False where they have been cancelled meanwhile."""
    if waiter.done():
        return False
    waiter.set_result(None)
    return True


def refuse(waiter: asyncio.Future[None], error: Exception) -> None:
    """Raise an error where they wait, unless they have been cancelled meanwhile."""
    if not waiter.done():
        waiter.set_exception(error)
