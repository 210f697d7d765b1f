"""Many prompts online: a bounded number of workers, results as they finish."""

from __future__ import annotations

import asyncio
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


async def run(
    items: Iterable[T], work: Callable[[T], Awaitable[R]], *, width: int
) -> AsyncGenerator[tuple[int, R | Exception], None]:
    """Do the work on each item, `width` at a time, and yield each outcome as it comes.

    No more items are taken than there are workers, and no more outcomes kept than that: a slow consumer
    slows the work down. When the consumer stops, so do the workers, before this generator ends.

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
    crew = [asyncio.create_task(_worker(numbered, work, room, outcomes)) for _ in range(width)]
    for task in crew:
        task.add_done_callback(outcomes.put_nowait)
    try:
        busy = width
        while busy:
            outcome = await outcomes.get()
            if isinstance(outcome, asyncio.Task):
                outcome.result()  # raises what the items' own iterator raised
                busy -= 1
            else:
                yield outcome
                room.release()
    finally:
        for task in crew:
            task.cancel()
        await asyncio.gather(*crew, return_exceptions=True)


async def _worker(
    numbered: Iterator[tuple[int, T]],
    work: Callable[[T], Awaitable[R]],
    room: asyncio.Semaphore,
    outcomes: asyncio.Queue[Any],
) -> None:
    """Take items until there are none; each takes up room until its outcome was consumed."""
    while True:
        await room.acquire()
        index, item = next(numbered, (-1, None))
        if index < 0:
            room.release()
            return
        try:
            outcome: R | Exception = await work(item)  # type: ignore[arg-type]  # an item, by the lines above
        except Exception as error:  # noqa: BLE001  # handed to the consumer as the item's outcome
            outcome = error
        outcomes.put_nowait((index, outcome))


async def collect(
    prompts: Sequence[T],
    work: Callable[[T], Awaitable[ModelResponse]],
    *,
    width: int,
    is_doom: Callable[[Exception], bool],
    progress: Progress | None,
    return_exceptions: bool,
) -> list[Any]:
    """Answer all prompts and return the responses in input order.

    Args:
        prompts: The prompts.
        work: Answers one.
        width: How many are worked on at a time.
        is_doom: Whether an error would meet every other prompt too.
        progress: Called with the finished fraction after each.
        return_exceptions: Put a failed prompt's exception in its place, instead of raising at the end.

    Returns:
        One entry per prompt.

    Raises:
        PartialFailureError: Some failed, and `return_exceptions` is False.
        openai.APIError: An error that dooms all prompts alike; `.responses` holds what was answered before.
    """
    results: list[Any] = [None] * len(prompts)
    failures: dict[int, Exception] = {}
    done = 0
    if not prompts:
        await _report(progress, 1.0)
    stream = run(prompts, work, width=min(width, len(prompts)))
    try:
        async for index, outcome in stream:
            if isinstance(outcome, Exception):
                if is_doom(outcome):
                    raise _with_responses(outcome, results)
                failures[index] = outcome
            else:
                results[index] = outcome
            done += 1
            await _report(progress, done / len(prompts))
    finally:
        await stream.aclose()
    if failures and not return_exceptions:
        raise PartialFailureError(results, failures)
    return [failures.get(index, result) for index, result in enumerate(results)]


def _with_responses(error: Exception, responses: Sequence[ModelResponse | None]) -> Exception:
    error.__dict__["responses"] = list(responses)
    return error


async def _report(progress: Progress | None, fraction: float) -> None:
    if progress is None:
        return
    try:
        result = progress(fraction)
        if inspect.isawaitable(result):
            await result
    except Exception:
        logger.exception("progress_callback raised at %.3f; the run goes on", fraction)
