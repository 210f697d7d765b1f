"""Pictures: columns over time with their limits, a histogram of times, a bar of shares."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from openai_eval_client import _svg
from openai_eval_client._html import Markup, duration, escape, short
from openai_eval_client._svg import BOTTOM, LEFT, RIGHT, TOP, Column, text, x_of, y_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

_SECONDS = 0.2, 0.5, 1, 2, 5, 10, 15, 30
_LATER = 60, 120, 300, 600, 900, 1800, 3600, 7200, 14_400, 21_600, 43_200, 86_400
_TICKS = 6  # of an axis of time, at most
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
    """Columns of one colour, which stand on those before.

    Attributes:
        label: What they count.
        style: Their class in the style sheet.
        values: One for each column.
    """

    label: str
    style: str
    values: Sequence[float]


@dataclass(frozen=True, slots=True)
class Timeline:
    """What a picture over time shows.

    Attributes:
        title: What it is.
        unit: Of the values.
        seconds: How long the axis of time is.
        step: Seconds of each column.
        layers: The columns.
        line: A line over them.
        limits: Values to be marked, by what is written there.
        breaks: Seconds left out, by where on the axis.
    """

    title: str
    unit: str
    seconds: float
    step: float
    layers: Sequence[Layer]
    line: Layer | None = None
    limits: Mapping[str, float] = field(default_factory=dict)
    breaks: Mapping[float, float] = field(default_factory=dict)

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
    top, ticks = _svg.scale(_reach(of, near.values()))
    parts = [
        _svg.grid(ticks, top, of.unit),
        *_time_axis(of.seconds),
        *_columns(of, top),
        *_peaks(of, top),
        *(_steps(of, of.line, top) if of.line else ()),
        *_limits(near, top),
        *_far(of.limits.keys() - near.keys()),
        *_breaks(of),
    ]
    return _svg.picture(of.title, _described(of), parts)


def histogram(
    title: str, classes: Mapping[int, int], value_of: Callable[[float], float], marks: Mapping[str, float]
) -> Markup:
    """Return how often something took how long, on a logarithmic axis of time.

    Args:
        title: What it is.
        classes: How often each class was seen, by number.
        value_of: The seconds at a place between two classes, or at one.
        marks: Seconds to be marked, by name.
    """
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

    top, ticks = _svg.scale(max(bars.values()))
    width = (RIGHT - LEFT) / slots
    parts = [_svg.grid(ticks, top, "requests"), *_log_axis(edge(0), edge(slots), place)]
    for slot, times in sorted(bars.items()):
        said = f"{duration(edge(slot + margin))} to {duration(edge(slot + margin + 1))}: {times:,}"
        column = Column(x_of((slot + margin) / slots), width, 0.0, times / top)
        parts.append(column.drawn("time", said))
    parts += _marks(marks, place)
    about = ", ".join(f"{label} {duration(seconds)}" for label, seconds in marks.items())
    return _svg.picture(title, f"{sum(classes.values()):,} requests; {about}.", parts)


def shares(title: str, parts: Sequence[tuple[str, str, float]]) -> Markup:
    """Return one bar made of shares (0 to 1), each with its name and style."""
    drawn, at = [], 0.0
    for label, style, share in parts:
        said = escape(f"{label}: {100 * share:.1f}%")
        place = f'x="{100 * at:.3f}" y="0" width="{100 * share:.3f}" height="8"'
        drawn.append(f'<rect class="{style}" {place}><title>{said}</title></rect>')
        at += share
    about = "; ".join(f"{label} {100 * share:.1f}%" for label, _, share in parts)
    return _svg.svg(title, about, drawn, 'class="bar" viewBox="0 0 100 8" preserveAspectRatio="none"')


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
    """Mark the columns that are higher than the picture; the highest says how high."""
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


def _limits(limits: Mapping[str, float], top: float) -> Iterator[str]:
    """Mark each limit with a line; labels stand above the highest, and below others where there is room."""
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
    """Mark where time is left out; where that is often, how much is told by the pointer alone."""
    for at, left_out in of.breaks.items():
        x = x_of(at / of.seconds)
        said = escape(f"{duration(left_out)} in which nothing happened are left out here")
        yield f'<path class="break" d="M{x:.1f} {TOP}V{BOTTOM}"><title>{said}</title></path>'
        if len(of.breaks) <= _SPOKEN:
            anchor = "end" if x > RIGHT - _EDGE else "middle"
            yield text(x, BOTTOM + 34, f"{duration(left_out)} idle", anchor)


def _time_axis(seconds: float) -> Iterator[str]:
    fits = (each for each in (*_SECONDS, *_LATER) if seconds / each <= _TICKS)
    step = next(fits, _LATER[-1] * math.ceil(seconds / _LATER[-1] / _TICKS))
    for number in range(int(seconds / step) + 1):
        yield _svg.tick(x_of(number * step / seconds), duration(number * step))


def _log_axis(low: float, high: float, place: Callable[[float], float]) -> Iterator[str]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        ticks = [digit * 10.0**power for power in powers for digit in digits]
        shown = [value for value in ticks if low <= value <= high]
        if len(shown) <= _TICKS + 1:
            break
    for value in shown or [math.sqrt(low * high)]:
        yield _svg.tick(place(value), duration(value))


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
