"""Many prompts online: a bounded number of workers, results as they finish."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import logging
from typing import TYPE_CHECKING, Any, TypeVar

from openai_eval_client.errors import PartialFailureError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Sequence

    from openai_eval_client.models import ModelResponse

    Progress = Callable[[float], Any]

logger = logging.getLogger("openai_eval_client")

T = TypeVar("T")
R = TypeVar("R")
E = TypeVar("E", bound=BaseException)


class Crew:
    """The workers of one run, some of them with a request in flight."""

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[None]] = []
        self._sending: set[asyncio.Task[Any] | None] = set()
        self._stopped = False

    @contextlib.contextmanager
    def sending(self) -> Iterator[None]:
        """Say that the running worker has a request in flight; once answered, until its outcome is out."""
        task = asyncio.current_task()
        if self._stopped:
            raise asyncio.CancelledError
        self._sending.add(task)
        try:
            yield
        except BaseException:
            self._sending.discard(task)
            self._end_if_stopped(task)
            raise

    def _end_if_stopped(self, task: asyncio.Task[Any] | None) -> None:
        if self._stopped and task is not None:
            task.cancel()  # no further attempt

    def stop(self) -> None:
        """Take no more items, and let only what is in flight, and perhaps paid for, finish."""
        self._stopped = True
        for task in self._tasks:
            if task not in self._sending:
                task.cancel()

    async def run(
        self, items: Iterable[T], work: Callable[[T], Awaitable[R]], *, width: int
    ) -> AsyncGenerator[tuple[int, R | Exception], None]:
        """Do the work on each item, `width` at a time, and yield each outcome as it comes.

        No more items are taken than there are workers, and no more outcomes kept than that: a slow consumer
        slows the work down. When the consumer ends, so do the workers, before this generator does.

        Args:
            items: What to work on, taken one by one.
            work: Called with each item; an exception it raises becomes the item's outcome.
            width: Workers.

        Yields:
            The item's position and its outcome.
        """
        outcomes: asyncio.Queue[tuple[int, R | Exception] | asyncio.Task[None]] = asyncio.Queue()
        room = asyncio.Semaphore(width)
        numbered = enumerate(items)
        self._tasks = [
            asyncio.create_task(self._worker(numbered, work, room, outcomes)) for _ in range(width)
        ]
        for task in self._tasks:
            task.add_done_callback(outcomes.put_nowait)
        try:
            busy = width
            while busy:
                outcome = await outcomes.get()
                if isinstance(outcome, asyncio.Task):
                    self._ended(outcome)
                    busy -= 1
                else:
                    yield outcome
                    room.release()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Raise what the items' own iterator raised; a worker that was stopped just ends."""
        if not (self._stopped and task.cancelled()):
            task.result()

    async def _worker(
        self,
        numbered: Iterator[tuple[int, T]],
        work: Callable[[T], Awaitable[R]],
        room: asyncio.Semaphore,
        outcomes: asyncio.Queue[Any],
    ) -> None:
        """Take items until there are none; each takes up room until its outcome was consumed."""
        while not self._stopped:
            await room.acquire()
            index, item = next(numbered, (-1, None))
            if index < 0:
                room.release()
                return
            try:
                outcome: R | Exception = await work(item)  # type: ignore[arg-type]  # an item, see above
            except Exception as error:  # noqa: BLE001  # handed to the consumer as the item's outcome
                outcome = error
            outcomes.put_nowait((index, outcome))
            self._sending.discard(asyncio.current_task())


async def collect(
    prompts: Sequence[T],
    work: Callable[..., Awaitable[ModelResponse]],
    *,
    width: int,
    is_doom: Callable[[Exception], bool],
    was_never_sent: Callable[[Exception], bool],
    progress: Progress | None,
    return_exceptions: bool,
) -> list[Any]:
    """Answer all prompts and return the responses in input order.

    Args:
        prompts: The prompts.
        work: Answers one; called with it and the keyword `sending`.
        width: How many are worked on at a time.
        is_doom: Whether an error would meet every other prompt too.
        was_never_sent: Whether an error says that no connection came about, which dooms a run as long as
            nothing was answered.
        progress: Called with the finished fraction after each.
        return_exceptions: Put a failed prompt's exception in its place, instead of raising at the end.

    Returns:
        One entry per prompt.

    Raises:
        PartialFailureError: Some failed, and `return_exceptions` is False.
        openai.APIError: An error that dooms all prompts alike; `.responses` holds what was answered before.
        asyncio.CancelledError: The run was cancelled; it too has `.responses`.
    """
    results: list[Any] = [None] * len(prompts)
    failures: dict[int, Exception] = {}
    doom: Exception | None = None
    crew = Crew()
    if not prompts:
        await report(progress, 1.0)
    one = functools.partial(work, sending=crew.sending)
    stream = crew.run(prompts, one, width=min(width, len(prompts)))
    done = 0
    try:
        async with contextlib.aclosing(stream):
            async for index, outcome in stream:
                if isinstance(outcome, Exception):
                    failures[index] = outcome
                    hopeless = is_doom(outcome) or (was_never_sent(outcome) and len(failures) > done)
                    if doom is None and hopeless:
                        doom = outcome
                        crew.stop()
                else:
                    results[index] = outcome
                done += 1
                if doom is None:
                    await report(progress, done / len(prompts))
    except asyncio.CancelledError as cancelled:
        attach(cancelled, results)
        raise
    if doom is not None:
        raise attach(doom, results)
    if failures and not return_exceptions:
        raise PartialFailureError(results, failures)
    return [failures.get(index, result) for index, result in enumerate(results)]


def attach(error: E, responses: Sequence[ModelResponse | None]) -> E:
    """Give an error the answers there were before it, as `.responses`."""
    error.__dict__["responses"] = list(responses)
    return error


async def report(progress: Progress | None, fraction: float) -> None:
    """Call or await the caller's callback; what it raises is logged."""
    if progress is None:
        return
    try:
        result = progress(fraction)
        if inspect.isawaitable(result):
            await result
    except Exception:
        logger.exception("progress_callback raised at %.3f; the run goes on", fraction)
