"""Numbers, money and times as text, once for messages, tables and pages."""

from __future__ import annotations

import functools
import html
import math
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


_CENT = 0.01
_SECOND, _MINUTE, _HOUR, _DAY = 1.0, 60.0, 3600.0, 86_400.0
_SMALL = 10.0  # below it, one digit after the point says something
_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def count(number: float) -> str:
    """Return a whole number: 12,345."""
    return f"{round(number):,}"


def short(number: float) -> str:
    """Return a number for an axis: 12.5k."""
    for size, prefix in _PREFIXES:
        if abs(number) >= size:
            return f"{number / size:.3g}{prefix}"
    return f"{number:.3g}"


def percent(share: float) -> str:
    """Return a share: 97%, or 0.4% where it is little."""
    points = 100 * share
    return f"{points:.0f}%" if points >= _SMALL or not points else f"{points:.2g}%"


def duration(seconds: float) -> str:
    """Return a time in its two largest units: 4 min 10 s."""
    if not seconds:
        return "0 s"
    if seconds < _SECOND:
        return f"{1000 * seconds:.0f} ms"
    if seconds < _MINUTE:
        shown = f"{seconds:.1f}".removesuffix(".0") if seconds < _SMALL else f"{min(seconds, 59.4):.0f}"
        return f"{shown} s"
    if seconds < _HOUR:
        return _two(seconds, _MINUTE, "min", _SECOND, "s")
    return (
        _two(seconds, _HOUR, "h", _MINUTE, "min") if seconds < _DAY else _two(seconds, _DAY, "d", _HOUR, "h")
    )


def _two(seconds: float, large: float, large_unit: str, small: float, small_unit: str) -> str:
    whole, rest = divmod(int(seconds), int(large))
    rest //= int(small)
    return f"{whole} {large_unit} {rest} {small_unit}" if rest else f"{whole} {large_unit}"


def dollars(amount: Any) -> str:
    """Return USD with two decimals, two digits where it is less than a cent; None: unknown."""
    if amount is None:
        return "unknown"
    value = float(amount)
    digits = 2 if abs(value) >= _CENT or not value else 1 - math.floor(math.log10(abs(value)))
    return f"${value:,.{digits}f}"


def clock(seconds: float | None) -> str:
    """Return a time of day here, from seconds since 1970."""
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


_DIME = 0.1  # USD


def bounds_text(
    low: float | None,
    expected: float | None,
    high: float | None,
    shown: Callable[[float], str],
) -> str:
    """Return two bounds and what is between them, as far as they are known."""
    if low is None:
        return "unknown"
    likely = "" if expected is None else f" (likely {shown(expected)})"
    return f"{shown(low)} or more{likely}" if high is None else f"{shown(low)} to {shown(high)}{likely}"


def minutes_text(minutes: float) -> str:
    """Return a time in minutes, or in seconds where it is less than one minute."""
    return f"{minutes:,.1f} minutes" if minutes >= 1 else f"{60 * minutes:.2g} seconds"


def rounded(number: float) -> str:
    """Return a whole number: 12,345."""
    return f"{number:,}"


def usd(amount: float) -> str:
    """Return an amount with two decimals, or two digits where it is less than a dime."""
    digits = 2 if amount >= _DIME or not amount else 1 - math.floor(math.log10(amount))
    return f"{amount:,.{digits}f}"


@functools.singledispatch
def as_html(value: object) -> str:
    """Return what a notebook shows of a value; those who know how to show one register it here."""
    return html.escape(repr(value))
