"""Reserving from several purses at once: all of them have room, or nothing is reserved."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING

from openai_eval_client.errors import BudgetExceededError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from openai_eval_client._spending import Hold, Purse

_NOTHING = Decimal(0)


@dataclass(frozen=True, slots=True)
class Reservation:
    """What one request reserves, from each purse that it is to be paid from.

    Attributes:
        amount: USD.
        holds: Each purse and what it reserves.
    """

    amount: Decimal
    holds: tuple[tuple[Purse, Hold], ...]

    def settle(self, actual: Decimal) -> None:
        """Replace it by what was spent, in USD; a second call does nothing."""
        for purse, hold in self.holds:
            purse.settle(hold, actual)

    def split(self, amounts: Sequence[Decimal]) -> list[Reservation]:
        """Return it as several, of amounts in USD that add up to it."""
        pieces = [[(purse, piece) for piece in purse.split(hold, amounts)] for purse, hold in self.holds]
        parts = zip(*pieces, strict=True) if pieces else [()] * len(amounts)
        return [Reservation(amount, part) for amount, part in zip(amounts, parts, strict=True)]

    def stand(self) -> None:
        """Keep it, but let nobody wait for its settling, which may never come."""
        for purse, hold in self.holds:
            purse.stand(hold)


async def reserve(purses: Sequence[Purse], amount: Decimal) -> Reservation:
    """Reserve an amount from several purses, once all of them have room for it.

    Args:
        purses: In the same order for every request, so that none waits for another in a circle.
        amount: USD.

    Returns:
        The reservation, to be settled.

    Raises:
        BudgetExceededError: There cannot be room for it any more.
    """
    holds: list[tuple[Purse, Hold]] = []
    try:
        for purse in purses:
            holds.append((purse, await purse.reserve(amount)))  # noqa: PERF401  # is given back in parts
    except BaseException:
        Reservation(amount, tuple(holds)).settle(_NOTHING)
        raise
    return Reservation(amount, tuple(holds))


def reserve_now(purses: Sequence[Purse], amount: Decimal) -> Reservation | None:
    """Reserve an amount from several purses at once; None where there is no room now, but may be later.

    Raises:
        BudgetExceededError: There cannot be room for it any more.
    """
    holds: list[tuple[Purse, Hold]] = []
    try:
        for purse in purses:
            hold = purse.reserve_now(amount)
            if hold is None:
                break
            holds.append((purse, hold))
        else:
            return Reservation(amount, tuple(holds))
    except BudgetExceededError:
        Reservation(amount, tuple(holds)).settle(_NOTHING)
        raise
    Reservation(amount, tuple(holds)).settle(_NOTHING)
    return None


def commit(purses: Sequence[Purse], amount: Decimal) -> Reservation:
    """Reserve an amount that is being spent already, whether there is room for it or not."""
    return Reservation(amount, tuple((purse, purse.commit(amount)) for purse in purses))
