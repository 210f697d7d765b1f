"""Limits shared through Redis: what is shared, what is said when there is none, what never gets there."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import multiprocessing
import pickle
import sys
import threading
import time

import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openai_eval_client import AsyncOpenAI, OpenAIClient, OpenAIConfig, RateLimitConfig, ValidationError
from openai_eval_client._account import Account
from openai_eval_client._wire.endpoints import Demand
from openai_eval_client._wire.failures import Outcome, refused
from openai_eval_client._wire.usage import Usage
from openai_eval_client.config import without_password
from openai_eval_client.testing import SimulatedServer

SECRET = "hush-0123456789"
KEY = "sk-never-to-be-seen-0123456789"
GONE = "redis://user:hush-0123456789@127.0.0.1:1/0"  # nothing listens there
WRONG_URLS = (
    "",
    "redis",
    "http://h",
    "redis://",
    "unix://",
    "redis://h:port",
    "redis://h h",
    "redis://h:99999",
)


def config(base_url: str = "http://127.0.0.1:1/v1", key: str = KEY) -> OpenAIConfig:
    return OpenAIConfig(api_key=key, base_url=base_url, default_model="m")


def limits(
    url: str | None, rpm: int | None = 600, tpm: int | None = None, **options: object
) -> RateLimitConfig:
    return RateLimitConfig(requests_per_minute=rpm, tokens_per_minute=tpm, redis_url=url, **options)


# --- the configuration --------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", WRONG_URLS)
def test_a_url_of_something_else_is_named(url: str) -> None:
    """Field and value, as of any field."""
    with pytest.raises(
        pydantic.ValidationError, match=r"redis_url='.*must be a URL that starts with redis://"
    ):
        limits(url)


@pytest.mark.parametrize("url", [5, True, b"redis://h", ["redis://h"]])
def test_a_url_that_is_none_is_refused(url: object) -> None:
    """Whatever it is instead."""
    with pytest.raises(pydantic.ValidationError, match="redis_url="):
        limits(url)


@pytest.mark.parametrize("namespace", ["", "a b", "{a}", 5, None])
def test_a_namespace_fits_into_a_key(namespace: object) -> None:
    """Without what means something in the name of a key."""
    with pytest.raises(pydantic.ValidationError, match="namespace="):
        RateLimitConfig(namespace=namespace)


@pytest.mark.parametrize(
    "url",
    [
        f"redis://:{SECRET}@h:port",
        f"http://{SECRET}@h",
        f"{SECRET}@h",
        f"redis://h:port?password={SECRET}",
        f"redis://:a@{SECRET}@h:port",
        f"{SECRET}@a://h",
    ],
)
def test_no_error_shows_the_password(url: str) -> None:
    """Wherever it stands in a URL that is wrong."""
    assert SECRET not in str(without_password(url))
    with pytest.raises(pydantic.ValidationError) as caught:
        limits(url)
    assert SECRET not in f"{caught.value} {caught.value!r} {caught.value.errors()}"


def test_a_config_shows_no_password() -> None:
    """Not in its repr, nor in what is dumped; the pickled one keeps it, for workers."""
    given_limits = limits(GONE)
    shown = f"{given_limits!r} {given_limits} {given_limits.model_dump()} {dict(given_limits)}"
    assert SECRET not in shown + given_limits.model_dump_json()
    assert pickle.loads(pickle.dumps(given_limits)).redis_url == GONE  # noqa: S301
    assert SECRET not in repr(OpenAIClient(config(), rate_limit=given_limits))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://h:1/0", "redis://h:1/0"),
        ("rediss://u:p@h/2", "rediss://***@h/2"),
        (f"redis://a?{SECRET}@h:port", "redis://***"),
        ("unix://p@/run/r.sock?db=1", "unix://***@/run/r.sock?***"),
        (5, "[hidden]"),
    ],
)
def test_a_url_is_shown_without_what_is_secret(url: object, shown: str) -> None:
    """The rest of it says which one is meant."""
    assert without_password(url) == shown


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As soon as a client is made."""
    monkeypatch.setitem(sys.modules, "redis", None)
    monkeypatch.delitem(sys.modules, "openai_eval_client._limits.redis", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'openai-eval-client\[redis\]'"):
        OpenAIClient(config(), rate_limit=limits(GONE))


# --- no Redis at the start ----------------------------------------------------------------------------------


async def test_without_redis_nothing_is_sent(caplog: pytest.LogCaptureFixture) -> None:
    """One error for the whole run, which names the URL but not its password."""
    with SimulatedServer() as server, caplog.at_level(logging.DEBUG):
        async with OpenAIClient(config(server.base_url), rate_limit=limits(GONE)) as client:
            with pytest.raises(ValidationError, match=r"redis_url='redis://\*\*\*@127.0.0.1:1/0'") as caught:
                await client.batch_generate(["hello"] * 50)
        assert server.calls == []
    assert caught.value.field == "redis_url"
    assert SECRET not in f"{caught.value!r} {caplog.text} {pickle.dumps(caught.value)!r}"


async def test_the_drop_in_client_says_so_too() -> None:
    """At once, without the SDK's retries."""
    async with AsyncOpenAI(api_key="k", base_url="http://127.0.0.1:1/v1", rate_limit=limits(GONE)) as client:
        with pytest.raises(ValidationError, match="redis_url="):
            await ask(client)


async def ask(client: AsyncOpenAI):
    return await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hello"}])


async def test_a_wrong_password_is_told_and_not_shown(redis_with_password) -> None:
    """Redis is there, but not for us."""
    url = redis_with_password.url.replace(redis_with_password.password, SECRET)
    async with OpenAIClient(config(), rate_limit=limits(url)) as client:
        with pytest.raises(
            ValidationError, match="no Redis can be used there: AuthenticationError"
        ) as caught:
            await client.generate_response("hello")
    assert SECRET not in str(caught.value)


async def test_the_right_password_opens(redis_with_password) -> None:
    """And is in none of the keys."""
    with SimulatedServer() as server:
        async with OpenAIClient(
            config(server.base_url), rate_limit=limits(redis_with_password.url)
        ) as client:
            assert (await client.generate_response("hello")).content == "echo: hello"


async def test_a_cluster_that_is_gone_is_no_redis() -> None:
    """Its errors are none of redis-py's family, and nobody waits for ever."""
    async with moved() as url, OpenAIClient(config(), rate_limit=limits(url)) as client:
        with pytest.raises(ValidationError, match="RedisClusterException"):
            await asyncio.wait_for(client.generate_response("hello"), 10)


@contextlib.asynccontextmanager
async def moved():
    """A node that names another one, and is gone with it."""
    writers = []

    async def serve(reader, writer) -> None:
        writers.append(writer)
        while line := await reader.readline():
            parts = []
            for _ in range(int(line[1:])):
                length = int((await reader.readline())[1:])
                parts.append((await reader.readexactly(length + 2))[:-2])
            if parts[0].upper().startswith(b"EVAL"):
                server.close()
            writer.write(_ANSWERS.get(parts[0].upper(), b"+OK\r\n"))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    for writer in writers:
        writer.close()
        await writer.wait_closed()


_ANSWERS = {b"HELLO": b"%1\r\n+proto\r\n:3\r\n", b"EVALSHA": b"-MOVED 1 127.0.0.1:1\r\n"}


# --- what is shared -----------------------------------------------------------------------------------------


@pytest.fixture
def virtual(redis_server):
    """Rehearsals on the virtual clock and the real Redis."""
    import shared_quota
    from virtual import VirtualLoop, VirtualServer

    client = redis_server.client()
    loop = VirtualLoop()

    def fleet(configs, *, server=None, **options):
        server = server or VirtualServer(1800, 480_000, window=5)
        return shared_quota.Fleet(shared_quota.VirtualRedis(client, loop), server, configs, **options)

    yield fleet
    loop.close()
    client.close()


def stated(factor: float = 1, **options: object) -> RateLimitConfig:
    rpm, tpm = int(1800 * factor), int(480_000 * factor)
    return RateLimitConfig(
        requests_per_minute=rpm, tokens_per_minute=tpm, max_concurrent=64, **{"burst_seconds": 5, **options}
    )


CASES = {
    "limits right": ([1] * 4, {}, 1.03, 0),
    "stamped at permit": ([1] * 4, {"stamp": "permit"}, 1.03, 0),
    "4x too high": ([4] * 4, {}, 1.03, 0.005),
    "4x too high, stamped at permit": ([4] * 4, {"stamp": "permit"}, 1.03, 0.005),
    "4x too high, no headers": ([4] * 4, {"headers": False}, 1.05, 0.05),
    "limits differ, no headers": ([1, 1, 2, 4], {"headers": False}, 1.03, 0),
    "one worker": ([1], {}, 1.03, 0),
}


@pytest.mark.parametrize("seed", [0, 2, 4])
@pytest.mark.parametrize("case", CASES)
def test_workers_use_one_quota_whole_and_fairly(virtual, case: str, seed: int) -> None:
    """Near the least possible time, few or no refusals, equal parts, one question a request at most."""
    from virtual import VirtualServer

    factors, options, ratio, refused = CASES[case]
    count = 600 // len(factors)
    server = VirtualServer(1800, 480_000, window=5, seed=seed, **options)
    fleet = virtual([stated(factor) for factor in factors], server=server).run(count)
    assert fleet.answered == [count] * len(factors)
    assert fleet.ratio <= ratio
    assert server.refused <= refused * 600
    assert fleet.redis.asked <= len(fleet.sent)
    half = [worker for _, worker in fleet.sent[: len(fleet.sent) // 2]]
    assert min(map(half.count, range(len(factors)))) >= 0.6 * len(half) / len(factors)


def test_a_learning_pool_has_one_idea_of_the_limits(virtual) -> None:
    """Nothing is configured: the headers tell, and what one worker hears holds for all."""
    from virtual import VirtualServer

    open_limits = RateLimitConfig(requests_per_minute=None, tokens_per_minute=None, max_concurrent=16)
    server = VirtualServer(1800, 480_000, window=5)
    fleet = virtual([open_limits] * 4, server=server, in_flight=16).run(150)
    assert fleet.answered == [150] * 4
    assert fleet.ratio <= 1.05
    assert server.refused <= 12


def test_a_silent_server_slows_the_pool_down(virtual) -> None:
    """Without limits and headers the refusals alone tell: the shared rate is cut, and comes back."""
    from virtual import VirtualServer

    open_limits = RateLimitConfig(requests_per_minute=None, tokens_per_minute=None, max_concurrent=16)
    server = VirtualServer(1800, 480_000, window=5, headers=False)
    fleet = virtual([open_limits] * 4, server=server, in_flight=16).run(150)
    assert fleet.answered == [150] * 4
    assert server.refused <= 60


def test_a_killed_worker_holds_nothing(virtual) -> None:
    """It is gone without a word in the middle of the run; the others use its part at once."""

    async def kill(fleet) -> None:
        await asyncio.sleep(8)
        fleet.accounts[0].limiter._backend.ask = lambda *_: None  # what it would still say is never heard
        fleet.tasks[0].cancel()

    fleet = virtual([stated()] * 4).run(150, kill)
    assert fleet.answered[1:] == [150] * 3
    later = [at for at, _ in fleet.sent if 9 <= at < 19]
    assert len(later) >= 0.95 * 200
    assert fleet.server.refused == 0


@pytest.mark.parametrize("factor", [1, 4])
@pytest.mark.parametrize("window", [5, 60])
def test_redis_may_be_lost_and_come_back_empty(virtual, factor: int, window: int) -> None:
    """Each goes on with its part meanwhile; nobody bursts out of the new, empty Redis."""
    from virtual import VirtualServer

    async def outage(fleet) -> None:
        await asyncio.sleep(8)
        fleet.redis.down = True
        await asyncio.sleep(5)
        fleet.redis.flush()
        fleet.redis.down = False

    server = VirtualServer(1800, 480_000, window=window)
    count = 150 if window == 5 else 480  # all still ask when Redis is tried again: up to 5 s after it is back
    fleet = virtual([stated(factor, burst_seconds=window)] * 4, server=server).run(count, outage)
    assert fleet.answered == [count] * 4
    assert server.refused <= 0.05 * 4 * count
    assert fleet.ratio <= 1.10
    during = [at for at, _ in fleet.sent if 8.5 <= at < 13]
    assert len(during) >= 0.8 * 4.5 * 20
    assert sum(at >= 14 for at, _ in fleet.sent) > 100
    assert not any(account.limiter._queues["m"]._alone for account in fleet.accounts)


def test_an_emptied_redis_is_no_full_bucket(virtual) -> None:
    """All keys are gone between two questions, and nobody noticed an outage."""
    from virtual import VirtualServer

    async def flush(fleet) -> None:
        await asyncio.sleep(5)
        fleet.redis.flush()

    server = VirtualServer(1800, 480_000, window=5, headers=False)
    fleet = virtual([stated()] * 4, server=server).run(100, flush)
    assert fleet.answered == [100] * 4
    assert server.refused == 0


def test_the_lowest_limit_holds_while_its_worker_lives(virtual) -> None:
    """A quarter of the limit is one worker's idea of it; when that one is done, the others speed up."""

    async def leave(fleet) -> None:
        await asyncio.sleep(20)
        fleet.tasks[0].cancel()

    fleet = virtual([stated(0.25), stated(), stated()]).run(300, leave)
    slow = [at for at, _ in fleet.sent if 10 <= at < 20]
    fast = [at for at, _ in fleet.sent if 32 <= at < 42]
    assert len(slow) <= 52
    assert len(fast) >= 180


def in_virtual_time(virtual, scenario, *configs: RateLimitConfig) -> None:
    """Run `scenario(loop, accounts)` with one account for each config, on one Redis."""
    from shared_quota import VirtualLink

    fleet = virtual(configs)
    loop = fleet.redis.loop
    accounts = []
    for given_limits in configs:
        account = Account(given_limits, clock=loop)
        account.limiter._backend = VirtualLink(fleet.redis)
        accounts.append(account)
    loop.run_until_complete(scenario(loop, accounts))


def answer(**headers: str) -> Outcome:
    return Outcome(200, {name.replace("_", "-"): value for name, value in headers.items()}, Usage(100, 0))


DEMAND = Demand("m", 100, 0)
FIXED = {"adaptive_throttling": False, "burst_seconds": 60}


def test_a_pause_holds_for_all(virtual) -> None:
    """A 429 of one worker stops the others, and another model does not notice."""

    async def scenario(loop, accounts) -> None:
        first, second = accounts
        await second.attempt(DEMAND).begin()
        (await first.attempt(DEMAND).begin()).settle(refused(429, {"retry-after": "7"}))
        await asyncio.sleep(0.1)
        began = loop.time()
        await second.attempt(DEMAND).begin()
        assert 6.5 <= loop.time() - began <= 7.5

    in_virtual_time(virtual, scenario, limits(None, 600), limits(None, 600))


def test_a_pause_longer_than_max_wait_ends_the_waiting_of_all(virtual) -> None:
    """Also of a worker that was not refused itself."""
    from openai_eval_client import RateLimitError

    async def scenario(loop, accounts) -> None:
        first, second = accounts
        await second.attempt(DEMAND).begin()
        (await first.attempt(DEMAND).begin()).settle(refused(429, {"retry-after": "3600"}))
        await asyncio.sleep(0.1)
        with pytest.raises(RateLimitError, match="max_wait"):
            await second.attempt(DEMAND).begin()

    in_virtual_time(virtual, scenario, limits(None, 600), limits(None, 600))


def test_a_debt_of_one_is_a_debt_of_all(virtual) -> None:
    """An answer that was 500 tokens longer than reserved is waited for by the other worker."""

    async def scenario(loop, accounts) -> None:
        first, second = accounts
        permit = await first.attempt(Demand("m", 500, 0)).begin()
        permit.settle(Outcome(200, {}, Usage(1000, 0)))
        await asyncio.sleep(2)
        await first.attempt(Demand("m", 10, 0)).begin()  # tells the pending
        await second.attempt(Demand("m", 100, 0)).begin()
        assert loop.time() == pytest.approx(51, abs=1)

    in_virtual_time(virtual, scenario, limits(None, None, 600, **FIXED), limits(None, None, 600, **FIXED))


def test_an_overestimate_is_given_back_to_all(virtual) -> None:
    """Nothing was used of what one had reserved: the other may use it at once."""

    async def scenario(loop, accounts) -> None:
        first, second = accounts
        (await first.attempt(Demand("m", 550, 0)).begin()).settle(Outcome(200, {}, Usage(0, 0)))
        await asyncio.sleep(2)
        await first.attempt(Demand("m", 10, 0)).begin()
        began = loop.time()
        await second.attempt(Demand("m", 500, 0)).begin()
        assert loop.time() - began < 0.1

    in_virtual_time(virtual, scenario, limits(None, None, 600, **FIXED), limits(None, None, 600, **FIXED))


def test_a_cancelled_waiter_gives_its_place_back(virtual) -> None:
    """What it had reserved is there for the others."""

    async def scenario(loop, accounts) -> None:
        first, second = accounts
        await first.attempt(Demand("m", 590, 0)).begin()
        waiting = asyncio.create_task(first.attempt(Demand("m", 500, 0)).begin())
        await asyncio.sleep(1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        began = loop.time()
        await first.attempt(Demand("m", 1, 0)).begin()
        await second.attempt(Demand("m", 50, 0)).begin()
        assert loop.time() - began < 8

    in_virtual_time(virtual, scenario, limits(None, None, 600, **FIXED), limits(None, None, 600, **FIXED))


def test_who_is_cancelled_while_redis_is_asked_gives_back_too(virtual) -> None:
    """The reply finds nobody: what was reserved travels back with the next question."""

    async def scenario(loop, accounts) -> None:
        (account,) = accounts
        task = asyncio.create_task(account.attempt(Demand("m", 500, 0)).begin())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.sleep(1)
        await account.attempt(Demand("m", 1, 0)).begin()
        began = loop.time()
        await account.attempt(Demand("m", 500, 0)).begin()
        assert loop.time() - began < 0.1

    in_virtual_time(virtual, scenario, limits(None, None, 600, **FIXED))


def test_first_come_first_served_within_a_worker(virtual) -> None:
    """A long prompt is not overtaken by the short ones behind it."""
    order: list[int] = []

    async def scenario(loop, accounts) -> None:
        async def one(number: int, tokens: int) -> None:
            await accounts[0].attempt(Demand("m", tokens, 0)).begin()
            order.append(number)

        sizes = [500, 90, 500, 1, 1]
        await asyncio.gather(*[one(number, tokens) for number, tokens in enumerate(sizes)])

    in_virtual_time(virtual, scenario, limits(None, None, 600, **FIXED))
    assert order == [0, 1, 2, 3, 4]


def test_a_clock_that_is_set_back_stops_nobody(virtual) -> None:
    """Redis's goes back by an hour during a pause: the pause ends when it should, and the rate stays."""

    async def scenario(loop, accounts) -> None:
        (account,) = accounts
        (await account.attempt(DEMAND).begin()).settle(refused(429, {"retry-after": "7"}))
        await asyncio.sleep(2)
        account.limiter._backend.redis.epoch -= 3600
        await account.attempt(DEMAND).begin()
        assert loop.time() == pytest.approx(8, abs=2)
        await account.attempt(Demand("m", 600, 0)).begin()
        assert loop.time() == pytest.approx(67, abs=8)

    in_virtual_time(virtual, scenario, limits(None, None, 600, **FIXED))


def test_one_larger_than_the_bucket_goes_when_it_is_full(virtual) -> None:
    """And those behind it wait for the debt."""

    async def scenario(loop, accounts) -> None:
        first, second = accounts
        await first.attempt(Demand("m", 1200, 0)).begin()
        assert loop.time() < 1
        await second.attempt(Demand("m", 100, 0)).begin()
        assert loop.time() == pytest.approx(70, abs=3)

    in_virtual_time(virtual, scenario, limits(None, None, 600, **FIXED), limits(None, None, 600, **FIXED))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_no_window_holds_more_than_the_limit(redis_server, data) -> None:
    """Whatever workers ask, cancel, overestimate and leave behind: never more than the burst and the rate."""
    from shared_quota import VirtualLink, VirtualRedis
    from virtual import VirtualLoop

    sent: list[tuple[float, float]] = []
    steps = data.draw(
        st.lists(
            st.tuples(
                st.integers(0, 2),
                st.floats(0, 3),
                st.integers(1, 300),
                st.sampled_from(["answer", "answer", "cancel", "drop"]),
                st.floats(0, 2),
            ),
            max_size=25,
        )
    )

    loop = VirtualLoop()

    async def one(account, tokens, end, patience) -> None:
        task = asyncio.ensure_future(account.attempt(Demand("m", tokens, 0)).begin())
        if end == "cancel":
            await asyncio.wait({task}, timeout=patience)
            if not task.done():
                task.cancel()
                return
        permit = await task
        sent.append((loop.time(), tokens))
        if end != "drop":
            await asyncio.sleep(patience)
            permit.settle(Outcome(200, {}, Usage(tokens, 0)))

    async def scenario(redis) -> None:
        accounts = [Account(limits(None, None, 600, **FIXED), clock=loop) for _ in range(3)]
        for account in accounts:
            account.limiter._backend = VirtualLink(redis)
        tasks = []
        for number, pause, tokens, end, patience in steps:
            await asyncio.sleep(pause)
            tasks.append(asyncio.ensure_future(one(accounts[number], tokens, end, patience)))
        await asyncio.gather(*tasks)

    with redis_server.client() as client:
        try:
            loop.run_until_complete(scenario(VirtualRedis(client, loop)))
        finally:
            loop.close()
    for first, (start, _) in enumerate(sent):
        spent = 0.0
        for at, tokens in sent[first:]:
            spent += tokens
            assert spent <= 600 + 10 * (at - start) + 1


# --- the real way there -------------------------------------------------------------------------------------


async def test_no_key_reaches_redis(redis_server) -> None:
    """Neither in the names nor in what they hold; and other accounts have limits of their own."""
    with redis_server.client() as redis:
        redis.flushall()
        with SimulatedServer() as server:
            for key in (KEY, KEY[::-1]):
                async with OpenAIClient(
                    config(server.base_url, key), rate_limit=limits(redis_server.url)
                ) as client:
                    await client.generate_response("a prompt of nobody's business")
                    held = {name: redis.dump(name) for name in redis.scan_iter()}
        assert len({name.partition(b"}")[0] for name in held}) == 2
        shown = repr(held)
    assert KEY not in shown
    assert KEY[::-1] not in shown
    assert "nobody" not in shown


async def test_clients_of_one_account_share(redis_server) -> None:
    """Two clients, the drop-in one among them: the second waits for what the first has spent."""
    with redis_server.client() as redis:
        redis.flushall()
    with SimulatedServer() as server:
        shared = limits(redis_server.url, 60, burst_seconds=2, adaptive_throttling=False)
        async with (
            OpenAIClient(config(server.base_url), rate_limit=shared) as first,
            AsyncOpenAI(api_key=KEY, base_url=server.base_url, rate_limit=shared) as second,
        ):
            await first.generate_response("hello")
            await ask(second)
            await ask(second.with_options(timeout=5))
            assert first.stats.wait_seconds < 0.5
            assert second.stats.wait_seconds > 0.5


def test_threads_and_loops_share_one_way(redis_server) -> None:
    """One client in three threads, each with an event loop of its own, twice."""
    with redis_server.client() as redis:
        redis.flushall()
    with SimulatedServer() as server:
        client = OpenAIClient(config(server.base_url), rate_limit=limits(redis_server.url, 60_000))
        counts: list[int] = []

        def work() -> None:
            counts.extend(len(asyncio.run(client.batch_generate(["hello"] * 10))) for _ in range(2))

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        asyncio.run(client.close())
    assert counts == [10] * 6


def _generate(client: OpenAIClient, base_url: str, outcomes) -> None:
    response = asyncio.run(client.generate_response("hello"))
    outcomes.put((response.content, client._account.limiter._backend.generation))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_asks_for_itself(redis_server) -> None:
    """On a connection and a thread of its own; the parent's go on."""
    context = multiprocessing.get_context("fork")
    with SimulatedServer(process=True) as server:
        client = OpenAIClient(config(server.base_url), rate_limit=limits(redis_server.url, 6000))
        assert asyncio.run(client.generate_response("hello")).content == "echo: hello"
        outcomes = context.Queue()
        child = context.Process(target=_generate, args=(client, server.base_url, outcomes))
        child.start()
        assert outcomes.get(timeout=20) == ("echo: hello", 1)
        child.join()
        assert asyncio.run(client.generate_response("again")).content == "echo: again"
        asyncio.run(client.close())


def test_a_fork_waits_for_a_reply_that_is_being_heard(redis_server) -> None:
    """The child could not leave the region that the parent's thread is in."""
    context = multiprocessing.get_context("fork")
    with SimulatedServer(process=True) as server:
        client = OpenAIClient(config(server.base_url), rate_limit=limits(redis_server.url, 6000))
        assert asyncio.run(client.generate_response("hello")).content == "echo: hello"
        inside = threading.Event()

        def hear(_: object) -> None:
            with client._account._lock:
                inside.set()
                time.sleep(0.2)

        client._account.limiter._backend.ask("another", {}, hear)
        assert inside.wait(5)
        outcomes = context.Queue()
        child = context.Process(target=_generate, args=(client, server.base_url, outcomes), daemon=True)
        child.start()
        assert outcomes.get(timeout=10)[0] == "echo: hello"
        child.join()
        asyncio.run(client.close())


def test_workers_are_counted_and_leave(redis_server) -> None:
    """Who closes the client is not waited for."""
    with redis_server.client() as redis:
        redis.flushall()

        async def run() -> list[int]:
            counts = []
            with SimulatedServer() as server:
                clients = [
                    OpenAIClient(config(server.base_url), rate_limit=limits(redis_server.url))
                    for _ in range(3)
                ]
                for client in clients:
                    await client.generate_response("hello")
                counts.append(clients[-1]._account.limiter._backend.workers)
                first, second, _ = clients
                await asyncio.gather(first.close(), second.close())
                first._account.limiter._backend._thread.shutdown()  # until all is told
                second._account.limiter._backend._thread.shutdown()
                await clients[2].generate_response("hello")
                counts.append(clients[-1]._account.limiter._backend.workers)
                await clients[2].close()
            return counts

        assert asyncio.run(run()) == [3, 1]


async def test_a_unix_socket_serves_too(redis_server) -> None:
    """The address of one machine."""
    with SimulatedServer() as server:
        async with OpenAIClient(
            config(server.base_url), rate_limit=limits(f"unix://{redis_server.socket}")
        ) as client:
            assert (await client.generate_response("hello")).content == "echo: hello"


async def test_a_script_that_was_flushed_is_loaded_again(redis_server) -> None:
    """As after a failover: nothing is lost."""
    with SimulatedServer() as server, redis_server.client() as redis:
        async with OpenAIClient(config(server.base_url), rate_limit=limits(redis_server.url)) as client:
            await client.generate_response("hello")
            redis.script_flush()
            await client.generate_response("hello")
            assert client._account.limiter._backend.workers


def test_what_a_worker_says_is_plain_json(redis_server) -> None:
    """Numbers, names of fields and nothing of the prompt; unknown numbers never appear."""
    from openai_eval_client._limits.shared import PendingUpdates

    pending = PendingUpdates()
    pending.add("credit", 0, 5)
    pending.pause(12.0)
    assert json.loads(json.dumps(pending.told(10.0), allow_nan=False)) == {"credit": [0, 5], "pause": 2}
    assert not dataclasses.is_dataclass(pending)
