"""The ledger behind `client.stats.cost`: every billed attempt, online or by batch, at its exact price."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from dataclasses import asdict, dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, NamedTuple

from openai_eval_client._cost.pricing import EXACT, Pricer, exact
from openai_eval_client._format import valid_text
from openai_eval_client._wire import Usage
from openai_eval_client.models import CostLedger, ModelCost

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from openai_eval_client._wire import Demand, Outcome


_NOTHING = Decimal(0)
_GROUP = 100  # entries that are summed at a time
_BACKLOG = 10_000  # entries, about 3 MB, from which a thread loads the price list


class _Entry(NamedTuple):
    """Something with a price: what was used, or would have been."""

    kind: str  # "answered", "retried", "unaccounted" or "saved"
    model: str
    usage: Usage
    batch: bool
    at: float
    cost: Decimal | None  # USD; None: still to be priced, or without a price


@dataclass(slots=True)
class _Row:
    """The sums of one `ModelCost`."""

    model: str
    channel: str
    service_tier: str
    calls: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    unpriced: int = 0
    cost: Decimal = _NOTHING

    def add(self, usage: Usage, cost: Decimal | None) -> None:
        """Add one answer."""
        self.calls += 1
        self.input_tokens += usage.prompt_tokens
        self.cached_tokens += usage.cached_tokens
        self.output_tokens += usage.completion_tokens
        self.reasoning_tokens += usage.reasoning_tokens
        self.unpriced += cost is None
        self.cost = EXACT.add(self.cost, cost or _NOTHING)

    def public(self) -> ModelCost:
        """Return the row as the user sees it: no price is None, not 0."""
        priced = self.calls > self.unpriced
        return ModelCost(**{**asdict(self), "cost": self.cost if priced else None})


class Ledger:
    """What the answers of one client cost; safe for several threads.

    An answer has its own price, by the length of its input, the service tier and the hour. It is priced once,
    as it is entered: appended to a queue, which needs no lock, so that a collected stream or a signal handler
    may do it anywhere. The queue is summed a hundred entries at a time, and whenever the ledger is read. What
    is entered before the price list is loaded, which takes half a second, is priced only then.
    """

    def __init__(self) -> None:
        self._pricer: Pricer | None = None
        self._queue: deque[_Entry] = deque()
        self._lock = threading.RLock()  # re-entrant: a signal handler may read what it interrupts
        self._held = self._loading = False
        self._loaders: set[int] = set()
        self._rows: dict[tuple[str, bool, str], _Row] = {}
        self._retried = self._unaccounted = 0
        self._unaccounted_cost = self._saved = _NOTHING

    def pricer_for(self, base_url: str | None) -> Pricer:
        """Return what prices the entries; the address given first decides whose prices they are."""
        if self._pricer is None:
            self._pricer = Pricer(base_url)
        return self._pricer

    def settled(self, demand: Demand, outcome: Outcome, reserved: float) -> Decimal | None:
        """Enter what came of an attempt; return what its answer costs in USD, None where not known yet."""
        if demand.model is None:
            return None
        if outcome.usage is not None:
            kind = "answered" if outcome.ok else "retried"
            return self._enter(kind, demand.model, outcome.usage)
        if outcome.may_be_billed and not demand.free:
            output = max(0, round(reserved) - demand.input_tokens)
            self._enter("unaccounted", demand.model, Usage(demand.input_tokens, output))
        return None

    def saved(self, model: str, usage: Usage, *, batch: bool = False) -> None:
        """Enter an answer that the local cache gave, and that would have used this much."""
        self._enter("saved", model, usage, batch=batch)

    def book_batch(self, entries: Iterable[tuple[str, Usage, Decimal | None]]) -> None:
        """Enter the answers of a batch: the model, what each used, and its price in USD."""
        with self._alone():
            for model, usage, cost in entries:
                self._row(model, None, batch=True).add(usage, cost)

    def keep_up(self) -> None:
        """Sum and log what has piled up, without waiting for anything; no lock may be held."""
        pricer = self.pricer_for(None)
        if pricer.loaded:
            if len(self._queue) >= _GROUP:
                self._book(2 * _GROUP, wait=False)
            pricer.log_unpriced()
        elif len(self._queue) >= _BACKLOG and not self._loading:
            self._loading = True
            with contextlib.suppress(RuntimeError):  # the interpreter is shutting down
                threading.Thread(target=self._catch_up, name="openai_eval_client prices").start()

    def snapshot(self) -> CostLedger:
        """Return the ledger as it stands; loads the price list where there is something to price."""
        if self._queue:
            self._catch_up()
        self.pricer_for(None).log_unpriced()  # unlocked: a log handler has a lock of its own
        with self._alone(), exact():
            return CostLedger(
                total=sum((row.cost for row in self._rows.values()), _NOTHING),
                rows=[row.public() for row in self._rows.values()],
                unpriced=sum(row.unpriced for row in self._rows.values()),
                retried=self._retried,
                unaccounted=self._unaccounted,
                unaccounted_cost=self._unaccounted_cost,
                saved_by_cache=self._saved,
            )

    def _price(self, model: str, usage: Usage, *, batch: bool, at: float) -> Decimal | None:
        rates = self.pricer_for(None).rates(model, batch=batch, service_tier=usage.service_tier, at=at)
        return None if rates is None else rates.price(usage)

    def _enter(self, kind: str, model: str, usage: Usage, *, batch: bool = False) -> Decimal | None:
        model, at, cost = usage.model or model, time.time(), None
        if self.pricer_for(None).loaded:
            cost = self._price(model, usage, batch=batch, at=at)
        self._queue.append(_Entry(kind, model, usage, batch, at, cost))
        return cost

    def _catch_up(self) -> None:
        """Load the price list where that is still to be done, and sum all entries."""
        thread = threading.get_ident()
        if thread in self._loaders:
            return  # this interrupts the same thread at it, and a module cannot be imported within its import
        self._loaders.add(thread)
        try:
            self.pricer_for(None).load()
        finally:
            self._loaders.discard(thread)
        self._book(len(self._queue), wait=True)

    def _book(self, count: int, *, wait: bool) -> None:
        """Sum the oldest entries; without `wait`, only if no other thread does so or reads."""
        with self._alone(wait=wait) as free:
            while free and count > 0 and self._queue:
                self._sum(self._queue.popleft())
                count -= 1

    @contextlib.contextmanager
    def _alone(self, *, wait: bool = True) -> Iterator[bool]:
        """Take the lock; yield False where another thread has it, or this thread already holds it."""
        # A collected stream or a signal handler may do that; it may then read, but not change anything.
        if not self._lock.acquire(blocking=wait):
            yield False
            return
        interrupts, self._held = self._held, True
        try:
            yield not interrupts
        finally:
            self._held = interrupts
            self._lock.release()

    def _sum(self, entry: _Entry) -> None:
        kind, model, usage, batch, at, cost = entry
        if cost is None:
            cost = self._price(model, usage, batch=batch, at=at)
        if kind == "saved":
            self._saved = EXACT.add(self._saved, cost or _NOTHING)
        elif kind == "unaccounted":
            self._unaccounted += 1
            self._unaccounted_cost = EXACT.add(self._unaccounted_cost, cost or _NOTHING)
        else:
            self._retried += kind == "retried"
            self._row(model, usage.service_tier, batch=batch).add(usage, cost)

    def _row(self, model: str, tier: str | None, *, batch: bool) -> _Row:
        tier = "default" if tier is None or tier == "auto" else tier
        row = self._rows.get((model, batch, tier))
        if row is None:
            channel = "batch" if batch else "online"
            row = self._rows[model, batch, tier] = _Row(valid_text(model), channel, valid_text(tier))
        return row
