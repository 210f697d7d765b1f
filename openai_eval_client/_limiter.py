"""Who may send next: token buckets on aiolimiter, and the gate that admits one ticket at a time.

Nothing here waits, sleeps or knows an event loop; time comes from a clock, so every decision can be tested
without one. `_governor.py` does the waiting.
"""

from __future__ import annotations

import enum
import heapq
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from openai_eval_client._belief import Belief
from openai_eval_client._bucket import MINUTE, Bucket
from openai_eval_client._headers import DIMENSIONS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from openai_eval_client._belief import Mark
    from openai_eval_client._bucket import Clock
    from openai_eval_client._headers import Quota
    from openai_eval_client.config import RateLimitConfig

MARGIN = 0.25  # seconds of quota left unused: requests travel at different speeds, so some arrive early
MARGIN_SHARE = 0.1  # of the bucket, at most
FIRST_OUTPUT_GUESS = 256.0  # tokens reserved for an answer while none of this model has been seen
_OUTPUT_MEMORY = 100  # answers that the running mean of the output length looks back on


class Budget:
    """One dimension of a model's limit: what the user configured, and what the server is believed to keep.

    An estimate that was too high is given back to the configured bucket only: servers that charge
    `max_tokens` up front do not give it back.

    Args:
        per_minute: The configured limit; None: only what the server is believed to keep.
        config: How long its bucket is, and whether to heed the server at all.
        clock: Where the time comes from.
    """

    def __init__(self, per_minute: int | None, config: RateLimitConfig, clock: Clock) -> None:
        rate = per_minute / MINUTE if per_minute else None
        margin = min(MARGIN, config.burst_seconds * MARGIN_SHARE)
        capacity = max((rate or 0.0) * (config.burst_seconds - margin), 1.0)
        self._configured = Bucket(rate, capacity, clock) if rate else None
        self._server = Belief(rate, capacity, clock) if config.adaptive_throttling else None

    def ready_in(self, amount: float) -> float:
        """Return the seconds until `amount` may be spent."""
        configured = self._configured.ready_in(amount) if self._configured is not None else 0.0
        return max(configured, self._server.ready_in(amount)) if self._server is not None else configured

    def too_small_for(self, amount: float, max_wait: float) -> int | None:
        """Return the limit per minute that can never admit `amount`; None where one can, or there is none.

        The server admits no more than its own limit at once. The configured one may be exceeded, at the
        cost of a debt that those behind wait for: up to `max_wait` seconds' worth.
        """
        server = self._server.limit if self._server is not None else None
        if server is not None and amount > server:
            return server
        bucket = self._configured
        if bucket is None or amount <= bucket.max_rate + bucket.rate * max_wait:
            return None
        return round(bucket.rate * MINUTE)

    def charge(self, amount: float) -> Mark | None:
        """Spend `amount`, or take the whole of it back where negative."""
        if self._configured is not None:
            self._configured.charge(amount)
        return self._server.charge(amount) if self._server is not None else None

    def settle(self, reserved: float, actual: float) -> None:
        """Replace what was reserved by what it came to."""
        if self._configured is not None:
            self._configured.charge(actual - reserved)
        if self._server is not None and actual > reserved:
            self._server.owe(actual - reserved)

    def passed(self, amount: float) -> None:
        """Learn that the server served what was reserved."""
        if self._server is not None:
            self._server.passed(amount)

    def refused(self, amount: float, mark: Mark | None, wait: float) -> None:
        """Learn that this limit is why the server refused."""
        if self._server is not None and mark is not None:
            self._server.refused(amount, mark, wait)

    def hear(self, quota: Quota, mark: Mark | None) -> None:
        """Heed an answer's headers."""
        if self._server is not None and mark is not None:
            self._server.hear(quota, mark)


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
        marks: Where the budgets of requests and of tokens stood then.
    """

    turn: int
    tokens: float
    lane: Lane
    asked_at: float
    owner: Any = None
    waiter: Any = None
    state: State = State.WAITING
    granted_at: float = 0.0
    marks: tuple[Mark | None, Mark | None] = (None, None)

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

    def served(self, ticket: Ticket) -> None:
        """Learn that the server had room for this ticket."""
        self.requests.passed(1)
        self.tokens.passed(ticket.tokens)

    def refused(self, ticket: Ticket, dimension: str | None, wait: float) -> None:
        """Learn that the server had no room for this ticket: in "requests", "tokens", or it did not say."""
        if dimension != "tokens":
            self.requests.refused(1, ticket.marks[0], wait)
        if dimension != "requests":
            self.tokens.refused(ticket.tokens, ticket.marks[1], wait)

    def hear(self, ticket: Ticket, quotas: Mapping[str, Quota]) -> None:
        """Heed the limits that the answer to this ticket states."""
        for dimension, budget, mark in zip(
            DIMENSIONS, (self.requests, self.tokens), ticket.marks, strict=True
        ):
            if dimension in quotas:
                budget.hear(quotas[dimension], mark)

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
        ticket.marks = self.requests.charge(1), self.tokens.charge(ticket.tokens)
        ticket.lane.in_flight += 1
        ticket.state = State.GRANTED
        ticket.granted_at = self._clock.time()

    def _left(self, ticket: Ticket) -> None:
        self.waiting[ticket.owner] -= 1
        if not self.waiting[ticket.owner]:
            del self.waiting[ticket.owner]
