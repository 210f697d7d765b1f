"""Token buckets, and what is learned from the server's headers and refusals over minutes of virtual time.

The bounds on time and refusals are those of the project's table of numbers to reach; `tests/benchmarks`
measures the same over real sockets.
"""

from __future__ import annotations

import asyncio

import pytest
from aiolimiter import AsyncLimiter
from hypothesis import given, settings
from hypothesis import strategies as st
from virtual import VirtualLoop, VirtualServer, rehearse

from openai_eval_client import RateLimitConfig
from openai_eval_client._account import Account
from openai_eval_client._limits.buckets import Bucket, ServerBucket
from openai_eval_client._wire.headers import StatedLimit
from openai_eval_client._wire.requests import Demand


class FakeClock:
    """A clock that the test moves."""

    now = 0.0

    def time(self) -> float:
        return self.now


def test_the_bucket_still_reads_aiolimiters_level_right() -> None:
    """The private parts of aiolimiter that Bucket uses mean what they did: this guards the version pin."""
    clock = FakeClock()
    bucket = Bucket(clock, 1, 60)
    assert isinstance(bucket, AsyncLimiter)
    bucket.charge(60)
    assert not bucket.has_capacity(1)
    clock.now += 1
    assert bucket.has_capacity(1)
    assert bucket.ready_in(2) == pytest.approx(1)


def test_a_bucket_is_full_at_first_and_refills_at_its_rate() -> None:
    """At the start the burst goes at once; then the rate decides."""
    clock = FakeClock()
    bucket = Bucket(clock, rate=2, capacity=60)
    assert bucket.ready_in(60) == 0
    bucket.charge(60)
    assert bucket.ready_in(1) == pytest.approx(0.5)
    clock.now += 1000
    assert bucket.ready_in(60) == 0


def test_a_bucket_holds_at_least_one_unit() -> None:
    """However short the burst, a request can go."""
    assert Bucket(FakeClock(), rate=1, capacity=0.001).ready_in(1) == 0


def test_an_amount_larger_than_the_bucket_waits_until_it_is_full_and_leaves_a_debt() -> None:
    """Those after it wait for the whole of the debt."""
    clock = FakeClock()
    bucket = Bucket(clock, rate=1, capacity=10)
    bucket.charge(5)
    assert bucket.ready_in(30) == pytest.approx(5)
    clock.now += 5
    assert bucket.ready_in(30) == 0
    bucket.charge(30)
    assert bucket.ready_in(1) == pytest.approx(21)


def test_what_is_given_back_never_exceeds_what_was_taken() -> None:
    """A credit fills the bucket at most."""
    bucket = Bucket(FakeClock(), 1, 10)
    bucket.charge(-100)
    bucket.charge(10)
    assert bucket.ready_in(1) == pytest.approx(1)


RPM, TPM = 1800, 480_000  # 20 requests of 400 tokens a second: tokens bind


def config(factor: int = 1, **options: object) -> RateLimitConfig:
    limits = {"requests_per_minute": RPM * factor, "tokens_per_minute": TPM * factor}
    return RateLimitConfig(**{**limits, "max_concurrent": 1000, **options})


STAMPS = pytest.mark.parametrize("stamp", ["answer", "admission"])
SEEDS = pytest.mark.parametrize("seed", range(3))


@SEEDS
@STAMPS
@pytest.mark.parametrize("headers", [True, False])
def test_right_limits_and_a_full_minutes_bucket(stamp: str, seed: int, headers: bool) -> None:
    """Not one refusal, and as fast as can be, with headers and without."""
    server = VirtualServer(RPM, TPM, stamp=stamp, seed=seed, headers=headers)
    figures = rehearse(server, config())
    assert (figures.refused, figures.unanswered) == (0, 0)
    assert figures.ratio <= 1.04


@SEEDS
@STAMPS
def test_right_limits_enforced_over_five_seconds(stamp: str, seed: int) -> None:
    """The headers tell how small the server's bucket is."""
    figures = rehearse(VirtualServer(RPM, TPM, window=5, stamp=stamp, seed=seed), config(), requests=1000)
    assert figures.refused <= 0.005
    assert figures.unanswered == 0
    assert figures.ratio <= 1.04


@SEEDS
@STAMPS
@pytest.mark.parametrize("in_flight", [64, 256])
def test_limits_four_times_too_high(stamp: str, seed: int, in_flight: int) -> None:
    """The headers correct the user."""
    server = VirtualServer(RPM, TPM, window=5, stamp=stamp, seed=seed)
    figures = rehearse(server, config(4), requests=1000, in_flight=in_flight)
    assert figures.refused <= 0.01
    assert figures.unanswered == 0
    assert figures.ratio <= 1.05


@SEEDS
@pytest.mark.parametrize("in_flight", [64, 256])
@pytest.mark.parametrize("retry_after", [True, False])
def test_limits_four_times_too_high_without_headers(seed: int, in_flight: int, retry_after: bool) -> None:
    """The refusals alone teach: the rate is what is served between them."""
    server = VirtualServer(RPM, TPM, window=5, headers=False, retry_after=retry_after, seed=seed)
    figures = rehearse(server, config(4), requests=1000, in_flight=in_flight)
    assert figures.refused <= 0.04
    assert figures.unanswered == 0
    assert figures.ratio <= 1.08


@SEEDS
@STAMPS
@pytest.mark.parametrize(("clients", "refused", "ratio"), [(2, 0.02, 1.06), (4, 0.05, 1.08)])
def test_several_clients_on_one_quota(stamp, seed, clients, refused, ratio) -> None:
    """Each sees in the headers what the others spend."""
    server = VirtualServer(RPM, TPM, stamp=stamp, seed=seed)
    figures = rehearse(server, config(), clients=clients)
    assert figures.refused <= refused
    assert figures.unanswered == 0
    assert figures.ratio <= ratio


@SEEDS
@STAMPS
@pytest.mark.parametrize("window", [5, 60])
def test_limits_that_are_not_given(stamp: str, seed: int, window: float) -> None:
    """They are learned from the first answer."""
    server = VirtualServer(RPM, TPM, window=window, stamp=stamp, seed=seed)
    figures = rehearse(server, None, requests=1000 if window == 5 else 2000)
    assert figures.refused <= 0.005
    assert figures.unanswered == 0
    assert figures.ratio <= 1.05


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["spend", "headers", "success", "refusal", "debt", "wait"]),
        st.integers(1, 5000),
        st.integers(0, 100_000),
        st.floats(0, 120),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(EVENTS, st.one_of(st.none(), st.floats(0.1, 1000)))
def test_whatever_happens_no_request_waits_for_ever(events, rate) -> None:
    """Whatever the server answers, the wait for the next request stays finite and comes to an end."""
    clock = FakeClock()
    server_bucket = ServerBucket(rate, (rate or 0) * 60, clock)
    sent = server_bucket.charge(1)
    for kind, amount, stated, seconds in events:
        if kind == "spend":
            sent = server_bucket.charge(amount)
        elif kind == "headers":
            server_bucket.update_from_headers(
                StatedLimit(max(stated, 1), min(amount, max(stated, 1)), seconds), sent
            )
        elif kind == "success":
            server_bucket.on_success(amount)
        elif kind == "refusal":
            server_bucket.refused(sent._replace(amount=amount), seconds, stated=bool(stated % 2))
        elif kind == "debt":
            server_bucket.add_debt(amount)
        clock.now += seconds
        wait = server_bucket.bucket.ready_in(100)
        assert 0 <= wait < 1e9
    for _ in range(5):
        clock.now += server_bucket.bucket.ready_in(100)
    assert server_bucket.bucket.ready_in(100) <= 1e-3


def serially(rpm: int, tpm: int, sizes: list[int], *, idle: float = 0.0, before: int = 0) -> list[float]:
    """Return the seconds that each request waited, sent one by one after `before` others and a pause."""
    server = VirtualServer(rpm, tpm, network=0.001)
    loop = VirtualLoop()
    waits: list[float] = []

    async def one(account: Account, tokens: int) -> None:
        asked = loop.time()
        permit = await account.attempt(Demand("m", tokens, 0)).begin()
        waits.append(loop.time() - asked)
        permit.settle(await server.answer(tokens))

    async def scenario() -> None:
        limits = RateLimitConfig(requests_per_minute=rpm, tokens_per_minute=tpm)
        account = Account(limits, clock=loop)
        for _ in range(before):
            await one(account, sizes[0])
        await asyncio.sleep(idle)
        waits.clear()
        for tokens in sizes:
            await one(account, tokens)

    try:
        loop.run_until_complete(scenario())
    finally:
        loop.close()
    assert server.refused == 0
    return waits


def test_a_long_pause_is_no_sign_of_other_clients() -> None:
    """A bucket that was full for ten minutes did not refill, though no other client spent anything."""
    first, second = serially(10_000, 30_000, [20_000, 20_000], idle=600, before=1)
    assert first == 0
    assert second <= 21  # 10,000 tokens are missing at 500 a second


def test_a_request_does_not_count_against_itself() -> None:
    """Three that fit the full bucket go without waiting."""
    assert max(serially(10_000, 30_000, [9_500] * 3)) <= 0.5


def test_very_small_limits_are_used_in_full() -> None:
    """At 3 requests a minute the fourth waits for its 20 seconds and not for minutes."""
    waits = serially(3, 30_000, [10] * 6)
    assert max(waits[:3]) <= 11
    assert max(waits[3:]) <= 25


def test_where_headers_end_the_refusals_teach() -> None:
    """Headers at first, then none, at a tenth of the limit: most prompts are answered all the same."""
    server = VirtualServer(6000, 10**9, window=1)

    async def end_headers() -> None:
        await asyncio.sleep(2)
        server.headers = False
        server.buckets["requests"].per_minute = 600

    figures = rehearse(
        server,
        RateLimitConfig(requests_per_minute=6000, tokens_per_minute=None),
        requests=600,
        meanwhile=end_headers,
    )
    assert figures.unanswered == 0
    assert figures.refused <= 0.5


def test_fixed_limits_too_do_not_stampede_after_a_refusal() -> None:
    """After the pause one goes, and then the fixed rate, here ten times too high."""
    server = VirtualServer(RPM, TPM, window=5, headers=False)
    figures = rehearse(server, config(10, adaptive_throttling=False), requests=500, retries=100)
    assert figures.unanswered == 0


def test_a_daily_limit_in_the_headers_is_not_taken_for_one_of_a_minute() -> None:
    """10,000 a day with 20 left and a reset of a day: the next ones go at the day's pace."""
    clock = FakeClock()
    server_bucket = ServerBucket(100.0, 6000.0, clock)
    sent = server_bucket.charge(1)
    server_bucket.update_from_headers(StatedLimit(10_000, 0, 86_400.0), sent)
    clock.now += 1
    assert server_bucket.bucket.ready_in(1) == pytest.approx(86_400 / 10_000, rel=0.2)


def test_a_refusal_of_a_request_without_tokens_does_no_harm() -> None:
    """A request that reserves nothing can be refused too."""
    server_bucket = ServerBucket(None, 1.0, FakeClock())
    server_bucket.refused(server_bucket.charge(0.0), 3.0, stated=False)
    assert server_bucket.bucket.ready_in(10**6) == 0
