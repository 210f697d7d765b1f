"""The items of one run, a bounded number of them at work, outcomes as they come."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator

T = TypeVar("T")

_IN_A_TURN = 8  # items taken in one turn of the event loop, of those that wait until another is done


class Crew:
    """The items of one run that are at work, some of them with a request in flight.

    A worker whose item is done goes on with the next one in the same turn of the event loop: what the one
    needed is free before the other needs as much. Where a turn ends many requests, and a later one begins as
    many, the garbage collector meets them all time and again.

    Args:
        work: Called with an item's position, the item, and `sending`, to be entered for as long as a request
            is in flight. An exception it raises becomes the item's outcome.
        in_flight: Requests that may be in flight at once, so many items are at work; one more for each that
            waits for another attempt.
        width: Items taken and not yet consumed, at most.
        is_doom: Whether an error would meet every other item, too; called with it, and with whether any item
            was answered so far.
    """

    def __init__(
        self,
        work: Callable[..., Awaitable[Any]],
        *,
        in_flight: int,
        width: int,
        is_doom: Callable[[Exception, bool], bool],
    ) -> None:
        self.error: BaseException | None = None
        self._work = work
        self._is_doom = is_doom
        self._slots = in_flight
        self._workers = 0
        self._ready: deque[tuple[int, Any]] = deque()
        self._room = asyncio.Semaphore(width)
        self._outcomes: asyncio.Queue[tuple[int, Any] | None] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._sending: set[asyncio.Task[Any] | None] = set()
        self._waiting: set[asyncio.Task[Any] | None] = set()
        self._answered = False
        self._stopped = False

    async def run(self, items: Iterable[Any] | AsyncIterable[Any]) -> AsyncGenerator[tuple[int, Any], None]:
        """Work on the items, and yield each outcome as it comes.

        No more items are taken than there is room for, and an item takes up room until the consumer comes
        back for the next outcome: a slow consumer slows the work down. When the consumer ends, so does all
        work, before this generator does.

        Args:
            items: What to work on, taken one by one. The iterable's own exception ends the run like its end
                does, and is raised once all that was taken has been yielded.

        Yields:
            The item's position and its outcome, a result or an exception.
        """
        self._start(self._take(items))
        try:
            while (outcome := await self._outcomes.get()) is not None:
                yield outcome
                self._room.release()
        finally:
            self._stopped = True
            self._ready.clear()
            left = [task for task in self._tasks if task.cancel()]
            await asyncio.gather(*left, return_exceptions=True)
        if self.error is not None:
            raise self.error

    def unclaimed(self) -> Iterator[tuple[int, Any]]:
        """Yield the outcomes that the consumer left behind."""
        while not self._outcomes.empty():
            outcome = self._outcomes.get_nowait()
            if outcome is not None:
                yield outcome

    @property
    def in_flight(self) -> int:
        """Requests sent and not answered yet."""
        return len(self._sending)

    def stop(self) -> None:
        """Send nothing more: what is in flight is waited for and yielded, what waits is dropped."""
        if not self._stopped:
            self._stop(None)

    def sending(self) -> Crew:
        """Return what says that the running item has a request in flight: until its outcome is out."""
        return self

    def __enter__(self) -> None:
        if self._stopped:
            raise asyncio.CancelledError
        task = asyncio.current_task()
        self._sending.add(task)
        self._waiting.discard(task)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None:
            return
        task = asyncio.current_task()
        self._sending.discard(task)
        self._waiting.add(task)
        self._staff()
        if self._stopped and task is not None:
            task.cancel()  # no further attempt

    def _stop(self, error: BaseException | None) -> None:
        """Let only what is in flight, and perhaps paid for, finish; then the error is raised."""
        if not self._stopped:
            self._stopped, self.error = True, error  # rather than its source's own
            self._ready.clear()
        for task in self._tasks - self._sending - {asyncio.current_task()}:
            task.cancel()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Forget a task; after the last one nothing more comes."""
        self._tasks.discard(task)
        self._forget(task)
        if not task.cancelled():
            self.error = task.exception() if self.error is None else self.error
        elif not self._stopped:  # by somebody else: no item is dropped in silence
            self._stop(asyncio.CancelledError())
        if not self._tasks:
            self._outcomes.put_nowait(None)

    async def _take(self, items: Iterable[Any] | AsyncIterable[Any]) -> None:
        async with contextlib.aclosing(each(items)) as source:
            for index in itertools.count():
                await self._room.acquire()
                try:
                    item = await anext(source)
                except StopAsyncIteration:
                    return
                self._ready.append((index, item))
                started = self._staff()
                if (started or index % _IN_A_TURN == 0) and not self._room.locked():
                    await asyncio.sleep(0)  # items may be slow to make, and others can go

    def _staff(self) -> bool:
        """Start a worker for what is ready, if there are not enough; return whether one was."""
        if not self._ready or self._surplus >= 0:
            return False
        self._workers += 1
        self._start(self._do_what_is_ready())
        return True

    @property
    def _surplus(self) -> int:
        """Workers beyond those that the slots are for; who waits for another attempt has none."""
        return self._workers - len(self._waiting) - self._slots

    async def _do_what_is_ready(self) -> None:
        """Work on one item after the other; the last worker leaves none behind."""
        while self._ready and self._surplus <= 0:
            index, item = self._ready.popleft()
            try:
                self._outcomes.put_nowait((index, await self._work(index, item, sending=self.sending)))
                self._answered = True
            except Exception as error:  # noqa: BLE001  # handed to the consumer as the item's outcome
                self._outcomes.put_nowait((index, error))
                if self._is_doom(error, self._answered):
                    self._stop(error)
            self._forget(asyncio.current_task())
        self._workers -= 1

    def _forget(self, task: asyncio.Task[Any] | None) -> None:
        self._sending.discard(task)
        self._waiting.discard(task)


async def each(items: Iterable[T] | AsyncIterable[T]) -> AsyncGenerator[T, None]:
    """Yield from an iterable of either kind; an async generator is closed in the end, as nobody else may."""
    if not isinstance(items, AsyncIterable):
        for item in items:
            yield item
        return
    source = aiter(items)
    try:
        async for item in source:
            yield item
    finally:
        if isinstance(source, AsyncGenerator):
            await source.aclose()
