"""Token buckets per model, the headers that show them, and the 429s that defend them."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ._errors import ApiError

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._options import Options

Dimension = Literal["requests", "tokens"]
UNITS: dict[Dimension, str] = {
    "requests": "requests per min (RPM)",
    "tokens": "tokens per min (TPM)",
}
ROUNDING = 1e-6  # forgives what float arithmetic loses between the wait announced and the level reached


class Bucket:
    """A budget refilling continuously at `limit` per minute, up to `window` seconds of it; starts full."""

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
        """Seconds until `cost` fits; infinite for more than the bucket holds."""
        if cost > self.capacity + ROUNDING:
            return math.inf
        missing = cost - self.level
        return 0.0 if missing <= ROUNDING else missing / self.rate

    def take(self, cost: float) -> None:
        """Charge `cost`; a negative one gives back."""
        self._level = min(self.capacity, self.level - cost)

    def resize(self, limit: float) -> None:
        """Go on with another limit, as full in proportion as before."""
        share = self.level / self.capacity
        self._set(limit)
        self._level = share * self.capacity

    def refill(self) -> None:
        """Start again full."""
        self._level = self.capacity


@dataclass
class Meters:
    """The two buckets of one model; None where it is unlimited."""

    requests: Bucket | None
    tokens: Bucket | None

    def each(self) -> list[tuple[Dimension, Bucket]]:
        """The dimensions that are limited."""
        pairs: list[tuple[Dimension, Bucket | None]] = [("requests", self.requests), ("tokens", self.tokens)]
        return [(name, bucket) for name, bucket in pairs if bucket]

    def take(self, requests: float, tokens: float) -> None:
        """Charge both buckets; negative costs give back."""
        for name, bucket in self.each():
            bucket.take(requests if name == "requests" else tokens)


class Limits:
    """Admits or refuses requests, model by model."""

    def __init__(self, options: Options, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._options, self._clock = options, clock
        self._rates: dict[Dimension, float | None] = {"requests": options.rpm, "tokens": options.tpm}
        self._meters: dict[str, Meters] = {}

    def admit(self, model: str, tokens: int) -> None:
        """Charge one request of so many tokens.

        Raises:
            ApiError: 429, nothing charged, when a bucket has no room for it.
        """
        meters = self._of(model)
        costs = {"requests": 1, "tokens": tokens}
        waits = [(bucket.wait(costs[name]), name, bucket) for name, bucket in meters.each()]
        wait, name, bucket = max(waits, key=lambda item: item[0], default=(0.0, None, None))
        if name and bucket and wait:
            raise self._refusal(model, name, bucket, costs[name], wait)
        meters.take(1, tokens)

    def give_back(self, model: str, *, requests: int = 0, tokens: int = 0) -> None:
        """Return a charge; a negative one charges more, into debt if need be."""
        self._of(model).take(-requests, -tokens)

    def headers(self, model: str) -> dict[str, str]:
        """The x-ratelimit-* headers as of now."""
        shown: dict[str, str] = {}
        if not self._options.headers:
            return shown
        for name, bucket in self._of(model).each():
            level = bucket.level
            shown[f"x-ratelimit-limit-{name}"] = str(int(bucket.limit))
            shown[f"x-ratelimit-remaining-{name}"] = str(max(0, int(level + ROUNDING)))
            shown[f"x-ratelimit-reset-{name}"] = duration((bucket.capacity - level) / bucket.rate)
        return shown

    def change(self, limits: dict[str, float | None]) -> None:
        """Set `rpm` and/or `tpm` for every model, levels kept in proportion."""
        renamed: dict[str, Dimension] = {"rpm": "requests", "tpm": "tokens"}
        for key, limit in limits.items():
            name = renamed[key]
            self._rates[name] = limit
            for meters in self._meters.values():
                setattr(meters, name, self._resized(name, getattr(meters, name), limit))

    def refill(self) -> None:
        """Fill every bucket."""
        for meters in self._meters.values():
            for _, bucket in meters.each():
                bucket.refill()

    def _of(self, model: str) -> Meters:
        meters = self._meters.get(model)
        if meters is None:
            meters = self._meters[model] = Meters(self._bucket("requests"), self._bucket("tokens"))
        return meters

    def _bucket(self, name: Dimension) -> Bucket | None:
        limit = self._rates[name]
        if limit is None:
            return None
        # one request always fits, however short the window
        least = 1.0 if name == "requests" else 0.0
        return Bucket(limit, self._options.window, least=least, clock=self._clock)

    def _resized(self, name: Dimension, bucket: Bucket | None, limit: float | None) -> Bucket | None:
        if bucket is None or limit is None:
            return self._bucket(name)
        bucket.resize(limit)
        return bucket

    def _refusal(self, model: str, name: Dimension, bucket: Bucket, cost: int, wait: float) -> ApiError:
        limit, level = int(bucket.limit), int(bucket.level + ROUNDING)
        subject = f"for {model} in organization org-sim on {UNITS[name]}: Limit {limit}"
        if wait == math.inf:
            message = (
                f"Request too large {subject}, Requested {cost}. "
                "The input or output tokens must be reduced in order to run successfully."
            )
            return ApiError(429, message, kind=name, code="rate_limit_exceeded")
        message = (
            f"Rate limit reached {subject}, Used {limit - level}, Requested {cost}. Please try again in "
            f"{duration(wait)}. Visit https://platform.openai.com/account/rate-limits to learn more."
        )
        headers = retry_headers(wait) if self._options.retry_after else {}
        return ApiError(429, message, kind=name, code="rate_limit_exceeded", headers=headers)


def retry_headers(wait: float) -> dict[str, str]:
    """How long to wait, in whole seconds and whole milliseconds, both rounded up."""
    return {"retry-after": str(math.ceil(wait)), "retry-after-ms": str(math.ceil(wait * 1000))}


def duration(seconds: float) -> str:
    """A time as the API's headers write it: "17ms", "1s", "1m2.5s", "6m0s"."""
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
