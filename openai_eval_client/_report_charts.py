"""The pictures of a client's report: requests and tokens over time, time spent, latency."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from openai_eval_client import _charts, _page
from openai_eval_client._charts import Layer, Timeline
from openai_eval_client._html import Markup, count, duration, escape, name, percent, short, table
from openai_eval_client._stats import Histogram

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from openai_eval_client._budget import Limit
    from openai_eval_client._limiter import Facts
    from openai_eval_client._stats import Story
    from openai_eval_client._timeline import History, Track
    from openai_eval_client.models import ClientStats

_COLUMNS = 80  # of a picture over time
_DRAWN = 6  # models that have pictures of their own
_MINUTE = 60.0
_CAUSES = {
    "server": "at the server",
    "requests": "waiting for requests per minute",
    "tokens": "waiting for tokens per minute",
    "concurrency": "waiting for a place in flight",
    "pause": "waiting out the server's pauses",
    "retries": "waiting before retries",
}


@dataclass(frozen=True, slots=True)
class _Axis:
    """The columns that all pictures over time have.

    Attributes:
        history: What they show.
        seconds: How long it is; at least a second.
        group: Intervals of the history to a column.
        columns: How many columns.
    """

    history: History
    seconds: float
    group: int
    columns: int

    @classmethod
    def of(cls, history: History) -> _Axis:
        """Return those that fit a history: of a second at least, and not too many."""
        seconds = max(history.seconds, 1.0)
        group = math.ceil(max(1.0, seconds / _COLUMNS) / history.width)
        return cls(history, seconds, group, math.ceil(seconds / (group * history.width)))

    @property
    def step(self) -> float:
        """Seconds of a column."""
        return self.group * self.history.width

    @property
    def unit(self) -> str:
        """Of time, in which rates are shown."""
        return "min" if self.seconds >= _MINUTE else "s"

    @property
    def per(self) -> str:
        """The same, in full."""
        return "minute" if self.unit == "min" else "second"

    @property
    def scale(self) -> float:
        """Seconds in that unit."""
        return _MINUTE if self.unit == "min" else 1.0

    def length(self, number: int) -> float:
        """Return how much of a column has passed, in seconds; of the last, half at least."""
        if self.columns == 1:
            return self.step
        return min(self.step, max(self.seconds - number * self.step, self.step / 2))

    def sums(self, values: Sequence[float]) -> list[float]:
        """Return what happened in each column."""
        return [sum(values[n * self.group : (n + 1) * self.group]) for n in range(self.columns)]

    def rates(self, values: Sequence[float]) -> list[float]:
        """Return the same per unit of time."""
        return [total * self.scale / self.length(n) for n, total in enumerate(self.sums(values))]

    def totals(self, what: str) -> list[float]:
        """Return what happened in each column, of all models together."""
        tracks = self.history.tracks.values()
        return [sum(each) for each in zip(*(self.sums(getattr(t, what)) for t in tracks), strict=True)]

    def means(self, values: Sequence[float]) -> list[float]:
        """Return the mean of what had a value in each interval, over each column."""
        width, end = self.history.width, self.history.seconds
        lengths = [min(width, max(end - n * width, 0.0)) for n in range(len(values))]
        areas = self.sums([value * length for value, length in zip(values, lengths, strict=True)])
        return [area / max(length, 1e-9) for area, length in zip(areas, self.sums(lengths), strict=True)]

    def picture(
        self,
        title: str,
        unit: str,
        layers: Sequence[Layer],
        *,
        line: Layer | None = None,
        limits: Mapping[str, float] | None = None,
    ) -> Markup:
        """Return a picture on this axis."""
        breaks = {(n + 0.5) * self.history.width: each for n, each in self.history.breaks.items()}
        of = Timeline(title, unit, self.seconds, self.step, layers, line, limits or {}, breaks)
        return _charts.over_time(of)


def pictures(stats: ClientStats, story: Story, facts: Sequence[Facts]) -> Iterator[Markup]:
    """Return the sections that are pictures."""
    if story.history.tracks:
        axis = _Axis.of(story.history)
        yield from _limits(axis, facts)
        yield _page.section("In flight, and refused", _page.figures(_flight(axis, facts)))
    drawn = [*_where_time_went(stats), *_latencies(stats, story)]
    if drawn:
        note = (
            "Time is summed over all requests: ten that wait for a second are ten seconds. "
            "Prompts that were not taken up yet do not count."
        )
        yield _page.section("Where time went", _page.figures(drawn), note=note)


def latency(classes: Mapping[int, int], marks: Mapping[str, float], what: str) -> Markup:
    """Return the histogram of latency; `what` says of what."""
    drawn = _charts.histogram("Latency", classes, Histogram.value_of, marks)
    return _page.figure("How long answers took", drawn, {"time": f"{what}; the axis of time is logarithmic"})


def _limits(axis: _Axis, facts: Sequence[Facts]) -> Iterator[Markup]:
    """Return the pictures of the models that spent most, against their limits."""
    tracks, known = axis.history.tracks, {each.model: each for each in facts}
    largest = sorted(known.keys() & tracks.keys(), key=lambda model: (-sum(tracks[model].reserved), model))
    drawn: list[Markup] = []
    for model in largest[:_DRAWN]:
        drawn += [_requests(axis, tracks[model], known[model]), _tokens(axis, tracks[model], known[model])]
    left = len(tracks) - len(largest[:_DRAWN])
    more = f" The table of models has {count(left)} more." if left else ""
    wide = duration(axis.step)
    note = f"Each column is {wide}. At first, a full bucket lets more through than the limit.{more}"
    if drawn:
        yield _page.section("Requests and tokens against their limits", _page.figures(drawn), note=note)


def _requests(axis: _Axis, track: Track, facts: Facts) -> Markup:
    layers = [Layer("sent", "admitted", axis.rates(track.admitted))]
    title = f"requests per {axis.per}"
    limits = _named(facts.requests, axis)
    drawn = axis.picture(f"{title}, {facts.model}", f"requests/{axis.unit}", layers, limits=limits)
    return _page.figure(Markup(f"{name(facts.model)}: {title}"), drawn, {"admitted": "sent"})


def _tokens(axis: _Axis, track: Track, facts: Facts) -> Markup:
    layers = [Layer("reserved", "reserved", axis.rates(track.reserved))]
    line = Layer("used", "used", axis.rates(track.used))
    title, limits = f"tokens per {axis.per}", _named(facts.tokens, axis)
    drawn = axis.picture(f"{title}, {facts.model}", f"tokens/{axis.unit}", layers, line=line, limits=limits)
    keys = {"reserved": "reserved when sent", "used": "used by answers"}
    return _page.figure(Markup(f"{name(facts.model)}: {title}"), drawn, keys)


def _named(limit: Limit, axis: _Axis) -> dict[str, float]:
    """Return the limits to be marked, by what is written there."""
    known = {"limit": limit.configured, "server's limit": limit.server}
    if limit.configured == limit.server:
        known.pop("server's limit")
    return {
        f"{label} {short(value)}/min": value * axis.scale / _MINUTE for label, value in known.items() if value
    }


def _flight(axis: _Axis, facts: Sequence[Facts]) -> Iterator[Markup]:
    """Return how many were in flight, and which attempts brought nothing."""
    means, bound = axis.means(axis.history.in_flight), [each.max_concurrent for each in facts]
    limits = {f"max_concurrent {bound[0]:g}": bound[0]} if len(bound) == 1 and max(means) <= bound[0] else {}
    limits = {label: value for label, value in limits.items() if math.isfinite(value)}
    layer = Layer("in flight", "flight", means)
    drawn = axis.picture("Requests in flight", "requests", [layer], limits=limits)
    yield _page.figure("Requests in flight, on average", drawn, {"flight": "in flight"})
    limited, failed = axis.totals("rate_limited"), axis.totals("failed")
    if any(limited) or any(failed):
        layers = [Layer("429", "rate_limited", limited), Layer("other failures", "failed", failed)]
        keys = {"rate_limited": "status 429", "failed": "other failures"}
        drawn = axis.picture("Attempts without an answer", f"in {duration(axis.step)}", layers)
        yield _page.figure(f"Attempts without an answer, each {duration(axis.step)}", drawn, keys)


def _where_time_went(stats: ClientStats) -> Iterator[Markup]:
    known = {"server": stats.server_seconds, "retries": stats.retry_seconds, **stats.wait_seconds_by}
    spent = {cause: known[cause] for cause in {**_CAUSES, **known} if known.get(cause, 0.0) > 0}
    whole = sum(spent.values())
    if not whole:
        return
    parts = [
        (_CAUSES.get(cause, f"waiting: {cause}"), cause, seconds / whole) for cause, seconds in spent.items()
    ]
    rows = [(_swatch(cause, label), duration(spent[cause]), percent(share)) for label, cause, share in parts]
    drawn = f"{_charts.shares('Where time went', parts)}{table(('', 'time', 'share'), rows)}"
    yield _page.figure("Time of all requests together", drawn, {}, kind="share")


def _swatch(style: str, label: str) -> Markup:
    return Markup(f'<span class="swatch {style}"></span>{escape(label)}')


def _latencies(stats: ClientStats, story: Story) -> Iterator[Markup]:
    known = {"p50": stats.latency_p50, "p95": stats.latency_p95, "p99": stats.latency_p99}
    marks = {label: value for label, value in known.items() if value is not None}
    if story.latency:
        yield latency(story.latency, marks, "attempts that were answered")
