"""The prices of answers and the bill: every billed attempt, exact to the last digit."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from decimal import Context, Decimal, localcontext
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeAlias, TypeVar

from openai_eval_client._format import valid_text
from openai_eval_client._log import inform, warn
from openai_eval_client._runtime import ForkAware, mind_forks
from openai_eval_client._wire import Usage
from openai_eval_client.models import CostLedger, ModelCost

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from genai_prices.types import ModelPrice, PriceCalculation, TieredPrices

    from openai_eval_client._wire import Demand, Outcome

EXACT = Context(prec=60)  # digits; the program may have set fewer for its own sums


def exact() -> contextlib.AbstractContextManager[Context]:
    """Return a context manager that makes sums exact, whatever precision the program has set."""
    return localcontext(EXACT)


_NOTHING = Decimal(0)

# A price and its tiers, the highest first: the input tokens that must be exceeded, USD a token.
_Steps: TypeAlias = tuple[tuple[int, Decimal], ...]
_Case: TypeAlias = tuple[str, bool, str | None]  # model, whether by batch, service tier

_T = TypeVar("_T")

_OPENAI = "openai"
_ORDINARY_TIERS = frozenset({None, "auto", "default", "standard", "on_demand"})
_BATCH_DISCOUNT = Decimal("0.5")  # https://platform.openai.com/docs/guides/batch: half of the ordinary price
_PER_TOKEN = Decimal("1e-6")  # the data is in USD per million tokens
_UNCOUNTED = frozenset(  # prices of kinds of tokens that Usage cannot tell apart
    f"{way}_{kind}_mtok"
    for way in ("input", "output")
    for kind in ("image", "video", "reasoning", "citation")
)
_VALID_SECONDS = 900  # prices start on given days, or change at full quarters of an hour
_MODELS = 1024


class _Notices(Generic[_T]):
    """What is still to be logged, each thing once; added without a lock, by any thread or signal handler."""

    def __init__(self) -> None:
        self._known: dict[_T, object] = {}
        self._queue: deque[_T] = deque()

    def add(self, thing: _T) -> None:
        """Have it logged, unless it was or there were too many."""
        mine = object()
        if len(self._known) < _MODELS and self._known.setdefault(thing, mine) is mine:
            self._queue.append(thing)

    def take(self) -> Iterator[_T]:
        """Yield what is to be logged."""
        while self._queue:
            with contextlib.suppress(IndexError):  # another thread logs too
                yield self._queue.popleft()


class Pricer:
    """Prices usage by genai-prices' list prices, each looked up once and kept for a quarter of an hour.

    A host that genai-prices knows by its API address has the prices of that provider. Every other host, a
    proxy or a local server, has OpenAI's list prices for models that OpenAI's data names, and no price for
    the rest. Safe for several threads, and for collected objects and signal handlers: it has no lock.
    """

    def __init__(self, base_url: str | None = None) -> None:
        self._base_url = base_url
        self._provider: str | None = None
        self._is_missing = False
        self._unpriced: _Notices[_Case] = _Notices()
        self._rates = lru_cache(maxsize=_MODELS)(self._look_up)
        self._tiers = lru_cache(maxsize=_MODELS)(self._look_up_tiers)

    @property
    def loaded(self) -> bool:
        """Whether the price list is loaded, so that pricing an answer takes microseconds."""
        return self._provider is not None or self._is_missing

    def load(self) -> None:
        """Import genai-prices, which takes half a second; without it, the first cost does."""
        if self.loaded:
            return
        try:
            from genai_prices.data_snapshot import get_snapshot

            self._provider = get_snapshot().find_provider(None, None, self._base_url).id
        except LookupError:
            self._provider = _OPENAI
        except Exception as error:  # noqa: BLE001  # an answer that was paid for is worth more than its price
            self._is_missing = True
            text = "the price list cannot be loaded (%s): no cost is known"
            warn(text, type(error).__name__, event="no_price_list", error_type=type(error).__name__)

    async def ready(self) -> None:
        """Load the price list in a thread; it never fails, because an answer may wait for its price."""
        if not self.loaded:
            try:
                await asyncio.to_thread(self.load)
            except RuntimeError:  # there is no thread left
                self.load()

    def cost(
        self, model: str, usage: Usage, *, batch: bool = False, service_tier: str | None = None
    ) -> Decimal | None:
        """Return what one answer costs in USD, None where its price is not known, which is logged."""
        cost = self.price(model, usage, batch=batch, service_tier=service_tier, at=time.time())
        self.log_unpriced()
        return cost

    def price(
        self, model: str, usage: Usage, *, batch: bool, service_tier: str | None, at: float
    ) -> Decimal | None:
        """Return what one answer costs in USD; None, not logged yet, where it is not known. Never raises."""
        # All tokens have the price of the tier that the input falls in, as with OpenAI's long prompts. In a
        # batch the service tier plays no part; an OpenAI model without a batch price of its own has OpenAI's
        # flat discount of 50% (https://platform.openai.com/docs/guides/batch). Input read from the cache or
        # written to it, where that has no price of its own, is ordinary input.
        rates = self.rates(model, batch=batch, service_tier=service_tier, at=at)
        try:
            return None if rates is None else rates.price(usage)
        except Exception:  # noqa: BLE001  # prices that are no numbers
            self._unpriced.add((model, batch, service_tier))
            return None

    def rates(self, model: str, *, batch: bool, service_tier: str | None, at: float) -> Rates | None:
        """Return what the tokens of a model cost; None, not logged yet, where that is not known."""
        tier = None if batch or service_tier in _ORDINARY_TIERS else service_tier
        return self._rates(model, batch, tier, int(at) // _VALID_SECONDS)

    def tiers(self, model: str, *, at: float) -> frozenset[str]:
        """Return the service tiers in which a model has a price of its own, ordinary ones left out."""
        return self._tiers(model, int(at) // _VALID_SECONDS)

    def log_unpriced(self) -> None:
        """Log, once each, what was found to have no price."""
        for model, batch, tier in self._unpriced.take():
            kind = "batch " if batch else f"{tier} " if tier else ""
            text = "genai-prices has no %sprice for %r: its cost is unknown"
            inform(text, kind, model, event="unpriced", model=model, service_tier=tier)

    def _look_up(self, model: str, batch: bool, tier: str | None, quarter: int) -> Rates | None:
        if not self.loaded:
            self.load()
        case = model, batch, tier
        try:
            rates = None if self._is_missing else self._find_rates(*case, quarter * _VALID_SECONDS)
        except Exception:  # noqa: BLE001  # an unknown model, or data that is broken: an answer waits for it
            rates = None
        if rates is None:
            self._unpriced.add(case)
        return rates

    def _look_up_tiers(self, model: str, quarter: int) -> frozenset[str]:
        if not self.loaded:
            self.load()
        try:
            found, own = self._find(
                model, datetime.fromtimestamp(quarter * _VALID_SECONDS, tz=timezone.utc), {}
            )
            variants = found.model.price_variants or () if own else ()
            tiers = {str(v.when["service_tier"]) for v in variants if v.when.keys() == {"service_tier"}}
        except Exception:  # noqa: BLE001  # as for a price
            return frozenset()
        return frozenset(tiers) - _ORDINARY_TIERS

    def _find(self, model: str, moment: datetime, context: dict[str, str]) -> tuple[PriceCalculation, bool]:
        """Return a model's prices, and whether they are its provider's own, not those of another one."""
        import genai_prices

        name = model.removeprefix("openai/") if self._provider == _OPENAI else model  # as proxies write it
        when: dict[str, Any] = {"genai_request_timestamp": moment, "price_context": context}
        found = genai_prices.calc_price(genai_prices.Usage(), name, provider_id=self._provider, **when)
        return found, any(found.model is known for known in found.provider.models)

    def _find_rates(self, model: str, batch: bool, tier: str | None, at: float) -> Rates | None:
        context = {"processing": "batch"} if batch else {"service_tier": tier} if tier else {}
        moment = datetime.fromtimestamp(at, tz=timezone.utc)
        found, own = self._find(model, moment, context)
        has_variant = own and any(  # has a price for this context, not only the ordinary one
            variant.when == context and (variant.constraint is None or variant.constraint.active(moment))
            for variant in found.model.price_variants or ()
        )
        if not context or has_variant:
            return Rates.of(found.model_price, Decimal(1))
        discounted = batch and found.provider.id == _OPENAI
        return Rates.of(found.model_price, _BATCH_DISCOUNT) if discounted else None


@dataclass(frozen=True, slots=True)
class Rates:
    """What a request and each kind of token cost in USD."""

    request: Decimal  # for each request, whatever it uses
    steps: dict[str, _Steps]  # by kind, as genai-prices names it; without those that have no price

    @classmethod
    def of(cls, prices: ModelPrice, factor: Decimal) -> Rates | None:
        """Return prices times a factor; None where some are of kinds of tokens that are not counted."""
        known: dict[str, Any] = {key: price for key, price in vars(prices).items() if price is not None}
        if known.keys() & _UNCOUNTED or "input_mtok" not in known:
            return None
        for kind, otherwise in (
            ("cache_read_mtok", "input_mtok"),
            ("cache_write_mtok", "input_mtok"),
            ("cache_write_1h_mtok", "cache_write_mtok"),
        ):
            known.setdefault(kind, known[otherwise])
        with exact():
            request = known.get("requests_kcount", _NOTHING) * factor / 1000
            steps = {key: _steps_of(price, factor) for key, price in known.items() if key.endswith("_mtok")}
        return cls(request, steps)

    def price(self, usage: Usage) -> Decimal | None:
        """Return what an answer costs in USD, exactly; None where a kind of its tokens has no price."""
        prompt = usage.prompt_tokens
        cached = min(usage.cached_tokens, prompt)
        written = min(usage.cache_write_tokens, prompt - cached)
        long = min(usage.long_write_tokens, written)
        audio_input = min(usage.audio_input_tokens, prompt - cached - written)
        audio_output = min(usage.audio_output_tokens, usage.completion_tokens)
        total = self.request
        for tokens, kind in (
            (prompt - cached - written - audio_input, "input_mtok"),
            (cached, "cache_read_mtok"),
            (written - long, "cache_write_mtok"),
            (long, "cache_write_1h_mtok"),
            (audio_input, "input_audio_mtok"),
            (usage.completion_tokens - audio_output, "output_mtok"),
            (audio_output, "output_audio_mtok"),
        ):
            if tokens:
                if kind not in self.steps:
                    return None
                at_length = (price for start, price in self.steps[kind] if prompt > start)
                total = EXACT.fma(next(at_length, _NOTHING), tokens, total)
        return total

    def most(self, prompt: int, completion: int, *, audio_input: bool, audio_output: bool) -> Decimal | None:
        """Return what so many tokens can cost at most in USD, of whatever kind they turn out to be."""
        inputs = {"input_mtok", "cache_read_mtok", "cache_write_mtok", "cache_write_1h_mtok"}
        inputs |= {"input_audio_mtok"} if audio_input else set()
        outputs = {"output_mtok", "output_audio_mtok"} if audio_output else {"output_mtok"}
        outputs = outputs if completion else set()
        if not self.steps.keys() >= inputs | outputs:
            return None
        total = self.request
        for tokens, kinds in ((prompt, inputs), (completion, outputs)):
            steps = (step for kind in kinds for step in self.steps[kind])
            highest = max((price for start, price in steps if start < max(prompt, 1)), default=_NOTHING)
            total = EXACT.fma(highest, tokens, total)
        return total


def _steps_of(price: Decimal | TieredPrices, factor: Decimal) -> _Steps:
    tiers = () if isinstance(price, Decimal) else price.tiers
    base = price if isinstance(price, Decimal) else price.base
    rising = ((-1, base), *((tier.start, tier.price) for tier in tiers))
    return tuple((start, each * factor * _PER_TOKEN) for start, each in reversed(rising))


# --- the bill ---------------------------------------------------------------------------------------------
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


class Ledger(ForkAware):
    """What the answers of one client cost; safe for several threads."""

    def __init__(self) -> None:
        self._pricer: Pricer | None = None
        # Needs no lock: a collected stream or a signal handler may append anywhere. It is summed a hundred
        # entries at a time, and whenever the ledger is read.
        self._queue: deque[_Entry] = deque()
        self._lock = threading.RLock()  # re-entrant: a signal handler may read what it interrupts
        self._held = self._loading = False
        self._loaders: set[int] = set()
        self._rows: dict[tuple[str, bool, str], _Row] = {}
        self._retried = self._unaccounted = 0
        self._unaccounted_cost = self._saved = _NOTHING
        self._unreadable: _Notices[str] = _Notices()  # models whose usage could not be read in full
        mind_forks(self)

    def before_fork(self) -> None:
        """Wait for the thread that reads or writes it."""
        self._lock.acquire()

    def after_fork(self, *, child: bool) -> None:
        """Go on; the threads that load prices are not in the child."""
        self._lock.release()
        if child:
            self._loading = False
            self._loaders.clear()

    def pricer_for(self, base_url: str | None) -> Pricer:
        """Return what prices the entries; the address given first decides whose prices they are."""
        if self._pricer is None:
            self._pricer = Pricer(base_url)
        return self._pricer

    def settled(self, demand: Demand, outcome: Outcome, reserved: float) -> Decimal | None:
        """Enter what came of an attempt; return what its answer costs in USD, None where not known yet."""
        model, usage = demand.model, outcome.usage
        if model is None:
            return None
        output = max(0, round(reserved) - demand.input_tokens)
        if usage is None:
            if outcome.may_be_billed and not demand.free:
                self._enter("unaccounted", model, Usage(demand.input_tokens, output))
            return None
        if usage.partial:  # the rest may have been billed as well
            self._unreadable.add(usage.model or model)
            prompt = 0 if usage.prompt_tokens else demand.input_tokens
            rest = max(0, output - usage.completion_tokens)
            tier = usage.service_tier
            self._enter("unaccounted", usage.model or model, Usage(prompt, rest, service_tier=tier))
        answered = outcome.ok and outcome.failure is None
        return self._enter("answered" if answered else "retried", model, usage)

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
        for model in self._unreadable.take():
            text = "%r was answered with usage that cannot be read in full: its cost is an estimate"
            warn(text, model, event="usage_unreadable", model=model)
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
        pricer = self.pricer_for(None)
        return pricer.price(model, usage, batch=batch, service_tier=usage.service_tier, at=at)

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
