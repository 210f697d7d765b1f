"""`batch_generate` by the Batch API: the contract of running online, whatever becomes of the batches."""

from __future__ import annotations

import asyncio
import functools
import gc
import json
import pickle
from collections import Counter
from typing import Any

import openai
import pytest
from batches import (
    SOON,
    Spoiling,
    asked,
    batch_price,
    cancelled,
    connect,
    creations,
    fingerprint,
    patient,
    refusal,
    steps,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from openai_eval_client import (
    BatchError,
    ModelResponse,
    OpenAIClient,
    PartialFailureError,
    QuotaError,
    TooManyFailuresError,
    ValidationError,
)
from openai_eval_client import _validation as _checks
from openai_eval_client._batches.objects import read_job_metadata
from openai_eval_client.errors import sdk_httpx
from openai_eval_client.testing import SimulatedServer

pytestmark = pytest.mark.usefixtures("few_certificates", "no_pauses")

EIGHT = [f"p{n}" for n in range(8)]


def contents(outcomes: list[Any]) -> list[str | None]:
    """Return the text of each answer; of an error, its code."""
    return [o.content if isinstance(o, ModelResponse) else o.code for o in outcomes]


def echoes(prompts: list[str]) -> list[str]:
    return [f"echo: {prompt}" for prompt in prompts]


async def submitted(client: OpenAIClient, server: SimulatedServer) -> list[list[int]]:
    """Return the indexes of the requests of each batch, oldest first."""
    found = []
    for batch in server.batches:
        content = await client.openai.files.content(batch["input_file_id"])
        found.append([int(json.loads(text)["custom_id"].split("-")[1]) for text in content.text.splitlines()])
    return found


# --- the contract ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [50_000, 3])
async def test_prompts_are_answered_in_order_at_half_the_price(size: int) -> None:
    """In one batch or several; the progress grows, and is 1 once, at the end."""
    seen: list[float] = []
    with SimulatedServer(batch_seconds=0.1) as server:
        async with connect(server, batch={"max_batch_size": size}) as client:
            responses = await client.batch_generate(
                EIGHT, use_batch_api=True, temperature=0.3, max_tokens=9, progress_callback=seen.append
            )
            stats = client.stats
        assert len(server.batches) == -(-8 // size)
    assert contents(responses) == echoes(EIGHT)
    assert {response.temperature for response in responses} == {0.3}
    assert all(
        response.usage.estimated_cost == pytest.approx(batch_price(response), abs=1e-15)
        for response in responses
    )
    assert float(stats.cost) == pytest.approx(sum(map(batch_price, responses)))
    assert seen == sorted(set(seen))
    assert (seen[-1], seen[0] > 0) == (1.0, True)
    assert len(seen) > 1


@pytest.mark.parametrize("count", [4, 5])
async def test_fewer_prompts_than_the_threshold_run_online(count: int) -> None:
    with SimulatedServer(batch_seconds=0.01) as server:
        async with connect(server, batch={"auto_batch_threshold": 5}) as client:
            responses = await client.batch_generate(EIGHT[:count], use_batch_api=True)
            await client.batch_generate(EIGHT)  # not asked for
        assert len(server.batches) == (count == 5)
    assert contents(responses) == echoes(EIGHT[:count])


async def test_no_prompts() -> None:
    seen: list[float] = []
    with SimulatedServer() as server:
        async with connect(server) as client:
            assert await client.batch_generate([], use_batch_api=True, progress_callback=seen.append) == []
        assert (seen, server.calls) == ([1.0], [])


class Answer(BaseModel):
    text: str
    number: int


@pytest.mark.parametrize("api", ["chat", "responses"])
async def test_answers_are_parsed(api: str) -> None:
    """By the class given as response_format, on either API; raw is the SDK's own object."""
    with SimulatedServer(batch_seconds=0.01) as server:
        async with connect(server) as client:
            responses = await client.batch_generate(
                EIGHT[:2], use_batch_api=True, api=api, response_format=Answer, system="Be brief."
            )
        assert (
            server.batches[0]["endpoint"]
            == {"chat": "/v1/chat/completions", "responses": "/v1/responses"}[api]
        )
    assert all(isinstance(response.parsed, Answer) for response in responses)
    kind = openai.types.chat.ChatCompletion if api == "chat" else openai.types.responses.Response
    assert all(isinstance(response.raw, kind) for response in responses)


async def test_a_callback_may_fail_or_wait(caplog) -> None:
    """What it raises is logged; it may be a coroutine function."""
    seen: list[float] = []

    async def slow(fraction: float) -> None:
        await asyncio.sleep(0)
        seen.append(fraction)
        raise RuntimeError("my own")

    with SimulatedServer(batch_seconds=0.05) as server:
        async with connect(server) as client:
            responses = await client.batch_generate(EIGHT, use_batch_api=True, progress_callback=slow)
    assert contents(responses) == echoes(EIGHT)
    assert seen[-1] == 1.0
    assert "progress_callback raised" in caplog.text


# --- what fails ------------------------------------------------------------------------------------------


async def test_what_failed_by_chance_is_submitted_once_more_and_only_that() -> None:
    """Expired, 429, 500; not what was answered, refused or cancelled, nor what was answered and is lost."""
    lines = ["ok", "expired", "400", "500", "cancelled", "429", "missing", "truncated"]
    seen: list[float] = []
    with SimulatedServer(batch_seconds=0.01, batch_plans=[{"lines": lines}]) as server:
        async with connect(server) as client:
            outcomes = await client.batch_generate(
                EIGHT, use_batch_api=True, return_exceptions=True, progress_callback=seen.append
            )
            assert await submitted(client, server) == [list(range(8)), [1, 3, 5]]
    wanted = echoes(EIGHT)
    wanted[2], wanted[4] = "invalid_value", "batch_cancelled"
    wanted[6], wanted[7] = "lost_result", "unreadable_result"
    assert contents(outcomes) == wanted
    assert seen == sorted(set(seen))
    assert seen[-1] == 1.0


CURABLE = {
    "expired": "batch_expired",
    "429": "rate_limit_exceeded",
    "500": None,
    "timeout": "request_timeout",
    "missing": "lost_result",
    "status_0": "no_answer",
    "truncated": "unreadable_result",
    "null_body": "no_answer",
    "garbage": "no_answer",
}


@pytest.mark.parametrize("outcome", CURABLE)
async def test_what_fails_twice_is_reported(outcome: str) -> None:
    """The second failure; there is no third batch."""
    plans = [{"lines": ["ok", outcome]}, {"lines": [outcome]}]
    with SimulatedServer(batch_seconds=0.01, batch_plans=plans) as server:
        async with connect(server) as client:
            with pytest.raises(PartialFailureError) as caught:
                await client.batch_generate(EIGHT[:2], use_batch_api=True, on_unclear="retry")
        assert len(server.batches) == 2
    assert {n: error.code for n, error in caught.value.failures.items()} == {1: CURABLE[outcome]}
    assert contents([caught.value.responses[0]]) == ["echo: p0"]
    assert caught.value.responses[1] is None
    if isinstance(caught.value.failures[1], BatchError):
        assert caught.value.failures[1].index == 1


@pytest.mark.parametrize("status", ["expired", "completed", "cancelled"])
async def test_a_batch_that_ends_early_is_finished_in_a_second(status: str) -> None:
    """What is left of an expired one; a cancelled one was meant to stop."""
    plan = {"status": status, "done": 0.5}
    with SimulatedServer(batch_seconds=0.01, batch_plans=[plan]) as server:
        async with connect(server) as client:
            outcomes = await client.batch_generate(EIGHT, use_batch_api=True, return_exceptions=True)
            batches = await submitted(client, server)
    if status == "cancelled":
        assert Counter(map(type, outcomes)) == {ModelResponse: 4, BatchError: 4}
        assert len(batches) == 1
    else:
        assert contents(outcomes) == echoes(EIGHT)
        assert [len(indexes) for indexes in batches] == [8, 4]


async def test_all_batches_failed_is_a_batch_error() -> None:
    """No line ran: the reason is raised, with nothing in `.responses`, whatever return_exceptions says."""
    errors = [{"code": "too_many_tasks", "message": "too many", "line": 2}]
    seen: list[float] = []
    for return_exceptions in (True, False):
        with SimulatedServer(batch_seconds=0.01, batch_plans=[{"errors": errors}] * 2) as server:
            async with connect(server, batch={"max_batch_size": 4}) as client:
                with pytest.raises(BatchError, match="too many") as caught:
                    await client.batch_generate(
                        EIGHT,
                        use_batch_api=True,
                        return_exceptions=return_exceptions,
                        progress_callback=seen.append,
                    )
            assert len(server.batches) == 2
        assert (caught.value.code, caught.value.responses) == ("too_many_tasks", [None] * 8)
        assert caught.value.job_id is None
        again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301
        assert (again, again.responses) == (caught.value, [None] * 8)
    assert 1.0 not in seen


async def test_one_batch_that_failed_fails_its_prompts_alone() -> None:
    errors = [{"code": "too_many_tasks", "message": "too many"}]
    with SimulatedServer(batch_seconds=0.01, batch_plans=[{}, {"errors": errors}]) as server:
        async with connect(server, batch={"max_batch_size": 4}) as client:
            outcomes = await client.batch_generate(EIGHT, use_batch_api=True, return_exceptions=True)
    assert contents(outcomes) == echoes(EIGHT[:4]) + ["too_many_tasks"] * 4
    assert [outcome.index for outcome in outcomes[4:]] == [4, 5, 6, 7]


async def test_a_key_that_is_refused_ends_the_run() -> None:
    with SimulatedServer(api_key="another") as server:
        async with connect(server) as client:
            with pytest.raises(openai.AuthenticationError) as caught:
                await client.batch_generate(EIGHT, use_batch_api=True, return_exceptions=True)
    assert caught.value.responses == [None] * 8


async def test_a_window_that_is_refused_ends_the_run() -> None:
    with SimulatedServer(completion_windows=("24h",)) as server:
        async with connect(server, batch={"completion_window": "7d"}) as client:
            with pytest.raises(ValidationError, match="'7d'"):
                await client.batch_generate(EIGHT, use_batch_api=True)


async def test_a_batch_that_is_gone_ends_the_run_with_what_there_is() -> None:
    """A 404 for a batch that was created: what was settled is handed out, and what is left is named."""
    with SimulatedServer(batch_seconds=0.01, batch_plans=[{}, {"status": "validating"}]) as server:
        spoiling = Spoiling("GET", "", [])

        def gone(_: float) -> None:
            spoiling.path = server.batches[1]["id"]
            spoiling.spoil_next(refusal(404, f"No batch found with id '{spoiling.path}'."))

        async with connect(server, http_client=spoiling.client, batch={"max_batch_size": 4}) as client:
            with pytest.raises(openai.NotFoundError) as caught:
                await client.batch_generate(EIGHT, use_batch_api=True, progress_callback=gone)
        last = server.batches[1]["id"]
    assert contents(caught.value.responses[:4]) == echoes(EIGHT[:4])
    assert caught.value.responses[4:] == [None] * 4
    assert caught.value.job_id == last


# --- a server that fails for a while ---------------------------------------------------------------------


@pytest.mark.parametrize("faults", [["500"] * 7, ["drop"] * 7, ["hang"] * 3, ["429", "503"] * 4])
async def test_polling_survives_a_server_that_fails_for_a_while(faults: list[str], caplog) -> None:
    """Longer than the retries of one look; nothing is submitted again."""
    with SimulatedServer(batch_seconds=0.05, endpoint_script={"retrieve": ["ok", *faults]}) as server:
        async with connect(server, max_retries=1, timeout=0.2) as client:
            assert contents(await client.batch_generate(EIGHT, use_batch_api=True)) == echoes(EIGHT)
        assert len(server.batches) == 1
    assert "later again" in caplog.text


async def test_downloads_survive_a_server_that_fails_for_a_while() -> None:
    faults = ["500", "drop", "truncate", "503", "500", "truncate", "drop"]
    with SimulatedServer(batch_seconds=0.01, endpoint_script={"content": faults}) as server:
        async with connect(server, max_retries=1) as client:
            assert contents(await client.batch_generate(EIGHT, use_batch_api=True)) == echoes(EIGHT)
            assert float(client.stats.cost) > 0
        assert len(server.batches) == 1


async def test_files_that_cannot_be_submitted_wait_for_the_server() -> None:
    """As long as others run; then they are submitted, each once."""
    plans = [{"seconds": 0.3}]
    script = {"upload": ["ok", *["500"] * 6]}
    with SimulatedServer(batch_seconds=0.01, batch_plans=plans, endpoint_script=script) as server:
        async with connect(server, max_retries=1, batch={"max_batch_size": 4}) as client:
            assert contents(await client.batch_generate(EIGHT, use_batch_api=True)) == echoes(EIGHT)
            assert await submitted(client, server) == [[0, 1, 2, 3], [4, 5, 6, 7]]


async def test_files_that_wait_for_the_server_do_not_wait_for_other_batches() -> None:
    """The server is well again long before the first batch ends: the second does not wait for that."""
    script = {"upload": ["ok", "500", "500"]}
    with SimulatedServer(batch_seconds=0.6, endpoint_script=script) as server:
        async with connect(server, max_retries=1, batch={"max_batch_size": 4}) as client:
            assert contents(await client.batch_generate(EIGHT, use_batch_api=True)) == echoes(EIGHT)
        calls = server.calls
    second = creations(server)[1]
    assert not any(call.path.endswith("/content") for call in calls if call.index < second.index)


@pytest.mark.parametrize("fault", ["500", "429", "drop"])
@pytest.mark.parametrize("lost", [1, 3])
async def test_an_unclear_creation_that_stays_unclear_makes_one_batch(lost: int, fault: str) -> None:
    """The list fails, too: the file waits, and is looked for before it is created again."""
    script = {"create": ["ok", "drop_after"], "list": [fault] * lost}
    with SimulatedServer(batch_seconds=0.3, endpoint_script=script) as server:
        async with connect(server, max_retries=1, batch={"max_batch_size": 4}) as client:
            assert contents(await client.batch_generate(EIGHT, use_batch_api=True)) == echoes(EIGHT)
            assert await submitted(client, server) == [[0, 1, 2, 3], [4, 5, 6, 7]]


async def test_a_server_that_never_takes_anything_is_an_error() -> None:
    with SimulatedServer(endpoint_faults={"upload": {"500": 1.0}}) as server:
        async with connect(server, max_retries=1) as client:
            with pytest.raises(openai.InternalServerError) as caught:
                await client.batch_generate(EIGHT, use_batch_api=True)
        assert server.batches == []
    assert caught.value.responses == [None] * 8


# --- limits on enqueued tokens ---------------------------------------------------------------------------


@pytest.mark.parametrize("refused", ["create", "later"])
async def test_files_are_held_back_until_there_is_room(refused: Any, caplog) -> None:
    """Each is answered once; those refused are submitted again as others end."""
    caplog.set_level("INFO")
    with SimulatedServer(batch_seconds=0.05, enqueued_tokens=20, enqueued_refusal=refused) as server:
        async with connect(server, batch={"max_batch_size": 2}) as client:
            assert contents(await client.batch_generate(EIGHT, use_batch_api=True)) == echoes(EIGHT)
        ran = [batch for batch in server.batches if batch["status"] == "completed"]
        refusals = [batch for batch in server.batches if batch["status"] == "failed"]
    assert len(ran) == 4
    assert len({read_job_metadata(batch["metadata"]).key for batch in ran}) == 4
    assert bool(refusals) == (refused == "later")
    assert "held back" in caplog.text


@pytest.mark.parametrize("refused", ["create", "later"])
async def test_a_file_larger_than_the_limit_is_cut(refused: Any) -> None:
    """To pieces that fit, in order; nothing is paid twice."""
    prompts = [f"p{n}" for n in range(30)]
    with SimulatedServer(batch_seconds=0.01, enqueued_tokens=60, enqueued_refusal=refused) as server:
        async with connect(server) as client:
            assert contents(await client.batch_generate(prompts, use_batch_api=True)) == echoes(prompts)
            batches = server.batches
            indexes = await submitted(client, server)
    ran = [each for each, batch in zip(indexes, batches, strict=True) if batch["status"] == "completed"]
    assert sorted(index for each in ran for index in each) == list(range(30))
    assert len(ran) > 1


@pytest.mark.parametrize("refused", ["create", "later"])
async def test_a_file_that_the_server_counts_higher_is_cut_in_the_end(refused: Any) -> None:
    """By our count it fits, by the server's it never will: no other job has the limit, so it is cut."""
    with SimulatedServer(
        batch_seconds=0.01, enqueued_tokens=60, enqueued_refusal=refused, count_tokens=lambda _: 10
    ) as server:
        async with connect(server) as client:
            prompts = ["x"] * 6  # 8 tokens each, by ours; 16 by the server's
            assert contents(await client.batch_generate(prompts, use_batch_api=True)) == echoes(prompts)
            ran = [len(each) for each in await submitted(client, server)]
    assert sum(ran[-2:]) <= 6


async def test_a_limit_that_is_not_named_cuts_in_halves() -> None:
    """Only after a second refusal with nothing else of ours enqueued."""
    refused_later = {"errors": [{"code": "token_limit_exceeded", "message": "Too many enqueued tokens."}]}
    with SimulatedServer(batch_seconds=0.01, batch_plans=[refused_later] * 2) as server:
        async with connect(server) as client:
            assert contents(await client.batch_generate(EIGHT, use_batch_api=True)) == echoes(EIGHT)
            assert list(map(len, await submitted(client, server))) == [8, 8, 4, 4]


async def test_a_prompt_larger_than_the_limit_is_its_own_failure() -> None:
    """It can never run; the others do."""
    prompts = ["p0", "word " * 300, "p2", "p3"]
    with SimulatedServer(batch_seconds=0.01, enqueued_tokens=100, enqueued_refusal="create") as server:
        async with connect(server) as client:
            outcomes = await client.batch_generate(prompts, use_batch_api=True, return_exceptions=True)
    assert contents(outcomes) == ["echo: p0", "token_limit_exceeded", "echo: p2", "echo: p3"]
    assert isinstance(outcomes[1], QuotaError)


async def test_other_jobs_in_the_way_are_waited_for() -> None:
    """A batch of another job has nearly all of the limit for now."""
    plans = [{"seconds": 0.4}]
    with SimulatedServer(
        batch_seconds=0.01, batch_plans=plans, enqueued_tokens=60, enqueued_refusal="create"
    ) as server:
        async with connect(server) as client:
            other = await client.submit_batch_job(asked(8))
            assert contents(await client.batch_generate(EIGHT, use_batch_api=True)) == echoes(EIGHT)
            assert (await client.get_batch_status(other.job_id)).status == "completed"


@pytest.mark.parametrize("refused", ["create", "later"])
async def test_files_are_not_held_back_for_ever(refused: Any, monkeypatch) -> None:
    """A batch of another job never ends: after the completion window the refusal comes out."""
    monkeypatch.setitem(_checks._UNITS, "h", 0.02)  # seconds
    plans = [{"status": "in_progress"}]
    with SimulatedServer(
        batch_seconds=0.01, batch_plans=plans, enqueued_tokens=60, enqueued_refusal=refused
    ) as server:
        async with connect(server) as client:
            await client.submit_batch_job(asked(8))
            while server.batches[0]["status"] != "in_progress":
                await asyncio.sleep(SOON)
            with pytest.raises((QuotaError, BatchError), match="Enqueued token limit") as caught:
                await client.batch_generate(EIGHT, use_batch_api=True)
    assert (caught.value.code, caught.value.responses) == ("token_limit_exceeded", [None] * 8)


# --- parameters that a model refuses ---------------------------------------------------------------------


def refusing(*names: str) -> Any:
    """Spoil a result file: the first of these parameters that a request has is refused."""

    def spoil(response: Any, asked: dict[str, Any]) -> Any:
        lines = []
        for text in response.content.splitlines():
            line = json.loads(text)
            found = [name for name in names if name in asked[line["custom_id"]]]
            if found:
                error = {"message": "no", "code": "unsupported_parameter", "param": found[0], "type": "x"}
                line["response"] = {"status_code": 400, "request_id": "r", "body": {"error": error}}
            lines.append(json.dumps(line))
        return sdk_httpx().Response(200, content="\n".join(lines).encode())

    return spoil


@pytest.mark.parametrize("names", [["max_tokens"], ["temperature"], ["max_tokens", "temperature"]])
async def test_parameters_that_the_model_refuses_are_learnt(names: list[str]) -> None:
    """One after the other, each from its 400; then every prompt is answered, and the next run knows."""
    spoil = refusing(*names)
    with SimulatedServer(batch_seconds=0.01) as server:
        spoiling = Spoiling("GET", "/content", [])
        async with (
            connect(server, http_client=spoiling.client) as client,
            openai.AsyncOpenAI(api_key="any", base_url=server.base_url) as sdk,
        ):

            async def bodies(batch: dict[str, Any]) -> dict[str, Any]:
                content = await sdk.files.content(batch["input_file_id"])
                return {
                    (line := json.loads(text))["custom_id"]: line["body"]
                    for text in content.text.splitlines()
                }

            async def spoilt(response: Any) -> Any:
                return spoil(response, await bodies(server.batches[-1]))

            for _ in range(9):
                spoiling.spoil_next(spoilt)
            for _ in range(2):
                responses = await client.batch_generate(
                    EIGHT, use_batch_api=True, max_tokens=9, temperature=0.5
                )
            sent = [next(iter((await bodies(batch)).values())) for batch in server.batches]
            unsent = client.stats.unsent_parameters
    assert unsent == ({"temperature": 16} if "temperature" in names else {})
    assert contents(responses) == echoes(EIGHT)
    assert len(sent) == len(names) + 2
    assert all(("max_tokens" in body) != ("max_completion_tokens" in body) for body in sent)
    for name in names:
        assert [name in body for body in sent[-2:]] == [False, False]
    assert {response.temperature for response in responses} == ({1.0} if "temperature" in names else {0.5})


async def test_a_400_for_anything_else_is_not_repeated() -> None:
    with SimulatedServer(batch_seconds=0.01, batch_plans=[{"lines": ["400"]}]) as server:
        async with connect(server) as client:
            outcomes = await client.batch_generate(EIGHT[:2], use_batch_api=True, return_exceptions=True)
        assert len(server.batches) == 1
    assert contents(outcomes) == ["invalid_value", "echo: p1"]


# --- cancelled -------------------------------------------------------------------------------------------


async def test_a_cancelled_run_hands_out_what_it_has_and_names_what_goes_on() -> None:
    """From the job_id the rest can be settled later."""
    plans = [{}, {"seconds": 0.5}]
    with SimulatedServer(batch_seconds=0.01, batch_plans=plans) as server:
        async with connect(server, batch={"max_batch_size": 4}) as client:
            half = asyncio.Event()

            def look(_: float) -> None:  # called when all that was downloaded is settled
                if any(call.path.endswith("/content") for call in server.calls):
                    half.set()

            call = client.batch_generate(EIGHT, use_batch_api=True, progress_callback=look)
            error = await cancelled(call, half.wait)
            assert isinstance(error, asyncio.CancelledError)
            assert contents(error.responses[:4]) == echoes(EIGHT[:4])
            assert error.responses[4:] == [None] * 4
            assert error.job_id == server.batches[1]["id"]
            while (await client.get_batch_status(error.job_id)).status != "completed":
                await asyncio.sleep(SOON)
            rest = await client.retrieve_batch_results(error.job_id)
    assert contents(rest) == echoes(EIGHT[4:])


@pytest.mark.parametrize("refused", ["create", "later"])
async def test_a_run_may_be_cancelled_anywhere(refused: Any) -> None:
    """After any number of steps: nothing stays open, and every batch under way is named."""
    with SimulatedServer(batch_seconds=0.01, enqueued_tokens=30, enqueued_refusal=refused) as server:
        async with connect(server, batch={"max_batch_size": 5}) as client:
            await client.batch_generate(EIGHT, use_batch_api=True)  # warm
            for many in range(2, 400, 13):
                before = {batch["id"] for batch in server.batches}
                call = client.batch_generate(EIGHT, use_batch_api=True)
                result = await cancelled(call, functools.partial(steps, many))
                if isinstance(result, list):
                    assert contents(result) == echoes(EIGHT)
                    continue
                assert len(result.responses) == 8
                named = set((result.job_id or "").split("+")) - {""}
                running = {each["id"] for each in server.batches if each["completed_at"] is None}
                given_up = {each["id"] for each in server.batches if each["failed_at"]}
                assert named <= {batch["id"] for batch in server.batches} - before
                assert len(running - given_up - before - named) <= 1  # created as it was cancelled
    gc.collect()  # a file left open would warn


# --- many hands ------------------------------------------------------------------------------------------


async def test_runs_on_several_loops_at_once() -> None:
    """One client, four threads; each run has its own batches and answers."""
    with SimulatedServer(batch_seconds=0.05) as server:
        async with connect(server, batch={"max_batch_size": 3}) as client:

            async def one(name: str) -> list[str | None]:
                return contents(
                    await client.batch_generate([f"{name}{n}" for n in range(7)], use_batch_api=True)
                )

            found = await asyncio.gather(*(asyncio.to_thread(asyncio.run, one(name)) for name in "abcd"))
            stats = client.stats
        assert len(server.batches) == 12
    assert found == [[f"echo: {name}{n}" for n in range(7)] for name in "abcd"]
    assert stats.requests == 28


# --- anything at all -------------------------------------------------------------------------------------

FAULTS = (
    "400", "429", "500", "expired", "cancelled", "missing", "duplicate", "duplicate_error", "unknown_id",
    "timeout", "status_0", "truncated", "null_body", "no_usage", "garbage",
)  # fmt: skip
faults = st.lists(st.sampled_from(FAULTS), min_size=1, max_size=6, unique=True)
statuses = st.sampled_from(["completed", "expired", "cancelled", "failed"])
files = st.sampled_from([True, False, "", "empty"])
plans = st.fixed_dictionaries(
    {"status": statuses},
    optional={"done": st.sampled_from([0, 0.3, 1]), "output_file": files, "error_file": files},
)


@settings(patient, max_examples=25)
@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    faults,
    st.floats(0, 1),
    st.lists(plans, max_size=3),
    st.integers(0, 99),
)
def test_every_prompt_has_exactly_one_typed_outcome(
    sizes: tuple[int, int], names: list[str], share: float, batch_plans: list[dict[str, Any]], seed: int
) -> None:
    """Whatever becomes of lines, files and batches: an answer to that very prompt, or a typed error."""
    count, size = sizes
    prompts = [f"p{n}" for n in range(count)]
    batch_faults = {name: share / len(names) for name in names}

    async def run() -> list[Any]:
        with SimulatedServer(
            batch_seconds=0.005, batch_faults=batch_faults, batch_plans=batch_plans, seed=seed
        ) as server:
            async with connect(server, batch={"max_batch_size": size, "polling_interval": 0.004}) as client:
                try:
                    outcomes = await client.batch_generate(
                        prompts, use_batch_api=True, return_exceptions=True
                    )
                except BatchError as error:
                    assert error.responses == [None] * count
                    return [error] * count
                assert len(server.batches) <= 2 * -(-count // size)
                return outcomes

    outcomes = asyncio.run(run())
    assert len(outcomes) == count
    for index, outcome in enumerate(outcomes):
        if isinstance(outcome, ModelResponse):
            assert outcome.content == f"echo: p{index}"
            assert outcome.usage.estimated_cost == pytest.approx(batch_price(outcome), abs=1e-15)
        else:
            assert isinstance(outcome, BatchError | openai.APIStatusError)
            assert fingerprint(outcome)
            assert getattr(outcome, "index", index) in {index, None} or len(set(map(id, outcomes))) == 1


TOO_MANY = [(1, True), (2, False), (0.3, True), (0.9, False), (None, False)]


@pytest.mark.parametrize(("allowed", "ended"), TOO_MANY)
async def test_more_failures_than_allowed_end_a_run_by_batches(allowed, ended) -> None:
    """With the answers so far."""
    plan = {"lines": ["ok", "400", "ok", "400", "ok"]}
    with SimulatedServer(batch_plans=[plan], batch_seconds=0.01) as server:
        async with connect(server) as client:
            call = client.batch_generate(EIGHT[:5], use_batch_api=True, max_failures=allowed)
            with pytest.raises(TooManyFailuresError if ended else PartialFailureError) as raised:
                await call
    answers = [answer and answer.content for answer in raised.value.responses]
    assert answers == ["echo: p0", None, "echo: p2", None, "echo: p4"]
