"""What happened when: a fixed number of intervals, which grow wider as a run grows longer."""

from __future__ import annotations

import math
import time
from array import array
from dataclasses import dataclass, field

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
class Track:
    """What one model did, interval by interval.

    Attributes:
        admitted: Attempts that were let go.
        reserved: Tokens reserved for them.
        used: Tokens that answers came to, in the interval in which they came.
        rate_limited: Answers with status 429.
        failed: Attempts that brought no answer for any other reason.
        first: Seconds of the first admission.
        last: Seconds of the latest event.
        seconds: How long its attempts took, summed.
    """

    admitted: array[float] = field(default_factory=_bins)
    reserved: array[float] = field(default_factory=_bins)
    used: array[float] = field(default_factory=_bins)
    rate_limited: array[float] = field(default_factory=_bins)
    failed: array[float] = field(default_factory=_bins)
    first: float = 0.0
    last: float = 0.0
    seconds: float = 0.0

    def copy(self) -> Track:
        """Return one that stays as it is."""
        counts = {name: array("d", getattr(self, name)) for name in _COUNTS}
        return Track(**counts, first=self.first, last=self.last, seconds=self.seconds)


_COUNTS = ("admitted", "reserved", "used", "rate_limited", "failed")


@dataclass(frozen=True, slots=True)
class History:
    """A timeline as it stood at one moment.

    Attributes:
        began_at: When it began, in seconds since 1970; None: nothing has happened.
        seconds: How long it is, without the breaks.
        width: Seconds of each interval.
        tracks: What each model did.
        in_flight: Attempts in flight in each interval, on average.
        breaks: By the number of an interval, the seconds left out before or within it: nothing happened.
    """

    began_at: float | None
    seconds: float
    width: float
    tracks: dict[str, Track]
    in_flight: list[float]
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
        self._tracks: dict[str, Track] = {}
        self._busy = _bins()
        self._breaks: dict[int, float] = {}
        self._changing = False
        self._late: list[tuple[str | None, float, float, int | None, int | None]] = []

    def admitted(self, model: str | None, asked_at: float, now: float, tokens: float) -> None:
        """Note an admission.

        Args:
            model: Whose.
            asked_at: Clock time at which it queued.
            now: Clock time at which it was granted.
            tokens: What was reserved for it.
        """
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
        self, model: str | None, now: float, seconds: float, status: int | None, used: int | None
    ) -> None:
        """Note the end of an attempt.

        Args:
            model: Whose.
            now: Clock time.
            seconds: How long it took.
            status: The HTTP status; None: no answer came.
            used: Tokens that it came to, as far as the server said; None: it was sent and brought no answer.
        """
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

    def _track(self, model: str | None) -> Track:
        track = self._tracks.get(model or _UNMETERED) or self._new_track(model or _UNMETERED)
        track.last = self._latest - self._zero
        return track

    def _new_track(self, name: str) -> Track:
        name = name if len(self._tracks) < _MODELS else _OTHERS
        return self._tracks.setdefault(name, Track(first=self._latest - self._zero))

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
