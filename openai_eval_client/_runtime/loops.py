"""What threads, event loops and forks ask of a library."""

from __future__ import annotations

import asyncio
import functools
import os
import threading
import time
import weakref
from collections import defaultdict, deque
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakValueDictionary

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


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


class StartThrottle:
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


def fail_waiter(waiter: asyncio.Future[None], error: Exception) -> None:
    """Raise an error where they wait, unless they have been cancelled meanwhile."""
    if not waiter.done():
        waiter.set_exception(error)


class DeferringLock:
    """A lock for state that collected objects hand something back to.

    The collector may run anywhere, also in the middle of a locked region of the same thread. What a collected
    stream or coroutine wants done then waits until that region is left: it neither deadlocks nor sees the
    state half changed.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._inside = False
        self._later: deque[Callable[[], None]] = deque()

    def __enter__(self) -> None:
        self._lock.acquire()
        self._inside = True

    def __exit__(self, *_: object) -> None:
        try:
            while self._later:
                self._later.popleft()()
        finally:
            self._inside = False
            self._lock.release()

    def when_free(self, action: Callable[[], None]) -> None:
        """Do something alone: now, or when this thread leaves the region it is in."""
        with self._lock:
            if self._inside:
                self._later.append(action)
                return
        with self:
            action()


class ForkAware(Protocol):
    """Holds something that cannot be shared with a forked child."""

    def before_fork(self) -> None:
        """Let go, and keep others from taking it again until the fork is over."""

    def after_fork(self, *, child: bool) -> None:  # the same on both sides
        """Go on, in the parent or in the child."""


_LOCK = threading.RLock()  # one fork at a time, and no newcomers meanwhile
_THINGS: weakref.WeakSet[ForkAware] = weakref.WeakSet()
_HELD: list[ForkAware] = []  # by the fork going on


def mind_forks(thing: ForkAware) -> None:
    """Tell a thing of every fork for as long as it lives."""
    _register()
    with _LOCK:
        _THINGS.add(thing)


@functools.cache
def _register() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(
            before=_before,
            after_in_parent=functools.partial(_after, child=False),
            after_in_child=functools.partial(_after, child=True),
        )


def _before() -> None:
    _LOCK.acquire()
    _HELD.extend(_THINGS)
    for thing in _HELD:
        thing.before_fork()


def _after(*, child: bool) -> None:
    for thing in _HELD:
        thing.after_fork(child=child)
    _HELD.clear()
    _LOCK.release()


_LINGER = (
    0.1  # seconds an idle thread waits for more; also the longest that it holds up the interpreter's end
)


class Background:
    """Does jobs in groups on one thread, which is there only as long as there are any."""

    def __init__(self, name: str, work: Callable[[Sequence[Any]], Sequence[Any]]) -> None:
        self._name = name
        self._work = work
        self._reset()
        mind_forks(self)

    def _reset(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[tuple[Any, asyncio.Future[Any]]] = []
        self._thread: threading.Thread | None = None
        self._linger = _LINGER

    async def do(self, job: Any) -> Any:
        """Have one job done and return its outcome; it is done also when nobody waits any more."""
        outcome = asyncio.get_running_loop().create_future()
        with self._changed:
            if self._thread is None:
                self._thread = self._started()
            self._waiting.append((job, outcome))
            self._changed.notify()
        return await outcome

    def finish(self) -> None:
        """Wait until all jobs are done and the thread has ended."""
        with self._changed:
            self._linger = 0.0
            self._changed.notify()
            thread = self._thread
        if thread is not None:
            thread.join()

    def before_fork(self) -> None:
        """Nothing: the jobs go on in the parent."""

    def after_fork(self, *, child: bool) -> None:  # the same on both sides
        """Forget thread and jobs in the child."""
        if child:
            self._reset()

    def _started(self) -> threading.Thread:
        thread = threading.Thread(target=self._run, name=self._name)
        thread.start()
        return thread

    def _run(self) -> None:
        while group := self._next_group():
            outcomes = self._outcomes([job for job, _ in group])
            by_loop = defaultdict(list)
            for (_, waiter), outcome in zip(group, outcomes, strict=True):
                by_loop[waiter.get_loop()].append((waiter, outcome))
            for loop, pairs in by_loop.items():
                call_on(loop, _hand_out, pairs)

    def _next_group(self) -> list[tuple[Any, asyncio.Future[Any]]]:
        with self._changed:
            if not self._waiting:
                self._changed.wait(self._linger)
            group, self._waiting = self._waiting, []
            if not group:
                self._thread = None
            return group

    def _outcomes(self, jobs: Sequence[Any]) -> Sequence[Any]:
        try:
            return self._work(jobs)
        except Exception as error:  # noqa: BLE001  # raised where each job was asked for
            return [error] * len(jobs)


def _hand_out(pairs: Sequence[tuple[asyncio.Future[Any], Any]]) -> None:
    for waiter, outcome in pairs:
        if waiter.done():
            continue
        if isinstance(outcome, Exception):
            waiter.set_exception(outcome)
        else:
            waiter.set_result(outcome)
