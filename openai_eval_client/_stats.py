"""Counts what a client does, cheaply, and turns it into `ClientStats`."""

from __future__ import annotations

import math
import threading
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from openai_eval_client._failures import Failures
from openai_eval_client._timeline import Timeline
from openai_eval_client.models import ClientStats

if TYPE_CHECKING:
    from openai_eval_client._failures import Failure
    from openai_eval_client._timeline import History
    from openai_eval_client._wire import Demand, Outcome

_TOO_MANY_REQUESTS = 429
_RETRIED_BY_SDK = frozenset({408, 409, 429})  # of the 4xx
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
        rank, seen = share * sum(self._classes.values()), 0
        for number in sorted(self._classes):
            seen += self._classes[number]
            if seen >= rank:
                return math.exp(number * _STEP)
        return None

    def classes(self) -> dict[int, int]:
        """Return how often each class was seen, by its number."""
        return dict(self._classes)

    @staticmethod
    def value_of(number: float) -> float:
        """Return the value in the middle of a class; between two of them where the number is."""
        return math.exp(number * _STEP)


@dataclass(slots=True)
class _Totals:
    """The counts of `ClientStats`; pydantic's own attributes would take twice the time."""

    requests: int = 0
    failures: int = 0
    attempts: int = 0
    retries: int = 0
    rate_limited: int = 0
    reserved_tokens: int = 0
    wait_seconds: float = 0.0
    retry_seconds: float = 0.0
    server_seconds: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cache_hits: int = 0
    cache_writes: int = 0


@dataclass(frozen=True, slots=True)
class Story:
    """What a report shows besides the totals.

    Attributes:
        history: What happened when.
        latency: How often a successful attempt took how long: the counts of a `Histogram`, by class.
        failures: What went wrong, by kind.
    """

    history: History
    latency: dict[int, int]
    failures: list[Failure]


class Recorder:
    """The running totals behind `client.stats`; safe for several threads."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # re-entrant: a collected stream may settle inside a locked region
        self._totals = _Totals()
        self._latency = Histogram()
        self._timeline = Timeline()
        self._failures = Failures()

    def admitted(self, model: str | None, tokens: float, asked_at: float, now: float) -> None:
        """Count an admission: the tokens reserved for it, and when it was asked for and granted."""
        with self._lock:
            self._totals.reserved_tokens += round(tokens)
            self._totals.wait_seconds += now - asked_at
            self._timeline.admitted(model, asked_at, now, tokens)

    def ended(self, model: str | None, outcome: Outcome, began: float, now: float) -> None:
        """Note when an admitted attempt began and ended, sent or not."""
        usage, used = outcome.usage, None
        if outcome.ok or not outcome.sent:
            used = 0 if usage is None else usage.prompt_tokens + usage.completion_tokens
        with self._lock:
            self._timeline.ended(model, now, now - began, outcome.status, used)

    def attempt(self, outcome: Outcome, seconds: float) -> None:
        """Count one HTTP attempt that was sent, and how long it took."""
        with self._lock:
            totals = self._totals
            totals.attempts += 1
            totals.server_seconds += seconds
            totals.rate_limited += outcome.status == _TOO_MANY_REQUESTS
            if outcome.ok:
                self._latency.add(seconds)
            used = outcome.counted
            if used is not None:
                totals.prompt_tokens += used.prompt_tokens
                totals.completion_tokens += used.completion_tokens

    def called(self, demand: Demand, outcome: Outcome) -> None:
        """Count the calls and retries of somebody who does not count them: the SDK."""
        if demand.retry is None:
            return
        with self._lock:
            self._totals.requests += not demand.retry
            self._totals.retries += demand.retry
            for_good = _is_refused_for_good(outcome)
            self._totals.failures += for_good
            if not outcome.ok:
                self._failures.refused(str(demand.model), outcome.status, outcome.message, for_good=for_good)

    def retry(self, model: str, error: Exception, wait: float) -> None:
        """Count one more attempt for the same prompt, after an error and so many seconds."""
        with self._lock:
            self._totals.retries += 1
            self._totals.retry_seconds += wait
            self._failures.raised(model, error, for_good=False)

    def answered(self) -> None:
        """Count one answered prompt."""
        with self._lock:
            self._totals.requests += 1

    def cached(self) -> None:
        """Count one prompt answered from the cache."""
        with self._lock:
            self._totals.requests += 1
            self._totals.cache_hits += 1

    def stored(self) -> None:
        """Count one answer kept in the cache."""
        with self._lock:
            self._totals.cache_writes += 1

    def failed(self, model: str, error: Exception) -> None:
        """Count one prompt that failed for good."""
        with self._lock:
            self._totals.requests += 1
            self._totals.failures += 1
            self._failures.raised(model, error, for_good=True)

    def settled(self, answered: int, failed: int, prompt_tokens: int, completion_tokens: int) -> None:
        """Count the requests of a batch, and the tokens of its answers."""
        with self._lock:
            totals = self._totals
            totals.requests += answered + failed
            totals.failures += failed
            totals.prompt_tokens += prompt_tokens
            totals.completion_tokens += completion_tokens

    @property
    def troubles(self) -> tuple[int, int]:
        """429s and retries so far."""
        with self._lock:
            return self._totals.rate_limited, self._totals.retries

    def snapshot(self, **details: Any) -> ClientStats:
        """Return the totals as they stand, with the details that others keep."""
        with self._lock:
            percentiles: dict[str, Any] = {
                f"latency_p{n}": self._latency.percentile(n / 100) for n in (50, 95, 99)
            }
            return ClientStats(**asdict(self._totals), **percentiles, **details)

    def story(self) -> Story:
        """Return what a report shows besides the totals."""
        with self._lock:
            failures = [replace(row) for row in self._failures.rows()]
            return Story(self._timeline.history(), self._latency.classes(), failures)


def _is_refused_for_good(outcome: Outcome) -> bool:
    """Return whether the SDK will not repeat a refused attempt; of other failures only itself knows."""
    if not outcome.is_refusal or outcome.status in _RETRIED_BY_SDK:
        return False
    return (outcome.headers or {}).get("x-should-retry") != "true"
