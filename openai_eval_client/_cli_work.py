"""The work behind `run`: rows through the client, outcomes to the output, a count of both."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import openai

from openai_eval_client._cli_input import aside
from openai_eval_client._cli_output import carried, fingerprint, line_of
from openai_eval_client._cli_stop import Interrupts
from openai_eval_client._failures import code_of, status_of
from openai_eval_client._retry import is_doom
from openai_eval_client.client import OpenAIClient
from openai_eval_client.errors import ValidationError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator
    from pathlib import Path

    from openai_eval_client._cli_input import Row, Source
    from openai_eval_client._cli_output import Output
    from openai_eval_client.config import BatchConfig, OpenAIConfig, RateLimitConfig
    from openai_eval_client.costs import CostEstimate
    from openai_eval_client.models import ClientStats, ModelResponse

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
    }
)


@dataclass(slots=True)
class Order:
    """What is to be done.

    Attributes:
        config: Where the API is.
        limits: The rate limits.
        source: The rows.
        done: The fingerprint of each row that has its output already, by index.
        total: How many rows are to be answered; None: nobody knows.
        params: What is asked of the client with every row.
        cache: Where answers are kept; None: nowhere.
        batch: How the Batch API is used, if it is.
        progress: Whether to show how far it is.
        farewell: How to go on, where it is ended at once.
    """

    config: OpenAIConfig
    limits: RateLimitConfig
    source: Source
    done: dict[int, bytes] = field(default_factory=dict)
    total: int | None = None
    params: dict[str, Any] = field(default_factory=dict)
    cache: Path | None = None
    batch: BatchConfig | None = None
    progress: bool = False
    farewell: str = ""

    def rows(self) -> Iterator[Row]:
        """Yield the rows that are to be answered.

        Raises:
            ValidationError: A row is wrong, or another one than it was when it was answered.
        """
        for row in self.source.rows():
            known = self.done.get(row.index)
            if known is None:
                yield row
            elif known != fingerprint(carried(row.data)):
                self.source.refuse(
                    row.line, f"not what the output has at index {row.index}: the input changed"
                )

    def client(self) -> OpenAIClient:
        """Return a client for it."""
        return OpenAIClient(self.config, rate_limit=self.limits, batch=self.batch, cache=self.cache)


@dataclass(slots=True)
class Survey:
    """What a look at all rows says.

    Attributes:
        rows: How many are to be answered.
        unsent: Keys that look like parameters, and are not sent.
    """

    rows: int = 0
    unsent: set[str] = field(default_factory=set)


def survey(order: Order) -> Survey:
    """Look at all rows before the first is sent.

    Raises:
        ValidationError: A row is wrong.
    """
    found = Survey()
    for row in order.rows():
        found.rows += 1
        found.unsent |= _LIKE_PARAMETERS & row.data.keys()
    return found


@dataclass(slots=True)
class Result:
    """What came of it.

    Attributes:
        answered: Rows with a response.
        failed: Rows with an error.
        kinds: How many of those had which class of error, HTTP status and code.
        cached: Answers from the cache.
        seconds: Wall time.
        stats: The client's counts.
        error: What ended it before the end.
        interrupted: Whether a signal did.
        jobs: Batches that go on, where there are any.
    """

    answered: int = 0
    failed: int = 0
    kinds: Counter[tuple[str, int | None, str]] = field(default_factory=Counter)
    cached: int = 0
    seconds: float = 0.0
    stats: ClientStats | None = None
    error: Exception | None = None
    interrupted: bool = False
    jobs: str | None = None

    def count(self, outcome: ModelResponse | Exception) -> None:
        """Count the outcome of a row."""
        if isinstance(outcome, Exception):
            self.failed += 1
            self.kinds[type(outcome).__name__, status_of(outcome), code_of(outcome)] += 1
        else:
            self.answered += 1
            self.cached += outcome.cached


async def answer(order: Order, output: Output) -> Result:
    """Answer the rows as they come, and write each outcome as it comes.

    What the rows that are not written would all have met is the result's `error`.
    """
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
    order: Order, client: OpenAIClient, output: Output, result: Result, stop: asyncio.Event
) -> None:
    taken: dict[int, Row] = {}
    stream = client.as_completed(
        _prompts(order, taken), progress=order.progress, stop_event=stop, **order.params
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
    return is_doom(error, order.limits.max_wait, answered=bool(result.answered))


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


async def estimate(order: Order) -> CostEstimate:
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
        async for row in aside(order.rows()):
            yield row
    else:
        for row in order.rows():
            yield row


def check_some(order: Order, result: Result) -> None:
    """Refuse an input without a row.

    Raises:
        ValidationError: It has none.
    """
    if not (result.answered or result.failed or order.done or result.error or result.interrupted):
        raise ValidationError(f"{order.source.name}: no rows", field="input")
