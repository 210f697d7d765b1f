"""Token buckets per model, the headers that show them, and the 429s that enforce them."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Literal

from ._faults import ApiError

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._options import Options

Dimension = Literal["requests", "tokens"]
DIMENSIONS: dict[str, Dimension] = {"rpm": "requests", "tpm": "tokens"}
UNITS: dict[Dimension, str] = {"requests": "requests per min (RPM)", "tokens": "tokens per min (TPM)"}
ROUNDING = 1e-6  # forgives what float arithmetic loses between the wait announced and the level reached


class Bucket:
    """A budget that refills at `limit` per minute, up to `window` seconds of it or `least`; starts full."""

    def __init__(
        self, limit: float, window: float, *, least: float = 0.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._window, self._least, self._clock = window, least, clock
        self._at = clock()
        self._set(limit)
        self._level = self.capacity

    def _set(self, limit: float) -> None:
        self.limit, self.rate = limit, limit / 60
        self.capacity = max(self._least, self.rate * self._window)

    @property
    def level(self) -> float:
        """What may be taken now; below zero after a debt."""
        now = self._clock()
        self._level = min(self.capacity, self._level + (now - self._at) * self.rate)
        self._at = now
        return self._level

    def wait(self, cost: float) -> float:
        """Return the seconds until `cost` fits; infinite if it is more than the bucket holds."""
        if cost > self.capacity + ROUNDING:
            return math.inf
        missing = cost - self.level
        return 0.0 if missing <= ROUNDING else missing / self.rate

    def take(self, cost: float) -> None:
        """Charge `cost`; a negative one gives back."""
        self._level = min(self.capacity, self.level - cost)

    def resize(self, limit: float) -> None:
        """Set another limit; the bucket stays as full in proportion."""
        share = self.level / self.capacity
        self._set(limit)
        self._level = share * self.capacity


class Limits:
    """Admits or refuses requests, model by model."""

    def __init__(self, options: Options, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._options, self._clock = options, clock
        self._rates: dict[Dimension, float | None] = {"requests": options.rpm, "tokens": options.tpm}
        self._models: dict[str, dict[Dimension, Bucket]] = {}  # only the dimensions that are limited

    def admit(self, model: str, tokens: int) -> None:
        """Charge one request of so many tokens; raise a 429, charging nothing, if a bucket lacks room."""
        buckets, costs = self._buckets(model), {"requests": 1, "tokens": tokens}
        waits = {name: bucket.wait(costs[name]) for name, bucket in buckets.items()}
        longest = max(waits, key=lambda name: waits[name], default=None)
        if longest and waits[longest]:
            raise self._refusal(model, longest, costs[longest], waits[longest])
        self.give_back(model, requests=-1, tokens=-tokens)

    def give_back(self, model: str, *, requests: int = 0, tokens: int = 0) -> None:
        """Return a charge; a negative one charges more, into debt if need be."""
        for name, bucket in self._buckets(model).items():
            bucket.take(-(requests if name == "requests" else tokens))

    def headers(self, model: str) -> dict[str, str]:
        shown: dict[str, str] = {}
        if not self._options.headers:
            return shown
        for name, bucket in self._buckets(model).items():
            level = bucket.level
            shown[f"x-ratelimit-limit-{name}"] = str(int(bucket.limit))
            shown[f"x-ratelimit-remaining-{name}"] = str(max(0, int(level + ROUNDING)))
            shown[f"x-ratelimit-reset-{name}"] = duration((bucket.capacity - level) / bucket.rate)
        return shown

    def change(self, limits: dict[str, float | None]) -> None:
        """Set `rpm` and/or `tpm` for every model; buckets stay as full in proportion."""
        for key, limit in limits.items():
            name = DIMENSIONS[key]
            self._rates[name] = limit
            for buckets in self._models.values():
                if limit is None:
                    buckets.pop(name, None)
                elif name in buckets:
                    buckets[name].resize(limit)
                else:
                    buckets[name] = self._bucket(name, limit)

    def refill(self) -> None:
        self._models.clear()  # new buckets are full

    def _buckets(self, model: str) -> dict[Dimension, Bucket]:
        if model not in self._models:
            limited = {
                name: self._bucket(name, rate) for name, rate in self._rates.items() if rate is not None
            }
            self._models[model] = limited
        return self._models[model]

    def _bucket(self, name: Dimension, limit: float) -> Bucket:
        least = 1.0 if name == "requests" else 0.0  # one request always fits, however short the window
        return Bucket(limit, self._options.window, least=least, clock=self._clock)

    def _refusal(self, model: str, name: Dimension, cost: int, wait: float) -> ApiError:
        bucket = self._buckets(model)[name]
        limit, level = int(bucket.limit), int(bucket.level + ROUNDING)
        subject = f"for {model} in organization org-sim on {UNITS[name]}: Limit {limit}"
        if wait == math.inf:
            message = (
                f"Request too large {subject}, Requested {cost}. "
                "The input or output tokens must be reduced in order to run successfully."
            )
        else:
            message = (
                f"Rate limit reached {subject}, Used {limit - level}, Requested {cost}. Please try again in "
                f"{duration(wait)}. Visit https://platform.openai.com/account/rate-limits to learn more."
            )
        headers = {}
        if self._options.retry_after and wait < math.inf:
            headers = {"retry-after": str(math.ceil(wait)), "retry-after-ms": str(math.ceil(wait * 1000))}
        return ApiError(429, message, kind=name, code="rate_limit_exceeded", headers=headers)


def duration(seconds: float) -> str:
    """Write a time as the API's headers do: "17ms", "1s", "1m2.5s", "6m0s"."""
    ms = math.ceil(round(seconds * 1000, 3))
    if ms <= 0:
        return "0s"
    if ms < 1000:  # noqa: PLR2004
        return f"{ms}ms"
    minutes, rest = divmod(ms, 60_000)
    hours, minutes = divmod(minutes, 60)
    text = f"{rest / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    if hours:
        return f"{hours}h{minutes}m{text}"
    return f"{minutes}m{text}" if minutes else text
