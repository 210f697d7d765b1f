"""Counts what a client does, cheaply, and turns it into `ClientStats`."""

from __future__ import annotations

import math
import threading
from collections import Counter
from decimal import Decimal

from openai_eval_client.models import ClientStats

_STEP = math.log(1.02)  # histogram classes 2% wide: percentiles are off by 1% at most


class Histogram:
    """Positive numbers by logarithmic class: constant memory, however many are added."""

    def __init__(self) -> None:
        self._classes: Counter[int] = Counter()

    def add(self, value: float) -> None:
        """Count one value; nought and less count as the smallest class."""
        self._classes[round(math.log(max(value, 1e-6)) / _STEP)] += 1

    def percentile(self, share: float) -> float | None:
        """Return the value that `share` (0 to 1) of those added do not exceed; None before the first."""
        rank = (
            share * self._classes.total()
            if hasattr(Counter, "total")
            else share * sum(self._classes.values())
        )
        seen = 0
        for number in sorted(self._classes):
            seen += self._classes[number]
            if seen >= rank:
                return math.exp(number * _STEP)
        return None


class Recorder:
    """The running totals behind `client.stats`; safe for several threads."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # re-entrant: a collected stream may settle inside a locked region
        self._totals = ClientStats()
        self._cost = Decimal(0)
        self._latency = Histogram()

    def admitted(self, tokens: float, waited: float) -> None:
        """Count an admission: the tokens reserved for it, and the seconds it waited."""
        with self._lock:
            self._totals.reserved_tokens += round(tokens)
            self._totals.wait_seconds += waited

    def attempt(self, status: int | None, seconds: float, usage: tuple[int, int] | None) -> None:
        """Count one HTTP attempt: status (None: no answer), duration, input and output tokens."""
        with self._lock:
            self._totals.attempts += 1
            self._totals.rate_limited += status == 429  # noqa: PLR2004  # the status is its own name
            if status is not None and status < 400:  # noqa: PLR2004
                self._latency.add(seconds)
            if usage is not None:
                self._totals.prompt_tokens += usage[0]
                self._totals.completion_tokens += usage[1]

    def retry(self) -> None:
        """Count one more attempt for the same prompt."""
        with self._lock:
            self._totals.retries += 1

    def answered(self, cost: Decimal | None) -> None:
        """Count one answered prompt and what it cost in USD."""
        with self._lock:
            self._totals.requests += 1
            self._totals.unpriced += cost is None
            self._cost += cost or 0

    def failed(self) -> None:
        """Count one prompt that failed for good."""
        with self._lock:
            self._totals.requests += 1
            self._totals.failures += 1

    def snapshot(self) -> ClientStats:
        """Return the totals as they stand."""
        with self._lock:
            percentiles = {f"latency_p{n}": self._latency.percentile(n / 100) for n in (50, 95, 99)}
            return self._totals.model_copy(update={"cost": float(self._cost), **percentiles})
