"""How far a run is: callbacks, two lines of a terminal, lines of a log."""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import sys
import time
from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from openai_eval_client._format import percent, short, timer, usd
from openai_eval_client._limits import LimitStatus
from openai_eval_client.models import ModelResponse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from typing_extensions import Self

logger = logging.getLogger("openai_eval_client")

_MINUTE = 60.0
_LONG_WAIT = 1.0  # seconds from which the length of a wait is shown
_NAMES = {"requests": "RPM", "tokens": "TPM"}
_PAINT, _LOG = 0.25, 10.0  # seconds between two paintings of a bar, and between two lines of a log
_WIDTH = 80  # columns of a terminal that does not know its width
_MISSING = "for a bar instead of these lines: pip install 'openai-eval-client[progress]'"
NO_LIMITS = LimitStatus({}, {}, 0, "concurrency", 0.0)


class Progress:
    """Callbacks for the finished fraction; their first exception is logged, and later ones are ignored."""

    def __init__(self, *callbacks: Callable[[float], Any] | None) -> None:
        self._callbacks = [callback for callback in callbacks if callback is not None]
        self._has_raised = False

    async def __call__(self, fraction: float) -> None:
        """Call or await each of them."""
        try:
            for callback in self._callbacks:
                result = callback(fraction)
                if inspect.isawaitable(result):
                    await result
        except Exception:  # an error of the user's callback must not end the run
            if not self._has_raised:
                text = "progress_callback raised at %.3f; the run goes on, and this is logged once"
                logger.exception(text, fraction, extra={"event": "callback_raised"})
            self._has_raised = True


@dataclass(slots=True)
class ProgressSnapshot:
    """How far a run is. The client gives the first four; a `Meter` adds the others."""

    limits: LimitStatus = NO_LIMITS  # empty before the first request, and where limits play no part
    in_flight: int | None = None  # requests sent and not answered; None for the Batch API
    rate_limited: int = 0  # answers with status 429
    retries: int = 0
    done: int = 0  # prompts that have an outcome
    total: int | None = None  # all prompts; None where that is unknown
    failed: int = 0
    unpriced: int = 0  # answers whose price is not known
    cost: float = 0.0  # USD so far
    projected: float | None = None  # USD for all prompts; None where that is unknown, and once all are done
    seconds: float = 0.0  # since the run began
    rate: float = 0.0  # outcomes per second in the last minute
    left: float | None = None  # seconds until all are done, at that rate and within the limits; None likewise
    used: dict[str, float] = field(default_factory=dict)  # in the last minute, but no more than its limit


class Meter:
    """Counts the outcomes of one run, and computes its rate and what is left."""

    def __init__(self, total: int | None, start: ProgressSnapshot, now: float) -> None:
        self._run = ProgressSnapshot(total=total)  # the counts alone
        self._start, self._began = start, now
        self._samples = deque([(now, 0, start.limits.spent)])  # a moment, and what was done and spent by then

    def count(self, outcome: object) -> None:
        """Count the outcome of one prompt."""
        self._run.done += 1
        if not isinstance(outcome, ModelResponse):
            self._run.failed += 1
        elif outcome.usage.estimated_cost is None:
            self._run.unpriced += 1
        elif not outcome.cached:
            self._run.cost += outcome.usage.estimated_cost

    def reach(self, fraction: float) -> None:
        """Take what is done as a fraction, where all outcomes come at the end."""
        self._run.done = max(self._run.done, round(fraction * (self._run.total or 0)))

    def read(self, state: ProgressSnapshot, now: float) -> ProgressSnapshot:
        """Return how far the run is, from what the client gives and what was counted."""
        run, limits = self._run, state.limits
        self._samples.append((now, run.done, limits.spent))
        while len(self._samples) > 2 and self._samples[1][0] <= now - _MINUTE:  # noqa: PLR2004  # first and last
            self._samples.popleft()
        began, done, spent = self._samples[0]
        rate, rest = (run.done - done) / max(now - began, 1e-9), (run.total or 0) - run.done
        is_priced = rest > 0 and run.done > run.unpriced
        left = None
        if rest > 0 and rate:  # a burst goes faster than the limits allow in the long run
            taken = _since(self._start.limits.spent, limits)
            least = (taken[name] / limit * _MINUTE for name, limit in limits.limits.items() if limit)
            left = rest * max(1 / rate, max(least, default=0.0) / run.done)
        return replace(
            run,
            limits=limits,
            in_flight=state.in_flight,
            rate_limited=state.rate_limited - self._start.rate_limited,
            retries=state.retries - self._start.retries,
            projected=run.cost * (1 + rest / run.done) if is_priced else None,
            seconds=now - self._began,
            rate=rate,
            left=left,
            used={name: min(n, limits.limits.get(name) or n) for name, n in _since(spent, limits).items()},
        )


def _since(before: dict[str, float], limits: LimitStatus) -> dict[str, float]:
    """Return what was spent of each limit since then."""
    return {name: spent - before.get(name, 0.0) for name, spent in limits.spent.items()}


def headline(state: ProgressSnapshot, share: str = "") -> str:
    """Return how far a run is: count, rate and time, and what it waits for."""
    done = f"{state.done:,}{share}" if state.total is None else f"{state.done:,}/{state.total:,}{share}"
    time_text = timer(state.seconds) if state.left is None else f"{timer(state.left)} left"
    return ", ".join(filter(None, (done, f"{short(state.rate)}/s", time_text, _waiting_for(state))))


def _waiting_for(state: ProgressSnapshot) -> str:
    """Return what a run waits for, if that is not an answer."""
    if state.in_flight is None and state.done != state.total:
        return "waiting for the Batch API"
    cause, seconds = state.limits.cause, state.limits.seconds
    if not state.limits.waiting or cause == "concurrency":
        return ""
    length = f" {timer(seconds)}" if seconds >= _LONG_WAIT else ""
    return f"paused by the server{length}" if cause == "pause" else f"waiting{length} for {_NAMES[cause]}"


def details(state: ProgressSnapshot) -> list[str]:
    """Return the rest, the most important first."""
    parts = [f"{state.failed:,} failed"] if state.failed else []
    for name, used in state.used.items():
        limit = state.limits.limits.get(name)
        parts.append(f"{_NAMES[name]} {short(used)}" + (f"/{short(limit)}" if limit else ""))
    parts += [] if state.in_flight is None else [f"{state.in_flight} in flight"]
    projected = "" if state.projected is None else f" of ~${usd(state.projected)}"
    unpriced = f" + {state.unpriced:,} unpriced" if state.unpriced else ""
    is_unknown = state.unpriced and not state.cost
    parts.append("cost unknown" if is_unknown else f"${usd(state.cost)}{projected}{unpriced}")
    parts += [f"{state.rate_limited:,} x 429"] if state.rate_limited else []
    parts += [f"{state.retries:,} {'retry' if state.retries == 1 else 'retries'}"] if state.retries else []
    return parts


def fitted(parts: Iterable[str], width: int) -> str:
    """Return as many of the parts as fit, side by side, in their order."""
    line = ""
    for part in parts:
        longer = f"{line}  {part}" if line else part
        line = longer if len(longer) <= width else line
    return line


def log_line(state: ProgressSnapshot) -> str:
    """Return all of it in one line."""
    share = f" ({percent(state.done / state.total)})" if state.total else ""
    return ", ".join([headline(state, share), *details(state)])


class Bar:
    """Two lines of a terminal, the first with a bar; in a notebook, one."""

    def __init__(self, total: int | None) -> None:
        from tqdm.auto import tqdm  # asks a notebook for its widgets, which takes time

        class Line(tqdm):  # type: ignore[misc,unused-ignore]  # tqdm has no types
            monitor_interval = 0  # no thread: lines are painted by a timer

        columns, rows = _size()
        size = {"dynamic_ncols": in_notebook(), "ncols": columns, "nrows": rows}  # there as wide as the page
        forms = ["{percentage:3.0f}%|{bar}| {desc}" if total else "{desc}", "{desc}"]
        forms = forms[:1] if in_notebook() else forms
        self._lines = [Line(total=total, bar_format=form, file=sys.stderr, **size) for form in forms]

    def show(self, state: ProgressSnapshot) -> None:
        """Paint both lines."""
        first, *rest = self._lines
        first.n = state.done
        first.desc = headline(state) if rest else "  ".join([headline(state), *details(state)])
        for line in rest:
            first.ncols = line.ncols = _size()[0]
            line.desc = fitted(details(state), line.ncols)
        for line in self._lines:
            line.refresh()

    def close(self) -> None:
        """Leave the lines as they are, and go to the next."""
        for line in self._lines:
            line.close()


def _size() -> tuple[int, int]:
    """Return columns and rows of the terminal; some say that they have none, or nothing."""
    try:
        columns, rows = os.get_terminal_size(sys.stderr.fileno())
    except (AttributeError, OSError, ValueError):
        columns = rows = 0
    return columns or _WIDTH, rows


def in_notebook() -> bool:
    """Return whether this is the kernel of a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return "IPKernelApp" in getattr(shell, "config", ())


def bar_is_open() -> bool:
    """Return whether a bar is shown, so that other lines go above it."""
    library = sys.modules.get("tqdm")
    return library is not None and bool(getattr(library.tqdm, "_instances", ()))


def write_above(text: str) -> None:
    """Write a line to standard error, above the bars."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)


def _write(text: str) -> None:
    if sys.stderr is not None:
        sys.stderr.write(f"openai_eval_client: {text}\n")
        sys.stderr.flush()


class Display:
    """Shows how far a run is while it is entered; an error of the display does not reach the run."""

    def __init__(self, total: int | None, probe: Callable[[], ProgressSnapshot]) -> None:
        self._total, self._probe = total, probe
        self._meter = Meter(total, probe(), time.monotonic())
        self.count, self.reach = self._meter.count, self._meter.reach
        self._bar: Bar | None = None  # None: lines of a log, as standard error is no terminal
        self._timer: asyncio.TimerHandle | None = None
        self._is_broken = False

    def __enter__(self) -> Self:
        self._safely(self._open)
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._safely(self._show)
        if self._bar is not None:
            self._safely(self._bar.close)

    def _open(self) -> None:
        if in_notebook() or (sys.stderr is not None and sys.stderr.isatty()):
            try:
                self._bar = Bar(self._total)
            except ModuleNotFoundError:
                _write(_MISSING)
        self._tick(is_first=True)

    def _tick(self, *, is_first: bool = False) -> None:
        if self._bar is not None or not is_first:  # a log has nothing to say yet
            self._show()
        seconds = _LOG if self._bar is None else _PAINT
        self._timer = asyncio.get_running_loop().call_later(seconds, self._safely, self._tick)

    def _show(self) -> None:
        state = self._meter.read(self._probe(), time.monotonic())
        if self._bar is None:
            _write(log_line(state))
        else:
            self._bar.show(state)

    def _safely(self, act: Callable[[], None]) -> None:
        if self._is_broken:
            return
        try:
            act()
        except Exception:  # a run is worth more than its display
            text = "progress cannot be shown; the run goes on without it"
            logger.exception(text, extra={"event": "progress_failed"})
            self._is_broken = True
