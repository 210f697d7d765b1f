"""Who pays for an attempt: the client's purse and the call's own, reserved before and settled after."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from openai_eval_client._checks import check_cost
from openai_eval_client._quotes import Quoter, most_output
from openai_eval_client._reservations import reserve
from openai_eval_client._spending import Purse

if TYPE_CHECKING:
    from collections.abc import Mapping

    from openai_eval_client._exclusive import Exclusive
    from openai_eval_client._ledger import Ledger
    from openai_eval_client._reservations import Reservation
    from openai_eval_client._tokens import TokenCounter
    from openai_eval_client._wire import Demand, Outcome


class Payments:
    """The money of one client.

    Args:
        ledger: Knows the prices.
        lock: The lock of who settles.
        max_cost: USD that may be spent in all; None: any amount.
    """

    def __init__(self, ledger: Ledger, lock: Exclusive, max_cost: float | None) -> None:
        self.quoter = Quoter(ledger)
        self._lock = lock
        self._purse = self._new(max_cost)

    def purse_for(self, max_cost: float | Decimal | None, body: Mapping[str, Any], path: str) -> Purse | None:
        """Return a call's own purse, None for None; where anybody keeps a budget, check that it can be kept.

        Args:
            max_cost: USD that the call may cost.
            body: What its requests have in common.
            path: The path of their endpoint.

        Raises:
            ValidationError: It is no amount, or the requests' cost has no bound.
        """
        if max_cost is not None:
            check_cost(max_cost, "max_cost")
        own = self._new(max_cost)
        if self.purses(own):
            most_output(body, path)
        return own

    def purses(self, own: Purse | None = None) -> list[Purse]:
        """Return what a call is paid from: its own purse, where it has one, and the client's."""
        return [purse for purse in (own, self._purse) if purse is not None]

    async def reserve(self, demand: Demand, own: Purse | None) -> Payment:
        """Reserve what an attempt can cost at most, once there is room for it.

        Args:
            demand: What it asks for.
            own: The call's own purse.

        Returns:
            What is to be settled.

        Raises:
            BudgetExceededError: There cannot be room for it any more.
        """
        return Payment(self.quoter, await reserve(self.purses(own), demand.most_cost or Decimal(0)))

    def shared(self, ledger: Ledger) -> Payments:
        """Return the same purse for another account, whose prices may be others."""
        other = Payments(ledger, self._lock, None)
        other._purse = self._purse
        return other

    def _new(self, max_cost: float | Decimal | None) -> Purse | None:
        return None if max_cost is None else Purse(Decimal(str(max_cost)), lock=self._lock)

    async def most(
        self, body: Mapping[str, Any], path: str, counter: TokenCounter, own: Purse | None = None
    ) -> Decimal | None:
        """Return the most that one attempt can cost, in USD; None where nobody keeps a budget.

        Raises:
            ValidationError: That has no bound, or the price is not known.
        """
        return await self.quoter.most(body, path, counter) if self.purses(own) else None

    @property
    def stats(self) -> dict[str, Decimal]:
        """What the client may spend, what it spent and what is reserved, in USD; empty without a limit."""
        return {} if self._purse is None else self._purse.stats


@dataclass(frozen=True, slots=True)
class Payment:
    """What is reserved for one attempt."""

    quoter: Quoter
    reservation: Reservation

    def settle(self, demand: Demand, outcome: Outcome) -> None:
        """Replace it by what the attempt came to."""
        self.reservation.settle(self.quoter.actual(demand, outcome))
        self.quoter.say_surprises()

    def give_back(self) -> None:
        """Give it back: nothing was sent."""
        self.reservation.settle(Decimal(0))
