"""Numbers, money and times as text, data as JSON, text as valid Unicode: one function for each meaning."""

from __future__ import annotations

import functools
import html
import itertools
import json
import math
import time
from collections.abc import Mapping
from datetime import date
from decimal import Decimal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_UNITS = ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s"))
_DIME = 0.1  # USD
_SMALL = 10.0  # below it, one digit after the point says something


def count(number: float) -> str:
    """Return a whole number: 12,345."""
    return f"{round(number):,}"


def short(number: float) -> str:
    """Return a number in three digits: 12.5k."""
    for size, prefix in _PREFIXES:
        if abs(number) >= 0.9995 * size:  # what rounds to it as well
            return f"{number / size:.3g}{prefix}"
    return f"{number:.3g}"


def percent(share: float) -> str:
    """Return a share: 97%, or 0.4% where it is little."""
    points = 100 * share
    return f"{points:.0f}%" if points >= _SMALL or not points else f"{points:.2g}%"


def usd(amount: float) -> str:
    """Return an amount without its sign, to the cent or, below a dime, to two digits: 1,234.50, 0.012."""
    digits = 2 if abs(amount) >= _DIME or not amount else 1 - math.floor(math.log10(abs(amount)))
    return f"{amount:,.{digits}f}"


def dollars(amount: Any) -> str:
    """Return an amount with its sign: $0.012; None is unknown."""
    return "unknown" if amount is None else f"${usd(float(amount))}"


def bounds_text(
    low: float | None, expected: float | None, high: float | None, shown: Callable[[float], str]
) -> str:
    """Return two bounds and what is likely, as far as they are known: 1 to 9 (likely 4)."""
    if low is None:
        return "unknown"
    likely = "" if expected is None else f" (likely {shown(expected)})"
    return f"{shown(low)} or more{likely}" if high is None else f"{shown(low)} to {shown(high)}{likely}"


def duration(seconds: float) -> str:
    """Return a time in its two largest units: 4 min 10 s."""
    for (large, unit), (small, smaller) in itertools.pairwise(_UNITS):
        if seconds >= large:
            whole, rest = divmod(int(seconds), large)
            return f"{whole} {unit} {rest // small} {smaller}" if rest >= small else f"{whole} {unit}"
    if 0 < seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    shown = f"{seconds:.1f}".removesuffix(".0") if seconds < _SMALL else f"{min(seconds, 59.4):.0f}"
    return f"{shown} s"


def timer(seconds: float) -> str:
    """Return a time as a running timer has it: 0:07, 12:34 or 1:23:45."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def clock(seconds: float) -> str:
    """Return the local date and time of day, from seconds since 1970."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def valid_text(text: str) -> str:
    """Return a text that is valid Unicode: half a surrogate pair, as a cut emoji leaves it, is U+FFFD."""
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


# What a terminal obeys instead of showing it: C0 but for tab and newline, DEL, C1; and what reorders text.
_CONTROLS = [n for n in (*range(32), *range(127, 160)) if chr(n) not in "\t\n"]
_CONTROLS += [*range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_DROPPED = dict.fromkeys(_CONTROLS)
_ESCAPED = {number: f"\\u{number:04x}" for number in _CONTROLS}


def printable(text: str) -> str:
    """Return a text for a terminal: without what would change its screen, title, clipboard or order."""
    return valid_text(text).translate(_DROPPED)


def printable_json(text: str) -> str:
    """Return the same JSON for a terminal: those characters escaped, which stand in its texts alone."""
    return text.translate(_ESCAPED)


def plain(value: Any) -> Any:
    """Return data as JSON has it: money as a float, a time in ISO 8601, no number that is not finite."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, Decimal):
        value = float(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value.isoformat() if isinstance(value, date) else value


_ENCODERS = {
    ascii_: json.JSONEncoder(ensure_ascii=ascii_, allow_nan=False, separators=(",", ":"))
    for ascii_ in (False, True)
}


def to_json(value: Any, *, only_ascii: bool = False) -> bytes:
    """Return JSON that every parser takes (RFC 8259): a number that is not finite is null."""
    try:
        return _ENCODERS[only_ascii].encode(value).encode()
    except UnicodeEncodeError:  # half a surrogate pair: escaped, it can be written
        return to_json(value, only_ascii=True)
    except ValueError:  # Infinity or NaN
        return to_json(plain(value), only_ascii=only_ascii)


@functools.singledispatch
def as_html(value: object) -> str:
    """Return what a notebook shows of a value; `_report` registers how."""
    return html.escape(repr(value))
