"""The errors the API answers with, and the faults that a simulated server injects.

The error bodies are those of https://platform.openai.com/docs/guides/error-codes.
"""

from __future__ import annotations

import math
import re
from collections import deque
from itertools import accumulate
from random import Random
from typing import TYPE_CHECKING, Any

from ._catalog import REFUSALS, SPOILERS, outcome_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from ._catalog import Refusal

SHOWN_HEAD, SHOWN_TAIL = 8, 4  # characters of a masked key
DELIVERIES = (  # faults of how an answer is sent
    "drop", "hang", "truncate", "garbage", "cut_json", "slow_drip", "malformed_headers", "json_done", "sse",
)  # fmt: skip
FAULTS = (*DELIVERIES, *SPOILERS, *REFUSALS)
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
    """Return the 401 for a key that is not the server's; it shows the key masked."""
    where = "You can find your API key at https://platform.openai.com/account/api-keys."
    return ApiError(401, f"Incorrect API key provided: {masked(key)}. {where}", code="invalid_api_key")


def masked(key: str) -> str:
    """Mask a key as the API does: show its first 8 and last 4 characters; of a short key the first 2."""
    hidden = len(key) - SHOWN_HEAD - SHOWN_TAIL
    if hidden <= 0:
        return key[:2] + "*" * len(key[2:])
    return key[:SHOWN_HEAD] + "*" * hidden + key[-SHOWN_TAIL:]


def missing_parameter(name: str) -> ApiError:
    """Return the 400 for a parameter that must be there."""
    message = f"Missing required parameter: '{name}'."
    return ApiError(400, message, param=name, code="missing_required_parameter")


def wrong_type(name: str, expected: str, *got: Any) -> ApiError:
    """Return the 400 for a value of another type, which the message names if it is given."""
    but = f", but got {_json_type(got[0])} instead" if got else ""
    message = f"Invalid type for '{name}': expected {expected}{but}."
    return ApiError(400, message, param=name, code="invalid_type")


def _json_type(value: Any) -> str:
    names = {bool: "a boolean", int: "an integer", float: "a decimal", str: "a string", list: "an array"}
    return "null" if value is None else names.get(type(value), "an object")


def wrong_value(name: str, value: Any, allowed: Collection[str]) -> ApiError:
    """Return the 400 for a value that is not one of those allowed."""
    *others, last = (f"'{one}'" for one in allowed)
    comma = "," if len(others) > 1 else ""
    known = f"{', '.join(others)}{comma} and {last}" if others else last
    message = f"Invalid value: '{value}'. Supported values are: {known}."
    return ApiError(400, message, param=name, code="invalid_value")


def out_of_bounds(
    name: str, value: float, least: float | None, most: float | None, kind: str = "integer"
) -> ApiError | None:
    """Return the 400 for a number below or above its bounds; None if it is within them."""
    if least is not None and value < least:
        side, sign, bound = "below_min", ">=", least
    elif most is not None and value > most:
        side, sign, bound = "above_max", "<=", most
    else:
        return None
    message = (
        f"Invalid '{name}': {kind} {side.replace('_', ' ')}imum value. "
        f"Expected a value {sign} {bound}, but got {value} instead."
    )
    return ApiError(400, message, param=name, code=f"{kind}_{side}_value")


def server_error(message: str) -> ApiError:
    """Return a 500 with this message."""
    return ApiError(500, message, kind="server_error")


def fault_error(fault: str, unavailable_retry_after: float | None = None) -> ApiError:
    """Return the error for a refusal that is in the API's words."""
    words = REFUSALS[fault].body["error"]
    headers = {}
    if fault == "503" and unavailable_retry_after is not None:
        headers = {"retry-after": f"{unavailable_retry_after:g}"}
    kind, code = words["type"], words["code"]
    return ApiError(REFUSALS[fault].status, words["message"], kind=kind, code=code, headers=headers)


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


class Script:
    """What prompts get that match a pattern: of several outcomes one after the other, the last for ever."""

    def __init__(self, rules: Iterable[Sequence[Any]]) -> None:
        self._rules = [(re.compile(pattern), deque(_outcomes(given))) for pattern, given in rules]

    def find(self, prompt: str) -> str | Refusal | None:
        """Return what the first pattern gives that is found in the prompt; None if there is none."""
        for pattern, left in self._rules:
            if pattern.search(prompt):
                return left.popleft() if len(left) > 1 else left[0]
        return None


def _outcomes(given: Any) -> list[str | Refusal]:
    several = given if isinstance(given, list | tuple) else [given]
    if not several:
        raise ValueError("there is no outcome")
    return [outcome_of(one) for one in several]


class Latency:
    """Draws lognormal latencies with a given mean: mu is ln(mean) - sigma^2/2."""

    def __init__(self, mean: float, sigma: float, seed: int) -> None:
        self._mean, self._sigma = mean, sigma
        self._random = Random(f"latency {seed}")

    def draw(self) -> float:
        """Return the next latency, in seconds."""
        if not (self._mean and self._sigma):
            return self._mean
        return self._random.lognormvariate(math.log(self._mean) - self._sigma**2 / 2, self._sigma)
