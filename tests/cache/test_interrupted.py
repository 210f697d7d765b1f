"""A call that was interrupted and is made again in the same client: what was answered is not paid again."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from typing import TYPE_CHECKING

import pytest
from clients import WIDE, no_slot_is_taken

from openai_eval_client import OpenAIClient, OpenAIConfig, PartialFailureError
from openai_eval_client._cache.cache import Occurrences
from openai_eval_client.testing import SimulatedServer

if TYPE_CHECKING:
    from pathlib import Path

PROMPTS = [f"prompt {n}" for n in range(20)]


def numbered():
    """An answer that is never the same twice."""
    count = itertools.count()
    return lambda body: f"{body['messages'][-1]['content']} #{next(count)}"


async def cancelled(client: OpenAIClient) -> None:
    halfway = asyncio.Event()
    call = client.batch_generate(
        PROMPTS, temperature=1, progress_callback=lambda share: share < 0.5 or halfway.set(), max_concurrent=4
    )
    task = asyncio.ensure_future(call)
    await asyncio.wait_for(halfway.wait(), 20)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def left(client: OpenAIClient) -> None:
    stream = client.as_completed(PROMPTS, temperature=1, max_concurrent=4)
    async with contextlib.aclosing(stream):
        async for index, _ in stream:
            if index >= 10:
                break


async def stopped(client: OpenAIClient) -> None:
    stop = asyncio.Event()
    async for index, _ in client.as_completed(PROMPTS, temperature=1, max_concurrent=4, stop_event=stop):
        if index >= 10:
            stop.set()


async def failed(client: OpenAIClient) -> None:
    with pytest.raises(PartialFailureError):
        await client.batch_generate([*PROMPTS, [{"role": "user", "content": "bad"}]], temperature=1)


@pytest.mark.parametrize("interrupt", [cancelled, left, stopped, failed])
async def test_it_finds_its_answers(tmp_path: Path, interrupt) -> None:
    """Every answer that came is asked for once; a call after one that ended well samples anew."""
    script = [("bad", "invalid_prompt")]
    with SimulatedServer(answer=numbered(), latency=0.01, script=script) as server:
        config = OpenAIConfig(api_key="sk-1", base_url=server.base_url, default_model="gpt-4o-mini")
        client = OpenAIClient(config, rate_limit=WIDE, cache=tmp_path / "kept.sqlite")
        await interrupt(client)
        before = client.stats.cache_writes
        assert before >= 10
        answers = await client.batch_generate(PROMPTS, temperature=1)
        assert sum(answer.cached for answer in answers) >= before
        assert len({answer.content for answer in answers}) == len(PROMPTS)
        again = await client.batch_generate(PROMPTS, temperature=1)  # another epoch
        assert not any(answer.cached for answer in again)
        assert no_slot_is_taken(client)
        await client.close()


def test_numbers_of_an_interrupted_call_are_given_once_more() -> None:
    """Those that had failed, and been given back already, are not given twice."""
    numbers, first, second = Occurrences(), object(), object()
    digest = b"a" * 32
    with contextlib.suppress(ZeroDivisionError), numbers.of_call(first):
        assert [numbers.take(digest, first) for _ in range(4)] == [0, 1, 2, 3]
        numbers.give_back(digest, 2, first)
        assert numbers.take(digest, first) == 4
        raise ZeroDivisionError
    with numbers.of_call(second):
        assert [numbers.take(digest, second) for _ in range(7)] == [0, 1, 2, 3, 4, 5, 6]
    assert numbers.take(digest, object()) == 7
    assert not numbers._taken
