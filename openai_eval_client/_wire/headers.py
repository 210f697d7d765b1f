"""What the server says in its headers: the limits, what is left of them, and when to come back."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


_DIGITS = 10  # of a number below _LONGEST
_LONGEST = 1e9  # a number in a header: thirty years, or more tokens than any limit
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_LONGEST_RESET = 86_400.0  # seconds; beyond it a plain number is no duration, but perhaps a date
_WAIT = re.compile(
    r"(?:try again in|retry after) (?:((?:\d+(?:\.\d+)?(?:ms|s|m|h|d))+)|(\d+(?:\.\d+)?) seconds?)"
)
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?(?:ms|s|m|h|d))+")


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
    found: dict[str, StatedLimit] = {}
    stated = _ratelimits(headers)
    for dimension in DIMENSIONS if stated else ():
        quota = read_stated_limit(stated, dimension)
        if f"x-ratelimit-limit-project-{dimension}" in stated:
            quota = _tighter(quota, read_stated_limit(stated, f"project-{dimension}"))
        if quota is not None:
            found[dimension] = quota
    return found


def _ratelimits(headers: Mapping[str, str]) -> dict[str, str]:
    """Return the headers that state limits, by their names in lower case; httpx's are slow to look up in."""
    raw = getattr(headers, "raw", None)
    if raw is None:
        return {name: text for name, text in headers.items() if name.startswith("x-ratelimit-")}
    stated = [(name.lower(), text) for name, text in raw if name[:12].lower() == b"x-ratelimit-"]
    return {name.decode("ascii", "replace"): text.decode("ascii", "replace") for name, text in stated}


def _tighter(one: StatedLimit | None, other: StatedLimit | None) -> StatedLimit | None:
    if one is None or other is None:
        return one or other
    return min(one, other, key=lambda quota: (quota.remaining, quota.limit))


def refused_dimension(message: str) -> str | None:
    """Return which limit the message of a 429 names, "requests" or "tokens"; None where it names neither."""
    # The API's wording is "Rate limit reached for MODEL ... on tokens per min (TPM): Limit ...", Azure's
    # "... have exceeded token rate limit of your current OpenAI S0 pricing tier".
    wordings = {
        "requests": ("on requests per", "call rate limit", "request rate limit"),
        "tokens": ("on tokens per", "token rate limit"),
    }
    named = [name for name, wording in wordings.items() if any(words in message for words in wording)]
    return named[0] if named else None


def stated_wait(headers: Mapping[str, str], message: str = "") -> float | None:
    """Return the seconds that a refusal asks to wait: its headers, else its message; None: neither says."""
    # The API's wording is "Please try again in 6m0s", Azure's "Please retry after 6 seconds".
    seconds = retry_after(headers)
    if seconds is not None:
        return seconds
    found = _WAIT.search(message)
    return None if found is None else duration(found[1]) or _number(found[2])


def read_stated_limit(headers: Mapping[str, str], dimension: str) -> StatedLimit | None:
    """Read the limit of one dimension."""
    limit = _whole(headers.get(f"x-ratelimit-limit-{dimension}"))
    remaining = _whole(headers.get(f"x-ratelimit-remaining-{dimension}"))
    if not limit or remaining is None:
        return None
    text = headers.get(f"x-ratelimit-reset-{dimension}")
    spelt = duration(text)
    reset = _number(text) if spelt is None else spelt
    if reset == 0 and remaining < limit / 2:  # full already, and yet not: nonsense
        return None
    return StatedLimit(
        limit, min(remaining, limit), reset if reset is None or reset <= _LONGEST_RESET else None
    )


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
    return _until(text) if seconds is None and text else seconds


def _until(date: str) -> float | None:
    try:
        return max(0.0, parsedate_to_datetime(date).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
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
