"""Progress on standard error: a bar in a terminal or a notebook, elsewhere a line now and then."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from typing import TYPE_CHECKING, Any, Protocol

from openai_eval_client._bar import Bar, in_notebook
from openai_eval_client._figures import Meter, log_line

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from typing_extensions import Self

    from openai_eval_client._figures import Figures, Reading

logger = logging.getLogger("openai_eval_client")

_PAINT = 0.25  # seconds between two looks at a bar
_LINE = 10.0  # seconds between two lines of a log
_MISSING = "for a bar instead of these lines: pip install 'openai-eval-client[progress]'"


class Screen(Protocol):
    """Where figures are shown."""

    def show(self, figures: Figures) -> None:
        """Show them."""

    def close(self) -> None:
        """Show nothing more."""


class Lines:
    """Lines of a log, where no terminal can be painted on."""

    def show(self, figures: Figures) -> None:
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
    """Shows how far a run is, from entering to leaving it; whatever goes wrong with that harms no run.

    Args:
        total: How many prompts there are; None: nobody knows.
        probe: Asks the client what it says of itself.
    """

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
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
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
        except Exception:
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
