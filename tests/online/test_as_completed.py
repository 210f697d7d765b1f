"""Outcomes as they come, through the client and over real sockets; runs that are left early."""

from __future__ import annotations

import asyncio
import contextlib
import gc

import openai
import pytest
from clients import KEY, WIDE, connect, dead_address, no_slot_is_taken

from openai_eval_client import (
    ModelResponse,
    OpenAIClient,
    OpenAIConfig,
    QuotaError,
    RateLimitConfig,
    ValidationError,
)
from openai_eval_client.testing import SimulatedServer


async def numbered(count: int):
    for n in range(count):
        await asyncio.sleep(0)
        yield f"{n}"


async def put_into(outcomes: dict[int, object], stream) -> None:
    async for index, outcome in stream:
        outcomes[index] = outcome  # noqa: PERF403  # a comprehension would not keep them when it raises


@pytest.mark.parametrize("source", [lambda: (f"{n}" for n in range(100)), lambda: numbered(100)])
async def test_each_prompt_of_either_kind_of_iterable_has_its_outcome(source) -> None:
    """The index says which; outcomes come as they are done, not in order."""
    with SimulatedServer(latency=0.01, latency_sigma=1.0) as server:
        async with connect(server) as client:
            outcomes = [pair async for pair in client.as_completed(source(), max_tokens=9, max_concurrent=20)]
        assert server.max_in_flight <= 20
        assert {call.body["max_tokens"] for call in server.calls} == {9}
    assert [index for index, _ in outcomes] != list(range(100))
    assert {index: response.content for index, response in outcomes} == {n: f"echo: {n}" for n in range(100)}


async def test_a_prompt_that_is_wrong_is_an_outcome_of_its_own() -> None:
    """The ValidationError names the index; the other prompts are answered."""
    with SimulatedServer() as server:
        async with connect(server) as client:
            outcomes = dict([pair async for pair in client.as_completed(iter(["a", "", "c", None]))])
        assert len(server.calls) == 2
    assert [type(outcomes[n]) for n in range(4)] == [ModelResponse, ValidationError] * 2
    assert (outcomes[1].index, outcomes[3].index) == (1, 3)


@pytest.mark.parametrize(
    ("prompts", "options", "says"),
    [
        ("hello", {}, "prompts='hello'"),
        (5, {}, "prompts=5"),
        (["x"], {"max_concurrent": 0}, "max_concurrent=0"),
        (["x"], {"temprature": 1}, "did you mean temperature"),
    ],
)
async def test_wrong_parameters_are_refused_by_the_call_itself(prompts, options, says) -> None:
    """They are refused before anything is iterated."""
    with SimulatedServer() as server:
        async with connect(server) as client:
            with pytest.raises(ValidationError, match=says):
                client.as_completed(prompts, **options)


class CountedPrompt(str):
    """A prompt that counts how often it is checked."""

    __slots__ = ("checks",)

    def isspace(self) -> bool:
        self.checks = getattr(self, "checks", 0) + 1
        return super().isspace()


@pytest.mark.parametrize("many", ["batch_generate", "as_completed"])
async def test_a_prompt_is_checked_once(many: str) -> None:
    """In a list before anything is sent, in an iterable as it is taken."""
    prompts = [CountedPrompt(f"{n}") for n in range(20)]
    with SimulatedServer() as server:
        async with connect(server) as client:
            if many == "batch_generate":
                await client.batch_generate(prompts)
            else:
                await put_into({}, client.as_completed(iter(prompts)))
    assert [prompt.checks for prompt in prompts] == [1] * 20


async def test_failed_prompts_are_outcomes() -> None:
    """They carry the SDK's own errors, and the run goes on."""
    with SimulatedServer(script=["ok", "500", "ok", "500"]) as server:
        async with connect(server, max_retries=0) as client:
            outcomes = dict([pair async for pair in client.as_completed(["x"] * 4, max_concurrent=1)])
    kinds = sorted(type(outcome).__name__ for outcome in outcomes.values())
    assert kinds == ["InternalServerError"] * 2 + ["ModelResponse"] * 2


async def leave_by_break(client: OpenAIClient) -> None:
    async for _ in client.as_completed(numbered(10_000)):
        break


async def leave_by_aclose(client: OpenAIClient) -> None:
    stream = client.as_completed(numbered(10_000))
    await anext(stream)
    await stream.aclose()


async def leave_by_error(client: OpenAIClient) -> None:
    with contextlib.suppress(KeyError):
        async for _ in client.as_completed(numbered(10_000)):
            raise KeyError


async def leave_by_cancellation(client: OpenAIClient) -> None:
    async def forever() -> None:
        async for _ in client.as_completed(numbered(10_000)):
            seen.set()

    seen = asyncio.Event()
    run = asyncio.create_task(forever())
    await seen.wait()
    run.cancel()
    await asyncio.wait([run])


WAYS_TO_LEAVE = [leave_by_break, leave_by_aclose, leave_by_error, leave_by_cancellation]


@pytest.mark.parametrize("leave", WAYS_TO_LEAVE)
async def test_leaving_early_ends_the_rest(leave) -> None:
    """No task, slot or request in flight is left, and the client goes on."""
    with SimulatedServer(latency=0.05) as server:
        async with connect(server) as client:
            before = asyncio.all_tasks()
            await leave(client)
            for _ in range(20):
                await asyncio.sleep(0)
            assert asyncio.all_tasks() == before
            assert no_slot_is_taken(client)
            assert (await client.generate_response("still here")).content == "echo: still here"
        assert len(server.calls) <= WIDE.max_concurrent + 34


@pytest.mark.parametrize("leave", WAYS_TO_LEAVE)
def test_leaving_just_before_the_loop_ends_is_quiet(leave, recwarn, caplog) -> None:
    """No task is destroyed pending, and no coroutine is never awaited."""

    async def main() -> None:
        await leave(client)

    with SimulatedServer(latency=0.05) as server:
        client = connect(server)
        asyncio.run(main(), debug=True)
        assert no_slot_is_taken(client)
        asyncio.run(client.close())
    gc.collect()
    assert [str(warning.message) for warning in recwarn] == []
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"api_key": "sk-another"}, openai.AuthenticationError),
        ({"models": {"only-this"}}, openai.NotFoundError),
        ({"quota_exhausted_after": 5}, QuotaError),
    ],
)
async def test_an_error_that_meets_every_prompt_is_raised_after_what_was_in_flight(options, error) -> None:
    """Every prompt that was sent has its outcome, and no more are sent."""
    outcomes: dict[int, object] = {}
    with SimulatedServer(latency=0.01, **options) as server:
        async with connect(server) as client:
            with pytest.raises(error) as raised:
                await put_into(outcomes, client.as_completed(numbered(10_000), max_concurrent=3))
            assert no_slot_is_taken(client)
        assert len(outcomes) == len(server.calls) < 30
    assert raised.value in outcomes.values()
    assert KEY not in f"{raised.value!r} {vars(raised.value)}"


async def test_a_server_that_is_not_there_ends_a_stream() -> None:
    """There is one connection error, not one for each prompt."""
    with dead_address() as url:
        async with OpenAIClient(OpenAIConfig(api_key=KEY, base_url=url, max_retries=0)) as client:
            with pytest.raises(openai.APIConnectionError, match="connection failed"):
                await put_into({}, client.as_completed(numbered(1000)))
            assert client.stats.requests <= RateLimitConfig().max_concurrent


async def test_the_error_of_the_prompts_is_raised_after_their_outcomes() -> None:
    """A file that cannot be read further does not cost what was read."""

    def lines():
        yield from ["a", "b", "c"]
        raise OSError("the file ended")

    outcomes: dict[int, ModelResponse] = {}
    with SimulatedServer(latency=0.05) as server:
        async with connect(server) as client:
            with pytest.raises(OSError, match="the file ended"):
                await put_into(outcomes, client.as_completed(lines()))
    assert {index: response.content for index, response in outcomes.items()} == {
        0: "echo: a",
        1: "echo: b",
        2: "echo: c",
    }


async def test_a_client_that_is_closed_ends_its_streams() -> None:
    """Streams begun and not begun end with one error that says so."""
    with SimulatedServer(latency=0.02) as server:
        client = connect(server)
        early, late = client.as_completed(numbered(10_000)), client.as_completed(numbered(10_000))
        await anext(early)
        await client.close()
        for stream in (early, late):
            with pytest.raises(RuntimeError, match="closed"):
                await put_into({}, stream)
        assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_run_whose_client_is_closed_keeps_what_was_answered() -> None:
    """There is one error with the responses so far, not a failure for each prompt."""
    with SimulatedServer(latency=0.02) as server:
        client = connect(server)
        run = asyncio.create_task(client.batch_generate(["x"] * 5000))
        while client.stats.requests < 50:
            await asyncio.sleep(0.01)
        await client.close()
        with pytest.raises(RuntimeError, match="closed") as raised:
            await run
    assert sum(response is not None for response in raised.value.responses) >= 50


async def test_a_cancelled_run_keeps_the_answers_that_a_slow_callback_kept_waiting() -> None:
    """All that the server answered and the client read is in `.responses`."""
    taken = WIDE.max_concurrent + 32  # in flight, and a few ahead

    async def slowly(_: float) -> None:
        await asyncio.sleep(60)

    async def keep(client: OpenAIClient) -> list[ModelResponse | None]:
        try:
            return await client.batch_generate(["x"] * 500, progress_callback=slowly)
        except asyncio.CancelledError as cancelled:
            return cancelled.responses

    with SimulatedServer() as server:
        async with connect(server) as client:
            run = asyncio.create_task(keep(client))
            while client.stats.requests < taken:
                await asyncio.sleep(0.01)
            run.cancel()
            answered = [response for response in await run if response is not None]
    assert len(answered) == taken


async def test_two_streams_share_one_limit() -> None:
    """The bound on concurrency is the client's."""
    limits = RateLimitConfig(requests_per_minute=None, tokens_per_minute=None, max_concurrent=4)

    async def count(client: OpenAIClient) -> int:
        return len([pair async for pair in client.as_completed(numbered(50))])

    with SimulatedServer(latency=0.01) as server:
        async with connect(server, limits) as client:
            assert await asyncio.gather(count(client), count(client)) == [50, 50]
        assert server.max_in_flight <= 4
