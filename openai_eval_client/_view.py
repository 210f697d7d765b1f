"""What a worker knows of the shared quota: the reply of `_shared.lua`, and when a place comes up by it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from openai_eval_client._headers import DIMENSIONS
from openai_eval_client._link import ALIVE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Sequence

_LINE = 8  # numbers of one dimension in a reply


class Place(NamedTuple):
    """What had been reserved in each dimension before a ticket."""

    requests: float
    tokens: float


class _Placed(tuple[Any, ...]):  # noqa: SLOT001  # a tuple with a place besides
    """The marks of a ticket whose cost the shared state knows."""

    place: Place


def with_place(marks: tuple[Any, ...], place: Place) -> Any:
    """Return the marks of a ticket, with its place in the shared state."""
    placed = _Placed(marks)
    placed.place = place
    return placed


def place_of(marks: tuple[Any, ...]) -> Place | None:
    """Return the place that came with these marks; None where the shared state does not know of it."""
    return getattr(marks, "place", None)


class Released(NamedTuple):
    """What one bucket has let go.

    Attributes:
        free: In all, when the reply was made.
        rate: Units a second that it lets go.
        size: Units that it holds.
    """

    free: float
    rate: float
    size: float

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


class View(NamedTuple):
    """The shared quota as of one reply.

    Attributes:
        at: Clock time at which it came.
        epoch: The birth of the shared state: another one knows nothing of the places in this one.
        age: Seconds since then.
        workers: How many are alive.
        reserved: For how many of the tickets asked for.
        pause: Seconds from `at` for which the server asked that nobody go.
        lines: The dimensions.
    """

    at: float
    epoch: float
    age: float
    workers: int
    reserved: int
    pause: float
    lines: tuple[Line, ...]

    @classmethod
    def read(cls, reply: Sequence[float], at: float) -> View:
        """Read a reply that came at that clock time."""
        epoch, age, workers, reserved, pause, *numbers = reply
        lines = tuple(_line(numbers[n * _LINE : (n + 1) * _LINE]) for n in range(len(DIMENSIONS)))
        return cls(at, epoch, age, int(workers), int(reserved), max(pause, 0.0), lines)

    def held_up(self, place: Place, amounts: tuple[float, float], now: float) -> tuple[float, str]:
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
