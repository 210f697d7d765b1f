"""What goes wrong, and how often."""

from __future__ import annotations

import math
from collections import deque
from itertools import accumulate
from random import Random
from typing import TYPE_CHECKING, Any

from ._errors import ApiError, server_error

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

ERROR_STATUSES = ("500", "503", "408", "409", "429")
FAULTS = (
    *ERROR_STATUSES, "drop", "hang", "truncate", "garbage", "cut_json", "slow_drip", "malformed_headers",
    "null_usage", "no_usage",
)  # fmt: skip
NONSENSE = {
    "x-ratelimit-limit-requests": "many",
    "x-ratelimit-limit-tokens": "",
    "x-ratelimit-remaining-requests": "-7",
    "x-ratelimit-remaining-tokens": "NaN",
    "x-ratelimit-reset-requests": "soon",
    "x-ratelimit-reset-tokens": "1e999s",
    "retry-after": "the day after tomorrow",
    "retry-after-ms": "0x10",
}


def check_faults(faults: Mapping[str, float]) -> None:
    """Raise ValueError naming each fault that is unknown or has an impossible probability."""
    wrong = [f"{name}={p!r}" for name, p in faults.items() if name not in FAULTS or not 0 <= p <= 1]
    if wrong:
        raise ValueError(f"faults: {', '.join(wrong)}; need a probability in [0, 1] for: {', '.join(FAULTS)}")
    if math.fsum(faults.values()) > 1:
        raise ValueError(f"faults: the probabilities of {', '.join(faults)} sum to more than 1")


def check_script(script: Iterable[str]) -> None:
    """Raise ValueError naming each entry that is neither "ok" nor a fault."""
    wrong = [repr(name) for name in script if name not in (*FAULTS, "ok")]
    if wrong:
        raise ValueError(f"script: {', '.join(wrong)}; known are: ok, {', '.join(FAULTS)}")


class Faults:
    """Says which fault, if any, befalls the next generation."""

    def __init__(self, faults: Mapping[str, float], script: Iterable[str], seed: int | str) -> None:
        self._bounds = tuple(zip(accumulate(faults.values()), faults, strict=True))
        self._script = deque(script)
        self._random = Random(f"faults {seed}")

    def draw(self) -> str | None:
        """The next fault's name, or None."""
        if self._script:
            name = self._script.popleft()
            return None if name == "ok" else name
        point = self._random.random()
        return next((name for bound, name in self._bounds if point < bound), None)


class Latency:
    """Lognormal latencies with a given mean: the logarithm's mu is ln(mean) - sigma^2/2."""

    def __init__(self, mean: float, sigma: float, seed: int) -> None:
        self._mean, self._sigma = mean, sigma
        self._random = Random(f"latency {seed}")

    def draw(self) -> float:
        """The next latency in seconds."""
        if not (self._mean and self._sigma):
            return self._mean
        return self._random.lognormvariate(math.log(self._mean) - self._sigma**2 / 2, self._sigma)


def fault_error(fault: str, unavailable_retry_after: float | None) -> ApiError:
    """The API's own error for a fault named after a status."""
    if fault == "500":
        return server_error("The server had an error while processing your request. Sorry about that!")
    if fault == "503":
        wait = {} if unavailable_retry_after is None else {"retry-after": f"{unavailable_retry_after:g}"}
        message = "The engine is currently overloaded, please try again later."
        return ApiError(503, message, kind="server_error", headers=wait)
    if fault == "408":
        return ApiError(408, "Request timed out.", kind="server_error")
    if fault == "409":
        return ApiError(409, "The resource was updated by another request.")
    message = "Rate limit reached for requests. Please try again later."
    return ApiError(429, message, kind="requests", code="rate_limit_exceeded")


def spoil_usage(body: dict[str, Any], fault: str | None) -> dict[str, Any]:
    """The body with its usage nulled or missing where the fault says so."""
    if fault == "null_usage":
        return {**body, "usage": None}
    if fault == "no_usage":
        return {name: value for name, value in body.items() if name != "usage"}
    return body
