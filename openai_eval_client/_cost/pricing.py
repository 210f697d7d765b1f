"""List prices: what the tokens of a request cost, exact to the last digit."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from dataclasses import dataclass
from datetime import datetime, timezone
from decimal import Context, Decimal, localcontext
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

from openai_eval_client._log import inform, warn

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Set as AbstractSet

    from genai_prices.types import ModelInfo, ModelPrice, TieredPrices

    from openai_eval_client._wire import Usage


EXACT = Context(prec=60)  # digits; the program may have set fewer for its own sums


def exact() -> contextlib.AbstractContextManager[Context]:
    """Return a context manager that makes sums exact, whatever precision the program has set."""
    return localcontext(EXACT)


# A price and its tiers, the highest first: the input tokens that must be exceeded, USD a token.
_Steps: TypeAlias = tuple[tuple[int, Decimal], ...]
_Case: TypeAlias = tuple[str, bool, str | None]  # model, whether by batch, service tier

_OPENAI = "openai"
_ORDINARY_TIERS = frozenset({None, "auto", "default", "standard", "on_demand"})
_BATCH_DISCOUNT = Decimal("0.5")  # https://platform.openai.com/docs/guides/batch: half of the ordinary price
_PER_TOKEN = Decimal("1e-6")  # the data is in USD per million tokens
_ONE = Decimal(1)
_FREE = Decimal(0)
_UNCOUNTED = frozenset(  # prices of kinds of tokens that Usage cannot tell apart
    f"{way}_{kind}_mtok"
    for way in ("input", "output")
    for kind in ("image", "video", "reasoning", "citation")
)
_VALID_SECONDS = 900  # prices start on given days, or change at full quarters of an hour
_MODELS = 1024


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
        self._unpriced: dict[_Case, object] = {}
        self._to_log: deque[_Case] = deque()
        self._rates = lru_cache(maxsize=_MODELS)(self._look_up)

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
        """Load the price list in a thread."""
        if not self.loaded:
            await asyncio.to_thread(self.load)

    def cost(
        self, model: str, usage: Usage, *, batch: bool = False, service_tier: str | None = None
    ) -> Decimal | None:
        """Return what one answer costs in USD, None where its price is not known, which is logged."""
        # All tokens have the price of the tier that the input falls in, as with OpenAI's long prompts. In a
        # batch the service tier plays no part; an OpenAI model without a batch price of its own has OpenAI's
        # flat discount of 50% (https://platform.openai.com/docs/guides/batch). Cached input without a price
        # of its own is ordinary input.
        rates = self.rates(model, batch=batch, service_tier=service_tier, at=time.time())
        self.log_unpriced()
        return None if rates is None else rates.price(usage)

    def rates(self, model: str, *, batch: bool, service_tier: str | None, at: float) -> Rates | None:
        """Return what the tokens of a model cost; None, not logged yet, where that is not known."""
        tier = None if batch or service_tier in _ORDINARY_TIERS else service_tier
        return self._rates(model, batch, tier, int(at) // _VALID_SECONDS)

    def log_unpriced(self) -> None:
        """Log, once each, what was found to have no price."""
        while self._to_log:
            with contextlib.suppress(IndexError):  # another thread logs too
                model, batch, tier = self._to_log.popleft()
                kind = "batch " if batch else f"{tier} " if tier else ""
                text = "genai-prices has no %sprice for %r: its cost is unknown"
                inform(text, kind, model, event="unpriced", model=model, service_tier=tier)

    def _look_up(self, model: str, batch: bool, tier: str | None, quarter: int) -> Rates | None:
        rates, case = self._find_rates(model, batch, tier, quarter * _VALID_SECONDS), (model, batch, tier)
        if rates is None and len(self._unpriced) < _MODELS:
            mine = object()
            if self._unpriced.setdefault(case, mine) is mine:  # no other thread was first
                self._to_log.append(case)
        return rates

    def _find_rates(self, model: str, batch: bool, tier: str | None, at: float) -> Rates | None:
        if not self.loaded:
            self.load()
        if self._is_missing:
            return None
        import genai_prices

        context = {"processing": "batch"} if batch else {"service_tier": tier} if tier else {}
        moment = datetime.fromtimestamp(at, tz=timezone.utc)
        name = model.removeprefix("openai/") if self._provider == _OPENAI else model  # as proxies write it
        try:
            found = genai_prices.calc_price(
                genai_prices.Usage(),
                name,
                provider_id=self._provider,
                genai_request_timestamp=moment,
                price_context=context,
            )
        except LookupError:
            return None
        own = any(found.model is known for known in found.provider.models)  # else another provider's price
        if not context or (own and _has_variant(found.model, context, moment)):
            return Rates.of(found.model_price, _ONE)
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
        for kind in ("cache_read_mtok", "cache_write_mtok"):
            known.setdefault(kind, known["input_mtok"])
        with exact():
            request = known.get("requests_kcount", _FREE) * factor / 1000
            steps = {key: _steps_of(price, factor) for key, price in known.items() if key.endswith("_mtok")}
        return cls(request, steps)

    def price(self, usage: Usage) -> Decimal | None:
        """Return what an answer costs in USD, exactly; None where a kind of its tokens has no price."""
        prompt = usage.prompt_tokens
        cached = min(usage.cached_tokens, prompt)
        written = min(usage.cache_write_tokens, prompt - cached)
        audio_input = min(usage.audio_input_tokens, prompt - cached - written)
        audio_output = min(usage.audio_output_tokens, usage.completion_tokens)
        total = self.request
        for tokens, kind in (
            (prompt - cached - written - audio_input, "input_mtok"),
            (cached, "cache_read_mtok"),
            (written, "cache_write_mtok"),
            (audio_input, "input_audio_mtok"),
            (usage.completion_tokens - audio_output, "output_mtok"),
            (audio_output, "output_audio_mtok"),
        ):
            if tokens:
                if kind not in self.steps:
                    return None
                total = EXACT.fma(_at(self.steps[kind], prompt), tokens, total)
        return total

    def most(self, prompt: int, completion: int, *, audio_input: bool, audio_output: bool) -> Decimal | None:
        """Return what so many tokens can cost at most in USD, of whatever kind they turn out to be."""
        inputs = {"input_mtok", "cache_read_mtok", "cache_write_mtok"}
        inputs |= {"input_audio_mtok"} if audio_input else set()
        outputs = {"output_mtok", "output_audio_mtok"} if audio_output else {"output_mtok"}
        outputs = outputs if completion else set()
        if not self.steps.keys() >= inputs | outputs:
            return None
        per_input, per_output = (self._highest(kinds, prompt) for kinds in (inputs, outputs))
        with exact():
            return self.request + prompt * per_input + completion * per_output

    def _highest(self, kinds: AbstractSet[str], prompt_tokens: int) -> Decimal:
        """Return the highest price that a token can have with a prompt of up to this length."""
        steps = (step for kind in kinds for step in self.steps[kind])
        return max((price for start, price in steps if start < max(prompt_tokens, 1)), default=_FREE)


def _steps_of(price: Decimal | TieredPrices, factor: Decimal) -> _Steps:
    tiers = () if isinstance(price, Decimal) else price.tiers
    base = price if isinstance(price, Decimal) else price.base
    rising = ((-1, base), *((tier.start, tier.price) for tier in tiers))
    return tuple((start, each * factor * _PER_TOKEN) for start, each in reversed(rising))


def _at(steps: _Steps, prompt_tokens: int) -> Decimal:
    """Return the price that a token has with a prompt of this length."""
    for start, price in steps:
        if prompt_tokens > start:
            return price
    return _FREE


def _has_variant(model: ModelInfo, context: Mapping[str, str], moment: datetime) -> bool:
    """Return whether a model has a price of its own for this context, not only the ordinary one."""
    return any(
        variant.when == context and (variant.constraint is None or variant.constraint.active(moment))
        for variant in model.price_variants or ()
    )
