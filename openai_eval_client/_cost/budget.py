"""Budgets in USD: reserve the most that an attempt can cost, settle by what it did cost."""

from __future__ import annotations

import asyncio
import enum
import time
from collections import deque
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from openai_eval_client._cost.bounds import CostBounds, most_output
from openai_eval_client._cost.pricing import EXACT
from openai_eval_client._log import inform
from openai_eval_client._runtime import DeferringLock, call_on, fail_waiter, resolve
from openai_eval_client._validation import check_cost
from openai_eval_client.errors import BudgetExceededError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from openai_eval_client._cost.ledger import Ledger
    from openai_eval_client._tokens import TokenCounter
    from openai_eval_client._wire import Demand, Outcome


_NOTHING = Decimal(0)
_WORTH_SAYING = 1.0  # seconds of waiting from which one is logged


class _State(enum.Enum):
    """Where a reservation is."""

    WAITING = enum.auto()
    HELD = enum.auto()
    STANDING = enum.auto()
    DONE = enum.auto()


@dataclass(slots=True, eq=False)
class Hold:
    """What one budget reserves for one request."""

    amount: Decimal  # USD
    state: _State = _State.WAITING  # where it is
    owner: asyncio.AbstractEventLoop | None = None  # the event loop that waits for it
    future: asyncio.Future[None] | None = None  # the future to resolve


class CostBudget:
    """A limit on what is spent, kept by reserving; safe for several threads and event loops.

    First come, first served: a request for which there is no room now, but may be once others are settled,
    waits for that, and those after it wait too. One for which there cannot be room any more is refused. What
    is spent and reserved stays within the limit, as long as nothing costs more than was reserved for it.
    """

    def __init__(self, limit: Decimal, *, lock: DeferringLock | None = None) -> None:
        self._limit = limit
        self._lock = lock or DeferringLock()
        self._spent = self._held = self._standing = _NOTHING
        self._queue: deque[Hold] = deque()

    async def reserve(self, amount: Decimal) -> Hold:
        """Reserve an amount in USD, once there is room for it."""
        with self._lock:
            hold, asked_at = self._asked(amount), time.monotonic()
            if hold.state is _State.WAITING:
                hold.owner = asyncio.get_running_loop()
                future = hold.future = hold.owner.create_future()
                self._queue.append(hold)
        if hold.future is None:
            return hold
        try:
            await future
        except BaseException:
            if future.done() and not future.cancelled():
                future.exception()  # is looked at, even where a cancellation came together with it
            self.settle(hold, _NOTHING)
            raise
        waited = time.monotonic() - asked_at
        if waited >= _WORTH_SAYING:
            text = "waited %.2f s for money reserved by others, within max_cost=%s"
            inform(text, waited, self._limit, event="waited_for_money", wait_seconds=waited)
        return hold

    def reserve_now(self, amount: Decimal) -> Hold | None:
        """Reserve an amount in USD at once; None where there is no room now, but may be later."""
        with self._lock:
            hold = self._asked(amount)
            return hold if hold.state is _State.HELD else None

    def commit(self, amount: Decimal) -> Hold:
        """Reserve an amount in USD that is being spent already, whether there is room for it or not."""
        with self._lock:
            hold = Hold(amount)
            self._grant(hold)
            return hold

    def settle(self, hold: Hold, actual: Decimal) -> None:
        """Replace a reservation by what was spent, in USD; a second call does nothing."""
        self._lock.when_free(lambda: self._settle(hold, actual))

    def keep_reserved(self, hold: Hold) -> None:
        """Keep a reservation, but let nobody wait for its settling, which may never come."""
        self._lock.when_free(lambda: self._keep_reserved(hold))

    def split(self, hold: Hold, amounts: Sequence[Decimal]) -> list[Hold]:
        """Return a reservation as several, of amounts in USD that add up to it."""
        with self._lock:
            self._held = EXACT.subtract(self._held, hold.amount)
            hold.state = _State.DONE
            pieces = [Hold(amount) for amount in amounts]
            for piece in pieces:
                self._grant(piece)
            return pieces

    @property
    def free(self) -> Decimal:
        """USD that can be reserved now."""
        with self._lock:
            return _NOTHING if self._queue else max(_NOTHING, self._room())

    @property
    def idle(self) -> bool:
        """Whether nothing is in flight that may turn out cheaper."""
        with self._lock:
            return not self._held and not self._queue

    @property
    def stats(self) -> dict[str, Decimal]:
        """The limit, what was spent of it and what is reserved, in USD."""
        with self._lock:
            return {"limit": self._limit, "spent": self._spent, "reserved": self._reserved()}

    def exceeded(self, amount: Decimal) -> BudgetExceededError:
        """Return the error of a request for so many USD."""
        with self._lock:
            return self._refusal(amount)

    def _asked(self, amount: Decimal) -> Hold:
        """Return a hold, granted if it can be at once."""
        hold = Hold(amount)
        if amount > self._ever():
            raise self._refusal(amount)
        if not self._queue and amount <= self._room():
            self._grant(hold)
        return hold

    def _grant(self, hold: Hold) -> None:
        hold.state = _State.HELD
        self._held = EXACT.add(self._held, hold.amount)

    def _settle(self, hold: Hold, actual: Decimal) -> None:
        state, hold.state = hold.state, _State.DONE
        if state is _State.HELD:
            self._held = EXACT.subtract(self._held, hold.amount)
        elif state is _State.STANDING:
            self._standing = EXACT.subtract(self._standing, hold.amount)
        if state in {_State.HELD, _State.STANDING}:
            self._spent = EXACT.add(self._spent, actual)
        self._pump()

    def _keep_reserved(self, hold: Hold) -> None:
        if hold.state is _State.HELD:
            hold.state = _State.STANDING
            self._held = EXACT.subtract(self._held, hold.amount)
            self._standing = EXACT.add(self._standing, hold.amount)
            self._pump()

    def _pump(self) -> None:
        """Serve those who wait, as far as there is room; fail_waiter whom it cannot come to."""
        while self._queue:
            hold = self._queue[0]
            if hold.state is _State.WAITING and self._room() < hold.amount <= self._ever():
                return
            self._queue.popleft()
            if hold.state is _State.WAITING:
                self._answer(hold)

    def _answer(self, hold: Hold) -> None:
        """Grant or fail_waiter the first who waits."""
        owner, future = hold.owner, hold.future
        if owner is None or future is None:
            return
        if hold.amount > self._ever():
            hold.state = _State.DONE
            call_on(owner, fail_waiter, future, self._refusal(hold.amount))
            return
        self._grant(hold)
        if not call_on(owner, resolve, future):
            self._held = EXACT.subtract(self._held, hold.amount)  # its loop has closed
            hold.state = _State.DONE

    def _ever(self) -> Decimal:
        """Return what there would be room for if all in flight turned out to cost nothing."""
        return EXACT.subtract(EXACT.subtract(self._limit, self._spent), self._standing)

    def _room(self) -> Decimal:
        """Return what there is room for now."""
        return EXACT.subtract(self._ever(), self._held)

    def _reserved(self) -> Decimal:
        return EXACT.add(self._held, self._standing)

    def _refusal(self, amount: Decimal) -> BudgetExceededError:
        spent, reserved, most = (f"{usd.normalize():f}" for usd in (self._spent, self._reserved(), amount))
        return BudgetExceededError(
            f"max_cost={self._limit.normalize():f} USD: {spent} spent, {reserved} reserved for what is in "
            f"flight, and the next request may cost {most}",
        )


@dataclass(frozen=True, slots=True)
class Reservation:
    """What one request reserves, from each budget that it is to be paid from."""

    amount: Decimal  # USD
    holds: tuple[tuple[CostBudget, Hold], ...]  # each budget and what it reserves

    def settle(self, actual: Decimal) -> None:
        """Replace it by what was spent, in USD; a second call does nothing."""
        for budget, hold in self.holds:
            budget.settle(hold, actual)

    def split(self, amounts: Sequence[Decimal]) -> list[Reservation]:
        """Return it as several, of amounts in USD that add up to it."""
        pieces = [[(budget, piece) for piece in budget.split(hold, amounts)] for budget, hold in self.holds]
        parts = zip(*pieces, strict=True) if pieces else [()] * len(amounts)
        return [Reservation(amount, part) for amount, part in zip(amounts, parts, strict=True)]

    def keep_reserved(self) -> None:
        """Keep it, but let nobody wait for its settling, which may never come."""
        for budget, hold in self.holds:
            budget.keep_reserved(hold)


async def reserve(budgets: Sequence[CostBudget], amount: Decimal) -> Reservation:
    """Reserve an amount from several budgets, once all of them have room for it."""
    holds: list[tuple[CostBudget, Hold]] = []
    try:
        for budget in budgets:
            holds.append((budget, await budget.reserve(amount)))  # noqa: PERF401  # is given back in parts
    except BaseException:
        Reservation(amount, tuple(holds)).settle(_NOTHING)
        raise
    return Reservation(amount, tuple(holds))


def reserve_now(budgets: Sequence[CostBudget], amount: Decimal) -> Reservation | None:
    """Reserve an amount from several budgets at once; None where there is no room now, but may be later."""
    holds: list[tuple[CostBudget, Hold]] = []
    try:
        for budget in budgets:
            hold = budget.reserve_now(amount)
            if hold is None:
                break
            holds.append((budget, hold))
        else:
            return Reservation(amount, tuple(holds))
    except BudgetExceededError:
        Reservation(amount, tuple(holds)).settle(_NOTHING)
        raise
    Reservation(amount, tuple(holds)).settle(_NOTHING)
    return None


def commit(budgets: Sequence[CostBudget], amount: Decimal) -> Reservation:
    """Reserve an amount that is being spent already, whether there is room for it or not."""
    return Reservation(amount, tuple((budget, budget.commit(amount)) for budget in budgets))


class Payments:
    """The money of one client."""

    def __init__(self, ledger: Ledger, lock: DeferringLock, max_cost: float | None) -> None:
        self.bounds = CostBounds(ledger)
        self._lock = lock
        self._budget = self._new(max_cost)

    def budget_for(
        self, max_cost: float | Decimal | None, body: Mapping[str, Any], path: str
    ) -> CostBudget | None:
        """Return a call's own budget, None for None; where there is any budget, check that it can be kept."""
        if max_cost is not None:
            check_cost(max_cost, "max_cost")
        own = self._new(max_cost)
        if self.budgets(own):
            most_output(body, path)
        return own

    def budgets(self, own: CostBudget | None = None) -> list[CostBudget]:
        """Return what a call is paid from: its own budget, where it has one, and the client's."""
        return [budget for budget in (own, self._budget) if budget is not None]

    async def reserve(self, demand: Demand, own: CostBudget | None) -> Payment:
        """Reserve what an attempt can cost at most, once there is room for it."""
        return Payment(self.bounds, await reserve(self.budgets(own), demand.most_cost or Decimal(0)))

    def shared(self, ledger: Ledger) -> Payments:
        """Return the same budget for another account, whose prices may be others."""
        other = Payments(ledger, self._lock, None)
        other._budget = self._budget
        return other

    def _new(self, max_cost: float | Decimal | None) -> CostBudget | None:
        return None if max_cost is None else CostBudget(Decimal(str(max_cost)), lock=self._lock)

    async def most(
        self,
        body: Mapping[str, Any],
        path: str,
        counter: TokenCounter,
        own: CostBudget | None = None,
    ) -> Decimal | None:
        """Return the most that one attempt can cost, in USD; None where nobody keeps a budget."""
        return await self.bounds.most(body, path, counter) if self.budgets(own) else None

    @property
    def stats(self) -> dict[str, Decimal]:
        """What the client may spend, what it spent and what is reserved, in USD; empty without a limit."""
        return {} if self._budget is None else self._budget.stats


@dataclass(frozen=True, slots=True)
class Payment:
    """What is reserved for one attempt."""

    bounds: CostBounds
    reservation: Reservation

    def settle(self, demand: Demand, outcome: Outcome) -> None:
        """Replace it by what the attempt came to."""
        self.reservation.settle(self.bounds.actual(demand, outcome))
        self.bounds.say_surprises()

    def refund(self) -> None:
        """Give it back: nothing was sent."""
        self.reservation.settle(Decimal(0))
