"""What the server says in its headers: the limits, what is left of them, and when to come back."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

_LONGEST = 1e9  # a number in a header: thirty years, or more tokens than any limit
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?(?:ms|s|m|h|d))+")


DIMENSIONS = ("requests", "tokens")


@dataclass(frozen=True, slots=True)
class Quota:
    """One dimension of a limit, as the `x-ratelimit-*` headers state it.

    Attributes:
        limit: Per minute.
        remaining: What is left now.
        reset: Seconds until it is full again; None where the server does not say.
    """

    limit: int
    remaining: int
    reset: float | None


def read_quotas(headers: Mapping[str, str]) -> dict[str, Quota]:
    """Return what the headers say of requests and of tokens, each only where they do."""
    quotas = {dimension: read_quota(headers, dimension) for dimension in DIMENSIONS}
    return {dimension: quota for dimension, quota in quotas.items() if quota is not None}


def refused_dimension(message: str) -> str | None:
    """Return which limit the message of a 429 names, "requests" or "tokens"; None where it names neither.

    The API's wording: "Rate limit reached for MODEL ... on tokens per min (TPM): Limit ...".
    """
    named = [dimension for dimension in DIMENSIONS if f"on {dimension} per" in message]
    return named[0] if named else None


def read_quota(headers: Mapping[str, str], dimension: str) -> Quota | None:
    """Read the limit of one dimension.

    Args:
        headers: Response headers, looked up without regard to case.
        dimension: "requests" or "tokens".

    Returns:
        The quota, or None where limit or remaining are absent or make no sense. Names and formats:
        https://platform.openai.com/docs/guides/rate-limits#rate-limits-in-headers
    """
    limit = _whole(headers.get(f"x-ratelimit-limit-{dimension}"))
    remaining = _whole(headers.get(f"x-ratelimit-remaining-{dimension}"))
    if not limit or remaining is None:
        return None
    return Quota(limit, min(remaining, limit), duration(headers.get(f"x-ratelimit-reset-{dimension}")))


def duration(text: str | None) -> float | None:
    """Return the seconds of "1s", "6m0s", "17.25ms" or "1h2m3.5s"; None for anything else."""
    if text is None or not _DURATION.fullmatch(text):
        return None
    seconds = sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(text))
    return seconds if seconds < float("inf") else None


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds the server asks to wait, from retry-after-ms, else retry-after.

    The latter is a number of seconds or an HTTP date (RFC 9110, section 10.2.3). None where there is
    neither, or only nonsense.
    """
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
    value = _number(text)
    return None if value is None else int(value)
