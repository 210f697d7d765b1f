"""The queue of one model: which request goes next, and when."""

from __future__ import annotations

import enum
import heapq
import itertools
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from openai_eval_client._limits.buckets import Budget
from openai_eval_client._wire import DIMENSIONS

if TYPE_CHECKING:
    from collections.abc import Collection, Container, Mapping

    from openai_eval_client._limits.buckets import Clock, Limit, Mark
    from openai_eval_client._wire import Quota
    from openai_eval_client.config import RateLimitConfig


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
        granted_at: Clock time at which it was admitted; once it has begun, at which it began.
        ended_at: Clock time at which it was settled.
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
    ended_at: float = 0.0
    marks: tuple[Mark | None, Mark | None] = (None, None)

    def __lt__(self, other: Ticket) -> bool:
        return self.turn < other.turn


FIRST_OUTPUT_GUESS = 256.0  # tokens reserved for an answer while none of this model has been seen
_OUTPUT_MEMORY = 100  # answers that the running mean of the output length looks back on


@dataclass(frozen=True, slots=True)
class Facts:
    """What holds for one model, and what it waited for.

    Attributes:
        model: Which.
        requests: Its limit on requests.
        tokens: Its limit on tokens.
        max_concurrent: Its bound on requests in flight; infinite where there is none.
        waited: Seconds summed over those who waited, by what for.
        output_length: Mean and spread of its latest answers, in tokens; empty before the first.
    """

    model: str
    requests: Limit
    tokens: Limit
    max_concurrent: float
    waited: dict[str, float]
    output_length: dict[str, float]


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
        self.requests = Budget(config.requests_per_minute, config, clock, metered=model is not None)
        self.tokens = Budget(config.tokens_per_minute, config, clock, metered=model is not None)
        self.lane = Lane(config.max_concurrent)
        self.waiting: Counter[Any] = Counter()
        self.expected_output = FIRST_OUTPUT_GUESS
        self.waited: defaultdict[str, float] = defaultdict(float)
        self._answers = 0
        self._variance = 0.0
        self._cause = "concurrency"
        self._looked_at = clock.time()
        self._lanes = [self.lane]
        self._paused_until = float("-inf")

    def enqueue(self, ticket: Ticket) -> None:
        """Put a ticket in the queue, at the place of its turn."""
        self._count_waiting()
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
        if ticket is None:
            self._cause = "concurrency"
            return None
        delay, self._cause = self._held_up(ticket)
        return delay

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

    def rejected(self, ticket: Ticket) -> None:
        """Learn that the server refused this ticket for good, and so did not count its tokens."""
        self.tokens.give_back(ticket.tokens)

    def refused(self, ticket: Ticket, dimension: str | None, wait: float, spoken: Container[str]) -> None:
        """Learn that the server had no room for this ticket: in "requests", "tokens", or it did not say.

        `spoken` holds the dimensions of which its headers said what is left.
        """
        if dimension != "tokens":
            self.requests.refused(1, ticket.marks[0], wait, spoke="requests" in spoken)
        if dimension != "requests":
            self.tokens.refused(ticket.tokens, ticket.marks[1], wait, spoke="tokens" in spoken)

    def heeds(self, ticket: Ticket) -> bool:  # whichever it is
        """Return whether what the answer to this ticket states is news: no fresher one has said it."""
        requests, tokens = ticket.marks
        return self.requests.heeds(requests) or self.tokens.heeds(tokens)

    def hear(self, ticket: Ticket, quotas: Mapping[str, Quota]) -> None:
        """Heed the limits that the answer to this ticket states."""
        for dimension, budget, mark in zip(
            DIMENSIONS,
            (self.requests, self.tokens),
            ticket.marks,
            strict=True,
        ):
            if dimension in quotas:
                budget.hear(quotas[dimension], mark)

    def gauge(self) -> Gauge:
        """Return where the limits stand."""
        budgets = {"requests": self.requests, "tokens": self.tokens}
        spent = {name: budget.spent for name, budget in budgets.items()}
        limits = {name: budget.limit().per_minute for name, budget in budgets.items()}
        head = self._head()
        seconds, cause = (0.0, "concurrency") if head is None else self._held_up(head)
        return Gauge(spent, limits, sum(self.waiting.values()), cause, seconds)

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

    def facts(self) -> Facts:
        """Return what a report says of this model."""
        limits = self.requests.limit(), self.tokens.limit()
        waited, output = dict(self.waited), self.output_length()
        return Facts(str(self.model), *limits, self.lane.limit, waited, output)

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
        heads = [head for lane in self._lanes_in_use() if (head := lane.first()) is not None]
        return min(heads, key=lambda ticket: ticket.turn, default=None)

    def _lanes_in_use(self) -> list[Lane]:
        self._lanes = [lane for lane in self._lanes if lane.queue or lane is self.lane]
        return self._lanes

    def _ready_in(self, ticket: Ticket) -> float:
        return self._held_up(ticket)[0]

    def _held_up(self, ticket: Ticket) -> tuple[float, str]:
        """Return the seconds until a ticket can go, and what it waits for."""
        paused = self.pause_left()
        delay, cause = max(
            (self.requests.ready_in(1), "requests"),
            (self.tokens.ready_in(ticket.tokens), "tokens"),
        )
        return max(delay, paused), "pause" if paused else cause

    def _count_waiting(self) -> None:
        """Add the time since the last look, once for each who waits, to what they wait for."""
        now = self._clock.time()
        if self.waiting:
            self.waited[self._cause] += (now - self._looked_at) * sum(self.waiting.values())
        self._looked_at = now

    def _admit(self, ticket: Ticket) -> None:
        ticket.marks = self.requests.charge(1), self.tokens.charge(ticket.tokens)
        ticket.lane.in_flight += 1
        ticket.state = State.GRANTED
        ticket.granted_at = self._clock.time()

    def _left(self, ticket: Ticket) -> None:
        self._count_waiting()
        self.waiting[ticket.owner] -= 1
        if not self.waiting[ticket.owner]:
            del self.waiting[ticket.owner]


def describe(gates: Collection[Gate]) -> dict[str, dict[str, Any]]:
    """Return what `ClientStats` says of gates."""
    waited: defaultdict[str, float] = defaultdict(float)
    for cause, seconds in itertools.chain(*(gate.waited.items() for gate in gates)):
        waited[cause] += seconds
    models = {gate.model: gate for gate in gates if gate.model is not None}
    return {
        "wait_seconds_by": dict(waited),
        "utilisation": {model: gate.utilisation() for model, gate in models.items()},
        "output_length": {model: gate.output_length() for model, gate in models.items()},
    }


class Gauge(NamedTuple):
    """Where a model's limits stand.

    Attributes:
        spent: Requests and tokens admitted since the client began.
        limits: What may be per minute of each, None where no limit is known.
        waiting: How many requests wait.
        cause: What the next one waits for: "requests", "tokens", "pause" or "concurrency".
        seconds: How long it will.
    """

    spent: dict[str, float]
    limits: dict[str, float | None]
    waiting: int
    cause: str
    seconds: float
