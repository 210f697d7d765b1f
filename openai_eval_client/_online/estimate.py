"""What prompts would need: counted as sending counts, but nothing is sent."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterable, Sized
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from openai_eval_client._cost import exact
from openai_eval_client._limits import FIRST_OUTPUT_GUESS, MINUTE, Clock, ModelQueue
from openai_eval_client._online.prompts import iterate
from openai_eval_client._wire import Usage, check_prompt, max_output
from openai_eval_client.models import CostEstimate

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from openai_eval_client._account import Account
    from openai_eval_client._cost import Rates
    from openai_eval_client._report import Progress
    from openai_eval_client._tokens import TokenCounter
    from openai_eval_client._wire import Parameters
    from openai_eval_client.config import RateLimitConfig

_CHUNK = 256  # prompts taken at a time
_CHUNK_TIME = 0.001  # seconds for that, on the event loop
_COUNTING = 0.002  # seconds for one hop to the thread, which takes 0.2 ms: longer would keep the loop waiting


async def estimate(
    prompts: Iterable[Any] | AsyncIterable[Any],
    parameters: Parameters,
    *,
    counter: TokenCounter,
    account: Account,
    progress: Progress,
) -> CostEstimate:
    """Estimate what prompts would need."""
    total = len(prompts) if isinstance(prompts, Sized) else 0
    sizes: Counter[int] = Counter()  # how many prompts have so many tokens: their prices are alike
    async with contextlib.aclosing(_chunks(prompts)) as chunks:
        async for chunk in chunks:
            sizes.update(await _count_all(chunk, sizes.total(), parameters, counter))
            if sizes.total() < total:
                await progress(sizes.total() / total)
    estimated = await asyncio.to_thread(_priced, sizes, parameters, account)
    await progress(1.0)
    return estimated


async def _chunks(prompts: Iterable[Any] | AsyncIterable[Any]) -> AsyncGenerator[list[Any], None]:
    """Yield the prompts, a few at a time."""
    chunk: list[Any] = []
    began = time.perf_counter()
    async with contextlib.aclosing(iterate(prompts)) as source:
        async for prompt in source:
            chunk.append(prompt)
            if len(chunk) == _CHUNK or time.perf_counter() - began > _CHUNK_TIME:
                yield chunk
                chunk, began = [], time.perf_counter()
    if chunk:
        yield chunk


async def _count_all(
    prompts: Sequence[Any], first: int, parameters: Parameters, counter: TokenCounter
) -> list[int]:
    """Return the input tokens of each prompt; `first` is the index of the first."""
    counts: list[int] = []
    while rest := prompts[len(counts) :]:
        counted = await asyncio.to_thread(_count_some, rest, first + len(counts), parameters, counter)
        counts += counted or [await counter.count_input(parameters.with_prompt(rest[0]))]
    return counts


def _count_some(
    prompts: Iterable[Any], first: int, parameters: Parameters, counter: TokenCounter
) -> list[int]:
    """Return the input tokens of the first prompts, up to one that cannot be counted at once."""
    counts: list[int] = []
    until = time.perf_counter() + _COUNTING
    for index, prompt in enumerate(prompts, first):
        check_prompt(prompt, index, api=parameters.api)
        tokens = counter.count_input_now(parameters.with_prompt(prompt))
        if tokens is not None:
            counts.append(tokens)
        if tokens is None or time.perf_counter() > until:
            break
    return counts


def _priced(sizes: Counter[int], parameters: Parameters, account: Account) -> CostEstimate:
    """Return the estimate for so many prompts of each size."""
    requests, most = sizes.total(), max_output(parameters.body)
    prompt_tokens = sum(size * count for size, count in sizes.items())
    mean = account.limiter.stats["output_length"].get(parameters.model, {}).get("mean")
    mean = mean if mean is None or most is None else min(mean, most)
    reserved = most if most is not None else FIRST_OUTPUT_GUESS if mean is None else mean
    pricer, tier = account.ledger.pricer_for(None), parameters.body.get("service_tier")
    costs: dict[str, Any] = {}
    for channel in ("", "batch_"):
        rates = pricer.rates(
            parameters.model,
            batch=bool(channel),
            service_tier=tier if isinstance(tier, str) else None,
            at=time.time(),
        )
        for bound, output in (("low", 0), ("expected", mean), ("high", most)):
            costs[f"{channel}cost_{bound}"] = _cost(sizes, output, rates)
    pricer.log_unpriced()
    return CostEstimate(
        model=parameters.model,
        requests=requests,
        prompt_tokens=prompt_tokens,
        completion_tokens_expected=None if mean is None else round(requests * mean),
        completion_tokens_high=None if most is None else requests * most,
        **costs,
        unpriced=requests if costs["cost_low"] is None else 0,
        minutes=minutes(account.config, requests, prompt_tokens + requests * reserved),
    )


def _cost(sizes: Counter[int], output: float | None, rates: Rates | None) -> float | None:
    """Return USD if each answer has `output` tokens; None where that or a price is not known."""
    if output is None or rates is None:
        return None
    total = Decimal()
    with exact():
        for size, count in sizes.items():
            price = rates.price(Usage(size, Decimal(output)))  # type: ignore[arg-type]  # a mean is no int
            if price is None:
                return None
            total += price * count
    return float(total)


class _StoppedClock(Clock):
    @staticmethod
    def time() -> float:
        return 0.0


def minutes(limits: RateLimitConfig, requests: int, tokens: float) -> float | None:
    """Return the minutes that the limiter takes to admit so much, from full buckets; None without limits."""
    if limits.requests_per_minute is None and limits.tokens_per_minute is None:
        return None
    queue = ModelQueue("", limits.model_copy(update={"adaptive_throttling": False}), _StoppedClock())
    queue.requests.charge(requests)
    queue.tokens.charge(tokens)
    return max(queue.requests.ready_in(0), queue.tokens.ready_in(0)) / MINUTE  # until the debt is paid
