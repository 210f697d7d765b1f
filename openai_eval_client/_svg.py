"""The parts of a picture as inline SVG: axes, columns, texts. Axes of amounts begin at nought."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from openai_eval_client._html import Markup, escape, short

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

WIDTH, HEIGHT = 440.0, 214.0
LEFT, RIGHT, TOP, BOTTOM = 44.0, 430.0, 22.0, 176.0
_TICKS = 4
_NICE = (1.0, 2.0, 2.5, 5.0, 10.0)
_HEADROOM = 1.08
_ROUNDING = 1e-9
_NARROW = 3.0  # a column that leaves no gap to the next
_GAP, _THINNEST = 0.6, 0.4


class Column(NamedTuple):
    """A column between two heights.

    Attributes:
        x: Its left side.
        width: How wide it is.
        low: Where it begins, as a share of the axis.
        high: Where it ends.
    """

    x: float
    width: float
    low: float
    high: float

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
        f"<title>{escape(title)}</title><desc>{escape(about)}</desc>{''.join(parts)}</svg>"
    )
