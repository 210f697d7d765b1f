"""Numbers, times and tables as people read them; everything that comes from outside is escaped."""

from __future__ import annotations

import html
import math
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_LONG = 48  # characters of a name that are shown
_CENT = 0.01
_SECOND, _MINUTE, _HOUR, _DAY = 1.0, 60.0, 3600.0, 86_400.0
_SMALL = 10.0  # below it, one digit after the point says something
_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def escape(text: object) -> Markup:
    """Return any text as HTML: half a surrogate pair and control characters become a question mark."""
    if isinstance(text, Markup):
        return text
    valid = str(text).encode(errors="replace").decode()
    return Markup(html.escape("".join(char if char.isprintable() or char == "\n" else "?" for char in valid)))


def name(text: object) -> Markup:
    """Return a name as HTML; of a long one the middle is left out, and the whole is its title."""
    whole = str(text)
    if len(whole) <= _LONG:
        return escape(whole)
    half = _LONG // 2
    return Markup(f'<span title="{escape(whole)}">{escape(f"{whole[:half]}…{whole[-half + 1 :]}")}</span>')


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


def table(
    head: Sequence[object], rows: Iterable[Sequence[object]], *, caption: object = "", texts: int = 1
) -> Markup:
    """Return a table.

    Args:
        head: The names of the columns; none: no head.
        rows: Its cells.
        caption: What it shows.
        texts: How many columns from the left are text; the others are numbers, and stand to the right.
    """
    parts = ["<table>"]
    if caption:
        parts.append(f"<caption>{escape(caption)}</caption>")
    if head:
        parts.append(f"<thead><tr>{_cells(head, 'th', texts, 'col')}</tr></thead>")
    body = "".join(f"<tr>{_row(row, texts)}</tr>" for row in rows)
    return Markup("".join([*parts, f"<tbody>{body}</tbody></table>"]))


def _row(row: Sequence[object], texts: int) -> str:
    return _cells(row[:1], "th", texts, "row") + _cells(row[1:], "td", texts - 1, "")


def _cells(cells: Sequence[object], tag: str, texts: int, scope: str) -> str:
    scoped = f' scope="{scope}"' if scope else ""
    return "".join(
        f'<{tag}{scoped} style="text-align:{"left" if number < texts else "right"}">{escape(cell)}</{tag}>'
        for number, cell in enumerate(cells)
    )
