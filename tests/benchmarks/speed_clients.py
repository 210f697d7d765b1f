"""The clients that speed.py measures: the raw SDK, each method of this package, and other libraries."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

import openai

from openai_eval_client import AsyncOpenAI, OpenAIClient, OpenAIConfig, RateLimitConfig

MODEL = "gpt-4o-mini"
ASKED = {"model": MODEL, "max_tokens": 20}
KEY = "sk-benchmark"
ANY = 10**9  # requests or tokens a minute: no limit binds

Run = Callable[[list[str]], Awaitable[Any]]
Measured = Callable[[Run], Awaitable[None]]


def texts(count: int) -> list[str]:
    """Return prompts of about 350 characters, no two alike."""
    return [
        f"Question {n}: " + "which of the two numbers is larger, and why is it so? " * 6 for n in range(count)
    ]


def each(call: Callable[[str], Awaitable[Any]], in_flight: int) -> Run:
    """Return what users write without `batch_generate`: `gather` and a semaphore."""

    async def run(prompts: list[str]) -> None:
        room = asyncio.Semaphore(in_flight)

        async def one(prompt: str) -> None:
            async with room:
                await call(prompt)

        await asyncio.gather(*map(one, prompts))

    return run


def creating(client: Any) -> Callable[[str], Awaitable[Any]]:
    """Return a call of the SDK."""
    return lambda prompt: client.chat.completions.create(
        messages=[{"role": "user", "content": prompt}], **ASKED
    )


async def raw(url: str, in_flight: int, measured: Measured) -> None:
    """The plain SDK."""
    async with openai.AsyncOpenAI(api_key=KEY, base_url=url) as client:
        await measured(each(creating(client), in_flight))


async def raw_aiohttp(url: str, in_flight: int, measured: Measured) -> None:
    """The SDK on its optional aiohttp transport."""
    http = openai.DefaultAioHttpClient()
    async with openai.AsyncOpenAI(api_key=KEY, base_url=url, http_client=http) as client:
        await measured(each(creating(client), in_flight))


async def floor(url: str, in_flight: int, measured: Measured) -> None:
    """A bare POST with aiohttp: no SDK, no limits, no types."""
    import aiohttp

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def call(prompt: str) -> Any:
            body = {"messages": [{"role": "user", "content": prompt}], **ASKED}
            headers = {"authorization": f"Bearer {KEY}"}
            async with session.post(f"{url}/chat/completions", json=body, headers=headers) as answer:
                return await answer.json()

        await measured(each(call, in_flight))


def _client(url: str, in_flight: int) -> OpenAIClient:
    limits = RateLimitConfig(requests_per_minute=ANY, tokens_per_minute=ANY, max_concurrent=in_flight)
    config = OpenAIConfig(api_key=KEY, base_url=url, default_model=MODEL)
    return OpenAIClient(config, rate_limit=limits)


async def batch_generate(url: str, in_flight: int, measured: Measured) -> None:
    """`batch_generate`, all prompts in one call."""
    async with _client(url, in_flight) as client:
        await measured(lambda prompts: client.batch_generate(prompts, max_tokens=20))


async def as_completed(url: str, in_flight: int, measured: Measured) -> None:
    """`as_completed`, each outcome as soon as it is known."""
    async with _client(url, in_flight) as client:

        async def run(prompts: list[str]) -> None:
            async with aclosing(client.as_completed(prompts, max_tokens=20)) as answers:
                async for _, answer in answers:
                    if isinstance(answer, Exception):
                        raise answer

        await measured(run)


async def generate_response(url: str, in_flight: int, measured: Measured) -> None:
    """`generate_response`, gathered; the client bounds what is in flight."""
    async with _client(url, in_flight) as client:

        async def run(prompts: list[str]) -> None:
            await asyncio.gather(*(client.generate_response(prompt, max_tokens=20) for prompt in prompts))

        await measured(run)


async def client_openai(url: str, in_flight: int, measured: Measured) -> None:
    """`client.openai`: the SDK's calls on the client's limits and connections."""
    async with _client(url, in_flight) as client:
        await measured(each(creating(client.openai), in_flight))


async def drop_in(url: str, in_flight: int, measured: Measured) -> None:
    """The drop-in client, on the SDK's own transport."""
    limits = RateLimitConfig(requests_per_minute=ANY, tokens_per_minute=ANY, max_concurrent=in_flight)
    async with AsyncOpenAI(api_key=KEY, base_url=url, rate_limit=limits) as client:
        await measured(each(creating(client), in_flight))


async def lm_deluge(url: str, in_flight: int, measured: Measured) -> None:
    """lm-deluge: no SDK, aiohttp."""
    os.environ["BENCHMARK_KEY"] = KEY
    from lm_deluge import LLMClient
    from lm_deluge.models import register_model

    register_model(
        id="benchmark",
        name=MODEL,
        api_base=url,
        api_key_env_var="BENCHMARK_KEY",
        api_spec="openai",
        supports_json=True,
        supports_logprobs=True,
        supports_responses=False,
        input_cost=0.15,
        output_cost=0.6,
    )
    client = LLMClient(
        "benchmark",
        max_new_tokens=20,
        max_requests_per_minute=ANY,
        max_tokens_per_minute=ANY,
        max_concurrent_requests=in_flight,
    )

    async def run(prompts: list[str]) -> None:
        answers = await client.process_prompts_async(prompts, show_progress=False)
        if any(answer is None or answer.is_error for answer in answers):
            raise RuntimeError("lm-deluge failed")

    await measured(run)


async def litellm(url: str, in_flight: int, measured: Measured) -> None:
    """litellm, `acompletion`."""
    import litellm as theirs

    def call(prompt: str) -> Awaitable[Any]:
        messages = [{"role": "user", "content": prompt}]
        return theirs.acompletion(f"openai/{MODEL}", messages, api_base=url, api_key=KEY, max_tokens=20)

    await measured(each(call, in_flight))


async def langchain_openai(url: str, in_flight: int, measured: Measured) -> None:
    """langchain-openai, `abatch`."""
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(model=MODEL, base_url=url, api_key=KEY, max_tokens=20)
    await measured(lambda prompts: chat.abatch(prompts, {"max_concurrency": in_flight}))


CLIENTS: dict[str, tuple[Callable[[str, int, Measured], Awaitable[None]], str | None]] = {
    "raw": (raw, None),
    "raw + aiohttp": (raw_aiohttp, None),
    "aiohttp, no SDK": (floor, None),
    "batch_generate": (batch_generate, None),
    "as_completed": (as_completed, None),
    "generate_response": (generate_response, None),
    "client.openai": (client_openai, None),
    "AsyncOpenAI (drop-in)": (drop_in, None),
    "lm-deluge": (lm_deluge, "lm_deluge"),
    "litellm": (litellm, "litellm"),
    "langchain-openai": (langchain_openai, "langchain_openai"),
}
