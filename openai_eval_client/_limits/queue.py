"""The queue of one model: which request goes next, and when."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from openai_eval_client._limits.buckets import Quota
from openai_eval_client._runtime import FairQueue, Queued
from openai_eval_client._wire import DIMENSIONS

if TYPE_CHECKING:
    from collections.abc import Container, Mapping

    from openai_eval_client._limits.buckets import Clock, Limit, Sent
    from openai_eval_client._wire import Outcome, StatedLimit
    from openai_eval_client.config import RateLimitConfig

Position = tuple[float, float]  # what had been reserved in each dimension before a waiter


@dataclass(slots=True, eq=False)
class ConcurrencyLimit:
    """A bound on concurrency: the model's own, or that of one call which brought its own."""

    limit: float
    in_flight: int = 0
    queue: FairQueue[Waiter] = field(default_factory=FairQueue)

    def first(self) -> Waiter | None:
        """Return the waiter whose turn is next, if there is room for it."""
        return self.queue.first() if self.in_flight < self.limit else None


@dataclass(slots=True, eq=False)
class Waiter(Queued):
    """One HTTP attempt in the queue, and what is reserved for it."""

    turn: int  # a retry comes back with the turn of the first attempt
    tokens: float  # what it reserves
    concurrency: ConcurrencyLimit
    asked_at: float  # clock time at which it was queued
    owner: Any = None  # the event loop that waits for it; None where it was granted at once
    granted: bool = False  # and neither cancelled nor settled since
    granted_at: float = 0.0  # clock time at which it was granted, later at which it began
    ended_at: float = 0.0  # clock time at which it was settled
    sent: tuple[Sent, ...] = ()  # for each dimension, once it is granted
    position: Position | None = None  # in the shared state; None where that does not count it


FIRST_OUTPUT_GUESS = 256.0  # tokens reserved for the output until a first answer of this model is known
_OUTPUT_MEMORY = 100  # answers over which the mean of the output length runs


class ModelLimits(NamedTuple):
    """What holds for one model, and what its requests waited for."""

    model: str
    requests: Limit
    tokens: Limit
    max_concurrent: float  # infinite where there is no bound
    waited: dict[str, float]  # seconds, summed over all requests, by what they waited for
    output_length: dict[str, float]  # tokens: mean and spread of its latest answers; empty before the first


class LimitStatus(NamedTuple):
    """Where a model's limits stand."""

    spent: dict[str, float]  # requests and tokens admitted since the client began
    limits: dict[str, float | None]  # per minute of each; None where no limit is known
    waiting: int  # requests
    cause: str  # what the next one waits for: "requests", "tokens", "pause" or "concurrency"
    seconds: float  # how long it will


class ModelQueue:
    """The queue of one model: first come, first served within both quotas and the concurrency bound.

    A waiter whose concurrency limit is reached lets those of other limits pass; one that waits for quota does
    not, so a large request cannot starve behind small ones. One larger than the bucket goes when it is full.
    """

    def __init__(self, model: str | None, config: RateLimitConfig, clock: Clock) -> None:
        self.model = model
        self._clock = clock
        self.requests = Quota(config.requests_per_minute, config, clock, metered=model is not None)
        self.tokens = Quota(config.tokens_per_minute, config, clock, metered=model is not None)
        self._quotas = {"requests": self.requests, "tokens": self.tokens}
        self.concurrency = ConcurrencyLimit(config.max_concurrent)
        self._concurrency_limits = [self.concurrency]
        self._paused_until = float("-inf")
        self.waiting: Counter[Any] = Counter()  # requests by owner
        self.waited: defaultdict[str, float] = defaultdict(float)  # seconds by cause
        self._cause = "concurrency"
        self._counted_at = clock.time()  # until when `waited` is counted
        self.moved_at = clock.time()  # when a request began or ended last
        self.expected_output = FIRST_OUTPUT_GUESS
        self._answers = 0
        self._variance = 0.0

    def enqueue(self, waiter: Waiter) -> None:
        """Put a waiter in the queue, at the place of its turn."""
        self._count_waiting()
        if not waiter.concurrency.queue and waiter.concurrency not in self._concurrency_limits:
            self._concurrency_limits.append(waiter.concurrency)
        waiter.concurrency.queue.add(waiter.turn, waiter)
        self.waiting[waiter.owner] += 1

    def grant_next(self) -> Waiter | None:
        """Grant the waiter whose turn it is, if it can go now."""
        waiter = self._next()
        if waiter is None or self._ready_in(waiter)[0] > 0:
            return None
        self._stop_waiting(waiter)
        self._grant(waiter)
        return waiter

    def try_grant(self, waiter: Waiter) -> bool:
        """Grant a new waiter at once, if no other waits and it can go now."""
        free = not self.waiting and waiter.concurrency.in_flight < waiter.concurrency.limit
        if free and self._ready_in(waiter)[0] <= 0:
            self._grant(waiter)
            return True
        return False

    def next_in(self) -> float | None:
        """Return the seconds until the next waiter can go; None where time alone does not help."""
        waiter = self._next()
        delay, self._cause = (None, "concurrency") if waiter is None else self._ready_in(waiter)
        return delay

    def idle_for(self) -> float:
        """Return for how many seconds nothing has begun or ended while all wait for a slot; 0 for others."""
        return self._clock.time() - self.moved_at if self.waiting and self._next() is None else 0.0

    def cancel(self, waiter: Waiter) -> None:
        """Take back a waiter that was not sent: out of the queue, or its reservation and slot; once."""
        if waiter.waits:
            self._stop_waiting(waiter)
        elif waiter.granted:
            self.requests.charge(-1)
            self.tokens.charge(-waiter.tokens)
            self._leave(waiter)

    def settle(self, waiter: Waiter, outcome: Outcome) -> None:
        """Free the waiter's slot, replace its estimate by what it took, and learn from that."""
        self._leave(waiter)
        tokens = outcome.tokens
        if tokens is not None:
            self.tokens.settle(waiter.tokens, tokens)
        if outcome.ok:
            self.requests.server.on_success(1)
            self.tokens.server.on_success(waiter.tokens)
        elif outcome.is_refusal and not outcome.is_rate_limit:
            self.tokens.server.refund(waiter.tokens)
        if outcome.counted is not None:  # running mean and variance over the latest answers
            output = outcome.counted.completion_tokens
            self._answers = min(self._answers + 1, _OUTPUT_MEMORY)
            off = output - self.expected_output
            self.expected_output += off / self._answers
            self._variance += (off * (output - self.expected_output) - self._variance) / self._answers

    def refused(self, waiter: Waiter, dimension: str | None, wait: float, stated: Container[str]) -> None:
        """Learn that the server had no room for this waiter in a dimension (None: in which is unknown)."""
        # `stated` holds the dimensions of which the answer's headers say what is left.
        for name, sent in zip(DIMENSIONS, waiter.sent, strict=True):
            if dimension in {None, name}:
                self._quotas[name].refused(sent, wait, stated=name in stated)

    def is_news(self, waiter: Waiter) -> bool:
        """Return whether the headers of the answer to this waiter are worth reading."""
        requests, tokens = waiter.sent
        return self.requests.server.is_news(requests) or self.tokens.server.is_news(tokens)

    def update_from_headers(self, waiter: Waiter, stated: Mapping[str, StatedLimit]) -> None:
        """Take over the limits that the headers of the answer to this waiter state."""
        for name, sent in zip(DIMENSIONS, waiter.sent, strict=True):
            if name in stated:
                self._quotas[name].server.update_from_headers(stated[name], sent)

    def leave(self) -> None:
        """Send the last message to the shared state, where there is one."""

    def status(self) -> LimitStatus:
        """Return where the limits stand."""
        spent = {name: quota.spent for name, quota in self._quotas.items()}
        limits = {name: quota.limit().per_minute for name, quota in self._quotas.items()}
        waiter = self._next()
        seconds, cause = (0.0, "concurrency") if waiter is None else self._ready_in(waiter)
        return LimitStatus(spent, limits, sum(self.waiting.values()), cause, seconds)

    def limits(self) -> ModelLimits:
        """Return what holds for this model, and what its requests waited for."""
        limits = self.requests.limit(), self.tokens.limit(), self.concurrency.limit
        return ModelLimits(str(self.model), *limits, dict(self.waited), self.output_length())

    def utilisation(self) -> dict[str, float]:
        """Return the used share of what each limit has admitted since the first request, 0 to 1."""
        shares = {name: quota.used_share() for name, quota in self._quotas.items()}
        return {name: share for name, share in shares.items() if share is not None}

    def output_length(self) -> dict[str, float]:
        """Return mean and standard deviation of the latest answers, in tokens; empty before the first."""
        return {"mean": self.expected_output, "spread": self._variance**0.5} if self._answers else {}

    def pause(self, seconds: float) -> None:
        """Grant nothing for that long, as the server asked."""
        self._paused_until = max(self._paused_until, self._clock.time() + seconds)

    def pause_left(self) -> float:
        """Return the seconds that the server's pause still lasts, 0 where there is none."""
        return max(0.0, self._paused_until - self._clock.time())

    def waiters(self, owner: Any = None) -> list[Waiter]:
        """Return all that wait, or those of one owner."""
        queued = (waiter for limit in self._concurrency_limits for waiter in limit.queue.waiting())
        return [waiter for waiter in queued if owner in (None, waiter.owner)]

    def _next(self) -> Waiter | None:
        """Return the waiter whose turn is next, among those with room in their concurrency limit."""
        if len(self._concurrency_limits) == 1:
            return self.concurrency.first()
        firsts = [first for limit in self._limits_in_use() if (first := limit.first()) is not None]
        return min(firsts, key=lambda waiter: waiter.turn, default=None)

    def _limits_in_use(self) -> list[ConcurrencyLimit]:
        limits = [each for each in self._concurrency_limits if each.queue or each is self.concurrency]
        self._concurrency_limits = limits
        return limits

    def _ready_in(self, waiter: Waiter) -> tuple[float, str]:
        """Return the seconds until a waiter can go, and what it waits for."""
        paused = self.pause_left()
        requests = self.requests.ready_in(1), "requests"
        delay, cause = max(requests, (self.tokens.ready_in(waiter.tokens), "tokens"))
        return max(delay, paused), "pause" if paused else cause

    def _count_waiting(self) -> None:
        """Add the time since the last count, once for each waiter, to what they wait for."""
        now = self._clock.time()
        if self.waiting:
            self.waited[self._cause] += (now - self._counted_at) * sum(self.waiting.values())
        self._counted_at = now

    def _stop_waiting(self, waiter: Waiter) -> None:
        self._count_waiting()
        waiter.waits = False
        self.waiting[waiter.owner] -= 1
        if not self.waiting[waiter.owner]:
            del self.waiting[waiter.owner]

    def _grant(self, waiter: Waiter) -> None:
        waiter.sent = self.requests.charge(1), self.tokens.charge(waiter.tokens)
        waiter.concurrency.in_flight += 1
        waiter.granted = True
        waiter.granted_at = self.moved_at = self._clock.time()

    def _leave(self, waiter: Waiter) -> None:
        """Free the slot."""
        waiter.granted = False
        waiter.concurrency.in_flight -= 1
        self.moved_at = self._clock.time()
