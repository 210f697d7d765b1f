"""What a request costs, counted instead of timed: function calls, objects kept, texts encoded."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections import Counter
from pathlib import Path

import openai
import pytest

import openai_eval_client
from openai_eval_client import OpenAIClient, OpenAIConfig, RateLimitConfig
from openai_eval_client._tokens.counter import _VOCABULARIES
from openai_eval_client.testing import SimulatedServer

PACKAGE = str(Path(openai_eval_client.__file__).parent)
MODEL = "gpt-4o-mini"
IN_FLIGHT = 50
OWN_CALLS = 400  # of functions of this package for one request, which takes 180 to 260
KEPT = 8  # objects that the garbage collector walks over, for one response


@pytest.fixture(scope="module")
def server():
    with SimulatedServer(rpm=10**9, tpm=10**9, latency=0.01, process=True) as running:
        yield running


def connect(server: SimulatedServer) -> OpenAIClient:
    limits = RateLimitConfig(requests_per_minute=10**9, tokens_per_minute=10**9, max_concurrent=IN_FLIGHT)
    config = OpenAIConfig(api_key="k", base_url=server.base_url, default_model=MODEL)
    return OpenAIClient(config, rate_limit=limits)


def texts(count: int) -> list[str]:
    return [f"Question {number}: why is it so?" for number in range(count)]


def by_hand(client):
    """Return what users write without `batch_generate`: `gather` and a semaphore."""

    async def run(prompts: list[str]) -> None:
        room = asyncio.Semaphore(IN_FLIGHT)

        async def one(prompt: str) -> None:
            async with room:
                messages = [{"role": "user", "content": prompt}]
                await client.chat.completions.create(model=MODEL, messages=messages, max_tokens=9)

        await asyncio.gather(*map(one, prompts))

    return run


async def streamed(client: OpenAIClient, prompts: list[str]) -> None:
    async for _, outcome in client.as_completed(prompts, max_tokens=9):
        assert not isinstance(outcome, Exception)


METHODS = {
    "batch_generate": lambda client: lambda prompts: client.batch_generate(prompts, max_tokens=9),
    "as_completed": lambda client: lambda prompts: streamed(client, prompts),
    "client.openai": lambda client: by_hand(client.openai),
}


async def calls(run, count: int) -> Counter[str]:
    """Count calls of Python functions for one of `count` prompts: of this package, and of all code."""
    counted: Counter[str] = Counter()

    def look(frame, event, _) -> None:
        if event == "call":
            counted["all"] += 1
            counted["own"] += frame.f_code.co_filename.startswith(PACKAGE)

    prompts = texts(count)
    await run(texts(IN_FLIGHT))
    sys.setprofile(look)
    try:
        await run(prompts)
    finally:
        sys.setprofile(None)
    return Counter({name: round(number / count) for name, number in counted.items()})


@pytest.mark.parametrize("method", METHODS)
async def test_a_request_takes_few_function_calls(server, method: str) -> None:
    """The number is far from its bound; it would be exceeded if the work doubled."""
    async with connect(server) as client:
        counted = await calls(METHODS[method](client), 200)
    assert 50 < counted["own"] < OWN_CALLS


async def test_a_request_takes_far_fewer_calls_than_the_raw_sdk_does(server) -> None:
    """The count includes limits, token counts, cost and the typed response."""
    async with openai.AsyncOpenAI(api_key="k", base_url=server.base_url) as raw:
        theirs = await calls(by_hand(raw), 200)
    async with connect(server) as client:
        ours = await calls(METHODS["batch_generate"](client), 200)
        paced = await calls(METHODS["client.openai"](client), 200)
    assert ours["all"] < 0.4 * theirs["all"]
    assert paced["all"] < 0.9 * theirs["all"]


async def test_a_request_costs_the_same_however_many_there_are(server) -> None:
    """With ten times the prompts, each takes about as many calls."""
    async with connect(server) as client:
        run = METHODS["batch_generate"](client)
        few, many = await calls(run, 200), await calls(run, 2000)
    assert many["all"] < 1.15 * few["all"]


async def test_a_response_keeps_few_objects(server) -> None:
    """Of the server's answer only the bytes are kept; objects are made when they are asked for."""
    async with connect(server) as client:
        await client.batch_generate(texts(100), max_tokens=9)
        gc.collect()
        before = len(gc.get_objects())
        responses = await client.batch_generate(texts(500), max_tokens=9)
        gc.collect()
        kept = len(gc.get_objects()) - before
    assert kept < KEPT * len(responses)
    assert responses[7].raw.choices[0].message.content == responses[7].content


async def test_the_same_system_prompt_is_counted_once(server) -> None:
    """A bounded cache keeps the token count of repeated texts."""
    system = "You answer questions about numbers, and give reasons. " * 20
    async with connect(server) as client:
        await client.batch_generate(texts(1), system="Be brief.", max_tokens=9)
        fit = _VOCABULARIES.fits.get(MODEL)
        before = fit.vocabulary._remembered.cache_info()
        await client.batch_generate(texts(100), system=system, max_tokens=9)
        after = fit.vocabulary._remembered.cache_info()
    assert after.misses - before.misses == 1
    assert after.hits - before.hits >= 99  # and those of roles
    assert after.maxsize is not None
