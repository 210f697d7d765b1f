"""The way to Redis: its configuration, its failures, what is stored there, forks and threads."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import pickle
import sys
import threading
import time

import pydantic
import pytest

from openai_eval_client import AsyncOpenAI, OpenAIClient, OpenAIConfig, RateLimitConfig, ValidationError
from openai_eval_client._runtime import STATE_LOCK
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
def test_a_wrong_url_is_named(url: str) -> None:
    """The error names field and value, as of any field."""
    with pytest.raises(
        pydantic.ValidationError, match=r"redis_url='.*must be a URL that starts with redis://"
    ):
        limits(url)


@pytest.mark.parametrize("url", [5, True, b"redis://h", ["redis://h"]])
def test_a_url_must_be_a_string(url: object) -> None:
    """Any other type is refused."""
    with pytest.raises(pydantic.ValidationError, match="redis_url="):
        limits(url)


@pytest.mark.parametrize("namespace", ["", "a b", "{a}", 5, None])
def test_a_namespace_fits_into_a_key(namespace: object) -> None:
    """It holds nothing that has a meaning in the name of a key."""
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
    """It stands anywhere in a URL that is wrong."""
    assert SECRET not in str(without_password(url))
    with pytest.raises(pydantic.ValidationError) as caught:
        limits(url)
    assert SECRET not in f"{caught.value} {caught.value!r} {caught.value.errors()}"


def test_a_config_shows_no_password() -> None:
    """Neither its repr nor a dump has it; a pickled config keeps it, for worker processes."""
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
    """The rest of the URL is shown."""
    assert without_password(url) == shown


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error comes as soon as a client is made."""
    monkeypatch.setitem(sys.modules, "redis", None)
    monkeypatch.delitem(sys.modules, "openai_eval_client._limits.shared", raising=False)
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


async def test_the_drop_in_client_sends_nothing_either() -> None:
    """The error comes at once, without the SDK's retries."""
    async with AsyncOpenAI(api_key="k", base_url="http://127.0.0.1:1/v1", rate_limit=limits(GONE)) as client:
        with pytest.raises(ValidationError, match="redis_url="):
            await ask(client)


async def ask(client: AsyncOpenAI):
    return await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hello"}])


async def test_a_wrong_password_is_reported_and_not_shown(redis_with_password) -> None:
    """Redis answers, and the error names why it cannot be used."""
    url = redis_with_password.url.replace(redis_with_password.password, SECRET)
    async with OpenAIClient(config(), rate_limit=limits(url)) as client:
        with pytest.raises(
            ValidationError, match="no Redis can be used there: AuthenticationError"
        ) as caught:
            await client.generate_response("hello")
    assert SECRET not in str(caught.value)


async def test_the_right_password_is_accepted(redis_with_password) -> None:
    """The request is answered."""
    with SimulatedServer() as server:
        async with OpenAIClient(
            config(server.base_url), rate_limit=limits(redis_with_password.url)
        ) as client:
            assert (await client.generate_response("hello")).content == "echo: hello"


async def test_a_cluster_that_is_gone_is_an_error() -> None:
    """Its errors are no RedisError, and yet no request waits for ever."""
    async with moved() as url, OpenAIClient(config(), rate_limit=limits(url)) as client:
        with pytest.raises(ValidationError, match="RedisClusterException"):
            await asyncio.wait_for(client.generate_response("hello"), 10)


@contextlib.asynccontextmanager
async def moved():
    """Serve as a cluster's node that names another one, and is gone with it."""
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


# --- a real Redis -------------------------------------------------------------------------------------------


async def test_no_key_reaches_redis(redis_server) -> None:
    """Neither the names nor the values there have it; and other accounts have limits of their own."""
    with redis_server.client() as redis:
        redis.flushall()
        with SimulatedServer() as server:
            for key in (KEY, KEY[::-1]):
                async with OpenAIClient(
                    config(server.base_url, key), rate_limit=limits(redis_server.url)
                ) as client:
                    await client.generate_response("a private prompt")
                    held = {name: redis.dump(name) for name in redis.scan_iter()}
        assert len({name.partition(b"}")[0] for name in held}) == 2
        shown = repr(held)
    assert KEY not in shown
    assert KEY[::-1] not in shown
    assert "private" not in shown


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


def test_threads_and_loops_share_one_connection(redis_server) -> None:
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
def test_a_forked_child_is_another_worker(redis_server) -> None:
    """It has a connection and a thread of its own; the parent's go on."""
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


def test_a_fork_waits_for_a_reply_that_is_being_taken(redis_server) -> None:
    """The child could not release the lock that the parent's thread holds."""
    context = multiprocessing.get_context("fork")
    with SimulatedServer(process=True) as server:
        client = OpenAIClient(config(server.base_url), rate_limit=limits(redis_server.url, 6000))
        assert asyncio.run(client.generate_response("hello")).content == "echo: hello"
        inside = threading.Event()

        def take(_: object) -> None:
            with STATE_LOCK:
                inside.set()
                time.sleep(0.2)

        client._account.limiter._backend.ask("another", {}, take)
        assert inside.wait(5)
        outcomes = context.Queue()
        child = context.Process(target=_generate, args=(client, server.base_url, outcomes), daemon=True)
        child.start()
        assert outcomes.get(timeout=10)[0] == "echo: hello"
        child.join()
        asyncio.run(client.close())


def test_workers_are_counted_and_leave(redis_server) -> None:
    """A worker whose client is closed counts no more."""
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
                first._account.limiter._backend._thread.shutdown()  # until all messages are sent
                second._account.limiter._backend._thread.shutdown()
                await clients[2].generate_response("hello")
                counts.append(clients[-1]._account.limiter._backend.workers)
                await clients[2].close()
            return counts

        assert asyncio.run(run()) == [3, 1]


async def test_a_unix_socket_serves_too(redis_server) -> None:
    """A unix:// URL is an address on one machine."""
    with SimulatedServer() as server:
        async with OpenAIClient(
            config(server.base_url), rate_limit=limits(f"unix://{redis_server.socket}")
        ) as client:
            assert (await client.generate_response("hello")).content == "echo: hello"


async def test_a_script_that_was_flushed_is_loaded_again(redis_server) -> None:
    """This happens after a failover; nothing is lost."""
    with SimulatedServer() as server, redis_server.client() as redis:
        async with OpenAIClient(config(server.base_url), rate_limit=limits(redis_server.url)) as client:
            await client.generate_response("hello")
            redis.script_flush()
            await client.generate_response("hello")
            assert client._account.limiter._backend.workers
