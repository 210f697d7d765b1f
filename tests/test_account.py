"""One account: what its attempts wait for, and what its statistics say of that."""

from __future__ import annotations

import asyncio
import gc
import threading

import pytest
from virtual import VirtualLoop

from openai_eval_client import RateLimitConfig
from openai_eval_client._account import Account, Attempt
from openai_eval_client._limits.queue import ConcurrencyLimit
from openai_eval_client._runtime import STATE_LOCK
from openai_eval_client._wire.failures import NOT_SENT, Outcome, refused
from openai_eval_client._wire.requests import Demand
from openai_eval_client._wire.usage import Usage


def in_virtual_time(scenario, config: RateLimitConfig | None) -> Account:
    """Run `scenario(account, loop)` on a virtual loop."""
    loop = VirtualLoop()
    account = Account(config, clock=loop)
    try:
        loop.run_until_complete(scenario(account, loop))
    finally:
        loop.close()
    return account


FIXED = {"max_concurrent": 1000, "adaptive_throttling": False}


def limits(rpm: int | None = None, tpm: int | None = None, **options: object) -> RateLimitConfig:
    return RateLimitConfig(requests_per_minute=rpm, tokens_per_minute=tpm, **{**FIXED, **options})


DEMAND = Demand("m", 100, 0)
OK = Outcome(200, {}, Usage(100, 0))


async def send(account: Account, demand: Demand = DEMAND, outcome: Outcome = OK) -> None:
    (await account.attempt(demand).begin()).settle(outcome)


def test_settling_twice_frees_one_slot() -> None:
    """An attempt counts once, whatever happens to it."""

    async def scenario(account: Account, loop: VirtualLoop) -> None:
        permit = await account.attempt(DEMAND).begin()
        await account.attempt(DEMAND).begin()
        permit.settle(OK)
        permit.settle(OK)
        await account.attempt(DEMAND).begin()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(account.attempt(DEMAND).begin(), 5)
        assert account.stats.attempts == 1

    in_virtual_time(scenario, limits(max_concurrent=2))


@pytest.mark.parametrize("headers", [{"retry-after": "3"}, {"retry-after-ms": "3000", "retry-after": "9"}])
def test_a_429_pauses_the_whole_model_and_no_other(headers: dict[str, str]) -> None:
    """No request of that model goes before the server's time; another model does not notice."""

    async def scenario(account: Account, loop: VirtualLoop) -> None:
        await send(account, outcome=refused(429, headers))
        await send(account, Demand("other", 1, 0))
        assert loop.time() == 0
        await send(account)
        assert loop.time() == pytest.approx(3, abs=0.02)

    assert in_virtual_time(scenario, limits(600)).stats.rate_limited == 1


# --- real loops and threads ------------------------------------------------------------------------------

FAST = limits(60_000, burst_seconds=0.005)  # one request a millisecond, five at once


def in_thread(work) -> threading.Thread:
    thread = threading.Thread(target=lambda: asyncio.run(work()))
    thread.start()
    return thread


def test_eight_threads_with_their_own_loops_share_one_quota() -> None:
    """All are admitted, never more than the bound at once, and nothing is attached to the wrong loop."""
    account = Account(limits(60_000, burst_seconds=0.005, max_concurrent=3))
    running, most = 0, 0
    lock = threading.Lock()

    async def one() -> None:
        nonlocal running, most
        permit = await account.attempt(DEMAND).begin()
        with lock:
            running += 1
            most = max(most, running)
        await asyncio.sleep(0)
        with lock:
            running -= 1
        permit.settle(OK)

    async def many() -> None:
        await asyncio.gather(*[one() for _ in range(100)])

    threads = [in_thread(many) for _ in range(8)]
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert most <= 3
    assert account.stats.attempts == 800


def test_a_loop_that_is_closed_without_ceremony_does_not_block_the_others() -> None:
    """Waiters of a loop that was just dropped are passed over, with their slots."""
    account = Account(limits(max_concurrent=1))
    loop = asyncio.new_event_loop()
    held = loop.run_until_complete(account.attempt(DEMAND).begin())
    waiter = loop.create_task(account.attempt(DEMAND).begin())
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()

    async def later(held: Attempt) -> None:
        held.settle(OK)
        await asyncio.wait_for(send(account), 10)

    asyncio.run(later(held))
    assert account.stats.attempts == 2
    waiter._log_destroy_pending = False  # its loop is gone on purpose
    del waiter, held
    gc.collect()


def test_one_account_outlives_many_event_loops() -> None:
    """Successive `asyncio.run`s share one quota and leave no timer of a closed loop behind."""
    account = Account(FAST)

    async def some() -> None:
        await asyncio.gather(*[send(account) for _ in range(20)])

    for _ in range(20):
        asyncio.run(some())
    assert account.stats.attempts == 400
    assert len(account.limiter._timers) <= 1


def test_waits_are_told_apart_by_their_cause() -> None:
    """Seconds of waiting for requests, tokens, a free slot and a pause add up to all there were."""

    async def scenario(account: Account, loop: VirtualLoop) -> None:
        await asyncio.gather(*[send(account, Demand("by requests", 1, 0)) for _ in range(61)])
        large = Outcome(200, {}, Usage(5000, 0))
        await asyncio.gather(*[send(account, Demand("by tokens", 5000, 0), large) for _ in range(2)])
        held = await account.attempt(
            Demand("by slot"), concurrency=(concurrency := ConcurrencyLimit(1))
        ).begin()
        loop.call_later(3, held.settle, OK)
        (await account.attempt(Demand("by slot"), concurrency=concurrency).begin()).settle(OK)
        await send(account, Demand("by pause"), refused(429, {"retry-after": "4"}, (b"on tokens per min")))
        await send(account, Demand("by pause"))

    account = in_virtual_time(scenario, limits(60, 6000))
    stats = account.stats
    assert stats.wait_seconds_by == pytest.approx(
        {
            "requests": 1.5,  # 59 at once; the 60th and 61st after 0.25 and 1.25 s
            "tokens": 40.25,  # the second has to wait until 10,000 - 5,975 tokens have come back
            "concurrency": 3,
            "pause": 4,
        },
        abs=0.1,
    )
    assert sum(stats.wait_seconds_by.values()) == pytest.approx(stats.wait_seconds, abs=0.1)
    assert stats.rate_limited_by == {"tokens": 1}


def test_the_share_used_is_of_what_bucket_and_refill_admit() -> None:
    """A full bucket of 59.75 and a minute's refill admit 119.75 requests: 60 sent are half."""

    async def scenario(account: Account, loop: VirtualLoop) -> None:
        await asyncio.gather(*[send(account) for _ in range(30)])
        await asyncio.sleep(60)
        await asyncio.gather(*[send(account) for _ in range(30)])
        share = account.stats.utilisation["m"]["requests"]
        assert share == pytest.approx(60 / 119.75, rel=0.01)

    in_virtual_time(scenario, limits(60))


def test_what_the_collector_hands_back_inside_a_locked_region_waits_until_it_is_left() -> None:
    """A stream that is collected while its own thread admits another neither deadlocks nor overtakes."""

    async def scenario(account: Account, loop: VirtualLoop) -> None:
        dropped = [await account.attempt(DEMAND).begin() for _ in range(2)]
        waiting = [asyncio.create_task(account.attempt(DEMAND).begin()) for _ in range(3)]
        await asyncio.sleep(0)
        with STATE_LOCK:
            for permit in dropped:
                permit.settle(OK)  # as __del__ would
            assert not any(task.done() for task in waiting)
            assert account.recorder.snapshot().attempts == 0
        assert account.recorder.snapshot().attempts == 2
        for _ in range(3):
            (done,), _ = await asyncio.wait(waiting[:1])
            done.result().settle(OK)
            waiting.pop(0)

    assert in_virtual_time(scenario, limits(max_concurrent=2)).stats.attempts == 5


def test_a_request_that_was_never_sent_spends_nothing() -> None:
    """No server was there: the next one has the whole quota."""

    async def scenario(account: Account, loop: VirtualLoop) -> None:
        for _ in range(50):
            await send(account, Demand("m", 500, 0), NOT_SENT)
        assert loop.time() == 0

    assert in_virtual_time(scenario, limits(60, 600)).stats.attempts == 0


def test_the_time_until_one_begins_is_waiting_and_not_the_servers() -> None:
    """Although it was admitted at once."""

    async def scenario(account: Account, loop: VirtualLoop) -> None:
        async def one() -> None:
            permit = await account.attempt(DEMAND).begin()
            loop.jump.slept += 0.5  # what it takes to begin
            permit.settle(OK)

        await asyncio.gather(*[one() for _ in range(40)])

    stats = in_virtual_time(scenario, limits()).stats
    assert stats.server_seconds == pytest.approx(40 * 0.5)
    # the last eight asked in the first turn too
    assert stats.wait_seconds == pytest.approx(0.5 * sum(range(8)))
