"""What the limiter makes of the server's headers and refusals, over minutes of virtual time.

The bounds on time and refusals are those of the project's table of numbers to reach; `tests/benchmarks`
measures the same over real sockets.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from virtual import VirtualServer, rehearse

from openai_eval_client import RateLimitConfig
from openai_eval_client._belief import Belief
from openai_eval_client._headers import Quota

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
    """Not one refusal, and as fast as can be, whether the server says anything or not."""
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
def test_limits_four_times_too_high_and_a_silent_server(seed: int, in_flight: int, retry_after: bool) -> None:
    """Only its refusals tell: the rate is found from what passes between them."""
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
    """Learnt from the first answer."""
    server = VirtualServer(RPM, TPM, window=window, stamp=stamp, seed=seed)
    figures = rehearse(server, None, requests=1000 if window == 5 else 2000)
    assert figures.refused <= 0.005
    assert figures.unanswered == 0
    assert figures.ratio <= 1.05


class FakeClock:
    """A clock that moves when told to."""

    now = 0.0

    def time(self) -> float:
        return self.now


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["spend", "hear", "pass", "refuse", "owe", "wait"]),
        st.integers(1, 5000),
        st.integers(0, 100_000),
        st.floats(0, 120),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(EVENTS, st.one_of(st.none(), st.floats(0.1, 1000)))
def test_whatever_happens_nobody_waits_for_ever(events, rate) -> None:
    """For any story told by the server, the wait for the next request stays finite and comes to an end."""
    clock = FakeClock()
    belief = Belief(rate, (rate or 0) * 60, clock)
    mark = belief.charge(1)
    for kind, amount, quota, seconds in events:
        if kind == "spend":
            mark = belief.charge(amount)
        elif kind == "hear":
            belief.hear(Quota(max(quota, 1), min(amount, max(quota, 1)), seconds), mark)
        elif kind == "pass":
            belief.passed(amount)
        elif kind == "refuse":
            belief.refused(amount, mark, seconds)
        elif kind == "owe":
            belief.owe(amount)
        clock.now += seconds
        wait = belief.ready_in(100)
        assert 0 <= wait < 1e9
    for _ in range(5):
        clock.now += belief.ready_in(100)
    assert belief.ready_in(100) <= 1e-3
