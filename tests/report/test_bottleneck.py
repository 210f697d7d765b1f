"""What bound a run, and what to do about it."""

from dataclasses import replace

import pytest

from openai_eval_client._limits.buckets import Limit
from openai_eval_client._limits.queue import ModelLimits
from openai_eval_client._report.page import bottleneck, limit_shares
from openai_eval_client._stats import Timeline
from openai_eval_client.models import ClientStats


def ran(count=600, *, seconds=60.0, latency=0.5, reserved=100, used=90):
    """A history of so many requests, evenly spread."""
    timeline = Timeline()
    starts = [n * (seconds - latency) / count for n in range(count)]
    moments = sorted([(at, 0) for at in starts] + [(at + latency, 1) for at in starts])
    for at, is_end in moments:
        if is_end:
            timeline.ended("m", at, latency, 200, used)
        else:
            timeline.admitted("m", at, at, reserved)
    return timeline.history()


def facts(waited=None, *, requests=None, tokens=None, server=None, burst=0.0, concurrent=10, length=None):
    """The limits of a model, and what it waited for."""
    return ModelLimits(
        "m",
        Limit(requests, None, burst if requests else 0.0),
        Limit(tokens, server, burst if tokens else 0.0),
        concurrent,
        waited or {},
        length or {},
    )


def stats(**counts):
    """Totals of 600 requests."""
    return ClientStats(**{"requests": 600, "attempts": 600, "server_seconds": 300.0, **counts})


def test_a_run_that_used_its_tokens_up_was_bound_by_them():
    """It says how much of the limit, and what lets more through."""
    one = facts({"tokens": 900.0}, requests=6000, tokens=60_000)
    said = bottleneck(stats(), [one], ran())
    assert (said.cause, said.headline) == ("tokens", "bound by tokens per minute (m): 100% used")
    assert any("Batch API" in sentence for sentence in said.advice)


def test_reservations_that_are_too_large_are_named():
    """With what answers really take."""
    one = facts({"tokens": 900.0}, tokens=300_000, length={"mean": 50.0, "spread": 10.0})
    said = bottleneck(stats(), [one], ran(reserved=500, used=60))
    assert "reserved 500 tokens and used 60" in said.advice[0]
    assert "50 tokens on average; 80 fit" in said.advice[0]


@pytest.mark.parametrize(
    ("configured", "server", "said"),
    [
        (
            60_000,
            600_000,
            "RateLimitConfig(tokens_per_minute=600000) would admit up to 10.0 times as much",
        ),
        (600_000, 60_000, "tokens_per_minute=60000 says it from the start"),
        (60_000, 60_000, None),
        (60_000, None, None),
    ],
)
def test_a_limit_that_is_not_the_servers_is_named(configured, server, said):
    """The defaults are lower than most accounts' limits."""
    advice = bottleneck(stats(), [facts({"tokens": 900.0}, tokens=configured, server=server)], ran()).advice
    found = [sentence for sentence in advice if "server" in sentence and "limit" in sentence]
    assert (said in found[0]) if said else not [each for each in found if "configured" in each]


def test_a_run_that_waited_for_requests_is_told_to_send_fewer():
    """Of the same tokens."""
    said = bottleneck(stats(), [facts({"requests": 900.0}, requests=600)], ran())
    assert said.headline == "bound by requests per minute (m): 100% used"
    assert said.advice[0].startswith("Several questions in one prompt")


def test_a_run_with_too_few_in_flight_is_told_how_many_would_do():
    """Rate x latency: 100 a second for half a second."""
    one = facts({"concurrency": 900.0}, requests=6000, concurrent=10)
    said = bottleneck(stats(), [one], ran())
    assert said.cause == "concurrency"
    assert "10% of its requests per minute used" in said.headline
    assert "about 50 in flight would use the limits up" in said.advice[0]


def test_without_limits_nobody_knows_how_many_would_do():
    """It can be tried out."""
    said = bottleneck(stats(), [facts({"concurrency": 900.0})], ran())
    assert said.advice[0].startswith("Raise max_concurrent step by step")


def test_a_short_run_within_its_burst_is_told_that_it_was_one():
    """More in flight would only spend the bucket sooner."""
    one = facts({"concurrency": 90.0}, requests=600, burst=600.0, concurrent=10)
    said = bottleneck(stats(), [one], ran(200, seconds=10.0))
    assert "a full bucket" in said.advice[0]


def test_a_run_that_was_refused_again_and_again_is_told_so():
    """And which limit it was."""
    totals = stats(rate_limited=17, rate_limited_by={"tokens": 15, "requests": 2})
    said = bottleneck(totals, [facts({"pause": 900.0, "tokens": 1.0})], ran())
    assert said.headline == "held up by the server: 17 times 429, mostly for tokens"


def test_a_run_of_failures_was_slowed_by_them():
    """Not by a limit."""
    said = bottleneck(stats(retries=90, retry_seconds=400.0), [facts({"tokens": 10.0})], ran())
    assert (said.cause, said.headline) == ("retries", "slowed by 90 retries after failed attempts")


def test_one_prompt_after_the_other_is_bound_by_the_server():
    """No limit held anything up."""
    said = bottleneck(stats(), [facts({})], ran())
    assert said.cause == "server"
    assert "500 ms at the server" in said.advice[0]


def test_a_short_run_that_was_paced_says_that_the_limit_was_not_used_up():
    """A client begins slowly."""
    said = bottleneck(stats(), [facts({"tokens": 90.0}, tokens=1_000_000)], ran(100, seconds=10.0))
    assert said.headline.startswith("paced by tokens per minute (m): ")
    assert "It was short" in said.advice[0]


def test_nothing_sent_is_said():
    """From the cache, or not at all."""
    assert bottleneck(ClientStats(), [], ran(0)).headline == "nothing was sent"
    assert "cache" in bottleneck(ClientStats(requests=3, cache_hits=3), [], ran(0)).headline


def test_shares_are_of_the_lower_limit_and_count_the_burst():
    """As `ClientStats.utilisation` has it, but until the last event."""
    history = ran(600, seconds=60.0, reserved=100)
    one = facts(requests=600, tokens=600_000, server=60_000, burst=600.0)
    used = limit_shares(one, history)
    assert used["requests"] == pytest.approx(0.5, rel=0.01)
    assert used["tokens"] == pytest.approx(60_000 / 60_600, rel=0.01)
    rested = limit_shares(one, replace(history, breaks={3: 60.0, 9: 3600.0}))
    assert rested["requests"] == pytest.approx(600 / 2400, rel=0.01)


def test_a_wait_for_something_else_is_named():
    """Whatever else a limit may be shared through."""
    said = bottleneck(stats(), [facts({"elsewhere": 900.0})], ran())
    assert said.headline == "held up by elsewhere (m)"
