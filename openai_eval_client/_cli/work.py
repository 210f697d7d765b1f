"""The work of `run`: rows answered one by one or by batch, and what a signal does to it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path  # typer reads the annotations
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import openai

from openai_eval_client._cli.options import INTERRUPTED, say
from openai_eval_client._cli.rows import carried, fingerprint, line_of, read_in_thread
from openai_eval_client._report import bar_is_open
from openai_eval_client._wire import code_of, read_failure, status_of
from openai_eval_client.client import OpenAIClient
from openai_eval_client.errors import ValidationError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator
    from types import TracebackType

    from typing_extensions import Self

    from openai_eval_client._cli.rows import Output, Row, Source
    from openai_eval_client.config import BatchConfig, OpenAIConfig, RateLimitConfig
    from openai_eval_client.models import ClientStats, CostEstimate, ModelResponse


T = TypeVar("T")

GRACE = 5.0  # seconds that what is in flight has to finish
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_NOT_OURS = (signal.SIG_IGN, None)  # as a shell has it for what runs in the background; not from Python


class Interrupts:
    """Takes the signals while it is entered, inside a running event loop."""

    def __init__(self, *, at_once: bool = False, farewell: str = "") -> None:
        self.event = asyncio.Event()
        self._at_once = at_once
        self._farewell = farewell
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._timer: asyncio.TimerHandle | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._seen = False

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            heeded = [number for number in _SIGNALS if signal.getsignal(number) not in _NOT_OURS]
            self._before = {number: signal.signal(number, self._on_signal) for number in heeded}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._give_back()

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: object) -> None:  # noqa: ARG002  # what the system hands over
        if self._seen:
            self._end()
        self._seen = True
        self._loop.call_soon_threadsafe(self._stop)

    def _end(self) -> NoReturn:
        if self._at_once:
            self._give_back()
            raise KeyboardInterrupt
        below = "\n\n" if bar_is_open() else ""
        with contextlib.suppress(OSError):  # as low as can be: a line may be half written
            os.write(sys.stderr.fileno(), f"{below}{self._farewell}\n".encode())
        os._exit(INTERRUPTED)

    def _stop(self) -> None:
        end: Callable[[], object] = self._task.cancel if self._task is not None else self._loop.stop
        self.event.set()
        if self._at_once:
            end()
            return
        self._timer = self._loop.call_later(GRACE, end)
        say(f"interrupted: what is in flight may finish, for {GRACE:g} s; again: end at once")


def complete(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end; a signal cancels it at once, whatever task of it is at work."""
    # Before Python 3.11, `asyncio.run` leaves it to chance which one meets the `KeyboardInterrupt`.

    async def working() -> T:
        with Interrupts(at_once=True) as signals:
            try:
                return await work
            except asyncio.CancelledError:
                if not signals.event.is_set():
                    raise
                raise KeyboardInterrupt from None

    return asyncio.run(working())


def with_client(config: OpenAIConfig, work: Callable[[OpenAIClient], Awaitable[T]], **options: Any) -> T:
    """Do something with a client, which is closed afterwards; a signal ends it, as in `complete`."""

    async def working() -> T:
        async with OpenAIClient(config, **options) as client:
            return await work(client)

    return complete(working())


def command(*, add: str, without: str) -> str:
    """Return this program's command line with one option more, and without another."""
    program = Path(sys.argv[0]).name
    start = "python -m openai_eval_client" if program == "__main__.py" else program
    kept = [argument for argument in sys.argv[1:] if argument not in {without, add}]
    return f"{start} {shlex.join([*kept, add])}"


# Keys of a row that look as if they were to be sent, though a run sends the same for all rows.
_LIKE_PARAMETERS = frozenset(
    {
        "max_completion_tokens",
        "max_tokens",
        "model",
        "response_format",
        "seed",
        "system",
        "temperature",
        "top_p",
    },
)


@dataclass(slots=True)
class Order:
    """What is to be done."""

    config: OpenAIConfig  # where the API is
    limits: RateLimitConfig  # the rate limits
    source: Source  # the rows
    # the fingerprint of each row that has its output already, by index
    done: dict[int, bytes] = field(default_factory=dict)
    total: int | None = None  # how many rows are to be answered; None: nobody knows
    params: dict[str, Any] = field(default_factory=dict)  # what is asked of the client with every row
    cache: Path | None = None  # where answers are kept; None: nowhere
    batch: BatchConfig | None = None  # how the Batch API is used, if it is
    progress: bool = False  # whether to show how far it is
    farewell: str = ""  # how to go on, where it is ended at once

    def rows(self) -> Iterator[Row]:
        """Yield the rows that are to be answered."""
        for row in self.source.rows():
            known = self.done.get(row.index)
            if known is None:
                yield row
            elif known != fingerprint(carried(row.data)):
                self.source.reject_input(
                    row.line,
                    f"not what the output has at index {row.index}: the input changed",
                )

    def client(self) -> OpenAIClient:
        """Return a client for it."""
        return OpenAIClient(self.config, rate_limit=self.limits, batch=self.batch, cache=self.cache)


@dataclass(slots=True)
class Survey:
    """What a look at all rows says."""

    rows: int = 0  # how many are to be answered
    unsent: set[str] = field(default_factory=set)  # keys that look like parameters, and are not sent


def survey(order: Order) -> Survey:
    """Look at all rows before the first is sent."""
    found = Survey()
    for row in order.rows():
        found.rows += 1
        found.unsent |= _LIKE_PARAMETERS & row.data.keys()
    return found


@dataclass(slots=True)
class Result:
    """What came of it."""

    answered: int = 0  # rows with a response
    failed: int = 0  # rows with an error
    # how many of those had which class of error, HTTP status and code
    kinds: Counter[tuple[str, int | None, str]] = field(default_factory=Counter)
    cached: int = 0  # answers from the cache
    seconds: float = 0.0  # wall time
    stats: ClientStats | None = None  # the client's counts
    error: Exception | None = None  # what ended it before the end
    interrupted: bool = False  # whether a signal did
    jobs: str | None = None  # batches that go on, where there are any

    def count(self, outcome: ModelResponse | Exception) -> None:
        """Count the outcome of a row."""
        if isinstance(outcome, Exception):
            self.failed += 1
            self.kinds[type(outcome).__name__, status_of(outcome), code_of(outcome)] += 1
        else:
            self.answered += 1
            self.cached += outcome.cached


async def answer_rows(order: Order, output: Output) -> Result:
    """Answer the rows as they come, and write each outcome as it comes."""
    # What the rows that are not written would all have met is the result's `error`.
    result, began = Result(), time.monotonic()
    async with order.client() as client:
        with Interrupts(farewell=order.farewell) as signals:
            try:
                await _stream(order, client, output, result, signals.event)
            except asyncio.CancelledError:
                if not signals.event.is_set():
                    raise
            except (openai.OpenAIError, OSError) as error:
                result.error = error
            result.interrupted = signals.event.is_set()
        result.stats = client.stats
    result.seconds = time.monotonic() - began
    return result


async def _stream(
    order: Order,
    client: OpenAIClient,
    output: Output,
    result: Result,
    stop: asyncio.Event,
) -> None:
    taken: dict[int, Row] = {}
    stream = client.as_completed(
        _prompts(order, taken),
        progress=order.progress,
        stop_event=stop,
        **order.params,
    )
    async with contextlib.aclosing(stream) as outcomes:
        async for position, outcome in outcomes:
            row = taken.pop(position)
            if isinstance(outcome, Exception) and _dooms(outcome, order, result):
                continue  # raised in the end: it is not this row's fault
            line = line_of(row, outcome)
            if output.is_regular:
                output.write(line)
            else:
                await asyncio.to_thread(output.write, line)  # a pipe may be full
            result.count(outcome)  # what is not written is not done


def _dooms(error: Exception, order: Order, result: Result) -> bool:
    return read_failure(error).ends_run(order.limits.max_wait, answered=bool(result.answered))


async def answer_by_batch(order: Order, output: Output) -> Result:
    """Answer the rows by the Batch API, and write the outcomes in the end, in order."""
    result, began = Result(), time.monotonic()
    rows = [row async for row in _each(order)]
    async with order.client() as client:
        with Interrupts(at_once=True) as signals:
            outcomes: list[Any] = []
            try:
                outcomes = await client.batch_generate(
                    [row.prompt for row in rows],
                    use_batch_api=True,
                    return_exceptions=True,
                    progress=order.progress,
                    **order.params,
                )
            except (openai.OpenAIError, asyncio.CancelledError) as error:
                result.interrupted = signals.event.is_set()
                if not result.interrupted and not isinstance(error, Exception):
                    raise
                result.error = error if isinstance(error, Exception) else None
                outcomes = getattr(error, "responses", [])
                result.jobs = getattr(error, "job_id", None)
        result.stats = client.stats
    for row, outcome in zip(rows, outcomes, strict=False):
        if outcome is not None:
            output.write(line_of(row, outcome))
            result.count(outcome)
    result.seconds = time.monotonic() - began
    return result


async def estimate_rows(order: Order) -> CostEstimate:
    """Estimate what the rows would need; nothing is sent."""
    params = {name: value for name, value in order.params.items() if name != "max_cost"}
    async with order.client() as client:
        return await client.estimate((row.prompt async for row in _each(order)), **params)


class _Sized:
    """An iterable of which the length is known beforehand."""

    def __init__(self, items: Iterable[Any], length: int) -> None:
        self._items, self._length = items, length

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)


def _prompts(order: Order, taken: dict[int, Row]) -> Any:
    """Return the prompts; each row is in `taken` from then on, by its position."""
    if order.source.is_stream:
        return _prompts_aside(order, taken)

    def prompts() -> Iterator[Any]:
        for position, row in enumerate(order.rows()):
            taken[position] = row
            yield row.prompt

    return prompts() if order.total is None else _Sized(prompts(), order.total)


async def _prompts_aside(order: Order, taken: dict[int, Row]) -> AsyncIterator[Any]:
    position = 0
    async with contextlib.aclosing(_each(order)) as rows:  # type: ignore[type-var]
        async for row in rows:
            taken[position] = row
            position += 1
            yield row.prompt


async def _each(order: Order) -> AsyncIterator[Row]:
    if order.source.is_stream:
        async for row in read_in_thread(order.rows()):
            yield row
    else:
        for row in order.rows():
            yield row


def check_some(order: Order, result: Result) -> None:
    """Refuse an input without a row."""
    if not (result.answered or result.failed or order.done or result.error or result.interrupted):
        raise ValidationError(f"{order.source.name}: no rows", field="input")
