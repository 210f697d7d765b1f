"""The server's headers: durations, waits and limits, and nonsense in each of them."""

import math
import time
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openai_eval_client._wire.headers import (
    StatedLimit,
    duration,
    read_stated_limit,
    read_stated_limits,
    refused_dimension,
    retry_after,
    stated_wait,
)
from openai_eval_client.errors import sdk_httpx


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1s", 1.0),
        ("0s", 0.0),
        ("17ms", 0.017),
        ("17.25ms", 0.01725),
        ("6m0s", 360.0),
        ("8.64s", 8.64),
        ("1h2m3.5s", 3723.5),
        ("1h0m0s", 3600.0),
        ("1d", 86_400.0),
        ("1d2h3m4s5ms", 93_784.005),
        ("2m59.56s", 179.56),
        ("007s", 7.0),
    ],
)
def test_durations_are_read(text, seconds):
    """A duration has one or several units, from milliseconds to days."""
    assert duration(text) == pytest.approx(seconds, rel=1e-12)


@pytest.mark.parametrize(
    "text",
    [
        None, "", " ", "5", "s", "1.s", ".5s", "-1s", "+1s", "1 s", "1s ", "1S", "1e3s", "1e999s", "nan",
               "inf", "soon", "1s2", "1,5s", "1w", "1us", "1s\n", "\n1s", "x1s", "9" * 400 + "s",
    ],
)  # fmt: skip
def test_a_text_that_is_not_a_duration_is_none(text):
    """It is unknown, never zero and never infinite."""
    assert duration(text) is None


@given(st.text())
def test_a_duration_is_finite_or_none(text):
    """Any text can be read without an exception."""
    seconds = duration(text)
    assert seconds is None or 0 <= seconds < math.inf


@given(st.integers(0, 99), st.integers(0, 59), st.integers(0, 59_999))
def test_a_duration_is_the_sum_of_its_parts(hours, minutes, milliseconds):
    """Hours, minutes and seconds are added up."""
    seconds = duration(f"{hours}h{minutes}m{milliseconds / 1000}s")
    assert seconds == pytest.approx(hours * 3600 + minutes * 60 + milliseconds / 1000)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "20"}, 20.0),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after": " 3 "}, 3.0),
        ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after-ms": "250.5"}, 0.2505),
        ({"retry-after-ms": "0"}, 0.0),
        ({"retry-after-ms": "250", "retry-after": "20"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "20"}, 20.0),
        ({"retry-after-ms": "", "retry-after": "20"}, 20.0),
        ({"retry-after-ms": "-1", "retry-after": "20"}, 20.0),
        ({"retry-after-ms": "nan", "retry-after": "20"}, 20.0),
        ({"retry-after-ms": "inf", "retry-after": "20"}, 20.0),
        ({"retry-after-ms": "0x10", "retry-after": "the day after tomorrow"}, None),
        ({"retry-after": ""}, None),
        ({"retry-after": "-5"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "-inf"}, None),
        ({"retry-after": "1e999"}, None),
        ({"retry-after": "99999999"}, 99_999_999.0),
        ({"retry-after": "20s"}, None),
        ({"retry-after": "Fri, 31 Dec 1999 23:59:59 GMT"}, 0.0),
        ({"retry-after": "Fri, 99 Dec 1999 23:59:59 GMT"}, None),
        ({"retry-after": "Fri, 31 Dec"}, None),
    ],
)
def test_the_wait_that_the_server_asks_for(headers, seconds):
    """`retry-after-ms` comes before `retry-after`, a past date is now, and nonsense is ignored."""
    assert retry_after(headers) == seconds
    assert retry_after(sdk_httpx().Headers(headers)) == seconds


def test_an_http_date_in_the_future_is_the_time_until_then():
    """The format is the preferred one of RFC 9110."""
    date = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=90), usegmt=True)
    assert 88 <= retry_after({"retry-after": date}) <= 90


def test_the_last_possible_date_can_be_read():
    """The wait is very long, but finite."""
    seconds = retry_after({"retry-after": "Fri, 31 Dec 9999 23:59:59 GMT"})
    assert seconds == pytest.approx(253_402_300_799 - time.time(), abs=5)


def test_header_names_ignore_case():
    """The SDK's header objects do so too."""
    assert retry_after(sdk_httpx().Headers({"Retry-After-MS": "1500"})) == 1.5


@given(st.text(), st.text())
def test_a_wait_is_finite_or_none(milliseconds, seconds):
    """Any text in either header can be read without an exception."""
    asked = retry_after({"retry-after-ms": milliseconds, "retry-after": seconds})
    assert asked is None or 0 <= asked < math.inf


WORDS = [
    "Mon",
    "Fri,",
    "31",
    "Dec",
    "1999",
    "99",
    "23:59:59",
    "23.59",
    "GMT",
    "-0000",
    "+9999",
    ":",
    "-",
    ",",
    "x",
]


@given(st.lists(st.sampled_from(WORDS)).map(" ".join))
def test_what_looks_like_a_date_is_finite_or_none(text):
    """The standard library's date parser may raise other errors than documented."""
    asked = retry_after({"retry-after": text})
    assert asked is None or 0 <= asked < math.inf


def quota(limit=None, remaining=None, reset=None, dimension="tokens"):
    given_ = {"limit": limit, "remaining": remaining, "reset": reset}
    headers = {f"x-ratelimit-{name}-{dimension}": text for name, text in given_.items() if text is not None}
    return read_stated_limit(sdk_httpx().Headers(headers), dimension)


@pytest.mark.parametrize("dimension", ["requests", "tokens"])
def test_a_quota_is_read(dimension):
    """Limit, remaining and reset are those of the dimension asked for."""
    assert quota("500", "499", "120ms", dimension) == StatedLimit(500, 499, 0.12)


def test_the_other_dimension_is_not_mistaken_for_it():
    """Headers about requests do not count for tokens."""
    headers = {"x-ratelimit-limit-requests": "500", "x-ratelimit-remaining-requests": "499"}
    assert read_stated_limit(headers, "requests") == StatedLimit(500, 499, None)
    assert read_stated_limit(headers, "tokens") is None


@pytest.mark.parametrize(
    ("limit", "remaining", "reset", "expected"),
    [
        ("500", "0", "1s", StatedLimit(500, 0, 1.0)),
        ("500", "499", None, StatedLimit(500, 499, None)),
        ("500", "499", "soon", StatedLimit(500, 499, None)),
        ("500", "499", "1e999s", StatedLimit(500, 499, None)),
        ("500", "501", "1s", StatedLimit(500, 500, 1.0)),
        ("500", "1e300", "1s", StatedLimit(500, 500, 1.0)),
        ("500.0", "499.9", "1s", StatedLimit(500, 499, 1.0)),
        ("500", None, "1s", None),
        (None, "499", "1s", None),
        (None, None, "1s", None),
        ("0", "0", "1s", None),
        ("-500", "499", "1s", None),
        ("500", "-7", "1s", None),
        ("many", "499", "1s", None),
        ("500", "NaN", "1s", None),
        ("inf", "499", "1s", None),
        ("500", "inf", "1s", None),
        ("", "", "", None),
        ("0.5", "0", "1s", None),
    ],
)
def test_a_quota_that_makes_no_sense_is_none(limit, remaining, reset, expected):
    """Nonsense is ignored, and no more can remain than the limit."""
    assert quota(limit, remaining, reset) == expected


@given(st.text(), st.text(), st.text())
def test_a_quota_is_within_its_limit_or_none(limit, remaining, reset):
    """Any text can be read without an exception."""
    names = ("limit", "remaining", "reset")
    headers = {
        f"x-ratelimit-{name}-tokens": text
        for name, text in zip(names, (limit, remaining, reset), strict=True)
    }
    read = read_stated_limit(headers, "tokens")
    assert read is None or (read.limit > 0 and 0 <= read.remaining <= read.limit)


def test_the_lower_of_project_and_organisation_limit_counts():
    """The API sends both; a reset in plain seconds, as Azure sends it, is read too."""
    headers = {
        "x-ratelimit-limit-tokens": "1000", "x-ratelimit-remaining-tokens": "900",
        "x-ratelimit-reset-tokens": "6", "x-ratelimit-limit-project-tokens": "500",
        "x-ratelimit-remaining-project-tokens": "400", "x-ratelimit-reset-project-tokens": "12s",
        "x-ratelimit-limit-requests": "60", "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1",
    }  # fmt: skip
    quotas = read_stated_limits(sdk_httpx().Headers(headers))
    assert quotas == {"tokens": StatedLimit(500, 400, 12.0), "requests": StatedLimit(60, 59, 1.0)}
    assert read_stated_limits(sdk_httpx().Headers({"content-type": "text/html"})) == {}


@pytest.mark.parametrize("reset", ["1795361825", "1795361825000", "2026-11-22T17:00:00Z", "-5"])
def test_a_reset_that_is_a_date_is_not_taken_for_seconds(reset):
    """Some servers send the moment of the reset: limit and remaining count, the reset is unknown."""
    assert quota("500", "400", reset) == StatedLimit(500, 400, None)


@pytest.mark.parametrize(
    ("message", "dimension"),
    [
        ("Rate limit reached for m in organization o on tokens per min (TPM): Limit 5", "tokens"),
        ("Rate limit reached for m in organization o on requests per day (RPD): Limit 5", "requests"),
        ("Requests to x have exceeded token rate limit of your current pricing tier.", "tokens"),
        ("Requests to x have exceeded call rate limit of your current pricing tier.", "requests"),
        ("Too many requests", None),
        ("", None),
    ],
)
def test_the_limit_that_a_refusal_names(message, dimension):
    """It is read from the messages of the API and of Azure."""
    assert refused_dimension(message) == dimension


@pytest.mark.parametrize(
    ("headers", "message", "seconds"),
    [
        ({"retry-after": "3"}, "Please try again in 7m12s.", 3),
        ({}, "Please try again in 7m12s. Visit", 432),
        ({}, "Please try again in 85ms.", 0.085),
        ({}, "Please retry after 6 seconds.", 6),
        ({}, "Please retry after 1 second.", 1),
        ({}, "Try later", None),
        ({}, "Please try again in a while", None),
    ],
)
def test_the_wait_that_a_refusal_states(headers, message, seconds):
    """The headers come before the message."""
    assert stated_wait(headers, message) == (None if seconds is None else pytest.approx(seconds))
