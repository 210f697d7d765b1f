"""What batches may cost: reserved before they are made, settled by what their answers cost."""

from __future__ import annotations

import asyncio
from decimal import Decimal
from typing import TYPE_CHECKING

from openai_eval_client._batches.objects import (
    LOST,
    MISSING,
    NO_ANSWER,
    UNREADABLE,
    UNUSABLE_FILE,
    request_counts,
)
from openai_eval_client._cost import Reservation, commit, exact, reserve_now
from openai_eval_client._wire import read_json
from openai_eval_client.errors import BatchError, ValidationError
from openai_eval_client.models import ModelResponse

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from openai.types import Batch

    from openai_eval_client._batches.files import InputFile
    from openai_eval_client._cost import Budgets, CostBudget
    from openai_eval_client._tokens import TokenCounter
    from openai_eval_client.errors import BudgetExceededError

    Outcome = ModelResponse | Exception

_NOTHING = Decimal(0)
# what became of the request, and so what it cost
_UNKNOWN = frozenset({MISSING, LOST, UNUSABLE_FILE, NO_ANSWER, UNREADABLE})


def settle_reservation(
    file: InputFile, batch: Batch, outcomes: Mapping[int, Outcome], billed: Mapping[int, float | None]
) -> None:
    """Replace what is reserved by what the answers cost; a request whose answer is lost counts in full."""
    if file.reservation is None:
        return
    known = sum(isinstance(each, ModelResponse) or _is_lost(each) for each in outcomes.values())
    certain = request_counts(batch)[1] <= known  # that no other request was answered
    costs: list[Decimal] = []
    for index, most in zip(file.indexes, file.costs, strict=True):
        outcome, cost = outcomes.get(index), most
        if isinstance(outcome, ModelResponse):
            if outcome.usage.estimated_cost is not None and not outcome.usage.estimated:
                cost = Decimal(repr(outcome.usage.estimated_cost))
        elif index in billed:
            cost = most if billed[index] is None else Decimal(repr(billed[index]))
        elif certain and not _is_lost(outcome):
            cost = _NOTHING
        costs.append(cost)
    file.reservation.settle(_sum(costs))


def _is_lost(outcome: Outcome | None) -> bool:
    """Return whether there may have been an answer that is not known."""
    return outcome is None or (isinstance(outcome, BatchError) and outcome.code in _UNKNOWN)


class BatchBudget:
    """Reserves what the input files of one call can cost, from the call's budget and the client's."""

    def __init__(self, payments: Budgets, counter: TokenCounter, own: CostBudget | None = None) -> None:
        self._budgets = payments.budgets(own)
        self._payments = payments
        self._counter = counter

    async def estimate(self, files: Iterable[InputFile], endpoint: str) -> None:
        """Find out what every line can cost, where there is any budget."""
        if not self._budgets:
            return
        await self._payments.ready()
        for file in files:
            await self._counter.most_input({"model": file.model})  # waits for the vocabulary
            file.costs = await asyncio.to_thread(self._costs, file, endpoint)

    def reserve(self, file: InputFile, *, is_made: bool = False) -> bool:
        """Reserve what a file can cost, once; False: there is no room. One whose batch is made needs none."""
        if self._budgets and file.reservation is None:
            take = commit if is_made else reserve_now
            file.reservation = take(self._budgets, _sum(file.costs))
        return not self._budgets or file.reservation is not None

    async def reserve_all(self, files: Sequence[InputFile]) -> None:
        """Reserve what all files can cost together, once there is room for it."""
        if not self._budgets:
            return
        amounts = [_sum(file.costs) for file in files]
        whole = Reservation()
        await whole.reserve(self._budgets, _sum(amounts))
        for file, reservation in zip(files, whole.split(amounts), strict=True):
            file.reservation = reservation

    def release(self, file: InputFile, *, keep: bool = False) -> None:
        """Give back what is reserved for a file; or keep it, though no request waits for its settling."""
        if file.reservation is not None and keep:
            file.reservation.keep_reserved()
        elif file.reservation is not None:
            file.reservation.refund()
            file.reservation = None

    def fitting(self, file: InputFile) -> int | None:
        """Return how many of a file's first lines there is room for; None: there may be more room later."""
        if not all(budget.idle for budget in self._budgets):
            return None
        left = min(budget.free for budget in self._budgets)
        for count, cost in enumerate(file.costs):
            left -= cost
            if left < 0:
                return count
        return file.count

    def exceeded(self, file: InputFile) -> BudgetExceededError:
        """Return the error of a file whose first line there is no room for."""
        budget = min(self._budgets, key=lambda budget: budget.free)
        return budget.exceeded(file.costs[0])

    def _costs(self, file: InputFile, endpoint: str) -> list[Decimal]:
        costs, same = list[Decimal](), dict[Decimal, Decimal]()  # few lines differ, and all costs are kept
        for raw, index in zip(file.lines(), file.indexes, strict=True):
            try:
                cost = self._payments.most_by_batch(read_json(raw)["body"], endpoint, self._counter)
            except ValidationError as error:
                raise ValidationError(f"request {index}: {error}", field=error.field, index=index) from None
            costs.append(same.setdefault(cost, cost))
        return costs


def _sum(costs: Iterable[Decimal]) -> Decimal:
    with exact():
        return sum(costs, _NOTHING)
