"""A place in the queue, and the bound on concurrency that it waits under."""

from __future__ import annotations

import enum
import heapq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openai_eval_client._belief import Mark


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
