"""What bound a run, and what to do about it."""

from dataclasses import replace

import pytest

from openai_eval_client._limits.buckets import Limit
from openai_eval_client._limits.queue import ModelLimits
from openai_eval_client._report.page import bottleneck, limit_shares
from openai_eval_client._stats import Timeline
from openai_eval_client.models import ClientStats


def ran(count=600, *, seconds=60.0, latency=0.5, reserved=100, used=90):
    """A history of `count` requests, evenly spread."""
    timeline = Timeline()
    starts = [n * (seconds - latency) / count for n in range(count)]
    moments = sorted([(at, 0) for at in starts] + [(at + latency, 1) for at in starts])
    for at, is_end in moments:
        if is_end:
            timeline.ended("m", at, latency, used)
        else:
            timeline.admitted("m", at, at, reserved)
    return timeline.history()


def limits(waited=None, *, requests=None, tokens=None, server=None, burst=0.0, concurrent=10, length=None):
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
    """The page says how much of the limit was used, and what lets more through."""
    limited = limits({"tokens": 900.0}, requests=6000, tokens=60_000)
    result = bottleneck(stats(), [limited], ran())
    assert result.headline == "bound by tokens per minute (m): 100% used"
    assert any("Batch API" in sentence for sentence in result.advice)


def test_reservations_that_are_too_large_are_named():
    """The advice says what answers really take."""
    limited = limits({"tokens": 900.0}, tokens=300_000, length={"mean": 50.0, "spread": 10.0})
    result = bottleneck(stats(), [limited], ran(reserved=500, used=60))
    assert "reserved 500 tokens and used 60" in result.advice[0]
    assert "50 tokens on average; 80 fit" in result.advice[0]


@pytest.mark.parametrize(
    ("configured", "server", "advice"),
    [
        (
            60_000,
            600_000,
            "RateLimitConfig(tokens_per_minute=600000) would admit up to 10.0 times as much",
        ),
        (600_000, 60_000, "tokens_per_minute=60000 keeps to it from the start"),
        (60_000, 60_000, None),
        (60_000, None, None),
    ],
)
def test_a_limit_that_is_not_the_servers_is_named(configured, server, advice):
    """The defaults are lower than most accounts' limits."""
    result = bottleneck(stats(), [limits({"tokens": 900.0}, tokens=configured, server=server)], ran())
    found = [sentence for sentence in result.advice if "server" in sentence and "limit" in sentence]
    assert (advice in found[0]) if advice else not [each for each in found if "configured" in each]


def test_a_run_that_waited_for_requests_should_send_fewer():
    """Several questions in one prompt take the same tokens."""
    result = bottleneck(stats(), [limits({"requests": 900.0}, requests=600)], ran())
    assert result.headline == "bound by requests per minute (m): 100% used"
    assert result.advice[0].startswith("Several questions in one prompt")


def test_for_a_run_with_too_few_in_flight_the_advice_is_how_many_suffice():
    """Rate x latency: 100 a second for half a second."""
    limited = limits({"concurrency": 900.0}, requests=6000, concurrent=10)
    result = bottleneck(stats(), [limited], ran())
    assert result.headline.startswith("bound by max_concurrent (m)")
    assert "10% of its requests per minute used" in result.headline
    assert "about 50 in flight would use the limits up" in result.advice[0]


def test_without_limits_it_is_unknown_how_many_suffice():
    """The advice is to try it out."""
    result = bottleneck(stats(), [limits({"concurrency": 900.0})], ran())
    assert result.advice[0].startswith("Raise max_concurrent step by step")


def test_a_short_run_within_its_burst_gains_nothing_from_more_in_flight():
    """They would only empty the bucket sooner."""
    limited = limits({"concurrency": 90.0}, requests=600, burst=600.0, concurrent=10)
    result = bottleneck(stats(), [limited], ran(200, seconds=10.0))
    assert "a full bucket" in result.advice[0]


def test_a_run_that_was_refused_again_and_again_was_held_up_by_the_server():
    """The headline names the limit that was reached most often."""
    totals = stats(rate_limited=17, rate_limited_by={"tokens": 15, "requests": 2})
    result = bottleneck(totals, [limits({"pause": 900.0, "tokens": 1.0})], ran())
    assert result.headline == "held up by the server: 17 times 429, mostly for tokens"


def test_a_run_of_failures_was_slowed_by_them():
    """Waits before retries took longer than those for a limit."""
    result = bottleneck(stats(retries=90, retry_seconds=400.0), [limits({"tokens": 10.0})], ran())
    assert result.headline == "slowed by 90 retries after failed attempts"


def test_one_prompt_after_the_other_is_bound_by_the_server():
    """No limit held a request up."""
    result = bottleneck(stats(), [limits({})], ran())
    assert result.headline == "bound by the time the server takes"
    assert "500 ms at the server" in result.advice[0]


def test_a_short_run_that_was_paced_did_not_use_the_limit_up():
    """A client begins slowly."""
    result = bottleneck(stats(), [limits({"tokens": 90.0}, tokens=1_000_000)], ran(100, seconds=10.0))
    assert result.headline.startswith("paced by tokens per minute (m): ")
    assert "It was short" in result.advice[0]


def test_a_client_that_sent_nothing_has_no_bottleneck():
    """Its answers came from the cache, or there were none."""
    assert bottleneck(ClientStats(), [], ran(0)).headline == "nothing was sent"
    assert "cache" in bottleneck(ClientStats(requests=3, cache_hits=3), [], ran(0)).headline


def test_shares_are_of_the_lower_limit_and_count_the_burst():
    """As `ClientStats.utilisation` has it, but until the last event."""
    history = ran(600, seconds=60.0, reserved=100)
    limited = limits(requests=600, tokens=600_000, server=60_000, burst=600.0)
    used = limit_shares(limited, history)
    assert used["requests"] == pytest.approx(0.5, rel=0.01)
    assert used["tokens"] == pytest.approx(60_000 / 60_600, rel=0.01)
    rested = limit_shares(limited, replace(history, breaks={3: 60.0, 9: 3600.0}))
    assert rested["requests"] == pytest.approx(600 / 2400, rel=0.01)
