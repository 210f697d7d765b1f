"""The waiting: one queue for each model, served from any event loop and any thread.

One lock stands round all queues. Nothing is awaited under it: a waiter that cannot go gets a future of its
own loop, which is resolved when quota or a slot is free. Each loop with waiters holds one timer, so that no
loop depends on another that may be busy or closed.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from openai_eval_client._limits.buckets import Clock
from openai_eval_client._limits.queue import ModelQueue, Waiter
from openai_eval_client._log import inform, request_id, warn
from openai_eval_client._runtime import STATE_LOCK, StartThrottle, call_on, running_loop
from openai_eval_client._wire import read_stated_limits
from openai_eval_client.config import RateLimitConfig
from openai_eval_client.errors import RequestTooLargeError, rate_limited

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from openai_eval_client._limits.queue import ConcurrencyLimit, LimitStatus, ModelLimits
    from openai_eval_client._limits.shared import RedisBackend, SharedModelQueue
    from openai_eval_client._wire import Demand, Outcome
    from openai_eval_client.errors import RateLimitError

_SHORTEST_TIMER = 0.002  # seconds; an event loop does not wake more finely
_LOOK_AGAIN = 0.5  # seconds after which it is looked for slots of closed loops and dropped streams
_WORTH_LOGGING = 1.0  # seconds of waiting
_OVERLOAD_PAUSE = 1.0  # seconds, where an overloaded server names none


class Permit(NamedTuple):
    """The right to send one attempt, to be given back by `Limiter.release`."""

    queue: ModelQueue
    waiter: Waiter


class Limiter:
    """The limits of one account, shared by everything that sends through it."""

    def __init__(
        self,
        config: RateLimitConfig | None = None,
        *,
        clock: Clock | None = None,
        reclaim: Callable[[], object] = lambda: None,  # gives back what closed loops and dropped streams hold
    ) -> None:
        self.config = config or RateLimitConfig(requests_per_minute=None, tokens_per_minute=None)
        self._bounded = config is not None  # else nothing is slowed down until the server states limits
        self._clock = clock or Clock()
        self._lock = STATE_LOCK
        self._reclaim = reclaim
        self._turns = itertools.count()
        self._starts = StartThrottle()
        self._refused: Counter[str] = Counter()
        self._queues: dict[str, ModelQueue] = {}  # by model; by endpoint for what runs none
        self._timers: dict[tuple[ModelQueue, asyncio.AbstractEventLoop], asyncio.TimerHandle] = {}
        self._backend: RedisBackend | None = None

    def fresh(self, reclaim: Callable[[], object], config: RateLimitConfig | None = None) -> Limiter:
        """Return another one with limits of its own; None: the same configured ones, for another account."""
        config = config or (self.config if self._bounded else None)
        return Limiter(config, clock=self._clock, reclaim=reclaim)

    def share(self, *account: str | None) -> None:
        """Share the limits with all processes that use the same account, through `config.redis_url`."""
        if self.config.redis_url is not None and self._backend is None:
            from openai_eval_client._limits.shared import RedisBackend  # an extra

            self._backend = RedisBackend(self.config, account)

    def leave(self) -> None:
        """Tell the processes that share the limits that this client is done."""
        if self._backend is not None:
            with self._lock:
                for queue in self._queues.values():
                    queue.leave()
            self._backend.close()

    @property
    def stats(self) -> dict[str, dict[str, Any]]:
        """What `ClientStats` says of the limits."""
        waited: Counter[str] = Counter()
        with self._lock:
            for queue in self._queues.values():
                waited.update(queue.waited)
            models = {queue.model: queue for queue in self._queues.values() if queue.model is not None}
            return {
                "rate_limited_by": dict(self._refused),
                "wait_seconds_by": dict(waited),
                "utilisation": {model: queue.utilisation() for model, queue in models.items()},
                "output_length": {model: queue.output_length() for model, queue in models.items()},
            }

    @property
    def limits(self) -> list[ModelLimits]:
        """The limits of each model, and what was waited for."""
        with self._lock:
            return [queue.limits() for queue in self._queues.values() if queue.model is not None]

    def status(self, model: str) -> LimitStatus | None:
        """Return how much of a model's limits is used; None before its first request."""
        with self._lock:
            return self._queues[model].status() if model in self._queues else None

    def next_turn(self) -> int:
        """Return a place in the queue; a request keeps its own through all its attempts."""
        return next(self._turns)

    def ask(
        self, demand: Demand, *, concurrency: ConcurrencyLimit | None = None, turn: int | None = None
    ) -> Permit:
        """Reserve a request's tokens and a slot, or queue it: if it has a future, `granted` waits for that.

        Whatever becomes of it, `release` has to be called.
        """
        with self._lock:
            queue = self._queue_of(demand)
            output = queue.expected_output if demand.max_output is None else demand.max_output
            waiter = Waiter(
                turn=self.next_turn() if turn is None else turn,
                tokens=demand.input_tokens + output if demand.model is not None else 0,
                concurrency=concurrency or queue.concurrency,
                asked_at=self._clock.time(),
            )
            self._check(queue, demand)
            if queue.try_grant(waiter):
                waiter.future = self._starts.now_or_later()
            else:
                waiter.owner = asyncio.get_running_loop()
                waiter.future = waiter.owner.create_future()
                queue.enqueue(waiter)
                self._pump(queue)
        return Permit(queue, waiter)

    async def granted(self, permit: Permit) -> None:
        """Wait for the future of a permit: until its request may be sent."""
        queue, waiter = permit
        await waiter.future
        waiter.granted_at = self._clock.time()  # it begins now: what was before is waiting
        waited = waiter.granted_at - waiter.asked_at
        if waited >= _WORTH_LOGGING:
            text, model = "waited %.2f s for the rate limit of %s", queue.model
            inform(text, waited, model, event="waited", model=model, wait_seconds=waited)

    def release(self, permit: Permit, outcome: Outcome) -> None:
        """Free a slot, replace the reserved tokens by those used, and learn from the answer."""
        permit.waiter.ended_at = self._clock.time()
        self._lock.when_free(lambda: self._release(*permit, outcome))

    def log_refusal(self, permit: Permit, outcome: Outcome) -> None:
        """Log that an attempt was refused, and for how long all others wait."""
        failure = outcome.failure if outcome.is_rate_limit else None
        if failure is not None and failure.wait:
            model, wait, name = permit.queue.model, failure.wait, request_id(outcome.headers)
            about = {"model": model, "limit": failure.dimension, "status": failure.status, "request_id": name}
            text = "%s rate limited by the server: pausing %.2f s"
            inform(text, model, wait, event="rate_limited", wait_seconds=wait, **about)

    def update_from_headers(self, permit: Permit, headers: Mapping[str, str]) -> None:
        """Learn from the headers of an answer whose body is still to come."""
        with self._lock:
            permit.queue.update_from_headers(permit.waiter, read_stated_limits(headers))
            self._pump(permit.queue)

    def _release(self, queue: ModelQueue, waiter: Waiter, outcome: Outcome) -> None:
        try:
            if waiter.granted and outcome.sent:
                queue.settle(waiter, outcome)
                self._learn(queue, waiter, outcome)
            else:
                queue.cancel(waiter)
        finally:
            self._pump(queue)

    def _learn(self, queue: ModelQueue, waiter: Waiter, outcome: Outcome) -> None:
        """Take over what the server says of its limits; after a 429, pause as long as it says."""
        failure = outcome.failure if outcome.is_rate_limit or outcome.is_overload else None
        if outcome.headers is None or (failure is None and not queue.is_news(waiter)):
            return
        stated = read_stated_limits(outcome.headers)
        queue.update_from_headers(waiter, stated)
        if failure is None:
            return
        wait, dimension = failure.wait or 0.0, failure.dimension
        if outcome.is_overload:  # fewer requests help, however many tokens they have
            wait, dimension = failure.wait or _OVERLOAD_PAUSE, "requests"
        else:
            self._refused[dimension or "unknown"] += 1
        queue.refused(waiter, dimension, wait, stated)
        if wait:
            queue.pause(wait)
        if wait > self.config.max_wait:
            self._fail_all(queue)

    def _queue_of(self, demand: Demand) -> ModelQueue:
        """Return the queue of a model, or of an endpoint that runs none."""
        model, name = demand.model, demand.model or demand.route
        queue = self._queues.get(name)
        if queue is not None:
            return queue
        if self._backend is None or model is None:
            queue = ModelQueue(model, self.config, self._clock)
        else:
            from openai_eval_client._limits.shared import SharedModelQueue  # an extra

            queue = SharedModelQueue(model, self.config, self._clock, self._backend, self._replied)
        if not self._bounded:
            queue.concurrency.limit = float("inf")
        self._queues[name] = queue
        return queue

    def _replied(self, queue: SharedModelQueue, reply: Any) -> None:
        """Take over a reply of the shared limits."""
        with self._lock:
            error = queue.take(reply)
            if error is not None or queue.pause_left() > self.config.max_wait:
                self._fail_all(queue, error)
            self._pump(queue)

    def _check(self, queue: ModelQueue, demand: Demand) -> None:
        """Turn a request away that would wait too long, or that the limit on tokens can never admit."""
        max_wait = self.config.max_wait
        if queue.pause_left() > max_wait:
            raise _too_long(queue, max_wait)
        tokens = demand.input_tokens + (demand.max_output or 0)  # what is known of it, without guesses
        limit = queue.tokens.too_small_for(tokens, max_wait)
        if limit is not None:
            raise RequestTooLargeError(str(queue.model), tokens=tokens, limit=limit)

    def _pump(self, queue: ModelQueue) -> None:
        """Grant all that can go; where only time can help the next, set the timers."""
        while (waiter := queue.grant_next()) is not None:
            if not call_on(waiter.owner, self._starts.wake, waiter.future):
                queue.cancel(waiter)
        delay = queue.next_in()
        for owner in list(queue.waiting):
            self._set_timer(queue, owner, _LOOK_AGAIN if delay is None else max(delay, _SHORTEST_TIMER))

    def _set_timer(self, queue: ModelQueue, loop: asyncio.AbstractEventLoop, delay: float) -> None:
        """Have `loop` look at the queue again in `delay` seconds at the latest."""
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
        idle = queue.idle_for()
        if idle:
            self._reclaim()
        if idle > self.config.max_wait:
            queue.moved_at += idle  # once in that time
            text = (
                "%s: for %.0f s no request has begun or ended: all wait for the end of %d that are in flight"
            )
            about = {"wait_seconds": idle, "model": queue.model}
            warn(text, queue.model, idle, queue.concurrency.in_flight, event="nothing_moves", **about)
        with self._lock:
            handle = self._timers.pop((queue, loop), None)
            if handle is not None:
                handle.cancel()
            self._pump(queue)

    def _fail_all(self, queue: ModelQueue, reason: Exception | None = None) -> None:
        for waiter in queue.waiters():
            queue.cancel(waiter)
            waiter.wake(_too_long(queue, self.config.max_wait) if reason is None else copy.copy(reason))


def _too_long(queue: ModelQueue, max_wait: float) -> RateLimitError:
    """Return the error for a wait longer than `max_wait` seconds, with the time when it is over."""
    left = queue.pause_left()
    back = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() + left))
    waits = f"rate limited for {left:.0f} s, more than max_wait={max_wait:g} s"
    return rate_limited(f"{queue.model}: {waits}; come back at {back}", left)
