"""Token buckets: the limit that the user set, and the server's as far as it is known."""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from aiolimiter import AsyncLimiter

if TYPE_CHECKING:
    from openai_eval_client._wire import StatedLimit
    from openai_eval_client.config import RateLimitConfig


MINUTE = 60.0
_SAME = 0.005  # of the capacity: headers round what they say
ROUNDING = 1e-9  # part of the capacity; far below one token, far above float error


class Clock(Protocol):
    """Where the time comes from, in seconds that never go back."""

    def time(self) -> float:
        """Return the time now."""
        ...


class Bucket(AsyncLimiter):
    """aiolimiter's leaky bucket, for every event loop and thread, and with debts.

    Its `_loop` only serves as its clock; its level may go above the capacity (a debt, after a request larger
    than the bucket) or be given back.
    """

    _loop: Any = None  # a property in the class above, which asks asyncio

    def __init__(self, rate: float, capacity: float, clock: Clock) -> None:
        capacity = max(capacity, 1.0)
        super().__init__(capacity, capacity / rate)
        self._loop = clock

    @property
    def rate(self) -> float:
        """Units per second."""
        return self._rate_per_sec

    def left(self) -> float:
        """Return what is left to spend; negative: a debt."""
        self._leak()
        return self.max_rate - self._level

    def ready_in(self, amount: float) -> float:
        """Return the seconds until `amount` fits, or until the bucket is full where it never can."""
        missing = min(amount, self.max_rate) - self.left()
        return missing / self._rate_per_sec if missing > self.max_rate * ROUNDING else 0.0

    def charge(self, amount: float) -> None:
        """Take `amount`, or give it back where negative; never more than there was to give."""
        self._leak()
        self._level = max(0.0, self._level + amount)

    def lower_to(self, left: float) -> None:
        """Believe that no more than `left` is left."""
        self.set_left(min(left, self.left()))

    def set_left(self, left: float) -> None:
        """Believe that `left` is left; below nought it is a debt."""
        self._leak()
        self._level = max(0.0, self.max_rate - left)

    def is_about(self, rate: float, capacity: float) -> bool:
        """Return whether it has this rate and, but for rounding, this size."""
        return self._rate_per_sec == rate and abs(self.max_rate - max(capacity, 1.0)) <= _SAME * capacity


FIRST_SECONDS = 1.0  # of the configured rate: all that is sent before the server has said or served anything
GROWTH = 2.0  # while a silent server refuses nothing, each success makes room for twice its cost
CUT = 0.7  # of the rate is kept when a silent server refuses
SURE_SECONDS = 1.0  # between two unsupported: then what passed between them is a better measure than a cut
CREEP = 0.01  # of the configured rate comes back each second after a cut
UNBOUNDED_CREEP = 0.05  # of the rate itself, where no limit is configured
MOMENT = 0.005  # seconds in which nothing is pending: at a thousand answers a second, reading all is a waste
IDLE_SECONDS = 5.0  # without a request: what passed before then says nothing of the rate
SMOOTHING = 2.0  # seconds: time constant of believing in more; less is believed at once
TRANSIT = 0.15  # seconds: what was sent since then may not have reached the server when it answered
SAMPLE_SECONDS = 0.25  # between two looks at how fast others spend the same stated
SAMPLE_UNITS = 10  # or the time in which so many are refilled, if longer: what is left is told in whole units
OTHERS_SMOOTHING = 1.0  # seconds: time constant of that
LEAST_SHARE = 0.05  # of the rate is ours, however much others spend
MARGIN = 0.25  # seconds of the rate are left to others, where there are any
_SHORTEST = 1.0  # seconds of stated in a server's bucket at least


class Sent(NamedTuple):
    """The state when a waiter was granted."""

    # this one, and all that was granted so long before it that it had surely reached the server
    arrived: float
    at: float  # clock time of the grant
    amount: float  # what it took


class ServerBucket:
    """The server's own bucket of one dimension, as far as it can be known.

    Before it has spoken, it begins with one second of the configured rate (a limit set too high then does no
    harm), and grows with each success: doubling every round trip, as TCP's slow start. Its headers, once
    there are any, decide. Where there are none and it refuses, the rate is cut and then creeps up again
    (AIMD); as soon as two refusals are a second apart, what passed between them is the rate.
    """

    def __init__(self, rate: float | None, capacity: float, clock: Clock) -> None:
        self._clock = clock
        self._ceiling = rate
        self._most = capacity
        self.bucket = Bucket(rate, min(rate * FIRST_SECONDS, capacity), clock) if rate else None
        self._granted = 0.0
        self._recent: deque[tuple[float, float]] = deque()
        self._arrived = 0.0
        self._spoken = False
        self.limit: int | None = None  # per minute, as the headers state it
        self._freshest = -math.inf
        self._most_left = 0.0
        self._heard_at = clock.time()
        self._others = 0.0
        self._sampled_at = -math.inf
        self._sampled_left = self._sampled_granted = 0.0
        self._passed = 0.0
        self._cut_at = -math.inf
        self._cut_passed = self._cut_rate = 0.0
        self._first_cut = -math.inf
        self._last = self._busy_from = -math.inf
        self._busy_granted = 0.0

    def known_limit(self) -> float | None:
        """Return the limit per minute that the server stated, or that its refusals taught; else None."""
        if self.limit is None and self.bucket is not None and self._cut_at > 0:
            return self.bucket.rate * MINUTE
        return self.limit

    def ready_in(self, amount: float) -> float:
        """Return the seconds until `amount` may be spent."""
        return self.bucket.ready_in(amount) if self.bucket is not None else 0.0

    def charge(self, amount: float) -> Sent:
        """Spend `amount` and return the mark of it; negative: take back what was not spent after all."""
        if self.bucket is not None:
            self.bucket.charge(amount)
        now = self._clock.time()
        if now - self._last > IDLE_SECONDS:
            self._busy_from, self._busy_granted = now, self._granted
        self._last = now
        in_transit = self._in_transit(now)
        self._granted += amount
        mark = Sent(self._granted - in_transit, now, amount)
        self._recent.append((self._granted, now))
        return mark

    def add_debt(self, amount: float) -> None:
        """Take in that more was used than reserved; a server that speaks has counted it already."""
        if self.bucket is not None and not self._spoken:
            self.bucket.charge(amount)

    def refund(self, amount: float) -> None:
        """Take back what was refused for good; a server that speaks has not counted it."""
        if not self._spoken:
            self._granted -= amount
            if self.bucket is not None:
                self.bucket.charge(-amount)

    def is_news(self, mark: Sent) -> bool:
        """Return whether the answer is pending: the last word is a moment old, and of no fresher request."""
        if mark.at < self._freshest:
            return False
        return not self._spoken or self._clock.time() - self._heard_at >= MOMENT

    def update_from_headers(self, stated: StatedLimit, mark: Sent) -> None:
        """Take over what an answer's headers say."""
        # Servers stamp them when they admit a request or when they answer it; the lower of the two readings
        # is believed. Only the answer to the freshest request counts.
        if mark.at < self._freshest:
            return
        self.limit = max(stated.limit, self.limit or 0)
        now = self._clock.time()
        rate, capacity = self.stated(stated, mark)
        others = self._others_rate(stated, rate, capacity, now)
        ours = max(rate - others, rate * LEAST_SHARE)
        after = self._granted - mark.arrived
        since = ours * (now - mark.at) - after
        margin = min(others, MARGIN * rate)
        left = max(stated.remaining + min(-min(self._in_transit(now), after), since), 0.0) - margin
        if self._spoken and self.bucket is not None:
            had = self.bucket.left()
            share = 1 - math.exp(-(now - self._heard_at) / SMOOTHING)
            left = left if left < had else had + (left - had) * share
        self._replace(ours, capacity, left)
        self._spoken, self._freshest, self._heard_at = True, mark.at, now

    def stated(self, stated: StatedLimit, mark: Sent) -> tuple[float, float]:
        """Return the refill per second and the size of the bucket that an answer's headers state."""
        rate = _rate(stated)
        return rate, self._capacity(stated, rate, mark)

    def _capacity(self, stated: StatedLimit, rate: float, mark: Sent) -> float:
        """Return the size of the server's bucket: what is left and the refill until it is full again."""
        # Where the server does not say when that is, the most it has said was left.
        self._most_left = max(self._most_left, stated.remaining + mark.amount)
        known = self._most_left if stated.reset is None else stated.remaining + stated.reset * rate
        return min(max(known, rate * _SHORTEST), stated.limit)

    def on_success(self, amount: float) -> None:
        """Learn that the server served `amount`."""
        self._passed += amount
        if self._spoken or self.bucket is None:
            return
        if self._cut_at < 0:
            room = min(GROWTH * amount, self._most - self.bucket.max_rate)
            if room > 0:
                self._replace(self.bucket.rate, self.bucket.max_rate + room, self.bucket.left() + room)
        else:
            self._creep(self.bucket)

    def refused(self, amount: float, mark: Sent, wait: float, *, spoke: bool) -> None:
        """Learn that the server refused `amount` for now."""
        now = self._clock.time()
        if amount <= 0:
            return
        self._spoken = self._spoken and spoke
        if not self._spoken:
            self.refund(amount)
            self._slow_down(amount, mark, now)
        if self.bucket is not None:  # after the wait there is room for this one; the refill paces the rest
            left = amount - wait * self.bucket.rate
            self.bucket.lower_to(min(left, self.bucket.max_rate))

    def _slow_down(self, amount: float, mark: Sent, now: float) -> None:
        """Lower the rate, once for all that were sent before it was lowered last."""
        if self.bucket is None or (self._ceiling is None and mark.at <= self._first_cut):
            rate = max(CUT * (self._granted - self._busy_granted) / max(now - self._busy_from, 1.0), amount)
            rate = rate if self.bucket is None else min(rate, self.bucket.rate)
            self._first_cut = now if self.bucket is None else self._first_cut
        elif mark.at > self._cut_at:
            rate = self._rate_after_refusal(self.bucket.rate, now)
        else:
            return
        capacity = rate * _SHORTEST if self.bucket is None else self.bucket.max_rate
        self._replace(rate, capacity, 0.0)
        self._cut_at, self._cut_passed, self._cut_rate = now, self._passed, rate

    def _rate_after_refusal(self, rate: float, now: float) -> float:
        """Return the rate to go on with: what passed since the last refusal, or a part of the present one."""
        seconds = now - self._cut_at
        if seconds < SURE_SECONDS or self._cut_at < self._busy_from:
            return rate * CUT
        return min(max((self._passed - self._cut_passed) / seconds, rate * CUT**2), rate)

    def _creep(self, bucket: Bucket) -> None:
        """Let the rate come back: linearly to the configured one; by a share of itself without."""
        seconds = self._clock.time() - self._cut_at
        if self._ceiling is None:
            rate = self._cut_rate * (1 + UNBOUNDED_CREEP) ** min(seconds, 1000)
        else:
            rate = min(self._cut_rate + CREEP * self._ceiling * seconds, self._ceiling)
        if rate > bucket.rate * (1 + CREEP / 2):
            self._replace(rate, bucket.max_rate, bucket.left())

    def _others_rate(self, stated: StatedLimit, rate: float, capacity: float, now: float) -> float:
        """Return how fast others spend the same stated: what was refilled, was not ours, and is gone."""
        seconds = now - self._sampled_at
        if seconds < max(SAMPLE_SECONDS, SAMPLE_UNITS / rate):
            return self._others
        if self._spoken:
            refilled = min(self._sampled_left + rate * seconds, capacity)
            spent = self._granted - self._sampled_granted + 1  # and what rounding hides
            sample = min(max((refilled - spent - stated.remaining) / seconds, 0.0), rate)
            self._others += (sample - self._others) * (1 - math.exp(-seconds / OTHERS_SMOOTHING))
        self._sampled_at, self._sampled_left, self._sampled_granted = now, stated.remaining, self._granted
        return self._others

    def _in_transit(self, now: float) -> float:
        """Return what was granted so lately that it may not have reached the server yet."""
        while self._recent and self._recent[0][1] < now - TRANSIT:
            self._arrived = self._recent.popleft()[0]
        return max(0.0, self._granted - self._arrived)

    def _replace(self, rate: float, capacity: float, left: float) -> None:
        """Go on with another rate and size, and that much left; below nought it is a debt."""
        if self.bucket is None or not self.bucket.is_about(rate, capacity):
            self.bucket = Bucket(rate, capacity, self._clock)
        self.bucket.set_left(left)


def _rate(stated: StatedLimit) -> float:
    """Return the refill per second; that of a daily limit shows in a reset longer than a minute."""
    used = stated.limit - stated.remaining
    if stated.reset is not None and stated.reset > MINUTE + 1 and used > 0:
        return min(used / stated.reset, stated.limit / MINUTE)
    return stated.limit / MINUTE


MARGIN_SHARE = 0.1  # of the bucket, at most
UNLIMITED = 1e12  # units per second, for who needs a number: more than any limit
UNLIMITED_SHARE = UNLIMITED / 10_000  # so much is a part of it, however many share


class Limit(NamedTuple):
    """What holds in one dimension."""

    configured: float | None  # units per minute that the user set; None: none
    server: float | None  # units per minute that the server stated or its refusals taught; None: not known
    burst: float  # units that a full bucket admits at once

    @property
    def per_minute(self) -> float | None:
        """The lower of both; None where neither is known."""
        return min((value for value in (self.configured, self.server) if value is not None), default=None)


class Quota:
    """One dimension of a model's limit: what the user configured, and what the server is believed to keep.

    An estimate that was too high is given back to the configured bucket only: servers that charge
    `max_tokens` up front do not give it back.
    """

    def __init__(
        self,
        per_minute: int | None,
        config: RateLimitConfig,
        clock: Clock,
        *,
        metered: bool = True,
    ) -> None:
        rate = per_minute / MINUTE if per_minute and metered else None
        margin = min(MARGIN, config.burst_seconds * MARGIN_SHARE)
        capacity = max((rate or 0.0) * (config.burst_seconds - margin), 1.0)
        self._whole = Bucket(rate, capacity, clock) if rate else None
        self._configured = self._whole
        self._server = ServerBucket(rate, capacity, clock) if config.adaptive_throttling and metered else None
        self._clock = clock
        self._began: float | None = None
        self.spent = 0.0

    def limit(self) -> Limit:
        """Return what holds."""
        own, server = self._whole, self._server
        known = None if server is None else server.known_limit()
        theirs = server.bucket if server is not None and known is not None else None
        bursts = [bucket.max_rate for bucket in (own, theirs) if bucket is not None]
        return Limit(None if own is None else own.rate * MINUTE, known, min(bursts, default=0.0))

    @property
    def limit_rate(self) -> float:
        """The configured limit, in units per second; `UNLIMITED` where there is none."""
        return self._whole.rate if self._whole is not None else UNLIMITED

    @property
    def limit_size(self) -> float:
        """What the configured limit lets through at once, likewise."""
        return self._whole.max_rate if self._whole is not None else UNLIMITED

    def hold_to(self, rate: float, left: float, *, least: float) -> None:
        """Keep to a part of the limit for now."""
        if rate < UNLIMITED_SHARE:
            size = max(rate * self.limit_size / self.limit_rate, least)
            self._configured = Bucket(rate, size, self._clock)
            self._configured.set_left(left)

    def let_go(self) -> None:
        """Go back to the whole limit."""
        self._configured = self._whole

    def stated(self, stated: StatedLimit, mark: Sent | None) -> tuple[float, float]:
        """Return the rate and the size of the server's bucket, as an answer's headers state them."""
        assert self._server is not None  # noqa: S101  # asked only by who heeds the server
        assert mark is not None  # noqa: S101  # as is given out then
        return self._server.stated(stated, mark)

    def ready_in(self, amount: float) -> float:
        """Return the seconds until `amount` may be spent."""
        configured = self._configured.ready_in(amount) if self._configured is not None else 0.0
        return max(configured, self._server.ready_in(amount)) if self._server is not None else configured

    def too_small_for(self, amount: float, max_wait: float) -> int | None:
        """Return the limit per minute that can never admit `amount`; None where one can, or there is none."""
        # The server admits no more than its own limit at once. The configured one may be exceeded, at the
        # cost of a debt that those behind wait for: up to `max_wait` seconds' worth.
        server = self._server.limit if self._server is not None else None
        if server is not None and amount > server:
            return server
        bucket = self._whole
        if bucket is None or amount <= bucket.max_rate + bucket.rate * max_wait:
            return None
        return round(bucket.rate * MINUTE)

    def charge(self, amount: float) -> Sent | None:
        """Spend `amount`, or take the whole of it back where negative."""
        self._began = self._clock.time() if self._began is None else self._began
        self.spent += amount
        if self._configured is not None:
            self._configured.charge(amount)
        return self._server.charge(amount) if self._server is not None else None

    def settle(self, reserved: float, actual: float) -> None:
        """Replace what was reserved by what it came to."""
        if self._configured is not None:
            self._configured.charge(actual - reserved)
        if self._server is not None and actual > reserved:
            self._server.add_debt(actual - reserved)

    def refund(self, amount: float) -> None:
        """Learn that what was reserved was refused for good, and so not spent."""
        if self._server is not None:
            self._server.refund(amount)

    def used_share(self) -> float | None:
        """Return what was spent, as a share of a full bucket and its refill since the first request."""
        # None where no limit is known. It is what was reserved: servers charge that.
        bucket = self._whole or (self._server.bucket if self._server is not None else None)
        if bucket is None or self._began is None:
            return None
        return self.spent / (bucket.max_rate + bucket.rate * (self._clock.time() - self._began))

    def on_success(self, amount: float) -> None:
        """Learn that the server served what was reserved."""
        if self._server is not None:
            self._server.on_success(amount)

    def refused(self, amount: float, mark: Sent | None, wait: float, *, spoke: bool) -> None:
        """Learn that this limit is why the server refused; it `spoke` if it said what is left."""
        if self._server is not None and mark is not None:
            self._server.refused(amount, mark, wait, spoke=spoke)
        elif self._configured is not None and amount > 0:  # after the wait, this one and then the rate
            self._configured.lower_to(amount - wait * self._configured.rate)

    def is_news(self, mark: Sent | None) -> bool:
        """Return whether an answer's headers would be heeded."""
        return self._server is not None and mark is not None and self._server.is_news(mark)

    def update_from_headers(self, stated: StatedLimit, mark: Sent | None) -> None:
        """Heed an answer's headers."""
        if self._server is not None and mark is not None:
            self._server.update_from_headers(stated, mark)
