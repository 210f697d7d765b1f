"""max_cost by the Batch API: what is submitted is reserved, and the server's own bill never exceeds it."""

from __future__ import annotations

import asyncio
import random
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import openai
import pytest
from batches import creations, ended
from budgets import IN, MOST, OUT, billed, questions, simulated

from openai_eval_client import (
    BatchConfig,
    BatchError,
    BatchRequest,
    BudgetExceededError,
    ModelResponse,
    OpenAIClient,
    OpenAIConfig,
    RateLimitConfig,
    ValidationError,
)

if TYPE_CHECKING:
    from openai_eval_client.testing import SimulatedServer

WIDE = RateLimitConfig(requests_per_minute=None, tokens_per_minute=None, max_concurrent=50)
SOON = 0.01  # seconds
# What became of a line that was answered and is billed, whether or not its answer arrives; and of others.
ANSWERED = ["ok", "ok", "ok", "missing", "truncated", "no_usage", "null_body", "garbage", "duplicate"]
OTHERS = ["500", "429", "400", "expired", "timeout"]


def connect(
    server: SimulatedServer, *, cache: Any = None, batch: dict[str, Any] | None = None, **options: Any
) -> OpenAIClient:
    config = {"api_key": "sk-test", "base_url": server.base_url, "default_model": "gpt-4o-mini", **options}
    hurried = BatchConfig(**{"polling_interval": SOON, "auto_batch_threshold": 1, **(batch or {})})
    return OpenAIClient(OpenAIConfig(**config), batch=hurried, rate_limit=WIDE, cache=cache)


def by_batch(server: SimulatedServer) -> Decimal:
    """What the server bills for batches: half the price of all that it answered."""
    usages = [batch["usage"] for batch in server.batches if batch.get("usage")]
    tokens = [sum(usage[name] for usage in usages) for name in ("input_tokens", "output_tokens")]
    return (tokens[0] * IN + tokens[1] * OUT) / 2


async def most(client: OpenAIClient, prompts: list[str], output: int = MOST) -> list[Decimal]:
    """What each may cost by batch."""
    payments, counter = client._account.budgets, client._counter
    await payments.ready()
    await counter.most_input({"model": "gpt-4o-mini"})
    bodies = [
        {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": prompt}], "max_tokens": output}
        for prompt in prompts
    ]
    return [payments.most_by_batch(body, "/v1/chat/completions", counter) for body in bodies]


def nearly(amount: Decimal) -> Any:
    return pytest.approx(amount, rel=Decimal("1e-12"))


# --- batch_generate ---------------------------------------------------------------------------------------


async def test_what_fits_is_submitted_whole_and_settled() -> None:
    """Reserved while it runs; then what it came to, at the batch price."""
    prompts = questions(30, 1)
    with simulated(batch_seconds=0.3) as server:
        async with connect(server, max_cost=1) as client:
            whole = sum(await most(client, prompts))
            seen: set[Decimal] = set()

            def look(_: float) -> None:
                seen.add(client.stats.budget["reserved"])

            responses = await client.batch_generate(
                prompts, use_batch_api=True, max_tokens=MOST, progress_callback=look
            )
            budget = client.stats.budget
    assert len(responses) == 30
    assert whole in seen
    assert budget["reserved"] == 0
    assert budget["spent"] == nearly(by_batch(server)) == nearly(client.stats.cost.total)
    assert len(server.batches) == 1


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("wide", [True, False], ids=["client", "call"])
async def test_a_run_is_never_dearer_than_its_budget_and_gets_as_far_as_it_can(seed: int, wide: bool) -> None:
    """Batches are cut to what fits; what they come to is used for the rest, until no request fits."""
    chance = random.Random(seed)  # noqa: S311
    prompts = questions(120, seed)
    plans = [
        {"lines": chance.choices(ANSWERED + (OTHERS if seed % 2 else []), k=120)} if n % 3 else {}
        for n in range(60)
    ]
    with simulated(batch_seconds=0.02, batch_plans=plans) as server:
        async with connect(server, batch={"max_batch_size": 50}) as client:
            estimates = await most(client, prompts)
            cap = float(sum(estimates) / (3 + seed % 3))
        caps = ({"max_cost": cap}, {}) if wide else ({}, {"max_cost": cap})
        async with connect(server, batch={"max_batch_size": 50}, **caps[0]) as client:
            with pytest.raises(BudgetExceededError, match=r"max_cost=0\.0") as caught:
                await client.batch_generate(
                    prompts, use_batch_api=True, max_tokens=MOST, return_exceptions=True, **caps[1]
                )
            budget = client.stats.budget
        assert by_batch(server) <= Decimal(str(cap))
        assert {batch["status"] for batch in server.batches} == {"completed"}
        assert len(server.batches) > 2
    if wide:
        assert by_batch(server) <= budget["spent"] + Decimal("1e-15")
        assert budget["reserved"] == 0
        assert budget["limit"] - budget["spent"] < max(estimates)
    responses = caught.value.responses
    assert 10 < sum(isinstance(response, ModelResponse) for response in responses) < 120
    assert len(responses) == 120


async def test_a_budget_that_suffices_changes_nothing() -> None:
    """With what all cost and one estimate more, all are answered."""
    prompts = questions(60, 2)
    with simulated(batch_seconds=0.02) as server:
        async with connect(server) as client:
            dearest = max(await most(client, prompts))
            await client.batch_generate(prompts, use_batch_api=True, max_tokens=MOST)
            cap = by_batch(server) + dearest
            responses = await client.batch_generate(
                prompts, use_batch_api=True, max_tokens=MOST, max_cost=cap
            )
    assert len(responses) == 60
    assert len(server.batches) > 2


@pytest.mark.parametrize(
    ("plan", "lost", "failed"),
    [
        ({"lines": ["ok", "missing", "truncated", "no_usage", "null_body", "garbage"]}, [1, 2, 3, 4, 5], []),
        (
            {"lines": ["ok", "500", "400", "expired", "timeout", "cancelled", "status_0"]},
            [6],
            [1, 2, 3, 4, 5],
        ),
        ({"lines": ["expired", "truncated", "500", "ok"]}, [1], [0, 2]),
        ({"lines": ["duplicate", "duplicate_error", "unknown_id", "429"]}, [], [3]),
        ({"status": "expired", "lines": ["ok", "ok", "expired", "expired"]}, [], [2, 3]),
        ({"status": "cancelled", "lines": ["ok", "cancelled"], "done": 1}, [], [1]),
        ({"status": "failed"}, [], range(8)),
        ({"output_file": False}, range(8), []),
        ({"status": "expired", "lines": ["expired"], "output_file": False}, range(1, 8), [0]),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
async def test_every_outcome_of_a_line(plan: dict[str, Any], lost: Any, failed: Any) -> None:
    """Answered: what it cost. Lost: the most it can. Failed, expired, cancelled: nothing."""
    requests = [BatchRequest(prompt=prompt, max_tokens=MOST) for prompt in questions(8, 3)]
    with simulated(batch_seconds=0.02, batch_plans=[{}, plan]) as server:
        async with connect(server, max_cost=1) as client:
            first = await client.submit_batch_job(requests)
            await ended(client, first.job_id)
            costs = [each.usage.estimated_cost for each in await client.retrieve_batch_results(first.job_id)]
            estimates = await most(client, [str(request.prompt) for request in requests])
            before = client.stats.budget["spent"]
            second = await client.submit_batch_job(requests)
            assert client.stats.budget["reserved"] == sum(estimates)
            await ended(client, second.job_id)
            answered = set(range(8)) - set(lost) - set(failed)
            expected = sum([float(estimates[n]) for n in lost] + [costs[n] for n in answered])
            for _ in range(2):  # the second time changes nothing
                try:
                    await client.retrieve_batch_results(second.job_id, return_exceptions=True)
                except openai.OpenAIError:
                    assert plan["status"] == "failed"
                budget = client.stats.budget
                assert budget["reserved"] == 0
                assert float(budget["spent"] - before) == pytest.approx(expected)


async def test_a_batch_refused_for_its_enqueued_tokens_is_given_back() -> None:
    """At its creation or later: cut, held back, and paid once."""
    for refused in ("create", "later"):
        with simulated(batch_seconds=0.03, enqueued_tokens=200, enqueued_refusal=refused) as server:
            async with connect(server, max_cost=1) as client:
                prompts = [f"number {n}" for n in range(60)]
                responses = await client.batch_generate(prompts, use_batch_api=True, max_tokens=MOST)
                budget = client.stats.budget
        assert len(responses) == 60
        assert budget["reserved"] == 0
        assert budget["spent"] == nearly(by_batch(server))
        assert len(server.batches) > 3


async def test_what_expires_is_paid_for_once_more() -> None:
    """The second round reserves for itself."""
    with simulated(batch_seconds=0.03, batch_plans=[{"status": "expired", "done": 0.5}]) as server:
        async with connect(server, max_cost=1) as client:
            prompts = questions(20, 4)
            assert len(await client.batch_generate(prompts, use_batch_api=True, max_tokens=MOST)) == 20
            assert client.stats.budget["spent"] == nearly(by_batch(server))
            assert client.stats.budget["reserved"] == 0


async def test_nothing_fits() -> None:
    """Not even the first request: nothing is uploaded."""
    with simulated() as server:
        async with connect(server) as client:
            with pytest.raises(BudgetExceededError, match="max_cost=0 USD: 0 spent") as caught:
                await client.batch_generate(["hello"] * 5, use_batch_api=True, max_tokens=MOST, max_cost=0)
    assert caught.value.responses == [None] * 5
    assert server.calls == []


async def test_a_cancelled_run_stays_reserved_until_its_batches_are_retrieved() -> None:
    """They go on, and cost; meanwhile no request waits for them."""
    with simulated(batch_seconds=0.3) as server:
        async with connect(server, max_cost=1) as client:
            prompts = questions(10, 5)
            whole = sum(await most(client, prompts))
        async with connect(server, max_cost=float(whole)) as client:
            run = asyncio.ensure_future(client.batch_generate(prompts, use_batch_api=True, max_tokens=MOST))
            while not server.batches:
                await asyncio.sleep(SOON)
            online = asyncio.ensure_future(client.generate_response("hello", max_tokens=MOST))
            await asyncio.sleep(0.05)
            assert not online.done()  # the run may turn out cheaper
            run.cancel()
            with pytest.raises(asyncio.CancelledError):
                await run
            with pytest.raises(BudgetExceededError, match="in flight"):
                await online
            assert client.stats.budget["reserved"] == whole
            job_id = "+".join(batch["id"] for batch in server.batches)
            await ended(client, job_id)
            await client.retrieve_batch_results(job_id)
            budget = client.stats.budget
            assert budget["reserved"] == 0
            assert budget["spent"] == nearly(by_batch(server))
            assert await client.generate_response("hello", max_tokens=MOST)


async def test_cancelled_anywhere_it_is_never_overspent() -> None:
    """After any number of steps; whatever was created is reserved, and nothing else for ever."""
    prompts = questions(8, 6)
    with simulated(batch_seconds=0.01) as server:
        for many in range(0, 160, 7):
            async with connect(server, max_cost=1, batch={"max_batch_size": 3}) as client:
                known = {batch["id"] for batch in server.batches}
                before = by_batch(server)
                run = asyncio.ensure_future(
                    client.batch_generate(prompts, use_batch_api=True, max_tokens=MOST)
                )
                for _ in range(many):
                    await asyncio.sleep(0)
                run.cancel()
                outcome = (await asyncio.gather(run, return_exceptions=True))[0]
                for batch in server.batches:
                    if batch["id"] not in known:  # the last may have been created after the cancellation
                        await ended(client, batch["id"])
                        await client.retrieve_batch_results(batch["id"])
                budget = client.stats.budget
                assert by_batch(server) - before <= budget["spent"] + budget["reserved"] + Decimal("1e-15")
                if isinstance(outcome, list):
                    assert budget["reserved"] == 0


async def test_online_and_batch_share_the_clients_budget() -> None:
    """Both at once, both within the cap."""
    with simulated(batch_seconds=0.05, latency=0.005) as server:
        async with connect(server, batch={"max_batch_size": 20}) as client:
            cap = float(sum(await most(client, questions(60, 7))) / 2)
        async with connect(server, max_cost=cap, batch={"max_batch_size": 20}) as client:
            outcomes = await asyncio.gather(
                client.batch_generate(questions(60, 7), use_batch_api=True, max_tokens=MOST),
                client.batch_generate(questions(60, 8), max_tokens=MOST),
                client.batch_generate(questions(60, 9), use_batch_api=True, max_tokens=MOST),
                return_exceptions=True,
            )
            budget = client.stats.budget
    assert {type(outcome) for outcome in outcomes} <= {BudgetExceededError, list}
    assert BudgetExceededError in {type(outcome) for outcome in outcomes}
    assert by_batch(server) + billed(server.calls) == nearly(budget["spent"])
    assert budget["spent"] <= Decimal(str(cap))
    assert budget["reserved"] == 0


# --- a killed run -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_pauses")
async def test_batches_of_a_killed_run_are_reserved_again(tmp_path) -> None:
    """Before anything new is submitted, and though they alone are more than the new cap."""
    path, prompts = tmp_path / "answers.sqlite", questions(20, 10)
    plans = [{"seconds": 0.5}, {"seconds": 0.5}]
    with simulated(batch_seconds=0.02, batch_plans=plans) as server:
        async with connect(server, cache=path, batch={"max_batch_size": 8}) as client:
            estimates = await most(client, prompts)
            run = asyncio.ensure_future(client.batch_generate(prompts, use_batch_api=True, max_tokens=MOST))
            while len(creations(server)) < 2:
                await asyncio.sleep(0.001)
            run.cancel()
            await asyncio.gather(run, return_exceptions=True)
        made = len(server.batches)
        assert made in {2, 3}
        cap = float(sum(estimates[:16])) * 0.9
        async with connect(server, cache=path, max_cost=cap, batch={"max_batch_size": 8}) as client:
            seen: list[Decimal] = []

            def look(_: float) -> None:
                seen.append(client.stats.budget["reserved"])

            responses = await client.batch_generate(
                prompts, use_batch_api=True, max_tokens=MOST, progress_callback=look
            )
            assert max(seen) >= sum(estimates[:16]) > cap
            budget = client.stats.budget
    assert len(responses) == 20
    assert len(server.batches) == 3
    assert budget["spent"] == nearly(by_batch(server))


async def test_batches_of_a_cancelled_run_are_not_reserved_twice(tmp_path) -> None:
    """A second call of the same client goes on with them, and settles them."""
    path, prompts = tmp_path / "answers.sqlite", questions(10, 14)
    with simulated(batch_seconds=0.2) as server:
        async with connect(server, cache=path, max_cost=1) as client:
            whole = sum(await most(client, prompts))
            run = asyncio.ensure_future(client.batch_generate(prompts, use_batch_api=True, max_tokens=MOST))
            while not server.batches:
                await asyncio.sleep(SOON)
            run.cancel()
            await asyncio.gather(run, return_exceptions=True)
            seen = {client.stats.budget["reserved"]}
            await client.batch_generate(
                prompts,
                use_batch_api=True,
                max_tokens=MOST,
                progress_callback=lambda _: seen.add(client.stats.budget["reserved"]),
            )
            budget = client.stats.budget
    assert max(seen) == whole
    assert len(server.batches) == 1
    assert (budget["reserved"], budget["spent"]) == (0, nearly(by_batch(server)))


async def test_what_runs_already_is_reserved_before_what_waits(tmp_path) -> None:
    """A file whose batch was refused, and that waits again, comes before one whose batch is running."""
    path, prompts = tmp_path / "answers.sqlite", [f"number {n}" for n in range(16)]
    refused = {"errors": [{"code": "token_limit_exceeded", "message": "Enqueued token limit reached"}]}
    plans = [refused, {"seconds": 0.5}]
    with simulated(batch_seconds=0.02, batch_plans=plans) as server:
        async with connect(server, cache=path, batch={"max_batch_size": 8}) as client:
            estimates = await most(client, prompts)
            run = asyncio.ensure_future(client.batch_generate(prompts, use_batch_api=True, max_tokens=MOST))
            while [batch["status"] for batch in server.batches][:2] != ["failed", "in_progress"]:
                await asyncio.sleep(0.001)
            await asyncio.sleep(5 * SOON)
            run.cancel()
            await asyncio.gather(run, return_exceptions=True)
        assert len(server.batches) == 2
        cap = float(sum(estimates[:12]))
        async with connect(server, cache=path, max_cost=cap, batch={"max_batch_size": 8}) as client:
            seen = {Decimal(0)}

            async def watch() -> None:
                while True:
                    seen.add(client.stats.budget["reserved"] + client.stats.budget["spent"])
                    await asyncio.sleep(0.001)

            watching = asyncio.ensure_future(watch())
            responses = await client.batch_generate(prompts, use_batch_api=True, max_tokens=MOST)
            watching.cancel()
    assert len(responses) == 16
    assert sum(estimates[8:]) <= max(seen) <= cap
    assert len(server.batches) == 3


async def test_a_run_that_ran_out_of_money_goes_on_from_the_cache(tmp_path) -> None:
    """With more money it pays for the rest alone."""
    path, prompts = tmp_path / "answers.sqlite", [f"number {n}" for n in range(40)]
    with simulated(batch_seconds=0.02) as server:
        async with connect(server, cache=path) as client:
            cap = float(sum(await most(client, prompts)) / 8)
            with pytest.raises(BudgetExceededError) as caught:
                await client.batch_generate(prompts, use_batch_api=True, max_tokens=MOST, max_cost=cap)
            paid = [response for response in caught.value.responses if response is not None]
            assert 0 < len(paid) < 40
        async with connect(server, cache=path) as client:
            responses = await client.batch_generate(prompts, use_batch_api=True, max_tokens=MOST, max_cost=1)
    assert sum(response.cached for response in responses) == len(paid)
    assert sum(batch["request_counts"]["total"] for batch in server.batches) == 40


# --- submit_batch_job -------------------------------------------------------------------------------------


async def test_a_job_is_reserved_whole_or_not_submitted() -> None:
    """It stays reserved until its results are retrieved; no request waits for that."""
    requests = [BatchRequest(prompt=prompt, max_tokens=MOST) for prompt in questions(10, 11)]
    with simulated(batch_seconds=0.02) as server:
        async with connect(server) as client:
            whole = sum(await most(client, [str(request.prompt) for request in requests]))
        async with connect(server, max_cost=float(whole) * 1.8, batch={"max_batch_size": 4}) as client:
            job = await client.submit_batch_job(requests)
            assert client.stats.budget["reserved"] == whole
            sent = len(server.calls)
            with pytest.raises(BudgetExceededError, match="in flight, and the next request may cost"):
                await client.submit_batch_job(requests)
            with pytest.raises(BudgetExceededError):
                await client.generate_response("hello " * 5000, max_tokens=MOST)
            assert len(server.calls) == sent
            await ended(client, job.job_id)
            await client.retrieve_batch_results(job.job_id)
            assert client.stats.budget["reserved"] == 0
            assert client.stats.budget["spent"] == nearly(by_batch(server))
            await client.submit_batch_job(requests)


UNCLEAR = {"create": ["ok", "drop_after", "drop_after"], "list": ["500"] * 20}


@pytest.mark.usefixtures("no_pauses")
@pytest.mark.parametrize(
    ("script", "reserved"),
    [
        ({"create": ["500", "500"]}, 4),  # a list with nothing in it does not tell
        ({"create": ["ok", "500", "500"]}, 4),
        ({"create": ["429", "429"]}, 0),
        (UNCLEAR, 8),
    ],
)
async def test_a_job_that_cannot_be_created_keeps_only_what_may_run(
    script: dict[str, list[str]], reserved: int
) -> None:
    """A batch that was made and cancelled may cost; one that was refused does not."""
    requests = [BatchRequest(prompt=prompt, max_tokens=MOST) for prompt in questions(10, 12)]
    with simulated(batch_seconds=0.02, endpoint_script=script) as server:
        async with connect(
            server, max_cost=1, batch={"max_batch_size": 4}, max_retries=1, timeout=0.5
        ) as client:
            with pytest.raises((openai.APIError, BatchError)):
                await client.submit_batch_job(requests)
            while any(batch["status"] not in {"completed", "cancelled"} for batch in server.batches):
                await asyncio.sleep(SOON)
            budget = client.stats.budget
            estimates = await most(client, [str(request.prompt) for request in requests])
            assert by_batch(server) <= budget["spent"] + budget["reserved"] == sum(estimates[:reserved])


async def test_what_a_killed_program_submitted_of_a_job_is_reserved_again(tmp_path) -> None:
    """It costs that anyway, also where there is too little left for the rest; with more, the rest follows."""
    path = tmp_path / "answers.sqlite"
    requests = [BatchRequest(prompt=prompt, max_tokens=MOST) for prompt in questions(10, 13)]
    size = {"max_batch_size": 4}
    with simulated(batch_seconds=0.05) as server:
        async with connect(server, cache=path, batch=size) as client:
            estimates = await most(client, [str(request.prompt) for request in requests])
            submission = asyncio.ensure_future(client.submit_batch_job(requests))
            while len(creations(server)) < 2:
                await asyncio.sleep(0)
            submission.cancel()
            await asyncio.gather(submission, return_exceptions=True)
        assert len(server.batches) == 2
        async with connect(server, cache=path, batch=size, max_cost=float(sum(estimates[:4])) / 2) as client:
            with pytest.raises(BudgetExceededError):
                await client.submit_batch_job(requests)
            assert client.stats.budget["reserved"] >= sum(estimates[:4])
            with pytest.raises(BudgetExceededError):  # their end is not seen here: no use waiting
                await asyncio.wait_for(client.generate_response("hi", max_tokens=5), 10)
        assert len(server.batches) == 2
        async with connect(server, cache=path, batch=size, max_cost=1) as client:
            job = await client.submit_batch_job(requests)
            assert client.stats.budget["reserved"] == sum(estimates)
            await ended(client, job.job_id)
            await client.retrieve_batch_results(job.job_id)
            assert client.stats.budget["spent"] == nearly(by_batch(server))
            assert client.stats.budget["reserved"] == 0
    assert len(server.batches) == 3


async def test_a_job_of_several_models_and_of_the_responses_api() -> None:
    """Each batch at its own price."""
    several = [
        BatchRequest(prompt=f"number {n}", model=model, max_tokens=MOST)
        for n in range(6)
        for model in ("gpt-4o-mini", "gpt-4.1")
    ]
    with simulated(batch_seconds=0.02) as server:
        async with connect(server, max_cost=1) as client:
            for options in ({}, {"api": "responses"}):
                job = await client.submit_batch_job(several, **options)
                await ended(client, job.job_id)
                await client.retrieve_batch_results(job.job_id)
            assert client.stats.budget["reserved"] == 0
            assert client.stats.budget["spent"] == nearly(client.stats.cost.total)


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (BatchRequest(prompt="b"), r"request 1: max_cost: needs max_tokens"),
        (
            BatchRequest(prompt="b", max_tokens=5, model="nobodys"),
            r"request 1: max_cost: the batch price of model='nobodys'",
        ),
    ],
)
async def test_a_job_without_a_bound_is_refused_before_anything_is_sent(
    request_: BatchRequest, why: str
) -> None:
    with simulated() as server:
        async with connect(server, max_cost=1) as client:
            with pytest.raises(ValidationError, match=why) as caught:
                await client.submit_batch_job([BatchRequest(prompt="a", max_tokens=5), request_])
            assert (caught.value.field, caught.value.index) == ("max_cost", 1)
            assert client.stats.budget["reserved"] == 0
    assert server.calls == []


async def test_a_run_without_a_price_is_refused_before_anything_is_sent() -> None:
    with simulated() as server:
        async with connect(server) as client:
            with pytest.raises(ValidationError, match="'nobodys'"):
                await client.batch_generate(
                    ["a", "b"], use_batch_api=True, model="nobodys", max_tokens=5, max_cost=1
                )
            with pytest.raises(ValidationError, match="needs max_tokens"):
                await client.batch_generate(["a", "b"], use_batch_api=True, max_cost=1)
    assert server.calls == []
