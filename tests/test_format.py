"""Numbers, money and times as text; data as JSON."""

import json
import math
from datetime import datetime, timezone
from decimal import Decimal

import pytest

from openai_eval_client._format import (
    bounds_text,
    count,
    dollars,
    duration,
    percent,
    plain,
    short,
    timer,
    to_json,
    usd,
    valid_text,
)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0 s"),
        (0.0123, "12 ms"),
        (1, "1 s"),
        (9.87, "9.9 s"),
        (59.9, "59 s"),
        (250, "4 min 10 s"),
        (3600, "1 h"),
        (7500, "2 h 5 min"),
        (200_000, "2 d 7 h"),
    ],
)
def test_durations_have_units(seconds, shown):
    """They are given in the two largest."""
    assert duration(seconds) == shown


@pytest.mark.parametrize(
    ("amount", "shown"),
    [(None, "unknown"), (0, "$0.00"), (1234.5, "$1,234.50"), (0.00012345, "$0.00012"), (0.05, "$0.050")],
)
def test_small_amounts_are_not_nothing(amount, shown):
    """Below a dime two digits are shown; an unknown amount is not zero."""
    assert dollars(amount) == shown
    assert amount is None or f"${usd(amount)}" == shown


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (0, "0"),
        (12.5, "12.5"),
        (999.96, "1k"),
        (1234, "1.23k"),
        (123_456, "123k"),
        (999_950, "1M"),
        (2e6, "2M"),
    ],
)
def test_short_numbers_have_three_digits(number, shown):
    """A number that rounds up to the next prefix has that prefix."""
    assert short(number) == shown


def test_counts_and_shares():
    """Whole numbers are grouped, and a small share has a digit after the point."""
    assert (count(12_345), count(0.6)) == ("12,345", "1")
    assert (percent(0.97), percent(0.004), percent(0)) == ("97%", "0.4%", "0%")


@pytest.mark.parametrize(
    ("seconds", "shown"), [(7, "0:07"), (59.6, "1:00"), (754, "12:34"), (5025, "1:23:45")]
)
def test_a_timer_has_hours_only_where_there_are_some(seconds, shown):
    """Seconds are rounded before they are carried over."""
    assert timer(seconds) == shown


@pytest.mark.parametrize(
    ("low", "expected", "high", "shown"),
    [
        (None, None, None, "unknown"),
        (1, None, None, "1 or more"),
        (1, None, 9, "1 to 9"),
        (1, 4, 9, "1 to 9 (likely 4)"),
    ],
)
def test_bounds_say_what_is_known(low, expected, high, shown):
    """Without an upper bound the lower one stands alone."""
    assert bounds_text(low, expected, high, count) == shown


def test_half_a_surrogate_pair_becomes_the_replacement_character():
    """A whole pair is the character it stands for; any other text stays as it is."""
    assert valid_text("caf\u00e9 \U0001f600") == "caf\u00e9 \U0001f600"
    assert valid_text("cut \ud83d off") == "cut \ufffd off"
    assert valid_text("\ud83d\ude00") == "\U0001f600"


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ({"a": [1.5, "é", None]}, '{"a":[1.5,"é",null]}'),
        ([math.inf, -math.inf, {"b": (math.nan, 1)}], '[null,null,{"b":[null,1]}]'),
        ({math.inf: 1}, '{"inf":1}'),
        (["é", "\ud83d"], '["\\u00e9","\\ud83d"]'),
        (["é", "\ud83d", math.nan], '["\\u00e9","\\ud83d",null]'),
    ],
)
def test_json_is_what_every_parser_takes(value, written):
    """A number that JSON does not have is null, half a surrogate pair escaped; all else is as it is."""
    assert to_json(value).decode() == written
    json.loads(written, parse_constant=pytest.fail)
    assert to_json(value, only_ascii=True).isascii()


def test_json_of_a_circle_or_of_an_object_is_an_error():
    """As of the standard library, though a circle is found in another way."""
    circle: list = []
    circle.append(circle)
    with pytest.raises((ValueError, RecursionError)):
        to_json(circle)
    with pytest.raises(TypeError):
        to_json([object()])


def test_plain_data_is_what_json_has():
    """Money is a float, a time is ISO 8601, and sets are lists."""
    moment = datetime(2026, 1, 2, tzinfo=timezone.utc)
    found = plain({"a": Decimal("1.5"), "b": (moment, math.inf), 3: {4}})
    assert found == {"a": 1.5, "b": ["2026-01-02T00:00:00+00:00", None], "3": [4]}
