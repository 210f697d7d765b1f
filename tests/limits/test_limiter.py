"""Waiting for a permit: on one event loop with virtual time, and on several real ones."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading

import pytest
from virtual import VirtualLoop

from openai_eval_client import RateLimitConfig, RateLimitError, RequestTooLargeError
from openai_eval_client._limits import ConcurrencyLimit, Limiter, Permit
from openai_eval_client._wire.failures import NOT_SENT, Outcome, refused
from openai_eval_client._wire.requests import Demand
from openai_eval_client._wire.usage import Usage


def in_virtual_time(scenario, config: RateLimitConfig | None) -> None:
    """Run `scenario(limiter, loop)` on a virtual loop."""
    loop = VirtualLoop()
    try:
        loop.run_until_complete(scenario(Limiter(config, clock=loop), loop))
    finally:
        loop.close()


FIXED = {"max_concurrent": 1000, "adaptive_throttling": False}


def limits(rpm: int | None = None, tpm: int | None = None, **options: object) -> RateLimitConfig:
    return RateLimitConfig(requests_per_minute=rpm, tokens_per_minute=tpm, **{**FIXED, **options})


DEMAND = Demand("m", 100, 0)
OK = Outcome(200, {}, Usage(100, 0))


async def acquired(limiter: Limiter, demand: Demand, **options: object) -> Permit:
    permit = limiter.ask(demand, **options)
    if permit.waiter.future is not None:
        try:
            await limiter.granted(permit)
        except BaseException:
            limiter.release(permit, NOT_SENT)
            raise
    return permit


async def send(limiter: Limiter, demand: Demand = DEMAND, outcome: Outcome = OK) -> None:
    permit = await acquired(limiter, demand)
    limiter.release(permit, outcome)
    limiter.log_refusal(permit, outcome)


def test_requests_leave_at_the_rate_of_the_limit() -> None:
    """After the burst, one request a second for 60 RPM; time between permits never shorter."""
    times: list[float] = []

    async def scenario(limiter: Limiter, loop: VirtualLoop) -> None:
        async def one() -> None:
            await send(limiter)
            times.append(loop.time())

        await asyncio.gather(*[one() for _ in range(70)])

    in_virtual_time(scenario, limits(60))
    assert times[:59] == [0.0] * 59
    assert times[59:] == pytest.approx([n + 0.25 for n in range(11)], abs=0.02)  # with the margin


def test_a_cancelled_waiter_gives_its_place_and_reservation_back() -> None:
    """The next in line goes when the cancelled one would have."""

    async def scenario(limiter: Limiter, loop: VirtualLoop) -> None:
        await acquired(limiter, Demand("m", 597, 0))
        first = asyncio.create_task(acquired(limiter, Demand("m", 500, 0)))
        second = asyncio.create_task(acquired(limiter, Demand("m", 10, 0)))
        await asyncio.sleep(0)
        first.cancel()
        await second
        assert loop.time() == pytest.approx(0.95, abs=0.02)
        with pytest.raises(asyncio.CancelledError):
            await first

    in_virtual_time(scenario, limits(None, 600))


def test_a_waiter_cancelled_after_its_grant_gives_everything_back() -> None:
    """Granted and cancelled in the same turn of the loop: no slot and no quota is lost."""

    async def scenario(limiter: Limiter, loop: VirtualLoop) -> None:
        holder = await acquired(limiter, DEMAND)
        waiter = asyncio.create_task(acquired(limiter, DEMAND))
        await asyncio.sleep(0)
        limiter.release(holder, OK)
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        await asyncio.wait_for(acquired(limiter, DEMAND), 1)

    in_virtual_time(scenario, limits(max_concurrent=1))


def test_releasing_twice_frees_one_slot() -> None:
    """The second release changes nothing."""

    async def scenario(limiter: Limiter, loop: VirtualLoop) -> None:
        permit = await acquired(limiter, DEMAND)
        await acquired(limiter, DEMAND)
        limiter.release(permit, OK)
        limiter.release(permit, OK)
        await acquired(limiter, DEMAND)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(acquired(limiter, DEMAND), 5)

    in_virtual_time(scenario, limits(max_concurrent=2))


def test_a_refused_request_did_not_spend_its_tokens() -> None:
    """After a 429 the tokens are there for the next; after a server error they are not."""

    async def scenario(limiter: Limiter, loop: VirtualLoop) -> None:
        await send(limiter, Demand("m", 597, 0), refused(429, {}))
        await send(limiter, Demand("m", 597, 0), refused(500, {}))
        assert loop.time() == 0
        await send(limiter, Demand("m", 597, 0))
        assert loop.time() == pytest.approx(59.7, abs=0.1)

    in_virtual_time(scenario, limits(None, 600))


def test_a_pause_longer_than_max_wait_fails_all_requests_of_that_model_at_once() -> None:
    """Those that wait and those that come later: the error says when to come back."""

    async def scenario(limiter: Limiter, loop: VirtualLoop) -> None:
        running = await acquired(limiter, DEMAND)
        waiting = asyncio.create_task(acquired(limiter, DEMAND))
        await asyncio.sleep(0)
        limiter.release(running, refused(429, {"retry-after": "3600"}))
        for attempt in (waiting, acquired(limiter, DEMAND)):
            with pytest.raises(RateLimitError, match="3600 s, more than max_wait=600 s; come back at 2"):
                await attempt
        await acquired(limiter, Demand("other"))
        assert loop.time() == 0

    in_virtual_time(scenario, limits(max_concurrent=1))


def test_without_limits_nothing_waits_until_the_server_states_some() -> None:
    """rate_limit=None: any number goes at once; after the first headers the server's rate holds."""
    headers = {"x-ratelimit-limit-requests": "60", "x-ratelimit-remaining-requests": "0"}

    async def scenario(limiter: Limiter, loop: VirtualLoop) -> None:
        await asyncio.gather(*[acquired(limiter, DEMAND) for _ in range(5000)])
        assert loop.time() == 0
        await send(limiter, outcome=Outcome(200, headers))
        await send(limiter)
        assert loop.time() == pytest.approx(1, abs=0.02)

    in_virtual_time(scenario, None)


def test_requests_that_run_no_model_are_bounded_by_concurrency_alone() -> None:
    """Files and batches spend no requests per minute, and no model's slots."""

    async def scenario(limiter: Limiter, loop: VirtualLoop) -> None:
        await acquired(limiter, DEMAND)
        for _ in range(50):
            await send(limiter, Demand(None))
        assert loop.time() == 0

    in_virtual_time(scenario, limits(1, max_concurrent=1))


def test_a_concurrency_limit_of_the_callers_own_replaces_the_models() -> None:
    """A call with max_concurrent=3 has three in flight where the config says one."""

    async def scenario(limiter: Limiter, loop: VirtualLoop) -> None:
        concurrency = ConcurrencyLimit(3)
        for _ in range(3):
            await acquired(limiter, DEMAND, concurrency=concurrency)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(acquired(limiter, DEMAND, concurrency=concurrency), 5)

    in_virtual_time(scenario, limits(max_concurrent=1))


def test_waits_are_logged_with_reason_and_seconds(caplog: pytest.LogCaptureFixture) -> None:
    """A user who wonders why nothing happens finds it at INFO."""
    caplog.set_level(logging.INFO, "openai_eval_client")

    async def scenario(limiter: Limiter, loop: VirtualLoop) -> None:
        await send(limiter)
        await send(limiter, outcome=refused(429, {"retry-after": "2"}))

    in_virtual_time(scenario, limits(1))
    assert "waited 60.00 s for the rate limit of m" in caplog.text
    assert "m rate limited by the server: pausing 2.00 s" in caplog.text


@pytest.mark.parametrize(
    ("message", "seconds"),
    [
        ("Rate limit reached for m on requests per day (RPD): Limit 200. Please try again in 7m12s.", 432),
        ("have exceeded token rate limit of your current pricing tier. Please retry after 6 seconds.", 6),
    ],
)
def test_a_wait_that_only_the_message_names_is_kept(message: str, seconds: float) -> None:
    """OpenAI's daily limits and Azure's refusals."""

    async def scenario(limiter: Limiter, loop: VirtualLoop) -> None:
        await send(limiter, outcome=refused(429, {}, message.encode()))
        await send(limiter)
        assert loop.time() == pytest.approx(seconds, abs=0.1)

    in_virtual_time(scenario, limits(600))


def test_a_refused_request_without_a_model_does_no_harm() -> None:
    """A 429 for a file or a list of models has no quota to lower."""

    async def scenario(limiter: Limiter, loop: VirtualLoop) -> None:
        await send(limiter, Demand(None), refused(429, {"retry-after": "2"}))
        await send(limiter, Demand(None))
        assert loop.time() == pytest.approx(2, abs=0.05)

    in_virtual_time(scenario, limits(600, adaptive_throttling=True))


@pytest.mark.parametrize("message", ["insufficient_quota", "Request too large for m on tokens per min (TPM)"])
def test_a_refusal_for_good_is_no_congestion(message: str) -> None:
    """An empty account and a request beyond the limit slow no other request down."""

    async def scenario(limiter: Limiter, loop: VirtualLoop) -> None:
        for _ in range(20):
            await send(limiter, outcome=refused(429, {}, message.encode()))
        assert loop.time() == 0

    in_virtual_time(scenario, limits(None, 60_000, adaptive_throttling=True))


def test_a_guess_does_not_make_a_request_too_large() -> None:
    """Only what is known of it counts: its input, and max_tokens where given."""
    headers = {"x-ratelimit-limit-tokens": "10000", "x-ratelimit-remaining-tokens": "10000"}

    async def scenario(limiter: Limiter, loop: VirtualLoop) -> None:
        await send(limiter, outcome=Outcome(200, headers, Usage(100, 9000)))
        await send(limiter, Demand("m", 8000))
        with pytest.raises(RequestTooLargeError, match="11,000 tokens is too large for the limit of 10,000"):
            await acquired(limiter, Demand("m", 8000, 3000))

    in_virtual_time(scenario, None)


def test_a_request_whose_debt_would_outlast_max_wait_is_too_large() -> None:
    """A debt of minutes is left, one of hours is refused before sending."""

    async def scenario(limiter: Limiter, loop: VirtualLoop) -> None:
        await send(limiter, Demand("m", 6000, 0))
        with pytest.raises(RequestTooLargeError):
            await acquired(limiter, Demand("m", 7000, 0))

    in_virtual_time(scenario, limits(None, 600))


# --- real loops and threads --------------------------------------------------------------------------------


def in_thread(work) -> threading.Thread:
    thread = threading.Thread(target=lambda: asyncio.run(work()))
    thread.start()
    return thread


def test_a_loop_that_ends_with_waiters_leaves_the_others_their_turn() -> None:
    """`asyncio.run` cancelled halfway gives back what its waiters had; the next run goes on."""
    limiter = Limiter(limits(max_concurrent=1))
    held: list[Permit] = []

    async def abandoned() -> None:
        held.append(await acquired(limiter, DEMAND))
        waiting = [asyncio.ensure_future(acquired(limiter, DEMAND)) for _ in range(10)]
        await asyncio.sleep(0)
        assert not any(waiter.done() for waiter in waiting)

    asyncio.run(abandoned())
    limiter.release(held[0], OK)

    async def later() -> None:
        await asyncio.wait_for(send(limiter), 10)

    asyncio.run(later())


def test_a_blocked_loop_does_not_hold_up_the_others() -> None:
    """The next in line sits on a loop that is busy: the others are woken by their own timers."""
    limiter = Limiter(limits(6_000, burst_seconds=0.01))
    blocked, release, done = threading.Event(), threading.Event(), threading.Event()

    async def busy() -> None:
        await send(limiter)
        first = asyncio.ensure_future(send(limiter))
        await asyncio.sleep(0)
        blocked.set()
        release.wait(30)  # the loop stands still, with a waiter at the head of the queue
        await first

    async def others() -> None:
        await asyncio.gather(*[send(limiter) for _ in range(20)])
        done.set()

    threads = [in_thread(busy)]
    assert blocked.wait(30)
    threads.append(in_thread(others))
    assert done.wait(30)
    release.set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


# --- a few in a turn ---------------------------------------------------------------------------------------


async def test_requests_that_find_room_begin_a_few_at_a_time_too() -> None:
    """In their order: a wave at once, the rest after it; one that comes alone waits for no other turn."""
    limiter, order, begun = Limiter(limits()), [], []

    async def one(number: int) -> None:
        await acquired(limiter, DEMAND)
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
    lonely = acquired(limiter, DEMAND)
    with pytest.raises(StopIteration):
        lonely.send(None)


async def test_a_request_cancelled_before_it_begins_gives_slot_and_reservation_back() -> None:
    """They were admitted, and have not begun."""
    limiter = Limiter(limits(60, max_concurrent=50))
    tasks = [asyncio.create_task(acquired(limiter, DEMAND)) for _ in range(50)]
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    begun = [
        task for task in await asyncio.gather(*tasks, return_exceptions=True) if isinstance(task, Permit)
    ]
    assert len(begun) == 32
    queue = limiter._queues["m"]
    assert queue.concurrency.in_flight == len(begun)
    assert queue.requests.spent == len(begun)


@pytest.mark.parametrize("meanwhile", ["admitted", "waiting"])
def test_a_loop_closed_before_all_have_begun_leaves_nothing_behind(meanwhile: str) -> None:
    """Slots of those it never let begin come back, also to a loop that lives on beside it."""
    limiter = Limiter(limits(max_concurrent=100))

    async def one() -> None:
        limiter.release(await acquired(limiter, DEMAND), OK)

    async def hold() -> None:
        permit = await acquired(limiter, DEMAND)
        try:
            await asyncio.sleep(3600)
        finally:
            limiter.release(permit, OK)

    async def leave_in_the_middle() -> None:
        held = [await acquired(limiter, DEMAND) for _ in range(100)] if meanwhile == "waiting" else []
        tasks = [asyncio.ensure_future(hold()) for _ in range(100)]
        await asyncio.sleep(0)
        for permit in held:
            limiter.release(permit, OK)
        await asyncio.sleep(0)
        assert not any(task.done() for task in tasks)

    living, closed = asyncio.new_event_loop(), asyncio.new_event_loop()
    living.run_until_complete(one())
    closed.run_until_complete(leave_in_the_middle())
    closed.close()
    del closed
    gc.collect()
    assert limiter._queues["m"].concurrency.in_flight == 0

    async def go_on() -> None:
        await asyncio.wait_for(asyncio.gather(*[one() for _ in range(100)]), 5)

    living.run_until_complete(go_on())
    living.close()


async def test_a_crowd_that_was_cancelled_holds_no_request_up() -> None:
    """Nor does a newcomer pass those that were there before."""
    limiter, order = Limiter(limits(max_concurrent=2000)), []

    async def one(name: str) -> None:
        await acquired(limiter, DEMAND)
        order.append(name)

    crowd = [asyncio.ensure_future(acquired(limiter, DEMAND)) for _ in range(1000)]
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
