"""What it cost: the bill of a client, exact to the last digit; and what it will cost."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from dataclasses import dataclass
from datetime import datetime, timezone
from decimal import Context, Decimal, localcontext
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

from openai_eval_client._log import inform

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from genai_prices.types import ModelInfo, ModelPrice, PriceCalculation, TieredPrices

    from openai_eval_client._wire import Usage


EXACT = Context(prec=60)  # digits of sums; the program may have set fewer for its own


def exact() -> contextlib.AbstractContextManager[Context]:
    """Return what makes sums exact, whatever precision the program has set."""
    return localcontext(EXACT)


_Steps: TypeAlias = tuple[tuple[int, Decimal], ...]

_OPENAI = "openai"
_ORDINARY_TIERS = frozenset({None, "auto", "default", "standard", "on_demand"})
_BATCH_DISCOUNT = Decimal("0.5")  # https://platform.openai.com/docs/guides/batch: half of the ordinary price
_PER_TOKEN = Decimal("1e-6")  # the data is in dollars per million tokens
_ONE = Decimal(1)
_FREE = Decimal(0)
_COUNTED = frozenset(
    {
        "input_mtok",
        "cache_read_mtok",
        "cache_write_mtok",
        "output_mtok",
        "input_audio_mtok",
        "output_audio_mtok",
    },
)
_UNCOUNTED = frozenset(  # prices of kinds of tokens that Usage cannot tell apart
    {
        "input_image_mtok",
        "output_image_mtok",
        "input_video_mtok",
        "output_video_mtok",
        "output_reasoning_mtok",
        "output_citation_mtok",
    },
)
_VALID_SECONDS = 900  # prices start on given days, or change at full quarters of an hour
_MODELS = 1024


class Pricer:
    """Prices usage by genai-prices' list prices, each looked up once and kept for a quarter of an hour.

    A host that genai-prices knows by its API address has the prices of that provider. Every other host, a
    proxy or a local server, has OpenAI's list prices for models that OpenAI's data names, and no price for
    the rest. Safe to share by threads.
    """

    def __init__(self, base_url: str | None = None) -> None:
        self._base_url = base_url
        self._lock = threading.Lock()
        self._provider: str | None = None
        self._unpriced: set[tuple[str, bool, str | None]] = set()
        self._unsaid: deque[tuple[str, bool, str | None]] = deque()
        self._rates = lru_cache(maxsize=_MODELS)(self._look_up)

    @property
    def loaded(self) -> bool:
        """Whether the price list is at hand, so that a cost takes microseconds."""
        return self._provider is not None

    def load(self) -> None:
        """Imports genai-prices, which takes half a second; without it, the first cost does."""
        self._provider_id()

    async def ready(self) -> None:
        """Loads the price list in a thread."""
        if not self.loaded:
            await asyncio.to_thread(self.load)

    def cost(
        self,
        model: str,
        usage: Usage,
        *,
        batch: bool = False,
        service_tier: str | None = None,
    ) -> Decimal | None:
        """Prices one answer."""
        # All tokens have the price of the tier that the input falls in, as with OpenAI's long prompts. In a
        # batch the service tier plays no part; an OpenAI model without a batch price of its own has OpenAI's
        # flat discount of 50% (https://platform.openai.com/docs/guides/batch). Cached input without a price
        # of its own is ordinary input.
        rates = self.rates(model, batch=batch, service_tier=service_tier, at=time.time())
        self.say_unpriced()
        return None if rates is None else rates.price(usage)

    def rates(self, model: str, *, batch: bool, service_tier: str | None, at: float) -> Rates | None:
        """Finds what the tokens of a model cost, and says nothing where that is not known."""
        tier = None if batch or service_tier in _ORDINARY_TIERS else service_tier
        return self._rates(model, batch, tier, int(at) // _VALID_SECONDS)

    def say_unpriced(self) -> None:
        """Logs, once each, what was found to have no price."""
        while self._unsaid:
            with contextlib.suppress(IndexError):  # another thread says it
                self._log_unpriced(self._unsaid.popleft())

    def _look_up(self, model: str, batch: bool, tier: str | None, quarter: int) -> Rates | None:
        rates = self._find_rates(model, batch, tier, quarter * _VALID_SECONDS)
        if rates is None:
            self._unsaid.append((model, batch, tier))
        return rates

    def _find_rates(self, model: str, batch: bool, tier: str | None, at: float) -> Rates | None:
        context = {"processing": "batch"} if batch else {"service_tier": tier} if tier else {}
        moment = datetime.fromtimestamp(at, tz=timezone.utc)
        found = _calculate(model, self._provider_id(), context, moment)
        if found is None:
            return None
        own = any(found.model is known for known in found.provider.models)  # else another provider's price
        if not context or (own and _has_variant(found.model, context, moment)):
            return Rates.of(found.model_price, _ONE)
        discounted = batch and found.provider.id == _OPENAI
        return Rates.of(found.model_price, _BATCH_DISCOUNT) if discounted else None

    def _provider_id(self) -> str:
        if self._provider is None:
            from genai_prices.data_snapshot import get_snapshot

            try:
                self._provider = get_snapshot().find_provider(None, None, self._base_url).id
            except LookupError:
                self._provider = _OPENAI
        return self._provider

    def _log_unpriced(self, case: tuple[str, bool, str | None]) -> None:
        with self._lock:
            if case in self._unpriced or len(self._unpriced) >= _MODELS:
                return
            self._unpriced.add(case)
        model, batch, tier = case
        kind = "batch " if batch else f"{tier} " if tier else ""
        text = "genai-prices has no %sprice for %r: its cost is unknown"
        inform(text, kind, model, event="unpriced", model=model, service_tier=tier)


@dataclass(frozen=True, slots=True)
class Rates:
    """What each kind of token costs; None where the data does not say.

    A price is a tuple of steps, the highest first: the input tokens that must be exceeded, dollars a token.
    """

    request: Decimal
    input: _Steps | None
    cached: _Steps | None
    written: _Steps | None
    output: _Steps | None
    audio_input: _Steps | None
    audio_output: _Steps | None

    @classmethod
    def of(cls, prices: ModelPrice, factor: Decimal) -> Rates | None:
        """Takes the prices of tokens, times a factor, if tokens of these kinds are all that is charged."""
        known: dict[str, Any] = {key: price for key, price in vars(prices).items() if price is not None}
        if known.keys() & _UNCOUNTED or "input_mtok" not in known:
            return None
        steps = {key: _steps_of(price, factor) for key, price in known.items() if key in _COUNTED}
        return cls(
            request=known.get("requests_kcount", _FREE) * factor / 1000,
            input=steps["input_mtok"],
            cached=steps.get("cache_read_mtok", steps["input_mtok"]),
            written=steps.get("cache_write_mtok", steps["input_mtok"]),
            output=steps.get("output_mtok"),
            audio_input=steps.get("input_audio_mtok"),
            audio_output=steps.get("output_audio_mtok"),
        )

    def price(self, usage: Usage) -> Decimal | None:
        """Adds up what each kind of token costs, in dollars; None where one of them has no price."""
        prompt = usage.prompt_tokens
        cached = min(usage.cached_tokens, prompt)
        written = min(usage.cache_write_tokens, prompt - cached)
        heard = min(usage.audio_input_tokens, prompt - cached - written)
        spoken = min(usage.audio_output_tokens, usage.completion_tokens)
        total = self.request
        for tokens, steps in (
            (prompt - cached - written - heard, self.input),
            (cached, self.cached),
            (written, self.written),
            (heard, self.audio_input),
            (usage.completion_tokens - spoken, self.output),
            (spoken, self.audio_output),
        ):
            if tokens:
                if steps is None:
                    return None
                total += tokens * _at(steps, prompt)
        return total

    def most(
        self,
        prompt: int,
        completion: int,
        *,
        heard: bool = False,
        spoken: bool = False,
    ) -> Decimal | None:
        """Adds up what tokens can cost at most, in dollars, of whatever kind they turn out to be."""
        inputs = [self.input, self.cached, self.written, *([self.audio_input] if heard else [])]
        outputs = [self.output, *([self.audio_output] if spoken else [])]
        dearest = _dearest(inputs, prompt), _dearest(outputs, prompt) if completion else _FREE
        if dearest[0] is None or dearest[1] is None:
            return None
        return self.request + prompt * dearest[0] + completion * dearest[1]


def _dearest(prices: Sequence[_Steps | None], prompt_tokens: int) -> Decimal | None:
    """Finds the highest price that a prompt of up to this length can have."""
    known = [steps for steps in prices if steps is not None]
    if len(known) < len(prices):
        return None
    return max(each for steps in known for start, each in steps if start < max(prompt_tokens, 1))


def _steps_of(price: Decimal | TieredPrices, factor: Decimal) -> _Steps:
    """Puts a price and its tiers, each for all tokens of a long enough prompt, into falling order."""
    tiers = () if isinstance(price, Decimal) else price.tiers
    base = price if isinstance(price, Decimal) else price.base
    rising = ((-1, base), *((tier.start, tier.price) for tier in tiers))
    return tuple((start, each * factor * _PER_TOKEN) for start, each in reversed(rising))


def _at(steps: _Steps, prompt_tokens: int) -> Decimal:
    """Finds the price that a prompt of this length has."""
    for start, each in steps:
        if prompt_tokens > start:
            return each
    return _FREE


def _calculate(
    model: str,
    provider_id: str,
    context: Mapping[str, str],
    moment: datetime,
) -> PriceCalculation | None:
    """Has genai-prices find the prices of a model that applied at a moment."""
    import genai_prices

    name = model.removeprefix("openai/") if provider_id == _OPENAI else model  # as proxies write it
    try:
        return genai_prices.calc_price(
            genai_prices.Usage(),
            name,
            provider_id=provider_id,
            genai_request_timestamp=moment,
            price_context=context,
        )
    except LookupError:
        return None


def _has_variant(model: ModelInfo, context: Mapping[str, str], moment: datetime) -> bool:
    """Tells a price made for this context from the ordinary one, which genai-prices gives without a word."""
    return any(
        variant.when == context and (variant.constraint is None or variant.constraint.active(moment))
        for variant in model.price_variants or ()
    )
