"""A server that bills exactly, what it bills, and what the price list says."""

from __future__ import annotations

import random
from decimal import Decimal
from typing import TYPE_CHECKING

import genai_prices
import tiktoken

from openai_eval_client.testing import SimulatedServer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from openai_eval_client import ModelResponse
    from openai_eval_client.testing import Call

IN, OUT = Decimal("0.15e-6"), Decimal("0.6e-6")  # USD a token of gpt-4o-mini
MOST = 40  # max_tokens


def exactly(text: str) -> int:
    """As the real server counts."""
    return len(tiktoken.get_encoding("o200k_base").encode_ordinary(text))


def wordy(body: dict) -> str:
    """An answer of some length that the prompt decides."""
    return "word " * (sum(map(ord, str(body.get("messages") or body.get("input")))) % 60 + 1)


def list_price(model: str, prompt: int, completion: int = 0, cached: int = 0, **context: str) -> Decimal:
    """The price of an answer by genai-prices itself."""
    tokens = genai_prices.Usage(input_tokens=prompt, output_tokens=completion, cache_read_tokens=cached)
    return genai_prices.calc_price(tokens, model, provider_id="openai", price_context=context).total_price


def cost_of(responses: Iterable[ModelResponse]) -> Decimal:
    """The sum of what each of our own responses says it cost."""
    return sum((Decimal(repr(response.usage.estimated_cost)) for response in responses), Decimal(0))


def simulated(**options: object) -> SimulatedServer:
    return SimulatedServer(
        **{"count_tokens": exactly, "answer": wordy, "unavailable_retry_after": None, **options}
    )


def billed(calls: Iterable[Call]) -> Decimal:
    """What the server would bill: every answer it produced, whether or not it arrived."""
    return sum(
        (call.prompt_tokens * IN + call.completion_tokens * OUT for call in calls if call.served), Decimal(0)
    )


def questions(count: int, seed: int) -> list[str]:
    """Prompts of very different lengths."""
    chance = random.Random(seed)  # noqa: S311
    return ["why? " * chance.choice([1, 3, 10, 60]) + str(n) for n in range(count)]
