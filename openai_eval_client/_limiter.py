"""Who may send next: token buckets on aiolimiter, and the gate that admits one ticket at a time.

Nothing here waits, sleeps or knows an event loop; time comes from a clock, so every decision can be tested
without one. `_governor.py` does the waiting.
"""

from __future__ import annotations

import enum
import heapq
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from aiolimiter import AsyncLimiter

if TYPE_CHECKING:
    from collections.abc import Iterator

    from openai_eval_client._headers import Quota
    from openai_eval_client.config import RateLimitConfig

MINUTE = 60.0
FIRST_OUTPUT_GUESS = 256.0  # tokens reserved for an answer while none of this model has been seen
_OUTPUT_MEMORY = 100  # answers that the running mean of the output length looks back on
_ROUNDING = 1e-9  # part of the capacity; far below one token, far above float error


class Clock(Protocol):
    """Where the time comes from, in seconds that never go back."""

    def time(self) -> float:
        """Return the time now."""
        ...


class Bucket(AsyncLimiter):
    """aiolimiter's leaky bucket, asked instead of awaited.

    Its `_loop` only serves as its clock, so one bucket serves every event loop and thread; and its level may
    go above the capacity (a debt, after a request larger than the bucket) or be given back.

    Args:
        per_minute: The rate.
        seconds: The capacity, as seconds of that rate; never less than one unit.
        clock: Where the time comes from.
    """

    def __init__(self, per_minute: float, seconds: float, clock: Clock) -> None:
        capacity = max(per_minute / MINUTE * seconds, 1.0)
        super().__init__(capacity, capacity / per_minute * MINUTE)
        self._clock = clock

    @property
    def _loop(self) -> Any:
        return self._clock

    def ready_in(self, amount: float) -> float:
        """Return the seconds until `amount` fits, or until the bucket is full where it never can."""
        self._leak()
        missing = self._level + min(amount, self.max_rate) - self.max_rate
        return missing / self._rate_per_sec if missing > self.max_rate * _ROUNDING else 0.0

    def charge(self, amount: float) -> None:
        """Take `amount`, or give it back where negative; never more than there was to give."""
        self._leak()
        self._level = max(0.0, self._level + amount)

    def lower_to(self, remaining: float) -> None:
        """Believe that no more than `remaining` is left."""
        self._leak()
        self._level = max(self._level, self.max_rate - remaining)


class Budget:
    """One dimension of a model's limit: what the user configured, and what the server says of its own.

    An estimate that was too high is given back to the configured bucket only: servers that charge
    `max_tokens` up front do not give it back.
    """

    def __init__(self, per_minute: float | None, config: RateLimitConfig, clock: Clock) -> None:
        self._clock = clock
        self._listens = config.adaptive_throttling or per_minute is None
        self._configured = Bucket(per_minute, config.burst_seconds, clock) if per_minute else None
        self._server: Bucket | None = None
        self._server_limit: int | None = None

    def ready_in(self, amount: float) -> float:
        """Return the seconds until `amount` may be spent."""
        return max((bucket.ready_in(amount) for bucket in self._buckets()), default=0.0)

    def charge(self, amount: float) -> None:
        """Spend `amount`, or take the whole of an unsent request back where negative."""
        for bucket in self._buckets():
            bucket.charge(amount)

    def settle(self, reserved: float, actual: float) -> None:
        """Replace what was reserved by what it came to."""
        if self._configured is not None:
            self._configured.charge(actual - reserved)
        if self._server is not None and actual > reserved:
            self._server.charge(actual - reserved)

    def learn(self, quota: Quota) -> None:
        """Take over the server's limit, and what it says is left of it where that is less than believed."""
        if not self._listens:
            return
        if self._server is None or quota.limit != self._server_limit:
            self._server = Bucket(quota.limit, MINUTE, self._clock)
            self._server_limit = quota.limit
        self._server.lower_to(quota.remaining)

    def _buckets(self) -> Iterator[Bucket]:
        if self._configured is not None:
            yield self._configured
        if self._server is not None:
            yield self._server


class State(enum.Enum):
    """Where a ticket is."""

    WAITING = enum.auto()
    GRANTED = enum.auto()
    DONE = enum.auto()


@dataclass(slots=True, eq=False)
class Lane:
    """A bound on concurrency: the model's own, or that of one call which brought its own.

    Attributes:
        limit: Requests in flight at once.
        in_flight: How many there are.
        queue: Heap of waiting tickets; those no longer waiting are dropped when they come up.
    """

    limit: float
    in_flight: int = 0
    queue: list[Ticket] = field(default_factory=list)

    def first(self) -> Ticket | None:
        """Return the ticket whose turn is next, where there is room for it."""
        while self.queue and self.queue[0].state is not State.WAITING:
            heapq.heappop(self.queue)
        return self.queue[0] if self.queue and self.in_flight < self.limit else None


@dataclass(slots=True, eq=False)
class Ticket:
    """One HTTP attempt's place in the queue, and what is reserved for it.

    Attributes:
        turn: Its number; a retry comes back with its old one.
        tokens: What it reserves.
        lane: The concurrency bound it runs under.
        asked_at: Clock time at which it queued.
        owner: The event loop that waits for it, None where nobody had to wait.
        waiter: The future to resolve.
        state: Where it is.
        granted_at: Clock time at which it was admitted.
    """

    turn: int
    tokens: float
    lane: Lane
    asked_at: float
    owner: Any = None
    waiter: Any = None
    state: State = State.WAITING
    granted_at: float = 0.0

    def __lt__(self, other: Ticket) -> bool:
        return self.turn < other.turn


class Gate:
    """Admission to one model: first come, first served within both budgets and the concurrency bound.

    A ticket whose lane is full lets the tickets of other lanes pass; one that waits for budget does not, so a
    large request cannot starve behind small ones. One larger than the bucket goes when the bucket is full.

    Args:
        model: Whose limits these are; None: no budget, only the concurrency bound.
        config: The limits.
        clock: Where the time comes from.
    """

    def __init__(self, model: str | None, config: RateLimitConfig, clock: Clock) -> None:
        self.model = model
        self._clock = clock
        self.requests = Budget(config.requests_per_minute if model else None, config, clock)
        self.tokens = Budget(config.tokens_per_minute if model else None, config, clock)
        self.lane = Lane(config.max_concurrent)
        self.waiting: Counter[Any] = Counter()
        self.expected_output = FIRST_OUTPUT_GUESS
        self._answers = 0
        self._lanes = [self.lane]
        self._paused_until = float("-inf")

    def enqueue(self, ticket: Ticket) -> None:
        """Put a ticket in the queue, at the place of its turn."""
        if not ticket.lane.queue and ticket.lane not in self._lanes:
            self._lanes.append(ticket.lane)
        heapq.heappush(ticket.lane.queue, ticket)
        self.waiting[ticket.owner] += 1

    def grant_next(self) -> Ticket | None:
        """Admit the ticket whose turn it is, if it can go now."""
        ticket = self._head()
        if ticket is None or self._ready_in(ticket) > 0:
            return None
        heapq.heappop(ticket.lane.queue)
        self._left(ticket)
        self._admit(ticket)
        return ticket

    def try_grant(self, ticket: Ticket) -> bool:
        """Admit a new ticket at once, if nobody waits and it can go now."""
        free = not self.waiting and ticket.lane.in_flight < ticket.lane.limit
        if free and self._ready_in(ticket) <= 0:
            self._admit(ticket)
            return True
        return False

    def next_in(self) -> float | None:
        """Return the seconds until the next ticket can go; None where time alone lets nobody go."""
        ticket = self._head()
        return None if ticket is None else self._ready_in(ticket)

    def withdraw(self, ticket: Ticket) -> None:
        """Take back a ticket that was not sent: out of the queue, or its reservation and slot."""
        if ticket.state is State.WAITING:
            self._left(ticket)
        elif ticket.state is State.GRANTED:
            self.requests.charge(-1)
            self.tokens.charge(-ticket.tokens)
            ticket.lane.in_flight -= 1
        ticket.state = State.DONE

    def settle(self, ticket: Ticket, tokens: float | None) -> None:
        """Free the ticket's slot and replace its estimate by `tokens`, where they are known."""
        ticket.state = State.DONE
        ticket.lane.in_flight -= 1
        if tokens is not None:
            self.tokens.settle(ticket.tokens, tokens)

    def observe_output(self, tokens: int) -> None:
        """Learn how long this model's answers are: a running mean over the latest ones."""
        self._answers = min(self._answers + 1, _OUTPUT_MEMORY)
        self.expected_output += (tokens - self.expected_output) / self._answers

    def pause(self, seconds: float) -> None:
        """Let nobody go for that long, as the server asked."""
        self._paused_until = max(self._paused_until, self._clock.time() + seconds)

    def pause_left(self) -> float:
        """Return the seconds that the server's pause still lasts, 0 where there is none."""
        return max(0.0, self._paused_until - self._clock.time())

    def waiters(self, owner: Any = None) -> list[Ticket]:
        """Return all waiting tickets, or those of one owner."""
        queued = (ticket for lane in self._lanes for ticket in sorted(lane.queue))
        return [t for t in queued if t.state is State.WAITING and owner in (None, t.owner)]

    def _head(self) -> Ticket | None:
        if len(self._lanes) == 1:
            return self.lane.first()
        self._lanes = [lane for lane in self._lanes if lane.queue or lane is self.lane]
        heads = [head for lane in self._lanes if (head := lane.first()) is not None]
        return min(heads, key=lambda ticket: ticket.turn, default=None)

    def _ready_in(self, ticket: Ticket) -> float:
        return max(self.pause_left(), self.requests.ready_in(1), self.tokens.ready_in(ticket.tokens))

    def _admit(self, ticket: Ticket) -> None:
        self.requests.charge(1)
        self.tokens.charge(ticket.tokens)
        ticket.lane.in_flight += 1
        ticket.state = State.GRANTED
        ticket.granted_at = self._clock.time()

    def _left(self, ticket: Ticket) -> None:
        self.waiting[ticket.owner] -= 1
        if not self.waiting[ticket.owner]:
            del self.waiting[ticket.owner]
