"""A row of the tables of `tests/world`: what a server sends, and what has to come of it on each road."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import openai
import pytest
from wire_server import GOOD, GOOD_RESPONSE, MODEL, Reply, WireServer, serving

from openai_eval_client import (
    AsyncOpenAI,
    BatchConfig,
    BatchRequest,
    ModelResponse,
    OpenAIClient,
    OpenAIConfig,
    PartialFailureError,
    RateLimitConfig,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

KEY = "sk-world-1234567890"
RETRIES = 2
FOREVER = RETRIES + 1  # calls for what always fails and is tried again
CONFIG = {"requests_per_minute": 60_000, "tokens_per_minute": 600_000_000, "max_concurrent": 20}

# Classes of errors
BAD, KEYS, DENIED, NOT_FOUND = (
    "BadRequestError",
    "AuthenticationError",
    "PermissionDeniedError",
    "NotFoundError",
)
LIMITED, QUOTA, SERVER = "RateLimitError", "QuotaError", "InternalServerError"
NO_ANSWER = "APIResponseValidationError"
OTHER = "APIStatusError"


@dataclass(frozen=True)
class Row:
    """What a server sends to one prompt, and what comes of it; `max_retries` is 2."""

    name: str
    replies: tuple[Reply, ...]  # to each attempt; the last one to all further ones
    error: str | tuple[str, ...] | None = None  # the class of the error, or which are right; None: an answer
    calls: int | None = 1  # HTTP requests; None: as many as may be
    text: str = "yes"  # of the answer
    words: tuple[str, ...] = ()  # that stand in the error's message
    api: str = "chat"
    ends: bool = False  # whether it ends a run in which other prompts are answered
    evidence: bool | None = False  # whether it ends a run in which nothing is answered; None: not looked at
    pause: float | None = 0.0  # seconds that the model is paused after the first reply; None: not looked at
    cut: bool | None = False  # whether its rate is lowered after the first reply; None: not looked at
    usd: str | None = None  # that all calls cost; None: what the replies say
    batch_usd: str | None = None  # what the first reply costs in a batch; None: half
    retried: int | None = None  # calls billed without an answer; None: those that failed and cost
    max_wait: float = 5.0
    or_answer: bool = False  # an answer of that text is right as well
    roads: str = "one run batch drop-in limiter"

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the errors that are right; none where an answer is wanted."""
        return () if self.error is None else (self.error,) if isinstance(self.error, str) else self.error

    def sent(self, calls: int) -> list[Reply]:
        """Return the replies to so many calls."""
        return [self.replies[min(number, len(self.replies) - 1)] for number in range(calls)]


def over(rows: Iterable[Row], road: str, *, first: int = 0, every: int = 1) -> Any:
    """Return the decorator that runs a test for all rows that go a road, or for every second, third, ..."""
    chosen = [row for row in rows if road in row.roads.split()][first::every]
    return pytest.mark.parametrize("row", chosen, ids=[row.name for row in chosen])


def connect(server: WireServer, *, cache: Path | None = None, max_wait: float = 5.0, **options: Any) -> Any:
    """Return a client of the server; `limits` in the options replace the wide ones."""
    limits = RateLimitConfig(**{**CONFIG, **options.pop("limits", {}), "max_wait": max_wait})
    settings = {"api_key": KEY, "base_url": server.url, "default_model": MODEL, "max_retries": RETRIES}
    config = OpenAIConfig(**{**settings, **options})
    batch = BatchConfig(polling_interval=0.005, auto_batch_threshold=1)
    return OpenAIClient(config, rate_limit=limits, batch=batch, cache=cache)


def prompt(row: Row, number: int | None = None) -> str:
    """Return a prompt to which the server answers what the row says."""
    return f"the prompt <{row.name}>" if number is None else f"prompt {number} <{row.name}>"


def script(row: Row, **more: tuple[Reply, ...]) -> dict[str, tuple[Reply, ...]]:
    """Return what the server answers to the prompt of a row; all others get a good answer."""
    return {f"<{row.name}>": row.replies, **more}


def key_of(row: Row) -> str:
    """Return the text by which the server counts the calls of a row."""
    return f"<{row.name}>"


async def outcome_of(client: OpenAIClient, row: Row) -> Any:
    """Return the answer to the prompt of a row, or the error."""
    try:
        return await client.generate_response(prompt(row), api=row.api)
    except Exception as error:  # noqa: BLE001  # what kind it is, is looked at
        return error


def check(row: Row, outcome: Any, *, classes: tuple[str, ...] | None = None) -> None:
    """Check that an outcome is the answer or the error that the row names."""
    classes = row.classes if classes is None else classes
    if isinstance(outcome, ModelResponse):
        assert row.error is None or row.or_answer, f"an answer: {outcome!r}"
        assert outcome.content == row.text
        return
    assert classes, f"no answer: {outcome!r}"
    assert isinstance(outcome, openai.OpenAIError), repr(outcome)
    names = {cls.__name__ for cls in type(outcome).__mro__}
    exact = type(outcome).__name__
    assert exact in classes or (QUOTA not in names and names & set(classes)), repr(outcome)
    for word in row.words:
        assert word in str(outcome)
    assert KEY not in f"{outcome!r} {outcome} {getattr(outcome, 'body', None)}"


def check_cost(row: Row, ledger: Any, replies: list[Reply], outcome: Any) -> None:
    """Check that the bill is exactly what the replies cost, and what of it brought no answer."""
    total = sum((Decimal(reply.usd) for reply in replies), Decimal(0))
    assert ledger.total == (total if row.usd is None else Decimal(row.usd))
    failed = replies[:-1] if isinstance(outcome, ModelResponse) else replies
    paid = sum(Decimal(reply.usd) > 0 for reply in failed)
    assert ledger.retried == (paid if row.retried is None else row.retried)


async def check_one(row: Row, cache: Path) -> None:
    """Check calls, error or answer, bill and cache of one prompt."""
    async with serving(script(row)) as server:
        async with connect(server, cache=cache, max_wait=row.max_wait) as client:
            outcome = await outcome_of(client, row)
            calls, stats = server.calls, client.stats
        check(row, outcome)
        assert row.calls in {None, calls}, f"{calls} calls: {outcome!r}"
        assert stats.attempts == calls
        assert stats.failures == (not isinstance(outcome, ModelResponse))
        check_cost(row, stats.cost, row.sent(calls), outcome)
        async with connect(server, cache=cache, max_wait=row.max_wait, max_retries=0) as client:
            again = await outcome_of(client, row)
        is_cached = server.calls == calls
        assert is_cached is isinstance(outcome, ModelResponse)
        if is_cached:
            assert again.cached
            assert again.content == outcome.content


async def check_limiter(row: Row) -> None:
    """Check what the limiter does after the first reply: whether it pauses, and lowers the rate."""
    async with (
        serving(script(row)) as server,
        connect(server, max_wait=row.max_wait, max_retries=0) as client,
    ):
        await outcome_of(client, row)
        assert server.calls == 1
        check_limits(row, client._account.limiter)


def check_limits(row: Row, limiter: Any) -> None:
    """Check the pause and the learned rate of the model."""
    (queue,) = (queue for queue in limiter._queues.values() if queue.model == MODEL)
    left = queue._paused_until - queue._clock.time()  # below nought where it is over
    if row.pause:
        assert row.pause - 10 <= left <= row.pause + 0.001, left  # a busy machine may take seconds to look
    elif row.pause is not None:
        assert left <= 0
    if row.cut is not None:
        learned = [limits.requests.server for limits in limiter.limits if limits.model == MODEL]
        is_cut = any(rate is not None and rate < CONFIG["requests_per_minute"] for rate in learned)
        assert is_cut is row.cut, f"the learned rate is {learned}"


async def check_drop_in(row: Row) -> None:
    """Check that the drop-in client has the same effects on limits and bill; its errors are the SDK's."""
    limits = RateLimitConfig(**CONFIG, max_wait=row.max_wait)
    async with (
        serving(script(row)) as server,
        AsyncOpenAI(api_key=KEY, base_url=server.url, rate_limit=limits, max_retries=0) as client,
    ):
        call: Callable[..., Any]
        if row.api == "chat":
            messages: Any = [{"role": "user", "content": prompt(row)}]
            call = functools.partial(client.chat.completions.create, messages=messages)
        else:
            call = functools.partial(client.responses.create, input=prompt(row))
        with contextlib.suppress(openai.OpenAIError, ValueError):  # the SDK hands out json's own errors too
            await call(model=MODEL)
        assert server.calls == client.stats.attempts == 1
        first = row.replies[0]
        assert client.stats.cost.total == Decimal(first.usd)
        if first.status != 200:
            check_limits(row, client._account.limiter)


async def check_run(row: Row) -> None:
    """Check that a run in which others are answered goes on after the prompt, or ends at it."""
    prompts = ["good 0", prompt(row), *(f"good {number}" for number in range(1, 5))]
    async with serving(script(row)) as server, connect(server, max_wait=row.max_wait) as client:
        call = functools.partial(client.batch_generate, prompts, api=row.api, max_concurrent=1)
        if not row.ends:
            outcomes = await call(return_exceptions=True)
            check(row, outcomes[1])
            assert [getattr(outcome, "content", outcome) for outcome in outcomes[2:]] == ["yes"] * 4
            return
        with pytest.raises(openai.APIError) as caught:
            await call(return_exceptions=True)
        check(row, caught.value)
        assert [answer and answer.content for answer in caught.value.responses] == ["yes"] + [None] * 5
        assert server.counts[""] == 1


async def check_alone(row: Row) -> None:
    """Check whether a run ends in which every prompt meets the same."""
    prompts = [prompt(row, number) for number in range(6)]
    replies = {f"prompt {number} <": row.replies for number in range(6)}
    async with serving(replies) as server, connect(server, max_wait=row.max_wait) as client:
        call = functools.partial(client.batch_generate, prompts, api=row.api, max_concurrent=1)
        if row.ends or row.evidence:
            with pytest.raises(openai.APIError) as caught:
                await call()
            check(row, caught.value)
            assert len(server.counts) == (1 if row.ends else 3)
            return
        with pytest.raises(PartialFailureError) as partial:
            await call()
        assert len(server.counts) == len(partial.value.failures) == 6
        check(row, partial.value.failures[5])


async def check_batch(row: Row) -> None:
    """Check that the same body in the output of a batch means the same, at half the price."""
    requests = [BatchRequest(prompt="good"), BatchRequest(prompt=prompt(row))]
    first, good = row.replies[0], GOOD if row.api == "chat" else GOOD_RESPONSE
    async with serving(script(row)) as server, connect(server) as client:
        job = await client.submit_batch_job(requests, api=row.api)
        outcomes = await client.retrieve_batch_results(job.job_id, return_exceptions=True)
        assert outcomes[0].content == "yes"
        is_failure = len(row.replies) > 1 or row.error is not None
        if is_failure and not (row.or_answer and isinstance(outcomes[1], ModelResponse)):
            assert isinstance(outcomes[1], openai.OpenAIError), f"an answer: {outcomes[1]!r}"
            if row.error is not None:
                check(row, outcomes[1], classes=(*row.classes, "BatchError"))
        else:
            check(row, outcomes[1])
        usd = Decimal(first.usd) / 2 if row.batch_usd is None else Decimal(row.batch_usd)
        assert client.stats.cost.total == Decimal(good.usd) / 2 + usd
