"""Which request goes when, on a clock that the test drives."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openai_eval_client import RateLimitConfig
from openai_eval_client._limits.queue import ConcurrencyLimit, ModelQueue, Waiter
from openai_eval_client._wire.failures import Outcome
from openai_eval_client._wire.headers import StatedLimit
from openai_eval_client._wire.usage import Usage

EPSILON = 1e-6


@dataclass
class FakeClock:
    """A clock that the test moves."""

    now: float = 1000.0

    def time(self) -> float:
        return self.now


@dataclass
class Queue:
    """A queue, its clock, and what it admitted when."""

    config: RateLimitConfig
    clock: FakeClock = field(default_factory=FakeClock)
    admitted: list[tuple[float, Waiter]] = field(default_factory=list)
    turns: itertools.count[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self.queue = ModelQueue("m", self.config, self.clock)

    def ask(self, tokens: float, concurrency: ConcurrencyLimit | None = None) -> Waiter:
        waiter = Waiter(
            next(self.turns), tokens, concurrency or self.queue.concurrency, self.clock.now, owner="loop"
        )
        self.queue.enqueue(waiter)
        self.pump()
        return waiter

    def pump(self) -> None:
        while (waiter := self.queue.grant_next()) is not None:
            self.admitted.append((self.clock.now, waiter))

    def wait(self) -> bool:
        """Let time pass until the next waiter can go; False where time alone does not help."""
        delay = self.queue.next_in()
        if delay is None:
            return False
        self.clock.now += delay
        self.pump()
        return True

    def finish(self, waiter: Waiter, tokens: float | None = None) -> None:
        self.queue.settle(waiter, Outcome(usage=None if tokens is None else Usage(tokens, 0)))
        self.pump()


def limits(rpm: int | None = None, tpm: int | None = None, **options: object) -> RateLimitConfig:
    defaults = {"max_concurrent": 10_000, "adaptive_throttling": False, **options}
    return RateLimitConfig(requests_per_minute=rpm, tokens_per_minute=tpm, **defaults)


def most_in_any_window(events: list[tuple[float, float]], seconds: float) -> float:
    """Return the largest sum of amounts within any window of that length."""
    best, total, first = 0.0, 0.0, 0
    for time, amount in events:
        total += amount
        while events[first][0] <= time - seconds:
            total -= events[first][1]
            first += 1
        best = max(best, total)
    return best


SIZES = st.lists(st.integers(1, 3000), min_size=1, max_size=60)
GAPS = st.lists(st.floats(0, 20), min_size=60, max_size=60)


@settings(max_examples=200, deadline=None)
@given(SIZES, GAPS, st.integers(1, 600), st.integers(100, 6000), st.floats(0.5, 90))
def test_no_window_admits_more_than_the_burst_and_its_refill(sizes, gaps, rpm, tpm, burst) -> None:
    """For any arrivals, any 60 s hold at most burst + one minute's quota, of requests and of tokens.

    A request larger than the bucket is the one exception for tokens: its excess is a debt paid before the
    next goes.
    """
    queue = Queue(limits(rpm, tpm, burst_seconds=burst))
    for size, gap in zip(sizes, gaps, strict=False):
        queue.ask(size)
        queue.clock.now += gap
        queue.pump()
    while queue.wait():
        pass
    assert len(queue.admitted) == len(sizes)
    requests = [(time, 1.0) for time, _ in queue.admitted]
    assert most_in_any_window(requests, 60) <= max(rpm * burst / 60, 1) + rpm + EPSILON
    bucket = max(tpm * burst / 60, 1)
    tokens = [(time, waiter.tokens) for time, waiter in queue.admitted]
    excess = max([0.0, *(size - bucket for size in sizes)])
    assert most_in_any_window(tokens, 60) <= bucket + tpm + excess + EPSILON


@settings(max_examples=100, deadline=None)
@given(SIZES, st.data())
def test_waiters_go_in_the_order_in_which_they_came(sizes, data) -> None:
    """First come, first served, whatever the sizes, with slots freed in any order."""
    queue = Queue(limits(100, 5000, max_concurrent=3))
    running: list[Waiter] = []
    for size in sizes:
        queue.ask(size)
    while len(queue.admitted) < len(sizes) or running:
        running = [t for _, t in queue.admitted if t.granted]
        assert len(running) <= 3
        if running and (len(running) == 3 or data.draw(st.booleans())):
            queue.finish(data.draw(st.sampled_from(running)))
        elif not queue.wait():
            assert running or len(queue.admitted) == len(sizes)
    turns = [waiter.turn for _, waiter in queue.admitted]
    assert turns == sorted(turns)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 2000), st.booleans()), min_size=1, max_size=40))
def test_a_cancelled_waiter_leaves_no_trace(arrivals) -> None:
    """It gives back reservation and slot: the others go exactly as if it had never been there."""
    with_them, without = Queue(limits(60, 3000)), Queue(limits(60, 3000))
    for size, cancelled in arrivals:
        waiter = with_them.ask(size)
        if cancelled:
            with_them.queue.cancel(waiter)
            with_them.pump()
        else:
            without.ask(size)
    for queue in (with_them, without):
        while queue.wait():
            pass
    kept = [(time, t.tokens) for time, t in with_them.admitted if t.granted]
    assert [tokens for _, tokens in kept] == [t.tokens for _, t in without.admitted]
    assert [time for time, _ in kept] == pytest.approx([time for time, _ in without.admitted])
    assert with_them.queue.concurrency.in_flight == len(kept)
    assert not with_them.queue.waiting


def test_a_large_request_is_not_overtaken_by_small_ones() -> None:
    """A 30k-token prompt goes within one refill of its turn, though small ones keep coming."""
    queue = Queue(limits(None, 30_000))
    queue.ask(30_000)
    big = queue.ask(30_000)
    for _ in range(100):
        queue.ask(100)
    queue.wait()
    assert queue.admitted[1][1] is big
    assert queue.clock.now == pytest.approx(1060)


def test_a_waiter_holds_no_slot() -> None:
    """Only what was admitted counts against the concurrency bound."""
    queue = Queue(limits(1, None, max_concurrent=2))
    queue.ask(1)
    queue.ask(1)
    assert queue.queue.concurrency.in_flight == 1


def test_a_full_concurrency_limit_lets_others_pass() -> None:
    """A call with its own concurrency bound is not held up by another call's."""
    queue = Queue(limits(max_concurrent=1))
    first, second = queue.ask(1), queue.ask(1)
    own = queue.ask(1, ConcurrencyLimit(1))
    assert [t for _, t in queue.admitted] == [first, own]
    queue.finish(first)
    assert queue.admitted[-1][1] is second


def test_an_underestimate_is_a_debt_and_an_overestimate_a_credit() -> None:
    """Settling replaces the reservation by what the answer really took."""
    queue = Queue(limits(None, 6000))
    low, high = queue.ask(1000), queue.ask(4900)
    queue.finish(low, 3000)
    queue.ask(100)
    assert queue.queue.next_in() == pytest.approx(20.25)  # (3000 + 4900 + 100 - 5975) / 100 a second
    queue.finish(high, 1000)
    assert queue.queue.next_in() is None


def test_a_pause_holds_all_and_then_the_rate_decides() -> None:
    """After a 429 nothing is granted until the time that the server stated."""
    queue = Queue(limits(600, None))
    queue.queue.pause(7)
    waiter = queue.ask(1)
    assert queue.queue.next_in() == pytest.approx(7)
    queue.wait()
    assert queue.admitted == [(1007.0, waiter)]


def answer_with_headers(queue: Queue, **stated: StatedLimit) -> None:
    """Answer one request with these headers."""
    waiter = queue.ask(1)
    queue.finish(waiter)
    queue.queue.update_from_headers(waiter, stated)


def test_the_server_lowers_the_limit_but_never_raises_it_above_the_users() -> None:
    """Headers with less than configured count; headers with more do not."""
    queue = Queue(limits(600, None, adaptive_throttling=True))
    answer_with_headers(queue, requests=StatedLimit(limit=60, remaining=0, reset=None))
    queue.ask(1)
    assert queue.queue.next_in() == pytest.approx(1, abs=0.3)
    generous = Queue(limits(60, None, adaptive_throttling=True))
    answer_with_headers(generous, requests=StatedLimit(limit=6000, remaining=6000, reset=0.0))
    for _ in range(60):
        generous.ask(1)
    assert len(generous.admitted) == 59
    assert generous.queue.next_in() == pytest.approx(0.25)  # the margin


def test_without_adaptive_throttling_headers_change_nothing() -> None:
    """Fixed limits stay fixed."""
    queue = Queue(limits(600, None))
    answer_with_headers(queue, requests=StatedLimit(limit=60, remaining=0, reset=None))
    queue.ask(1)
    assert len(queue.admitted) == 2


def test_limits_that_are_not_given_are_learned() -> None:
    """None means what the server states, and no limit until then."""
    queue = Queue(limits(None, None, adaptive_throttling=True))
    for _ in range(1000):
        queue.ask(10_000)
    assert len(queue.admitted) == 1000
    answer_with_headers(queue, tokens=StatedLimit(limit=6000, remaining=0, reset=None))
    queue.ask(100)
    assert queue.queue.next_in() == pytest.approx(1, abs=0.01)


def test_output_that_is_not_bounded_is_reserved_at_the_running_mean() -> None:
    """The guess gives way to what this model's answers take."""
    queue = Queue(limits())
    for length in (100, 300):
        queue.queue.settle(queue.ask(1), Outcome(200, {}, Usage(1, length)))
    assert queue.queue.expected_output == pytest.approx(200)
    assert queue.queue.output_length() == pytest.approx({"mean": 200, "spread": 100})


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["ask", "ask", "ask", "finish", "cancel", "refuse", "wait"]),
        st.integers(1, 3000),
        st.integers(0, 50),
        st.floats(0, 15),
    ),
    min_size=5,
    max_size=80,
)


@settings(max_examples=200, deadline=None)
@given(EVENTS, st.integers(1, 600), st.integers(500, 6000), st.booleans())
def test_nothing_is_lost_whatever_happens_in_between(events, rpm, tpm, adaptive) -> None:
    """Arrivals, answers, cancellations, refusals in any order: all others go, within the limits.

    What an answer took replaces what was reserved for it, and what was cancelled or refused is given back; of
    what remains, no 60 s hold more than the burst and a minute's quota, but for what answers took beyond
    their reservation and one request larger than the bucket.
    """
    queue = Queue(limits(rpm, tpm, max_concurrent=8, adaptive_throttling=adaptive))
    asked: list[Waiter] = []
    cancelled: set[int] = set()
    running: list[Waiter] = []
    given_back = over = 0.0

    def end(waiter: Waiter, kind: str, amount: float) -> None:
        nonlocal given_back, over
        running.remove(waiter)
        took = {"finish": amount, "refuse": 0.0}[kind]
        given_back += max(0.0, waiter.tokens - took)
        over += max(0.0, took - waiter.tokens)
        if kind == "refuse":
            queue.queue.refused(waiter, "tokens", 0.0, ())
        queue.finish(waiter, took)

    for kind, amount, pick, seconds in events:
        running = [t for _, t in queue.admitted if t.granted]
        waiting = [t for t in asked if t.waits]
        if kind == "ask":
            asked.append(queue.ask(amount))
        elif kind == "wait":
            queue.clock.now += seconds
            queue.pump()
        elif kind == "cancel" and waiting:
            waiter = waiting[pick % len(waiting)]
            queue.queue.cancel(waiter)
            cancelled.add(waiter.turn)
            queue.pump()
        elif kind in {"finish", "refuse"} and running:
            end(running[pick % len(running)], kind, amount)
    for _ in range(10_000):
        running = [t for _, t in queue.admitted if t.granted]
        if running:
            end(running[0], "finish", running[0].tokens)
        elif not queue.wait():
            break
    assert {t.turn for _, t in queue.admitted} == {t.turn for t in asked} - cancelled
    assert queue.queue.concurrency.in_flight == 0
    assert not queue.queue.waiting
    requests = [(time, 1.0) for time, _ in queue.admitted]
    assert most_in_any_window(requests, 60) <= 2 * rpm + 1 + EPSILON
    largest = max((t.tokens for t in asked), default=0)
    tokens = [(time, waiter.tokens) for time, waiter in queue.admitted]
    assert most_in_any_window(tokens, 60) <= 2 * tpm + largest + given_back + EPSILON


def test_the_limit_is_reported_as_the_user_set_it() -> None:
    """Also while a worker keeps to its part of a quota, because the others cannot be reached."""
    quota = Queue(RateLimitConfig(requests_per_minute=600)).queue.requests
    before = quota.limit()
    quota.use_share(2.5, 0.0, smallest=1.0)
    assert quota.ready_in(1) == pytest.approx(0.4)
    assert quota.limit() == before
    assert before.configured == 600
