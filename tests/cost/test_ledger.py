"""The bill: exact for every road, priced by the answer, and never twice."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import subprocess
import sys
import threading
from datetime import time as clock_time
from datetime import timezone
from decimal import Decimal, localcontext

import genai_prices
import openai
import pytest
from genai_prices.data_snapshot import DataSnapshot, set_custom_snapshot
from genai_prices.types import (
    ClauseEquals,
    ConditionalPrice,
    ModelInfo,
    ModelPrice,
    Provider,
    TimeOfDateConstraint,
)
from hypothesis import given
from hypothesis import strategies as st

from openai_eval_client import (
    AsyncOpenAI,
    BatchConfig,
    CostLedger,
    OpenAIClient,
    OpenAIConfig,
    RateLimitConfig,
    TimeoutError,
)
from openai_eval_client._cost import ledger as ledger_module
from openai_eval_client._cost.ledger import Ledger
from openai_eval_client._cost.pricing import Pricer
from openai_eval_client._wire.endpoints import Demand, is_free
from openai_eval_client._wire.failures import Outcome
from openai_eval_client._wire.usage import Usage
from openai_eval_client.errors import sdk_httpx
from openai_eval_client.testing import SimulatedServer

WIDE = RateLimitConfig(requests_per_minute=None, tokens_per_minute=None, max_concurrent=50)
HELLO = [{"role": "user", "content": "hello there"}]
PRICER = Pricer()
LONG = 300_000  # tokens: beyond the step of gpt-5.4's price at 272,000


def connect(server: SimulatedServer, **options: object) -> OpenAIClient:
    settings = {"api_key": "sk-test", "base_url": server.base_url, "default_model": "gpt-4o-mini", **options}
    batch = BatchConfig(auto_batch_threshold=5, polling_interval=0.05)
    return OpenAIClient(OpenAIConfig(**settings), rate_limit=WIDE, batch=batch)


def drop_in(server: SimulatedServer, **options: object) -> AsyncOpenAI:
    return AsyncOpenAI(api_key="sk-test", base_url=server.base_url, **options)


def counted(text: str) -> int:
    return LONG if "long" in text else len(text)


def listed(model: str, prompt: int, completion: int = 0, cached: int = 0, **context: str) -> Decimal:
    """The price by genai-prices itself."""
    tokens = genai_prices.Usage(input_tokens=prompt, output_tokens=completion, cache_read_tokens=cached)
    return genai_prices.calc_price(tokens, model, provider_id="openai", price_context=context).total_price


def price_of(answer: object, **context: str) -> Decimal:
    """The price of one of the SDK's own objects."""
    usage = answer.usage
    if hasattr(usage, "input_tokens"):
        return listed(
            answer.model,
            usage.input_tokens,
            usage.output_tokens,
            usage.input_tokens_details.cached_tokens,
            **context,
        )
    details = getattr(usage, "prompt_tokens_details", None)
    made = getattr(usage, "completion_tokens", None) or 0
    return listed(answer.model, usage.prompt_tokens, made, details.cached_tokens if details else 0, **context)


def exact(responses) -> Decimal:
    """The sum of what each of our own responses says it cost."""
    return sum((Decimal(repr(response.usage.estimated_cost)) for response in responses), Decimal(0))


def adds_up(cost: CostLedger) -> bool:
    return cost.total == sum((row.cost or Decimal(0) for row in cost.rows), Decimal(0))


# --- every road ------------------------------------------------------------------------------------------


async def test_every_road_of_one_client_adds_up_to_the_last_digit() -> None:
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
                exact(own)
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
    assert rows["gpt-5.4", "default"].cost > 2 * listed("gpt-5.4", 250_000) * Decimal("1.9")
    assert rows["gpt-4o-mini", "default"].cached_tokens == 7 * 32
    for name, recorded in (("input_tokens", "prompt_tokens"), ("output_tokens", "completion_tokens")):
        total = sum(getattr(row, name) for row in cost.rows)
        assert total == sum(getattr(call, recorded) for call in server.calls) == getattr(stats, recorded)


async def test_cached_input_is_billed_lower() -> None:
    """By both roads the price of cached input, not that of the ordinary."""
    with SimulatedServer(count_tokens=lambda _text: 1000, cached_tokens=600, output_tokens=10) as server:
        async with connect(server) as client:
            response = await client.generate_response("hello")
            await client.openai.chat.completions.create(model="gpt-4o-mini", messages=HELLO)
            (row,) = client.stats.cost.rows
    assert response.usage.cached_tokens == 600
    assert row.cached_tokens == 1200
    assert row.cost == 2 * listed("gpt-4o-mini", 1006, 10, 600) < 2 * listed("gpt-4o-mini", 1006, 10)


async def test_the_batch_road_has_its_own_rows() -> None:
    """At the batch price, once, however often the results are read."""
    with SimulatedServer(batch_seconds=0.02) as server:
        async with connect(server) as client:
            own = await client.batch_generate([f"number {n}" for n in range(6)], use_batch_api=True)
            online = await client.generate_response("hello")
            job = [found async for found in client.list_batch_jobs()]
            again = await client.retrieve_batch_results(job[0].job_id)
            cost = client.stats.cost
    assert {row.channel: row.calls for row in cost.rows} == {"batch": 6, "online": 1}
    assert cost.total == exact([*own, online])
    assert exact(again) == exact(own)
    assert cost.by_model["gpt-4o-mini"] == cost.total


async def test_estimated_usage_is_billed_once() -> None:
    """A server without usage: our own counts reach the bill, but not the tokens that servers counted."""
    with SimulatedServer(script=["null_usage", "no_usage"]) as server:
        async with connect(server) as client:
            own = [await client.generate_response("hello there") for _ in range(2)]
            stats = client.stats
    assert all(response.usage.estimated for response in own)
    assert stats.cost.total == exact(own) > 0
    assert (stats.cost.rows[0].calls, stats.cost.unaccounted) == (2, 0)
    assert (stats.prompt_tokens, stats.completion_tokens) == (0, 0)


async def test_an_unknown_model_is_unpriced_and_no_other() -> None:
    """Counted in every way but in dollars: None, not 0."""
    with SimulatedServer() as server:
        async with connect(server) as client:
            await client.generate_response("hello", model="nobody/knows-this")
            await client.openai.chat.completions.create(model="nobody/knows-this", messages=HELLO)
            known = await client.generate_response("hello")
            stats = client.stats
    assert stats.unpriced == stats.cost.unpriced == 2
    assert stats.cost.by_model["nobody/knows-this"] is None
    assert [(row.calls, row.unpriced, row.cost is None) for row in stats.cost.rows] == [
        (2, 2, True),
        (1, 0, False),
    ]
    assert stats.cost == float(stats.cost.total) == known.usage.estimated_cost


# --- attempts that bring no answer -----------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["500", "429", "408"])
async def test_a_refusal_costs_nothing(fault: str) -> None:
    """One answer, one price."""
    with SimulatedServer(script=[fault]) as server:
        async with connect(server) as client:
            response = await client.generate_response("hello")
            cost = client.stats.cost
    assert cost.total == exact([response])
    assert (cost.rows[0].calls, cost.retried, cost.unaccounted) == (1, 0, 0)


@pytest.mark.parametrize("fault", ["drop", "truncate", "cut_json", "garbage"])
async def test_what_was_sent_and_not_answered_may_have_been_billed(fault: str) -> None:
    """It is counted apart, at what was reserved for it at most."""
    with SimulatedServer(script=[fault]) as server:
        async with connect(server) as client:
            response = await client.generate_response("hello", max_tokens=1000)
            cost = client.stats.cost
    assert cost.total == exact([response])
    assert (cost.rows[0].calls, cost.retried, cost.unaccounted) == (1, 0, 1)
    assert cost.unaccounted_cost == listed("gpt-4o-mini", 8, 1000)


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
    assert cost.unaccounted_cost == 3 * listed("gpt-4o-mini", 8, 100)


async def test_a_call_given_up_may_have_been_billed() -> None:
    """Cancelled in flight; one that never left was not."""
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
    """What nobody asked the server to count; so is one that was left early."""
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
    assert stats.cost.total == 2 * exact([response]) == 2 * listed("gpt-4o", 1000, 100)


async def test_sound_and_odd_names_are_priced_as_the_ledger_does() -> None:
    """A response and the bill have one price, whatever kinds of tokens there are; no name breaks the JSON."""
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
        assert client.stats.cost.total == exact([response]) > listed("gpt-audio", 1000, 100)
        assert client.stats.cost.rows[0].reasoning_tokens == 5
        await client.generate_response("hello")
        cost = client.stats.cost
    assert CostLedger.model_validate_json(cost.model_dump_json()) == cost
    assert cost.rows[1].cost is None


# --- the drop-in client ----------------------------------------------------------------------------------


async def test_the_drop_in_counts_calls_and_retries() -> None:
    """As the SDK says on each request; a call is one, however often it is sent, and has one price."""
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
    """A 4xx that the SDK does not repeat; where its retries end without, only itself knows."""
    with SimulatedServer(models=["gpt-4o"], script=["500"]) as server:
        async with drop_in(server, max_retries=0) as client:
            with pytest.raises(openai.NotFoundError):
                await client.chat.completions.create(model="gpt-4", messages=HELLO)
            with pytest.raises(openai.InternalServerError):
                await client.chat.completions.create(model="gpt-4o", messages=HELLO)
            await client.models.list()
            stats = client.stats
    assert (stats.requests, stats.failures, stats.attempts) == (2, 1, 3)


async def test_a_file_of_answers_is_nobodys_answer() -> None:
    """What a download holds was billed to whoever asked for it."""
    line = json.dumps({"response": {"body": {"model": "gpt-4o", "choices": [], "usage": BILLED}}}).encode()
    with SimulatedServer() as server:
        async with drop_in(server) as client:
            file = await client.files.create(file=("results.jsonl", line), purpose="batch")
            assert (await client.files.content(file.id)).content == line
            stats = client.stats
    assert (stats.cost, stats.prompt_tokens, stats.requests) == (CostLedger(), 0, 0)


def test_another_server_has_its_own_prices_and_bill() -> None:
    """The address decides whose prices hold: that of the client, of a copy, or of the environment."""
    client = AsyncOpenAI(api_key="sk-test")
    groq = client.with_options(base_url="https://api.groq.com/openai/v1")
    ledgers = [each._account.ledger for each in (client, groq, client.copy(), groq.copy())]
    assert ledgers[0] is ledgers[2] is not ledgers[1] is ledgers[3]
    for ledger in ledgers[:2]:
        ledger.add("llama-3.3-70b-versatile", Usage(1000, 10))
    assert (client.stats.cost.unpriced, groq.stats.cost.unpriced) == (1, 0)


def test_nothing_is_imported_before_somebody_reads() -> None:
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


# --- the ledger itself -----------------------------------------------------------------------------------

MODELS = ["gpt-4o", "gpt-5.4", "gpt-5", "nobody/knows-this"]
USAGES = st.builds(
    Usage,
    st.integers(0, 600_000),
    st.integers(0, 10**5),
    st.integers(0, 600_000),
    model=st.none() | st.sampled_from(MODELS),
    service_tier=st.sampled_from([None, "auto", "default", "flex", "priority"]),
)
ENTRIES = st.tuples(st.sampled_from(["answered", "retried", "unaccounted", "saved"]), USAGES, st.booleans())


@given(st.lists(st.tuples(ENTRIES, st.sampled_from(["", "keep up", "read"])), max_size=40))
def test_the_bill_is_the_sum_of_the_prices(story) -> None:
    """Whatever is entered, and whenever it is read on the way."""
    ledger, sums, unpriced, counts = (
        Ledger(),
        dict.fromkeys(["total", "unaccounted", "saved"], Decimal(0)),
        0,
        [],
    )
    for (kind, usage, batch), then in story:
        ledger._note(kind, "gpt-4o", usage, batch=batch)
        model = usage.model or "gpt-4o"
        cost = PRICER.cost(model, usage, batch=batch, service_tier=usage.service_tier)
        sums[kind if kind in sums else "total"] += cost or 0
        unpriced += cost is None and kind in {"answered", "retried"}
        counts.append(kind)
        if then == "keep up":
            ledger.keep_up()
        elif then == "read":
            assert ledger.snapshot().total == sums["total"]
    bill = ledger.snapshot()
    assert (bill.total, bill.unaccounted_cost, bill.saved_by_cache) == (
        sums["total"], sums["unaccounted"], sums["saved"],
    )  # fmt: skip
    assert (bill.retried, bill.unaccounted) == (counts.count("retried"), counts.count("unaccounted"))
    assert (bill.unpriced, adds_up(bill)) == (unpriced, True)
    assert sum(row.calls for row in bill.rows) == counts.count("answered") + counts.count("retried")
    assert len({(row.model, row.channel, row.service_tier) for row in bill.rows}) == len(bill.rows)


def test_a_program_that_computes_roughly_has_an_exact_bill() -> None:
    """The precision it sets for its own sums is not that of the ledger."""
    ledger = Ledger()
    with localcontext() as rough:
        rough.prec = 3
        for _ in range(1000):
            ledger.add("gpt-4o", Usage(12345, 678))
        total = ledger.snapshot().total
    assert total == 1000 * listed("gpt-4o", 12345, 678)


def test_a_price_is_that_of_the_hour_of_the_answer(monkeypatch) -> None:
    """Not of the hour in which somebody reads the bill."""
    night = TimeOfDateConstraint(
        start_time=clock_time(0, tzinfo=timezone.utc), end_time=clock_time(6, tzinfo=timezone.utc)
    )
    prices = [
        ConditionalPrice(prices=ModelPrice(input_mtok=Decimal(10))),
        ConditionalPrice(constraint=night, prices=ModelPrice(input_mtok=Decimal(1))),
    ]
    models = [ModelInfo("m", ClauseEquals("m"), prices=prices)]
    made = Provider(id="openai", name="openai", api_pattern=r"https://openai\.test", models=models)
    set_custom_snapshot(DataSnapshot(providers=[made], from_auto_update=False))
    try:
        hour, ledger = [0], Ledger()
        monkeypatch.setattr(ledger_module.time, "time", lambda: 1_700_006_400 + 3600 * hour[0])  # midnight
        for hour[0] in (0, 5, 12):
            ledger.add("m", Usage(1_000_000, 0))
        assert ledger.snapshot().total == 1 + 1 + 10
    finally:
        set_custom_snapshot(None)


def test_moderations_cost_nothing() -> None:
    """They have no usage, and need none."""
    ledger = Ledger()
    ledger.settled(Demand("omni-moderation-latest", 9, free=is_free("/v1/moderations")), Outcome(200, {}), 9)
    ledger.settled(Demand("gpt-4o", 9, free=is_free("/v1/chat/completions")), Outcome(200, {}), 9)
    assert ledger.snapshot().unaccounted == 1


def test_what_piles_up_is_priced_by_a_thread(monkeypatch) -> None:
    """Where nobody reads, the entries stay bounded, and nobody waits for the price list."""
    monkeypatch.setattr(ledger_module, "_SOME", 5)
    monkeypatch.setattr(ledger_module, "_MANY", 20)
    ledger = Ledger()
    for _ in range(20):
        assert not ledger.pricer_for(None).loaded
        ledger.add("gpt-4o", Usage(1000, 0))
        ledger.keep_up()
    for thread in threading.enumerate():
        if thread.name == "openai_eval_client prices":
            thread.join(30)
    assert (ledger.pricer_for(None).loaded, len(ledger._pending)) == (True, 0)
    for _ in range(17):
        ledger.add("gpt-4o", Usage(1000, 0))
        ledger.keep_up()
        assert len(ledger._pending) < 5
    assert ledger.snapshot().total == 37 * listed("gpt-4o", 1000)


def test_a_ledger_that_interrupts_itself_loses_nothing() -> None:
    """A collected stream settles, a signal handler reads, in the middle of anything: nothing is lost."""
    ledger, reads = Ledger(), []

    class Interrupting(Pricer):
        """Prices what it is asked, with interruptions."""

        def rates(self, *args, **options):
            if len(reads) < 300:
                ledger.add("gpt-4o", Usage(1000, 0))
                ledger.keep_up()
                reads.append(ledger.snapshot().total)
            return super().rates(*args, **options)

    ledger._pricer = Interrupting()
    for _ in range(200):
        ledger.add("gpt-4o", Usage(1000, 0))
    while ledger._pending:
        ledger.snapshot()
    assert ledger.snapshot().total == 500 * listed("gpt-4o", 1000)
    assert reads == sorted(reads)


def test_a_reading_that_interrupts_the_loading_shows_what_is_priced() -> None:
    """A signal handler that reads while the price list is imported: the import goes on, nothing is lost."""
    ledger, seen = Ledger(), []

    class Interrupted(Pricer):
        """Loads while somebody reads."""

        def load(self) -> None:
            seen.append(ledger.snapshot().total)
            super().load()

    ledger._pricer = Interrupted()
    ledger.add("gpt-4o", Usage(1000, 0))
    assert ledger.snapshot().total == listed("gpt-4o", 1000)
    assert seen == [0]


def test_a_forgotten_stream_is_on_the_bill() -> None:
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
    assert client.stats.cost.total == exact(own) > 0
    assert sum(row.calls for row in client.stats.cost.rows) == 800
    for mine in readings:
        totals = [cost.total for cost in mine]
        assert totals == sorted(totals)
        assert all(map(adds_up, mine))


def test_the_cache_s_savings_are_no_cost() -> None:
    """What hits would have cost stands apart."""
    ledger = Ledger()
    ledger.saved("gpt-4o", Usage(1000, 10))
    ledger.saved("gpt-4o", Usage(1000, 0), batch=True)
    bill = ledger.snapshot()
    assert bill.saved_by_cache == listed("gpt-4o", 1000, 10) + listed("gpt-4o", 1000) / 2
    assert (bill.total, bill.rows) == (0, [])


def test_an_unpriced_model_is_said_once_and_not_under_the_lock(caplog) -> None:
    """A log handler that reads the bill, in whatever thread, does not wait for itself."""
    caplog.set_level(logging.INFO, "openai_eval_client")
    ledger, seen = Ledger(), []

    class Reading(logging.Handler):
        """Reads the bill in another thread before it goes on."""

        def emit(self, record: logging.LogRecord) -> None:  # noqa: ARG002  # logging's
            reader = threading.Thread(target=lambda: seen.append(ledger.snapshot().unpriced))
            reader.start()
            reader.join(10)

    handler = Reading()
    logging.getLogger("openai_eval_client").addHandler(handler)
    try:
        for _ in range(3):
            ledger.add("unheard-of", Usage(1, 1))
            ledger.snapshot()
    finally:
        logging.getLogger("openai_eval_client").removeHandler(handler)
    assert seen == [1]
    assert [record.getMessage() for record in caplog.records] == [
        "genai-prices has no price for 'unheard-of': its cost is unknown"
    ]
