"""One account: admits each attempt within limits and budgets, and settles it."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import itertools
import logging
from collections import Counter, deque
from typing import TYPE_CHECKING, Any, Protocol

from openai_eval_client._cost import Ledger, Payments
from openai_eval_client._limits import (
    ConcurrencyLimit,
    Sharing,
    State,
    Waiter,
    check_pause,
    check_size,
    describe,
    too_long,
)
from openai_eval_client._log import debug, inform, logger, request_id
from openai_eval_client._runtime import (
    DeferringLock,
    Monotonic,
    StartThrottle,
    call_on,
    fail_waiter,
    running_loop,
)
from openai_eval_client._stats import Recorder
from openai_eval_client._wire import read_stated_limits, refused_dimension, stated_wait
from openai_eval_client.config import RateLimitConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    from openai_eval_client._cost import CostBudget, Payment
    from openai_eval_client._limits import Clock, LimitStatus, ModelLimits, ModelQueue
    from openai_eval_client._wire import Demand, Outcome
    from openai_eval_client.models import ClientStats


_SHORTEST_TIMER = 0.002  # seconds; an event loop does not wake more finely
_WORTH_SAYING = 1.0  # seconds of waiting from which one is logged


class Account(Sharing):
    """The limits of one client, shared by everything that sends through it."""

    def __init__(
        self,
        config: RateLimitConfig | None = None,
        *,
        clock: Clock | None = None,
        max_cost: float | None = None,
    ) -> None:
        self.config = config or RateLimitConfig(requests_per_minute=None, tokens_per_minute=None)
        self.recorder = Recorder()
        self.ledger = Ledger()
        self._bounded = config is not None
        self._clock: Clock = clock or Monotonic()
        self._lock = DeferringLock()
        self.payments = Payments(self.ledger, self._lock, max_cost)
        self._notes: deque[tuple[Any, ...]] = deque()  # to be logged once the lock is left
        self._turns = itertools.count()
        self._starts = StartThrottle()
        self._refused: Counter[str] = Counter()
        self._queues: dict[str | None, ModelQueue] = {}
        self._timers: dict[tuple[ModelQueue, asyncio.AbstractEventLoop], asyncio.TimerHandle] = {}

    def fresh(self) -> Account:
        """Return another one with the same limits, for another account; the money is the same."""
        other = Account(self.config if self._bounded else None, clock=self._clock)
        other._lock, other.payments = self._lock, self.payments.shared(other.ledger)
        return other

    @property
    def stats(self) -> ClientStats:
        """What went through so far."""
        with self._lock:
            details = {"rate_limited_by": dict(self._refused), **describe(self._queues.values())}
        cost, budget = self.ledger.snapshot(), self.payments.stats
        return self.recorder.snapshot(**details, cost=cost, unpriced=cost.unpriced, budget=budget)

    @property
    def facts(self) -> list[ModelLimits]:
        """What holds for each model, and what it waited for."""
        with self._lock:
            return [queue.limits() for queue in self._queues.values() if queue.model is not None]

    def output_length(self, model: str) -> dict[str, float]:
        """Return how long a model's answers are, in the words of `ClientStats.output_length`."""
        with self._lock:
            return self._queues[model].output_length() if model in self._queues else {}

    def gauge(self, model: str) -> LimitStatus | None:
        """Return where a model's limits stand; None before its first request."""
        with self._lock:
            return self._queues[model].status() if model in self._queues else None

    def next_turn(self) -> int:
        """Return a place in the queue; a request keeps its own through all its attempts."""
        return next(self._turns)

    async def admit(
        self,
        demand: Demand,
        *,
        concurrency: ConcurrencyLimit | None = None,
        turn: int | None = None,
        budget: CostBudget | None = None,
    ) -> Permit:
        """Wait until the request may be sent, and reserve what it needs: its cost first, then its tokens."""
        payment = await self.payments.reserve(demand, budget) if demand.most_cost else None
        try:
            with self._lock:
                queue = self._queue_of(demand.model)
                waiter = self._waiter(queue, demand, concurrency, turn)
                check_pause(queue, self.config.max_wait)
                check_size(queue, demand, self.config.max_wait)
                granted = queue.try_grant(waiter)
                future = self._starts.now_or_later() if granted else self._enqueue(queue, waiter)
            if future is not None:
                try:
                    await future
                except BaseException:
                    self._lock.when_free(functools.partial(self._cancel, queue, waiter))
                    raise
                waiter.granted_at = self._clock.time()  # it begins now: what was before is waiting
                self._say_wait(queue, waiter)
        except BaseException:
            if payment is not None:
                payment.refund()
            raise
        self.recorder.admitted(demand.model, waiter.tokens, waiter.asked_at, waiter.granted_at)
        return Permit(self, queue, waiter, demand, payment)

    def settle(self, queue: ModelQueue, waiter: Waiter, demand: Demand, outcome: Outcome) -> None:
        """Free an attempt's slot, replace its estimate by what it came to, and heed the server."""
        self._lock.when_free(lambda: self._settle(queue, waiter, demand, outcome))
        self._log_notes()
        self.ledger.keep_up()

    def update_from_headers(self, queue: ModelQueue, waiter: Waiter, headers: Mapping[str, str]) -> None:
        """Heed the headers of an answer whose body is still to come."""
        with self._lock:
            queue.update_from_headers(waiter, read_stated_limits(headers))
            self._pump(queue)

    def _settle(self, queue: ModelQueue, waiter: Waiter, demand: Demand, outcome: Outcome) -> None:
        if waiter.state is not State.GRANTED:
            return
        self.recorder.called(demand, outcome)
        waiter.ended_at = self._clock.time()
        self.recorder.ended(demand.model, outcome, waiter.granted_at, waiter.ended_at)
        self.ledger.settled(demand, outcome, waiter.tokens)
        try:
            if not outcome.sent:
                queue.cancel(waiter)
                return
            queue.settle(waiter, outcome.tokens)
            if outcome.ok:
                queue.on_success(waiter)
            elif outcome.is_refusal and not outcome.is_congestion:
                queue.rejected(waiter)
            if outcome.counted is not None:
                queue.observe_output(outcome.counted.completion_tokens)
            if outcome.headers is not None and (outcome.is_congestion or queue.is_news(waiter)):
                self._update_limits(queue, waiter, outcome, outcome.headers)
        finally:
            self._pump(queue)
        self.recorder.attempt(outcome, waiter.ended_at - waiter.granted_at)

    def _log_notes(self) -> None:
        """Log what was noted under the lock: a log handler has a lock of its own."""
        with contextlib.suppress(IndexError):  # another thread logs too
            while self._notes:
                wait, about = self._notes.popleft()
                text, model = "%s rate limited by the server: pausing %.2f s", about["model"]
                inform(text, model, wait, event="rate_limited", wait_seconds=wait, **about)

    def _queue_of(self, model: str | None) -> ModelQueue:
        queue = self._queues.get(model)
        if queue is None:
            queue = self._queues[model] = self._new_queue(model)
            queue.concurrency.limit = queue.concurrency.limit if self._bounded else float("inf")
        return queue

    def _waiter(
        self, queue: ModelQueue, demand: Demand, concurrency: ConcurrencyLimit | None, turn: int | None
    ) -> Waiter:
        output = queue.expected_output if demand.max_output is None else demand.max_output
        return Waiter(
            turn=self.next_turn() if turn is None else turn,
            tokens=demand.input_tokens + output if demand.model is not None else 0,
            concurrency=concurrency or queue.concurrency,
            asked_at=self._clock.time(),
        )

    def _enqueue(self, queue: ModelQueue, waiter: Waiter) -> asyncio.Future[None]:
        loop = asyncio.get_running_loop()
        waiter.owner, waiter.future = loop, loop.create_future()
        queue.enqueue(waiter)
        self._pump(queue)
        future: asyncio.Future[None] = waiter.future
        return future

    def _say_wait(self, queue: ModelQueue, waiter: Waiter) -> None:
        waited = waiter.granted_at - waiter.asked_at
        if waited >= _WORTH_SAYING:
            about = {"model": queue.model, "wait_seconds": waited}
            inform("waited %.2f s for the rate limit of %s", waited, queue.model, event="waited", **about)

    def _cancel(self, queue: ModelQueue, waiter: Waiter) -> None:
        queue.cancel(waiter)
        self._pump(queue)

    def _pump(self, queue: ModelQueue) -> None:
        """Admit all who can go; where only time can help the next, set the timers."""
        while (waiter := queue.grant_next()) is not None:
            if not call_on(waiter.owner, self._starts.wake, waiter.future):
                queue.cancel(waiter)
        delay = queue.next_in()
        if delay is not None:
            for owner in list(queue.waiting):
                self._set_timer(queue, owner, max(delay, _SHORTEST_TIMER))

    def _set_timer(self, queue: ModelQueue, loop: asyncio.AbstractEventLoop, delay: float) -> None:
        """See to it that `loop` looks at the queue again in `delay` seconds at the latest."""
        handle = self._timers.get((queue, loop))
        if handle is not None and handle.when() <= loop.time() + delay + _SHORTEST_TIMER:
            return
        if running_loop() is not loop:
            if not call_on(loop, self._tick, queue, loop):
                for waiter in queue.waiters(loop):
                    queue.cancel(waiter)
            return
        if handle is not None:
            handle.cancel()
        self._timers = {key: kept for key, kept in self._timers.items() if not key[1].is_closed()}
        self._timers[queue, loop] = loop.call_later(delay, self._tick, queue, loop)

    def _tick(self, queue: ModelQueue, loop: asyncio.AbstractEventLoop) -> None:
        with self._lock:
            handle = self._timers.pop((queue, loop), None)
            if handle is not None:
                handle.cancel()
            self._pump(queue)

    def _update_limits(
        self, queue: ModelQueue, waiter: Waiter, outcome: Outcome, headers: Mapping[str, str]
    ) -> None:
        """Take over what the server says of its limits; where it refused, pause as long as it says."""
        stated = read_stated_limits(headers)
        queue.update_from_headers(waiter, stated)
        if not outcome.is_congestion:
            return
        wait, dimension = stated_wait(headers, outcome.message) or 0.0, refused_dimension(outcome.message)
        self._refused[dimension or "unknown"] += 1
        queue.refused(waiter, dimension, wait, stated)
        if wait:
            queue.pause(wait)
            about = {"model": queue.model, "status": outcome.status, "limit": dimension}
            self._notes.append((wait, {**about, "request_id": request_id(headers)}))
        if wait > self.config.max_wait:
            self._fail_all(queue)

    def _fail_all(self, queue: ModelQueue, reason: Exception | None = None) -> None:
        for waiter in queue.waiters():
            queue.cancel(waiter)
            error = too_long(queue, self.config.max_wait) if reason is None else copy.copy(reason)
            call_on(waiter.owner, fail_waiter, waiter.future, error)


class Admitter(Protocol):
    """Who gave it."""

    def update_from_headers(self, queue: ModelQueue, waiter: Waiter, headers: Mapping[str, str]) -> None:
        """Heed the headers of an answer."""

    def settle(self, queue: ModelQueue, waiter: Waiter, demand: Demand, outcome: Outcome) -> None:
        """Free the slot of an attempt, and account for what it came to."""


class Permit:
    """The right to send one attempt; settle it exactly once, whatever comes of the attempt."""

    __slots__ = ("_admitter", "_payment", "_queue_of", "_unsaid", "_waiter", "demand")

    def __init__(
        self,
        admitter: Admitter,
        queue: ModelQueue,
        waiter: Waiter,
        demand: Demand,
        payment: Payment | None,
    ) -> None:
        self._admitter = admitter
        self._queue_of = queue
        self._waiter = waiter
        self._payment = payment
        self._unsaid = True
        self.demand = demand

    def update_from_headers(self, headers: Mapping[str, str]) -> None:
        """Heed the headers of an answer whose body is still to come."""
        self._admitter.update_from_headers(self._queue_of, self._waiter, headers)

    def settle(self, outcome: Outcome) -> None:
        """Hand slot and money back and account for what the attempt came to; a second call does nothing."""
        payment, self._payment = self._payment, None
        if payment is not None:
            payment.settle(self.demand, outcome)
        self._admitter.settle(self._queue_of, self._waiter, self.demand, outcome)
        if self._unsaid and logger.isEnabledFor(logging.DEBUG):
            self._say(outcome)
        self._unsaid = False

    def _say(self, outcome: Outcome) -> None:
        waiter, model = self._waiter, self.demand.model
        about = {
            "model": model,
            "status": outcome.status,
            "wait_seconds": waiter.granted_at - waiter.asked_at,
            "seconds": waiter.ended_at - waiter.granted_at,
            "tokens": outcome.tokens,
            "request_id": request_id(outcome.headers),
        }
        text = "attempt for %s: %s after %.2f s"
        debug(text, model, outcome.status or "no answer", about["seconds"], event="attempt", **about)
