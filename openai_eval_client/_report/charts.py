"""The pictures of a report, as SVG."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from openai_eval_client._format import count, duration, percent, short
from openai_eval_client._report.html import Markup, escape, figure, figures, name, section, table
from openai_eval_client._stats import Histogram

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from openai_eval_client._limits import Limit, ModelLimits
    from openai_eval_client._stats import History, ModelTimeline, ReportData
    from openai_eval_client.models import ClientStats


WIDTH, HEIGHT = 440.0, 214.0
LEFT, RIGHT, TOP, BOTTOM = 44.0, 430.0, 22.0, 176.0
_TICKS = 4
_NICE = (1.0, 2.0, 2.5, 5.0, 10.0)
_HEADROOM = 1.08
_ROUNDING = 1e-9
_NARROW = 3.0  # a column that leaves no gap to the next
_GAP, _THINNEST = 0.6, 0.4


class Column(NamedTuple):
    """A column between two heights."""

    x: float  # its left side
    width: float  # how wide it is
    low: float  # where it begins, as a share of the axis
    high: float  # where it ends

    def drawn(self, style: str, said: str) -> str:
        """Return it in a class of the style sheet, with what is said of it."""
        upper, width = y_of(self.high), self.width - (_GAP if self.width > _NARROW else 0.0)
        return (
            f'<rect class="{style}" x="{self.x:.2f}" y="{upper:.2f}" width="{max(width, _THINNEST):.2f}" '
            f'height="{max(y_of(self.low) - upper, 0.0):.2f}"><title>{escape(said)}</title></rect>'
        )


def scale(highest: float) -> tuple[float, list[float]]:
    """Return the upper end of an axis from nought, and its ticks."""
    top = _HEADROOM * highest
    power = 10.0 ** math.floor(math.log10(top / _TICKS))
    step = next(power * nice for nice in _NICE if power * nice * (1 + _ROUNDING) >= top / _TICKS)
    return top, [n * step for n in range(_TICKS + 1) if n * step <= top]


def y_of(share: float) -> float:
    """Return the height of a share of the axis; what is beyond it stands at its end."""
    return BOTTOM - (BOTTOM - TOP) * min(max(share, 0.0), 1.0)


def x_of(share: float) -> float:
    """Return the place of a share of the axis of time."""
    return LEFT + (RIGHT - LEFT) * min(share, 1.0)


def grid(ticks: Sequence[float], top: float, unit: str) -> str:
    """Return the axis of amounts, with its unit."""
    lines = "".join(
        f'<path class="{"grid" if tick else "axis"}" d="M{LEFT} {y_of(tick / top):.1f}H{RIGHT}"/>'
        + text(LEFT - 5, y_of(tick / top) + 4, short(tick), "end")
        for tick in ticks
    )
    return lines + text(2, TOP - 10, unit, "start")


def tick(x: float, label: str) -> str:
    """Return a tick of the axis of time."""
    anchor = "end" if x > RIGHT - 14 else "middle"
    return f'<path class="axis" d="M{x:.1f} {BOTTOM}v4"/>' + text(x, BOTTOM + 18, label, anchor)


def text(x: float, y: float, said: str, anchor: str, style: str = "") -> str:
    """Return a text that begins, ends or has its middle at a place."""
    kind = f' class="{style}"' if style else ""
    return f'<text{kind} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(said)}</text>'


def picture(title: str, about: str, parts: Iterable[str]) -> Markup:
    """Return a picture with axes."""
    return svg(title, about, parts, f'viewBox="0 0 {WIDTH:g} {HEIGHT:g}"')


def svg(title: str, about: str, parts: Iterable[str], attributes: str) -> Markup:
    """Return an image that says what it shows."""
    return Markup(
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" {attributes}>'
        f"<title>{escape(title)}</title><desc>{escape(about)}</desc>{''.join(parts)}</svg>",
    )


_SECONDS = 0.2, 0.5, 1, 2, 5, 10, 15, 30
_LATER = 60, 120, 300, 600, 900, 1800, 3600, 7200, 14_400, 21_600, 43_200, 86_400
_TIME_TICKS = 6  # of an axis of time, at most
_FAR = 8.0  # times the highest column: a limit beyond is named, not drawn
_PEAK = 2.0  # times the rest: a column beyond is cut off, and says so
_CUT = 1.3  # times the rest is what is left to see then
_MANY = 10  # columns, from which one of them may be cut off
_USUAL = 0.9  # of the columns are not higher than this
_BARS, _FEWEST = 36, 12  # of a histogram
_LINE = 11.0  # the height of a line of text
_EDGE = 60.0
_SPOKEN = 3  # breaks whose length is written under them
_LABEL = 66.0  # how long one is


@dataclass(frozen=True, slots=True)
class Layer:
    """Columns of one colour, which stand on those before."""

    label: str  # what they count
    style: str  # their class in the style sheet
    values: Sequence[float]  # one for each column


@dataclass(frozen=True, slots=True)
class Timeline:
    """What a picture over time shows."""

    title: str  # what it is
    unit: str  # of the values
    seconds: float  # how long the axis of time is
    step: float  # seconds of each column
    layers: Sequence[Layer]  # the columns
    line: Layer | None = None  # A line over them
    limits: Mapping[str, float] = field(default_factory=dict)  # values to be marked, by what is written there
    breaks: Mapping[float, float] = field(default_factory=dict)  # seconds left out, by where on the axis

    @property
    def sums(self) -> list[float]:
        """How high the columns are."""
        return [sum(values) for values in zip(*(layer.values for layer in self.layers), strict=True)]

    def span(self, number: int) -> tuple[float, float]:
        """Return where a column begins and ends in the picture."""
        end = min((number + 1) * self.step, self.seconds)
        return x_of(number * self.step / self.seconds), x_of(end / self.seconds)


def over_time(of: Timeline) -> Markup:
    """Return columns over time."""
    values = [*of.sums, *(of.line.values if of.line else ())]
    near = {label: value for label, value in of.limits.items() if value <= _FAR * max(values)}
    top, ticks = scale(_reach(of, near.values()))
    parts = [
        grid(ticks, top, of.unit),
        *_time_axis(of.seconds),
        *_columns(of, top),
        *_peaks(of, top),
        *(_steps(of, of.line, top) if of.line else ()),
        *_limit_marks(near, top),
        *_far(of.limits.keys() - near.keys()),
        *_breaks(of),
    ]
    return picture(of.title, _described(of), parts)


def histogram(
    title: str,
    classes: Mapping[int, int],
    value_of: Callable[[float], float],
    marks: Mapping[str, float],
) -> Markup:
    """Return how often something took how long, on a logarithmic axis of time."""
    first, last = min(classes), max(classes)
    wide = -(-(last - first + 1) // _BARS)
    bars: dict[int, int] = {}
    for number, times in classes.items():
        bars[(number - first) // wide] = bars.get((number - first) // wide, 0) + times
    margin = max(2, (_FEWEST - max(bars)) // 2)
    slots = max(bars) + 1 + 2 * margin

    def edge(slot: float) -> float:
        return value_of(first + (slot - margin) * wide - 0.5)

    def place(seconds: float) -> float:
        return x_of(max(0.0, math.log(seconds / edge(0)) / math.log(edge(slots) / edge(0))))

    top, ticks = scale(max(bars.values()))
    width = (RIGHT - LEFT) / slots
    parts = [grid(ticks, top, "requests"), *_log_axis(edge(0), edge(slots), place)]
    for slot, times in sorted(bars.items()):
        said = f"{duration(edge(slot + margin))} to {duration(edge(slot + margin + 1))}: {times:,}"
        column = Column(x_of((slot + margin) / slots), width, 0.0, times / top)
        parts.append(column.drawn("time", said))
    parts += _marks(marks, place)
    about = ", ".join(f"{label} {duration(seconds)}" for label, seconds in marks.items())
    return picture(title, f"{sum(classes.values()):,} requests; {about}.", parts)


def shares(title: str, parts: Sequence[tuple[str, str, float]]) -> Markup:
    """Return one bar made of shares (0 to 1), each with its name and style."""
    drawn, at = [], 0.0
    for label, style, share in parts:
        said = escape(f"{label}: {100 * share:.1f}%")
        place = f'x="{100 * at:.3f}" y="0" width="{100 * share:.3f}" height="8"'
        drawn.append(f'<rect class="{style}" {place}><title>{said}</title></rect>')
        at += share
    about = "; ".join(f"{label} {100 * share:.1f}%" for label, _, share in parts)
    return svg(title, about, drawn, 'class="bar" viewBox="0 0 100 8" preserveAspectRatio="none"')


# --- the parts of a picture ------------------------------------------------------------------------------


def _reach(of: Timeline, limits: Iterable[float]) -> float:
    """Return how high the picture reaches: above all but a peak, as a full bucket at the start makes one."""
    sums, line = of.sums, of.line.values if of.line else ()
    highest = max([*sums, *line, *limits, 1e-9])
    usual = max([sorted(sums)[int(_USUAL * (len(sums) - 1))], *limits])
    return _CUT * usual if len(sums) >= _MANY and highest > _PEAK * usual > 0 else highest


def _columns(of: Timeline, top: float) -> Iterator[str]:
    below = [0.0] * len(of.sums)
    for layer in of.layers:
        for number, value in enumerate(layer.values):
            if value:
                x, right = of.span(number)
                said = f"{duration(number * of.step)}: {value:,.4g} {of.unit} {layer.label}"
                column = Column(x, right - x, below[number] / top, (below[number] + value) / top)
                yield column.drawn(layer.style, said)
        below = [low + value for low, value in zip(below, layer.values, strict=True)]


def _peaks(of: Timeline, top: float) -> Iterator[str]:
    """Sent the columns that are higher than the picture; the highest says how high."""
    sums = of.sums
    for number, total in enumerate(sums):
        if total > top:
            x = sum(of.span(number)) / 2
            yield f'<path class="cut" d="M{x - 4:.1f} {TOP + 1}l4 -6l4 6z"/>'
            if sums.index(max(sums)) == number:
                anchor, shift = ("start", 7) if x < (LEFT + RIGHT) / 2 else ("end", -7)
                yield text(x + shift, TOP, f"up to {short(total)}", anchor, "label")


def _steps(of: Timeline, layer: Layer, top: float) -> Iterator[str]:
    points = []
    for number, value in enumerate(layer.values):
        points += [f"{x:.2f} {y_of(value / top):.2f}" for x in of.span(number)]
    yield f'<path class="line {layer.style}" d="M{"L".join(points)}"/>'


def _limit_marks(limits: Mapping[str, float], top: float) -> Iterator[str]:
    """Sent each limit with a line; labels stand above the highest, and below others where there is room."""
    for number, (label, value) in enumerate(sorted(limits.items(), key=lambda pair: -pair[1])):
        y = y_of(value / top)
        below = number > 0 and y + 2 * _LINE < BOTTOM
        yield f'<path class="limit" d="M{LEFT} {y:.1f}H{RIGHT}"/>'
        yield text(RIGHT - 2, y + _LINE if below else y - 4, label, "end", "label")


def _far(labels: Iterable[str]) -> Iterator[str]:
    named = ", ".join(sorted(labels))
    if named:
        yield text(RIGHT, TOP - 10, f"far below {named}", "end")


def _breaks(of: Timeline) -> Iterator[str]:
    """Sent where time is left out; where that is often, how much is told by the pointer alone."""
    for at, left_out in of.breaks.items():
        x = x_of(at / of.seconds)
        said = escape(f"{duration(left_out)} in which nothing happened are left out here")
        yield f'<path class="break" d="M{x:.1f} {TOP}V{BOTTOM}"><title>{said}</title></path>'
        if len(of.breaks) <= _SPOKEN:
            anchor = "end" if x > RIGHT - _EDGE else "middle"
            yield text(x, BOTTOM + 34, f"{duration(left_out)} idle", anchor)


def _time_axis(seconds: float) -> Iterator[str]:
    fits = (each for each in (*_SECONDS, *_LATER) if seconds / each <= _TIME_TICKS)
    step = next(fits, _LATER[-1] * math.ceil(seconds / _LATER[-1] / _TIME_TICKS))
    for number in range(int(seconds / step) + 1):
        yield tick(x_of(number * step / seconds), duration(number * step))


def _log_axis(low: float, high: float, place: Callable[[float], float]) -> Iterator[str]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        ticks = [digit * 10.0**power for power in powers for digit in digits]
        shown = [value for value in ticks if low <= value <= high]
        if len(shown) <= _TIME_TICKS + 1:
            break
    for value in shown or [math.sqrt(low * high)]:
        yield tick(place(value), duration(value))


def _marks(marks: Mapping[str, float], place: Callable[[float], float]) -> Iterator[str]:
    for level, (label, seconds) in enumerate(marks.items()):
        x, y = place(seconds), TOP - 10 + _LINE * 1.2 * level
        anchor, shift = ("end", -4) if x > RIGHT - _LABEL else ("start", 4)
        yield f'<path class="mark" d="M{x:.1f} {BOTTOM}V{y - 8:.1f}"/>'
        yield text(x + shift, y, f"{label} {duration(seconds)}", anchor, "label")


def _described(of: Timeline) -> str:
    sums = of.sums
    limits = "".join(f" {label}." for label in of.limits)
    mean, most = sum(sums) / len(sums), max(sums)
    return f"{duration(of.seconds)}; {mean:,.4g} {of.unit} on average, {most:,.4g} at most.{limits}"


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
    """The columns that all pictures over time have."""

    history: History  # what they show
    seconds: float  # how long it is; at least a second
    group: int  # intervals of the history to a column
    columns: int  # how many columns

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
        tracks = self.history.models.values()
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
        return over_time(of)


def pictures(stats: ClientStats, story: ReportData, facts: Sequence[ModelLimits]) -> Iterator[Markup]:
    """Return the sections that are pictures."""
    if story.history.models:
        axis = _Axis.of(story.history)
        yield from _limits(axis, facts)
        yield section("In flight, and refused", figures(_flight(axis, facts)))
    drawn = [*_where_time_went(stats), *_latencies(stats, story)]
    if drawn:
        note = (
            "Time is summed over all requests: ten that wait for a second are ten seconds. "
            "Prompts that were not taken up yet do not count."
        )
        yield section("Where time went", figures(drawn), note=note)


def latency(classes: Mapping[int, int], marks: Mapping[str, float], what: str) -> Markup:
    """Return the histogram of latency; `what` says of what."""
    drawn = histogram("Latency", classes, Histogram.value_of, marks)
    return figure("How long answers took", drawn, {"time": f"{what}; the axis of time is logarithmic"})


def _limits(axis: _Axis, facts: Sequence[ModelLimits]) -> Iterator[Markup]:
    """Return the pictures of the models that spent most, against their limits."""
    tracks, known = axis.history.models, {each.model: each for each in facts}
    largest = sorted(known.keys() & tracks.keys(), key=lambda model: (-sum(tracks[model].reserved), model))
    drawn: list[Markup] = []
    for model in largest[:_DRAWN]:
        drawn += [_requests(axis, tracks[model], known[model]), _tokens(axis, tracks[model], known[model])]
    left = len(tracks) - len(largest[:_DRAWN])
    more = f" The table of models has {count(left)} more." if left else ""
    wide = duration(axis.step)
    note = f"Each column is {wide}. At first, a full bucket lets more through than the limit.{more}"
    if drawn:
        yield section("Requests and tokens against their limits", figures(drawn), note=note)


def _requests(axis: _Axis, track: ModelTimeline, facts: ModelLimits) -> Markup:
    layers = [Layer("sent", "admitted", axis.rates(track.admitted))]
    title = f"requests per {axis.per}"
    limits = _named(facts.requests, axis)
    drawn = axis.picture(f"{title}, {facts.model}", f"requests/{axis.unit}", layers, limits=limits)
    return figure(Markup(f"{name(facts.model)}: {title}"), drawn, {"admitted": "sent"})


def _tokens(axis: _Axis, track: ModelTimeline, facts: ModelLimits) -> Markup:
    layers = [Layer("reserved", "reserved", axis.rates(track.reserved))]
    line = Layer("used", "used", axis.rates(track.used))
    title, limits = f"tokens per {axis.per}", _named(facts.tokens, axis)
    drawn = axis.picture(f"{title}, {facts.model}", f"tokens/{axis.unit}", layers, line=line, limits=limits)
    keys = {"reserved": "reserved when sent", "used": "used by answers"}
    return figure(Markup(f"{name(facts.model)}: {title}"), drawn, keys)


def _named(limit: Limit, axis: _Axis) -> dict[str, float]:
    """Return the limits to be marked, by what is written there."""
    known = {"limit": limit.configured, "server's limit": limit.server}
    if limit.configured == limit.server:
        known.pop("server's limit")
    return {
        f"{label} {short(value)}/min": value * axis.scale / _MINUTE for label, value in known.items() if value
    }


def _flight(axis: _Axis, facts: Sequence[ModelLimits]) -> Iterator[Markup]:
    """Return how many were in flight, and which attempts brought nothing."""
    means, bound = axis.means(axis.history.in_flight), [each.max_concurrent for each in facts]
    limits = {f"max_concurrent {bound[0]:g}": bound[0]} if len(bound) == 1 and max(means) <= bound[0] else {}
    limits = {label: value for label, value in limits.items() if math.isfinite(value)}
    layer = Layer("in flight", "flight", means)
    drawn = axis.picture("Requests in flight", "requests", [layer], limits=limits)
    yield figure("Requests in flight, on average", drawn, {"flight": "in flight"})
    limited, failed = axis.totals("rate_limited"), axis.totals("failed")
    if any(limited) or any(failed):
        layers = [Layer("429", "rate_limited", limited), Layer("other failures", "failed", failed)]
        keys = {"rate_limited": "status 429", "failed": "other failures"}
        drawn = axis.picture("Attempts without an answer", f"in {duration(axis.step)}", layers)
        yield figure(f"Attempts without an answer, each {duration(axis.step)}", drawn, keys)


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
    drawn = f"{shares('Where time went', parts)}{table(('', 'time', 'share'), rows)}"
    yield figure("Time of all requests together", drawn, {}, kind="share")


def _swatch(style: str, label: str) -> Markup:
    return Markup(f'<span class="swatch {style}"></span>{escape(label)}')


def _latencies(stats: ClientStats, story: ReportData) -> Iterator[Markup]:
    known = {"p50": stats.latency_p50, "p95": stats.latency_p95, "p99": stats.latency_p99}
    marks = {label: value for label, value in known.items() if value is not None}
    if story.latency:
        yield latency(story.latency, marks, "attempts that were answered")
