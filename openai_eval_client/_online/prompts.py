"""Prompts answered online: one, from its place in the queue; many, by a pool of workers; an estimate."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import math
import os
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import openai

from openai_eval_client._limits import ConcurrencyLimit
from openai_eval_client._log import inform, warn
from openai_eval_client._online.background import BackgroundResponses, pending
from openai_eval_client._online.stopping import StopRule, check_max_failures
from openai_eval_client._runtime import check_loop, running_loop
from openai_eval_client._sdk import UnsupportedParameters, call_sdk, retrying
from openai_eval_client._validation import check_count
from openai_eval_client._wire import (
    PATHS,
    Demand,
    Kind,
    Outcome,
    check_prompt,
    forget_key,
    max_output,
    read_answer,
    read_body,
    read_failure,
    usage_of,
    without_echo,
)
from openai_eval_client.errors import PartialFailureError, sdk_httpx

if TYPE_CHECKING:
    from collections.abc import Awaitable, Coroutine, Iterable, Iterator, Sequence
    from decimal import Decimal

    from openai_eval_client._account import Account, Attempt
    from openai_eval_client._cache import Cache, Keeper
    from openai_eval_client._cost import CostBudget, Pricer
    from openai_eval_client._report import Display, Progress
    from openai_eval_client._tokens import TokenCounter
    from openai_eval_client._wire import Failure, Parameters
    from openai_eval_client.config import OpenAIConfig, RateLimitConfig
    from openai_eval_client.models import ModelResponse

_TAKING = 0.002  # seconds of taking items after which other tasks run first
_READ_AHEAD = 32  # prompts beyond those in flight: ready when one is done; more would only take memory


@dataclass(slots=True)
class _Job:
    """One prompt on its way."""

    parameters: Parameters
    body: dict[str, Any]  # of the request, as first asked for
    sent: dict[str, Any]  # the body of the latest attempt: without what the model is known to refuse
    concurrency: ConcurrencyLimit | None  # None: the model's
    budget: CostBudget | None  # the call's own, besides the client's
    sending: contextlib.AbstractContextManager[None] | None  # entered while a request is in flight
    keep: Keeper | None = None  # stores the answer, still in flight
    input_tokens: int = 0
    most_cost: Decimal | None = None  # USD that one attempt can cost; None: there is no budget
    turn: int = 0  # its place in the queue, kept through all attempts
    flex_refused_at: float = 0.0  # when the flex tier first had no capacity for it; 0: it never was refused


class Caller:
    """Sends prompts one at a time, any number of them concurrently."""

    def __init__(
        self,
        config: OpenAIConfig,
        sdk: openai.AsyncOpenAI,
        account: Account,
        counter: TokenCounter,
        pricer: Pricer,
        *,
        cache: Cache | None = None,
    ) -> None:
        self._key = config.api_key
        self._sdk = sdk
        self._account = account
        self._counter = counter
        self._pricer = pricer
        self._cache = cache
        self._urls = {api: str(sdk.base_url).rstrip("/") + path for api, path in PATHS.items()}
        self._reply_class = sdk_httpx().Response  # what post() casts to: both headers and body
        self._has_answered = False
        self._name, self._count = uuid.uuid4(), itertools.count()
        self.unsupported = UnsupportedParameters()
        self._background = BackgroundResponses(sdk, config.background_timeout)
        self._flex_fallback = config.flex_fallback
        self._retrying = retrying(
            self._again,
            max_retries=config.max_retries,
            max_wait=account.config.max_wait,
            on_retry=account.recorder.retry,
            model_of=lambda job, _: str(job.body["model"]),
            is_worth=self._is_worth,
        )

    def __call__(
        self,
        prompt: str | Sequence[Any],
        parameters: Parameters,
        *,
        concurrency: ConcurrencyLimit | None = None,
        budget: CostBudget | None = None,
        sending: contextlib.AbstractContextManager[None] | None = None,
    ) -> Awaitable[ModelResponse]:
        """Answer one prompt."""
        if self._sdk.is_closed():
            raise RuntimeError("this client was closed")
        body = parameters.with_prompt(prompt)
        job = _Job(parameters, body, body, concurrency, budget, sending)
        if self._cache is None:
            return self._answer(job)
        return self._cache.answer(body, parameters, functools.partial(self._answer, job))

    async def _answer(self, job: _Job, keep: Keeper | None = None) -> ModelResponse:
        """Send one prompt, which the cache does not know, until it is answered or failed for good."""
        account, counter, body = self._account, self._counter, job.body
        try:
            job.input_tokens = await counter.count_input(body)
            path = PATHS[job.parameters.api]
            job.most_cost = await account.budgets.most(body, path, counter, job.budget)
            job.turn, job.keep = account.limiter.next_turn(), keep
            failures = []
            try:
                response: ModelResponse = await self._send(job)
            except openai.APIError as error:
                failures.append(error)
            if failures:
                response = await self._retrying(job, failures)
        except openai.OpenAIError as error:
            if isinstance(error, openai.APIError):
                forget_key(error, self._key)
            account.recorder.failed(body["model"], error)
            raise
        account.recorder.answered(response)
        return response

    async def _again(self, job: _Job, failures: list[openai.APIError]) -> ModelResponse:
        """Go on where the first attempt failed: only a request that needs it pays for backoff."""
        try:
            if failures:
                raise failures.pop()
            return await self._send(job)
        except openai.BadRequestError as error:
            if not self.unsupported.learn(error, job.sent):
                raise
        except openai.RateLimitError as error:
            if not self._falls_back(job, error):
                raise
        return await self._again(job, failures)

    def _falls_back(self, job: _Job, error: openai.RateLimitError) -> bool:
        """Ask for the standard tier where flex had no capacity for long enough; return whether it did."""
        patience, is_flex = self._flex_fallback, job.body.get("service_tier") == "flex"
        if patience is None or not is_flex or read_failure(error).kind is not Kind.CAPACITY:
            return False
        now = time.monotonic()
        job.flex_refused_at = job.flex_refused_at or now
        if now - job.flex_refused_at < patience:
            return False
        job.body = {**job.body, "service_tier": "default"}
        text = "no capacity in the flex tier for %.0f s: sent in the standard tier"
        inform(text, now - job.flex_refused_at, event="flex_fallback", model=job.body["model"])
        return True

    def _is_worth(self, failure: Failure) -> bool:
        """Return whether another attempt may help; a page from a server that answers is a passing fault."""
        return failure.retry or (failure.kind is Kind.NOT_AN_API and self._has_answered)

    async def _send(self, job: _Job) -> ModelResponse:
        """Send once."""
        body = job.sent = self.unsupported.adapted(job.body)
        demand = Demand(body["model"], job.input_tokens, max_output(body), most_cost=job.most_cost)
        async with self._account.attempt(
            demand, concurrency=job.concurrency, turn=job.turn, budget=job.budget, sending=job.sending
        ) as attempt:
            started = time.perf_counter()
            reply = without_echo(await self._reply_to(job, attempt), self._key, job.parameters.headers)
            latency = time.perf_counter() - started
            answer, kept = self._read(reply, job.parameters)
            self._has_answered = True
            counted = usage_of(answer)
            response = read_answer(
                answer,
                job.parameters,
                usage=counted,
                kept=kept,  # less memory than what is read from it
                temperature=body.get("temperature"),
                request_id=reply.headers.get("x-request-id"),
                latency=latency,
            )
            tier = answer.get("service_tier")
            usage = counted
            if usage is None or usage.estimated:
                usage = await self._counter.estimate_usage(response, job.input_tokens, tier)
            attempt.ended(Outcome(reply.status_code, reply.headers, usage))
            if not self._pricer.loaded:  # as it is but for the first time
                await self._pricer.ready()
            cost = attempt.price()
            response.usage.estimated_cost = None if cost is None else float(cost)
            if job.keep is not None:
                await job.keep(response)
        if not usage.estimated:
            self._counter.observe(body["model"], job.input_tokens, usage.prompt_tokens)
        return response

    def _read(self, reply: Any, parameters: Parameters) -> tuple[dict[str, Any], bytes]:
        try:
            return read_body(reply, parameters.api)
        except openai.APIError as error:
            forget_key(error, self._key)
            raise

    async def _reply_to(self, job: _Job, attempt: Attempt) -> Any:
        """Send once, and return the reply; of a response in the background the last one."""
        parameters, body, keep = job.parameters, job.sent, job.keep
        if parameters.api != "responses":
            return await self._post(parameters, body)
        reply = None
        if keep is not None and body.get("background"):
            reply = await self._background.submitted_before(keep, parameters)
        if reply is None:
            reply = await self._post(parameters, body)
            if pending(reply) is not None:  # the replies to come state no limits
                attempt.update_from_headers(reply.headers)
        return await self._background.finished(reply, parameters, keep)

    def _post(self, parameters: Parameters, body: dict[str, Any]) -> Awaitable[Any]:
        """Post through the SDK, which authenticates, sends and turns bad statuses into its errors."""
        url = self._urls[parameters.api]
        options: Any = {
            "headers": parameters.headers,
            "params": parameters.query,
            "timeout": None,
            "max_retries": 0,
            # not sent, but without it the SDK would draw a UUID
            "idempotency_key": f"{self._name}-{os.getpid()}-{next(self._count)}",
        }
        call = self._sdk.post(url, body=body, cast_to=self._reply_class, options=options)
        return call_sdk(call, seconds=parameters.timeout, url=url)


NO_SAMPLES = contextlib.nullcontext[Callable[[], None]](lambda: None)


class WorkerPool:
    """The workers of one run, each with one item at a time, and the outcomes of the items."""

    # A worker whose item is answered begins the next one in the same turn of the event loop: where one turn
    # ends many requests, and a later one begins as many, the garbage collector runs twice as often.

    def __init__(
        self,
        work: Callable[..., Awaitable[Any]],
        *,
        slots: int,
        width: int,
        rule: StopRule | None = None,
        patience: float = math.inf,
    ) -> None:
        self.error: BaseException | None = None  # raised once all that was in flight is done
        self._work = work
        self._rule = rule or StopRule()
        self._patience = patience  # seconds in which no item ends, after which that is logged
        self._ended_items = 0
        # in flight when the evidence was complete: nothing is sent before they have an outcome
        self._witnesses: set[Any] | None = None
        self._slots = slots  # requests in flight at once
        self._workers = 0
        self._ready: deque[tuple[int, Any]] = deque()  # items that no worker has begun
        self._room = asyncio.Semaphore(width)  # for items taken and not yet consumed
        self._outcomes: asyncio.Queue[tuple[int, Any] | None] = asyncio.Queue()  # None: no more
        self._tasks: set[asyncio.Task[None]] = set()
        self._sending: set[asyncio.Task[Any] | None] = set()  # those with a request in flight
        self._waiting: set[asyncio.Task[Any] | None] = set()  # those between two attempts
        self._stopped = False

    async def run(
        self,
        items: Iterable[Any] | AsyncIterable[Any],
        *,
        display: Display | None = None,
        stop_event: asyncio.Event | None = None,
        samples: contextlib.AbstractContextManager[Callable[[], None]] = NO_SAMPLES,
    ) -> AsyncGenerator[tuple[int, Any], None]:
        """Work on the items, and yield each outcome as it comes, until the event is set."""
        # No more items are taken than there is room for, and an item takes up room until the consumer comes
        # back for the next outcome: a slow consumer slows the work down. When the consumer ends, so does all
        # work, before this generator does.
        check_loop()
        with samples as give_back, display or contextlib.nullcontext():
            beside = [asyncio.create_task(self._watch())]
            beside += [] if stop_event is None else [asyncio.create_task(self._stop_when(stop_event))]
            self._start_task(self._take(items))
            try:
                while (outcome := await self._outcomes.get()) is not None:
                    if display is not None:
                        display.count(outcome[1])
                    yield outcome
                    self._room.release()
            finally:
                self._stopped = True
                self._ready.clear()
                left = [task for task in (*self._tasks, *beside) if task.cancel()]
                await asyncio.gather(*left, return_exceptions=True)
            if self.error is not None:
                raise self.error
            if stop_event is not None and stop_event.is_set():
                give_back()

    def unclaimed(self) -> Iterator[tuple[int, Any]]:
        """Yield the outcomes that the consumer left behind."""
        while not self._outcomes.empty():
            if (outcome := self._outcomes.get_nowait()) is not None:
                yield outcome

    @property
    def in_flight(self) -> int:
        """Requests sent and not answered yet."""
        return len(self._sending)

    def stop(self, error: BaseException | None = None) -> None:
        """Send nothing more: what is in flight, and perhaps billed, is yielded; then the error is raised."""
        if self._stopped:
            return
        self._stopped = True
        self.error = error  # rather than one of the source: it is why items have no outcome
        self._ready.clear()
        loop = running_loop()
        for task in self._tasks - self._sending - {self._current()}:
            if task.get_loop() is loop:
                task.cancel()

    def _current(self) -> asyncio.Task[Any] | None:
        """Return the running task; None if it is not of this run."""
        # What was at work when its loop closed is ended when it is collected: in any other task, or in none.
        task = None if running_loop() is None else asyncio.current_task()
        return task if task in self._tasks else None

    def __enter__(self) -> None:
        """Enter to send an item: it is in flight until its outcome, or until the attempt fails."""
        if self._stopped:
            raise asyncio.CancelledError
        task = asyncio.current_task()
        self._sending.add(task)
        self._waiting.discard(task)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        task = None if kind is None else self._current()
        if task is None:
            return
        self._leave(task)
        if isinstance(error, Exception):
            self._waiting.add(task)
            asyncio.get_running_loop().call_soon(self._start_worker)  # unless this one goes on itself
        if self._stopped:
            task.cancel()  # no further attempt

    async def _stop_when(self, event: asyncio.Event) -> None:
        await event.wait()
        self.stop()

    async def _watch(self) -> None:
        """Log whenever nothing has moved for a long time."""
        while self._patience < math.inf:
            before = self._ended_items
            await asyncio.sleep(self._patience)
            if before == self._ended_items and self._workers:
                text = "for %.0f s no prompt of this run has ended: %d of %d at work are in flight"
                figures = self._patience, len(self._sending), self._workers
                warn(text, *figures, event="run_stands_still", wait_seconds=self._patience)

    def _start_task(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Forget a task; after the last one no outcome comes any more."""
        self._tasks.discard(task)
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error is not None:  # cancelled from outside, or a bug: no item may be dropped in silence
            self.stop(error)
        if not self._tasks:
            if not self._stopped:
                self.error = self.error or self._rule.last
            self._outcomes.put_nowait(None)

    async def _take(self, items: Iterable[Any] | AsyncIterable[Any]) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            async with contextlib.aclosing(iterate(items)) as source:
                for index in itertools.count():
                    await self._room.acquire()
                    self._ready.append((index, await anext(source)))
                    if self._start_worker() or loop.time() - began > _TAKING:
                        if not self._room.locked():  # else there is a wait anyway
                            await asyncio.sleep(0)  # items may be slow to make, and other tasks can go on
                        began = loop.time()
        except StopAsyncIteration:
            return
        except Exception as error:  # noqa: BLE001  # raised once all that was taken is done
            self.error = self.error or error

    def _start_worker(self) -> bool:
        """Start a worker if an item is ready and may have a slot; return whether one was started."""
        is_full = self._surplus >= 0 and len(self._sending) >= self._slots
        if not self._ready or is_full or self._witnesses is not None:
            return False
        self._workers += 1
        self._start_task(self._work_off())
        return True

    @property
    def _surplus(self) -> int:
        """Workers beyond one for each slot; one between two attempts needs no slot."""
        return self._workers - len(self._waiting) - self._slots

    async def _work_off(self) -> None:
        """Work on one item after the other, until another worker may need the slot."""
        while self._ready and self._witnesses is None:
            await self._one(*self._ready.popleft())
            if self._surplus > 0 and len(self._sending) >= self._slots - 1:
                break
        self._workers -= 1

    async def _one(self, index: int, item: object) -> None:
        task = asyncio.current_task()
        try:
            outcome = await self._work(index, item, sending=self)
        except Exception as error:  # noqa: BLE001  # handed to the consumer as the item's outcome
            self._outcomes.put_nowait((index, error))
            ended = self._rule.failed(error, item)
            if ended is not None:
                self.stop(ended)
            elif self._witnesses is None and self._rule.suspect is not None:
                self._witnesses = self._sending.copy()
        else:
            self._rule.answered(cached=getattr(outcome, "cached", False))
            self._outcomes.put_nowait((index, outcome))
        finally:
            self._ended_items += 1
            self._leave(task)
            self._waiting.discard(task)

    def _leave(self, task: asyncio.Task[Any] | None) -> None:
        """Count a request as no longer in flight; the last that could have disproved a failure decides."""
        self._sending.discard(task)
        if self._witnesses is None:
            return
        self._witnesses.discard(task)
        if self._rule.suspect is None:
            self._witnesses = None
            for _ in range(min(len(self._ready), self._slots)):
                self._start_worker()
        elif not self._witnesses:
            self.stop(self._rule.suspect)


async def iterate(items: Iterable[Any] | AsyncIterable[Any]) -> AsyncGenerator[Any, None]:
    """Yield from an iterable of either kind; an async generator is closed in the end."""
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


def pool_for(
    call: Callable[..., Awaitable[ModelResponse]],
    parameters: Parameters,
    limits: RateLimitConfig,
    budget: CostBudget | None,
    *,
    max_concurrent: int | None,
    max_failures: float | None,
    total: int | None,
    check: bool,
) -> WorkerPool:
    """Return the pool that answers prompts; with `check`, each is checked as it is taken."""
    check_max_failures(max_failures)
    concurrency = None
    if max_concurrent is not None:
        check_count(max_concurrent, "max_concurrent")
        concurrency = ConcurrencyLimit(max_concurrent)

    def answer(index: int, prompt: Any, *, sending: Any) -> Awaitable[ModelResponse]:
        if check:
            check_prompt(prompt, index, api=parameters.api)
        return call(prompt, parameters, concurrency=concurrency, budget=budget, sending=sending)

    slots = max_concurrent or limits.max_concurrent
    return WorkerPool(
        answer,
        slots=slots,
        width=slots + min(slots, _READ_AHEAD),
        rule=StopRule(limits.max_wait, max_failures=max_failures, total=total),
        patience=limits.max_wait,
    )


async def collect(
    pool: WorkerPool,
    prompts: Sequence[Any],
    *,
    progress: Progress,
    display: Display | None,
    return_exceptions: bool,
) -> list[Any]:
    """Answer all prompts and return the responses in input order."""
    outcomes: list[Any] = [None] * len(prompts)
    if not prompts:
        await progress(1.0)
    try:
        async with contextlib.aclosing(pool.run(prompts, display=display)) as stream:
            done = 0
            async for index, outcome in stream:
                outcomes[index] = outcome
                done += 1
                if pool.error is None:
                    await progress(done / len(prompts))
    except (Exception, asyncio.CancelledError) as error:
        for index, outcome in pool.unclaimed():
            outcomes[index] = outcome
        attach_responses(error, responses_of(outcomes))
        raise
    return outcomes_or_raise(outcomes, return_exceptions=return_exceptions)


def outcomes_or_raise(outcomes: list[Any], *, return_exceptions: bool) -> list[Any]:
    """Return the outcomes of all requests, in input order; raise PartialFailureError if one failed."""
    failures = {index: error for index, error in enumerate(outcomes) if isinstance(error, Exception)}
    if failures and not return_exceptions:
        raise PartialFailureError(responses_of(outcomes), failures)
    return outcomes


def responses_of(outcomes: Sequence[ModelResponse | Exception | None]) -> list[ModelResponse | None]:
    """Return the responses among outcomes, None in the place of all others."""
    return [None if isinstance(outcome, Exception) else outcome for outcome in outcomes]


def attach_responses(error: BaseException, responses: Sequence[ModelResponse | None]) -> None:
    """Give an error the answers that there were before it, as `.responses`."""
    error.__dict__["responses"] = list(responses)
