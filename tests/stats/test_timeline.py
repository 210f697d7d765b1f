"""What happened when, in a fixed number of intervals."""

import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openai_eval_client import _stats
from openai_eval_client._stats import BINS, Timeline


def after(events, start=1000.0):
    """A history of attempts, each a pause after the one before, with its seconds and tokens."""
    timeline, now = Timeline(), start
    moments = []
    for pause, seconds, tokens in events:
        now += pause
        moments += [(now, 0, tokens, seconds), (now + seconds, 1, tokens, seconds)]
    for at, is_end, tokens, seconds in sorted(moments):
        if is_end:
            timeline.ended("m", at, seconds, tokens)
        else:
            timeline.admitted("m", at, at, tokens)
    return timeline.history()


steps = st.tuples(st.floats(0, 9), st.floats(0, 500), st.integers(0, 1000))


@given(st.lists(steps, min_size=1, max_size=60))
def test_nothing_is_lost_however_long_it_takes(events):
    """Sums over all intervals are what was recorded; time in flight is the sum of all attempts."""
    history = after(events)
    recorded = history.models["m"]
    assert sum(recorded.admitted) == len(events)
    assert sum(recorded.reserved) == sum(recorded.used) == sum(tokens for *_, tokens in events)
    assert recorded.seconds == pytest.approx(sum(seconds for _, seconds, _ in events))
    lengths = [min(history.width, max(history.seconds - n * history.width, 0)) for n in range(BINS)]
    area = sum(mean * length for mean, length in zip(history.in_flight, lengths, strict=True))
    assert area == pytest.approx(recorded.seconds, abs=1e-3)


@given(st.lists(steps, min_size=1, max_size=60))
def test_all_of_it_fits_the_intervals(events):
    """The intervals are no wider than they must be, and none is used beyond the end."""
    history = after(events)
    assert history.seconds < BINS * history.width
    assert history.width == 0.25 or history.seconds >= BINS * history.width / 2
    end = int(history.seconds / history.width) + 1
    assert not any(history.models["m"].admitted[end:])


def test_a_long_run_takes_no_more_memory_than_a_short_one():
    """A million seconds fit the same arrays."""
    short, long = after([(1, 1, 1)] * 3), after([(9, 1, 1)] * 3000)
    sizes = [
        sum(sys.getsizeof(getattr(h.models["m"], name)) for name in _stats.ModelTimeline.__slots__)
        for h in (short, long)
    ]
    assert sizes[0] == sizes[1]
    assert long.seconds > 20_000


def test_what_happens_in_an_interval_stays_there():
    """It stays there when the intervals widen."""
    timeline = Timeline()
    for at in (0.0, 1.1, 59.9):
        timeline.admitted("m", at, at, 10)
    admitted = timeline.history().models["m"].admitted
    assert [n for n, count in enumerate(admitted) if count] == [0, 4, 239]
    timeline.admitted("m", 60.0, 60.0, 10)
    history = timeline.history()
    assert history.width == 0.5
    assert [n for n, count in enumerate(history.models["m"].admitted) if count] == [0, 2, 119, 120]


def test_idle_time_is_left_out_and_waiting_is_not():
    """A notebook that is left alone overnight does not squeeze the run into one column."""
    timeline = Timeline()
    timeline.admitted("m", 0.0, 0.0, 1)
    timeline.ended("m", 2.0, 2.0, 1)
    timeline.admitted("m", 50_002.0, 50_002.0, 1)
    timeline.ended("m", 50_003.0, 1.0, 1)
    timeline.admitted("m", 50_004.0, 50_304.0, 1)  # a pause of the server
    history = timeline.history()
    assert history.breaks == {1: 50_000.0}  # two seconds an interval by now
    assert history.seconds == 303.0 + 1.0


def test_nothing_is_left_out_while_something_is_in_flight():
    """An answer that takes long is no pause."""
    timeline = Timeline()
    timeline.admitted("m", 0.0, 0.0, 1)
    timeline.admitted("m", 100.0, 100.0, 1)
    assert timeline.history().breaks == {}


def test_breaks_are_joined_when_intervals_are():
    """There are no more breaks than intervals."""
    timeline, now = Timeline(), 0.0
    for _ in range(2000):
        timeline.admitted("m", now, now, 1)
        now += 5
        timeline.ended("m", now, 5.0, 1)
        now += 20
    history = timeline.history()
    assert len(history.breaks) <= BINS
    assert math.fsum(history.breaks.values()) == pytest.approx(1999 * 20)
    assert history.seconds == pytest.approx(2000 * 5)


def test_models_beyond_a_number_are_put_together():
    """Requests without a model share a timeline, too."""
    timeline = Timeline()
    for number in range(1000):
        timeline.admitted(f"m{number}", 0.0, 0.0, 1)
    timeline.admitted(None, 0.0, 0.0, 0)
    models = timeline.history().models
    assert len(models) == 25
    assert sum(models["other models"].admitted) == 1000 - 24 + 1


def test_ends_are_told_apart():
    """An attempt was answered, rate limited, failed, or never sent."""
    timeline = Timeline()
    for status, used in ((200, 7), (429, None), (500, None), (None, None), (None, 0)):
        timeline.admitted("m", 0.0, 0.0, 1)
        timeline.ended("m", 0.1, 0.1, used, rate_limited=status == 429)
    recorded = timeline.history().models["m"]
    assert (sum(recorded.used), sum(recorded.rate_limited), sum(recorded.failed)) == (7, 1, 2)
    assert timeline._in_flight == 0


def test_events_out_of_order_are_taken_as_of_now():
    """Events of several threads come in any order."""
    timeline = Timeline()
    timeline.admitted("m", 5.0, 5.0, 1)
    timeline.admitted("m", 4.0, 4.0, 1)
    timeline.ended("m", 3.0, 1.0, 1)
    history = timeline.history()
    assert history.seconds == 0.0
    assert sum(history.models["m"].admitted) == 2


def test_before_anything_there_is_nothing():
    """A timeline begins with the first admission."""
    history = Timeline().history()
    assert (history.began_at, history.seconds, history.models) == (None, 0.0, {})
