"""Budgets in USD: reserve the most that an attempt can cost, settle what it did cost."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn, TypeAlias

from openai_eval_client._cost.ledger import EXACT
from openai_eval_client._log import inform, warn
from openai_eval_client._runtime import STATE_LOCK, FairQueue, Queued
from openai_eval_client._validation import check_cost
from openai_eval_client._wire import endpoint_of, token_count
from openai_eval_client.errors import BudgetExceededError, ValidationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from typing_extensions import Self

    from openai_eval_client._cost.ledger import Ledger
    from openai_eval_client._tokens import TokenCounter
    from openai_eval_client._wire import Demand, Outcome, Usage

_NOTHING = Decimal(0)
_LONG_WAIT = 1.0  # seconds from which a wait is logged
_LOOK_AGAIN = 5.0  # seconds after which a wait looks for reservations of closed loops

# Parameters on which the cost of a request depends, besides those that bound its output.
_CHOICES = ("n", "best_of")  # the parameters that multiply the output
_HIDDEN_INPUT = ("conversation", "previous_response_id", "web_search_options")  # add input kept elsewhere
_CALLER_TOOLS = ("function", "custom")  # all others run at the provider, for a price of their own
_FILES = ("file", "input_file")


def most_output(body: Mapping[str, Any], path: str) -> int:
    """Return the most tokens that all answers to a request can have together."""
    names = endpoint_of(path).output_caps
    if names is None:
        _reject(f"what a request to {path} costs is not known beforehand")
    _check_parameters(body)
    if not names:
        return 0
    cap, choices = _largest(body, names, least=0), _largest(body, _CHOICES, least=1, default=1)
    if cap is None:
        _reject("needs max_tokens (or max_completion_tokens, max_output_tokens), a whole number")
    if choices is None:
        _reject("needs n (and best_of) to be whole numbers, 1 or more")
    # A prediction is billed too where the answer differs from it; a token is a byte at least.
    predicted = len(str(body["prediction"]).encode()) if body.get("prediction") else 0
    prompt = body.get("prompt")
    prompts = len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1
    return (cap + predicted) * choices * prompts


def _largest(
    body: Mapping[str, Any], names: Iterable[str], *, least: int, default: int | None = None
) -> int | None:
    """Return the largest of these parameters; None where one is no whole number of at least `least`."""
    given = [value for name in names if (value := body.get(name)) is not None]
    counts = [count for value in given if (count := token_count(value)) is not None and count >= least]
    return max(counts, default=default) if len(counts) == len(given) else None


def _check_parameters(body: Mapping[str, Any]) -> None:
    """Reject parameters whose cost is not known beforehand."""
    hidden = [name for name in _HIDDEN_INPUT if body.get(name) is not None]
    hidden += ["prompt"] if isinstance(body.get("prompt"), Mapping) else []  # a template
    if hidden:
        _reject(f"what {hidden[0]} adds to the input is not known beforehand")
    tools = body.get("tools")
    for tool in tools if isinstance(tools, list | tuple) else ():
        kind = tool.get("type", "function") if isinstance(tool, Mapping) else None
        if kind not in _CALLER_TOOLS:
            _reject(f"what a tool of type {kind!r} costs is not known beforehand")


def _parts(values: Iterable[Any]) -> Iterator[Mapping[str, Any]]:
    """Yield every object in messages or input items, those within others too; reject one kept elsewhere."""
    for value in values:
        if isinstance(value, Mapping):
            kind, file = value.get("type"), value.get("file", value)
            whole = isinstance(file, Mapping) and isinstance(file.get("file_data"), str)
            if kind == "item_reference" or (kind in _FILES and not whole):
                _reject(f"the size of a {kind} given by its id alone is not known beforehand", field="prompt")
            yield value
            yield from _parts(value.values())
        elif isinstance(value, list | tuple):
            yield from _parts(value)


def _reject(why: str, *, field: str = "max_cost") -> NoReturn:
    raise ValidationError(f"max_cost: {why}", field=field)


# "kept" is reserved too, but perhaps for good, so that nothing waits for it to be settled; "" is not.
_State: TypeAlias = Literal["held", "kept", ""]


@dataclass(slots=True, eq=False)
class _Hold(Queued):
    """What one budget reserves, or has a request wait for."""

    budget: CostBudget
    amount: Decimal  # USD
    state: _State = ""


class CostBudget:
    """A limit on what is spent, kept by reserving; safe for several threads and event loops.

    First come, first served: a request for which there is no room now, but may be once others are settled,
    waits for that, and those after it wait too. One for which there cannot be room any more is refused. What
    is spent and reserved stays within the limit, as long as nothing costs more than was reserved for it.
    """

    def __init__(self, limit: Decimal, *, reclaim: Callable[[], object] = lambda: None) -> None:
        self._limit = limit
        self._lock = STATE_LOCK
        self._reclaim = reclaim  # gives back what closed loops hold
        self._spent = _NOTHING
        self._reserved: dict[_State, Decimal] = {"held": _NOTHING, "kept": _NOTHING}
        self._queue: FairQueue[_Hold] = FairQueue()
        self._turns = itertools.count()

    async def reserve(self, amount: Decimal, reservation: Reservation) -> None:
        """Add an amount in USD to a reservation, once there is room for it; until then it waits in it."""
        with self._lock:
            if amount > self._most_room():
                raise self.exceeded(amount)
            hold, asked_at = self._ask(amount), time.monotonic()
            reservation.holds.append(hold)
            if hold.state == "held":
                return
            hold.future = asyncio.get_running_loop().create_future()
            self._queue.add(next(self._turns), hold)
        while not (await asyncio.wait({hold.future}, timeout=_LOOK_AGAIN))[0]:
            self._reclaim()
        hold.future.result()
        waited = time.monotonic() - asked_at
        if waited >= _LONG_WAIT:
            text = "waited %.2f s for what other requests reserve of max_cost=%s"
            inform(text, waited, self._limit, event="waited_for_money", wait_seconds=waited)

    def reserve_now(self, amount: Decimal) -> _Hold | None:
        """Reserve an amount in USD at once; None where there is no room now."""
        with self._lock:
            hold = self._ask(amount)
            return hold if hold.state == "held" else None

    def commit(self, amount: Decimal) -> _Hold:
        """Reserve an amount in USD that is being spent already, whether there is room for it or not."""
        hold = _Hold(self, amount)
        with self._lock:
            self._move(hold, "held")
        return hold

    def settle(self, hold: _Hold, actual: Decimal) -> None:
        """Replace a reservation by what was spent, in USD; a second call does nothing."""
        self._lock.when_free(lambda: self._end(hold, "", actual))

    def keep_reserved(self, hold: _Hold) -> None:
        """Keep a reservation, but let nothing wait for its settling, which may never come."""
        self._lock.when_free(lambda: self._end(hold, "kept", _NOTHING))

    @property
    def free(self) -> Decimal:
        """USD that can be reserved now."""
        with self._lock:
            return _NOTHING if self._queue else max(_NOTHING, self._room())

    @property
    def idle(self) -> bool:
        """Whether nothing is in flight that may turn out cheaper."""
        with self._lock:
            return not self._reserved["held"] and not self._queue

    @property
    def stats(self) -> dict[str, Decimal]:
        """The limit, what was spent of it and what is reserved, in USD."""
        with self._lock:
            reserved = EXACT.add(*self._reserved.values())
            return {"limit": self._limit, "spent": self._spent, "reserved": reserved}

    def exceeded(self, amount: Decimal) -> BudgetExceededError:
        """Return the error of a request for so many USD."""
        limit, spent, reserved, asked = (f"{usd.normalize():f}" for usd in (*self.stats.values(), amount))
        held = f"{spent} spent, {reserved} reserved for what is in flight"
        return BudgetExceededError(f"max_cost={limit} USD: {held}, and the next request may cost {asked}")

    def _ask(self, amount: Decimal) -> _Hold:
        """Reserve an amount at once, or return it as still waiting."""
        hold = _Hold(self, amount)
        if not self._queue and amount <= self._room():
            self._move(hold, "held")
        return hold

    def _move(self, hold: _Hold, state: _State) -> None:
        """Change the state of a reservation, and count its amount there."""
        for counted, change in ((hold.state, EXACT.subtract), (state, EXACT.add)):
            if counted in self._reserved:
                self._reserved[counted] = change(self._reserved[counted], hold.amount)
        hold.state, hold.waits = state, False

    def _end(self, hold: _Hold, state: _State, actual: Decimal) -> None:
        if hold.state:
            self._spent = EXACT.add(self._spent, actual)
        if not state or hold.state == "held":
            self._move(hold, state)
        self._serve_waiting()

    def _serve_waiting(self) -> None:
        """Grant what waits, first come, first served; fail that for which there cannot be room any more."""
        most = self._most_room() if self._queue else _NOTHING
        while (hold := self._queue.first()) is not None:
            if EXACT.subtract(most, self._reserved["held"]) < hold.amount <= most:
                return
            self._move(hold, "held" if hold.amount <= most else "")
            if not hold.wake(None if hold.state else self.exceeded(hold.amount)):
                self._move(hold, "")  # its loop has closed

    def _most_room(self) -> Decimal:
        """Return what there would be room for if all in flight turned out to cost nothing."""
        return EXACT.subtract(EXACT.subtract(self._limit, self._spent), self._reserved["kept"])

    def _room(self) -> Decimal:
        """Return what there is room for now."""
        return EXACT.subtract(self._most_room(), self._reserved["held"])


@dataclass(frozen=True, slots=True)
class Reservation:
    """What is reserved from each budget that pays for an attempt, or for a batch."""

    holds: list[_Hold] = field(default_factory=list)

    async def reserve(self, budgets: Iterable[CostBudget], amount: Decimal) -> None:
        """Reserve an amount in USD from several budgets, once all of them have room for it."""
        try:
            for budget in budgets:
                await budget.reserve(amount, self)
        except BaseException:
            self.refund()
            raise

    def settle(self, actual: Decimal) -> None:
        """Replace it by what was spent, in USD; a second call does nothing."""
        for hold in self.holds:
            hold.budget.settle(hold, actual)

    def refund(self) -> None:
        """Give it back: nothing was spent."""
        self.settle(_NOTHING)
        self.holds.clear()

    def keep_reserved(self) -> None:
        """Keep it, but let nothing wait for its settling, which may never come."""
        for hold in self.holds:
            hold.budget.keep_reserved(hold)

    def split(self, amounts: Sequence[Decimal]) -> list[Reservation]:
        """Return it as several, of amounts in USD that add up to it."""
        budgets = [hold.budget for hold in self.holds]
        pieces = [commit(budgets, amount) for amount in amounts]
        self.refund()  # last, so that no other request takes the amount in between
        return pieces


def reserve_now(budgets: Iterable[CostBudget], amount: Decimal) -> Reservation | None:
    """Reserve an amount in USD from several budgets at once; None where one has no room now."""
    reservation = Reservation()
    for budget in budgets:
        hold = budget.reserve_now(amount)
        if hold is None:
            reservation.refund()
            return None
        reservation.holds.append(hold)
    return reservation


def commit(budgets: Iterable[CostBudget], amount: Decimal) -> Reservation:
    """Reserve an amount in USD that is being spent already, whether there is room for it or not."""
    return Reservation([budget.commit(amount) for budget in budgets])


class _Request(NamedTuple):
    """What the most that a request can cost depends on."""

    model: str
    input: int  # tokens at most
    output: int  # tokens at most, as far as the model keeps to it
    audio: dict[str, bool]  # whether it may have "audio_input", "audio_output"
    batch: bool
    tier: str | None  # the service tier asked for; None: none, so that the project's default serves


def _request(body: Mapping[str, Any], tokens: int, output: int, *, batch: bool) -> _Request:
    """Return what the most that a request can cost depends on."""
    model, asked = body.get("model"), body.get("service_tier")
    if not isinstance(model, str):
        _reject(f"what model={model!r} costs is not known")
    parts = list(_parts((body.get("messages"), body.get("input"))))
    hidden = (part.get("encrypted_content") for part in parts)
    tokens += sum(len(content) for content in hidden if isinstance(content, str))
    audio = {
        "audio_input": any(part.get("type") == "input_audio" for part in parts),
        "audio_output": "audio" in (body.get("modalities") or ()),
    }
    tier = asked if isinstance(asked, str) and asked != "auto" and not batch else None
    return _Request(model, tokens, output, audio, batch, tier)


class _MostCost(Decimal):
    """The most that a request can cost in USD, as far as was known when it was made."""

    def __new__(cls, amount: Decimal, request: _Request) -> Self:
        made = super().__new__(cls, amount)
        made.request = request
        return made

    request: _Request


class Budgets:
    """The budgets of one client: what its requests can cost, and what they did cost."""

    def __init__(
        self, ledger: Ledger, max_cost: float | None, *, reclaim: Callable[[], object] = lambda: None
    ) -> None:
        self._ledger = ledger
        self._reclaim = reclaim
        self._budget = self._new(max_cost)
        self._overspent: set[str] = set()  # models of which it was logged
        # What answers showed, by the model asked:
        self._served: dict[str, set[str | None]] = {}  # tiers that served where none was asked for
        self._excess: dict[str, Fraction] = {}  # the longest output, in shares of what was allowed

    def budget_for(
        self, max_cost: float | Decimal | None, body: Mapping[str, Any], path: str
    ) -> CostBudget | None:
        """Return a call's own budget, None for None; where there is any budget, check that it can be kept."""
        own = self._new(max_cost)
        if self.budgets(own):
            most_output(body, path)
        return own

    def budgets(self, own: CostBudget | None = None) -> list[CostBudget]:
        """Return what a call is paid from: its own budget, where it has one, and the client's."""
        return [budget for budget in (own, self._budget) if budget is not None]

    async def most(
        self, body: Mapping[str, Any], path: str, counter: TokenCounter, own: CostBudget | None = None
    ) -> Decimal | None:
        """Return the most that one attempt can cost, in USD; None where there is no budget to keep."""
        if not self.budgets(own):
            return None
        if endpoint_of(path).free:
            return _NOTHING
        output = most_output(body, path)
        await self.ready()
        request = _request(body, await counter.most_input(body), output, batch=False)
        return _MostCost(self._price(request), request)

    async def ready(self) -> None:
        """Load the price list, for `most_by_batch`."""
        await self._ledger.pricer_for(None).ready()

    def most_by_batch(self, body: Mapping[str, Any], path: str, counter: TokenCounter) -> Decimal:
        """Return the most that one line of a batch can cost; as long as counting takes: for a thread."""
        output = most_output(body, path)
        return self._price(_request(body, counter.most_input_now(body), output, batch=True))

    def actual(self, demand: Demand, outcome: Outcome, cost: Decimal | None) -> Decimal:
        """Return what an attempt cost in USD: its price, where that is known; else the most it can."""
        usage = outcome.usage
        if usage is not None and isinstance(demand.most_cost, _MostCost):
            self._learn(demand.most_cost.request, usage)
        most = min(demand.most_cost or _NOTHING, self._amount(demand))
        if usage is None:  # a refusal costs nothing, nor does what was never sent
            return most if outcome.may_be_billed else _NOTHING
        if cost is None:  # of a model or tier without a price: at least what it would cost ordinarily
            pricer, now = self._ledger.pricer_for(None), time.time()
            cost = pricer.price(str(demand.model), usage, batch=False, service_tier=None, at=now)
            return max(cost or _NOTHING, most)
        if usage.estimated:  # it used that much at least
            return max(cost, most)
        model = usage.model or str(demand.model)
        if cost > most and model not in self._overspent:
            self._overspent.add(model)
            text = "an answer of %s cost %s USD, more than the %s reserved for it: max_cost may be overspent"
            warn(text, model, cost, most, event="overspent", model=model, cost=float(cost))
        return cost

    async def reserve(self, demand: Demand, own: CostBudget | None, reservation: Reservation) -> None:
        """Reserve the most that an attempt can cost, once there is room for it."""
        # While it waits, answers may show that this is more or less than was known.
        while True:
            amount = self._amount(demand)
            try:
                await reservation.reserve(self.budgets(own), amount)
            except BudgetExceededError:
                if self._amount(demand) < amount:
                    continue
                raise
            if self._amount(demand) <= amount:
                return
            reservation.refund()

    def shared(self, ledger: Ledger) -> Budgets:
        """Return the same budget for another account, whose prices may be others."""
        other = Budgets(ledger, None)
        other._budget = self._budget
        return other

    @property
    def stats(self) -> dict[str, Decimal]:
        """What the client may spend, what it spent and what is reserved, in USD; empty without a limit."""
        return {} if self._budget is None else self._budget.stats

    def _new(self, max_cost: float | Decimal | None) -> CostBudget | None:
        if max_cost is None:
            return None
        check_cost(max_cost, "max_cost")
        return CostBudget(Decimal(str(max_cost)), reclaim=self._reclaim)

    def _learn(self, request: _Request, usage: Usage) -> None:
        """Note in which tier an answer was served, and whether its output exceeded what was allowed."""
        model, pricer = request.model, self._ledger.pricer_for(None)
        if request.tier is None and pricer.loaded:
            is_known = usage.service_tier in pricer.tiers(model, at=time.time())
            self._served.setdefault(model, set()).add(usage.service_tier if is_known else None)
        if usage.completion_tokens > request.output > 0 and not usage.estimated:
            excess = Fraction(usage.completion_tokens, request.output)
            self._excess[model] = max(excess, self._excess.get(model, excess))

    def _amount(self, demand: Demand) -> Decimal:
        """Return the most that an attempt can cost by what answers have shown since that was asked."""
        most = demand.most_cost or _NOTHING
        if isinstance(most, _MostCost):
            with contextlib.suppress(Exception):  # the price list has changed; an answer may wait for this
                return self._price(most.request)
        return most

    def _price(self, request: _Request) -> Decimal:
        """Price all input and all output at the highest price that either can have."""
        # Where a tier was asked for, the ordinary one may serve instead. Where none was, the project's own
        # does, which may be the dearest until an answer tells. Some models reason beyond their max_tokens.
        pricer, (model, tokens, output, audio, batch, asked) = self._ledger.pricer_for(None), request
        tiers: set[str | None] = {None, asked}
        if asked is None and not batch:
            tiers |= self._served.get(model) or pricer.tiers(model, at=time.time())
        output, costs = math.ceil(output * self._excess.get(model, 1)), []
        for tier in tiers:
            rates = pricer.rates(model, batch=batch, service_tier=tier, at=time.time())
            cost = None if rates is None else rates.most(tokens, output, **audio)
            if cost is not None:
                costs.append(cost)
            elif tier in {None, asked}:
                named = "price" if tier is None else f"price in service tier {tier!r}"
                kind = "batch price" if batch else named
                _reject(f"the {kind} of model={model!r} is not known, so the cost cannot be limited")
        return max(costs)
