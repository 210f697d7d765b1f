"""Waiting for permit: on one event loop with virtual time, and on several real ones."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading

import pytest
from virtual import VirtualLoop

from openai_eval_client import RateLimitConfig, RateLimitError, RequestTooLargeError
from openai_eval_client._account import Account, Attempt
from openai_eval_client._limits.queue import ConcurrencyLimit
from openai_eval_client._runtime.loops import StartThrottle
from openai_eval_client._wire.answers import Usage
from openai_eval_client._wire.endpoints import Demand
from openai_eval_client._wire.failures import NOT_SENT, Outcome, refused


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


def test_requests_leave_at_the_rate_of_the_limit() -> None:
    """After the burst, one request a second for 60 RPM; time between permits never shorter."""
    times: list[float] = []

    async def scenario(account: Account, loop: VirtualLoop) -> None:
        async def one() -> None:
            await send(account)
            times.append(loop.time())

        await asyncio.gather(*[one() for _ in range(70)])

    in_virtual_time(scenario, limits(60))
    assert times[:59] == [0.0] * 59
    assert times[59:] == pytest.approx([n + 0.25 for n in range(11)], abs=0.02)  # with the margin


def test_a_cancelled_waiter_gives_its_place_and_reservation_back() -> None:
    """The next in line goes when the cancelled one would have."""

    async def scenario(account: Account, loop: VirtualLoop) -> None:
        await account.attempt(Demand("m", 597, 0)).begin()
        first = asyncio.create_task(account.attempt(Demand("m", 500, 0)).begin())
        second = asyncio.create_task(account.attempt(Demand("m", 10, 0)).begin())
        await asyncio.sleep(0)
        first.cancel()
        await second
        assert loop.time() == pytest.approx(0.95, abs=0.02)
        with pytest.raises(asyncio.CancelledError):
            await first

    in_virtual_time(scenario, limits(None, 600))


def test_a_waiter_cancelled_after_its_grant_gives_everything_back() -> None:
    """Granted and cancelled in the same turn of the loop: no slot and no budget is lost."""

    async def scenario(account: Account, loop: VirtualLoop) -> None:
        holder = await account.attempt(DEMAND).begin()
        waiter = asyncio.create_task(account.attempt(DEMAND).begin())
        await asyncio.sleep(0)
        holder.settle(OK)
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        await asyncio.wait_for(account.attempt(DEMAND).begin(), 1)

    in_virtual_time(scenario, limits(max_concurrent=1))


def test_settling_twice_frees_one_slot() -> None:
    """An permit counts once, whatever happens to it."""

    async def scenario(account: Account, loop: VirtualLoop) -> None:
        permit = await account.attempt(DEMAND).begin()
        await account.attempt(DEMAND).begin()
        permit.settle(OK)
        permit.settle(OK)
        await account.attempt(DEMAND).begin()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(account.attempt(DEMAND).begin(), 5)

    assert in_virtual_time(scenario, limits(max_concurrent=2)).stats.attempts == 1


@pytest.mark.parametrize("headers", [{"retry-after": "3"}, {"retry-after-ms": "3000", "retry-after": "9"}])
def test_a_429_pauses_the_whole_model_and_no_other(headers: dict[str, str]) -> None:
    """Nobody of that model goes before the server's time; another model does not notice."""

    async def scenario(account: Account, loop: VirtualLoop) -> None:
        await send(account, outcome=refused(429, headers))
        await send(account, Demand("other", 1, 0))
        assert loop.time() == 0
        await send(account)
        assert loop.time() == pytest.approx(3, abs=0.02)

    assert in_virtual_time(scenario, limits(600)).stats.rate_limited == 1


def test_a_refused_request_did_not_spend_its_tokens() -> None:
    """After a 429 the tokens are there for the next; after a server error they are not."""

    async def scenario(account: Account, loop: VirtualLoop) -> None:
        await send(account, Demand("m", 597, 0), refused(429, {}))
        await send(account, Demand("m", 597, 0), refused(500, {}))
        assert loop.time() == 0
        await send(account, Demand("m", 597, 0))
        assert loop.time() == pytest.approx(59.7, abs=0.1)

    in_virtual_time(scenario, limits(None, 600))


def test_a_pause_longer_than_max_wait_fails_everyone_of_that_model_at_once() -> None:
    """Those who wait and those who come later are told when to come back; nobody waits for it."""

    async def scenario(account: Account, loop: VirtualLoop) -> None:
        running = await account.attempt(DEMAND).begin()
        waiting = asyncio.create_task(account.attempt(DEMAND).begin())
        await asyncio.sleep(0)
        running.settle(refused(429, {"retry-after": "3600"}))
        for attempt in (waiting, account.attempt(DEMAND).begin()):
            with pytest.raises(RateLimitError, match="3600 s, more than max_wait=600 s; come back at 2"):
                await attempt
        await account.attempt(Demand("other")).begin()
        assert loop.time() == 0

    in_virtual_time(scenario, limits(max_concurrent=1))


def test_without_limits_nothing_waits_until_the_server_states_some() -> None:
    """rate_limit=None: any number goes at once; after the first headers the server's rate holds."""
    headers = {"x-ratelimit-limit-requests": "60", "x-ratelimit-remaining-requests": "0"}

    async def scenario(account: Account, loop: VirtualLoop) -> None:
        await asyncio.gather(*[account.attempt(DEMAND).begin() for _ in range(5000)])
        assert loop.time() == 0
        await send(account, outcome=Outcome(200, headers))
        await send(account)
        assert loop.time() == pytest.approx(1, abs=0.02)

    in_virtual_time(scenario, None)


def test_requests_that_run_no_model_are_bounded_by_concurrency_alone() -> None:
    """Files and batches spend no requests per minute, and no model's slots."""

    async def scenario(account: Account, loop: VirtualLoop) -> None:
        await account.attempt(DEMAND).begin()
        for _ in range(50):
            await send(account, Demand(None))
        assert loop.time() == 0

    in_virtual_time(scenario, limits(1, max_concurrent=1))


def test_a_lane_of_the_callers_own_replaces_the_models_bound() -> None:
    """A call with max_concurrent=3 has three in flight where the config says one."""

    async def scenario(account: Account, loop: VirtualLoop) -> None:
        concurrency = ConcurrencyLimit(3)
        for _ in range(3):
            await account.attempt(DEMAND, concurrency=concurrency).begin()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(account.attempt(DEMAND, concurrency=concurrency).begin(), 5)

    in_virtual_time(scenario, limits(max_concurrent=1))


def test_waits_are_logged_with_reason_and_seconds(caplog: pytest.LogCaptureFixture) -> None:
    """A user who wonders why nothing happens finds it at INFO."""
    caplog.set_level(logging.INFO, "openai_eval_client")

    async def scenario(account: Account, loop: VirtualLoop) -> None:
        await send(account)
        await send(account, outcome=refused(429, {"retry-after": "2"}))

    in_virtual_time(scenario, limits(1))
    assert "waited 60.00 s for the rate limit of m" in caplog.text
    assert "m rate limited by the server: pausing 2.00 s" in caplog.text


# --- real loops and threads ------------------------------------------------------------------------------

FAST = limits(60_000, burst_seconds=0.005)  # one request a millisecond, five at once


def in_thread(work) -> threading.Thread:
    thread = threading.Thread(target=lambda: asyncio.run(work()))
    thread.start()
    return thread


def test_eight_threads_with_their_own_loops_share_one_budget() -> None:
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


def test_a_loop_that_ends_with_waiters_leaves_the_others_their_turn() -> None:
    """`asyncio.run` cancelled halfway gives back what its waiters had; the next run goes on."""
    account = Account(limits(max_concurrent=1))
    held: list[Attempt] = []

    async def abandoned() -> None:
        held.append(await account.attempt(DEMAND).begin())
        waiting = [asyncio.ensure_future(account.attempt(DEMAND).begin()) for _ in range(10)]
        await asyncio.sleep(0)
        assert not any(waiter.done() for waiter in waiting)

    asyncio.run(abandoned())
    held[0].settle(OK)

    async def later() -> None:
        await asyncio.wait_for(send(account), 10)

    asyncio.run(later())


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


def test_a_blocked_loop_does_not_hold_up_the_others() -> None:
    """The next in line sits on a loop that is busy: the others are woken by their own timers."""
    account = Account(limits(6_000, burst_seconds=0.01))
    blocked, release, done = threading.Event(), threading.Event(), threading.Event()

    async def busy() -> None:
        await send(account)
        first = asyncio.ensure_future(send(account))
        await asyncio.sleep(0)
        blocked.set()
        release.wait(30)  # the loop stands still, with a waiter at the head of the queue
        await first

    async def others() -> None:
        await asyncio.gather(*[send(account) for _ in range(20)])
        done.set()

    threads = [in_thread(busy)]
    assert blocked.wait(30)
    threads.append(in_thread(others))
    assert done.wait(30)
    release.set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def test_one_governor_outlives_many_event_loops() -> None:
    """Successive `asyncio.run`s share one budget and leave no timer of a closed loop behind."""
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


@pytest.mark.parametrize(
    ("message", "seconds"),
    [
        ("Rate limit reached for m on requests per day (RPD): Limit 200. Please try again in 7m12s.", 432),
        ("have exceeded token rate limit of your current pricing tier. Please retry after 6 seconds.", 6),
    ],
)
def test_a_wait_that_only_the_message_names_is_heeded(message: str, seconds: float) -> None:
    """OpenAI's daily limits and Azure's refusals."""

    async def scenario(account: Account, loop: VirtualLoop) -> None:
        await send(account, outcome=refused(429, {}, (message).encode()))
        await send(account)
        assert loop.time() == pytest.approx(seconds, abs=0.1)

    in_virtual_time(scenario, limits(600))


def test_what_the_collector_hands_back_inside_a_locked_region_waits_until_it_is_left() -> None:
    """A stream that is collected while its own thread admits another neither deadlocks nor overtakes."""

    async def scenario(account: Account, loop: VirtualLoop) -> None:
        dropped = [await account.attempt(DEMAND).begin() for _ in range(2)]
        waiting = [asyncio.create_task(account.attempt(DEMAND).begin()) for _ in range(3)]
        await asyncio.sleep(0)
        with account._lock:
            for permit in dropped:
                permit.settle(OK)  # as __del__ would
            assert not any(task.done() for task in waiting)
            assert account.recorder.snapshot().attempts == 2
        for _ in range(3):
            (done,), _ = await asyncio.wait(waiting[:1])
            done.result().settle(OK)
            waiting.pop(0)

    assert in_virtual_time(scenario, limits(max_concurrent=2)).stats.attempts == 5


def test_a_refused_request_without_a_model_harms_nobody() -> None:
    """A 429 for a file or a list of models has no budget to lower."""

    async def scenario(account: Account, loop: VirtualLoop) -> None:
        await send(account, Demand(None), refused(429, {"retry-after": "2"}))
        await send(account, Demand(None))
        assert loop.time() == pytest.approx(2, abs=0.05)

    in_virtual_time(scenario, limits(600, adaptive_throttling=True))


def test_a_request_that_was_never_sent_spends_nothing() -> None:
    """Nobody listened: the next one has the whole budget."""

    async def scenario(account: Account, loop: VirtualLoop) -> None:
        for _ in range(50):
            await send(account, Demand("m", 500, 0), NOT_SENT)
        assert loop.time() == 0

    assert in_virtual_time(scenario, limits(60, 600)).stats.attempts == 0


@pytest.mark.parametrize("message", ["insufficient_quota", "Request too large for m on tokens per min (TPM)"])
def test_a_refusal_for_good_is_no_congestion(message: str) -> None:
    """An empty account and a request beyond the limit slow nobody else down."""

    async def scenario(account: Account, loop: VirtualLoop) -> None:
        for _ in range(20):
            await send(account, outcome=refused(429, {}, (message).encode()))
        assert loop.time() == 0

    in_virtual_time(scenario, limits(None, 60_000, adaptive_throttling=True))


def test_a_guess_does_not_make_a_request_too_large() -> None:
    """Only what is known of it counts: its input, and max_tokens where given."""
    headers = {"x-ratelimit-limit-tokens": "10000", "x-ratelimit-remaining-tokens": "10000"}

    async def scenario(account: Account, loop: VirtualLoop) -> None:
        await send(account, outcome=Outcome(200, headers, Usage(100, 9000)))
        await send(account, Demand("m", 8000))
        with pytest.raises(RequestTooLargeError, match="11,000 tokens is too large for the limit of 10,000"):
            await account.attempt(Demand("m", 8000, 3000)).begin()

    in_virtual_time(scenario, None)


def test_a_request_whose_debt_would_outlast_max_wait_is_too_large() -> None:
    """A debt of minutes is left, one of hours is refused before sending."""

    async def scenario(account: Account, loop: VirtualLoop) -> None:
        await send(account, Demand("m", 6000, 0))
        with pytest.raises(RequestTooLargeError):
            await account.attempt(Demand("m", 7000, 0)).begin()

    in_virtual_time(scenario, limits(None, 600))


def test_threads_that_log_at_the_same_time_do_not_trip_over_each_other() -> None:
    """A note that another thread has just logged is no error."""

    class Emptied(list):
        """Looks full, and is empty by the time one takes from it."""

        def __bool__(self) -> bool:
            return True

        def popleft(self):
            raise IndexError

    async def scenario(account: Account, loop: VirtualLoop) -> None:
        account._notes = Emptied()
        await send(account)

    assert in_virtual_time(scenario, limits()).stats.attempts == 1


# --- a few in a turn ----------------------------------------------------------------------------------------


async def test_those_admitted_at_once_begin_a_few_at_a_time() -> None:
    """In their order, without whoever has left meanwhile, and with nothing left behind."""
    starts, loop, order = StartThrottle(), asyncio.get_running_loop(), []
    waiters = [loop.create_future() for _ in range(30)]
    for number, waiter in enumerate(waiters):
        waiter.add_done_callback(lambda done, number=number: done.cancelled() or order.append(number))
        starts.wake(waiter)
    waiters[3].cancel()
    at_most, turns = 0, 0
    while len(order) < 29:
        before = len(order)
        await asyncio.sleep(0)
        at_most, turns = max(at_most, len(order) - before), turns + 1
    assert order == [number for number in range(30) if number != 3]
    assert at_most == 8
    assert turns < 9


async def test_those_for_whom_there_is_room_begin_a_few_at_a_time_too() -> None:
    """In their order: a wave at once, the rest after it; who comes alone waits for no other turn."""
    account, order, begun = Account(limits()), [], []

    async def one(number: int) -> None:
        await account.attempt(DEMAND).begin()
        order.append(number)

    tasks = [asyncio.create_task(one(number)) for number in range(100)]
    while len(order) < 100:
        before = len(order)
        await asyncio.sleep(0)
        begun.append(len(order) - before)
    assert order == list(range(100))
    assert [count for count in begun if count] == [32, 8, 8, 8, 8, 8, 8, 8, 8, 4]
    await asyncio.gather(*tasks)
    await asyncio.sleep(0)
    lonely = account.attempt(DEMAND).begin()
    with pytest.raises(StopIteration):
        lonely.send(None)


async def test_who_is_cancelled_before_their_turn_gives_slot_and_reservation_back() -> None:
    """They were admitted, and have not begun."""
    account = Account(limits(60, max_concurrent=50))
    tasks = [asyncio.create_task(account.attempt(DEMAND).begin()) for _ in range(50)]
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    begun = [
        task for task in await asyncio.gather(*tasks, return_exceptions=True) if isinstance(task, Attempt)
    ]
    assert len(begun) == 32
    queue = account.limiter._queues["m"]
    assert queue.concurrency.in_flight == len(begun)
    assert queue.requests.spent == len(begun)


async def test_who_is_admitted_while_others_are_woken_is_woken_too() -> None:
    """By the collector, wherever it runs; what is raised on the way holds up nobody."""

    class Reentrant(asyncio.Future):
        def done(self) -> bool:
            if not inner:
                inner.append(asyncio.get_running_loop().create_future())
                starts.wake(inner[0])
                raise KeyError
            return super().done()

    starts, loop, inner = StartThrottle(), asyncio.get_running_loop(), []
    loop.set_exception_handler(lambda *_: None)
    outer = [loop.create_future(), Reentrant(), loop.create_future()]
    for waiter in outer:
        starts.wake(waiter)
    await asyncio.wait_for(asyncio.gather(outer[0], outer[2]), 5)
    await asyncio.wait_for(inner[0], 5)
    assert not outer[1].done()


@pytest.mark.parametrize("meanwhile", ["admitted", "waiting"])
def test_a_loop_closed_before_all_have_begun_leaves_nothing_behind(meanwhile: str) -> None:
    """Slots of those it never let begin come back, also to a loop that lives on beside it."""
    account = Account(limits(max_concurrent=100))

    async def one() -> None:
        (await account.attempt(DEMAND).begin()).settle(OK)

    async def hold() -> None:
        permit = await account.attempt(DEMAND).begin()
        try:
            await asyncio.sleep(3600)
        finally:
            permit.settle(OK)

    async def leave_in_the_middle() -> None:
        held = [await account.attempt(DEMAND).begin() for _ in range(100)] if meanwhile == "waiting" else []
        tasks = [asyncio.ensure_future(hold()) for _ in range(100)]
        await asyncio.sleep(0)
        for permit in held:
            permit.settle(OK)
        await asyncio.sleep(0)
        assert not any(task.done() for task in tasks)

    living, closed = asyncio.new_event_loop(), asyncio.new_event_loop()
    living.run_until_complete(one())
    closed.run_until_complete(leave_in_the_middle())
    closed.close()
    del closed
    gc.collect()
    assert account.limiter._queues["m"].concurrency.in_flight == 0

    async def go_on() -> None:
        await asyncio.wait_for(asyncio.gather(*[one() for _ in range(100)]), 5)

    living.run_until_complete(go_on())
    living.close()


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


async def test_a_crowd_that_was_cancelled_holds_nobody_up() -> None:
    """Nor does whoever comes next pass those who were there before."""
    account, order = Account(limits(max_concurrent=2000)), []

    async def one(name: str) -> None:
        await account.attempt(DEMAND).begin()
        order.append(name)

    crowd = [asyncio.ensure_future(account.attempt(DEMAND).begin()) for _ in range(1000)]
    early = [asyncio.ensure_future(one("early")) for _ in range(8)]
    await asyncio.sleep(0)
    for task in crowd:
        task.cancel()
    turns = 0
    late = []
    while len(order) < len(early):
        late.append(asyncio.ensure_future(one("late")))
        await asyncio.sleep(0)
        turns += 1
    assert turns < 5
    await asyncio.gather(*crowd, *early, *late, return_exceptions=True)
    assert order == ["early"] * len(early) + ["late"] * len(late)
