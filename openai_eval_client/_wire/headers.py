"""What the headers of an answer state: the limits, what is left of them, and when to come back."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from datetime import timezone
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

_DIGITS = 10  # of a number below _LONGEST
_LONGEST = 1e9  # a number in a header: thirty years, or more tokens than any limit
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_LONGEST_MESSAGE = 4096  # characters that are looked at
_LONGEST_RESET = 86_400.0  # seconds; beyond it a plain number is no duration, but perhaps a date
_NUMBER = r"\d+(?:\.\d+)?"
_PART = re.compile(rf"({_NUMBER})(ms|s|m|h|d)")
_DURATION = re.compile(rf"(?:{_NUMBER}(?:ms|s|m|h|d))+")
_SPELLED = rf"{_NUMBER}\s?(?:milliseconds?|ms|seconds?|secs?|s|minutes?|mins?|m|hours?|hrs?|h|days?|d)\b"
_PIECE = re.compile(rf"({_NUMBER})\s?(ms|mil|s|m|h|d)", re.IGNORECASE)
_ASKS = r"(?:try|trying|retry|retrying|come back|wait|available|resets?)"
_BETWEEN = r"(?:\s+(?:again|in|after|at|least|for|about|it|please))*"
_WAIT = re.compile(
    rf"\b{_ASKS}{_BETWEEN}:?\s+({_SPELLED}(?:,?\s(?:and\s)?{_SPELLED}){{0,3}}|(?:{_NUMBER}(?:ms|[smhd]))+\b)",
    re.IGNORECASE,
)
DIMENSIONS = ("requests", "tokens")


@dataclass(frozen=True, slots=True)
class StatedLimit:
    """One dimension of a limit, as the `x-ratelimit-*` headers state it."""

    limit: int  # per minute
    remaining: int  # what is left now
    reset: float | None  # seconds until it is full again; None where the server does not say


def read_stated_limits(headers: Mapping[str, str]) -> dict[str, StatedLimit]:
    """Return what the headers say of requests and of tokens, each only where they do."""
    # Where a project has a limit of its own beside the organisation's, the one with less left counts.
    limits: dict[str, StatedLimit] = {}
    stated = _ratelimits(headers)
    for dimension in DIMENSIONS if stated else ():
        both = read_stated_limit(stated, dimension), read_stated_limit(stated, f"project-{dimension}")
        known = [limit for limit in both if limit is not None]
        if known:
            limits[dimension] = min(known, key=lambda limit: (limit.remaining, limit.limit))
    return limits


def _ratelimits(headers: Mapping[str, str]) -> dict[str, str]:
    """Return the headers that state limits, by their names in lower case; httpx's are slow to look up in."""
    raw = getattr(headers, "raw", None)
    if raw is None:
        return {name: text for name, text in headers.items() if name.startswith("x-ratelimit-")}
    stated = [(name.lower(), text) for name, text in raw if name[:12].lower() == b"x-ratelimit-"]
    return {name.decode("ascii", "replace"): text.decode("ascii", "replace") for name, text in stated}


def refused_dimension(message: str) -> str | None:
    """Return which limit the message of a 429 names, "requests" or "tokens"; None where it names neither."""
    # The API's wording is "Rate limit reached for MODEL ... on tokens per min (TPM): Limit ...", Azure's
    # "... have exceeded token rate limit of your current OpenAI S0 pricing tier".
    if any(text in message for text in ("on requests per", "call rate limit", "request rate limit")):
        return "requests"
    return "tokens" if "on tokens per" in message or "token rate limit" in message else None


def stated_wait(headers: Mapping[str, str], message: str = "") -> float | None:
    """Return the seconds that a refusal asks to wait: its headers, else its message; None: neither says."""
    # The API's wording is "Please try again in 6m0s", Azure's "Please retry after 6 seconds", Google's
    # "Please retry in 11.6s", others' "Try again in 1 minute" or "wait 1h 2m".
    seconds = retry_after(headers)
    match = _WAIT.search(message[:_LONGEST_MESSAGE]) if seconds is None else None
    if match is None:
        return seconds
    parts = [(float(number), unit.lower()) for number, unit in _PIECE.findall(match[1])]
    return min(sum(number * _UNITS["ms" if unit == "mil" else unit] for number, unit in parts), _LONGEST)


def read_stated_limit(headers: Mapping[str, str], dimension: str) -> StatedLimit | None:
    """Read the limit of one dimension."""
    limit = _whole(headers.get(f"x-ratelimit-limit-{dimension}"))
    remaining = _whole(headers.get(f"x-ratelimit-remaining-{dimension}")) if limit else None
    if not limit or remaining is None:
        return None
    text = headers.get(f"x-ratelimit-reset-{dimension}")
    seconds = duration(text)
    reset = _number(text) if seconds is None else seconds
    if reset == 0 and remaining < limit / 2:  # full already, and yet not: nonsense
        return None
    is_duration = reset is not None and reset <= _LONGEST_RESET
    return StatedLimit(limit, min(remaining, limit), reset if is_duration else None)


def duration(text: str | None) -> float | None:
    """Return the seconds of "1s", "6m0s", "17.25ms" or "1h2m3.5s"; None for anything else."""
    if text is None or not _DURATION.fullmatch(text):
        return None
    seconds = sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(text))
    return seconds if seconds < float("inf") else None


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds the server asks to wait, from retry-after-ms, else retry-after."""
    # The latter is a number of seconds or an HTTP date (RFC 9110, section 10.2.3). None where there is
    # neither, or only nonsense.
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    text = headers.get("retry-after")
    seconds = _number(text)
    if seconds is not None or not text:
        return seconds
    until, now = _date(text), _date(headers.get("date"))  # the server's own clock, which may be off
    return None if until is None else max(0.0, until - (time.time() if now is None else now))


def _date(text: str | None) -> float | None:
    """Return an HTTP date in seconds since 1970: one that names no zone, as of asctime, is in UTC."""
    try:
        date = parsedate_to_datetime(text or "")
        return date.replace(tzinfo=date.tzinfo or timezone.utc).timestamp()
    except (ValueError, TypeError, OverflowError, IndexError):
        return None


def _number(text: str | None) -> float | None:
    try:
        value = float(text) if text else None
    except ValueError:
        return None
    return min(value, _LONGEST) if value is not None and 0 <= value < float("inf") else None


def _whole(text: str | None) -> int | None:
    if text is not None and len(text) < _DIGITS and text.isdecimal():
        return int(text)
    value = _number(text)
    return None if value is None else int(value)
