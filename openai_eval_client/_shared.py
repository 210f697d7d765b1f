"""The gate of a model whose quota is shared with other processes and machines.

A worker reserves in the shared state for all of its tickets that can go now and for the first that cannot,
and sends that one as soon as its place comes up: one question for each admission at most. What was used,
heard and refused travels with the next question. Where the shared state cannot be reached the worker goes
on alone, with its part of what it last knew.
"""

from __future__ import annotations

import functools
import heapq
import random
from typing import TYPE_CHECKING, Any

from openai_eval_client._headers import DIMENSIONS
from openai_eval_client._limiter import Gate
from openai_eval_client._news import News
from openai_eval_client._tickets import State, Ticket
from openai_eval_client._view import Place, View, place_of, with_place

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Mapping, Sequence

    from openai_eval_client._bucket import Clock
    from openai_eval_client._headers import Quota
    from openai_eval_client._link import Link
    from openai_eval_client.config import RateLimitConfig

_BEAT_SECONDS = 3.0  # one that waits is heard of at least so often, and hears what has changed
_YOUNG_SECONDS, _YOUNG_BEAT = 10.0, 0.25  # while the limits are still being learnt that is much
_TELL_SECONDS = 1.0  # the longest that news wait for a question to travel with, as long as anything happens
_PROBE_SECONDS = 0.25  # after the shared state was lost, doubled from try to try up to the next
_PROBE_MOST = 5.0
_TICKETS = 16  # in one question at most: also while there is plenty, workers take turns
_KEEP = 3600.0  # seconds for which an idle quota is remembered; then its buckets are full


class SharedGate(Gate):
    """Admission to one model, within what all workers may send.

    Besides the shared state the budgets of this worker alone are kept up, for the time when they are needed.

    Args:
        model: Whose limits these are.
        config: The limits as this worker knows them; of those of all workers the lowest hold.
        clock: Where the time comes from.
        link: The way to the shared state.
        replied: Called with this gate and what came back, on any thread; it must call `take`.
    """

    def __init__(
        self,
        model: str,
        config: RateLimitConfig,
        clock: Clock,
        link: Link,
        replied: Callable[[SharedGate, Any], None],
    ) -> None:
        super().__init__(model, config, clock)
        self._link = link
        self._replied = functools.partial(replied, self)
        self._adapts = config.adaptive_throttling
        self._burst, self._keep = config.burst_seconds, round(max(_KEEP, 2 * config.burst_seconds))
        self._largest = [1.0, 0.0]  # that one ticket took
        self._forget()

    def _forget(self) -> None:
        """Know nothing of the shared state, as at first."""
        self._generation, self._alone = self._link.generation, False
        self._view: View | None = None
        self._taken = [0.0, 0.0]
        self._reserved: dict[Ticket, Place] = {}
        self._asked: list[Ticket] | None = None
        self._news = self._underway = News()
        self._admitted_at = self._told_at = float("-inf")
        self._next_try, self._patience = 0.0, _PROBE_SECONDS

    def try_grant(self, ticket: Ticket) -> bool:
        """Admit a new ticket at once, where this worker is alone."""
        return self._alone and super().try_grant(ticket)

    def grant_next(self) -> Ticket | None:
        """Admit the ticket whose place has come up."""
        if self._generation != self._link.generation:
            self._forget()
        ticket = super().grant_next() if self._alone else self._next_due()
        if ticket is None:
            self._keep_in_touch()
        return ticket

    def next_in(self) -> float | None:
        """Return the seconds until there is something to do; None where it will be told."""
        now = self._clock.time()
        if self._alone:
            delay = super().next_in()
            return max(self._next_try - now, 0.0) if delay is None else min(delay, self._next_try - now)
        waiting = self._first_reserved()
        if waiting is None:
            self._cause = "concurrency"
            return None
        delay, self._cause = self._due_in(waiting, now)
        return min(delay, max(self._next_beat() - now, 0.0)) if self._asked is None else delay

    def withdraw(self, ticket: Ticket) -> None:
        """Take back a ticket that was not sent, and what is reserved for it."""
        granted = ticket.state is State.GRANTED
        place = place_of(ticket.marks) if granted else self._reserved.pop(ticket, None)
        if place is not None:
            self._news.give_back(place, ticket.tokens)
        elif granted:
            self._news.add("spent", -1, -ticket.tokens)
        super().withdraw(ticket)

    def settle(self, ticket: Ticket, tokens: float | None) -> None:
        """Free the ticket's slot and replace its estimate by `tokens`, where they are known."""
        super().settle(ticket, tokens)
        if tokens is None or place_of(ticket.marks) is None or tokens == ticket.tokens:
            return
        self._news.add("credit", 0, ticket.tokens - tokens)
        if tokens > ticket.tokens:
            self._news.add("owed", 0, tokens - ticket.tokens)

    def served(self, ticket: Ticket) -> None:
        """Learn that the server had room for this ticket."""
        super().served(ticket)
        if place_of(ticket.marks) is not None:
            self._news.add("served", 1, ticket.tokens)

    def rejected(self, ticket: Ticket) -> None:
        """Learn that the server refused this ticket for good, and so did not count its tokens."""
        super().rejected(ticket)
        if place_of(ticket.marks) is not None:
            self._news.add("owed", 0, -ticket.tokens)

    def refused(self, ticket: Ticket, dimension: str | None, wait: float, spoken: Container[str]) -> None:
        """Learn that the server had no room for this ticket."""
        super().refused(ticket, dimension, wait, spoken)
        place = place_of(ticket.marks)
        if place is None:
            return
        for line, (name, amount) in enumerate(zip(DIMENSIONS, (1, ticket.tokens), strict=True)):
            if dimension in {None, name}:
                self._news.refuse(line, amount, wait, place[line] + amount, spoke=name in spoken)

    def heeds(self, ticket: Ticket) -> bool:  # noqa: ARG002  # whichever it is
        """Return whether what the answer to this ticket states is news: the shared state decides that."""
        return True

    def hear(self, ticket: Ticket, quotas: Mapping[str, Quota]) -> None:
        """Heed the limits that the answer to this ticket states."""
        super().hear(ticket, quotas)
        place = place_of(ticket.marks)
        if place is None or self._view is None or not self._adapts:
            return
        amounts, budgets = (1, ticket.tokens), (self.requests, self.tokens)
        for line, name in enumerate(DIMENSIONS):
            if (quota := quotas.get(name)) is not None:
                rate, size = budgets[line].stated(quota, ticket.marks[line])
                end = place[line] + amounts[line]
                self._news.hear(line, quota, rate, size, end, ticket.granted_at)
                self._news.urgent |= not self._view.lines[line].spoken

    def pause(self, seconds: float) -> None:
        """Let nobody go for that long, as the server asked."""
        super().pause(seconds)
        self._news.pause(self._paused_until)

    def take(self, outcome: Any) -> Exception | None:
        """Go by a reply; without one, alone. Returns the error where this worker cannot even begin."""
        asked, self._asked = self._asked or [], None
        if isinstance(outcome, Exception):
            return self._lose(outcome)
        view = View.read(outcome, self._clock.time())
        if self._alone:
            self._alone = False
            self.requests.let_go()
            self.tokens.let_go()
        if self._view is not None and self._view.epoch != view.epoch:
            self._reserved.clear()  # of a state that is no more
        self._view, self._link.workers = view, view.workers
        self._taken = [line.taken for line in view.lines]
        self._paused_until = max(self._paused_until, view.at + view.pause)
        for ticket in asked[: view.reserved]:
            self._put(ticket)
        return None

    def leave(self) -> dict[str, Any] | None:
        """Return the last that this worker has to tell; None where nobody would miss it."""
        if self._view is None or self._alone:
            return None
        for ticket, place in self._reserved.items():
            self._news.give_back(place, ticket.tokens)
        return {**self._told([]), "leaves": True}

    def _put(self, ticket: Ticket) -> None:
        """Give a ticket the next place; one that was withdrawn meanwhile gives it back."""
        place = Place(*self._taken)
        self._taken = [place.requests + 1, place.tokens + ticket.tokens]
        self._largest[1] = max(self._largest[1], ticket.tokens)
        if ticket.state is State.WAITING:
            self._reserved[ticket] = place
        else:
            self._news.give_back(place, ticket.tokens)

    def _next_due(self) -> Ticket | None:
        ticket = self._first_reserved()
        if ticket is None or self._due_in(ticket, self._clock.time())[0] > 0:
            return None
        self._left(ticket)
        self._admit(ticket)
        return ticket

    def _first_reserved(self) -> Ticket | None:
        """Return the first ticket with a place, where there is room for it."""
        return next((t for t in self._reserved if t.lane.in_flight < t.lane.limit), None)

    def _held_up(self, ticket: Ticket) -> tuple[float, str]:
        by_itself = self._alone or ticket not in self._reserved
        return super()._held_up(ticket) if by_itself else self._due_in(ticket, self._clock.time())

    def _due_in(self, ticket: Ticket, now: float) -> tuple[float, str]:
        assert self._view is not None  # noqa: S101  # a place came with one
        delay, cause = self._view.held_up(self._reserved[ticket], (1, ticket.tokens), now)
        return max(delay, self.pause_left()), cause

    def _admit(self, ticket: Ticket) -> None:
        super()._admit(ticket)
        self._admitted_at = ticket.granted_at
        place = self._reserved.pop(ticket, None)
        if place is None:
            self._news.add("spent", 1, ticket.tokens)
        else:
            ticket.marks = with_place(ticket.marks, place)

    def _keep_in_touch(self) -> None:
        """Ask for those who have no place, or tell the news, if it is time to."""
        now = self._clock.time()
        if self._asked is not None or (self._alone and now < self._next_try):
            return
        wanted = [] if self._alone or self._reserved else self._next_without_place()
        beat = self._reserved and now >= self._next_beat()
        tell = self._news and (self._news.urgent or now - self._told_at >= _TELL_SECONDS)
        if wanted or beat or tell or self._alone:
            self._asked, self._told_at = wanted, now
            self._link.ask(str(self.model), self._told(wanted), self._replied)

    def _next_beat(self) -> float:
        """Return the clock time at which a worker that waits should be heard of."""
        young = self._view is not None and self._view.age < _YOUNG_SECONDS
        return self._told_at + (_YOUNG_BEAT if young else _BEAT_SECONDS)

    def _next_without_place(self) -> list[Ticket]:
        """Return those who would go next if there were no limits, in the order of their turns."""
        able: list[Ticket] = []
        for lane in self._lanes_in_use():
            if lane.first() is not None:
                room = int(min(lane.limit - lane.in_flight, _TICKETS))
                waiting = (ticket for ticket in lane.queue if ticket.state is State.WAITING)
                able += heapq.nsmallest(room, waiting)
        return sorted(able)[:_TICKETS]

    def _told(self, wanted: Sequence[Ticket]) -> dict[str, Any]:
        now, budgets = self._clock.time(), (self.requests, self.tokens)
        spends = now - self._admitted_at <= self._burst  # else its buckets would be full again by now
        self._underway, self._news = self._news, News()
        return {
            **self._underway.told(now),
            "epoch": self._view.epoch if self._view is not None and spends else 0,
            "rates": [budget.limit_rate for budget in budgets],
            "sizes": [budget.limit_size for budget in budgets],
            "adapts": self._adapts,
            "keep": self._keep,
            "wants": [ticket.tokens for ticket in wanted],
        }

    def _lose(self, error: Exception) -> Exception | None:
        """Go on alone with a part of what was last known; return the error where nothing is."""
        now = self._clock.time()
        if not self._link.workers:
            return error
        if not self._alone:
            self._alone, self._patience = True, _PROBE_SECONDS
            self._reserved.clear()
            self._news = News()
            self._hold_to_share(now)
        else:
            self._news.add("spent", *self._underway.spent)  # it has still not been told
        self._next_try = now + self._patience * random.uniform(0.5, 1)  # noqa: S311  # not all at once
        self._patience = min(2 * self._patience, _PROBE_MOST)
        return None

    def _hold_to_share(self, now: float) -> None:
        workers = self._link.workers
        for line, budget in enumerate((self.requests, self.tokens)):
            rate, left = budget.limit_rate / workers, 0.0
            if self._view is not None:
                rate, left = self._view.share(line, self._taken[line], workers, now)
            budget.hold_to(rate, left, least=self._largest[line])
