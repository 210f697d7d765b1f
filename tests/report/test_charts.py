"""The charts of a report."""

import re
from xml.etree import ElementTree as ET

import pytest

from openai_eval_client._report.drawing import Layer, TimeAxis, histogram
from openai_eval_client._stats import History


def heights(svg):
    """The heights of all columns."""
    return [float(rect.get("height")) for rect in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}rect")]  # noqa: S314


def over_time(seconds, layer, **options):
    """A chart of one-second columns."""
    history = History(0.0, seconds, 1.0, {}, [], {})
    return TimeAxis(history).draw("t", "u", layer, **options)


def test_columns_are_as_high_as_their_values_from_zero():
    """Twice the value is twice the height."""
    drawn = heights(over_time(4.0, Layer("a", "a", [1.0, 2.0, 0.0, 4.0])))
    assert drawn[1] == pytest.approx(2 * drawn[0], abs=0.02)
    assert drawn[2] == pytest.approx(4 * drawn[0], abs=0.02)


def test_a_peak_is_cut_off_and_says_so():
    """The other columns stay readable."""
    values = [500.0, *[10.0] * 30]
    svg = over_time(31.0, Layer("a", "a", values), limits=[("limit 12", 12.0)])
    drawn = heights(svg)
    assert drawn[1] > 0.5 * drawn[0]
    assert "up to 500" in svg
    assert 'class="cut"' in svg


def test_a_limit_far_above_is_named_and_not_drawn():
    """Otherwise the columns could not be seen."""
    near = over_time(1.0, Layer("a", "a", [10.0]), limits=[("limit 20", 20.0)])
    far = over_time(1.0, Layer("a", "a", [10.0]), limits=[("limit 1M", 1e6)])
    assert 'class="limit"' in near
    assert 'class="limit"' not in far
    assert "far below limit 1M" in far


def test_a_histogram_has_every_value_in_a_bar():
    """However many classes there are, there are at most 36 bars."""
    svg = histogram(dict.fromkeys(range(-100, 400), 2), {"p50": 1.0})
    counted = sum(int(count) for count in re.findall(r": (\d+)</title>", svg))
    assert counted == 1000
    assert len(heights(svg)) <= 36
