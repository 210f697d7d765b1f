"""How far a run is: callbacks, a bar, a line in the log."""

from __future__ import annotations

import asyncio
import inspect
import logging
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

from openai_eval_client._format import short, timer, usd
from openai_eval_client.models import ModelResponse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

    from typing_extensions import Self

    from openai_eval_client._limits import LimitStatus


Progress: TypeAlias = "Callable[[float], Any]"

logger = logging.getLogger("openai_eval_client")


class Guarded:
    """A callback whose first exception is logged, and whose later ones are passed over."""

    def __init__(self, callback: Progress) -> None:
        self._callback = callback
        self._has_raised = False

    async def __call__(self, fraction: float) -> None:
        """Call or await it."""
        try:
            result = self._callback(fraction)
            if inspect.isawaitable(result):
                await result
        except Exception:  # whatever is wrong with the image, it has a default size
            if not self._has_raised:
                text = "progress_callback raised at %.3f; the run goes on, and this is said once"
                logger.exception(text, fraction, extra={"event": "callback_raised"})
            self._has_raised = True


async def report(progress: Progress | None, fraction: float) -> None:
    """Call or await a callback, where there is one; what it raises is logged."""
    if progress is not None:
        await (progress if isinstance(progress, Guarded) else Guarded(progress))(fraction)


def both(first: Progress | None, second: Progress | None) -> Progress | None:
    """Return one callback for two, either of which may be missing."""
    if first is None or second is None:
        return first or second

    async def call(fraction: float) -> None:
        second(fraction)
        await report(first, fraction)

    return call


_MINUTE = 60.0
_LONG_WAIT = 1.0  # seconds from which a wait is told with its length
_KILO, _MEGA = 1000, 1_000_000
_NAMES = {"requests": "RPM", "tokens": "TPM"}


class Reading(NamedTuple):
    """What a client says of itself at one moment."""

    gauge: LimitStatus | None = None  # where the limits stand; None where they play no part
    in_flight: int | None = None  # requests sent and not answered; None where nobody knows
    rate_limited: int = 0  # 429s since the client began
    retries: int = 0  # likewise


@dataclass(slots=True)
class ProgressSnapshot:
    """How far a run is."""

    done: int = 0  # prompts that have an outcome
    total: int | None = None  # of how many; None: nobody knows
    failed: int = 0  # those that failed
    seconds: float = 0.0  # since it began
    rate: float = 0.0  # outcomes per second, lately
    # seconds until it is done at that rate and within the limits; None where nobody knows
    left: float | None = None
    # requests and tokens of the last minute, but no more than its limit
    used: dict[str, float] = field(default_factory=dict)
    # what may be per minute of each, None where no limit is known
    limits: dict[str, float | None] = field(default_factory=dict)
    in_flight: int | None = None  # requests sent and not answered; None where nobody knows
    rate_limited: int = 0  # 429s since it began
    retries: int = 0  # likewise
    cost: float = 0.0  # USD so far
    projected: float | None = None  # USD for all of it; None where nobody knows
    unpriced: int = 0  # outcomes whose price is not known
    waiting: int = 0  # how many requests wait
    cause: str = "concurrency"  # what the next one waits for
    wait: float = 0.0  # how many seconds it will


class _Sample(NamedTuple):
    """Where a run stood at a moment."""

    at: float
    done: int
    spent: dict[str, float]


class Meter:
    """Counts the outcomes of one run, and makes figures of them."""

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

    def read(self, said: Reading, now: float) -> ProgressSnapshot:
        """Return the figures."""
        spent = _spent(said)
        self._samples.append(_Sample(now, self.done, spent))
        while len(self._samples) > 2 and self._samples[1].at <= now - _MINUTE:  # noqa: PLR2004  # first and last
            self._samples.popleft()
        then = self._samples[0]
        limits = said.gauge.limits if said.gauge is not None else {}
        used = {name: spent[name] - then.spent.get(name, 0.0) for name in spent}
        rate = (self.done - then.done) / max(now - then.at, 1e-9) if self.done > then.done else 0.0
        figures = ProgressSnapshot(
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

    def _look_ahead(self, figures: ProgressSnapshot, spent: dict[str, float]) -> None:
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


def progress_of(figures: ProgressSnapshot) -> str:
    """Return how far it is: count, rate and time."""
    done = f"{figures.done:,}" if figures.total is None else f"{figures.done:,}/{figures.total:,}"
    parts = [done, f"{short(figures.rate)}/s"]
    if figures.left is not None and figures.done != figures.total:
        parts.append(f"{timer(figures.left)} left")
    else:
        parts.append(f"{timer(figures.seconds)}")
    return ", ".join([*parts, *filter(None, [waited_for(figures)])])


def waited_for(figures: ProgressSnapshot) -> str:
    """Return what is being waited for, where that is not an answer."""
    if figures.in_flight is None and figures.done != figures.total:
        return "waiting for the Batch API"
    if not figures.waiting or figures.cause == "concurrency":
        return ""
    long = f" {timer(figures.wait)}" if figures.wait >= _LONG_WAIT else ""
    if figures.cause == "pause":
        return f"paused by the server{long}"
    return f"waiting{long} for {_NAMES[figures.cause]}"


def details(figures: ProgressSnapshot) -> list[str]:
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


def log_line(figures: ProgressSnapshot) -> str:
    """Return all of it in a line."""
    share = f" ({figures.done / figures.total:.0%})" if figures.total else ""
    done, _, rest = progress_of(figures).partition(", ")
    return ", ".join([f"{done}{share}", rest, *details(figures)])


def _spent(said: Reading) -> dict[str, float]:
    return said.gauge.spent if said.gauge is not None else {}


def _usage(name: str, used: float, limit: float | None) -> str:
    return f"{_NAMES[name]} {short(used)}" + (f"/{short(limit)}" if limit else "")


_NARROW = 80  # columns of a terminal that does not say
_FULL, _OPEN, _BARE = "{percentage:3.0f}%|{bar}| {desc}", "{desc}", "{desc}"


class Bar:
    """Two lines of a terminal: how far it is, and what it takes. In a notebook, one."""

    def __init__(self, total: int | None) -> None:
        self._lines = [_line(total, _FULL if total else _OPEN)]
        if not in_notebook():
            self._lines.append(_line(None, _BARE))

    def show(self, figures: ProgressSnapshot) -> None:
        """Paint both lines."""
        first, *rest = self._lines
        first.n = figures.done
        first.desc = progress_of(figures)
        for line in rest:
            line.desc = fitted(details(figures), line.dynamic_ncols(line.fp)[0])
        if not rest:
            first.desc += "  " + "  ".join(details(figures))
        for line in self._lines:
            line.refresh()

    def close(self) -> None:
        """Leave the lines as they are, and go to the next."""
        for line in self._lines:
            line.close()


def bar_is_open() -> bool:
    """Return whether a bar is being shown, so that other lines go above it."""
    library = sys.modules.get("tqdm")
    return library is not None and bool(getattr(library.tqdm, "_instances", ()))


def write_above(text: str) -> None:
    """Write a line to standard error, above the bars."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)


def in_notebook() -> bool:
    """Return whether this is the kernel of a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return "IPKernelApp" in getattr(shell, "config", ())


def _line(total: int | None, form: str) -> Any:
    from tqdm.auto import tqdm  # asks a notebook for its widgets, which takes time

    class Line(tqdm):  # type: ignore[misc,unused-ignore]  # tqdm has no types
        monitor_interval = 0  # no thread: we paint when there is something to paint

    line = Line(total=total, bar_format=form, dynamic_ncols=True, leave=True, file=sys.stderr)
    measure = line.dynamic_ncols
    if not in_notebook():
        line.dynamic_ncols = lambda file: _shape(measure, file)
        line.ncols, line.nrows = line.dynamic_ncols(line.fp)
    return line


def _shape(measure: Any, file: object) -> tuple[int, int | None]:
    """Return columns and rows of a terminal; some say that they have none, or nothing."""
    columns, rows = measure(file) if measure else (None, None)
    return (columns, rows) if columns and columns > 0 else (_NARROW, None)


_PAINT = 0.25  # seconds between two looks at a bar
_LINE = 10.0  # seconds between two lines of a log
_MISSING = "for a bar instead of these lines: pip install 'openai-eval-client[progress]'"


class Screen(Protocol):
    """Where figures are shown."""

    def show(self, figures: ProgressSnapshot) -> None:
        """Show them."""

    def close(self) -> None:
        """Show nothing more."""


class Lines:
    """Lines of a log, where no terminal can be painted on."""

    def show(self, figures: ProgressSnapshot) -> None:
        """Write a line."""
        self.say(log_line(figures))

    @staticmethod
    def say(text: str) -> None:
        """Write a text of one line."""
        if sys.stderr is not None:
            sys.stderr.write(f"openai_eval_client: {text}\n")
            sys.stderr.flush()

    def close(self) -> None:
        """There is nothing to close."""


class Display:
    """Shows how far a run is, from entering to leaving it; whatever goes wrong with that harms no run."""

    def __init__(self, total: int | None, probe: Callable[[], Reading]) -> None:
        self._probe = probe
        self._meter = Meter(total, probe(), time.monotonic())
        self._screen: Screen | None = None
        self._every = _PAINT
        self._timer: asyncio.TimerHandle | None = None

    def count(self, outcome: object) -> None:
        """Count the outcome of one prompt."""
        self._meter.count(outcome)

    def reach(self, fraction: float) -> None:
        """Take what is done as a fraction, where outcomes come all at once in the end."""
        self._meter.reach(fraction)

    def __enter__(self) -> Self:
        self._safely(self._open)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._safely(self._show)
        self._safely(self._close)

    def _open(self) -> None:
        self._screen, self._every = _screen(self._meter.total)
        if isinstance(self._screen, Bar):
            self._show()
        self._timer = asyncio.get_running_loop().call_later(self._every, self._tick)

    def _tick(self) -> None:
        self._safely(self._show)
        if self._screen is not None:
            self._timer = asyncio.get_running_loop().call_later(self._every, self._tick)

    def _show(self) -> None:
        if self._screen is not None:
            self._screen.show(self._meter.read(self._probe(), time.monotonic()))

    def _close(self) -> None:
        if self._screen is not None:
            self._screen.close()

    def _safely(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except Exception:  # whatever is wrong with the image, it has a default size
            text = "progress cannot be shown; the run goes on without"
            logger.exception(text, extra={"event": "progress_failed"})
            self._screen = None


def _screen(total: int | None) -> tuple[Screen, float]:
    """Return where to show it, and the seconds between two times."""
    if not in_notebook() and (sys.stderr is None or not sys.stderr.isatty()):
        return Lines(), _LINE
    try:
        return Bar(total), _PAINT
    except ModuleNotFoundError:
        Lines.say(_MISSING)
        return Lines(), _LINE
