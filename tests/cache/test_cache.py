"""A client with a cache, end to end on a real server: nothing is paid for twice, nothing wrong answered."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import openai
import pydantic
import pytest
from answers import answer
from pydantic import BaseModel

from openai_eval_client import (
    BatchConfig,
    CacheConfig,
    ModelResponse,
    OpenAIClient,
    OpenAIConfig,
    RateLimitConfig,
    ValidationError,
)
from openai_eval_client._cache.cache import _packed, _unpacked
from openai_eval_client._cache.store import Store
from openai_eval_client._wire import Parameters, Usage
from openai_eval_client.errors import sdk_httpx
from openai_eval_client.testing import SimulatedServer

KEY = "sk-secret-1234567890"
WIDE = RateLimitConfig(requests_per_minute=None, tokens_per_minute=None, max_concurrent=50)


def connect(server: SimulatedServer, cache: object, rate_limit: RateLimitConfig = WIDE, **options: object):
    settings = {"api_key": KEY, "base_url": server.base_url, "default_model": "gpt-4o-mini", **options}
    return OpenAIClient(OpenAIConfig(**settings), rate_limit=rate_limit, cache=cache)


def numbered():
    """An answer that is never the same twice, and says what it answers."""
    count = itertools.count()
    return lambda body: f"{body['messages'][-1]['content']} {next(count)}"


def rows_of(path: Path, query: str) -> list:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchall()


def same(one: ModelResponse, other: ModelResponse) -> bool:
    return one == other.model_copy(update={"cached": one.cached})


class Verdict(BaseModel):
    label: str


# --- a rerun ----------------------------------------------------------------------------------------------

CALLS = [
    {},
    {"temperature": 0.7, "max_tokens": 20, "system": "Be brief.", "n": 2},
    {"temperature": 0, "stop": ["x"], "extra_body": {"top_p": 1}, "extra_headers": {"x-a": "b"}},
    {"api": "responses", "max_tokens": 30},
    {"response_format": Verdict},
    {"api": "responses", "response_format": Verdict},
    {"model": "acme/unknown"},
]


@pytest.mark.parametrize("options", CALLS, ids=[" ".join(options) or "plain" for options in CALLS])
async def test_a_rerun_answers_as_the_first_run_did(path: Path, options) -> None:
    """Without a request: every field as it was, `cached` apart; the SDK's object and the parsed one again."""
    with SimulatedServer(latency=0.01, lenient=True) as server:
        async with connect(server, path) as client:
            first = await client.generate_response("hello", **options)
        async with connect(server, str(path)) as client:
            second = await client.generate_response("hello", **options)
            stats = client.stats
        assert len(server.calls) == 1
    assert (first.cached, second.cached) == (False, True)
    assert same(first, second)
    assert second.latency_ms == first.latency_ms > 0
    assert second.usage.estimated_cost == first.usage.estimated_cost
    assert second.raw == first.raw
    assert type(second.raw) is type(first.raw)
    assert second.parsed == first.parsed
    assert (stats.requests, stats.cache_hits, stats.cache_writes, stats.attempts) == (1, 1, 0, 0)
    assert ModelResponse.model_validate_json(second.model_dump_json()) == second


@pytest.mark.parametrize("fault", ["null_usage", "no_usage"])
async def test_an_estimated_usage_stays_one(path: Path, fault: str) -> None:
    """Where the server sent none: the estimate is kept, and says so."""
    with SimulatedServer(script=[fault]) as server:
        async with connect(server, path) as client:
            first = await client.generate_response("hello there")
        async with connect(server, path) as client:
            second = await client.generate_response("hello there")
    assert second.usage.estimated
    assert second.usage == first.usage


def test_usage_that_an_older_version_took_for_complete_is_read() -> None:
    """It kept no estimate with it; the answer is paid for all the same."""
    message = {"role": "assistant", "content": "hi"}
    usage = {"prompt_tokens": 3, "completion_tokens": None}
    body = {"model": "gpt-4o", "choices": [{"index": 0, "message": message}], "usage": usage}
    kept = {"latency_ms": 5.0, "request_id": "r1", "temperature": 1.0, "cost": 0.25}
    parameters = Parameters(api="chat", model="gpt-4o", timeout=1, body={})
    response, used = _unpacked({"response": {"body": body}, **kept}, parameters)
    assert (response.content, response.usage.estimated_cost, response.usage.estimated) == ("hi", 0.25, True)
    assert used == Usage(3, 0, estimated=True)


async def test_a_long_answer_is_kept_whole(path: Path) -> None:
    """Compressed: many tokens with their log probabilities, in any alphabet."""
    text = "Zürich 東京 🙂 " * 2000
    with SimulatedServer(answer=lambda _: text) as server:
        async with connect(server, path) as client:
            first = await client.generate_response("hello", logprobs=True)
        async with connect(server, path) as client:
            second = await client.generate_response("hello", logprobs=True)
    assert second.cached
    assert same(first, second)
    assert second.content.startswith("Zürich 東京 🙂")
    assert path.stat().st_size < len(json.dumps(first.logprobs)) / 2


async def test_hits_never_touch_the_limiter(path: Path) -> None:
    """At one request a minute, 200 prompts come at once, and no token is counted or reserved for them."""
    prompts = [f"prompt {n}" for n in range(200)]
    narrow = RateLimitConfig(requests_per_minute=1, tokens_per_minute=10)
    with SimulatedServer() as server:
        async with connect(server, path) as client:
            await client.batch_generate(prompts)
            assert client.stats.cache_writes == 200
        async with connect(server, path, narrow) as client:
            fractions = []
            responses = await client.batch_generate(prompts, progress_callback=fractions.append)
            stats = client.stats
        assert len(server.calls) == 200
    assert [response.content for response in responses] == [f"echo: {prompt}" for prompt in prompts]
    assert all(response.cached for response in responses)
    assert fractions == [(n + 1) / 200 for n in range(200)]
    assert (stats.cache_hits, stats.attempts, stats.reserved_tokens, stats.wait_seconds) == (200, 0, 0, 0.0)
    assert client._account.limiter._queues == {}


async def test_what_the_cache_saved_is_on_the_bill(path: Path) -> None:
    """Not what was spent again."""
    with SimulatedServer() as server:
        async with connect(server, path) as client:
            await client.batch_generate(["a", "b"])
            paid = client.stats.cost
        async with connect(server, path) as client:
            await client.batch_generate(["a", "b", "c"])
            cost = client.stats.cost
    assert cost.saved_by_cache == paid.total > 0
    assert 0 < cost.total < paid.total


async def test_a_batch_answered_from_the_cache_saved_the_price_of_a_batch(path: Path) -> None:
    """Half of what the same answers would have cost online; and online they are found, too."""
    batch = BatchConfig(auto_batch_threshold=1, polling_interval=0.05)
    bills = []
    with SimulatedServer() as server:
        config = OpenAIConfig(api_key=KEY, base_url=server.base_url, default_model="gpt-4o-mini")
        for by_batch in (True, True, False):
            async with OpenAIClient(config, rate_limit=WIDE, batch=batch, cache=path) as client:
                responses = await client.batch_generate(["a", "b"], use_batch_api=by_batch, max_tokens=5)
                bills.append(client.stats.cost)
            assert [response.content for response in responses] == ["echo: a", "echo: b"]
            assert [response.cached for response in responses] == [len(bills) > 1] * 2
            assert all(response.raw.choices[0].message.content for response in responses)
    paid, batch_again, online = bills
    assert batch_again.saved_by_cache == paid.total > 0
    assert online.saved_by_cache == 2 * paid.total
    assert batch_again.total == online.total == 0


async def test_only_the_rest_is_sent(path: Path) -> None:
    """Some prompts known, some new, some parameters other."""
    with SimulatedServer() as server:
        async with connect(server, path) as client:
            await client.batch_generate(["a", "b"], max_tokens=5)
        async with connect(server, path) as client:
            responses = await client.batch_generate(["c", "b", "d", "a"], max_tokens=5)
            assert [response.cached for response in responses] == [False, True, False, True]
            assert not (await client.generate_response("a", max_tokens=6)).cached
        async with connect(server, path, base_url=server.base_url + "/") as client:
            assert (await client.generate_response("a", max_tokens=6)).cached
        assert len(server.calls) == 5


async def test_another_address_is_another_answer(path: Path) -> None:
    """Two servers never share an answer."""
    with SimulatedServer() as one, SimulatedServer() as other:
        for server in (one, other):
            async with connect(server, path) as client:
                assert not (await client.generate_response("hello")).cached


async def test_a_refused_parameter_does_not_change_the_request(path: Path) -> None:
    """Asked with max_tokens, answered with max_completion_tokens: found by what was asked."""
    module, seen = sdk_httpx(), []

    def handle(request):
        seen.append(json.loads(request.content))
        if "max_tokens" in seen[-1]:
            error = {"message": "no", "code": "unsupported_parameter", "param": "max_tokens", "type": "x"}
            return module.Response(400, json={"error": error})
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "hi"}}
        return module.Response(200, json={"id": "x", "model": "m", "choices": [choice]})

    for cached in (False, True):
        http = module.AsyncClient(transport=module.MockTransport(handle))
        async with OpenAIClient(
            OpenAIConfig(api_key=KEY), http_client=http, rate_limit=WIDE, cache=path
        ) as client:
            assert (await client.generate_response("hello", max_tokens=9)).cached is cached
    assert len(seen) == 2


async def test_streams_and_drop_in_calls_are_not_kept(path: Path) -> None:
    """client.openai goes to the server each time."""
    messages = [{"role": "user", "content": "hello"}]
    with SimulatedServer() as server:
        async with connect(server, path) as client:
            await client.generate_response("hello")
            for _ in range(2):
                await client.openai.chat.completions.create(model="gpt-4o-mini", messages=messages)
            assert (client.stats.cache_hits, client.stats.cache_writes) == (0, 1)
        assert len(server.calls) == 3


# --- samples ----------------------------------------------------------------------------------------------


async def test_repeated_prompts_are_samples_of_their_own(path: Path) -> None:
    """Each is asked for; a rerun finds each again, in its place, and a longer one asks for the rest."""
    with SimulatedServer(answer=numbered(), latency=0.02, latency_sigma=1.0) as server:
        async with connect(server, path) as client:
            first = await client.batch_generate(["a"] * 5 + ["b"] * 3)
        async with connect(server, path) as client:
            second = await client.batch_generate(["a"] * 5 + ["b"] * 5)
        assert len(server.calls) == 10
    assert len({response.content for response in first}) == 8
    assert [response.content for response in second[:8]] == [response.content for response in first]
    assert [response.cached for response in second] == [True] * 8 + [False] * 2


async def test_a_client_that_asks_again_gets_another_sample(path: Path) -> None:
    """In one program; the next program gets both, in the same order."""
    with SimulatedServer(answer=numbered()) as server:
        runs = []
        for _ in range(2):
            async with connect(server, path) as client:
                runs.append([(await client.generate_response("a")).content for _ in range(2)])
        assert len(server.calls) == 2
    assert runs == [["a 0", "a 1"]] * 2


@pytest.mark.parametrize("options", [{"temperature": 0}, {"seed": 7}])
async def test_without_sampling_one_answer_is_enough(path: Path, options) -> None:
    """At temperature 0 or with a seed: asked at the same time or one after the other, sent once."""
    with SimulatedServer(answer=numbered(), latency=0.05) as server:
        async with connect(server, path) as client:
            together = await client.batch_generate(["a"] * 20, **options)
            later = await client.generate_response("a", **options)
            assert (client.stats.requests, client.stats.cache_hits) == (21, 20)
        assert len(server.calls) == 1
    assert {response.content for response in (*together, later)} == {"a 0"}
    assert sum(response.cached for response in together) == 19
    assert later.cached


async def test_prompts_that_wait_for_the_same_answer_keep_no_others_waiting(tmp_path: Path) -> None:
    """Their slots go to other prompts, as far as the run reads ahead."""
    prompts = [f"{n // 4}" for n in range(32)]
    with SimulatedServer(latency=0.2, latency_sigma=0) as server:
        async with connect(server, tmp_path / "c.sqlite") as client:
            responses = await client.batch_generate(prompts, temperature=0, max_concurrent=4)
        assert (server.max_in_flight, len(server.calls)) == (2, 8)
    assert [response.content for response in responses] == [f"echo: {prompt}" for prompt in prompts]


async def test_a_shared_answer_is_no_shared_failure(path: Path) -> None:
    """The first of several same requests fails: one of the others is sent, and answers the rest."""
    with SimulatedServer(script=["500"], latency=0.05) as server:
        async with connect(server, path, max_retries=0) as client:
            results = await client.batch_generate(["a"] * 3, temperature=0, return_exceptions=True)
        assert len(server.calls) == 2
    assert [type(result) for result in results] == [openai.InternalServerError, ModelResponse, ModelResponse]


async def test_a_call_that_waits_for_a_shared_answer_can_be_cancelled(path: Path) -> None:
    """Cancelling one that waits, or the one that is sent, changes nothing for the others."""
    with SimulatedServer(latency=0.2, latency_sigma=0) as server:
        async with connect(server, path) as client:
            tasks = [asyncio.create_task(client.generate_response("a", temperature=0)) for _ in range(4)]
            while not server.in_flight:
                await asyncio.sleep(0.01)
            tasks[0].cancel()
            tasks[2].cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
    kinds = [type(result) for result in results]
    assert kinds == [asyncio.CancelledError, ModelResponse, asyncio.CancelledError, ModelResponse]


async def test_samples_follow_the_order_of_the_prompts_whatever_fails(path: Path) -> None:
    """Failures and retries on the way: what was answered stands in the same place after a rerun."""
    prompts = ["a", "b", "a", "c", "a", "b"] * 10
    with SimulatedServer(
        answer=numbered(), latency=0.02, latency_sigma=1.0, faults={"500": 0.5}, seed=3
    ) as server:
        before = [None] * len(prompts)
        runs = 0
        while None in before:
            served = server.counts["200"]
            async with connect(server, path, max_retries=0) as client:
                results = await client.batch_generate(prompts, return_exceptions=True)
                assert client.stats.cache_hits == served
            after = [result if isinstance(result, ModelResponse) else None for result in results]
            for old, new in zip(before, after, strict=True):
                assert old is None or (new.cached and same(old, new))
            before, runs = after, runs + 1
        assert server.counts["200"] == len(prompts)
    assert runs > 2
    assert len({response.content for response in before}) == len(prompts)


async def test_what_failed_and_was_asked_again_is_found_by_the_rerun(path: Path) -> None:
    """A program that asks again for its failures pays for each prompt once, and so does its rerun."""
    prompts = ["a", "b", "a", "c"]

    async def program(server: SimulatedServer) -> list[str]:
        async with connect(server, path, max_retries=0) as client:
            answers = await client.batch_generate(prompts, return_exceptions=True)
            for index, answer in enumerate(answers):
                if isinstance(answer, Exception):
                    answers[index] = await client.generate_response(prompts[index])
            return [answer.content for answer in answers]

    with SimulatedServer(answer=numbered(), script=["ok", "500", "500"]) as server:
        first = await program(server)
        assert await program(server) == first
        assert server.counts["200"] == len(prompts)


async def test_a_cancelled_run_goes_on_where_it_was(path: Path) -> None:
    """What was answered by then is not sent again, by the same client or the next."""
    prompts = [f"prompt {n}" for n in range(60)]
    with SimulatedServer(latency=0.05) as server:
        async with connect(server, path) as client:
            task = asyncio.create_task(client.batch_generate(prompts, max_concurrent=10, temperature=0))
            while server.counts["200"] < 20:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            kept = client.stats.cache_writes
            responses = await client.batch_generate(prompts, temperature=0)
        assert sum(response.cached for response in responses) >= kept > 0
        assert len(server.calls) <= len(prompts) + 20


# --- what is kept -----------------------------------------------------------------------------------------


async def test_an_error_is_never_kept(path: Path) -> None:
    """Neither a refusal nor a failure."""
    with SimulatedServer(script=["500", "garbage", "drop"]) as server:
        async with connect(server, path, max_retries=0) as client:
            for _ in range(3):
                with pytest.raises(openai.APIError):
                    await client.generate_response("hello")
            assert client.stats.cache_writes == 0
            assert not (await client.generate_response("hello")).cached


@pytest.mark.parametrize("api", ["chat", "responses"])
@pytest.mark.parametrize("kept", [True, False])
async def test_answers_cut_short_are_kept_if_wanted(path: Path, api: str, kept: bool) -> None:
    """store_incomplete=False leaves out what max_tokens cut; what came to its end is kept in any case."""
    config = CacheConfig(path=path, store_incomplete=kept)
    with SimulatedServer(answer=lambda _: "one two three four") as server:
        for n in range(2):
            async with connect(server, config) as client:
                cut = await client.generate_response("hello", api=api, max_tokens=2)
                whole = await client.generate_response("hello", api=api, max_tokens=20)
            assert (cut.finish_reason, whole.finish_reason) == ("length", "stop")
            assert (cut.cached, whole.cached) == (bool(n and kept), bool(n))


async def test_a_content_filter_in_any_choice_counts(path: Path) -> None:
    """With n > 1, one choice that was filtered makes the answer incomplete."""
    module = sdk_httpx()

    def handle(request):
        choices = [
            {"index": n, "finish_reason": reason, "message": {"role": "assistant", "content": "hi"}}
            for n, reason in enumerate(["stop", "content_filter"])
        ]
        return module.Response(200, json={"id": "x", "model": "m", "choices": choices})

    for _ in range(2):
        http = module.AsyncClient(transport=module.MockTransport(handle))
        config = CacheConfig(path=path, store_incomplete=False)
        async with OpenAIClient(OpenAIConfig(api_key=KEY), http_client=http, cache=config) as client:
            assert not (await client.generate_response("hello", n=2)).cached


async def test_an_answer_may_be_too_old(path: Path) -> None:
    """ttl: used again within it, asked for again after it, and the newer answer takes the place."""
    with SimulatedServer(answer=numbered()) as server:
        for ttl, content in ((None, "a 0"), (3600, "a 0"), (1e-6, "a 1"), (3600, "a 1")):
            async with connect(server, CacheConfig(path=path, ttl=ttl)) as client:
                assert (await client.generate_response("a")).content == content


async def test_without_reading_everything_is_asked_again(path: Path) -> None:
    """read=False: new answers take the place of the old."""
    with SimulatedServer(answer=numbered(), latency=0.02) as server:
        for read, contents in ((True, {"a 0"}), (False, {"a 1", "a 2"}), (True, {"a 1", "a 2"})):
            async with connect(server, CacheConfig(path=path, read=read)) as client:
                responses = await client.batch_generate(["a"] * 2, temperature=0)
            assert {response.content for response in responses} <= contents
        assert len(server.calls) == 3


async def test_without_writing_the_file_is_only_read(path: Path) -> None:
    """write=False: what is there is used, nothing is added."""
    config = CacheConfig(path=path, write=False)
    with SimulatedServer() as server:
        with pytest.raises(ValidationError, match="does not exist, and write=False"):
            connect(server, config)
        async with connect(server, path) as client:
            await client.generate_response("a")
        before = path.read_bytes()
        for _ in range(2):
            async with connect(server, config) as client:
                known, new = await client.batch_generate(["a", "b"])
                assert (known.cached, new.cached) == (True, False)
                assert client.stats.cache_writes == 0
    assert path.read_bytes() == before


async def test_a_kept_answer_that_is_none_is_asked_for_again(path: Path, caplog) -> None:
    """A value whose checksum fits and that no version of ours wrote."""
    with SimulatedServer() as server:
        async with connect(server, path) as client:
            await client.generate_response("a")
        for value in (b"{}", b"[1]", b"x", b'{"response":{"body":{"choices":5}}}', b"\xff"):
            async with connect(server, path) as client:
                store = client._cache.store
                ((key,),) = rows_of(path, "SELECT key FROM answers")
                await store.put(key, value)
                assert (await client.generate_response("a")).content == "echo: a"
                assert client.stats.cache_hits == 0
        assert len(server.calls) == 6
    assert caplog.text.count("cannot be read") == 5


def chat(*choices: dict, **fields: object) -> dict:
    return {"id": "x", "model": "m", "choices": list(choices), **fields}


def choice(content: object = "half", reason: str = "stop", **fields: object) -> dict:
    return {
        "index": 0,
        "message": {"role": "assistant", "content": content},
        "finish_reason": reason,
        **fields,
    }


def responses(status: str, **fields: object) -> dict:
    return {"id": "x", "model": "m", "status": status, "output": [], **fields}


UPSTREAM = {"code": 502, "message": "Upstream"}
NO_ANSWERS = [
    ("chat", {"error": UPSTREAM}),
    ("chat", {"choices": None}),
    ("chat", {"choices": {"message": "half"}}),
    ("chat", responses("completed")),
    ("responses", chat(choice())),
    ("responses", {"status": "completed", "output": "half"}),
    ("responses", {"error": UPSTREAM}),
    # what servers send with a 200 that is no answer
    ("responses", responses("failed", error={"code": "server_error", "message": "x"})),
    ("responses", responses("cancelled")),
    ("responses", responses("queued")),
    ("responses", responses("in_progress")),
    ("chat", chat(choice("", "error", error=UPSTREAM))),
    ("chat", chat(choice("half", "error", error=UPSTREAM))),
    ("chat", chat(choice("half", "error"))),
    ("chat", chat(choice(), error=UPSTREAM)),
    ("chat", chat()),
    ("chat", chat(usage={"prompt_tokens": 5, "completion_tokens": 5})),
    ("chat", {"choices": ["half"]}),
    ("chat", {"choices": [{"message": "half", "finish_reason": "stop"}]}),
]


@pytest.mark.parametrize(("api", "body"), NO_ANSWERS, ids=str)
@pytest.mark.parametrize("version", [1, 2])
async def test_a_kept_body_that_is_no_answer_is_asked_for_again(path: Path, api: str, body, version) -> None:
    """As an earlier version kept it, under either key; the answer is then found by the next run."""
    kept = {
        "response": {"body": body},
        "latency_ms": 5.0,
        "request_id": "x",
        "temperature": 1.0,
        "cost": None,
    }
    kept["usage"] = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2, "estimated": True}
    with SimulatedServer() as server:
        if version == 1:
            Store(path).close()
            with closing(sqlite3.connect(path)) as other:
                other.execute("PRAGMA user_version = 1")
        async with connect(server, path) as client:
            parameters = client._parameters(None, None, None, None, None, api, {})
            sample = client._cache.take(parameters.with_prompt("a"), parameters)
            client._cache.give_back(sample, parameters)
            await client._cache.store.put(sample.keys[-1], json.dumps(kept).encode())
        for cached in (False, True):
            async with connect(server, path) as client:
                response = await client.generate_response("a", api=api)
            assert (response.content, response.cached) == ("echo: a", cached)
        assert len(server.calls) == 1


async def test_thousands_of_kept_bodies_that_are_no_answers_are_logged_once(path: Path, caplog) -> None:
    """A client says it once; each is asked for again."""
    prompts = [f"prompt {n}" for n in range(30)]
    with SimulatedServer() as server:
        async with connect(server, path) as client:
            await client.batch_generate(prompts)
            keys = [key for (key,) in rows_of(path, "SELECT key FROM answers")]
            await asyncio.gather(*(client._cache.store.put(key, b"{}") for key in keys))
        async with connect(server, path) as client:
            await client.batch_generate(prompts)
            assert client.stats.cache_writes == 30
    assert caplog.text.count("cannot be read") == 1


async def test_the_file_holds_no_key(path: Path) -> None:
    """Answers and digests only."""
    with SimulatedServer() as server:
        async with connect(server, path, organization_id="org-secret") as client:
            await client.generate_response("hello", extra_headers={"x-secret": "header-secret"})
            content = path.read_bytes() + Path(f"{path}-wal").read_bytes()
    assert b"echo: hello" in content
    assert b"secret" not in content


async def test_a_cache_that_fails_stops_nothing(path: Path, caplog) -> None:
    """The file vanishes in the middle: everything is answered, and it is logged once."""
    with SimulatedServer() as server:
        async with connect(server, path) as client:
            await client.batch_generate(["a", "b"])
            path.unlink()
            with caplog.at_level(logging.WARNING):
                responses = await client.batch_generate([f"prompt {n}" for n in range(50)])
            assert client.stats.cache_writes == 2
    assert len(responses) == 50
    assert len(caplog.records) == 2


# --- several users of one file ----------------------------------------------------------------------------


def test_threads_and_loops_share_one_client_and_its_cache(path: Path) -> None:
    """Four threads, each with a loop of its own, and two runs one after the other in each."""
    with SimulatedServer() as server:
        client = connect(server, path)

        def use(name: str) -> None:
            for _ in range(2):
                prompts = [f"{name} {n}" for n in range(25)]
                responses = asyncio.run(client.batch_generate(prompts, temperature=0))
                assert [response.content for response in responses] == [f"echo: {p}" for p in prompts]

        threads = [threading.Thread(target=use, args=(name,)) for name in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stats = client.stats
        asyncio.run(client.close())
        assert len(server.calls) == 100
    assert (stats.requests, stats.cache_hits, stats.cache_writes) == (200, 100, 100)


async def test_two_clients_share_one_file(path: Path) -> None:
    """At the same time: what one has been answered, the other finds."""
    with SimulatedServer() as server:
        async with connect(server, path) as one, connect(server, path) as other:
            assert not (await one.generate_response("a")).cached
            assert (await other.generate_response("a")).cached
            assert not (await other.generate_response("b")).cached
            assert (await one.generate_response("b")).cached


# --- what is asked for ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [5, b"runs.sqlite", {"path": "runs.sqlite"}, True, ["runs.sqlite"]])
def test_what_is_no_cache_is_refused(cache) -> None:
    """By our own error, which names it."""
    with pytest.raises(ValidationError, match=r"cache=.*must be a path or a CacheConfig") as raised:
        OpenAIClient(OpenAIConfig(api_key=KEY), cache=cache)
    assert raised.value.field == "cache"


@pytest.mark.parametrize("given", ["", " ", "a\0b", ":memory:"])
def test_what_is_no_path_is_refused(given: str) -> None:
    """As a cache, by our error; in a CacheConfig, by pydantic's."""
    with pytest.raises(ValidationError, match="cache="):
        OpenAIClient(OpenAIConfig(api_key=KEY), cache=given)
    with pytest.raises(pydantic.ValidationError, match="path="):
        CacheConfig(path=given)


@pytest.mark.parametrize("wrong", [{"ttl": 0}, {"ttl": -1}, {"ttl": "day"}, {"size": 5}, {"path": 5}])
def test_a_wrong_config_is_refused(wrong) -> None:
    """By field and value, as every config."""
    with pytest.raises(pydantic.ValidationError, match=next(iter(wrong))):
        CacheConfig(**{"path": "runs.sqlite", **wrong})


def test_a_config_has_the_specified_defaults() -> None:
    """Read and written, for ever, cut answers included; frozen."""
    config = CacheConfig(path="runs.sqlite")
    assert config.model_dump() == {
        "path": "runs.sqlite",
        "ttl": None,
        "read": True,
        "write": True,
        "store_incomplete": True,
    }
    with pytest.raises(pydantic.ValidationError):
        config.ttl = 5


async def test_closing_the_client_closes_the_file(path: Path) -> None:
    """Nothing beside it, no thread; the client can be closed again."""
    with SimulatedServer() as server:
        client = connect(server, path)
        await client.generate_response("a")
        await client.close()
        await client.close()
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("openai_eval_client")]


async def test_without_a_cache_no_file_is_made(tmp_path: Path, monkeypatch) -> None:
    """The default."""
    monkeypatch.chdir(tmp_path)
    with SimulatedServer() as server:
        async with connect(server, None) as client:
            assert not (await client.generate_response("a")).cached
    assert list(tmp_path.iterdir()) == []


def test_what_is_kept_is_json_for_every_parser() -> None:
    """Some servers send -Infinity as the log probability of a token."""
    response = answer()
    response._body = b'{"choices": [{"logprobs": {"content": [{"logprob": -Infinity}]}}]}'
    kept = json.loads(_packed(response) or b"", parse_constant=pytest.fail)
    assert kept["response"]["body"]["choices"][0]["logprobs"] == {"content": [{"logprob": None}]}
