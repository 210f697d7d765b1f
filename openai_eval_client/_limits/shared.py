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


ALIVE_SECONDS = 10.0  # a worker that waits and sent no message for so long is gone


class SharedBackend(Protocol):
    """One worker's way to the shared state."""

    generation: int  # another number in a forked child, which has to ask for itself
    workers: int  # how many were alive at the latest reply to any queue; 0: there was none yet

    def ask(self, model: str, message: dict[str, Any], done: Callable[[Any], None]) -> None:
        """Send a message; `done` is called later with the reply or the exception, on any thread."""

    def leave(self, messages: dict[str, dict[str, Any]]) -> None:
        """Send the last messages, by model."""


class Position(NamedTuple):
    """What had been reserved in each dimension before a waiter."""

    requests: float
    tokens: float


class SharedBucket(NamedTuple):
    """One bucket as of a reply."""

    released: float  # units in all
    rate: float  # units per second
    size: float  # units

    def left(self, reserved: float, seconds: float) -> float:
        """Return what it holds so many seconds after the reply, if no other worker has reserved any since."""
        return min(self.released + self.rate * seconds - reserved, self.size)

    def ready_in(self, before: float, amount: float) -> float:
        """Return the seconds from the reply until `amount` may go that was reserved after `before`."""
        return (before + min(amount, self.size) - self.released) / self.rate


class SharedQuota(NamedTuple):
    """One dimension as of a reply."""

    reserved: float  # before the waiters of this reply
    buckets: tuple[SharedBucket, SharedBucket]  # the configured one and the server's
    stated: bool  # the server's headers state its limit


class SharedSnapshot(NamedTuple):
    """The shared state as of one reply."""

    at: float  # clock time at which it came
    epoch: float  # when the shared state began: another one knows nothing of the positions in this one
    age: float  # seconds since then
    workers: int  # how many are alive
    reserved: int  # how many of the waiters asked for have a position
    pause: float  # seconds from `at` for which the server asked that nothing be sent
    quotas: tuple[SharedQuota, ...]

    @classmethod
    def read(cls, reply: Sequence[float], at: float) -> SharedSnapshot:
        """Read a reply that came at that clock time."""
        epoch, age, workers, reserved, pause = reply[:5]
        quotas = tuple(
            SharedQuota(before, (SharedBucket(*numbers[:3]), SharedBucket(*numbers[3:])), bool(stated))
            for before, *numbers, stated in (reply[5:13], reply[13:])
        )
        return cls(at, epoch, age, int(workers), int(reserved), max(pause, 0.0), quotas)

    def ready_in(self, position: Position, tokens: float, now: float) -> tuple[float, str]:
        """Return the seconds until what was reserved at a position may go, and what it waits for."""
        waits = [
            (bucket.ready_in(before, amount), dimension)
            for dimension, quota, before, amount in zip(
                DIMENSIONS, self.quotas, position, (1, tokens), strict=True
            )
            for bucket in quota.buckets
        ]
        wait, cause = max([*waits, (self.pause, "pause")])
        return self.at + wait - now, cause

    def share(self, number: int, reserved: float, workers: int, now: float) -> tuple[float, float]:
        """Return one worker's part of one dimension: its rate, and what is left of it, if that is known."""
        buckets, seconds = self.quotas[number].buckets, now - self.at
        left = min(bucket.left(reserved, seconds) for bucket in buckets) if seconds <= ALIVE_SECONDS else 0.0
        return min(bucket.rate for bucket in buckets) / workers, max(left, 0.0) / workers


class PendingUpdates:
    """What happened since the worker's latest message."""

    def __init__(self) -> None:
        self.urgent = False
        # requests and tokens "spent" without a position, of "credit", of "debt", and "served"
        self.sums: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        # by dimension: when the newest of the answered requests was sent, and what its headers state
        self.stated: dict[int, tuple[float, dict[str, float]]] = {}
        self.cancelled: list[tuple[float, float, float]] = []  # position and tokens of each
        self.refusals: list[dict[str, float]] = []
        self.pause_until = 0.0  # clock time

    def __bool__(self) -> bool:
        return bool(self.sums or self.cancelled or self.stated or self.refusals or self.pause_until)

    def add(self, what: str, requests: float, tokens: float) -> None:
        """Add to one of the sums."""
        sums = self.sums[what]
        sums[0] += requests
        sums[1] += tokens

    def message(self, now: float) -> dict[str, Any]:
        """Return all of it as `shared.lua` reads it; times become ages in seconds."""
        return {
            **self.sums,
            "stated": [{**numbers, "age": max(now - at, 0.0)} for at, numbers in self.stated.values()],
            "cancelled": self.cancelled,
            "refusals": self.refusals,
            "pause": max(self.pause_until - now, 0.0),
        }


_BEAT_SECONDS = 3.0  # between two messages of a worker that waits, which learns what has changed, at most
_YOUNG_SECONDS, _YOUNG_BEAT = 10.0, 0.25  # likewise while the state is young: much is learned then
_REPORT_SECONDS = 1.0  # the longest that updates wait for a message to travel with
_RETRY_SECONDS = 0.25  # after the shared state was lost, doubled from try to try up to the next
_MAX_RETRY_SECONDS = 5.0
_MAX_WANTED = 16  # waiters in one message: also while there is plenty, workers take turns
_KEEP_SECONDS = 3600.0  # for which an idle state is kept at least; then its buckets are full


class SharedModelQueue(ModelQueue):
    """The queue of one model, within what all workers together may send.

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
        self._adaptive = config.adaptive_throttling
        self._burst_seconds = config.burst_seconds
        self._largest = 0.0  # tokens reserved at once
        self._reset()

    def _reset(self) -> None:
        """Know nothing of the shared state, as at first."""
        self._generation, self._alone = self._backend.generation, False
        self._snapshot: SharedSnapshot | None = None
        self._next_position = Position(0.0, 0.0)
        self._positions: dict[Waiter, Position] = {}  # of those that wait, in order
        self._wanted: list[Waiter] | None = None  # those asked for; None: no reply is awaited
        self._pending = self._reported = PendingUpdates()
        self._granted_at = self._asked_at = float("-inf")
        self._retry_at, self._retry_seconds = 0.0, _RETRY_SECONDS

    def try_grant(self, waiter: Waiter) -> bool:
        """Grant a new waiter at once, where this worker is alone."""
        return self._alone and super().try_grant(waiter)

    def grant_next(self) -> Waiter | None:
        """Grant the waiter whose turn it is, if it can go now; otherwise see whether to send a message."""
        if self._generation != self._backend.generation:
            self._reset()
        waiter = super().grant_next()
        if waiter is None:
            self._exchange()
        return waiter

    def next_in(self) -> float | None:
        """Return the seconds until there is something to do; None where a reply or an answer tells."""
        now, delay = self._clock.time(), super().next_in()
        if self._alone:
            return max(self._retry_at - now, 0.0) if delay is None else min(delay, self._retry_at - now)
        if delay is None or self._wanted is not None:
            return delay
        return min(delay, max(self._next_beat() - now, 0.0))

    def cancel(self, waiter: Waiter) -> None:
        """Take back a waiter that was not sent, and what is reserved for it."""
        granted = waiter.state is State.GRANTED
        position = waiter.position if granted else self._positions.pop(waiter, None)
        if position is not None:
            self._pending.cancelled.append((*position, waiter.tokens))
        elif granted:
            self._pending.add("spent", -1, -waiter.tokens)
        super().cancel(waiter)

    def settle(self, waiter: Waiter, tokens: float | None) -> None:
        """Free the waiter's slot and replace its estimate by `tokens`, where they are known."""
        super().settle(waiter, tokens)
        if tokens is None or waiter.position is None or tokens == waiter.tokens:
            return
        self._pending.add("credit", 0, waiter.tokens - tokens)
        if tokens > waiter.tokens:
            self._pending.add("debt", 0, tokens - waiter.tokens)

    def on_success(self, waiter: Waiter) -> None:
        """Learn that the server had room for this waiter."""
        super().on_success(waiter)
        if waiter.position is not None:
            self._pending.add("served", 1, waiter.tokens)

    def rejected(self, waiter: Waiter) -> None:
        """Learn that the server refused this waiter for good, and so did not count its tokens."""
        super().rejected(waiter)
        if waiter.position is not None:
            self._pending.add("debt", 0, -waiter.tokens)

    def refused(self, waiter: Waiter, dimension: str | None, wait: float, stated: Container[str]) -> None:
        """Learn that the server had no room for this waiter."""
        super().refused(waiter, dimension, wait, stated)
        if waiter.position is None:
            return
        for number, (name, amount) in enumerate(zip(DIMENSIONS, (1, waiter.tokens), strict=True)):
            if dimension in {None, name}:
                refusal = {"quota": number + 1, "amount": amount, "wait": wait, "stated": name in stated}
                self._pending.refusals.append({**refusal, "position": waiter.position[number] + amount})
                self._pending.urgent = True

    def is_news(self, waiter: Waiter) -> bool:  # noqa: ARG002  # whichever it is
        """Return whether the headers of an answer are worth reading: the shared state decides that."""
        return True

    def update_from_headers(self, waiter: Waiter, stated: Mapping[str, StatedLimit]) -> None:
        """Take over the limits that the headers of the answer to this waiter state."""
        super().update_from_headers(waiter, stated)
        if waiter.position is None or self._snapshot is None or not self._adaptive:
            return
        for number, (name, sent) in enumerate(zip(DIMENSIONS, waiter.sent, strict=True)):
            if (limit := stated.get(name)) is None:
                continue
            self._pending.urgent |= not self._snapshot.quotas[number].stated
            rate, size = self._quotas[name].server.rate_and_size(limit, sent)
            newest, _ = self._pending.stated.get(number, (0.0, {}))
            if newest <= waiter.granted_at:
                numbers = {"quota": number + 1, "rate": rate, "size": size, "left": limit.remaining}
                numbers["position"] = waiter.position[number] + sent.amount
                self._pending.stated[number] = waiter.granted_at, numbers

    def pause(self, seconds: float) -> None:
        """Grant nothing for that long, as the server asked."""
        super().pause(seconds)
        self._pending.pause_until, self._pending.urgent = self._paused_until, True

    def take(self, outcome: Any) -> Exception | None:
        """Go by a reply; without one, alone. Return the error where this worker cannot even begin."""
        wanted, self._wanted = self._wanted or [], None
        if isinstance(outcome, Exception):
            return self._go_alone(outcome)
        snapshot = SharedSnapshot.read(outcome, self._clock.time())
        if self._alone:
            self._alone = False
            self.requests.use_whole()
            self.tokens.use_whole()
        if self._snapshot is not None and self._snapshot.epoch != snapshot.epoch:
            self._positions.clear()  # of a state that is no more
        self._snapshot, self._backend.workers = snapshot, snapshot.workers
        self._next_position = Position(*(quota.reserved for quota in snapshot.quotas))
        self._paused_until = max(self._paused_until, snapshot.at + snapshot.pause)
        for waiter in wanted[: snapshot.reserved]:
            self._place(waiter)
        return None

    def leave(self) -> dict[str, Any] | None:
        """Return the last message to the shared state; None where it knows nothing of this worker."""
        if self._snapshot is None or self._alone:
            return None
        for waiter, position in self._positions.items():
            self._pending.cancelled.append((*position, waiter.tokens))
        return {**self._message([]), "leaving": True}

    def _place(self, waiter: Waiter) -> None:
        """Give a waiter the next position; one that was cancelled meanwhile gives it back."""
        position = self._next_position
        self._next_position = Position(position.requests + 1, position.tokens + waiter.tokens)
        self._largest = max(self._largest, waiter.tokens)
        if waiter.state is State.WAITING:
            self._positions[waiter] = position
        else:
            self._pending.cancelled.append((*position, waiter.tokens))

    def _next(self) -> Waiter | None:
        """Return the first waiter with a position, among those with room in their concurrency limit."""
        if self._alone:
            return self._first()
        return next((w for w in self._positions if w.concurrency.in_flight < w.concurrency.limit), None)

    def _ready_in(self, waiter: Waiter) -> tuple[float, str]:
        position = None if self._alone else self._positions.get(waiter)
        if position is None or self._snapshot is None:
            return super()._ready_in(waiter)
        delay, cause = self._snapshot.ready_in(position, waiter.tokens, self._clock.time())
        return max(delay, self.pause_left()), cause

    def _grant(self, waiter: Waiter) -> None:
        super()._grant(waiter)
        self._granted_at = waiter.granted_at
        waiter.position = self._positions.pop(waiter, None)
        if waiter.position is None:
            self._pending.add("spent", 1, waiter.tokens)

    def _exchange(self) -> None:
        """Ask for positions, or send the updates, if it is time to."""
        now = self._clock.time()
        if self._wanted is not None or (self._alone and now < self._retry_at):
            return
        wanted = [] if self._alone or self._positions else self._without_position()
        beat = self._positions and now >= self._next_beat()
        report = self._pending and (self._pending.urgent or now - self._asked_at >= _REPORT_SECONDS)
        if wanted or beat or report or self._alone:
            self._wanted, self._asked_at = wanted, now
            self._backend.ask(str(self.model), self._message(wanted), self._replied)

    def _next_beat(self) -> float:
        """Return the clock time at which a worker that waits sends its next message."""
        young = self._snapshot is not None and self._snapshot.age < _YOUNG_SECONDS
        return self._asked_at + (_YOUNG_BEAT if young else _BEAT_SECONDS)

    def _without_position(self) -> list[Waiter]:
        """Return those that would go next if there were no quotas, in the order of their turns."""
        able: list[Waiter] = []
        for limit in self._limits_in_use():
            if limit.first() is not None:
                room = int(min(limit.limit - limit.in_flight, _MAX_WANTED))
                able += heapq.nsmallest(room, (w for w in limit.queue if w.state is State.WAITING))
        return sorted(able)[:_MAX_WANTED]

    def _message(self, wanted: Sequence[Waiter]) -> dict[str, Any]:
        now = self._clock.time()
        spends = now - self._granted_at <= self._burst_seconds  # else its buckets would be full again by now
        limits = [quota.configured_limit() for quota in self._quotas.values()]
        self._reported, self._pending = self._pending, PendingUpdates()
        return {
            **self._reported.message(now),
            "epoch": self._snapshot.epoch if self._snapshot is not None and spends else 0,
            "rates": [rate for rate, _ in limits],
            "sizes": [size for _, size in limits],
            "adaptive": self._adaptive,
            "expire": round(max(_KEEP_SECONDS, 2 * self._burst_seconds)),
            "wanted": [waiter.tokens for waiter in wanted],
        }

    def _go_alone(self, error: Exception) -> Exception | None:
        """Go on alone with a part of what was last known; return the error where nothing is."""
        if not self._backend.workers:
            return error
        now = self._clock.time()
        if not self._alone:
            self._alone, self._retry_seconds = True, _RETRY_SECONDS
            self._positions.clear()
            self._pending = PendingUpdates()
            self._use_shares(now)
        else:
            self._pending.add("spent", *self._reported.sums["spent"])  # it has still not been received
        self._retry_at = now + self._retry_seconds * random.uniform(0.5, 1)  # noqa: S311  # not all at once
        self._retry_seconds = min(2 * self._retry_seconds, _MAX_RETRY_SECONDS)
        return None

    def _use_shares(self, now: float) -> None:
        workers, smallest = self._backend.workers, (1.0, self._largest)
        for number, quota in enumerate(self._quotas.values()):
            rate, left = quota.configured_limit()[0] / workers, 0.0
            if self._snapshot is not None:
                rate, left = self._snapshot.share(number, self._next_position[number], workers, now)
            quota.use_share(rate, left, smallest=smallest[number])
