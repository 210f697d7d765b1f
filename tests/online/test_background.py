"""Responses made in the background: submitted, looked at until they are done, settled, cancelled."""

import asyncio
import contextlib
import json
import subprocess
import sys
import textwrap
import time

import openai
import pytest
from clients import KEY, connect, no_slot_is_taken

from openai_eval_client import TimeoutError, ValidationError
from openai_eval_client._online import background
from openai_eval_client.errors import sdk_httpx
from openai_eval_client.testing import SimulatedServer

ASK = {"api": "responses", "background": True}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Look every 10 ms, where the server names no time."""
    monkeypatch.setattr(background, "_FIRST_DELAY", 0.01)


def called(server, end):
    """The methods of the calls whose path ends so."""
    return [call.method for call in server.calls if call.path.rpartition("/")[2].startswith(end)]


def posted(server):
    """How many responses were asked for."""
    return len([call for call in server.calls if call.method == "POST" and call.path.endswith("/responses")])


async def test_a_response_in_the_background_is_an_answer() -> None:
    """Submitted once, looked at until it is done, priced and counted once."""
    with SimulatedServer(background_polls=3) as server:
        async with connect(server) as client:
            answer = await client.generate_response("hello", **ASK)
            stats = client.stats
            assert no_slot_is_taken(client)
        looks = [call for call in server.calls if call.method == "GET"]
    assert (answer.content, answer.finish_reason) == ("echo: hello", "stop")
    assert answer.usage.completion_tokens > 0
    assert not answer.usage.estimated
    assert (posted(server), len(looks)) == (1, 4)
    assert (stats.attempts, stats.retries, stats.completion_tokens) == (1, 0, answer.usage.completion_tokens)
    assert float(stats.cost.total) == pytest.approx(answer.usage.estimated_cost)


async def test_many_in_the_background() -> None:
    """In order, each submitted once."""
    prompts = [f"prompt {n}" for n in range(20)]
    with SimulatedServer(background_polls=1) as server:
        async with connect(server) as client:
            answers = await client.batch_generate(prompts, **ASK)
    assert [answer.content for answer in answers] == [f"echo: {prompt}" for prompt in prompts]
    assert posted(server) == 20


async def test_the_servers_word_on_when_to_ask_again_is_kept(monkeypatch) -> None:
    """In milliseconds, in a header."""
    slept = []
    sleep = asyncio.sleep

    async def note(seconds, *args):
        slept.append(seconds)
        await sleep(0, *args)

    with SimulatedServer(background_polls=2, background_poll_after=7.5) as server:
        async with connect(server) as client:
            monkeypatch.setattr(background.asyncio, "sleep", note)
            await client.generate_response("hello", **ASK)
    assert [seconds for seconds in slept if seconds > 1] == [7.5] * 3


async def test_looks_that_fail_by_chance_are_repeated() -> None:
    """The response is not asked for again."""

    with SimulatedServer(background_polls=5) as server:
        async with connect(server) as client:
            look, count = client._call._background._ask, 0

            async def ask(method, path, parameters):
                nonlocal count
                count += 1
                if count % 2:
                    raise openai.APIConnectionError(request=None)
                return await look(method, path, parameters)

            client._call._background._ask = ask
            assert (await client.generate_response("hello", **ASK)).content == "echo: hello"

    assert posted(server) == 1


async def test_a_call_that_is_cancelled_cancels_its_response() -> None:
    """Nothing goes on at the provider for nobody."""
    with SimulatedServer(background_seconds=60) as server:
        async with connect(server) as client:
            task = asyncio.create_task(client.generate_response("hello", **ASK))
            while not called(server, "resp_"):
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert no_slot_is_taken(client)
        assert called(server, "cancel") == ["POST"]


async def test_a_response_that_takes_too_long_is_cancelled() -> None:
    """After `background_timeout` seconds."""
    with SimulatedServer(background_seconds=60) as server:
        async with connect(server, background_timeout=0.05) as client:
            with pytest.raises(TimeoutError, match=r"not done within 0\.05 s"):
                await client.generate_response("hello", **ASK)
            assert client.stats.cost.unaccounted == 1
        assert called(server, "cancel") == ["POST"]
        assert posted(server) == 1  # it is not bought again


@pytest.mark.parametrize("reply", ["garbled", "page"])
async def test_a_look_that_cannot_be_read_is_repeated(reply) -> None:
    """It says nothing of the response."""
    body = {"garbled": b'{"id": "resp_1", "status": "in_prog', "page": b"<html>"}[reply]
    with SimulatedServer() as server:
        async with connect(server) as client:
            look, left = client._call._background._ask, [body]

            async def ask(method, path, parameters):
                found = await look(method, path, parameters)
                return type(found)(200, content=left.pop(), request=found.request) if left else found

            client._call._background._ask = ask
            assert (await client.generate_response("hello", **ASK)).content == "echo: hello"
        assert posted(server) == 1


async def test_a_response_that_may_not_be_looked_at_counts_in_full() -> None:
    """It goes on at the server, and is billed."""
    with SimulatedServer(background_seconds=60) as server:
        async with connect(server, max_cost=1.0) as client:

            async def ask(method, path, parameters):
                request = sdk_httpx().Request(method, "http://127.0.0.1/")
                response = sdk_httpx().Response(403, json={"error": {"message": "no"}}, request=request)
                raise openai.PermissionDeniedError("no", response=response, body=None)

            client._call._background._ask = ask
            with pytest.raises(openai.APIError, match="cannot be asked for"):
                await client.generate_response("hello", max_tokens=50, **ASK)
            assert client.stats.budget["spent"] > 0
        assert posted(server) == 1


@pytest.mark.parametrize("name", ["resp_" + "a" * 300, "resp_aGk+/w=="])
def test_ids_of_proxies_are_names_of_responses(name) -> None:
    """They may be long, and hold any sign."""
    body = json.dumps({"id": name, "status": "queued"}).encode()
    assert background.pending(sdk_httpx().Response(200, content=body)) == name


@pytest.mark.parametrize("cached", [False, True])
async def test_it_fails_as_the_response_does(cached, tmp_path) -> None:
    """And is asked for again as its code says: the response that failed is not looked at again."""
    with SimulatedServer(script=["failed", "ok"]) as server:
        async with connect_cached(server, tmp_path / "a.sqlite") if cached else connect(server) as client:
            assert (await client.generate_response("hello", **ASK)).content == "echo: hello"
            assert client.stats.retries == 1
    assert posted(server) == 2


async def test_a_killed_run_finds_its_responses_again(tmp_path) -> None:
    """What was submitted and paid for is fetched, not bought again."""
    path = tmp_path / "answers.sqlite"
    with SimulatedServer(background_seconds=1.5) as server:
        program = f"""
            import asyncio
            from openai_eval_client import OpenAIClient, OpenAIConfig

            async def main():
                config = OpenAIConfig(
                    api_key={KEY!r}, base_url={server.base_url!r}, default_model="gpt-4o-mini"
                )
                async with OpenAIClient(config, cache={str(path)!r}) as client:
                    await client.batch_generate(["a", "b", "c"], api="responses", background=True)

            asyncio.run(main())
        """
        process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)])
        try:
            deadline = time.monotonic() + 30
            while len({call.path for call in server.calls if call.method == "GET"}) < 3:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.02)
        finally:
            process.kill()
            process.wait()
        assert posted(server) == 3
        async with connect_cached(server, path) as client:
            answers = await client.batch_generate(["a", "b", "c"], **ASK)
            assert [answer.content for answer in answers] == ["echo: a", "echo: b", "echo: c"]
            assert client.stats.attempts == 3
        assert posted(server) == 3
        async with connect_cached(server, path) as client:  # now the answers are kept
            answers = await client.batch_generate(["a", "b", "c"], **ASK)
            assert all(answer.cached for answer in answers)
        assert posted(server) == 3


async def test_a_response_that_the_server_forgot_is_asked_for_again(tmp_path) -> None:
    """A note of it is all that is left."""
    path = tmp_path / "answers.sqlite"
    with SimulatedServer(background_seconds=60) as server:
        client = connect_cached(server, path)
        task = asyncio.create_task(client.generate_response("hello", **ASK))
        while not called(server, "resp_"):
            await asyncio.sleep(0.01)
        client._call._background._ask = broken  # as where the network is gone: it cannot be cancelled
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await client.close()
    with SimulatedServer(port=server.port) as other:
        async with connect_cached(other, path) as client:
            assert (await client.generate_response("hello", **ASK)).content == "echo: hello"
    assert called(other, "resp_")[0] == "GET"
    assert posted(other) == 1


async def broken(*_):
    raise openai.APIConnectionError(request=None)


def connect_cached(server, path):
    """A client with that cache."""
    from openai_eval_client import OpenAIClient, OpenAIConfig

    config = OpenAIConfig(api_key=KEY, base_url=server.base_url, default_model="gpt-4o-mini")
    return OpenAIClient(config, cache=path)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"api": "chat", "background": True}, "background"),
        ({"api": "responses", "background": "yes"}, "background"),
        ({**ASK, "use_batch_api": True}, "background"),
    ],
)
async def test_where_there_is_no_background_it_is_refused_by_name(options, field) -> None:
    """Before anything is sent."""
    with SimulatedServer() as server:
        async with connect(server) as client:
            with pytest.raises(ValidationError, match=field) as raised:
                await client.batch_generate([f"{n}" for n in range(200)], **options)
    assert raised.value.field == field
    assert server.calls == []


async def test_a_request_without_capacity_in_the_flex_tier_may_go_to_the_standard_tier() -> None:
    """After `flex_fallback` seconds; the ledger says which tier served."""
    with SimulatedServer(faults={"resource_unavailable": 1.0}) as server:
        async with connect(server, flex_fallback=0.0) as client:
            answer = await client.generate_response("hello", service_tier="flex")
            assert answer.content == "echo: hello"
            assert [row.service_tier for row in client.stats.cost.rows] == ["default"]
            assert client.stats.rate_limited == 0
