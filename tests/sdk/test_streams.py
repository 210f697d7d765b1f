"""Streams of the drop-in that nobody reads to their end: each gives back what it held, whoever drops it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from typing import TYPE_CHECKING

import openai
import pytest
from clients import KEY

from openai_eval_client import AsyncOpenAI, RateLimitConfig
from openai_eval_client.testing import SimulatedServer

if TYPE_CHECKING:
    from collections.abc import Iterator

SLOTS = 10
NARROW = RateLimitConfig(requests_per_minute=None, tokens_per_minute=None, max_concurrent=SLOTS)
CHAT = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "count to a hundred " * 20}]}


@pytest.fixture(scope="module")
def server() -> Iterator[SimulatedServer]:
    with SimulatedServer(process=True) as running:
        yield running


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Python's collector stands still: what is freed is freed because nobody holds it."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def paced(server: SimulatedServer) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=server.base_url, api_key=KEY, rate_limit=NARROW, max_retries=0)


def in_flight(client: AsyncOpenAI) -> int:
    queues = client._account.limiter._queues.values()
    open_ones = sum(map(len, client._account._open.values()))
    assert sum(queue.concurrency.in_flight for queue in queues) == open_ones
    return open_ones


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def leave_chat(client: openai.AsyncOpenAI) -> None:
    async for _ in await client.chat.completions.create(**CHAT, stream=True):
        break


async def leave_response(client: openai.AsyncOpenAI) -> None:
    async for _ in await client.responses.create(model="gpt-4o-mini", input="hello", stream=True):
        break


async def read_one(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(**CHAT, stream=True)
    await stream.__anext__()


async def read_nothing(client: openai.AsyncOpenAI) -> None:
    await client.chat.completions.create(**CHAT, stream=True)


async def leave_raw(client: openai.AsyncOpenAI) -> None:
    raw = await client.chat.completions.with_raw_response.create(**CHAT, stream=True)
    async for _ in raw.parse():
        break


async def fail_halfway(client: openai.AsyncOpenAI) -> None:
    with contextlib.suppress(ZeroDivisionError):
        async for _ in await client.chat.completions.create(**CHAT, stream=True):
            raise ZeroDivisionError


DROPS = [leave_chat, leave_response, read_one, read_nothing, leave_raw, fail_halfway]


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("drop", DROPS)
async def test_a_dropped_stream_gives_its_slot_back_at_once(server: SimulatedServer, drop) -> None:
    """Round after round takes all slots, and the collector does nothing."""
    async with paced(server) as client:
        for _ in range(4):
            await asyncio.wait_for(asyncio.gather(*[drop(client) for _ in range(SLOTS)]), 20)
        await turns()
        assert in_flight(client) == 0
        assert client.stats.cost.unaccounted == 4 * SLOTS  # it may be billed to its end


@pytest.mark.usefixtures("no_collector")
async def test_a_stream_can_be_left_and_read_on(server: SimulatedServer) -> None:
    """As with the SDK: only who drops it has done with it."""
    async with paced(server) as client:
        stream = await client.chat.completions.create(**CHAT, stream=True)
        assert isinstance(stream, openai.AsyncStream)
        first = await anext(aiter(stream))
        await turns()
        assert in_flight(client) == 1
        rest = [chunk async for chunk in stream]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in [first, *rest] if chunk.choices)
        assert text.startswith("echo: count to a hundred")
        assert in_flight(client) == 0
        assert stream.response.elapsed.total_seconds() > 0


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("opens", [True, False])
@pytest.mark.parametrize("end", [asyncio.CancelledError, ZeroDivisionError])
async def test_readers_that_end_give_back_then(server: SimulatedServer, end: type, opens: bool) -> None:
    """Not when somebody lets go of the tasks, whose tracebacks hold the streams."""
    begun = asyncio.Semaphore(0)

    async def read(client: AsyncOpenAI) -> None:
        opening = client.chat.completions.create(**CHAT, stream=True)
        stream = await (opening if opens else asyncio.create_task(opening))
        async for _ in stream:
            begun.release()
            if end is asyncio.CancelledError:
                await asyncio.Event().wait()
            raise end

    async with paced(server) as client:
        tasks = []
        for _ in range(3):
            some = [asyncio.ensure_future(read(client)) for _ in range(SLOTS)]
            for _ in some:
                await asyncio.wait_for(begun.acquire(), 10)
            for task in some:
                task.cancel()
            await asyncio.wait(some)
            tasks += some
        assert in_flight(client) == 0
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(error) for error in ended] == [end] * 3 * SLOTS


@pytest.mark.parametrize("drop", [leave_chat, read_nothing, leave_raw])
async def test_another_client_on_our_http_client_does_not_hang(server: SimulatedServer, drop) -> None:
    """The SDK's own streams go round in circles: the collector is called while all slots are theirs."""
    async with paced(server) as client:
        plain = openai.AsyncOpenAI(
            base_url=server.base_url, api_key=KEY, http_client=client._client, max_retries=0
        )
        gc.disable()  # no request is on its way that would have it run
        try:
            for _ in range(3):
                await asyncio.wait_for(asyncio.gather(*[drop(plain) for _ in range(SLOTS)]), 20)
        finally:
            gc.enable()
        gc.collect()
        await turns()
        assert in_flight(client) == 0


async def test_one_that_is_held_unread_is_not_taken_away(server: SimulatedServer) -> None:
    """It keeps its slot, and who waits for it goes on when it is closed."""
    async with paced(server) as client:
        held = [await client.chat.completions.create(**CHAT, stream=True) for _ in range(SLOTS)]
        waiting = asyncio.ensure_future(client.chat.completions.create(**CHAT))
        done, _ = await asyncio.wait({waiting}, timeout=1.2)  # two looks at what could be reclaimed
        assert not done
        await held.pop().close()
        assert (await asyncio.wait_for(waiting, 10)).choices
        for stream in held:
            assert [chunk async for chunk in stream]
