"""Limits shared by several processes and machines."""

from __future__ import annotations

import functools
import heapq
import random
from collections import defaultdict
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from openai_eval_client._limits.queue import ModelQueue, State, Waiter
from openai_eval_client._wire import DIMENSIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Mapping, Sequence

    from openai_eval_client._limits.buckets import Clock
    from openai_eval_client._wire import StatedLimit
    from openai_eval_client.config import RateLimitConfig


ALIVE_SECONDS = 10.0  # a worker that waits and was not heard of for so long is gone


class SharedBackend(Protocol):
    """One worker's way there."""

    generation: int  # another number in a forked child, which has to ask for itself
    workers: int  # how many were alive when one of the queues heard last; 0: none has heard yet

    def ask(self, model: str, told: dict[str, Any], done: Callable[[Any], None]) -> None:
        """Ask and tell; `done` is called later with the reply or the exception, on any thread."""

    def leave(self, told: dict[str, dict[str, Any]]) -> None:
        """Tell the last, by model, and ask no more."""


_LINE = 8  # numbers of one dimension in a reply


class Position(NamedTuple):
    """What had been reserved in each dimension before a waiter."""

    requests: float
    tokens: float


class _Positioned(tuple[Any, ...]):  # noqa: SLOT001  # a tuple with a place besides
    """The marks of a waiter whose cost the shared state knows."""

    place: Position


def with_position(marks: tuple[Any, ...], place: Position) -> Any:
    """Return the marks of a waiter, with its place in the shared state."""
    placed = _Positioned(marks)
    placed.place = place
    return placed


def position_of(marks: tuple[Any, ...]) -> Position | None:
    """Return the place that came with these marks; None where the shared state does not know of it."""
    return getattr(marks, "place", None)


class Released(NamedTuple):
    """What one bucket has let go."""

    free: float  # in all, when the reply was made
    rate: float  # units a second that it lets go
    size: float  # units that it holds

    def left(self, taken: float, seconds: float) -> float:
        """Return what it held that many seconds after the reply, if nobody has taken any since."""
        return min(self.free + self.rate * seconds - taken, self.size)

    def ready_in(self, before: float, amount: float) -> float:
        """Return the seconds from the reply until `amount` may go that was reserved after `before`."""
        return (before + min(amount, self.size) - self.free) / self.rate


class Line(NamedTuple):
    """One dimension: what was reserved before this reply, the two buckets, whether the server has spoken."""

    taken: float
    configured: Released
    server: Released
    spoken: bool


class SharedSnapshot(NamedTuple):
    """The shared stated as of one reply."""

    at: float  # clock time at which it came
    epoch: float  # the birth of the shared state: another one knows nothing of the places in this one
    age: float  # seconds since then
    workers: int  # how many are alive
    reserved: int  # for how many of the waiters asked for
    pause: float  # seconds from `at` for which the server asked that nobody go
    lines: tuple[Line, ...]  # the dimensions

    @classmethod
    def read(cls, reply: Sequence[float], at: float) -> SharedSnapshot:
        """Read a reply that came at that clock time."""
        epoch, age, workers, reserved, pause, *numbers = reply
        lines = tuple(_line(numbers[n * _LINE : (n + 1) * _LINE]) for n in range(len(DIMENSIONS)))
        return cls(at, epoch, age, int(workers), int(reserved), max(pause, 0.0), lines)

    def held_up(self, place: Position, amounts: tuple[float, float], now: float) -> tuple[float, str]:
        """Return the seconds until what was reserved at `place` may go, and what it waits for."""
        waits = [
            (bucket.ready_in(before, amount), dimension)
            for dimension, line, before, amount in zip(DIMENSIONS, self.lines, place, amounts, strict=True)
            for bucket in (line.configured, line.server)
        ]
        wait, cause = max([*waits, (self.pause, "pause")])
        return self.at + wait - now, cause

    def share(self, number: int, taken: float, workers: int, now: float) -> tuple[float, float]:
        """Return one worker's part of one dimension: its rate, and what is left of it, if that is known."""
        line = self.lines[number]
        both = (line.configured, line.server)
        known = now - self.at <= ALIVE_SECONDS
        left = min(bucket.left(taken, now - self.at) for bucket in both) if known else 0.0
        return min(bucket.rate for bucket in both) / workers, max(left, 0.0) / workers


def _line(numbers: Sequence[float]) -> Line:
    taken, *six, spoken = numbers
    return Line(taken, Released(*six[:3]), Released(*six[3:]), bool(spoken))


class PendingUpdates:
    """Collects what happened since the worker spoke last; in the words of `shared.lua`."""

    def __init__(self) -> None:
        self.urgent = False
        self._sums: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._heard: dict[int, dict[str, float]] = {}
        self._back: list[tuple[float, float, float]] = []
        self._refused: list[dict[str, Any]] = []
        self._pause_until = 0.0

    def __bool__(self) -> bool:
        return bool(self._sums or self._back or self._heard or self._refused or self._pause_until)

    @property
    def spent(self) -> tuple[float, float]:
        """What was spent while the worker was alone: requests and tokens."""
        requests, tokens = self._sums["spent"]
        return requests, tokens

    def add(self, what: str, requests: float, tokens: float) -> None:
        """Sum up what was spent, credited, owed or served."""
        sums = self._sums[what]
        sums[0] += requests
        sums[1] += tokens

    def refund(self, place: Position, tokens: float) -> None:
        """Pass on that what was reserved at a place is not needed."""
        self._back.append((*place, tokens))

    def update_from_headers(  # noqa: PLR0917  # as they come from the headers
        self,
        line: int,
        stated: StatedLimit,
        rate: float,
        size: float,
        place: float,
        sent_at: float,
    ) -> None:
        """Pass on what the headers say, where no fresher request has been answered."""
        known = self._heard.get(line)
        if known is None or known["age"] <= sent_at:
            word = {"line": line + 1, "rate": rate, "size": size, "left": stated.remaining, "place": place}
            self._heard[line] = {**word, "age": sent_at}

    def reject_input(self, line: int, amount: float, wait: float, place: float, *, spoke: bool) -> None:
        """Pass on a refusal, as `ServerBucket.refused` takes it; `place` as `hear` does."""
        word = {"line": line + 1, "amount": amount, "wait": wait, "spoke": spoke, "place": place}
        self._refused.append(word)
        self.urgent = True

    def pause(self, until: float) -> None:
        """Pass on that the server wants nobody to go until that clock time."""
        self._pause_until = max(self._pause_until, until)
        self.urgent = True

    def told(self, now: float) -> dict[str, Any]:
        """Return all of it; times become ages in seconds."""
        told: dict[str, Any] = dict(self._sums)
        if self._heard:
            told["heard"] = [{**word, "age": max(now - word["age"], 0.0)} for word in self._heard.values()]
        if self._back:
            told["back"] = self._back
        if self._refused:
            told["refused"] = self._refused
        if self._pause_until > now:
            told["pause"] = self._pause_until - now
        return told


_BEAT_SECONDS = 3.0  # one that waits is heard of at least so often, and hears what has changed
_YOUNG_SECONDS, _YOUNG_BEAT = 10.0, 0.25  # while the limits are still being learnt that is much
_TELL_SECONDS = (
    1.0  # the longest that pending wait for a question to travel with, as long as anything happens
)
_PROBE_SECONDS = 0.25  # after the shared state was lost, doubled from try to try up to the next
_PROBE_MOST = 5.0
_TICKETS = 16  # in one question at most: also while there is plenty, workers take turns
_KEEP = 3600.0  # seconds for which an idle stated is remembered; then its buckets are full


class SharedModelQueue(ModelQueue):
    """Permit to one model, within what all workers may send.

    Besides the shared state the quotas of this worker alone are kept up, for the time when they are needed.
    """

    def __init__(
        self,
        model: str,
        config: RateLimitConfig,
        clock: Clock,
        backend: SharedBackend,
        replied: Callable[[SharedModelQueue, Any], None],
    ) -> None:
        super().__init__(model, config, clock)
        self._backend = backend
        self._replied = functools.partial(replied, self)
        self._adapts = config.adaptive_throttling
        self._burst, self._keep = config.burst_seconds, round(max(_KEEP, 2 * config.burst_seconds))
        self._largest = [1.0, 0.0]  # that one waiter took
        self._forget()

    def _forget(self) -> None:
        """Know nothing of the shared state, as at first."""
        self._generation, self._alone = self._backend.generation, False
        self._snapshot: SharedSnapshot | None = None
        self._taken = [0.0, 0.0]
        self._reserved: dict[Waiter, Position] = {}
        self._asked: list[Waiter] | None = None
        self._pending = self._underway = PendingUpdates()
        self._admitted_at = self._told_at = float("-inf")
        self._next_try, self._patience = 0.0, _PROBE_SECONDS

    def try_grant(self, waiter: Waiter) -> bool:
        """Admit a new waiter at once, where this worker is alone."""
        return self._alone and super().try_grant(waiter)

    def grant_next(self) -> Waiter | None:
        """Admit the waiter whose place has come up."""
        if self._generation != self._backend.generation:
            self._forget()
        waiter = super().grant_next() if self._alone else self._next_due()
        if waiter is None:
            self._keep_in_touch()
        return waiter

    def next_in(self) -> float | None:
        """Return the seconds until there is something to do; None where it will be told."""
        now = self._clock.time()
        if self._alone:
            delay = super().next_in()
            return max(self._next_try - now, 0.0) if delay is None else min(delay, self._next_try - now)
        waiting = self._first_reserved()
        if waiting is None:
            self._cause = "concurrency"
            return None
        delay, self._cause = self._due_in(waiting, now)
        return min(delay, max(self._next_beat() - now, 0.0)) if self._asked is None else delay

    def cancel(self, waiter: Waiter) -> None:
        """Take back a waiter that was not sent, and what is reserved for it."""
        granted = waiter.state is State.GRANTED
        place = position_of(waiter.marks) if granted else self._reserved.pop(waiter, None)
        if place is not None:
            self._pending.refund(place, waiter.tokens)
        elif granted:
            self._pending.add("spent", -1, -waiter.tokens)
        super().cancel(waiter)

    def settle(self, waiter: Waiter, tokens: float | None) -> None:
        """Free the waiter's slot and replace its estimate by `tokens`, where they are known."""
        super().settle(waiter, tokens)
        if tokens is None or position_of(waiter.marks) is None or tokens == waiter.tokens:
            return
        self._pending.add("credit", 0, waiter.tokens - tokens)
        if tokens > waiter.tokens:
            self._pending.add("owed", 0, tokens - waiter.tokens)

    def on_success(self, waiter: Waiter) -> None:
        """Learn that the server had room for this waiter."""
        super().on_success(waiter)
        if position_of(waiter.marks) is not None:
            self._pending.add("served", 1, waiter.tokens)

    def rejected(self, waiter: Waiter) -> None:
        """Learn that the server refused this waiter for good, and so did not count its tokens."""
        super().rejected(waiter)
        if position_of(waiter.marks) is not None:
            self._pending.add("owed", 0, -waiter.tokens)

    def refused(self, waiter: Waiter, dimension: str | None, wait: float, spoken: Container[str]) -> None:
        """Learn that the server had no room for this waiter."""
        super().refused(waiter, dimension, wait, spoken)
        place = position_of(waiter.marks)
        if place is None:
            return
        for line, (name, amount) in enumerate(zip(DIMENSIONS, (1, waiter.tokens), strict=True)):
            if dimension in {None, name}:
                self._pending.reject_input(line, amount, wait, place[line] + amount, spoke=name in spoken)

    def is_news(self, waiter: Waiter) -> bool:  # noqa: ARG002  # whichever it is
        """Return whether what the answer to this waiter states is pending: the shared state decides that."""
        return True

    def update_from_headers(self, waiter: Waiter, stated: Mapping[str, StatedLimit]) -> None:
        """Heed the limits that the answer to this waiter states."""
        super().update_from_headers(waiter, stated)
        place = position_of(waiter.marks)
        if place is None or self._snapshot is None or not self._adapts:
            return
        amounts, quotas = (1, waiter.tokens), (self.requests, self.tokens)
        for line, name in enumerate(DIMENSIONS):
            if (said := stated.get(name)) is not None:
                rate, size = quotas[line].stated(said, waiter.marks[line])
                end = place[line] + amounts[line]
                self._pending.update_from_headers(line, said, rate, size, end, waiter.granted_at)
                self._pending.urgent |= not self._snapshot.lines[line].spoken

    def pause(self, seconds: float) -> None:
        """Let nobody go for that long, as the server asked."""
        super().pause(seconds)
        self._pending.pause(self._paused_until)

    def take(self, outcome: Any) -> Exception | None:
        """Go by a reply; without one, alone. Returns the error where this worker cannot even begin."""
        asked, self._asked = self._asked or [], None
        if isinstance(outcome, Exception):
            return self._lose(outcome)
        snapshot = SharedSnapshot.read(outcome, self._clock.time())
        if self._alone:
            self._alone = False
            self.requests.let_go()
            self.tokens.let_go()
        if self._snapshot is not None and self._snapshot.epoch != snapshot.epoch:
            self._reserved.clear()  # of a state that is no more
        self._snapshot, self._backend.workers = snapshot, snapshot.workers
        self._taken = [line.taken for line in snapshot.lines]
        self._paused_until = max(self._paused_until, snapshot.at + snapshot.pause)
        for waiter in asked[: snapshot.reserved]:
            self._put(waiter)
        return None

    def leave(self) -> dict[str, Any] | None:
        """Return the last that this worker has to tell; None where nobody would miss it."""
        if self._snapshot is None or self._alone:
            return None
        for waiter, place in self._reserved.items():
            self._pending.refund(place, waiter.tokens)
        return {**self._told([]), "leaves": True}

    def _put(self, waiter: Waiter) -> None:
        """Give a waiter the next place; one that was withdrawn meanwhile gives it back."""
        place = Position(*self._taken)
        self._taken = [place.requests + 1, place.tokens + waiter.tokens]
        self._largest[1] = max(self._largest[1], waiter.tokens)
        if waiter.state is State.WAITING:
            self._reserved[waiter] = place
        else:
            self._pending.refund(place, waiter.tokens)

    def _next_due(self) -> Waiter | None:
        waiter = self._first_reserved()
        if waiter is None or self._due_in(waiter, self._clock.time())[0] > 0:
            return None
        self._left(waiter)
        self._admit(waiter)
        return waiter

    def _first_reserved(self) -> Waiter | None:
        """Return the first waiter with a place, where there is room for it."""
        return next((t for t in self._reserved if t.concurrency.in_flight < t.concurrency.limit), None)

    def _held_up(self, waiter: Waiter) -> tuple[float, str]:
        by_itself = self._alone or waiter not in self._reserved
        return super()._held_up(waiter) if by_itself else self._due_in(waiter, self._clock.time())

    def _due_in(self, waiter: Waiter, now: float) -> tuple[float, str]:
        assert self._snapshot is not None  # noqa: S101  # a place came with one
        delay, cause = self._snapshot.held_up(self._reserved[waiter], (1, waiter.tokens), now)
        return max(delay, self.pause_left()), cause

    def _admit(self, waiter: Waiter) -> None:
        super()._admit(waiter)
        self._admitted_at = waiter.granted_at
        place = self._reserved.pop(waiter, None)
        if place is None:
            self._pending.add("spent", 1, waiter.tokens)
        else:
            waiter.marks = with_position(waiter.marks, place)

    def _keep_in_touch(self) -> None:
        """Ask for those who have no place, or tell the pending, if it is time to."""
        now = self._clock.time()
        if self._asked is not None or (self._alone and now < self._next_try):
            return
        wanted = [] if self._alone or self._reserved else self._next_without_place()
        beat = self._reserved and now >= self._next_beat()
        tell = self._pending and (self._pending.urgent or now - self._told_at >= _TELL_SECONDS)
        if wanted or beat or tell or self._alone:
            self._asked, self._told_at = wanted, now
            self._backend.ask(str(self.model), self._told(wanted), self._replied)

    def _next_beat(self) -> float:
        """Return the clock time at which a worker that waits should be heard of."""
        young = self._snapshot is not None and self._snapshot.age < _YOUNG_SECONDS
        return self._told_at + (_YOUNG_BEAT if young else _BEAT_SECONDS)

    def _next_without_place(self) -> list[Waiter]:
        """Return those who would go next if there were no limits, in the order of their turns."""
        able: list[Waiter] = []
        for concurrency in self._limits_in_use():
            if concurrency.first() is not None:
                room = int(min(concurrency.limit - concurrency.in_flight, _TICKETS))
                waiting = (waiter for waiter in concurrency.queue if waiter.state is State.WAITING)
                able += heapq.nsmallest(room, waiting)
        return sorted(able)[:_TICKETS]

    def _told(self, wanted: Sequence[Waiter]) -> dict[str, Any]:
        now, quotas = self._clock.time(), (self.requests, self.tokens)
        spends = now - self._admitted_at <= self._burst  # else its buckets would be full again by now
        self._underway, self._pending = self._pending, PendingUpdates()
        return {
            **self._underway.told(now),
            "epoch": self._snapshot.epoch if self._snapshot is not None and spends else 0,
            "rates": [quota.limit_rate for quota in quotas],
            "sizes": [quota.limit_size for quota in quotas],
            "adapts": self._adapts,
            "keep": self._keep,
            "wants": [waiter.tokens for waiter in wanted],
        }

    def _lose(self, error: Exception) -> Exception | None:
        """Go on alone with a part of what was last known; return the error where nothing is."""
        now = self._clock.time()
        if not self._backend.workers:
            return error
        if not self._alone:
            self._alone, self._patience = True, _PROBE_SECONDS
            self._reserved.clear()
            self._pending = PendingUpdates()
            self._hold_to_share(now)
        else:
            self._pending.add("spent", *self._underway.spent)  # it has still not been told
        self._next_try = now + self._patience * random.uniform(0.5, 1)  # noqa: S311  # not all at once
        self._patience = min(2 * self._patience, _PROBE_MOST)
        return None

    def _hold_to_share(self, now: float) -> None:
        workers = self._backend.workers
        for line, quota in enumerate((self.requests, self.tokens)):
            rate, left = quota.limit_rate / workers, 0.0
            if self._snapshot is not None:
                rate, left = self._snapshot.share(line, self._taken[line], workers, now)
            quota.hold_to(rate, left, least=self._largest[line])
