"""The queue of one model: which request goes next, and when."""

from __future__ import annotations

import enum
import heapq
import itertools
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from openai_eval_client._limits.buckets import Quota
from openai_eval_client._wire import DIMENSIONS

if TYPE_CHECKING:
    from collections.abc import Collection, Container, Mapping

    from openai_eval_client._limits.buckets import Clock, Limit, Sent
    from openai_eval_client._wire import StatedLimit
    from openai_eval_client.config import RateLimitConfig


class State(enum.Enum):
    """Where a waiter is."""

    WAITING = enum.auto()
    GRANTED = enum.auto()
    DONE = enum.auto()


@dataclass(slots=True, eq=False)
class ConcurrencyLimit:
    """A bound on concurrency: the model's own, or that of one call which brought its own."""

    limit: float  # requests in flight at once
    in_flight: int = 0  # how many there are
    # heap of waiting waiters; those no longer waiting are dropped when they come up
    queue: list[Waiter] = field(default_factory=list)

    def first(self) -> Waiter | None:
        """Return the waiter whose turn is next, where there is room for it."""
        while self.queue and self.queue[0].state is not State.WAITING:
            heapq.heappop(self.queue)
        return self.queue[0] if self.queue and self.in_flight < self.limit else None


@dataclass(slots=True, eq=False)
class Waiter:
    """One HTTP attempt's place in the queue, and what is reserved for it."""

    turn: int  # its number; a retry comes back with its old one
    tokens: float  # what it reserves
    concurrency: ConcurrencyLimit  # the concurrency bound it runs under
    asked_at: float  # clock time at which it queued
    owner: Any = None  # the event loop that waits for it, None where nobody had to wait
    future: Any = None  # the future to resolve
    state: State = State.WAITING  # where it is
    granted_at: float = 0.0  # clock time at which it was admitted; once it has begun, at which it began
    ended_at: float = 0.0  # clock time at which it was settled
    # where the quotas of requests and of tokens stood then
    marks: tuple[Sent | None, Sent | None] = (None, None)

    def __lt__(self, other: Waiter) -> bool:
        return self.turn < other.turn


FIRST_OUTPUT_GUESS = 256.0  # tokens reserved for an answer while none of this model has been seen
_OUTPUT_MEMORY = 100  # answers that the running mean of the output length looks back on


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What holds for one model, and what it waited for."""

    model: str  # which
    requests: Limit  # its limit on requests
    tokens: Limit  # its limit on tokens
    max_concurrent: float  # its bound on requests in flight; infinite where there is none
    waited: dict[str, float]  # seconds summed over those who waited, by what for
    # mean and spread of its latest answers, in tokens; empty before the first
    output_length: dict[str, float]


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
        self.concurrency = ConcurrencyLimit(config.max_concurrent)
        self.waiting: Counter[Any] = Counter()
        self.expected_output = FIRST_OUTPUT_GUESS
        self.waited: defaultdict[str, float] = defaultdict(float)
        self._answers = 0
        self._variance = 0.0
        self._cause = "concurrency"
        self._looked_at = clock.time()
        self._concurrency_limits = [self.concurrency]
        self._paused_until = float("-inf")

    def enqueue(self, waiter: Waiter) -> None:
        """Put a waiter in the queue, at the place of its turn."""
        self._count_waiting()
        if not waiter.concurrency.queue and waiter.concurrency not in self._concurrency_limits:
            self._concurrency_limits.append(waiter.concurrency)
        heapq.heappush(waiter.concurrency.queue, waiter)
        self.waiting[waiter.owner] += 1

    def grant_next(self) -> Waiter | None:
        """Admit the waiter whose turn it is, if it can go now."""
        waiter = self._head()
        if waiter is None or self._ready_in(waiter) > 0:
            return None
        heapq.heappop(waiter.concurrency.queue)
        self._left(waiter)
        self._admit(waiter)
        return waiter

    def try_grant(self, waiter: Waiter) -> bool:
        """Admit a new waiter at once, if nobody waits and it can go now."""
        free = not self.waiting and waiter.concurrency.in_flight < waiter.concurrency.limit
        if free and self._ready_in(waiter) <= 0:
            self._admit(waiter)
            return True
        return False

    def next_in(self) -> float | None:
        """Return the seconds until the next waiter can go; None where time alone lets nobody go."""
        waiter = self._head()
        if waiter is None:
            self._cause = "concurrency"
            return None
        delay, self._cause = self._held_up(waiter)
        return delay

    def cancel(self, waiter: Waiter) -> None:
        """Take back a waiter that was not sent: out of the queue, or its reservation and slot."""
        if waiter.state is State.WAITING:
            self._left(waiter)
        elif waiter.state is State.GRANTED:
            self.requests.charge(-1)
            self.tokens.charge(-waiter.tokens)
            waiter.concurrency.in_flight -= 1
        waiter.state = State.DONE

    def settle(self, waiter: Waiter, tokens: float | None) -> None:
        """Free the waiter's slot and replace its estimate by `tokens`, where they are known."""
        waiter.state = State.DONE
        waiter.concurrency.in_flight -= 1
        if tokens is not None:
            self.tokens.settle(waiter.tokens, tokens)

    def on_success(self, waiter: Waiter) -> None:
        """Learn that the server had room for this waiter."""
        self.requests.on_success(1)
        self.tokens.on_success(waiter.tokens)

    def rejected(self, waiter: Waiter) -> None:
        """Learn that the server refused this waiter for good, and so did not count its tokens."""
        self.tokens.refund(waiter.tokens)

    def refused(self, waiter: Waiter, dimension: str | None, wait: float, spoken: Container[str]) -> None:
        """Learn that the server had no room for this waiter: in "requests", "tokens", or it did not say."""
        # `spoken` holds the dimensions of which its headers said what is left.
        if dimension != "tokens":
            self.requests.refused(1, waiter.marks[0], wait, spoke="requests" in spoken)
        if dimension != "requests":
            self.tokens.refused(waiter.tokens, waiter.marks[1], wait, spoke="tokens" in spoken)

    def is_news(self, waiter: Waiter) -> bool:  # whichever it is
        """Return whether what the answer to this waiter states is pending: no fresher one has said it."""
        requests, tokens = waiter.marks
        return self.requests.is_news(requests) or self.tokens.is_news(tokens)

    def update_from_headers(self, waiter: Waiter, stated: Mapping[str, StatedLimit]) -> None:
        """Heed the limits that the answer to this waiter states."""
        for dimension, quota, mark in zip(
            DIMENSIONS,
            (self.requests, self.tokens),
            waiter.marks,
            strict=True,
        ):
            if dimension in stated:
                quota.update_from_headers(stated[dimension], mark)

    def gauge(self) -> LimitStatus:
        """Return where the limits stand."""
        quotas = {"requests": self.requests, "tokens": self.tokens}
        spent = {name: quota.spent for name, quota in quotas.items()}
        limits = {name: quota.limit().per_minute for name, quota in quotas.items()}
        head = self._head()
        seconds, cause = (0.0, "concurrency") if head is None else self._held_up(head)
        return LimitStatus(spent, limits, sum(self.waiting.values()), cause, seconds)

    def leave(self) -> dict[str, Any] | None:
        """Return what others have to be told in the end: nothing, where nothing is shared."""
        return None

    def utilisation(self) -> dict[str, float]:
        """Return the used share of what each limit has admitted since the first request, 0 to 1."""
        shares = {"requests": self.requests.used_share(), "tokens": self.tokens.used_share()}
        return {dimension: share for dimension, share in shares.items() if share is not None}

    def observe_output(self, tokens: int) -> None:
        """Learn how long this model's answers are: mean and variance over the latest ones, as they run."""
        self._answers = min(self._answers + 1, _OUTPUT_MEMORY)
        off = tokens - self.expected_output
        self.expected_output += off / self._answers
        self._variance += (off * (tokens - self.expected_output) - self._variance) / self._answers

    def output_length(self) -> dict[str, float]:
        """Return mean and standard deviation of the latest answers, in tokens; empty before the first."""
        return {"mean": self.expected_output, "spread": self._variance**0.5} if self._answers else {}

    def facts(self) -> ModelLimits:
        """Return what a report says of this model."""
        limits = self.requests.limit(), self.tokens.limit()
        waited, output = dict(self.waited), self.output_length()
        return ModelLimits(str(self.model), *limits, self.concurrency.limit, waited, output)

    def pause(self, seconds: float) -> None:
        """Let nobody go for that long, as the server asked."""
        self._paused_until = max(self._paused_until, self._clock.time() + seconds)

    def pause_left(self) -> float:
        """Return the seconds that the server's pause still lasts, 0 where there is none."""
        return max(0.0, self._paused_until - self._clock.time())

    def waiters(self, owner: Any = None) -> list[Waiter]:
        """Return all waiting waiters, or those of one owner."""
        queued = (waiter for concurrency in self._concurrency_limits for waiter in sorted(concurrency.queue))
        return [t for t in queued if t.state is State.WAITING and owner in (None, t.owner)]

    def _head(self) -> Waiter | None:
        if len(self._concurrency_limits) == 1:
            return self.concurrency.first()
        heads = [head for concurrency in self._limits_in_use() if (head := concurrency.first()) is not None]
        return min(heads, key=lambda waiter: waiter.turn, default=None)

    def _limits_in_use(self) -> list[ConcurrencyLimit]:
        self._concurrency_limits = [
            concurrency
            for concurrency in self._concurrency_limits
            if concurrency.queue or concurrency is self.concurrency
        ]
        return self._concurrency_limits

    def _ready_in(self, waiter: Waiter) -> float:
        return self._held_up(waiter)[0]

    def _held_up(self, waiter: Waiter) -> tuple[float, str]:
        """Return the seconds until a waiter can go, and what it waits for."""
        paused = self.pause_left()
        delay, cause = max(
            (self.requests.ready_in(1), "requests"),
            (self.tokens.ready_in(waiter.tokens), "tokens"),
        )
        return max(delay, paused), "pause" if paused else cause

    def _count_waiting(self) -> None:
        """Add the time since the last look, once for each who waits, to what they wait for."""
        now = self._clock.time()
        if self.waiting:
            self.waited[self._cause] += (now - self._looked_at) * sum(self.waiting.values())
        self._looked_at = now

    def _admit(self, waiter: Waiter) -> None:
        waiter.marks = self.requests.charge(1), self.tokens.charge(waiter.tokens)
        waiter.concurrency.in_flight += 1
        waiter.state = State.GRANTED
        waiter.granted_at = self._clock.time()

    def _left(self, waiter: Waiter) -> None:
        self._count_waiting()
        self.waiting[waiter.owner] -= 1
        if not self.waiting[waiter.owner]:
            del self.waiting[waiter.owner]


def describe(queues: Collection[ModelQueue]) -> dict[str, dict[str, Any]]:
    """Return what `ClientStats` says of queues."""
    waited: defaultdict[str, float] = defaultdict(float)
    for cause, seconds in itertools.chain(*(queue.waited.items() for queue in queues)):
        waited[cause] += seconds
    models = {queue.model: queue for queue in queues if queue.model is not None}
    return {
        "wait_seconds_by": dict(waited),
        "utilisation": {model: queue.utilisation() for model, queue in models.items()},
        "output_length": {model: queue.output_length() for model, queue in models.items()},
    }


class LimitStatus(NamedTuple):
    """Where a model's limits stand."""

    spent: dict[str, float]  # requests and tokens admitted since the client began
    limits: dict[str, float | None]  # what may be per minute of each, None where no limit is known
    waiting: int  # how many requests wait
    cause: str  # what the next one waits for: "requests", "tokens", "pause" or "concurrency"
    seconds: float  # how long it will
