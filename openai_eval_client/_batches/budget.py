"""What pays for batches: the most that each line can cost, reserved before and settled after."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING

from openai_eval_client._batches.results import NO_ANSWER, UNREADABLE
from openai_eval_client._batches.status import MISSING, request_counts
from openai_eval_client._cost import Reservation, commit, exact, reserve, reserve_now
from openai_eval_client.errors import BatchError, BudgetExceededError, ValidationError
from openai_eval_client.models import ModelResponse

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from openai.types import Batch

    from openai_eval_client._batches.files import InputFile
    from openai_eval_client._batches.results import Outcome
    from openai_eval_client._cost import Budgets, CostBudget
    from openai_eval_client._tokens import TokenCounter


_NOTHING = Decimal(0)
_UNKNOWN = frozenset({MISSING, NO_ANSWER, UNREADABLE})  # what became of the request, and so what it cost


@dataclass(frozen=True, slots=True)
class Bill:
    """What is reserved for the requests of one batch."""

    indexes: Sequence[int]  # the position of each in the caller's list
    costs: Sequence[Decimal]  # USD that each can cost at most
    reservation: Reservation  # for all of them

    def settle(self, batch: Batch, outcomes: Mapping[int, Outcome]) -> None:
        """Replace it by what the answers cost; a request whose answer is lost counts at its most."""
        known = sum(isinstance(each, ModelResponse) or _is_lost(each) for each in outcomes.values())
        certain = request_counts(batch)[1] <= known
        with exact():
            lines = zip(self.indexes, self.costs, strict=True)
            costs = (_actual(outcomes.get(index), most, certain=certain) for index, most in lines)
            self.reservation.settle(sum(costs, _NOTHING))

    def refund(self) -> None:
        """Give it back: the batch was refused, and nothing ran."""
        self.reservation.settle(_NOTHING)

    def keep_reserved(self) -> None:
        """Keep it, but let nobody wait for its settling."""
        self.reservation.keep_reserved()


class Funds:
    """Pays for the parts of one job from the budgets of its call."""

    def __init__(
        self,
        payments: Budgets,
        counter: TokenCounter,
        path: str,
        bills: dict[str, Bill],
        own: CostBudget | None = None,
    ) -> None:
        self._purses = payments.budgets(own)
        self._bounds = payments.bounds
        self._counter = counter
        self._path = path
        self._bills = bills
        self._waiting: dict[str, Bill] = {}
        self._costs: list[Decimal] = []  # of each line of the job

    async def estimate(self, parts: Iterable[InputFile]) -> None:
        """Find out what every line can cost, where anybody keeps a budget."""
        if not self._purses:
            return
        await self._bounds.ready()
        for part in parts:
            await self._counter.most_input({"model": part.model})  # waits for the vocabulary
            self._costs += await asyncio.to_thread(self._costs_of, part)

    def cover(self, part: InputFile) -> bool:
        """Reserve what a part can cost, if there is room for it now and it is not reserved yet."""
        if part.key not in self._waiting:
            costs = self._lines(part)
            try:
                reservation = reserve_now(self._purses, _sum(costs))
            except BudgetExceededError:
                return False
            if reservation is None:
                return False
            self._waiting[part.key] = Bill(part.indexes, costs, reservation)
        return True

    async def cover_all(self, parts: Sequence[InputFile]) -> None:
        """Reserve what all parts can cost together, once there is room for it."""
        amounts = [_sum(self._lines(part)) for part in parts]
        whole = await reserve(self._purses, _sum(amounts))
        for part, piece in zip(parts, whole.split(amounts), strict=True):
            self._waiting[part.key] = Bill(part.indexes, self._lines(part), piece)

    def commit(self, part: InputFile) -> None:
        """Reserve what a part can cost that is submitted already, whether there is room for it or not."""
        costs = self._lines(part)
        self._waiting[part.key] = Bill(part.indexes, costs, commit(self._purses, _sum(costs)))

    def fitting(self, part: InputFile) -> int | None:
        """Return how many of a part's first lines there is room for; None: something may make more room."""
        if not all(budget.idle for budget in self._purses):
            return None
        left = min(budget.free for budget in self._purses)
        for count, cost in enumerate(self._lines(part)):
            left -= cost
            if left < 0:
                return count
        return part.count

    def exceeded(self, part: InputFile) -> BudgetExceededError:
        """Return the error of a part whose first line there is no room for."""
        most = self._lines(part)[0]
        budget = min(self._purses, key=lambda each: each.free)
        return budget.exceeded(most)

    def started(self, part: InputFile, batch_id: str, *, watched: bool) -> None:
        """Keep a part's reservation for its batch; let others wait for it only if its end is waited for."""
        bill = self._waiting.pop(part.key)
        if self._purses:
            self._bills[batch_id] = bill
        if not watched:
            bill.keep_reserved()

    def refused(self, part: InputFile) -> None:
        """Give back what is reserved for a part of which no batch was made."""
        bill = self._waiting.pop(part.key, None)
        if bill is not None:
            bill.refund()

    def unclear(self, part: InputFile) -> None:
        """Count a part as spent of which nobody knows whether there is a batch."""
        bill = self._waiting.pop(part.key, None)
        if bill is not None:
            bill.keep_reserved()

    def cancelled(self, batch_id: str) -> None:
        """Give back what is reserved for a batch that never ran."""
        bill = self._bills.pop(batch_id, None)
        if bill is not None:
            bill.refund()

    def leave(self, parts: Iterable[InputFile], batch_ids: Iterable[str], *, unclear: bool) -> None:
        """End with parts not submitted, or perhaps, and batches that nobody watches any more."""
        for part in parts:
            (self.unclear if unclear else self.refused)(part)
        for batch_id in batch_ids:
            if batch_id in self._bills:
                self._bills[batch_id].keep_reserved()

    def _lines(self, part: InputFile) -> list[Decimal]:
        return self._costs[part.first : part.first + part.count]

    def _costs_of(self, part: InputFile) -> list[Decimal]:
        part.file.seek(0)
        same: dict[Decimal, Decimal] = {}  # few lines differ, and all costs are kept
        return [
            same.setdefault(cost, cost)
            for cost in (self._cost(raw, n) for raw, n in zip(part.file, part.indexes, strict=True))
        ]

    def _cost(self, raw: bytes, index: int) -> Decimal:
        try:
            return self._bounds.most_by_batch(json.loads(raw)["body"], self._path, self._counter)
        except ValidationError as error:
            raise ValidationError(f"request {index}: {error}", field=error.field, index=index) from None


def _sum(costs: Iterable[Decimal]) -> Decimal:
    with exact():
        return sum(costs, _NOTHING)


def _actual(outcome: Outcome | None, most: Decimal, *, certain: bool) -> Decimal:
    """Return what a request came to: nothing, where it failed, and it is `certain` that no answer is lost."""
    if isinstance(outcome, ModelResponse):
        cost = outcome.usage.estimated_cost
        return most if cost is None or outcome.usage.estimated else Decimal(repr(cost))
    return _NOTHING if certain and not _is_lost(outcome) else most


def _is_lost(outcome: Outcome | None) -> bool:
    """Return whether there may have been an answer that is not known."""
    return outcome is None or (isinstance(outcome, BatchError) and outcome.code in _UNKNOWN)
