"""A token bucket on aiolimiter that is asked instead of awaited."""

from __future__ import annotations

from typing import Any, Protocol

from aiolimiter import AsyncLimiter

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

    Args:
        rate: Units per second.
        capacity: Units it holds, one at least; it starts full.
        clock: Where the time comes from.
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
