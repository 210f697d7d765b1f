"""What happened when: a fixed number of intervals, which grow wider as a run grows longer."""

from __future__ import annotations

import time
from array import array
from dataclasses import dataclass, field
from typing import NamedTuple

BINS = 240
_FIRST_WIDTH = 0.25  # seconds
_IDLE = 10.0  # seconds with nothing in flight and nobody waiting, from which they are left out
_MODELS = 24  # that are told apart; what others did is put together
_TOO_MANY_REQUESTS = 429
_OTHERS = "other models"


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


class End(NamedTuple):
    """The end of an attempt.

    Attributes:
        at: Clock time.
        seconds: How long it took.
        status: The HTTP status; None: no answer came.
        tokens: What it came to, as far as the server said.
        ok: Whether it was answered, or never sent.
    """

    at: float
    seconds: float
    status: int | None
    tokens: int
    ok: bool


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
        self._in_flight = 0
        self._tracks: dict[str, Track] = {}
        self._busy = _bins()
        self._breaks: dict[int, float] = {}
        self._changing = False
        self._late: list[tuple[str | None, End]] = []

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
        track = self._track(model, now)
        self._in_flight += 1
        track.admitted[index] += 1
        track.reserved[index] += tokens

    def ended(self, model: str | None, end: End) -> None:
        """Note the end of an attempt."""
        if self._changing:  # a stream that was dropped settles whenever it is collected
            self._late.append((model, end))
            return
        index = self._pass(end.at)
        track = self._track(model, end.at)
        self._in_flight -= 1
        track.seconds += end.seconds
        if end.ok:
            track.used[index] += end.tokens
        elif end.status == _TOO_MANY_REQUESTS:
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

    def _track(self, model: str | None, now: float) -> Track:
        name = model or "files and batches"
        track = self._tracks.get(name)
        if track is None:
            name = name if len(self._tracks) < _MODELS else _OTHERS
            track = self._tracks.get(name) or self._tracks.setdefault(name, Track(first=now - self._zero))
        track.last = self._latest - self._zero
        return track

    def _pass(self, now: float) -> int:
        """Count who was in flight since the last event, and return the interval of this one."""
        now = max(now, self._latest)  # threads tell of their events in any order
        index = int((now - self._zero) / self._width)
        if index >= BINS:
            index = self._widen(now)
        before = self._latest
        start = int((before - self._zero) / self._width)
        while start < index:
            end = self._zero + (start + 1) * self._width
            self._busy[start] += (end - before) * self._in_flight
            before, start = end, start + 1
        self._busy[index] += (now - before) * self._in_flight
        self._latest = now
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
        for model, end in late:
            self.ended(model, end)
        return int((now - self._zero) / self._width)

    def _leave_out(self, now: float) -> None:
        """Go on at `now` as though no time had passed."""
        index = min(int((self._latest - self._zero) / self._width), BINS - 1)
        self._breaks[index] = self._breaks.get(index, 0.0) + now - self._latest
        self._zero += now - self._latest
        self._latest = now


def _joined(bins: array[float]) -> array[float]:
    """Return the sums of each two neighbours, and room for as many again."""
    return array("d", [*map(sum, zip(bins[::2], bins[1::2], strict=True)), *[0.0] * (BINS // 2)])
