"""Limits shared by many workers, in virtual time and with the real script in a real Redis."""

from __future__ import annotations

import asyncio
import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_quota import Fleet, VirtualBackend, VirtualRedis
from virtual import VirtualLoop, VirtualServer

from openai_eval_client import RateLimitConfig, RateLimitError
from openai_eval_client._account import Account
from openai_eval_client._limits.shared import PendingUpdates
from openai_eval_client._wire.failures import Outcome, refused
from openai_eval_client._wire.requests import Demand
from openai_eval_client._wire.usage import Usage


def limits(rpm: int | None, tpm: int | None = None, **options: object) -> RateLimitConfig:
    return RateLimitConfig(requests_per_minute=rpm, tokens_per_minute=tpm, **options)


@pytest.fixture
def virtual(redis_server):
    """Make fleets on the virtual clock and the real Redis."""
    client = redis_server.client()
    loop = VirtualLoop()

    def fleet(configs, *, server=None, **options):
        server = server or VirtualServer(1800, 480_000, window=5)
        return Fleet(VirtualRedis(client, loop), server, configs, **options)

    yield fleet
    loop.close()
    client.close()


def config(factor: float = 1, **options: object) -> RateLimitConfig:
    rpm, tpm = int(1800 * factor), int(480_000 * factor)
    return RateLimitConfig(
        requests_per_minute=rpm, tokens_per_minute=tpm, max_concurrent=64, **{"burst_seconds": 5, **options}
    )


CASES = {
    "limits right": ([1] * 4, {}, 1.03, 0),
    "stamped at admission": ([1] * 4, {"stamp": "admission"}, 1.03, 0),
    "4x too high": ([4] * 4, {}, 1.03, 0.005),
    "4x too high, stamped at admission": ([4] * 4, {"stamp": "admission"}, 1.03, 0.005),
    "4x too high, no headers": ([4] * 4, {"headers": False}, 1.05, 0.05),
    "limits differ, no headers": ([1, 1, 2, 4], {"headers": False}, 1.03, 0),
    "one worker": ([1], {}, 1.03, 0),
}


@pytest.mark.parametrize("seed", [0, 2, 4])
@pytest.mark.parametrize("case", CASES)
def test_workers_use_one_quota_whole_and_fairly(virtual, case: str, seed: int) -> None:
    """Near the least possible time, few or no refusals, equal parts, at most one message a request."""
    factors, options, ratio, refused = CASES[case]
    count = 600 // len(factors)
    server = VirtualServer(1800, 480_000, window=5, seed=seed, **options)
    fleet = virtual([config(factor) for factor in factors], server=server).run(count)
    assert fleet.answered == [count] * len(factors)
    assert fleet.ratio <= ratio
    assert server.refused <= refused * 600
    assert fleet.redis.asked <= len(fleet.sent)
    half = [worker for _, worker in fleet.sent[: len(fleet.sent) // 2]]
    assert min(map(half.count, range(len(factors)))) >= 0.6 * len(half) / len(factors)


def test_workers_learn_the_limits_together(virtual) -> None:
    """Nothing is configured: what the headers state to one worker holds for all."""
    open_limits = RateLimitConfig(requests_per_minute=None, tokens_per_minute=None, max_concurrent=16)
    server = VirtualServer(1800, 480_000, window=5)
    fleet = virtual([open_limits] * 4, server=server, in_flight=16).run(150)
    assert fleet.answered == [150] * 4
    assert fleet.ratio <= 1.05
    assert server.refused <= 12


def test_without_headers_refusals_slow_all_workers_down(virtual) -> None:
    """Without limits and headers the refusals alone teach: the shared rate is cut, and recovers."""
    open_limits = RateLimitConfig(requests_per_minute=None, tokens_per_minute=None, max_concurrent=16)
    server = VirtualServer(1800, 480_000, window=5, headers=False)
    fleet = virtual([open_limits] * 4, server=server, in_flight=16).run(150)
    assert fleet.answered == [150] * 4
    assert server.refused <= 60


def test_a_killed_worker_holds_nothing(virtual) -> None:
    """It is gone without a message in the middle of the run; the others use its part at once."""

    async def kill(fleet) -> None:
        await asyncio.sleep(8)
        fleet.accounts[0].limiter._backend.ask = lambda *_: None  # its last message is lost
        fleet.tasks[0].cancel()

    fleet = virtual([config()] * 4).run(150, kill)
    assert fleet.answered[1:] == [150] * 3
    later = [at for at, _ in fleet.sent if 9 <= at < 19]
    assert len(later) >= 0.95 * 200
    assert fleet.server.refused == 0


@pytest.mark.parametrize("factor", [1, 4])
@pytest.mark.parametrize("window", [5, 60])
def test_redis_may_be_lost_and_come_back_empty(virtual, factor: int, window: int) -> None:
    """Each worker goes on with its part meanwhile; the new, empty Redis allows no burst."""

    async def outage(fleet) -> None:
        await asyncio.sleep(8)
        fleet.redis.down = True
        await asyncio.sleep(5)
        fleet.redis.flush()
        fleet.redis.down = False

    server = VirtualServer(1800, 480_000, window=window)
    count = 150 if window == 5 else 480  # all still ask when Redis is tried again: up to 5 s after it is back
    fleet = virtual([config(factor, burst_seconds=window)] * 4, server=server).run(count, outage)
    assert fleet.answered == [count] * 4
    assert server.refused <= 0.05 * 4 * count
    assert fleet.ratio <= 1.10
    during = [at for at, _ in fleet.sent if 8.5 <= at < 13]
    assert len(during) >= 0.8 * 4.5 * 20
    assert sum(at >= 14 for at, _ in fleet.sent) > 100
    assert not any(account.limiter._queues["m"]._alone for account in fleet.accounts)


def test_an_emptied_redis_is_no_full_bucket(virtual) -> None:
    """All keys are gone between two messages, and no worker noticed an outage."""

    async def flush(fleet) -> None:
        await asyncio.sleep(5)
        fleet.redis.flush()

    server = VirtualServer(1800, 480_000, window=5, headers=False)
    fleet = virtual([config()] * 4, server=server).run(100, flush)
    assert fleet.answered == [100] * 4
    assert server.refused == 0


def test_the_lowest_limit_holds_while_its_worker_lives(virtual) -> None:
    """One worker configures a quarter of the limit; when that one is done, the others speed up."""

    async def leave(fleet) -> None:
        await asyncio.sleep(20)
        fleet.tasks[0].cancel()

    fleet = virtual([config(0.25), config(), config()]).run(300, leave)
    slow = [at for at, _ in fleet.sent if 10 <= at < 20]
    fast = [at for at, _ in fleet.sent if 32 <= at < 42]
    assert len(slow) <= 52
    assert len(fast) >= 180


def in_virtual_time(virtual, scenario, *configs: RateLimitConfig) -> None:
    """Run `scenario(loop, accounts)` with one account for each config, on one Redis."""
    fleet = virtual(configs)
    loop = fleet.redis.loop
    accounts = []
    for given_limits in configs:
        account = Account(given_limits, clock=loop)
        account.limiter._backend = VirtualBackend(fleet.redis)
        accounts.append(account)
    loop.run_until_complete(scenario(loop, accounts))


DEMAND = Demand("m", 100, 0)
FIXED = {"adaptive_throttling": False, "burst_seconds": 60}


def test_a_pause_holds_for_all(virtual) -> None:
    """A 429 of one worker stops the others."""

    async def scenario(loop, accounts) -> None:
        first, second = accounts
        await second.attempt(DEMAND).begin()
        (await first.attempt(DEMAND).begin()).settle(refused(429, {"retry-after": "7"}))
        await asyncio.sleep(0.1)
        began = loop.time()
        await second.attempt(DEMAND).begin()
        assert 6.5 <= loop.time() - began <= 7.5

    in_virtual_time(virtual, scenario, limits(600), limits(600))


def test_a_pause_longer_than_max_wait_ends_the_waiting_of_all(virtual) -> None:
    """Also of a worker that was not refused itself."""

    async def scenario(loop, accounts) -> None:
        first, second = accounts
        await second.attempt(DEMAND).begin()
        (await first.attempt(DEMAND).begin()).settle(refused(429, {"retry-after": "3600"}))
        await asyncio.sleep(0.1)
        with pytest.raises(RateLimitError, match="max_wait"):
            await second.attempt(DEMAND).begin()

    in_virtual_time(virtual, scenario, limits(600), limits(600))


def test_a_debt_of_one_worker_is_a_debt_of_all(virtual) -> None:
    """An answer that was 500 tokens longer than reserved is waited for by the other worker."""

    async def scenario(loop, accounts) -> None:
        first, second = accounts
        permit = await first.attempt(Demand("m", 500, 0)).begin()
        permit.settle(Outcome(200, {}, Usage(1000, 0)))
        await asyncio.sleep(2)
        await first.attempt(Demand("m", 10, 0)).begin()  # its message reports the debt
        await second.attempt(Demand("m", 100, 0)).begin()
        assert loop.time() == pytest.approx(51, abs=1)

    in_virtual_time(virtual, scenario, limits(None, 600, **FIXED), limits(None, 600, **FIXED))


def test_an_overestimate_is_given_back_to_all(virtual) -> None:
    """Nothing was used of what one worker had reserved: the other may use it at once."""

    async def scenario(loop, accounts) -> None:
        first, second = accounts
        (await first.attempt(Demand("m", 550, 0)).begin()).settle(Outcome(200, {}, Usage(0, 0)))
        await asyncio.sleep(2)
        await first.attempt(Demand("m", 10, 0)).begin()
        began = loop.time()
        await second.attempt(Demand("m", 500, 0)).begin()
        assert loop.time() - began < 0.1

    in_virtual_time(virtual, scenario, limits(None, 600, **FIXED), limits(None, 600, **FIXED))


def test_a_cancelled_waiter_gives_its_position_back(virtual) -> None:
    """What it had reserved is left for the others."""

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

    in_virtual_time(virtual, scenario, limits(None, 600, **FIXED), limits(None, 600, **FIXED))


def test_a_waiter_cancelled_before_the_reply_gives_its_position_back_too(virtual) -> None:
    """What was reserved for it goes back with the next message."""

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

    in_virtual_time(virtual, scenario, limits(None, 600, **FIXED))


def test_first_come_first_served_within_a_worker(virtual) -> None:
    """A long prompt is not overtaken by the short ones behind it."""
    order: list[int] = []

    async def scenario(loop, accounts) -> None:
        async def one(number: int, tokens: int) -> None:
            await accounts[0].attempt(Demand("m", tokens, 0)).begin()
            order.append(number)

        sizes = [500, 90, 500, 1, 1]
        await asyncio.gather(*[one(number, tokens) for number, tokens in enumerate(sizes)])

    in_virtual_time(virtual, scenario, limits(None, 600, **FIXED))
    assert order == [0, 1, 2, 3, 4]


def test_a_clock_that_is_set_back_stops_no_worker(virtual) -> None:
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

    in_virtual_time(virtual, scenario, limits(None, 600, **FIXED))


def test_a_request_larger_than_the_bucket_goes_when_it_is_full(virtual) -> None:
    """Those behind it wait for the debt."""

    async def scenario(loop, accounts) -> None:
        first, second = accounts
        await first.attempt(Demand("m", 1200, 0)).begin()
        assert loop.time() < 1
        await second.attempt(Demand("m", 100, 0)).begin()
        assert loop.time() == pytest.approx(70, abs=3)

    in_virtual_time(virtual, scenario, limits(None, 600, **FIXED), limits(None, 600, **FIXED))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_no_window_holds_more_than_the_limit(redis_server, data) -> None:
    """Whatever workers ask, cancel, overestimate and leave behind: never more than the burst and the rate."""
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
        accounts = [Account(limits(None, 600, **FIXED), clock=loop) for _ in range(3)]
        for account in accounts:
            account.limiter._backend = VirtualBackend(redis)
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


def test_updates_are_plain_json(redis_server) -> None:
    """Numbers, names of fields and nothing of the prompt; unknown numbers never appear."""
    pending = PendingUpdates()
    pending.add("credit", 0, 5)
    pending.pause_until = 12.0
    message = json.loads(json.dumps(pending.message(10.0), allow_nan=False))
    assert message == {"credit": [0, 5], "stated": [], "cancelled": [], "refusals": [], "pause": 2}
    assert not dataclasses.is_dataclass(pending)
