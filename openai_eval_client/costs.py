"""What it cost: the bill of a client, exact to the last digit; and what it will cost."""

from __future__ import annotations

import math
import operator
from decimal import Context, Decimal
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, Field

from openai_eval_client import _notebook
from openai_eval_client._record import Record

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CostEstimate", "CostLedger", "ModelCost"]

EXACT = Context(prec=60)  # digits of sums; the program may have set fewer for its own
_NOTHING = Decimal(0)
_DIME = 0.1  # USD
_ARITHMETIC = operator.add, operator.sub, operator.mul, operator.truediv


class ModelCost(Record):
    """What one model came to by one road and in one service tier.

    Attributes:
        model: The model, as the server names it; as it was asked for where the server does not say.
        road: "online", or "batch" for the Batch API.
        service_tier: The tier that served, "default" where nothing else was said, and for batches.
        calls: Answers that were billed.
        input_tokens: Their input, cached tokens included.
        cached_tokens: The part of the input that the provider had cached.
        output_tokens: Their output, reasoning included.
        reasoning_tokens: The part of the output spent on reasoning.
        unpriced: Calls whose price is not known.
        cost: USD of the others by the published price list; None where no call has a known price.
    """

    model_config = ConfigDict(protected_namespaces=())

    model: str
    road: Literal["online", "batch"]
    service_tier: str
    calls: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    reasoning_tokens: int
    unpriced: int
    cost: Decimal | None


def _compared(compare: Callable[[Any, Any], Any]) -> Any:
    """Return a method that compares the total with a number or with another ledger's."""

    def method(self: CostLedger, other: object) -> Any:
        return compare(*_alike(self, other))

    return method


def _computed(compute: Callable[[Any, Any], Any]) -> Any:
    """Return an operator on the total whose result is a float: a Decimal only where one goes in."""

    def method(self: CostLedger, other: object) -> Any:
        result = compute(*_alike(self, other))
        return float(result) if isinstance(other, CostLedger) else result

    return method


def _swapped(compute: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda own, other: compute(other, own)


def _alike(ledger: CostLedger, other: Any) -> tuple[Any, Any]:
    """Return two amounts that go together: Decimal and float do not."""
    if isinstance(other, CostLedger):
        return ledger.total, other.total
    return (ledger.total if isinstance(other, Decimal) else float(ledger.total)), other


class CostLedger(Record):  # noqa: PLW1641  # mutable, as every pydantic model
    """Everything that was billed so far, and what was not.

    It stands for its total wherever a number is wanted: `float(cost)`, `f"{cost:.2f}"`, `cost < 5`,
    `cost - before`. Two ledgers are equal when all their fields are.

    Attributes:
        total: USD of all calls whose price is known, by the published price list.
        rows: What it is the sum of.
        unpriced: Calls whose price is not known, not in `total`.
        retried: Attempts that were billed without bringing an answer, in `rows` and `total`.
        unaccounted: Attempts that the provider may have billed but did not say so, not in `total`: they timed
            out, were cut off or cancelled, or the answer (most streams, if not asked to) came without usage.
        unaccounted_cost: USD these come to if each used all the tokens that were reserved for it, which for
            those without a maximum is the usual length of an answer.
        saved_by_cache: USD that the answers taken from the local cache would have cost.
    """

    total: Decimal = _NOTHING
    rows: list[ModelCost] = Field(default_factory=list)
    unpriced: int = 0
    retried: int = 0
    unaccounted: int = 0
    unaccounted_cost: Decimal = _NOTHING
    saved_by_cache: Decimal = _NOTHING

    @property
    def by_model(self) -> dict[str, Decimal | None]:
        """USD by model, all roads and tiers together; None where no call of it has a known price."""
        costs: dict[str, Decimal | None] = {}
        for row in self.rows:
            before = costs.get(row.model)
            costs[row.model] = before if row.cost is None else row.cost + (before or _NOTHING)
        return costs

    def _repr_html_(self) -> str:
        return _notebook.bill(self)

    def __float__(self) -> float:
        return float(self.total)

    def __bool__(self) -> bool:
        return bool(self.total)

    def __str__(self) -> str:
        return f"{self.total.normalize():f}"

    def __format__(self, spec: str) -> str:
        return format(float(self), spec) if spec else str(self)

    def __round__(self, digits: int | None = None) -> Any:
        return round(float(self), digits)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, CostLedger):
            return self.__dict__ == other.__dict__
        return bool(operator.eq(*_alike(self, other)))

    __lt__, __le__, __gt__, __ge__ = map(_compared, (operator.lt, operator.le, operator.gt, operator.ge))
    __add__, __sub__, __mul__, __truediv__ = map(_computed, _ARITHMETIC)
    __radd__, __rsub__, __rmul__, __rtruediv__ = map(_computed, map(_swapped, _ARITHMETIC))


class CostEstimate(Record):
    """What prompts will need, between two bounds; `print` shows it in three lines.

    Every prompt is counted as one request that is sent, none as answered from the local cache, and all input
    at the ordinary price of text. So a run may cost less than `cost_low` where the provider had input cached,
    and more than `cost_high` where attempts that brought no answer were billed (see `CostLedger.retried`).
    Where the model has no vocabulary of its own the tokens are estimates, and what the provider adds to the
    input (a previous response, a search, the results of its own tools) is not seen.

    Attributes:
        model: The model that would be asked.
        requests: How many prompts there are.
        prompt_tokens: Input: sum of the tokens of each request.
        completion_tokens_low: Output at least: 0.
        completion_tokens_expected: requests x the mean length of the model's latest answers through this
            client; None before the first.
        completion_tokens_high: Output at most: requests x `max_tokens`, by whatever name, x `n`; None where
            none is given.
        cost_low: USD online: sum of the price of each request's input, and of `completion_tokens_low`.
        cost_expected: The same with `completion_tokens_expected`.
        cost_high: The same with `completion_tokens_high`.
        batch_cost_low: USD through the Batch API, likewise; None where the provider has no such price.
        batch_cost_expected: Likewise.
        batch_cost_high: Likewise.
        unpriced: Requests whose price online is not known, which is none or all of them.
        minutes: From the first request to the last at the configured limits: the larger of
            (requests - burst) / `requests_per_minute` and (reserved tokens - burst) / `tokens_per_minute`,
            where the burst is what a full bucket admits at once, and the tokens reserved for a request are
            its input and at most its output: `max_tokens` x `n`, else the mean length, else 256. Shorter
            answers give their rest back, so it may take less; latency and `max_concurrent` come on top. None
            where no limit is configured.
    """

    model_config = ConfigDict(protected_namespaces=())

    model: str
    requests: int
    prompt_tokens: int
    completion_tokens_low: int = 0
    completion_tokens_expected: int | None = None
    completion_tokens_high: int | None = None
    cost_low: float | None = None
    cost_expected: float | None = None
    cost_high: float | None = None
    batch_cost_low: float | None = None
    batch_cost_expected: float | None = None
    batch_cost_high: float | None = None
    unpriced: int = 0
    minutes: float | None = None

    def _repr_html_(self) -> str:
        return _notebook.estimate(self)

    def __str__(self) -> str:
        output = _range(
            self.completion_tokens_low, self.completion_tokens_expected, self.completion_tokens_high, _count
        )
        online = _range(self.cost_low, self.cost_expected, self.cost_high, usd)
        batch = _range(self.batch_cost_low, self.batch_cost_expected, self.batch_cost_high, usd)
        time = "no limit is configured" if self.minutes is None else _time(self.minutes)
        return (
            f"{self.requests:,} requests to {self.model}: {self.prompt_tokens:,} tokens in, {output} out\n"
            f"USD: {online} online, {batch} by batch\n"
            f"Time at the configured limits: {time}"
        )


def _range(
    low: float | None, expected: float | None, high: float | None, shown: Callable[[float], str]
) -> str:
    """Return two bounds and what is between them, as far as they are known."""
    if low is None:
        return "unknown"
    likely = "" if expected is None else f" (likely {shown(expected)})"
    return f"{shown(low)} or more{likely}" if high is None else f"{shown(low)} to {shown(high)}{likely}"


def _time(minutes: float) -> str:
    return f"{minutes:,.1f} minutes" if minutes >= 1 else f"{60 * minutes:.2g} seconds"


def _count(number: float) -> str:
    return f"{number:,}"


def usd(amount: float) -> str:
    """Return an amount with two decimals, or two digits where it is less than a dime."""
    digits = 2 if amount >= _DIME or not amount else 1 - math.floor(math.log10(amount))
    return f"{amount:,.{digits}f}"
