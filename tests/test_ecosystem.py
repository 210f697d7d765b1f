"""Frameworks that take an `AsyncOpenAI` work with this package's: paced, with tools, streams and errors."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import openai
import pytest
from pydantic import BaseModel

from openai_eval_client import AsyncOpenAI, OpenAIClient, OpenAIConfig, RateLimitConfig, RequestTooLargeError
from openai_eval_client.testing import SimulatedServer

if TYPE_CHECKING:
    from collections.abc import Callable

    from openai_eval_client import ClientStats

pytestmark = pytest.mark.ecosystem

MODEL = "gpt-4o-mini"
RPM, TPM = 1200, 600_000
AT_ONCE = 20  # requests in the server's bucket of one second
LOAD = 30
LIMITS = RateLimitConfig(requests_per_minute=RPM, tokens_per_minute=TPM, burst_seconds=1)
KEY = "sk-test"


class City(BaseModel):
    """A city."""

    name: str
    people: int


@dataclass
class Paced:
    """A paced client and its server, which refuses what exceeds its limits."""

    sdk: AsyncOpenAI  # what the framework gets
    stats: Callable[[], ClientStats]
    server: SimulatedServer

    def sent(self, count: int) -> None:
        """Check that `count` requests were sent, all through the limiter, and none was refused."""
        assert self.stats().attempts == len(self.server.calls) == count
        assert self.server.counts["429"] == 0

    def waited(self) -> None:
        """Check that the limiter held requests back."""
        assert self.stats().wait_seconds_by["requests"] > 0


@contextlib.asynccontextmanager
async def drop_in(server, limits):
    async with AsyncOpenAI(api_key=KEY, base_url=server.base_url, rate_limit=limits, max_retries=0) as client:
        yield Paced(client, lambda: client.stats, server)


@contextlib.asynccontextmanager
async def of_the_client(server, limits):
    config = OpenAIConfig(api_key=KEY, base_url=server.base_url, max_retries=0)
    async with OpenAIClient(config, rate_limit=limits) as client:
        yield Paced(client.openai, lambda: client.stats, server)


@pytest.fixture(params=[drop_in, of_the_client], ids=["drop-in", "OpenAIClient.openai"])
async def paced(request):
    with SimulatedServer(rpm=RPM, tpm=TPM, window=1, latency=0.01) as server:
        async with request.param(server, LIMITS) as client:
            yield client


@pytest.fixture
async def failing():
    """Connect the drop-in client to a server that fails the first request and drops the second."""
    with SimulatedServer(script=["500", "drop"]) as server:
        async with drop_in(server, None) as client:
            yield client


@pytest.fixture
async def small():
    """Connect the drop-in client with a limit that every request of the tests exceeds."""
    with SimulatedServer() as server:
        async with drop_in(server, RateLimitConfig(tokens_per_minute=1, max_wait=1)) as client:
            yield client


async def test_the_same_load_on_the_sdks_own_client_is_refused():
    """Without pacing the server does refuse requests: the other tests could fail."""
    with SimulatedServer(rpm=RPM, tpm=TPM, window=1, latency=0.01) as server:
        async with openai.AsyncOpenAI(api_key=KEY, base_url=server.base_url, max_retries=0) as sdk:
            messages = [{"role": "user", "content": "hello"}]
            calls = [sdk.chat.completions.create(model=MODEL, messages=messages) for _ in range(LOAD)]
            await asyncio.gather(*calls, return_exceptions=True)
        assert server.counts["429"] > 0


# --- pydantic-ai ------------------------------------------------------------------------------------------


def agent(sdk, **options):
    pydantic_ai = pytest.importorskip("pydantic_ai")
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    model = OpenAIChatModel(MODEL, provider=OpenAIProvider(openai_client=sdk))
    return pydantic_ai.Agent(model, **options)


async def test_pydantic_ai_is_paced(paced):
    """With more runs at once than the server admits, each is answered and none refused."""
    asking = agent(paced.sdk)
    results = await asyncio.gather(*[asking.run(f"say {n}") for n in range(LOAD)])
    assert [result.output for result in results] == [f"echo: say {n}" for n in range(LOAD)]
    assert all(result.usage.input_tokens > 0 for result in results)
    paced.sent(LOAD)
    paced.waited()


async def test_pydantic_ai_reads_structured_output(paced):
    """Output comes by a schema, and by a tool whose function gets the arguments."""
    pydantic_ai = pytest.importorskip("pydantic_ai")
    native = agent(paced.sdk, output_type=pydantic_ai.NativeOutput(City))
    assert isinstance((await native.run("the largest city")).output, City)

    def judge(city: City, score: int) -> str:
        """Judge a city."""
        return f"{type(city).__name__} {type(score).__name__}"

    assert (await agent(paced.sdk, output_type=judge).run("judge it")).output == "City int"
    paced.sent(2)


async def test_pydantic_ai_streams(paced):
    """The text comes in pieces, and the usage at the end."""
    async with agent(paced.sdk).run_stream("one two three") as result:
        pieces = [piece async for piece in result.stream_text(delta=True, debounce_by=None)]
    assert "".join(pieces) == "echo: one two three"
    assert len(pieces) > 1
    assert paced.stats().completion_tokens == result.usage.output_tokens > 0
    paced.sent(1)


async def test_pydantic_ai_raises_its_own_errors(failing, small):
    """A status is its ModelHTTPError, no answer its ModelAPIError, a request never sent our own error."""
    exceptions = pytest.importorskip("pydantic_ai.exceptions")
    with pytest.raises(exceptions.ModelHTTPError) as refused:
        await agent(failing.sdk).run("hello")
    assert refused.value.status_code == 500
    with pytest.raises(exceptions.ModelAPIError):
        await agent(failing.sdk).run("hello")
    with pytest.raises(RequestTooLargeError):
        await agent(small.sdk).run("hello")
    assert small.server.calls == []


# --- langchain --------------------------------------------------------------------------------------------


def chat_model(sdk, **options):
    """Make a chat model: `async_client` is for plain calls, `root_async_client` for parsed ones."""
    langchain_openai = pytest.importorskip("langchain_openai")
    clients = {"async_client": sdk.chat.completions, "root_async_client": sdk}
    return langchain_openai.ChatOpenAI(model=MODEL, **clients, **options)


async def test_langchain_is_paced(paced):
    """With more prompts at once than the server admits, each is answered and none refused."""
    answers = await chat_model(paced.sdk).abatch([f"say {n}" for n in range(LOAD)])
    assert [answer.content for answer in answers] == [f"echo: say {n}" for n in range(LOAD)]
    assert all(answer.usage_metadata["input_tokens"] > 0 for answer in answers)
    paced.sent(LOAD)
    paced.waited()


async def test_langchain_reads_structured_output(paced):
    """Output comes by a schema and by a tool; tools work on their own, too."""
    llm = chat_model(paced.sdk)
    assert isinstance(await llm.with_structured_output(City).ainvoke("a city"), City)
    by_tool = llm.with_structured_output(City, method="function_calling")
    assert isinstance(await by_tool.ainvoke("a city"), City)
    called = await llm.bind_tools([City], tool_choice="any").ainvoke("a city")
    assert [call["name"] for call in called.tool_calls] == ["City"]
    paced.sent(3)


async def test_langchain_streams(paced):
    """The text comes in pieces; the usage is requested and settled."""
    chunks = [chunk async for chunk in chat_model(paced.sdk, stream_usage=True).astream("one two three")]
    assert "".join(chunk.content for chunk in chunks) == "echo: one two three"
    (usage,) = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    assert paced.stats().completion_tokens == usage["output_tokens"] > 0
    paced.sent(1)


async def test_langchain_uses_the_responses_api(paced):
    """It calls the Responses API on `root_async_client`."""
    answer = await chat_model(paced.sdk, use_responses_api=True).ainvoke("hello")
    assert answer.text == "echo: hello"
    assert paced.server.calls[0].path == "/v1/responses"
    paced.sent(1)


async def test_langchain_raises_the_sdks_errors(failing, small):
    """A failed call raises the SDK's error, a request never sent our own."""
    with pytest.raises(openai.InternalServerError):
        await chat_model(failing.sdk).ainvoke("hello")
    with pytest.raises(openai.APIConnectionError):
        await chat_model(failing.sdk).ainvoke("hello")
    with pytest.raises(RequestTooLargeError):
        await chat_model(small.sdk).ainvoke("hello")
    assert small.server.calls == []


# --- autoevals: a judge that answers by a tool call -------------------------------------------------------


def judge(sdk):
    autoevals = pytest.importorskip("autoevals")
    prompt, scores = "Is {{output}} {{expected}}?", {"Y": 1, "N": 0}
    return autoevals.LLMClassifier("same", prompt, scores, model=MODEL, use_cot=True, client=sdk)


async def test_autoevals_is_paced(paced):
    """With more judgements at once than the server admits, each has a score and none is refused."""
    score = judge(paced.sdk).eval_async
    scores = await asyncio.gather(*[score(output=f"{n}", expected=f"{n}") for n in range(LOAD)])
    assert [each.metadata["choice"] for each in scores] == ["Y"] * LOAD
    assert [each.score for each in scores] == [1] * LOAD
    paced.sent(LOAD)
    paced.waited()


async def test_autoevals_embeds_through_the_limiter(paced):
    """Requests for embeddings, by scorers that compare vectors, are paced too."""
    autoevals = pytest.importorskip("autoevals")
    similar = autoevals.EmbeddingSimilarity(client=paced.sdk, model="text-embedding-3-small")
    assert 0 <= (await similar.eval_async(output="one", expected="another")).score <= 1
    paced.sent(2)


async def test_autoevals_raises_the_sdks_errors(failing, small):
    """A failed call raises the SDK's error, a request never sent our own."""
    with pytest.raises(openai.InternalServerError):
        await judge(failing.sdk).eval_async(output="a", expected="b")
    with pytest.raises(openai.APIConnectionError):
        await judge(failing.sdk).eval_async(output="a", expected="b")
    with pytest.raises(RequestTooLargeError):
        await judge(small.sdk).eval_async(output="a", expected="b")
    assert small.server.calls == []


def test_the_readmes_block_runs_as_it_stands() -> None:
    """All three frameworks work on one client."""
    pytest.importorskip("autoevals")
    pytest.importorskip("langchain_openai")
    pytest.importorskip("pydantic_ai")
    root = Path(__file__).parents[1]
    readme = (root / "README.md").read_text("utf-8")
    (block,) = re.findall(
        r"<!-- ecosystem: frameworks -->\n```python\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL
    )
    with SimulatedServer() as server:
        named = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": server.base_url, "PYTHONPATH": str(root)}
        command = [sys.executable, "-c", block]
        done = subprocess.run(
            command, env={**os.environ, **named}, capture_output=True, text=True, check=True
        )
        assert len(server.calls) == 2
    assert done.stdout.splitlines()[-1] == "2 requests, Factuality is ready"
