"""Many prompts online: a pool of workers, outcomes as they come or in the order of the input."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable
from typing import TYPE_CHECKING, Any, TypeVar

from openai_eval_client._limits import ConcurrencyLimit
from openai_eval_client._report import report
from openai_eval_client._validation import check_count
from openai_eval_client._wire import check_prompt, read_failure
from openai_eval_client.errors import PartialFailureError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence

    from openai_eval_client._cost import CostBudget
    from openai_eval_client._report import Display, Progress
    from openai_eval_client._wire import Parameters
    from openai_eval_client.config import RateLimitConfig
    from openai_eval_client.models import ModelResponse


T = TypeVar("T")

_LONG = 0.002  # seconds; whoever takes items for longer lets others go in between


class WorkerPool:
    """The items of one run that are at work, some of them with a request in flight.

    A worker whose item is answered goes on with the next one in the same turn of the event loop: what the one
    needed is free before the other needs as much. Where one turn ends many requests, and a later one begins
    as many, the garbage collector runs twice as often.
    """

    def __init__(
        self,
        work: Callable[..., Awaitable[Any]],
        *,
        slots: int,
        width: int,
        is_fatal: Callable[[Exception, bool], bool],
    ) -> None:
        self.error: BaseException | None = None
        self._work = work
        self._is_fatal = is_fatal
        self._slots = slots
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
        """Work on the items, and yield each outcome as it comes."""
        # No more items are taken than there is room for, and an item takes up room until the consumer comes
        # back for the next outcome: a slow consumer slows the work down. When the consumer ends, so does all
        # work, before this generator does.
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

    def sending(self) -> WorkerPool:
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
        if isinstance(error, Exception):
            self._waiting.add(task)
            asyncio.get_running_loop().call_soon(self._start_worker)  # unless this one goes on itself
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
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error is not None and not self._stopped:  # by somebody else: no item is dropped in silence
            self._stop(error)
        if not self._tasks:
            self._outcomes.put_nowait(None)

    async def _take(self, items: Iterable[Any] | AsyncIterable[Any]) -> None:
        try:
            async with contextlib.aclosing(iterate(items)) as source:
                await self._take_from(source)
        except Exception as error:  # noqa: BLE001  # raised once all that was taken is done
            self.error = error if self.error is None else self.error

    async def _take_from(self, source: AsyncIterator[Any]) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        for index in itertools.count():
            await self._room.acquire()
            try:
                item = await anext(source)
            except StopAsyncIteration:
                return
            self._ready.append((index, item))
            if self._start_worker() or loop.time() - began > _LONG:
                if not self._room.locked():  # else there is a wait anyway
                    await asyncio.sleep(0)  # items may be slow to make, and others can go
                began = loop.time()

    def _start_worker(self) -> bool:
        """Start a worker for what is ready, if there may be a slot for it; return whether one was."""
        if not self._ready or (self._surplus >= 0 and len(self._sending) >= self._slots):
            return False
        self._workers += 1
        self._start(self._do_what_is_ready())
        return True

    @property
    def _surplus(self) -> int:
        """Workers beyond those that the slots are for; who waits for another attempt has none."""
        return self._workers - len(self._waiting) - self._slots

    async def _do_what_is_ready(self) -> None:
        """Work on one item after the other, unless somebody else may wait for the slot."""
        while self._ready:
            await self._one(*self._ready.popleft())
            if self._surplus > 0 and len(self._sending) >= self._slots - 1:
                break
        self._workers -= 1

    async def _one(self, index: int, item: object) -> None:
        try:
            outcome = await self._work(index, item, sending=self.sending)
        except Exception as error:  # noqa: BLE001  # handed to the consumer as the item's outcome
            self._outcomes.put_nowait((index, error))
            if self._is_fatal(error, self._answered):
                self._stop(error)
        else:
            self._answered = True
            self._outcomes.put_nowait((index, outcome))
        self._forget(asyncio.current_task())

    def _forget(self, task: asyncio.Task[Any] | None) -> None:
        self._sending.discard(task)
        self._waiting.discard(task)


async def iterate(items: Iterable[T] | AsyncIterable[T]) -> AsyncGenerator[T, None]:
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


E = TypeVar("E", bound=BaseException)

_READ_AHEAD = 32  # prompts beyond those in flight: ready when one is done; more would only take memory


def pool_for(
    call: Callable[..., Awaitable[ModelResponse]],
    parameters: Parameters,
    limits: RateLimitConfig,
    max_concurrent: int | None,
    budget: CostBudget | None,
) -> WorkerPool:
    """Return the pool that answers prompts."""
    if max_concurrent is not None:
        check_count(max_concurrent, "max_concurrent")
    concurrency = ConcurrencyLimit(max_concurrent) if max_concurrent else None

    def answer(index: int, prompt: Any, *, sending: Any) -> Awaitable[ModelResponse]:
        check_prompt(prompt, index)
        return call(prompt, parameters, concurrency=concurrency, budget=budget, sending=sending())

    def fatal(error: Exception, answered: bool) -> bool:
        return read_failure(error).ends_run(limits.max_wait, answered=answered)

    in_flight = max_concurrent or limits.max_concurrent
    width = in_flight + min(in_flight, _READ_AHEAD)
    return WorkerPool(answer, slots=in_flight, width=width, is_fatal=fatal)


async def collect(
    pool: WorkerPool,
    prompts: Sequence[Any],
    *,
    progress: Progress | None,
    return_exceptions: bool,
    display: Display | None = None,
) -> list[Any]:
    """Answer all prompts and return the responses in input order."""
    outcomes: list[Any] = [None] * len(prompts)
    if not prompts:
        await report(progress, 1.0)
    try:
        async with contextlib.aclosing(pool.run(prompts)) as stream:
            done = 0
            async for index, outcome in stream:
                outcomes[index] = outcome
                done += 1
                if display is not None:
                    display.count(outcome)
                if pool.error is None:
                    await report(progress, done / len(prompts))
    except (Exception, asyncio.CancelledError) as error:
        for index, outcome in pool.unclaimed():
            outcomes[index] = outcome
        attach(error, answered(outcomes))
        raise
    return handed_out(outcomes, return_exceptions=return_exceptions)


def handed_out(outcomes: list[Any], *, return_exceptions: bool) -> list[Any]:
    """Return the outcomes of all requests, in input order."""
    failures = {index: error for index, error in enumerate(outcomes) if isinstance(error, Exception)}
    if failures and not return_exceptions:
        raise PartialFailureError(answered(outcomes), failures)
    return outcomes


def answered(outcomes: Sequence[ModelResponse | Exception | None]) -> list[ModelResponse | None]:
    """Return the responses among outcomes, None in the place of all others."""
    return [None if isinstance(outcome, Exception) else outcome for outcome in outcomes]


def attach(error: E, responses: Sequence[ModelResponse | None]) -> E:
    """Give an error the answers there were before it, as `.responses`."""
    error.__dict__["responses"] = list(responses)
    return error
