"""Token buckets: the limit that the user set, and the server's as far as it is known."""

from __future__ import annotations

import math
import time
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from aiolimiter import AsyncLimiter

if TYPE_CHECKING:
    from openai_eval_client._wire import StatedLimit
    from openai_eval_client.config import RateLimitConfig

MINUTE = 60.0
_SAME = 0.005  # of the capacity: headers round their numbers
ROUNDING = 1e-9  # of the capacity: far below one token, far above float error
UNLIMITED = 1e12  # units per second, and at once, that stand for no limit: more than any has


class Clock:
    """Where the time comes from, in seconds that never go back."""

    time = staticmethod(time.monotonic)


class Bucket(AsyncLimiter):
    """aiolimiter's leaky bucket, for every loop and thread; its level may exceed the capacity, as a debt."""

    _loop: Any = None  # the clock; a property in the class above, which asks asyncio

    def __init__(self, clock: Clock, rate: float = UNLIMITED, capacity: float = UNLIMITED) -> None:
        capacity = max(capacity, 1.0)  # however short the burst, one request can go
        super().__init__(capacity, capacity / rate)
        self._loop = clock
        self.limited = rate < UNLIMITED  # else it holds nothing back

    @property
    def rate(self) -> float:
        """Units per second."""
        return self._rate_per_sec

    def left(self) -> float:
        """Return what is left to spend; a debt is negative."""
        self._leak()
        return self.max_rate - self._level

    def ready_in(self, amount: float) -> float:
        """Return the seconds until `amount` fits, or until the bucket is full where it never can."""
        if not self.limited:
            return 0.0
        missing = min(amount, self.max_rate) - self.left()
        return missing / self._rate_per_sec if missing > self.max_rate * ROUNDING else 0.0

    def charge(self, amount: float) -> None:
        """Take `amount`; a negative one is given back, at most until the bucket is full."""
        if self.limited:
            self._leak()
            self._level = max(0.0, self._level + amount)

    def set_left(self, left: float) -> None:
        """Go on with `left`; a debt is negative."""
        self._leak()
        self._level = max(0.0, self.max_rate - left)


# `shared.lua` knows each of these that is a float by its name.
FIRST_SECONDS = 1.0  # of the configured rate: all that is sent before the first headers or successes
GROWTH = 2.0  # until the first refusal without headers, each success makes room for twice its cost
CUT = 0.7  # of the rate is kept after a refusal without headers
MEASURED_SECONDS = 1.0  # between two refusals: then what was served between them is better than a cut
RECOVERY = 0.01  # of the configured rate comes back each second after a cut
UNBOUNDED_RECOVERY = 0.05  # of the rate itself, where no limit is configured
NEWS_SECONDS = 0.005  # headers this soon after others are not read: it costs time and changes little
IDLE_SECONDS = 5.0  # without a request: what was served before then says nothing of the rate
SMOOTHING = 2.0  # seconds: time constant of believing that more is left; less is believed at once
TRANSIT = 0.15  # seconds: what was sent since then may not have reached the server when it answered
SAMPLE_SECONDS = 0.25  # between two looks at how fast other clients spend the same quota
SAMPLE_UNITS = 10  # or the time in which so many are refilled, if longer: headers give whole units
OTHERS_SMOOTHING = 1.0  # seconds: time constant of that
LEAST_SHARE = 0.05  # of the rate is ours, however much others spend
MARGIN = 0.25  # seconds of the rate are left to others, where there are any
SMALLEST_SECONDS = 1.0  # of the rate: the size of a server's bucket at least


class Sent(NamedTuple):
    """What was known when a request was granted."""

    arrived: float  # itself and all that was granted so long before it that it had surely reached the server
    at: float  # clock time of the grant
    amount: float  # what it reserved


class ServerBucket:
    """The server's own bucket of one dimension, as far as it can be known.

    It begins with one second of the configured rate (a limit set too high then does no harm), and grows with
    each success: doubling every round trip, as TCP's slow start. Once there are headers, they decide. Where
    there are none and the server refuses, the rate is cut and then recovers (AIMD); as soon as two refusals
    are a second apart, what was served between them is the rate.
    """

    def __init__(self, rate: float | None, capacity: float, clock: Clock, *, adaptive: bool = True) -> None:
        self._clock = clock
        self.adaptive = adaptive  # False: nothing is learned, and nothing waits for it
        self._configured_rate = rate
        self._configured_size = capacity
        self.bucket = Bucket(clock)
        if rate is not None and adaptive:
            self.bucket = Bucket(clock, rate, min(rate * FIRST_SECONDS, capacity))
        self._granted = 0.0
        self._recent: deque[tuple[float, float]] = deque()  # `_granted` after each grant, and when it was
        self._arrived = 0.0  # of `_granted`, what has surely reached the server
        self._last_grant = self._busy_from = -math.inf
        self._busy_granted = 0.0  # `_granted` when this busy time began
        # what headers state
        self.limit: int | None = None  # per minute
        self._stated = False  # there are headers, and no refusal without them since
        self._stated_at = clock.time()
        self._newest = -math.inf  # grant time of the newest request whose headers were taken over
        self._most_left = 0.0  # that headers have stated
        self._others = 0.0  # units per second that other clients spend
        self._sampled_at = -math.inf
        self._sampled_left = self._sampled_granted = 0.0
        # what is learned without headers
        self._served = 0.0
        self._cut_at = self._first_cut = -math.inf
        self._cut_served = self._cut_rate = 0.0

    def known_limit(self) -> float | None:
        """Return the limit per minute that the server stated, or that its refusals taught; else None."""
        return self.bucket.rate * MINUTE if self.limit is None and self._cut_at > 0 else self.limit

    def charge(self, amount: float) -> Sent:
        """Spend `amount`; a negative one was not spent after all."""
        if not self.adaptive:
            return Sent(0.0, 0.0, amount)
        self.bucket.charge(amount)
        now = self._clock.time()
        if now - self._last_grant > IDLE_SECONDS:
            self._busy_from, self._busy_granted = now, self._granted
        self._last_grant = now
        in_transit = self._in_transit(now)
        self._granted += amount
        self._recent.append((self._granted, now))
        return Sent(self._granted - in_transit, now, amount)

    def add_debt(self, amount: float) -> None:
        """Learn that more was used than reserved; headers have counted it already."""
        if not self._stated:
            self.bucket.charge(amount)

    def refund(self, amount: float) -> None:
        """Take back what was refused for good; headers have not counted it."""
        if not self._stated:
            self._granted -= amount
            self.bucket.charge(-amount)

    def is_news(self, sent: Sent) -> bool:
        """Return whether an answer's headers are worth reading."""
        if not self.adaptive or sent.at < self._newest:
            return False
        return not self._stated or self._clock.time() - self._stated_at >= NEWS_SECONDS

    def update_from_headers(self, stated: StatedLimit, sent: Sent) -> None:
        """Take over what an answer's headers state; only the answer to the newest request counts."""
        if not self.adaptive or sent.at < self._newest:
            return
        self.limit = max(stated.limit, self.limit or 0)
        now = self._clock.time()
        rate, capacity = self.rate_and_size(stated, sent)
        others = self._others_rate(stated, rate, capacity, now)
        own_rate = max(rate - others, rate * LEAST_SHARE)
        # Servers stamp headers when they answer a request or when they admit it: the lower reading is used.
        granted_after = self._granted - sent.arrived
        stamped_at_answer = -min(self._in_transit(now), granted_after)
        stamped_at_admission = own_rate * (now - sent.at) - granted_after
        change = min(stamped_at_answer, stamped_at_admission)
        left = max(stated.remaining + change, 0.0) - min(others, MARGIN * rate)
        if self._stated:
            before = self.bucket.left()
            share = 1 - math.exp(-(now - self._stated_at) / SMOOTHING)
            left = left if left < before else before + (left - before) * share
        self._replace(own_rate, capacity, left)
        self._stated, self._newest, self._stated_at = True, sent.at, now

    def rate_and_size(self, stated: StatedLimit, sent: Sent) -> tuple[float, float]:
        """Return the refill per second and the size of the bucket that an answer's headers state."""
        rate, used = stated.limit / MINUTE, stated.limit - stated.remaining
        if stated.reset is not None and stated.reset > MINUTE + 1 and used > 0:  # it is a daily limit
            rate = min(used / stated.reset, rate)
        # The size is what is left and the refill until the bucket is full again; where the server does not
        # say when that is, the most that it has stated was left.
        self._most_left = max(self._most_left, stated.remaining + sent.amount)
        size = self._most_left if stated.reset is None else stated.remaining + stated.reset * rate
        return rate, min(max(size, rate * SMALLEST_SECONDS), stated.limit)

    def on_success(self, amount: float) -> None:
        """Learn that the server served `amount`: before the first refusal it makes room for more."""
        self._served += amount
        if self._stated or not self.bucket.limited:
            return
        if self._cut_at >= 0:
            self._recover()
            return
        room = min(GROWTH * amount, self._configured_size - self.bucket.max_rate)
        if room > 0:
            self._replace(self.bucket.rate, self.bucket.max_rate + room, self.bucket.left() + room)

    def refused(self, sent: Sent, wait: float, *, stated: bool) -> None:
        """Learn that the server refused what was sent for `wait` seconds, with headers or without."""
        if sent.amount <= 0:
            return
        self._stated = self._stated and stated
        if not self._stated:
            self.refund(sent.amount)
            self._slow_down(sent, self._clock.time())
        # after the wait there is room for this one, and the refill paces the rest
        self.bucket.set_left(min(sent.amount - wait * self.bucket.rate, self.bucket.left()))

    def _slow_down(self, sent: Sent, now: float) -> None:
        """Lower the rate, once for all that were sent before it was lowered last."""
        first, before, seconds = not self.bucket.limited, self.bucket.rate, now - self._cut_at
        if first or (self._configured_rate is None and sent.at <= self._first_cut):
            busy = CUT * (self._granted - self._busy_granted) / max(now - self._busy_from, 1.0)
            rate = min(max(busy, sent.amount), before)
            self._first_cut = now if first else self._first_cut
        elif sent.at <= self._cut_at:
            return
        elif seconds < MEASURED_SECONDS or self._cut_at < self._busy_from:
            rate = before * CUT
        else:
            rate = min(max((self._served - self._cut_served) / seconds, before * CUT**2), before)
        self._replace(rate, rate * SMALLEST_SECONDS if first else self.bucket.max_rate, 0.0)
        self._cut_at, self._cut_served, self._cut_rate = now, self._served, rate

    def _recover(self) -> None:
        """Raise the rate again: linearly to the configured one, exponentially where there is none."""
        seconds = self._clock.time() - self._cut_at
        if (configured := self._configured_rate) is None:
            rate = self._cut_rate * (1 + UNBOUNDED_RECOVERY) ** min(seconds, 1000)
        else:
            rate = min(self._cut_rate + RECOVERY * configured * seconds, configured)
        if rate > self.bucket.rate * (1 + RECOVERY / 2):
            self._replace(rate, self.bucket.max_rate, self.bucket.left())

    def _others_rate(self, stated: StatedLimit, rate: float, capacity: float, now: float) -> float:
        """Return how fast other clients spend the quota: what was refilled, was not ours, and is gone."""
        seconds = now - self._sampled_at
        if seconds < max(SAMPLE_SECONDS, SAMPLE_UNITS / rate):
            return self._others
        if self._stated:
            refilled = min(self._sampled_left + rate * seconds, capacity)
            spent = self._granted - self._sampled_granted + 1  # and what rounding hides
            sample = min(max((refilled - spent - stated.remaining) / seconds, 0.0), rate)
            self._others += (sample - self._others) * (1 - math.exp(-seconds / OTHERS_SMOOTHING))
        self._sampled_at, self._sampled_left, self._sampled_granted = now, stated.remaining, self._granted
        return self._others

    def _in_transit(self, now: float) -> float:
        """Return what was granted so recently that it may not have reached the server yet."""
        while self._recent and self._recent[0][1] < now - TRANSIT:
            self._arrived = self._recent.popleft()[0]
        return max(0.0, self._granted - self._arrived)

    def _replace(self, rate: float, capacity: float, left: float) -> None:
        change = abs(self.bucket.max_rate - max(capacity, 1.0))
        if self.bucket.rate != rate or change > _SAME * capacity:
            self.bucket = Bucket(self._clock, rate, capacity)
        self.bucket.set_left(left)


MARGIN_SHARE = 0.1  # of the bucket, at most
UNLIMITED_SHARE = UNLIMITED / 10_000  # a rate above this is a part of it, however many workers share


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
    """One dimension of a model's limit: the bucket that the user configured, and the server's."""

    def __init__(
        self, per_minute: int | None, config: RateLimitConfig, clock: Clock, *, metered: bool
    ) -> None:
        rate = per_minute / MINUTE if per_minute and metered else None
        margin = min(MARGIN, config.burst_seconds * MARGIN_SHARE)
        capacity = max((rate or 0.0) * (config.burst_seconds - margin), 1.0)
        self.whole = Bucket(clock) if rate is None else Bucket(clock, rate, capacity)  # the configured one
        self._configured = self.whole  # or this worker's share of it, while it cannot reach the others
        self.server = ServerBucket(rate, capacity, clock, adaptive=config.adaptive_throttling and metered)
        self._clock = clock
        self._began: float | None = None
        self.spent = 0.0

    def limit(self) -> Limit:
        """Return what holds."""
        own, known = self.whole, self.server.known_limit()
        buckets = [own] if known is None else [own, self.server.bucket]
        burst = min((bucket.max_rate for bucket in buckets if bucket.limited), default=0.0)
        return Limit(own.rate * MINUTE if own.limited else None, known, burst)

    def use_share(self, rate: float, left: float, *, smallest: float) -> None:
        """Keep to a share of the limit for now, in a bucket that holds at least `smallest`."""
        if rate < UNLIMITED_SHARE:
            size = rate * self.whole.max_rate / self.whole.rate
            self._configured = Bucket(self._clock, rate, max(size, smallest))
            self._configured.set_left(left)

    def use_whole(self) -> None:
        """Go back to the whole limit."""
        self._configured = self.whole

    def ready_in(self, amount: float) -> float:
        """Return the seconds until `amount` may be spent."""
        return max(self._configured.ready_in(amount), self.server.bucket.ready_in(amount))

    def too_small_for(self, amount: float, max_wait: float) -> int | None:
        """Return the limit per minute that can never admit `amount`; None where one can, or there is none."""
        # The server admits no more than its own limit at once. The configured one may be exceeded, at the
        # cost of a debt that later requests wait for: up to `max_wait` seconds' worth.
        if self.server.limit is not None and amount > self.server.limit:
            return self.server.limit
        most = self.whole.max_rate + self.whole.rate * max_wait
        return round(self.whole.rate * MINUTE) if amount > most else None

    def charge(self, amount: float) -> Sent:
        """Spend `amount`; a negative one was not spent after all."""
        self._began = self._clock.time() if self._began is None else self._began
        self.spent += amount
        self._configured.charge(amount)
        return self.server.charge(amount)

    def settle(self, reserved: float, actual: float) -> None:
        """Replace what was reserved by what was used."""
        self._configured.charge(actual - reserved)  # alone: servers that charge max_tokens give nothing back
        if actual > reserved:
            self.server.add_debt(actual - reserved)

    def refused(self, sent: Sent, wait: float, *, stated: bool) -> None:
        """Learn that the server refused what was sent; `stated`: its headers say what is left."""
        if self.server.adaptive:
            self.server.refused(sent, wait, stated=stated)
        elif sent.amount > 0 and self._configured.limited:  # after the wait, this one and then the rate
            left = sent.amount - wait * self._configured.rate
            self._configured.set_left(min(left, self._configured.left()))

    def used_share(self) -> float | None:
        """Return what was spent, as a share of a full bucket and its refill since the first request."""
        # None where no limit is known. It is what was reserved: servers charge that.
        bucket = self.whole if self.whole.limited else self.server.bucket
        if not bucket.limited or self._began is None:
            return None
        return self.spent / (bucket.max_rate + bucket.rate * (self._clock.time() - self._began))
