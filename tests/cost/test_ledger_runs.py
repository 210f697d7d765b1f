"""What `client.stats.cost` says after real calls: exact for every channel, and nothing twice."""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys
import threading
from decimal import Decimal

import openai
import pytest
from budgets import cost_of, list_price
from clients import WIDE, connect

from openai_eval_client import (
    AsyncOpenAI,
    BatchConfig,
    CostLedger,
    OpenAIClient,
    OpenAIConfig,
    TimeoutError,
)
from openai_eval_client._wire.failures import Outcome
from openai_eval_client._wire.requests import Demand
from openai_eval_client._wire.usage import Usage
from openai_eval_client.errors import sdk_httpx
from openai_eval_client.testing import SimulatedServer

HELLO = [{"role": "user", "content": "hello there"}]
LONG = 300_000  # tokens: beyond the step of gpt-5.4's price at 272,000
QUICK = BatchConfig(auto_batch_threshold=5, polling_interval=0.05)


def drop_in(server: SimulatedServer, **options: object) -> AsyncOpenAI:
    return AsyncOpenAI(api_key="sk-test", base_url=server.base_url, **options)


def counted(text: str) -> int:
    return LONG if "long" in text else len(text)


def price_of(answer: object, **context: str) -> Decimal:
    """The price of one of the SDK's own objects."""
    usage = answer.usage
    if hasattr(usage, "input_tokens"):
        return list_price(
            answer.model,
            usage.input_tokens,
            usage.output_tokens,
            usage.input_tokens_details.cached_tokens,
            **context,
        )
    details = getattr(usage, "prompt_tokens_details", None)
    made = getattr(usage, "completion_tokens", None) or 0
    return list_price(
        answer.model, usage.prompt_tokens, made, details.cached_tokens if details else 0, **context
    )


def adds_up(cost: CostLedger) -> bool:
    return cost.total == sum((row.cost or Decimal(0) for row in cost.rows), Decimal(0))


# --- every channel ---------------------------------------------------------------------------------------


async def test_every_way_to_call_adds_up_to_the_last_digit() -> None:
    """Own calls, many, both APIs, the SDK's calls, streams, embeddings: the sum of what each one cost."""
    with SimulatedServer(count_tokens=counted, cached_tokens=7) as server:
        async with connect(server) as client:
            own = [
                await client.generate_response("hello"),
                await client.generate_response("long", model="gpt-5.4"),
                await client.generate_response("short", model="gpt-5.4", api="responses"),
                await client.generate_response("hello", model="gpt-5", service_tier="flex"),
                *await client.batch_generate([f"number {n}" for n in range(30)], max_tokens=9),
            ]
            sdk, chat = client.openai, client.openai.chat.completions
            whole = [
                await chat.create(model="gpt-4o", messages=HELLO, n=3),
                await sdk.responses.create(model="gpt-5.4", input="long"),
                await sdk.embeddings.create(model="text-embedding-3-small", input=["a", "bc"]),
                await sdk.completions.create(model="gpt-3.5-turbo-instruct", prompt="hello"),
            ]
            flex = await chat.create(model="gpt-5", messages=HELLO, service_tier="flex")
            stream = await chat.create(
                model="gpt-5", messages=HELLO, stream=True, stream_options={"include_usage": True},
                service_tier="priority",
            )  # fmt: skip
            *_, last = [chunk async for chunk in stream]
            async with await sdk.responses.create(model="gpt-4o-mini", input="hello", stream=True) as events:
                *_, completed = [event async for event in events]
            expected = (
                cost_of(own)
                + sum(map(price_of, [*whole, completed.response]))
                + price_of(flex, service_tier="flex")
                + price_of(last, service_tier="priority")
            )
            cost = client.stats.cost
            stats = client.stats
    assert cost.total == expected
    assert adds_up(cost)
    assert (cost.unpriced, cost.retried, cost.unaccounted) == (0, 0, 0)
    assert stats.requests == stats.attempts == len(server.calls) == 41
    rows = {(row.model, row.service_tier): row for row in cost.rows}
    assert rows["gpt-5", "flex"].calls == 2
    assert rows["gpt-5.4", "default"].calls == 3
    assert rows["gpt-5.4", "default"].cost > 2 * list_price("gpt-5.4", 250_000) * Decimal("1.9")
    assert rows["gpt-4o-mini", "default"].cached_tokens == 7 * 32
    for name, recorded in (("input_tokens", "prompt_tokens"), ("output_tokens", "completion_tokens")):
        total = sum(getattr(row, name) for row in cost.rows)
        assert total == sum(getattr(call, recorded) for call in server.calls) == getattr(stats, recorded)


async def test_cached_input_is_billed_lower() -> None:
    """Own calls and the SDK's have the price of cached input, not that of ordinary input."""
    with SimulatedServer(count_tokens=lambda _text: 1000, cached_tokens=600, output_tokens=10) as server:
        async with connect(server) as client:
            response = await client.generate_response("hello")
            await client.openai.chat.completions.create(model="gpt-4o-mini", messages=HELLO)
            (row,) = client.stats.cost.rows
    assert response.usage.cached_tokens == 600
    assert row.cached_tokens == 1200
    assert row.cost == 2 * list_price("gpt-4o-mini", 1006, 10, 600) < 2 * list_price("gpt-4o-mini", 1006, 10)


async def test_batches_have_their_own_rows() -> None:
    """At the batch price, once, however often the results are read."""
    with SimulatedServer(batch_seconds=0.02) as server:
        async with connect(server, batch=QUICK) as client:
            own = await client.batch_generate([f"number {n}" for n in range(6)], use_batch_api=True)
            online = await client.generate_response("hello")
            job = [found async for found in client.list_batch_jobs()]
            again = await client.retrieve_batch_results(job[0].job_id)
            cost = client.stats.cost
    assert {row.channel: row.calls for row in cost.rows} == {"batch": 6, "online": 1}
    assert cost.total == cost_of([*own, online])
    assert cost_of(again) == cost_of(own)
    assert cost.by_model["gpt-4o-mini"] == cost.total


async def test_estimated_usage_is_entered_once() -> None:
    """A server without usage: our own counts reach the ledger, but not the tokens that servers counted."""
    with SimulatedServer(script=["null_usage", "no_usage"]) as server:
        async with connect(server) as client:
            own = [await client.generate_response("hello there") for _ in range(2)]
            stats = client.stats
    assert all(response.usage.estimated for response in own)
    assert stats.cost.total == cost_of(own) > 0
    assert (stats.cost.rows[0].calls, stats.cost.unaccounted) == (2, 0)
    assert (stats.prompt_tokens, stats.completion_tokens) == (0, 0)


async def test_an_unknown_model_is_unpriced_and_no_other() -> None:
    """Counted in every way but in dollars: None, not 0."""
    with SimulatedServer() as server:
        async with connect(server) as client:
            await client.generate_response("hello", model="acme/unknown")
            await client.openai.chat.completions.create(model="acme/unknown", messages=HELLO)
            known = await client.generate_response("hello")
            stats = client.stats
    assert stats.unpriced == stats.cost.unpriced == 2
    assert stats.cost.by_model["acme/unknown"] is None
    assert [(row.calls, row.unpriced, row.cost is None) for row in stats.cost.rows] == [
        (2, 2, True),
        (1, 0, False),
    ]
    assert stats.cost == float(stats.cost.total) == known.usage.estimated_cost


# --- attempts that bring no answer -----------------------------------------------------------------------


async def test_a_refusal_costs_nothing() -> None:
    """The ledger holds the price of the one answer."""
    with SimulatedServer(script=["429"]) as server:
        async with connect(server) as client:
            response = await client.generate_response("hello")
            cost = client.stats.cost
    assert cost.total == cost_of([response])
    assert (cost.rows[0].calls, cost.retried, cost.unaccounted) == (1, 0, 0)


@pytest.mark.parametrize("fault", ["drop", "truncate", "cut_json", "500", "408"])
async def test_what_was_sent_and_not_answered_may_have_been_billed(fault: str) -> None:
    """It is counted apart, at all the tokens that were reserved for it."""
    with SimulatedServer(script=[fault]) as server:
        async with connect(server) as client:
            response = await client.generate_response("hello", max_tokens=1000)
            cost = client.stats.cost
    assert cost.total == cost_of([response])
    assert (cost.rows[0].calls, cost.retried, cost.unaccounted) == (1, 0, 1)
    assert cost.unaccounted_cost == list_price("gpt-4o-mini", 8, 1000)


async def test_a_timeout_may_have_been_billed() -> None:
    """Of every attempt, and of the drop-in's too."""
    with SimulatedServer(script=["hang"] * 3) as server:
        async with connect(server, max_retries=1) as client:
            with pytest.raises(TimeoutError):
                await client.generate_response("hello", timeout=0.1, max_tokens=100)
            with pytest.raises(openai.APITimeoutError):
                await client.openai.with_options(max_retries=0, timeout=0.1).chat.completions.create(
                    model="gpt-4o-mini", messages=[{"role": "user", "content": "hello"}], max_tokens=100
                )
            cost = client.stats.cost
    assert (cost.rows, cost.total, cost.unaccounted) == ([], 0, 3)
    assert cost.unaccounted_cost == 3 * list_price("gpt-4o-mini", 8, 100)


async def test_a_call_given_up_may_have_been_billed() -> None:
    """It was cancelled in flight; one that was never sent was not billed."""
    with SimulatedServer(latency=30, latency_sigma=0) as server:
        async with connect(server) as client:
            task = asyncio.create_task(client.generate_response("hello"))
            while not server.in_flight:
                await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert client.stats.cost.unaccounted == 1
        late = connect(server, max_retries=0)
        server.stop()
        async with late as client:
            with pytest.raises(openai.APIConnectionError):
                await client.generate_response("hello")
            assert client.stats.cost == CostLedger()


async def test_a_stream_without_usage_is_unaccounted_for() -> None:
    """The server was not asked to count it; so is one that was left early."""
    with SimulatedServer() as server:
        async with drop_in(server) as client:
            ask = {"model": "gpt-4o-mini", "messages": HELLO, "stream": True}
            assert [chunk async for chunk in await client.chat.completions.create(**ask)]
            asked = {**ask, "stream_options": {"include_usage": True}}
            async with await client.chat.completions.create(**asked) as left:
                await anext_of(left)
            cost = client.stats.cost
    assert (cost.rows, cost.unaccounted) == ([], 2)
    assert cost.unaccounted_cost > 0


async def anext_of(stream: object) -> object:
    async for item in stream:
        return item
    return None


def answering(*bodies: dict[str, object]):
    """An HTTP client whose server gives these bodies one after the other, with status 200."""
    module, left = sdk_httpx(), list(bodies)
    transport = module.MockTransport(lambda _request: module.Response(200, content=json.dumps(left.pop(0))))
    return module.AsyncClient(transport=transport)


CHOICE = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "hi"}}
BILLED = {"prompt_tokens": 1000, "completion_tokens": 100}


async def test_an_attempt_that_was_billed_for_nothing_is_in_the_total() -> None:
    """Usage but no answer: paid, and tried again."""
    http = answering(
        {"model": "gpt-4o", "usage": BILLED}, {"model": "gpt-4o", "choices": [CHOICE], "usage": BILLED}
    )
    config = OpenAIConfig(api_key="sk-test", default_model="gpt-4o")
    async with OpenAIClient(config, rate_limit=WIDE, http_client=http) as client:
        response = await client.generate_response("hello")
        stats = client.stats
    assert (stats.requests, stats.retries, stats.cost.retried, stats.cost.rows[0].calls) == (1, 1, 1, 2)
    assert stats.cost.total == 2 * cost_of([response]) == 2 * list_price("gpt-4o", 1000, 100)


@pytest.mark.parametrize("broken", ["genai_prices.data_snapshot.get_snapshot", "genai_prices.calc_price"])
async def test_an_answer_is_worth_more_than_its_price(broken: str, tmp_path, monkeypatch) -> None:
    """A price list that fails after the answer came: it is handed out and kept, unpriced."""

    def fail(*_args: object, **_options: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(broken, fail)
    config = OpenAIConfig(api_key="sk-test", default_model="gpt-4o")
    answered = {"model": "gpt-4o", "choices": [CHOICE], "usage": BILLED}
    http = answering(answered, answered)
    async with OpenAIClient(
        config, rate_limit=WIDE, http_client=http, cache=tmp_path / "answers.sqlite"
    ) as client:
        first, second = [await client.generate_response("hello", temperature=0) for _ in range(2)]
        assert (first.content, first.usage.estimated_cost, second.cached) == ("hi", None, True)
        sdk = await client.openai.chat.completions.create(model="gpt-4o", messages=HELLO)
        assert sdk.usage.prompt_tokens == 1000
        cost = client.stats.cost
    assert (cost.total, cost.unpriced, cost.rows[0].input_tokens) == (0, 2, 2000)


async def test_a_response_costs_what_the_ledger_says() -> None:
    """They agree whatever kinds of tokens there are, and no model name breaks the JSON."""
    sound = {
        **BILLED,
        "prompt_tokens_details": {"audio_tokens": 600},
        "completion_tokens_details": {"audio_tokens": 40, "reasoning_tokens": 5},
    }
    http = answering(
        {"model": "gpt-audio", "choices": [CHOICE], "usage": sound},
        {"model": "\ud83d", "choices": [CHOICE], "usage": sound, "service_tier": "\ud83d"},
    )
    async with OpenAIClient(OpenAIConfig(api_key="sk-test"), rate_limit=WIDE, http_client=http) as client:
        response = await client.generate_response("hello")
        assert client.stats.cost.total == cost_of([response]) > list_price("gpt-audio", 1000, 100)
        assert client.stats.cost.rows[0].reasoning_tokens == 5
        await client.generate_response("hello")
        cost = client.stats.cost
    assert CostLedger.model_validate_json(cost.model_dump_json()) == cost
    assert cost.rows[1].cost is None


# --- the drop-in client ----------------------------------------------------------------------------------


async def test_the_drop_in_counts_calls_and_retries() -> None:
    """A call is one, however often the SDK sends it, and has one price."""
    with SimulatedServer(script=["ok", "500"]) as server:
        async with drop_in(server) as client:
            answers = [await client.chat.completions.create(model="gpt-4o", messages=HELLO) for _ in range(2)]
            assert client.with_options(timeout=9).stats.cost == client.stats.cost
            stats = client.stats
    assert (stats.requests, stats.retries, stats.attempts, stats.failures) == (2, 1, 3, 0)
    assert stats.cost.total == sum(map(price_of, answers))


async def test_own_calls_are_not_counted_twice() -> None:
    """Through one client both kinds are counted together, each once."""
    with SimulatedServer(script=["500", "500"]) as server:
        async with connect(server) as client:
            await client.generate_response("hello")
            await client.openai.chat.completions.create(model="gpt-4o-mini", messages=HELLO)
            assert (client.stats.requests, client.stats.retries, client.stats.attempts) == (2, 2, 4)


async def test_a_refused_call_has_failed_for_good() -> None:
    """A 4xx that the SDK does not repeat; that its retries are used up, only the SDK knows."""
    with SimulatedServer(models=["gpt-4o"], script=["500"]) as server:
        async with drop_in(server, max_retries=0) as client:
            with pytest.raises(openai.NotFoundError):
                await client.chat.completions.create(model="gpt-4", messages=HELLO)
            with pytest.raises(openai.InternalServerError):
                await client.chat.completions.create(model="gpt-4o", messages=HELLO)
            await client.models.list()
            stats = client.stats
    assert (stats.requests, stats.failures, stats.attempts) == (2, 1, 3)


async def test_a_downloaded_file_of_answers_is_no_answer() -> None:
    """The answers in it were billed when they were given."""
    line = json.dumps({"response": {"body": {"model": "gpt-4o", "choices": [], "usage": BILLED}}}).encode()
    with SimulatedServer() as server:
        async with drop_in(server) as client:
            file = await client.files.create(file=("results.jsonl", line), purpose="batch")
            assert (await client.files.content(file.id)).content == line
            stats = client.stats
    assert (stats.cost, stats.prompt_tokens, stats.requests) == (CostLedger(), 0, 0)


def test_another_server_has_its_own_prices_and_ledger() -> None:
    """The address decides whose prices hold: that of the client, of a copy, or of the environment."""
    client = AsyncOpenAI(api_key="sk-test")
    groq = client.with_options(base_url="https://api.groq.com/openai/v1")
    ledgers = [each._account.ledger for each in (client, groq, client.copy(), groq.copy())]
    assert ledgers[0] is ledgers[2] is not ledgers[1] is ledgers[3]
    for ledger in ledgers[:2]:
        ledger.settled(Demand("llama-3.3-70b-versatile"), Outcome(200, {}, Usage(1000, 10)), 0)
    assert (client.stats.cost.unpriced, groq.stats.cost.unpriced) == (1, 0)


def test_nothing_is_imported_before_the_ledger_is_read() -> None:
    """The price list takes half a second to load: a program that never asks for it does not pay that."""
    program = """
import asyncio, sys
from openai_eval_client import AsyncOpenAI
from openai_eval_client.testing import SimulatedServer
async def main(url):
    async with AsyncOpenAI(api_key="sk-test", base_url=url) as client:
        for _ in range(3):
            await client.embeddings.create(model="text-embedding-3-small", input="hello")
        print("genai_prices" in sys.modules, client.stats.cost.rows[0].calls, "genai_prices" in sys.modules)
with SimulatedServer() as server:
    asyncio.run(main(server.base_url))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "3", "True"]


def test_a_forgotten_stream_is_in_the_ledger() -> None:
    """Dropped without being closed: settled by the collector, once."""

    async def forget() -> CostLedger:
        async with drop_in(server) as client:
            stream = await client.chat.completions.create(model="gpt-4o", messages=HELLO, stream=True)
            await anext_of(stream)
            del stream
            for _ in range(5):
                gc.collect()
                await asyncio.sleep(0.01)
            return client.stats.cost

    with SimulatedServer() as server:
        assert asyncio.run(forget()).unaccounted == 1


def test_eight_threads_read_while_calls_go_on() -> None:
    """Each reading adds up and none goes back; the last one is the sum of all responses."""
    over, readings = threading.Event(), []

    def read() -> None:
        mine = []
        while not over.wait(0.001):  # not all of the time: one core may be all there is
            mine.append(client.stats.cost)
        readings.append(mine)

    async def run():
        prompts = [f"number {n}" for n in range(400)]
        own = await client.batch_generate(prompts, model="gpt-4o")
        return own + await client.batch_generate(prompts, model="gpt-5.4", service_tier="priority")

    with SimulatedServer() as server:
        client = connect(server)
        threads = [threading.Thread(target=read) for _ in range(8)]
        for thread in threads:
            thread.start()
        try:
            own = asyncio.run(run())
        finally:
            over.set()
            for thread in threads:
                thread.join(30)
        asyncio.run(client.close())
    assert client.stats.cost.total == cost_of(own) > 0
    assert sum(row.calls for row in client.stats.cost.rows) == 800
    for mine in readings:
        totals = [cost.total for cost in mine]
        assert totals == sorted(totals)
        assert all(map(adds_up, mine))
