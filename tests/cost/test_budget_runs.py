"""max_cost end to end: the server's own bill never exceeds it, and a run gets as far as it can."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import pickle
import re
import threading
from decimal import Decimal
from typing import TYPE_CHECKING

import openai
import pytest
from budgets import MOST, billed, list_price, questions, simulated
from clients import WIDE, dead_address
from pydantic import BaseModel

from openai_eval_client import (
    BudgetExceededError,
    ModelResponse,
    OpenAIClient,
    OpenAIConfig,
    PartialFailureError,
    RateLimitConfig,
    ValidationError,
)
from openai_eval_client._cost import CostBudget
from openai_eval_client.errors import sdk_httpx

if TYPE_CHECKING:
    from openai_eval_client.testing import SimulatedServer

STEADY = WIDE.model_copy(update={"adaptive_throttling": False})  # made-up 429s do not slow it down
HELLO = [{"role": "user", "content": "hello there"}]
EVERYTHING = {
    "500": 0.04, "503": 0.02, "429": 0.03, "408": 0.02, "drop": 0.04, "hang": 0.02, "truncate": 0.05,
    "garbage": 0.02, "cut_json": 0.05, "null_usage": 0.04, "no_usage": 0.03, "slow_drip": 0.01,
}  # fmt: skip


def connect(server: SimulatedServer, rate_limit: RateLimitConfig = WIDE, **options: object) -> OpenAIClient:
    config = {
        "api_key": "sk-test", "base_url": server.base_url, "default_model": "gpt-4o-mini", **options,
    }  # fmt: skip
    return OpenAIClient(OpenAIConfig(**config), rate_limit=rate_limit, cache=config.pop("cache", None))


async def most(client: OpenAIClient, prompt: str, output: int = MOST) -> Decimal:
    """What one attempt may cost."""
    body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": prompt}], "max_tokens": output}
    payments, counter = client._account.budgets, client._counter
    return await payments.most(body, "/v1/chat/completions", counter, CostBudget(Decimal(1)))


# --- the cap ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
async def test_a_run_is_never_dearer_than_its_budget_and_gets_as_far_as_it_can(seed: int) -> None:
    """64 in flight, every fault: the server bills less than the cap, and too little is left for another."""
    prompts = questions(400, seed)
    cap = float(Decimal("0.0025") * (1 + seed % 4))
    with simulated(seed=seed, faults=EVERYTHING, latency=0.01) as server:
        async with connect(server, STEADY, max_cost=cap, max_retries=3, timeout=0.6) as client:
            with pytest.raises(BudgetExceededError) as caught:
                await client.batch_generate(
                    prompts, max_tokens=MOST, max_concurrent=64, return_exceptions=True
                )
            budget = client.stats.budget
            largest = max([await most(client, prompt) for prompt in prompts])
        bill = billed(server.calls)
    assert bill <= budget["spent"] <= budget["limit"] == Decimal(str(cap))
    assert budget["reserved"] == 0
    assert budget["limit"] - budget["spent"] < largest
    responses = caught.value.responses
    assert len(responses) == 400
    assert 0 < sum(isinstance(each, ModelResponse) for each in responses) < 400
    assert [each for each in responses if each is not None and not each.content.startswith("word")] == []


@pytest.mark.parametrize("api", ["chat", "responses"])
async def test_a_call_stays_within_its_cap_by_either_api(api: str) -> None:
    """Without faults, what was spent is what the server bills, to the last digit."""
    with simulated() as server:
        async with connect(server) as client:
            with pytest.raises(BudgetExceededError, match=r"max_cost=0\.001 USD: 0\.00\d+ spent, ") as caught:
                await client.batch_generate(
                    questions(200, 1), api=api, max_tokens=MOST, max_concurrent=64, max_cost=0.001
                )
            assert client.stats.budget == {}
        bill = billed(server.calls)
    answered = [each for each in caught.value.responses if each is not None]
    assert bill == sum(Decimal(repr(each.usage.estimated_cost)) for each in answered)
    assert Decimal("0.0009") < bill <= Decimal("0.001")
    assert len(answered) == sum(call.served for call in server.calls) > 10


async def test_a_budget_that_suffices_changes_nothing() -> None:
    """All are answered with what they cost and one estimate more, a third of what all estimates come to."""
    prompts = questions(300, 2)
    with simulated() as server:
        async with connect(server) as client:
            estimates = [await most(client, prompt, 4 * MOST) for prompt in prompts]
            await client.batch_generate(prompts, max_tokens=4 * MOST)
            cap = billed(server.calls) + max(estimates)
            assert cap < sum(estimates) / 3
            responses = await client.batch_generate(
                prompts, max_tokens=4 * MOST, max_concurrent=64, max_cost=cap
            )
            assert len(responses) == 300
            assert len(server.calls) == 600
            assert await client.batch_generate([], max_tokens=5, max_cost=0) == []


async def test_the_calls_and_the_clients_cap_hold_together() -> None:
    """The call's first, here; then the client's, over several calls at once."""
    with simulated(latency=0.005) as server:
        async with connect(server, max_cost=0.002) as client:
            with pytest.raises(BudgetExceededError, match=r"max_cost=0\.0003 USD"):
                await client.batch_generate(questions(90, 3), max_tokens=MOST, max_cost=0.0003)
            first = billed(server.calls)
            assert first <= Decimal("0.0003")
            assert client.stats.budget == {"limit": Decimal("0.002"), "spent": first, "reserved": 0}
            runs = [
                client.batch_generate(questions(90, n), max_tokens=MOST, max_cost=0.0015) for n in range(5)
            ]
            outcomes = await asyncio.gather(*runs, return_exceptions=True)
            largest = await most(client, "why? " * 60 + "99")
            budget = client.stats.budget
    assert {type(outcome) for outcome in outcomes} == {BudgetExceededError}
    assert sum("max_cost=0.002 USD" in str(outcome) for outcome in outcomes) >= 1
    assert budget["spent"] == billed(server.calls) <= Decimal("0.002")
    assert Decimal("0.002") - budget["spent"] < largest


async def test_as_completed_yields_what_was_in_flight_and_then_raises() -> None:
    """Every answer that was paid for reaches the consumer."""
    with simulated(latency=0.01) as server:
        async with connect(server) as client:
            seen: dict[int, object] = {}

            async def consume() -> None:
                stream = client.as_completed(
                    iter(questions(300, 4)), max_tokens=MOST, max_concurrent=32, max_cost=0.001
                )
                async for index, outcome in stream:
                    seen.update({index: outcome})

            with pytest.raises(BudgetExceededError):
                await consume()
    answered = [each for each in seen.values() if isinstance(each, ModelResponse)]
    assert len(answered) == sum(call.served for call in server.calls)
    assert billed(server.calls) <= Decimal("0.001")


async def test_each_attempt_of_a_call_is_paid_for() -> None:
    """An attempt without an answer is billed at the most it can cost, an error status at nothing."""

    async def spent(script: list[str], attempts: int) -> tuple[object, int]:
        with simulated(script=script) as server:
            async with connect(server, max_retries=8, timeout=1) as client:
                cap = attempts * await most(client, "hello")
                try:
                    outcome: object = await client.generate_response("hello", max_tokens=MOST, max_cost=cap)
                except openai.OpenAIError as error:
                    outcome = error
            return outcome, len(server.calls)

    outcome, sent = await spent(["429", "429", "ok"], 1)
    assert isinstance(outcome, ModelResponse)
    assert sent == 3
    outcome, sent = await spent(["500", "408", "ok"], 3)
    assert isinstance(outcome, ModelResponse)
    assert sent == 3
    outcome, sent = await spent(["500", "408", "ok"], 2)
    assert isinstance(outcome, BudgetExceededError)
    assert sent == 2
    outcome, sent = await spent(["drop", "hang", "ok"], 3)
    assert isinstance(outcome, ModelResponse)
    assert sent == 3
    outcome, sent = await spent(["drop", "hang", "ok"], 2)
    assert isinstance(outcome, BudgetExceededError)
    assert outcome.responses == []
    assert sent == 2
    outcome, sent = await spent(["truncate", "cut_json", "ok"], 2)
    assert isinstance(outcome, BudgetExceededError)


async def test_what_never_connected_costs_nothing() -> None:
    """Where no connection came about, the whole budget is left."""
    with dead_address() as address:
        config = OpenAIConfig(
            api_key="k", base_url=address, default_model="gpt-4o-mini", max_cost=1, max_retries=1
        )
        async with OpenAIClient(config) as client:
            with pytest.raises(openai.APIConnectionError):
                await client.generate_response("hello", max_tokens=5)
            assert client.stats.budget == {"limit": 1, "spent": 0, "reserved": 0}


async def test_an_answer_without_usage_is_billed_at_the_most_it_can_cost() -> None:
    """Our own estimate of its tokens is no bill."""
    with simulated(faults={"no_usage": 1.0}) as server:
        async with connect(server, max_cost=1) as client:
            response = await client.generate_response("hello", max_tokens=MOST)
            assert response.usage.estimated
            assert client.stats.budget["spent"] == await most(client, "hello")


# --- a dear tier, output without a bound -------------------------------------------------------------------


def serving(tier: str, output: int):
    """A server that serves in a tier of its own choice and answers at this length: client, answers given."""
    given, module = [], sdk_httpx()
    message = {"role": "assistant", "content": "hi"}
    choice = {"index": 0, "finish_reason": "stop", "message": message}

    async def answer(_request: object) -> object:
        await asyncio.sleep(0.01)
        given.append(1)
        usage = {"prompt_tokens": 50, "completion_tokens": MOST, "total_tokens": 50 + output}
        body = {"model": "gpt-4o-mini", "service_tier": tier, "choices": [choice], "usage": usage}
        return module.Response(200, json=body)

    return module.AsyncClient(transport=module.MockTransport(answer)), given


async def test_a_project_whose_own_tier_is_a_dear_one_keeps_the_cap() -> None:
    """No request names it, and 64 are in flight before the first answer does."""
    http, given = serving("priority", 400)
    config = OpenAIConfig(api_key="k", default_model="gpt-4o-mini", max_cost=0.005)
    async with OpenAIClient(config, rate_limit=WIDE, http_client=http) as client:
        with pytest.raises(BudgetExceededError):
            await client.batch_generate(["word " * 40] * 200, max_tokens=400, max_concurrent=64)
        spent = client.stats.budget["spent"]
    assert spent == len(given) * list_price("gpt-4o-mini", 50, 400, service_tier="priority")
    assert Decimal("0.0045") < spent <= Decimal("0.005")


async def test_reasoning_beyond_max_tokens_spends_no_more_than_the_cap(caplog) -> None:
    """Thirty times what was allowed: once that was seen, it is what is reserved."""
    http, given = serving("default", 30 * MOST)
    config = OpenAIConfig(api_key="k", default_model="gpt-4o-mini", max_cost=0.01)
    async with OpenAIClient(config, rate_limit=WIDE, http_client=http) as client:
        first = await client.generate_response("word " * 40, max_tokens=MOST)
        assert (first.usage.completion_tokens, first.usage.total_tokens) == (30 * MOST, 50 + 30 * MOST)
        with pytest.raises(BudgetExceededError):
            await client.batch_generate(["word " * 40] * 200, max_tokens=MOST, max_concurrent=64)
        spent = client.stats.budget["spent"]
    assert spent == len(given) * list_price("gpt-4o-mini", 50, 30 * MOST)
    assert Decimal("0.009") < spent <= Decimal("0.01")
    assert [record.event for record in caplog.records].count("overspent") == 1


# --- cancelling -------------------------------------------------------------------------------------------


async def test_a_cancelled_call_counts_what_was_sent_and_gives_back_the_rest() -> None:
    """In flight: at the most it can cost. Waiting for the budget, or for the rate limit: nothing."""
    limits = RateLimitConfig(requests_per_minute=2, tokens_per_minute=None, adaptive_throttling=False)
    with simulated(latency=30) as server:
        async with connect(server, limits, max_cost=1, timeout=60) as client:
            each = await most(client, "hello")
            run = asyncio.ensure_future(
                client.batch_generate(["hello"] * 40, max_tokens=MOST, max_concurrent=4)
            )
            while server.in_flight < 2 or client.stats.budget["reserved"] < 8 * each:
                await asyncio.sleep(0.01)
            assert client.stats.budget["reserved"] == 8 * each  # two in flight, six wait for the rate limit
            run.cancel()
            with pytest.raises(asyncio.CancelledError):
                await run
            assert client.stats.budget == {"limit": 1, "spent": 2 * each, "reserved": 0}
        while server.in_flight:
            await asyncio.sleep(0.01)
        async with connect(server, max_cost=1, timeout=60) as client:
            waiting = asyncio.ensure_future(client.generate_response("hello", max_tokens=MOST, max_cost=each))
            while server.in_flight < 1:
                await asyncio.sleep(0.01)
            waiting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await waiting
            assert client.stats.budget["spent"] == each


async def test_a_call_that_waits_for_the_budget_goes_on_when_some_is_given_back() -> None:
    """The second attempt fits only once the first has turned out cheaper."""
    with simulated(latency=0.05, answer=lambda _: "one") as server:
        async with connect(server) as client:
            each = await most(client, "hello")
        async with connect(server, max_cost=each * Decimal("1.5")) as client:
            calls = [client.generate_response("hello", max_tokens=MOST) for _ in range(8)]
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            assert {type(outcome) for outcome in outcomes} == {ModelResponse}
    assert server.max_in_flight == 1


async def test_a_run_whose_consumer_leaves_gives_back() -> None:
    """By `break` and `aclose`."""
    with simulated(latency=0.02) as server:
        async with connect(server, max_cost=1) as client:
            async with contextlib.aclosing(client.as_completed(["hello"] * 99, max_tokens=MOST)) as stream:
                async for _ in stream:
                    break
            budget = client.stats.budget
            assert budget["reserved"] == 0
            assert billed(server.calls) <= budget["spent"] <= 1


# --- the drop-in client -----------------------------------------------------------------------------------


async def test_calls_on_the_sdk_client_are_held_to_the_clients_budget() -> None:
    """Chat, parse, responses, legacy completions, embeddings; and what is free costs nothing."""

    class Answer(BaseModel):
        text: str

    def fitting(body: dict) -> str:
        return '{"text": "x"}' if "response_format" in body else "two words"

    with simulated(answer=fitting) as server:
        async with connect(server, max_cost=1) as client:
            sdk = client.openai
            await sdk.chat.completions.create(model="gpt-4o-mini", messages=HELLO, max_tokens=9)
            await sdk.chat.completions.create(
                model="gpt-4o-mini", messages=HELLO, max_completion_tokens=9, n=3
            )
            await sdk.chat.completions.parse(
                model="gpt-4o-mini", messages=HELLO, max_tokens=99, response_format=Answer
            )
            await sdk.responses.create(model="gpt-4o-mini", input="hello", max_output_tokens=20)
            await sdk.with_options(max_retries=0).chat.completions.with_raw_response.create(
                model="gpt-4o-mini", messages=HELLO, max_tokens=9
            )
            other = sdk.with_options(api_key="another account")
            await other.chat.completions.create(model="gpt-4o-mini", messages=HELLO, max_tokens=9)
            before = client.stats.budget["spent"]
            assert before == billed(server.calls) > 0
            await sdk.models.list()
            await sdk.files.list()
            await sdk.embeddings.create(model="text-embedding-3-small", input=["a", "b"])
            await sdk.completions.create(model="gpt-3.5-turbo-instruct", prompt=["a", "b"], max_tokens=5, n=2)
            budget = client.stats.budget
            assert budget["spent"] > before
            assert budget["reserved"] == 0


@pytest.mark.parametrize("retries", [0, 3])
async def test_the_sdk_raises_our_error_and_does_not_try_again(retries: int) -> None:
    """Also where the SDK would retry whatever its HTTP client raises."""
    with simulated() as server:
        async with connect(server, max_cost=0.000001, max_retries=retries) as client:
            waited = asyncio.get_running_loop().time()
            for sdk in (client.openai, client.openai.copy()):
                with pytest.raises(BudgetExceededError, match=r"max_cost=0\.000001 USD"):
                    await sdk.chat.completions.create(model="gpt-4o-mini", messages=HELLO, max_tokens=9)
                with pytest.raises(ValidationError, match="max_cost: needs max_tokens"):
                    await sdk.chat.completions.create(model="gpt-4o-mini", messages=HELLO)
            assert client.stats.retries == 0
            assert client._account.limiter.next_turn() == 0  # never queued
            assert asyncio.get_running_loop().time() - waited < 60
        assert server.calls == []


async def test_a_stream_is_settled_when_it_ends() -> None:
    """By its usage; without that, or left early, by the most it can cost."""
    chat = {"model": "gpt-4o-mini", "messages": HELLO, "max_tokens": MOST, "stream": True}
    with simulated() as server:
        async with connect(server, max_cost=1) as client:
            create = client.openai.chat.completions.create
            stream = await create(**chat, stream_options={"include_usage": True})
            assert client.stats.budget["reserved"] > 0
            assert [chunk async for chunk in stream]
            bill = billed(server.calls)
            assert client.stats.budget == {"limit": 1, "spent": bill, "reserved": 0}
            each = await most(client, "hello there")
            assert [chunk async for chunk in await create(**chat)]
            assert client.stats.budget["spent"] == bill + each
            stream = await create(**chat, stream_options={"include_usage": True})
            await stream.close()
            assert client.stats.budget["spent"] == bill + 2 * each
            stream = await create(**chat)
            del stream
            gc.collect()
            assert client.stats.budget == {"limit": 1, "spent": bill + 3 * each, "reserved": 0}


async def test_streams_never_exceed_the_budget() -> None:
    """Many at once, some without usage, some left early."""
    chat = {"model": "gpt-4o-mini", "messages": HELLO, "max_tokens": MOST, "stream": True}
    with simulated(latency=0.01, seed=5) as server:
        async with connect(server, max_cost=0.0005) as client:

            async def one(number: int) -> None:
                usage = {"stream_options": {"include_usage": True}} if number % 3 else {}
                async with await client.openai.chat.completions.create(**chat, **usage) as stream:
                    async for _ in stream:
                        if number % 5 == 0:
                            break

            outcomes = await asyncio.gather(*[one(n) for n in range(80)], return_exceptions=True)
            budget = client.stats.budget
            each = await most(client, "hello there")
    assert {type(outcome) for outcome in outcomes} == {type(None), BudgetExceededError}
    assert billed(server.calls) <= budget["spent"] <= Decimal("0.0005")
    assert Decimal("0.0005") - budget["spent"] < each


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (
            lambda sdk: sdk.chat.completions.create(model="unheard-of", messages=HELLO, max_tokens=5),
            "'unheard-of'",
        ),
        (lambda sdk: sdk.chat.completions.create(model="gpt-4o-mini", messages=HELLO), "needs max_tokens"),
        (lambda sdk: sdk.responses.create(model="gpt-4o-mini", input="hi"), "needs max_tokens"),
        (
            lambda sdk: sdk.responses.create(
                model="gpt-4o-mini", input="hi", max_output_tokens=5, previous_response_id="resp_1"
            ),
            "previous_response_id",
        ),
        (
            lambda sdk: sdk.responses.create(
                model="gpt-4o-mini", input="hi", max_output_tokens=5, tools=[{"type": "web_search"}]
            ),
            "web_search",
        ),
        (
            lambda sdk: sdk.responses.create(
                model="gpt-4o-mini", input=[{"type": "item_reference", "id": "x"}], max_output_tokens=5
            ),
            "item_reference",
        ),
        (
            lambda sdk: sdk.chat.completions.create(
                model="gpt-4o-mini",
                messages=[{"role": "user", "content": [{"type": "file", "file": {"file_id": "file-1"}}]}],
                max_tokens=5,
            ),
            "file",
        ),
        (
            lambda sdk: sdk.chat.completions.create(
                model="gpt-4o-mini", messages=HELLO, max_tokens=5, service_tier="scale"
            ),
            "'scale'",
        ),
        (lambda sdk: sdk.images.generate(prompt="a cat", model="gpt-image-1"), "/images/generations"),
        (
            lambda sdk: sdk.batches.create(
                input_file_id="file-1", endpoint="/v1/chat/completions", completion_window="24h"
            ),
            "/batches",
        ),
        (
            lambda sdk: sdk.audio.transcriptions.create(file=("a.wav", b"x"), model="whisper-1"),
            "/transcriptions",
        ),
    ],
)
async def test_what_has_no_bound_is_refused_before_it_is_sent(call, why: str) -> None:
    """The error names it, and max_cost."""
    with simulated() as server:
        async with connect(server, max_cost=1) as client:
            with pytest.raises(ValidationError, match="max_cost") as caught:
                await call(client.openai)
            assert why in str(caught.value)
            assert client.stats.budget == {"limit": 1, "spent": 0, "reserved": 0}
        assert server.calls == []


# --- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong", [-1, -0.01, float("nan"), float("inf"), True, "5", [1], 10**400, Decimal("NaN"), Decimal(-1)]
)
async def test_a_cap_must_be_an_amount(wrong: object) -> None:
    """Anything else is refused by name, wherever it is given."""
    with pytest.raises(ValueError, match="max_cost"):
        OpenAIConfig(api_key="k", max_cost=wrong)
    with simulated() as server:
        async with connect(server) as client:
            for call in (client.generate_response, client.batch_generate, client.as_completed):
                prompts = "hello" if call == client.generate_response else ["hello"]
                with pytest.raises(ValidationError, match="max_cost=") as caught:
                    await call(prompts, max_tokens=5, max_cost=wrong)
                assert caught.value.field == "max_cost"
        assert server.calls == []


@pytest.mark.parametrize("cap", [0, 5, 0.25, Decimal("0.25")])
def test_the_config_keeps_the_cap(cap: object) -> None:
    """0 is an amount too: then only what is free, or cached, is answered."""
    config = OpenAIConfig(api_key="k", max_cost=cap)
    assert config.max_cost == cap
    assert (
        OpenAIConfig.model_validate_json(config.model_copy().model_dump_json()[:-1] + ',"api_key":"k"}')
        == config
    )
    assert pickle.loads(pickle.dumps(config)) == config  # noqa: S301


async def test_a_cap_of_nothing_sends_nothing() -> None:
    """It is refused at once."""
    with simulated() as server:
        async with connect(server) as client:
            with pytest.raises(BudgetExceededError, match="max_cost=0 USD: 0 spent"):
                await client.generate_response("hello", max_tokens=5, max_cost=0)
        assert server.calls == []


@pytest.mark.parametrize("wide", [True, False], ids=["client", "call"])
async def test_a_budget_needs_max_tokens_and_a_known_price(wide: bool) -> None:
    """Else it is refused at once, for the whole call; the bound may have any of its names in the API."""
    own = {} if wide else {"max_cost": 1}
    with simulated() as server:
        async with connect(server, **({"max_cost": 1} if wide else {})) as client:
            with pytest.raises(ValidationError, match="max_cost: needs max_tokens"):
                await client.generate_response("hello", **own)
            with pytest.raises(ValidationError, match="max_cost: needs max_tokens"):
                await client.batch_generate(["hello"] * 3, **own)
            with pytest.raises(ValidationError, match="max_cost: needs max_tokens"):
                client.as_completed(["hello"] * 3, **own)
            with pytest.raises(ValidationError, match="max_cost: needs max_tokens"):
                await client.generate_response("hello", api="responses", extra_body={"max_tokens": 5}, **own)
            with pytest.raises(ValidationError, match="max_cost: needs n"):
                await client.generate_response("hello", max_tokens=5, extra_body={"n": 2.0}, **own)
            unknown = {"model": "unheard-of", "max_tokens": 5, **own}
            with pytest.raises(
                ValidationError, match="max_cost: the price of model='unheard-of' is not known"
            ):
                await client.generate_response("hello", **unknown)
            with pytest.raises(ValidationError, match="'unheard-of'"):
                await client.batch_generate(["hello"] * 50, return_exceptions=True, **unknown)
            with pytest.raises(ValidationError, match="'unheard-of'"):
                _ = [
                    pair
                    async for pair in client.as_completed(["hello"] * 50, **unknown)
                    if not isinstance(pair[1], ValidationError)
                ]
            assert server.calls == []
            for bound in (
                {"max_tokens": 5},
                {"max_completion_tokens": 5},
                {"api": "responses", "max_tokens": 5},
            ):
                assert await client.generate_response("hello", **bound, **own)
            assert await client.generate_response("hello", api="responses", max_output_tokens=20, **own)


async def test_one_prompt_whose_cost_has_no_bound_fails_alone() -> None:
    """A file that is given by its id alone: the others are answered."""
    named = [{"role": "user", "content": [{"type": "file", "file": {"file_id": "file-1"}}]}]
    with simulated() as server:
        async with connect(server) as client:
            with pytest.raises(PartialFailureError) as caught:
                await client.batch_generate(["hello", named, "hello"], max_tokens=5, max_cost=1)
    assert list(caught.value.failures) == [1]
    assert isinstance(caught.value.failures[1], ValidationError)


async def test_a_schema_among_the_input_is_no_file() -> None:
    """Its `type` may be a list, which names no part of a message."""
    tools = [{"name": "add", "input_schema": {"properties": {"to": {"type": ["string", "null"]}}}}]
    listed = {"type": "mcp_list_tools", "id": "mcpl_1", "server_label": "calendar", "tools": tools}
    with simulated() as server:
        async with connect(server, max_cost=1) as client:
            await client.openai.responses.create(model="gpt-4o-mini", input=[listed], max_output_tokens=20)
            assert client.stats.budget["spent"] == billed(server.calls) > 0


async def test_without_a_budget_none_of_this_is_needed() -> None:
    """Neither max_tokens nor a price."""
    with simulated() as server:
        async with connect(server) as client:
            assert await client.generate_response("hello", model="unheard-of")
            assert client.stats.budget == {}


# --- cache, threads ---------------------------------------------------------------------------------------


async def test_hits_cost_nothing(tmp_path) -> None:
    """A rerun with a larger budget pays for the rest alone; with a cap of 0 it answers what is cached."""
    path, prompts = tmp_path / "answers.sqlite", [f"hello {n}" for n in range(80)]
    with simulated() as server:

        async def run(cap: float) -> list[ModelResponse]:
            config = OpenAIConfig(api_key="k", base_url=server.base_url, default_model="gpt-4o-mini")
            async with OpenAIClient(config, rate_limit=WIDE, cache=path) as client:
                return await client.batch_generate(prompts, max_tokens=MOST, temperature=0, max_cost=cap)

        with pytest.raises(BudgetExceededError) as caught:
            await run(0.0005)
        paid = sum(each is not None for each in caught.value.responses)
        assert 0 < paid < 80
        sent = len(server.calls)
        await run(0.01)
        assert len(server.calls) - sent == 80 - paid
        assert all(response.cached for response in await run(0))
        assert len(server.calls) == 80


def test_eight_threads_share_one_client() -> None:
    """Each with its own event loop, own calls and the SDK's: the bill of all stays within the cap."""
    with simulated(latency=0.01, faults={"500": 0.05, "drop": 0.05}) as server:
        client = connect(server, max_cost=0.004)
        ends: list[BaseException | None] = []

        async def work(number: int) -> None:
            try:
                if number % 2:
                    await client.batch_generate(questions(200, number), max_tokens=MOST, max_concurrent=16)
                else:
                    for _ in range(200):
                        await client.openai.chat.completions.create(
                            model="gpt-4o-mini", messages=HELLO, max_tokens=MOST
                        )
            except BudgetExceededError as error:
                ends.append(error)

        threads = [threading.Thread(target=lambda n=n: asyncio.run(work(n))) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(50)
        budget, bill = client.stats.budget, billed(server.calls)
    assert len(ends) == 8
    assert bill <= budget["spent"] <= Decimal("0.004")
    assert budget["reserved"] == 0
    assert not re.search(r"sk-test", "".join(map(str, ends)))
