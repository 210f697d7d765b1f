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
    Lane,
    Sharing,
    State,
    Ticket,
    check_pause,
    check_size,
    describe,
    too_long,
)
from openai_eval_client._log import debug, inform, logger, request_id
from openai_eval_client._runtime import Exclusive, Monotonic, Starts, call_on, refuse, running_loop
from openai_eval_client._stats import Recorder
from openai_eval_client._wire import read_quotas, refused_dimension, stated_wait
from openai_eval_client.config import RateLimitConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    from openai_eval_client._cost import Payment, Purse
    from openai_eval_client._limits import Clock, Facts, Gate, Gauge
    from openai_eval_client._wire import Demand, Outcome
    from openai_eval_client.models import ClientStats


_SHORTEST_TIMER = 0.002  # seconds; an event loop does not wake more finely
_WORTH_SAYING = 1.0  # seconds of waiting from which one is logged


class Governor(Sharing):
    """The limits of one client, shared by everything that sends through it.

    Args:
        config: The limits; None: learn them from the server, and slow nothing down until it speaks.
        clock: Where the time comes from.
        max_cost: USD that may be spent; None: any amount.
    """

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
        self._lock = Exclusive()
        self.payments = Payments(self.ledger, self._lock, max_cost)
        self._notes: deque[tuple[Any, ...]] = deque()  # to be logged once the lock is left
        self._turns = itertools.count()
        self._starts = Starts()
        self._refused: Counter[str] = Counter()
        self._gates: dict[str | None, Gate] = {}
        self._timers: dict[tuple[Gate, asyncio.AbstractEventLoop], asyncio.TimerHandle] = {}

    def fresh(self) -> Governor:
        """Return another one with the same limits, for another account; the money is the same."""
        other = Governor(self.config if self._bounded else None, clock=self._clock)
        other._lock, other.payments = self._lock, self.payments.shared(other.ledger)
        return other

    @property
    def stats(self) -> ClientStats:
        """What went through so far."""
        with self._lock:
            details = {"rate_limited_by": dict(self._refused), **describe(self._gates.values())}
        cost, budget = self.ledger.snapshot(), self.payments.stats
        return self.recorder.snapshot(**details, cost=cost, unpriced=cost.unpriced, budget=budget)

    @property
    def facts(self) -> list[Facts]:
        """What holds for each model, and what it waited for."""
        with self._lock:
            return [gate.facts() for gate in self._gates.values() if gate.model is not None]

    def output_length(self, model: str) -> dict[str, float]:
        """Return how long a model's answers are, in the words of `ClientStats.output_length`."""
        with self._lock:
            return self._gates[model].output_length() if model in self._gates else {}

    def gauge(self, model: str) -> Gauge | None:
        """Return where a model's limits stand; None before its first request."""
        with self._lock:
            return self._gates[model].gauge() if model in self._gates else None

    def next_turn(self) -> int:
        """Return a place in the queue; a request keeps its own through all its attempts."""
        return next(self._turns)

    async def admit(
        self,
        demand: Demand,
        *,
        lane: Lane | None = None,
        turn: int | None = None,
        purse: Purse | None = None,
    ) -> Admission:
        """Wait until the request may be sent, and reserve what it needs: its cost first, then its tokens.

        Args:
            demand: What it asks of the limits.
            lane: A concurrency bound of the caller's own, instead of the model's.
            turn: Its place in the queue; a new one when None.
            purse: The caller's own, from which it is paid besides the client's.

        Returns:
            The admission, which must be settled exactly once.

        Raises:
            BudgetExceededError: Not enough is left of a budget.
            RateLimitError: The server asked for a pause longer than `max_wait`.
            RequestTooLargeError: The limit on tokens can never admit the request.
        """
        payment = await self.payments.reserve(demand, purse) if demand.most_cost else None
        try:
            with self._lock:
                gate = self._gate(demand.model)
                ticket = self._ticket(gate, demand, lane, turn)
                check_pause(gate, self.config.max_wait)
                check_size(gate, demand, self.config.max_wait)
                granted = gate.try_grant(ticket)
                waiter = self._starts.now_or_later() if granted else self._queue(gate, ticket)
            if waiter is not None:
                try:
                    await waiter
                except BaseException:
                    self._lock.when_free(functools.partial(self._withdraw, gate, ticket))
                    raise
                ticket.granted_at = self._clock.time()  # it begins now: what was before is waiting
                self._say_wait(gate, ticket)
        except BaseException:
            if payment is not None:
                payment.give_back()
            raise
        self.recorder.admitted(demand.model, ticket.tokens, ticket.asked_at, ticket.granted_at)
        return Admission(self, gate, ticket, demand, payment)

    def settle(self, gate: Gate, ticket: Ticket, demand: Demand, outcome: Outcome) -> None:
        """Free an attempt's slot, replace its estimate by what it came to, and heed the server."""
        self._lock.when_free(lambda: self._settle(gate, ticket, demand, outcome))
        self._log_notes()
        self.ledger.keep_up()

    def hear(self, gate: Gate, ticket: Ticket, headers: Mapping[str, str]) -> None:
        """Heed the headers of an answer whose body is still to come."""
        with self._lock:
            gate.hear(ticket, read_quotas(headers))
            self._pump(gate)

    def _settle(self, gate: Gate, ticket: Ticket, demand: Demand, outcome: Outcome) -> None:
        if ticket.state is not State.GRANTED:
            return
        self.recorder.called(demand, outcome)
        ticket.ended_at = self._clock.time()
        self.recorder.ended(demand.model, outcome, ticket.granted_at, ticket.ended_at)
        self.ledger.settled(demand, outcome, ticket.tokens)
        try:
            if not outcome.sent:
                gate.withdraw(ticket)
                return
            gate.settle(ticket, outcome.tokens)
            if outcome.ok:
                gate.served(ticket)
            elif outcome.is_refusal and not outcome.is_congestion:
                gate.rejected(ticket)
            if outcome.counted is not None:
                gate.observe_output(outcome.counted.completion_tokens)
            if outcome.headers is not None and (outcome.is_congestion or gate.heeds(ticket)):
                self._heed(gate, ticket, outcome, outcome.headers)
        finally:
            self._pump(gate)
        self.recorder.attempt(outcome, ticket.ended_at - ticket.granted_at)

    def _log_notes(self) -> None:
        """Log what was noted under the lock: a log handler has a lock of its own."""
        with contextlib.suppress(IndexError):  # another thread logs too
            while self._notes:
                wait, about = self._notes.popleft()
                text, model = "%s rate limited by the server: pausing %.2f s", about["model"]
                inform(text, model, wait, event="rate_limited", wait_seconds=wait, **about)

    def _gate(self, model: str | None) -> Gate:
        gate = self._gates.get(model)
        if gate is None:
            gate = self._gates[model] = self._new_gate(model)
            gate.lane.limit = gate.lane.limit if self._bounded else float("inf")
        return gate

    def _ticket(self, gate: Gate, demand: Demand, lane: Lane | None, turn: int | None) -> Ticket:
        output = gate.expected_output if demand.max_output is None else demand.max_output
        return Ticket(
            turn=self.next_turn() if turn is None else turn,
            tokens=demand.input_tokens + output if demand.model is not None else 0,
            lane=lane or gate.lane,
            asked_at=self._clock.time(),
        )

    def _queue(self, gate: Gate, ticket: Ticket) -> asyncio.Future[None]:
        loop = asyncio.get_running_loop()
        ticket.owner, ticket.waiter = loop, loop.create_future()
        gate.enqueue(ticket)
        self._pump(gate)
        waiter: asyncio.Future[None] = ticket.waiter
        return waiter

    def _say_wait(self, gate: Gate, ticket: Ticket) -> None:
        waited = ticket.granted_at - ticket.asked_at
        if waited >= _WORTH_SAYING:
            about = {"model": gate.model, "wait_seconds": waited}
            inform("waited %.2f s for the rate limit of %s", waited, gate.model, event="waited", **about)

    def _withdraw(self, gate: Gate, ticket: Ticket) -> None:
        gate.withdraw(ticket)
        self._pump(gate)

    def _pump(self, gate: Gate) -> None:
        """Admit all who can go; where only time can help the next, set the timers."""
        while (ticket := gate.grant_next()) is not None:
            if not call_on(ticket.owner, self._starts.wake, ticket.waiter):
                gate.withdraw(ticket)
        delay = gate.next_in()
        if delay is not None:
            for owner in list(gate.waiting):
                self._set_timer(gate, owner, max(delay, _SHORTEST_TIMER))

    def _set_timer(self, gate: Gate, loop: asyncio.AbstractEventLoop, delay: float) -> None:
        """See to it that `loop` looks at the gate again in `delay` seconds at the latest."""
        handle = self._timers.get((gate, loop))
        if handle is not None and handle.when() <= loop.time() + delay + _SHORTEST_TIMER:
            return
        if running_loop() is not loop:
            if not call_on(loop, self._tick, gate, loop):
                for ticket in gate.waiters(loop):
                    gate.withdraw(ticket)
            return
        if handle is not None:
            handle.cancel()
        self._timers = {key: kept for key, kept in self._timers.items() if not key[1].is_closed()}
        self._timers[gate, loop] = loop.call_later(delay, self._tick, gate, loop)

    def _tick(self, gate: Gate, loop: asyncio.AbstractEventLoop) -> None:
        with self._lock:
            handle = self._timers.pop((gate, loop), None)
            if handle is not None:
                handle.cancel()
            self._pump(gate)

    def _heed(self, gate: Gate, ticket: Ticket, outcome: Outcome, headers: Mapping[str, str]) -> None:
        """Take over what the server says of its limits; where it refused, pause as long as it says."""
        quotas = read_quotas(headers)
        gate.hear(ticket, quotas)
        if not outcome.is_congestion:
            return
        wait, dimension = stated_wait(headers, outcome.message) or 0.0, refused_dimension(outcome.message)
        self._refused[dimension or "unknown"] += 1
        gate.refused(ticket, dimension, wait, quotas)
        if wait:
            gate.pause(wait)
            about = {"model": gate.model, "status": outcome.status, "limit": dimension}
            self._notes.append((wait, {**about, "request_id": request_id(headers)}))
        if wait > self.config.max_wait:
            self._refuse_all(gate)

    def _refuse_all(self, gate: Gate, reason: Exception | None = None) -> None:
        for ticket in gate.waiters():
            gate.withdraw(ticket)
            error = too_long(gate, self.config.max_wait) if reason is None else copy.copy(reason)
            call_on(ticket.owner, refuse, ticket.waiter, error)


class Admitter(Protocol):
    """Who gave it."""

    def hear(self, gate: Gate, ticket: Ticket, headers: Mapping[str, str]) -> None:
        """Heed the headers of an answer."""

    def settle(self, gate: Gate, ticket: Ticket, demand: Demand, outcome: Outcome) -> None:
        """Free the slot of an attempt, and account for what it came to."""


class Admission:
    """The right to send one attempt; settle it exactly once, whatever comes of the attempt."""

    __slots__ = ("_admitter", "_gate", "_payment", "_ticket", "_unsaid", "demand")

    def __init__(
        self,
        admitter: Admitter,
        gate: Gate,
        ticket: Ticket,
        demand: Demand,
        payment: Payment | None,
    ) -> None:
        self._admitter = admitter
        self._gate = gate
        self._ticket = ticket
        self._payment = payment
        self._unsaid = True
        self.demand = demand

    def hear(self, headers: Mapping[str, str]) -> None:
        """Heed the headers of an answer whose body is still to come."""
        self._admitter.hear(self._gate, self._ticket, headers)

    def settle(self, outcome: Outcome) -> None:
        """Hand slot and money back and account for what the attempt came to; a second call does nothing."""
        payment, self._payment = self._payment, None
        if payment is not None:
            payment.settle(self.demand, outcome)
        self._admitter.settle(self._gate, self._ticket, self.demand, outcome)
        if self._unsaid and logger.isEnabledFor(logging.DEBUG):
            self._say(outcome)
        self._unsaid = False

    def _say(self, outcome: Outcome) -> None:
        ticket, model = self._ticket, self.demand.model
        about = {
            "model": model,
            "status": outcome.status,
            "wait_seconds": ticket.granted_at - ticket.asked_at,
            "seconds": ticket.ended_at - ticket.granted_at,
            "tokens": outcome.tokens,
            "request_id": request_id(outcome.headers),
        }
        text = "attempt for %s: %s after %.2f s"
        debug(text, model, outcome.status or "no answer", about["seconds"], event="attempt", **about)
