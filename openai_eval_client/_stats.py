"""What happened: counts, latencies, a timeline, finish reasons, and what failed."""

from __future__ import annotations

import copy
import math
import time
from array import array
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import openai

from openai_eval_client._runtime import STATE_LOCK
from openai_eval_client._wire import class_of, code_of, read_failure, status_of
from openai_eval_client.models import ClientStats

if TYPE_CHECKING:
    from collections.abc import Collection

    from openai_eval_client._wire import Demand, Outcome
    from openai_eval_client.models import ModelResponse

BINS = 240  # intervals of a timeline
_FIRST_WIDTH = 0.25  # seconds of an interval at first
_IDLE = 10.0  # seconds with nothing in flight or waiting, from which they are left out
_MODELS = 24  # that have a timeline of their own; the others share one
_OTHERS, _UNMETERED = "other models", "files and batches"
_FAILURES, _REASONS = 60, 20  # kinds of failures, and finish reasons, that are told apart
_OTHER = "other"
_RETRIED_BY_SDK = frozenset({408, 409, 429})  # of the 4xx


def _bins() -> array[float]:
    return array("d", bytes(8 * BINS))


@dataclass(slots=True)
class ModelTimeline:
    """What one model did, interval by interval."""

    admitted: array[float] = field(default_factory=_bins)  # attempts that were let go
    reserved: array[float] = field(default_factory=_bins)  # tokens reserved for them
    used: array[float] = field(default_factory=_bins)  # tokens of answers, in the interval in which they came
    rate_limited: array[float] = field(default_factory=_bins)  # answers with status 429
    failed: array[float] = field(default_factory=_bins)  # attempts without an answer for any other reason
    first: float = 0.0  # seconds of the first admission
    last: float = 0.0  # seconds of the latest event
    seconds: float = 0.0  # how long its attempts took, summed


@dataclass(frozen=True, slots=True)
class History:
    """A timeline as it stood at one moment."""

    began_at: float | None  # seconds since 1970; None before anything happened
    seconds: float  # how long it is, without the breaks
    width: float  # seconds of each interval
    models: dict[str, ModelTimeline]
    in_flight: list[float]  # attempts in flight in each interval, on average
    breaks: dict[int, float]  # idle seconds left out, by the interval within or before which they were


class Timeline:
    """Records attempts interval by interval, in constant memory and time; the caller holds a lock."""

    def __init__(self) -> None:
        self._began_at: float | None = None
        self._zero = self._latest = 0.0
        self._width = _FIRST_WIDTH
        self._index = 0  # the interval of the latest event
        self._in_flight = 0
        self._models: dict[str, ModelTimeline] = {}
        self._busy = _bins()  # seconds in flight, summed over attempts
        self._breaks: defaultdict[int, float] = defaultdict(float)

    def admitted(self, model: str | None, asked_at: float, now: float, tokens: float) -> None:
        """Record an admission."""
        if self._began_at is None:
            self._began_at, self._zero, self._latest = time.time(), asked_at, asked_at
        elif not self._in_flight and asked_at - self._latest > _IDLE:
            idle = asked_at - self._latest  # go on as though no time had passed
            self._breaks[self._index] += idle
            self._zero, self._latest = self._zero + idle, asked_at
        index = self._interval_at(now)
        timeline = self._model(model)
        self._in_flight += 1
        timeline.admitted[index] += 1
        timeline.reserved[index] += tokens

    def ended(
        self, model: str | None, now: float, seconds: float, used: int | None, *, rate_limited: bool = False
    ) -> None:
        """Record the end of an attempt."""
        index = self._interval_at(now)
        timeline = self._model(model)
        self._in_flight -= 1
        timeline.seconds += seconds
        if used is not None:
            timeline.used[index] += used
        elif rate_limited:
            timeline.rate_limited[index] += 1
        else:
            timeline.failed[index] += 1

    def history(self) -> History:
        """Return what was recorded so far."""
        seconds, width = self._latest - self._zero, self._width
        lengths = [width] * BINS
        lengths[self._index] = max(seconds - self._index * width, 1e-9)
        in_flight = [area / length for area, length in zip(self._busy, lengths, strict=True)]
        models = copy.deepcopy(self._models)
        return History(self._began_at, seconds, width, models, in_flight, dict(self._breaks))

    def _model(self, model: str | None) -> ModelTimeline:
        name = model or _UNMETERED
        timeline = self._models.get(name)
        if timeline is None:
            name = name if len(self._models) < _MODELS else _OTHERS
            timeline = self._models.setdefault(name, ModelTimeline(first=self._latest - self._zero))
        timeline.last = self._latest - self._zero
        return timeline

    def _interval_at(self, now: float) -> int:
        """Count what was in flight since the latest event, and return the interval of this one."""
        while now >= self._zero + BINS * self._width:
            self._widen()
        while now >= (end := self._zero + (self._index + 1) * self._width):
            self._busy[self._index] += (end - self._latest) * self._in_flight
            self._latest, self._index = end, self._index + 1
        if now > self._latest:  # the events of several threads come in any order
            self._busy[self._index] += (now - self._latest) * self._in_flight
            self._latest = now
        return self._index

    def _widen(self) -> None:
        """Make the intervals twice as wide."""
        self._width *= 2
        self._index //= 2
        self._busy = _joined(self._busy)
        for timeline in self._models.values():
            for count in ("admitted", "reserved", "used", "rate_limited", "failed"):
                setattr(timeline, count, _joined(getattr(timeline, count)))
        breaks, self._breaks = self._breaks, defaultdict(float)
        for index, seconds in breaks.items():
            self._breaks[index // 2] += seconds


def _joined(bins: array[float]) -> array[float]:
    """Return the sums of each two neighbours, and room for as many again."""
    return array("d", [*map(sum, zip(bins[::2], bins[1::2], strict=True)), *[0.0] * (BINS // 2)])


@dataclass(slots=True)
class Failure:
    """One kind of failure of one model."""

    model: str
    kind: str  # the class of the error
    status: int | None  # the HTTP status; None where no answer came, or nothing was sent
    code: str  # the API's code; "" where it gives none
    meaning: str  # for a reader
    attempts: int = 0  # that ended so
    prompts: int = 0  # that failed for good with it
    first: float = 0.0  # when it was first seen, in seconds since 1970
    last: float = 0.0  # when it was last seen


class Failures:
    """Counts failures by kind, in bounded memory; the caller holds a lock."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str, int | None, str, str], Failure] = {}

    def raised(self, model: str, error: Exception, *, for_good: bool) -> None:
        """Count the error of an attempt, or of a prompt that failed for good."""
        is_sent = isinstance(error, openai.APIError)  # for any other error, nothing was
        key = model, type(error).__name__, status_of(error), code_of(error), read_failure(error).meaning
        self._count(key, attempts=is_sent, prompts=for_good)

    def refused(self, model: str, outcome: Outcome, *, for_good: bool) -> None:
        """Count an attempt of the SDK, which makes its own error; without a status nothing came back."""
        status, failure = outcome.status, outcome.failure
        kind = "APIConnectionError" if status is None else class_of(status).__name__
        words = ("", "") if failure is None else (failure.code, failure.meaning)
        self._count((model, kind, status, *words), attempts=1, prompts=for_good)

    def rows(self) -> list[Failure]:
        """Return the kinds there were, the most frequent first."""
        return sorted(self._rows.values(), key=lambda row: (-row.prompts, -row.attempts, row.model))

    def _count(self, key: tuple[str, str, int | None, str, str], *, attempts: int, prompts: int) -> None:
        now = time.time()
        if key not in self._rows and len(self._rows) >= _FAILURES:
            key = _OTHER, _OTHER, None, "", ""
        row = self._rows.get(key) or self._rows.setdefault(key, Failure(*key, first=now))
        row.last = now
        row.attempts += attempts
        row.prompts += prompts


_STEP = math.log(1.02)  # a class is 2% wide: percentiles are off by 1% at most


class Histogram(Counter[int]):
    """How often positive numbers were seen, by logarithmic class: constant memory, however many there are."""

    def add(self, value: float) -> None:
        """Count one value; zero and less count as the smallest class."""
        self[round(math.log(max(value, 1e-6)) / _STEP)] += 1

    def percentile(self, share: float) -> float | None:
        """Return the value that `share` (0 to 1) of those added do not exceed; None before the first."""
        rank, seen = share * self.total(), 0
        for number in sorted(self):
            seen += self[number]
            if seen >= rank:
                return self.value_of(number)
        return None

    @staticmethod
    def value_of(number: float) -> float:
        """Return the value in the middle of a class, or between two of them."""
        return math.exp(number * _STEP)


@dataclass(frozen=True, slots=True)
class ReportData:
    """What a report shows besides the totals."""

    history: History
    latency: dict[int, int]  # how many successful attempts took how long, by class of a `Histogram`
    failures: list[Failure]


class Recorder:
    """The running totals behind `client.stats`; safe for several threads."""

    def __init__(self) -> None:
        self._lock = STATE_LOCK
        # The counts of `ClientStats` by name: writing to its own attributes would take twice the time.
        self._totals: defaultdict[str, Any] = defaultdict(int)
        self._latency = Histogram()
        self._timeline = Timeline()
        self._failures = Failures()
        self._finish_reasons: Counter[str] = Counter()
        self._unsent: Counter[str] = Counter()  # parameters that were asked for and not sent

    def admitted(self, model: str | None, tokens: float, asked_at: float, now: float) -> None:
        """Count an admission, with the tokens reserved for it."""
        with self._lock:
            self._totals["reserved_tokens"] += round(tokens)
            self._totals["wait_seconds"] += now - asked_at
            self._timeline.admitted(model, asked_at, now, tokens)

    def settled_attempt(self, demand: Demand, outcome: Outcome, began: float, ended: float) -> None:
        """Count an admitted attempt, sent or not; it began when it was admitted."""
        self._lock.when_free(lambda: self._count_attempt(demand, outcome, began, ended))

    def _count_attempt(self, demand: Demand, outcome: Outcome, began: float, ended: float) -> None:
        totals, usage, counted, seconds = self._totals, outcome.usage, outcome.counted, ended - began
        used = None
        if outcome.ok or not outcome.sent:
            used = 0 if usage is None else usage.prompt_tokens + usage.completion_tokens
        limited = outcome.is_rate_limit
        self._timeline.ended(demand.model, ended, seconds, used, rate_limited=limited)
        if demand.retry is not None:
            self._count_sdk_call(demand, outcome)
        if not outcome.sent:
            return
        totals["attempts"] += 1
        totals["server_seconds"] += seconds
        totals["rate_limited"] += limited
        if outcome.ok:
            self._latency.add(seconds)
        if counted is not None:
            totals["prompt_tokens"] += counted.prompt_tokens
            totals["completion_tokens"] += counted.completion_tokens

    def _count_sdk_call(self, demand: Demand, outcome: Outcome) -> None:
        """Count a call, or a retry, that the SDK made by itself."""
        self._totals["retries" if demand.retry else "requests"] += 1
        if not outcome.ok:
            may_repeat = (outcome.headers or {}).get("x-should-retry") == "true"
            is_repeated = may_repeat or outcome.status in _RETRIED_BY_SDK
            for_good = outcome.is_refusal and not is_repeated  # of other failures only the SDK knows
            self._totals["failures"] += for_good
            self._failures.refused(str(demand.model), outcome, for_good=for_good)

    def retry(self, model: str, error: Exception, wait: float) -> None:
        """Count one more attempt for the same prompt, after an error and a wait in seconds."""
        with self._lock:
            self._totals["retries"] += 1
            self._totals["retry_seconds"] += wait
            self._failures.raised(model, error, for_good=False)

    def answered(self, answer: ModelResponse, *, cached: bool = False) -> None:
        """Count one prompt that was answered, by the server or from the cache."""
        with self._lock:
            self._totals["requests"] += 1
            self._totals["cache_hits"] += cached
            self._count_answer(answer)

    def stored(self) -> None:
        """Count one answer stored in the cache."""
        with self._lock:
            self._totals["cache_writes"] += 1

    def failed(self, model: str, error: Exception) -> None:
        """Count one prompt that failed for good."""
        with self._lock:
            self._totals["requests"] += 1
            self._totals["failures"] += 1
            self._failures.raised(model, error, for_good=True)

    def settled(self, answers: Collection[ModelResponse], failed: int) -> None:
        """Count the requests of a batch, and the tokens of its answers."""
        with self._lock:
            totals = self._totals
            totals["requests"] += len(answers) + failed
            totals["failures"] += failed
            for answer in answers:
                totals["prompt_tokens"] += answer.usage.prompt_tokens
                totals["completion_tokens"] += answer.usage.completion_tokens
                self._count_answer(answer)

    def _count_answer(self, answer: ModelResponse) -> None:
        known, reason = self._finish_reasons, answer.finish_reason
        self._totals["schema_misses"] += answer.fits_schema is False
        self._unsent.update(answer.unsent_parameters)
        if reason:
            known[reason if reason in known or len(known) < _REASONS else _OTHER] += 1

    @property
    def rate_limited_and_retries(self) -> tuple[int, int]:
        """Answers with status 429, and retries, so far."""
        with self._lock:
            return self._totals["rate_limited"], self._totals["retries"]

    def snapshot(self, **details: Any) -> ClientStats:
        """Return the totals as they stand, with details that are kept elsewhere."""
        with self._lock:
            percentiles = {f"latency_p{n}": self._latency.percentile(n / 100) for n in (50, 95, 99)}
            counted = {"finish_reasons": self._finish_reasons, "unsent_parameters": self._unsent}
            return ClientStats(**{**self._totals, **percentiles, **counted, **details})

    def report_data(self) -> ReportData:
        """Return what a report shows besides the totals."""
        with self._lock:
            history, failures = self._timeline.history(), [replace(row) for row in self._failures.rows()]
            return ReportData(history, dict(self._latency), failures)
