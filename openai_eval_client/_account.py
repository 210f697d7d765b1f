"""One account: what an attempt has to wait for, and how it is settled. It knows no HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from openai_eval_client._cost import Budgets, Ledger, Reservation
from openai_eval_client._limits import Limiter
from openai_eval_client._log import debug, logger, request_id, warn
from openai_eval_client._runtime import STATE_LOCK, ForkAware, mind_forks
from openai_eval_client._stats import Recorder
from openai_eval_client._wire import NOT_SENT, of_error, outcome_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from decimal import Decimal
    from types import TracebackType

    from typing_extensions import Self

    from openai_eval_client._cost import CostBudget
    from openai_eval_client._limits import Clock, ConcurrencyLimit, Permit, Waiter
    from openai_eval_client._wire import Demand, Outcome
    from openai_eval_client.config import RateLimitConfig
    from openai_eval_client.models import ClientStats

_ALWAYS: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
_ABANDONED = outcome_of(asyncio.CancelledError())
_COLLECTING = 0.2  # of the time at most, while requests wait for streams that may have been dropped


class Account(ForkAware):
    """The limits, the bill, the budget and the statistics of one account."""

    def __init__(
        self,
        config: RateLimitConfig | None = None,  # None: learn the limits from the server
        *,
        clock: Clock | None = None,
        max_cost: float | None = None,  # USD that may be spent; None: any amount
    ) -> None:
        self.limiter = Limiter(config, clock=clock, reclaim=self.reclaim)
        self.recorder = Recorder()
        self.ledger = Ledger()
        self.budgets = Budgets(self.ledger, max_cost, reclaim=self.reclaim)
        # not settled, by their event loop
        self._open: defaultdict[asyncio.AbstractEventLoop, set[Attempt]] = defaultdict(set)
        self._collect_at = 0.0  # monotonic time before which nothing is collected
        mind_forks(self)

    @property
    def config(self) -> RateLimitConfig:
        """The limits as configured."""
        return self.limiter.config

    def fresh(self) -> Account:
        """Return one with the same limits for another account; the budget is the same."""
        other = Account()
        other.limiter = self.limiter.fresh(other.reclaim)
        other.budgets = self.budgets.shared(other.ledger)
        other._open = self._open  # one may wait for what is reserved in the other
        return other

    @property
    def stats(self) -> ClientStats:
        """What went through so far."""
        self._settle_abandoned()
        cost = self.ledger.snapshot()
        return self.recorder.snapshot(
            **self.limiter.stats, cost=cost, unpriced=cost.unpriced, budget=self.budgets.stats
        )

    def attempt(
        self,
        demand: Demand,
        *,
        concurrency: ConcurrencyLimit | None = None,
        turn: int | None = None,
        budget: CostBudget | None = None,
        sending: contextlib.AbstractContextManager[None] | None = None,
    ) -> Attempt:
        """Return an attempt to be entered: that waits until it may be sent; leaving settles it."""
        return Attempt(self, demand, concurrency, turn, budget, sending or _ALWAYS)

    def opened(self, attempt: Attempt) -> set[Attempt]:
        """Add a new attempt to those of the running event loop, which it is to leave when settled."""
        attempts = self._open[asyncio.get_running_loop()]
        if len(self._open) > 1:
            self._settle_abandoned()
        attempts.add(attempt)
        return attempts

    def reclaim(self) -> None:
        """Give back what closed loops and dropped streams hold, while requests wait for it."""
        self._settle_abandoned()
        # The SDK's streams are in cycles, which end when Python collects garbage; while all requests wait, no
        # garbage is made, and so none collected.
        now = time.monotonic()
        streams = (one for attempts in list(self._open.values()) for one in list(attempts) if one.is_stream)
        if now >= self._collect_at and any(streams):
            gc.collect()
            self._collect_at = now + (time.monotonic() - now) / _COLLECTING

    def _settle_abandoned(self) -> None:
        """Settle the attempts of event loops that have closed."""
        for loop in [loop for loop in list(self._open) if loop.is_closed()]:
            for attempt in list(self._open.pop(loop, ())):
                attempt.abandon()

    def after_fork(self, *, child: bool) -> None:  # the same on both sides
        """Leave the attempts in flight, and what they have taken, to the parent."""
        if child:
            attempts = [attempt for attempts in self._open.values() for attempt in attempts]
            self._open.clear()
            attempts.sort(key=lambda attempt: attempt.is_begun)  # those that wait first: none is granted
            for attempt in attempts:
                attempt.settle(NOT_SENT)


@dataclass(slots=True, eq=False)
class Attempt:
    """One HTTP attempt: admitted on entering, settled exactly once."""

    # Leaving the block settles it, by what `ended` noted or by the exception. Without either it stays open:
    # the end of its stream settles it.
    _account: Account
    demand: Demand  # what it asks of the limits
    _concurrency: ConcurrencyLimit | None  # of the call's own, instead of the model's
    _turn: int | None  # its place in the queue; None: a new one
    _budget: CostBudget | None  # the call's own, from which it is paid besides the client's
    _sending: contextlib.AbstractContextManager[None]  # entered for as long as the request is in flight
    _reservation: Reservation | None = field(default=None, init=False)
    _permit: Permit | None = field(default=None, init=False)
    _outcome: Outcome | None = field(default=None, init=False)
    _cost: Decimal | None = field(default=None, init=False)
    _priced: bool = field(default=False, init=False)
    _among: set[Attempt] | None = field(default=None, init=False)  # those that are to be settled
    is_begun: bool = field(default=False, init=False)
    is_stream: bool = field(default=False, init=False)  # the end of a stream is to settle it

    async def begin(self) -> Attempt:
        """Wait until it may be sent, and reserve what it needs: its cost first, then its tokens."""
        account, demand = self._account, self.demand
        self._among = account.opened(self)
        try:
            if demand.most_cost:
                self._reservation = Reservation()
                await account.budgets.reserve(demand, self._budget, self._reservation)
            limits = account.limiter
            with STATE_LOCK:  # a fork finds it without permit, or with it
                self._permit = permit = limits.ask(demand, concurrency=self._concurrency, turn=self._turn)
            if permit.waiter.future is not None:
                await limits.granted(permit)
        except BaseException:
            self.settle(NOT_SENT)
            raise
        waiter, self.is_begun = permit.waiter, True
        account.recorder.admitted(demand.model, waiter.tokens, waiter.asked_at, waiter.granted_at)
        return self

    async def __aenter__(self) -> Self:
        if not self.is_begun:
            await self.begin()
        try:
            self._sending.__enter__()
        except BaseException:
            self.settle(NOT_SENT)
            raise
        return self

    def ended(self, outcome: Outcome) -> None:
        """Note what came of it, where no exception shows it."""
        self._outcome = outcome

    def price(self) -> Decimal | None:
        """Enter what came of it into the ledger, once; return what it costs in USD, None where not known."""
        if not self._priced and self._permit is not None and self._outcome is not None:
            self._priced = True
            reserved = self._permit.waiter.tokens
            self._cost = self._account.ledger.settled(self.demand, self._outcome, reserved)
        return self._cost

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sending.__exit__(kind, error, trace)
        if error is not None and self._outcome is None:
            self._outcome = outcome_of(error)
        if self._outcome is not None:
            self.settle(self._outcome)

    def update_from_headers(self, headers: Mapping[str, str]) -> None:
        """Learn from the headers of an answer whose body is still to come."""
        if self._permit is not None:
            self._account.limiter.update_from_headers(self._permit, headers)

    def abandon(self) -> None:
        """Settle it in the place of an event loop that has closed."""
        self.settle(_ABANDONED if self.is_begun else NOT_SENT)

    def settle(self, outcome: Outcome) -> None:
        """Give slot, tokens and money back, and record what came of it; a second call does nothing."""
        if self._among is None:
            return
        account, permit, self._outcome = self._account, self._permit, outcome
        actual = self.demand.most_cost
        try:
            if self._reservation is not None:
                actual = account.budgets.actual(self.demand, outcome, self.price())
        finally:
            with STATE_LOCK:  # a fork finds it settled, or not at all
                among, self._among = self._among, None
                if among is not None:
                    among.discard(self)
                    if self._reservation is not None and actual is not None:
                        self._reservation.settle(actual)
                    if permit is not None:
                        account.limiter.release(permit, outcome)
        if among is None or permit is None or not self.is_begun:
            return
        try:
            account.limiter.log_refusal(permit, outcome)
            self._record(permit.waiter, outcome)
        except Exception as error:  # noqa: BLE001  # an answer that was paid for is not lost to its statistics
            warn("an attempt could not be recorded", event="not_recorded", **of_error(error))

    def _record(self, waiter: Waiter, outcome: Outcome) -> None:
        account = self._account
        account.recorder.settled_attempt(self.demand, outcome, waiter.granted_at, waiter.ended_at)
        self.price()
        account.ledger.keep_up()
        if not logger.isEnabledFor(logging.DEBUG):
            return
        model, status, seconds = self.demand.model, outcome.status, waiter.ended_at - waiter.granted_at
        debug(
            "attempt for %s: %s after %.2f s",
            *(model, status or "no answer", seconds),
            event="attempt",
            model=model,
            status=status,
            wait_seconds=waiter.granted_at - waiter.asked_at,
            seconds=seconds,
            tokens=outcome.tokens,
            request_id=request_id(outcome.headers),
        )
