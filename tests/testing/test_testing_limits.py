"""The rate limits of the simulated server: over real sockets, and its buckets on a clock we drive."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated_calls import CHAT, Clock, error_of, send

from openai_eval_client.testing import SimulatedServer
from openai_eval_client.testing._faults import ApiError
from openai_eval_client.testing._limits import Bucket, Limits, duration
from openai_eval_client.testing._options import Options


def test_a_refused_request_is_told_what_and_how_long():
    """A 429 names the limit and the wait, in its message and in its headers."""
    with SimulatedServer(tpm=600, window=60) as server:
        assert send(server, {**CHAT, "max_tokens": 592 - 1})[0] == 200
        status, headers, raw = send(server, {**CHAT, "max_tokens": 292})
        assert status == 429
        error = error_of(raw)
        assert (error["type"], error["param"], error["code"]) == ("tokens", None, "rate_limit_exceeded")
        head = "Rate limit reached for m in organization org-sim on tokens per min (TPM): Limit 600, Used "
        assert error["message"].startswith(head)
        assert "Requested 300. Please try again in " in error["message"]
        wait = int(headers["retry-after-ms"])
        assert 28_000 < wait <= 30_000
        assert int(headers["retry-after"]) == -(-wait // 1000)
        assert [call.charged_tokens for call in server.calls] == [599, 0]


def test_requests_are_limited_too_and_models_apart():
    """Each model has requests per minute of its own."""
    with SimulatedServer(rpm=2) as server:
        assert [send(server)[0] for _ in range(3)] == [200, 200, 429]
        assert error_of(send(server)[2])["type"] == "requests"
        assert "requests per min (RPM): Limit 2, Used 2, Requested 1." in error_of(send(server)[2])["message"]
        assert send(server, {**CHAT, "model": "other"})[0] == 200


def test_a_request_no_bucket_can_hold_is_too_large():
    """A request larger than the bucket is refused without a wait."""
    with SimulatedServer(tpm=1200, window=5) as server:
        status, headers, raw = send(server, {**CHAT, "max_tokens": 200})
    assert status == 429
    assert error_of(raw)["message"] == (
        "Request too large for m in organization org-sim on tokens per min (TPM): Limit 1200, Requested 208. "
        "The input or output tokens must be reduced in order to run successfully."
    )
    assert "retry-after" not in headers


def test_headers_show_the_buckets():
    """Limit, rest and reset are in the headers, streamed or not."""
    with SimulatedServer(rpm=60, tpm=6000) as server:
        for body in (CHAT, {**CHAT, "stream": True}):
            server.reset()
            _, headers, _ = send(server, body)
            assert headers["x-ratelimit-limit-requests"] == "60"
            assert headers["x-ratelimit-remaining-requests"] == "59"
            assert headers["x-ratelimit-limit-tokens"] == "6000"
            assert 6000 - 24 <= int(headers["x-ratelimit-remaining-tokens"]) < 6000
            assert headers["x-ratelimit-reset-tokens"].endswith("ms")
            assert headers["x-request-id"].startswith("req_")
            assert headers["openai-processing-ms"].isdigit()
        ids = {send(server)[1]["x-request-id"] for _ in range(3)}
        assert len(ids) == 3


def test_limits_change_while_running():
    """New limits hold at once; one that admits nothing is refused."""
    with SimulatedServer(rpm=1) as server:
        assert [send(server)[0] for _ in range(2)] == [200, 429]
        server.set_limits(rpm=None, tpm=6000)
        status, headers, _ = send(server)
        assert (status, server.rpm, server.tpm) == (200, None, 6000)
        assert "x-ratelimit-limit-requests" not in headers
        assert headers["x-ratelimit-limit-tokens"] == "6000"
        server.set_limits(tpm=1)
        assert send(server)[0] == 429
        with pytest.raises(ValueError, match="rpm must be positive"):
            server.set_limits(rpm=0)


def test_reset_forgets_and_refills():
    """After a reset there are no calls and the buckets are full; indexes go on."""
    with SimulatedServer(rpm=1) as server:
        assert [send(server)[0] for _ in range(2)] == [200, 429]
        server.reset()
        assert (server.calls, server.counts, server.max_in_flight) == ([], {}, 0)
        assert send(server)[0] == 200
        assert server.calls[0].index == 2


def test_limits_can_be_changed_from_within_an_answer():
    """The server's own thread may change the limits."""

    def answer(_):
        server.set_limits(rpm=5)
        return "done"

    with SimulatedServer(answer=answer) as server:
        assert send(server)[0] == 200
        assert server.rpm == 5


def test_a_bucket_keeps_its_proportion_when_resized():
    """A quarter full stays a quarter full, and refills at the new rate."""
    clock = Clock()
    bucket = Bucket(60, 60, clock=clock)
    bucket.take(45)
    bucket.resize(600)
    assert (bucket.level, bucket.capacity) == (150, 600)
    clock.now = 1
    assert bucket.level == 160
    assert bucket.wait(200) == pytest.approx(4)
    assert bucket.wait(601) == float("inf")


@given(
    limit=st.floats(1, 1e6),
    window=st.floats(1, 120),
    steps=st.lists(st.tuples(st.floats(0, 30), st.floats(0, 1)), min_size=1, max_size=40),
)
def test_no_span_admits_more_than_a_bucket_and_its_refill(limit, window, steps):
    """Over any span, at most a full bucket and its refill are taken."""
    clock = Clock()
    bucket = Bucket(limit, window, clock=clock)
    taken = []
    for pause, share in steps:
        clock.now += pause
        cost = share * bucket.capacity
        if not bucket.wait(cost):
            bucket.take(cost)
            taken.append((clock.now, cost))
    for start in range(len(taken)):
        span = taken[-1][0] - taken[start][0]
        spent = sum(cost for _, cost in taken[start:])
        assert spent <= bucket.capacity + span * limit / 60 + 1e-3


def refused_for(limits, cost):
    """Seconds to wait, as the refusal says; 0 for an admission."""
    try:
        limits.admit("m", cost)
    except ApiError as error:
        return int(error.headers["retry-after-ms"]) / 1000
    return 0


@given(limit=st.floats(1, 1e6), cost=st.integers(1, 1000))
def test_a_request_that_waits_as_told_is_admitted(limit, cost):
    """After the wait in retry-after-ms there is room."""
    clock = Clock()
    limits = Limits(Options(tpm=limit, window=60 * 1000), clock=clock)
    for _ in range(20):
        if wait := refused_for(limits, cost):
            clock.now += wait
            limits.admit("m", cost)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"), (0.0165, "17ms"), (1, "1s"), (8.64, "8.64s"), (62.5, "1m2.5s"), (360, "6m0s"),
        (0.9999, "1s"), (7200.5, "2h0m0.5s"),
    ],
)  # fmt: skip
def test_durations_are_written_as_the_api_does(seconds, text):
    """Times are rounded up to whole milliseconds and written in hours, minutes and seconds."""
    assert duration(seconds) == text
