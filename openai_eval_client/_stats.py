"""What happened: counts, latencies, a timeline, and what failed."""

from __future__ import annotations

import math
import threading
import time
from array import array
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import openai

from openai_eval_client._wire import class_of, code_of, status_of
from openai_eval_client.models import ClientStats

if TYPE_CHECKING:
    from openai_eval_client._wire import Demand, Outcome


BINS = 240
_FIRST_WIDTH = 0.25  # seconds
_IDLE = 10.0  # seconds with nothing in flight and nobody waiting, from which they are left out
_MODELS = 24  # that are told apart; what others did is put together
_TOO_MANY_REQUESTS = 429
_OTHERS = "other models"
_UNMETERED = "files and batches"


def _bins() -> array[float]:
    return array("d", bytes(8 * BINS))


@dataclass(slots=True)
class ModelTimeline:
    """What one model did, interval by interval."""

    admitted: array[float] = field(default_factory=_bins)  # attempts that were let go
    reserved: array[float] = field(default_factory=_bins)  # tokens reserved for them
    # tokens that answers came to, in the interval in which they came
    used: array[float] = field(default_factory=_bins)
    rate_limited: array[float] = field(default_factory=_bins)  # answers with status 429
    # attempts that brought no answer for any other reason
    failed: array[float] = field(default_factory=_bins)
    first: float = 0.0  # seconds of the first admission
    last: float = 0.0  # seconds of the latest event
    seconds: float = 0.0  # how long its attempts took, summed

    def copy(self) -> ModelTimeline:
        """Return one that stays as it is."""
        counts = {name: array("d", getattr(self, name)) for name in _COUNTS}
        return ModelTimeline(**counts, first=self.first, last=self.last, seconds=self.seconds)


_COUNTS = ("admitted", "reserved", "used", "rate_limited", "failed")


@dataclass(frozen=True, slots=True)
class History:
    """A timeline as it stood at one moment."""

    began_at: float | None  # when it began, in seconds since 1970; None: nothing has happened
    seconds: float  # how long it is, without the breaks
    width: float  # seconds of each interval
    tracks: dict[str, ModelTimeline]  # what each model did
    in_flight: list[float]  # attempts in flight in each interval, on average
    # by the number of an interval, the seconds left out before or within it: nothing happened
    breaks: dict[int, float]

    @property
    def bins(self) -> int:
        """How many intervals there are so far."""
        return min(int(self.seconds / self.width) + 1, BINS)


class Timeline:
    """Keeps it, in constant memory and time; whoever calls it holds a lock."""

    def __init__(self) -> None:
        self._began_at: float | None = None
        self._zero = self._latest = 0.0
        self._width = _FIRST_WIDTH
        self._index = 0
        self._until = -math.inf  # the end of that interval
        self._in_flight = 0
        self._tracks: dict[str, ModelTimeline] = {}
        self._busy = _bins()
        self._breaks: dict[int, float] = {}
        self._changing = False
        self._late: list[tuple[str | None, float, float, int | None, int | None]] = []

    def admitted(self, model: str | None, asked_at: float, now: float, tokens: float) -> None:
        """Note an admission."""
        if self._began_at is None:
            self._began_at, self._zero, self._latest = time.time(), asked_at, asked_at
        elif not self._in_flight and asked_at - self._latest > _IDLE:
            self._leave_out(asked_at)
        index = self._pass(now)
        track = self._track(model)
        self._in_flight += 1
        track.admitted[index] += 1
        track.reserved[index] += tokens

    def ended(
        self,
        model: str | None,
        now: float,
        seconds: float,
        status: int | None,
        used: int | None,
    ) -> None:
        """Note the end of an attempt."""
        if self._changing:  # a stream that was dropped settles whenever it is collected
            self._late.append((model, now, seconds, status, used))
            return
        index = self._pass(now)
        track = self._track(model)
        self._in_flight -= 1
        track.seconds += seconds
        if used is not None:
            track.used[index] += used
        elif status == _TOO_MANY_REQUESTS:
            track.rate_limited[index] += 1
        else:
            track.failed[index] += 1

    def history(self) -> History:
        """Return what was kept so far."""
        tracks = {name: track.copy() for name, track in self._tracks.items()}
        seconds, width = self._latest - self._zero, self._width
        whole = [width] * BINS
        last = min(int(seconds / width), BINS - 1)
        whole[last] = max(seconds - last * width, 1e-9)
        busy = [area / length for area, length in zip(self._busy, whole, strict=True)]
        return History(self._began_at, seconds, width, tracks, busy, dict(self._breaks))

    def _track(self, model: str | None) -> ModelTimeline:
        track = self._tracks.get(model or _UNMETERED) or self._new_track(model or _UNMETERED)
        track.last = self._latest - self._zero
        return track

    def _new_track(self, name: str) -> ModelTimeline:
        name = name if len(self._tracks) < _MODELS else _OTHERS
        return self._tracks.setdefault(name, ModelTimeline(first=self._latest - self._zero))

    def _pass(self, now: float) -> int:
        """Count who was in flight since the last event, and return the interval of this one."""
        if now >= self._until:
            return self._advance(now)
        if now > self._latest:  # threads tell of their events in any order
            self._busy[self._index] += (now - self._latest) * self._in_flight
            self._latest = now
        return self._index

    def _advance(self, now: float) -> int:
        """Do that where another interval has begun."""
        now = max(now, self._latest)
        index = int((now - self._zero) / self._width)
        if index >= BINS:
            index = self._widen(now)
        before = self._latest
        for passed in range(int((before - self._zero) / self._width), index):
            end = self._zero + (passed + 1) * self._width
            self._busy[passed] += (end - before) * self._in_flight
            before = end
        self._busy[index] += (now - before) * self._in_flight
        self._latest, self._index = now, index
        self._until = self._zero + (index + 1) * self._width
        return index

    def _widen(self, now: float) -> int:
        """Make the intervals twice as wide until `now` is in one of them."""
        self._changing = True
        while int((now - self._zero) / self._width) >= BINS:
            self._width *= 2
            self._busy = _joined(self._busy)
            for track in self._tracks.values():
                for count in _COUNTS:
                    setattr(track, count, _joined(getattr(track, count)))
            joined: dict[int, float] = {}
            for index, seconds in self._breaks.items():
                joined[index // 2] = joined.get(index // 2, 0.0) + seconds
            self._breaks = joined
        self._changing = False
        late, self._late = self._late, []
        for event in late:
            self.ended(*event)
        return int((now - self._zero) / self._width)

    def _leave_out(self, now: float) -> None:
        """Go on at `now` as though no time had passed."""
        index = min(int((self._latest - self._zero) / self._width), BINS - 1)
        self._breaks[index] = self._breaks.get(index, 0.0) + now - self._latest
        self._zero += now - self._latest
        self._latest, self._until = now, -math.inf


def _joined(bins: array[float]) -> array[float]:
    """Return the sums of each two neighbours, and room for as many again."""
    return array("d", [*map(sum, zip(bins[::2], bins[1::2], strict=True)), *[0.0] * (BINS // 2)])


_MOST = 60  # kinds that are told apart
_OTHER = "other"


@dataclass(slots=True)
class Failure:
    """One kind of failure of one model."""

    model: str  # the model that was asked
    kind: str  # the class of the error
    status: int | None  # the HTTP status; None where no answer came, or nothing was sent
    code: str  # the API's word for it; "" where it has none
    attempts: int = 0  # how many attempts ended so
    prompts: int = 0  # how many prompts failed for good with it
    first: float = 0.0  # when it was first seen, in seconds since 1970
    last: float = 0.0  # when it was last seen


class Failures:
    """Counts them, in bounded memory; whoever calls it holds a lock."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str, int | None, str], Failure] = {}

    def raised(self, model: str, error: Exception, *, for_good: bool) -> None:
        """Count an error that an attempt, or a prompt for good, ended with."""
        row = self._row(model, type(error).__name__, status_of(error), code_of(error))
        row.attempts += isinstance(error, openai.APIError)  # of the others, nothing was sent
        row.prompts += for_good

    def refused(self, model: str, status: int | None, code: str, *, for_good: bool) -> None:
        """Count an attempt whose error the SDK will make: of what came back, or where nothing did."""
        kind = "APIConnectionError" if status is None else class_of(status).__name__
        row = self._row(model, kind, status, code)
        row.attempts += 1
        row.prompts += for_good

    def rows(self) -> list[Failure]:
        """Return the kinds there were, the most frequent first."""
        return sorted(self._rows.values(), key=lambda row: (-row.prompts, -row.attempts, row.model))

    def _row(self, model: str, kind: str, status: int | None, code: str) -> Failure:
        now = time.time()
        key = model, kind, status, code
        if key not in self._rows and len(self._rows) >= _MOST:
            key = _OTHER, _OTHER, None, ""
        row = self._rows.get(key) or self._rows.setdefault(key, Failure(*key, first=now))
        row.last = now
        return row


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
class ReportData:
    """What a report shows besides the totals."""

    history: History  # what happened when
    # how often a successful attempt took how long: the counts of a `Histogram`, by class
    latency: dict[int, int]
    failures: list[Failure]  # what went wrong, by kind


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
                code = outcome.failure.code if outcome.failure is not None else ""
                self._failures.refused(str(demand.model), outcome.status, code, for_good=for_good)

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

    def story(self) -> ReportData:
        """Return what a report shows besides the totals."""
        with self._lock:
            failures = [replace(row) for row in self._failures.rows()]
            return ReportData(self._timeline.history(), self._latency.classes(), failures)


def _is_refused_for_good(outcome: Outcome) -> bool:
    """Return whether the SDK will not repeat a refused attempt; of other failures only itself knows."""
    if not outcome.is_refusal or outcome.status in _RETRIED_BY_SDK:
        return False
    return (outcome.headers or {}).get("x-should-retry") != "true"
