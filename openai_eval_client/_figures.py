"""How far a run is, in numbers and in words: what a bar and a log line both show."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from openai_eval_client.costs import usd
from openai_eval_client.models import ModelResponse

if TYPE_CHECKING:
    from collections.abc import Iterable

_MINUTE = 60.0
_LONG_WAIT = 1.0  # seconds from which a wait is told with its length
_KILO, _MEGA = 1000, 1_000_000
_NAMES = {"requests": "RPM", "tokens": "TPM"}


class Gauge(NamedTuple):
    """Where a model's limits stand.

    Attributes:
        spent: Requests and tokens admitted since the client began.
        limits: What may be per minute of each, None where no limit is known.
        waiting: How many requests wait.
        cause: What the next one waits for: "requests", "tokens", "pause" or "concurrency".
        seconds: How long it will.
    """

    spent: dict[str, float]
    limits: dict[str, float | None]
    waiting: int
    cause: str
    seconds: float


class Reading(NamedTuple):
    """What a client says of itself at one moment.

    Attributes:
        gauge: Where the limits stand; None where they play no part.
        in_flight: Requests sent and not answered; None where nobody knows.
        rate_limited: 429s since the client began.
        retries: Likewise.
    """

    gauge: Gauge | None = None
    in_flight: int | None = None
    rate_limited: int = 0
    retries: int = 0


@dataclass(slots=True)
class Figures:
    """How far a run is.

    Attributes:
        done: Prompts that have an outcome.
        total: Of how many; None: nobody knows.
        failed: Those that failed.
        seconds: Since it began.
        rate: Outcomes per second, lately.
        left: Seconds until it is done at that rate and within the limits; None where nobody knows.
        used: Requests and tokens of the last minute, but no more than its limit.
        limits: What may be per minute of each, None where no limit is known.
        in_flight: Requests sent and not answered; None where nobody knows.
        rate_limited: 429s since it began.
        retries: Likewise.
        cost: USD so far.
        projected: USD for all of it; None where nobody knows.
        unpriced: Outcomes whose price is not known.
        waiting: How many requests wait.
        cause: What the next one waits for.
        wait: How many seconds it will.
    """

    done: int = 0
    total: int | None = None
    failed: int = 0
    seconds: float = 0.0
    rate: float = 0.0
    left: float | None = None
    used: dict[str, float] = field(default_factory=dict)
    limits: dict[str, float | None] = field(default_factory=dict)
    in_flight: int | None = None
    rate_limited: int = 0
    retries: int = 0
    cost: float = 0.0
    projected: float | None = None
    unpriced: int = 0
    waiting: int = 0
    cause: str = "concurrency"
    wait: float = 0.0


class _Sample(NamedTuple):
    """Where a run stood at a moment."""

    at: float
    done: int
    spent: dict[str, float]


class Meter:
    """Counts the outcomes of one run, and makes figures of them.

    Args:
        total: How many prompts there are; None: nobody knows.
        start: What the client said when the run began.
        now: When that was, in seconds of any clock.
    """

    def __init__(self, total: int | None, start: Reading, now: float) -> None:
        self.total = total
        self.done = self.failed = self.unpriced = 0
        self.cost = 0.0
        self._start, self._began = start, now
        self._samples = deque([_Sample(now, 0, _spent(start))])

    def count(self, outcome: object) -> None:
        """Count the outcome of one prompt."""
        self.done += 1
        if not isinstance(outcome, ModelResponse):
            self.failed += 1
        elif outcome.usage.estimated_cost is None:
            self.unpriced += 1
        elif not outcome.cached:
            self.cost += outcome.usage.estimated_cost

    def reach(self, fraction: float) -> None:
        """Count what is said to be done, where outcomes come all at once in the end."""
        self.done = max(self.done, round(fraction * (self.total or 0)))

    def read(self, said: Reading, now: float) -> Figures:
        """Return the figures.

        Args:
            said: What the client says of itself now.
            now: The time.
        """
        spent = _spent(said)
        self._samples.append(_Sample(now, self.done, spent))
        while len(self._samples) > 2 and self._samples[1].at <= now - _MINUTE:  # noqa: PLR2004  # first and last
            self._samples.popleft()
        then = self._samples[0]
        limits = said.gauge.limits if said.gauge is not None else {}
        used = {name: spent[name] - then.spent.get(name, 0.0) for name in spent}
        rate = (self.done - then.done) / max(now - then.at, 1e-9) if self.done > then.done else 0.0
        figures = Figures(
            done=self.done,
            total=self.total,
            failed=self.failed,
            seconds=now - self._began,
            rate=rate,
            used={name: min(number, limits.get(name) or number) for name, number in used.items()},
            limits=limits,
            in_flight=said.in_flight,
            rate_limited=said.rate_limited - self._start.rate_limited,
            retries=said.retries - self._start.retries,
            cost=self.cost,
            unpriced=self.unpriced,
        )
        if said.gauge is not None:
            figures.waiting, figures.cause, figures.wait = said.gauge[2:]
        self._look_ahead(figures, spent)
        return figures

    def _look_ahead(self, figures: Figures, spent: dict[str, float]) -> None:
        """Fill in what can be known of the rest: at the rate so far, and no faster than the limits allow."""
        if self.total is None or not self.done:
            return
        rest = max(self.total - self.done, 0)
        figures.projected = figures.cost * self.total / self.done if self.done > self.unpriced else None
        before = _spent(self._start)
        each = {name: (spent[name] - before.get(name, 0.0)) / self.done for name in spent}
        least = [rest * each[name] * _MINUTE / limit for name, limit in figures.limits.items() if limit]
        if figures.rate:
            figures.left = max(rest / figures.rate, *least) if least else rest / figures.rate


def progress_of(figures: Figures) -> str:
    """Return how far it is: count, rate and time."""
    done = f"{figures.done:,}" if figures.total is None else f"{figures.done:,}/{figures.total:,}"
    parts = [done, f"{_brief(figures.rate)}/s"]
    if figures.left is not None and figures.done != figures.total:
        parts.append(f"{clock(figures.left)} left")
    else:
        parts.append(f"{clock(figures.seconds)}")
    return ", ".join([*parts, *filter(None, [waited_for(figures)])])


def waited_for(figures: Figures) -> str:
    """Return what is being waited for, where that is not an answer."""
    if figures.in_flight is None and figures.done != figures.total:
        return "waiting for the Batch API"
    if not figures.waiting or figures.cause == "concurrency":
        return ""
    long = f" {clock(figures.wait)}" if figures.wait >= _LONG_WAIT else ""
    if figures.cause == "pause":
        return f"paused by the server{long}"
    return f"waiting{long} for {_NAMES[figures.cause]}"


def details(figures: Figures) -> list[str]:
    """Return the rest of it, the most telling first."""
    money = f"${usd(figures.cost)}"
    if figures.projected is not None and figures.done != figures.total:
        money += f" of ~${usd(figures.projected)}"
    if figures.unpriced:
        money = "cost unknown" if not figures.cost else f"{money} + {figures.unpriced:,} unpriced"
    said = {
        f"{figures.failed:,} failed": figures.failed,
        **{_usage(name, used, figures.limits.get(name)): True for name, used in figures.used.items()},
        f"{figures.in_flight} in flight": figures.in_flight is not None,
        money: True,
        f"{figures.rate_limited:,} x 429": figures.rate_limited,
        f"{figures.retries:,} {'retry' if figures.retries == 1 else 'retries'}": figures.retries,
    }
    return [text for text, is_said in said.items() if is_said]


def fitted(parts: Iterable[str], width: int) -> str:
    """Return as many of the parts as fit, side by side, in their order."""
    line = ""
    for part in parts:
        longer = f"{line}  {part}" if line else part
        line = longer if len(longer) <= width else line
    return line


def log_line(figures: Figures) -> str:
    """Return all of it in a line."""
    share = f" ({figures.done / figures.total:.0%})" if figures.total else ""
    done, _, rest = progress_of(figures).partition(", ")
    return ", ".join([f"{done}{share}", rest, *details(figures)])


def clock(seconds: float) -> str:
    """Return a time as 0:07, 12:34 or 1:23:45."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _spent(said: Reading) -> dict[str, float]:
    return said.gauge.spent if said.gauge is not None else {}


def _usage(name: str, used: float, limit: float | None) -> str:
    return f"{_NAMES[name]} {_brief(used)}" + (f"/{_brief(limit)}" if limit else "")


def _brief(number: float) -> str:
    """Return a number in three digits or so."""
    if number >= _MEGA:
        return f"{number / _MEGA:.3g}M"
    if number >= 10 * _KILO:
        return f"{number / _KILO:.0f}k"
    return f"{number:.3g}" if number < _KILO else f"{number:.0f}"
