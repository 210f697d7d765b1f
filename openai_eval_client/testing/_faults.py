"""The errors the API answers with, and the faults that a simulated server injects.

The error bodies are those of https://platform.openai.com/docs/guides/error-codes.
"""

from __future__ import annotations

import math
from collections import deque
from itertools import accumulate
from random import Random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

SHOWN_HEAD, SHOWN_TAIL = 8, 4  # characters of a masked key
STATUS_FAULTS = {  # faults that are an error of the API: its message and type
    "500": ("The server had an error while processing your request. Sorry about that!", "server_error"),
    "503": ("The engine is currently overloaded, please try again later.", "server_error"),
    "408": ("Request timed out.", "server_error"),
    "409": ("The resource was updated by another request.", "invalid_request_error"),
    "429": ("Rate limit reached for requests. Please try again later.", "requests"),
}
FAULTS = (
    *STATUS_FAULTS, "drop", "hang", "truncate", "garbage", "cut_json", "slow_drip", "malformed_headers",
    "null_usage", "no_usage",
)  # fmt: skip
MALFORMED_HEADERS = {
    "x-ratelimit-limit-requests": "many",
    "x-ratelimit-limit-tokens": "",
    "x-ratelimit-remaining-requests": "-7",
    "x-ratelimit-remaining-tokens": "NaN",
    "x-ratelimit-reset-requests": "soon",
    "x-ratelimit-reset-tokens": "1e999s",
    "retry-after": "the day after tomorrow",
    "retry-after-ms": "0x10",
}


class ApiError(Exception):
    """An error to answer with: a status, OpenAI's body, and extra headers."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        error = {"message": message, "type": kind, "param": param, "code": code}
        self.body: dict[str, Any] = {"error": error}


def missing_key() -> ApiError:
    """Return the 401 for a request without a bearer token; its code is null, unlike a wrong key's."""
    return ApiError(
        401,
        "You didn't provide an API key. You need to provide your API key in an Authorization header using "
        "Bearer auth (i.e. Authorization: Bearer YOUR_KEY). You can obtain an API key from "
        "https://platform.openai.com/account/api-keys.",
    )


def wrong_key(key: str) -> ApiError:
    where = "You can find your API key at https://platform.openai.com/account/api-keys."
    return ApiError(401, f"Incorrect API key provided: {masked(key)}. {where}", code="invalid_api_key")


def masked(key: str) -> str:
    """Mask a key as the API does: show its first 8 and last 4 characters; of a short key the first 2."""
    hidden = len(key) - SHOWN_HEAD - SHOWN_TAIL
    if hidden <= 0:
        return key[:2] + "*" * len(key[2:])
    return key[:SHOWN_HEAD] + "*" * hidden + key[-SHOWN_TAIL:]


def missing_parameter(name: str) -> ApiError:
    message = f"Missing required parameter: '{name}'."
    return ApiError(400, message, param=name, code="missing_required_parameter")


def wrong_type(name: str, expected: str) -> ApiError:
    return ApiError(400, f"Invalid type for '{name}': expected {expected}.", param=name, code="invalid_type")


def wrong_value(name: str, value: str, allowed: Collection[str]) -> ApiError:
    known = ", ".join(f"'{one}'" for one in allowed)
    message = f"Invalid value: '{value}'. Supported values are: {known}."
    return ApiError(400, message, param=name, code="invalid_value")


def quota_exhausted() -> ApiError:
    """Return the 429 for an account that has run out of money; waiting does not help."""
    message = (
        "You exceeded your current quota, please check your plan and billing details. For more information "
        "on this error, read the docs: https://platform.openai.com/docs/guides/error-codes/api-errors."
    )
    return ApiError(429, message, kind="insufficient_quota", code="insufficient_quota")


def server_error(message: str) -> ApiError:
    return ApiError(500, message, kind="server_error")


def fault_error(fault: str, unavailable_retry_after: float | None = None) -> ApiError:
    """Return the API's own error for a fault named after a status."""
    message, kind = STATUS_FAULTS[fault]
    code = "rate_limit_exceeded" if fault == "429" else None
    headers = {}
    if fault == "503" and unavailable_retry_after is not None:
        headers = {"retry-after": f"{unavailable_retry_after:g}"}
    return ApiError(int(fault), message, kind=kind, code=code, headers=headers)


def spoil_usage(body: dict[str, Any], fault: str | None) -> dict[str, Any]:
    """Return the body, its usage null or missing if the fault says so."""
    if fault == "null_usage":
        return {**body, "usage": None}
    if fault == "no_usage":
        return {name: value for name, value in body.items() if name != "usage"}
    return body


class Faults:
    """Draws which fault, if any, happens next: first those of a script, then at random."""

    def __init__(self, probabilities: Mapping[str, float], script: Iterable[str], seed: int | str) -> None:
        self._bounds = tuple(zip(accumulate(probabilities.values()), probabilities, strict=True))
        self._script = deque(script)
        self._random = Random(f"faults {seed}")

    def draw(self) -> str | None:
        """Return the name of the next fault, or None."""
        if self._script:
            name = self._script.popleft()
            return None if name == "ok" else name
        if not self._bounds:
            return None
        point = self._random.random()
        return next((name for bound, name in self._bounds if point < bound), None)


class Latency:
    """Draws lognormal latencies with a given mean: mu is ln(mean) - sigma^2/2."""

    def __init__(self, mean: float, sigma: float, seed: int) -> None:
        self._mean, self._sigma = mean, sigma
        self._random = Random(f"latency {seed}")

    def draw(self) -> float:
        if not (self._mean and self._sigma):
            return self._mean
        return self._random.lognormvariate(math.log(self._mean) - self._sigma**2 / 2, self._sigma)
