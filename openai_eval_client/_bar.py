"""A progress bar in a terminal or a notebook, by tqdm: it knows both, and stays out of other bars' way."""

from __future__ import annotations

import sys
from typing import Any

from openai_eval_client._figures import Figures, details, fitted, progress_of

_NARROW = 80  # columns of a terminal that does not say
_FULL, _OPEN, _BARE = "{percentage:3.0f}%|{bar}| {desc}", "{desc}", "{desc}"


class Bar:
    """Two lines of a terminal: how far it is, and what it takes. In a notebook, one.

    Args:
        total: How many prompts there are; None: nobody knows.

    Raises:
        ModuleNotFoundError: tqdm is not installed.
    """

    def __init__(self, total: int | None) -> None:
        self._lines = [_line(total, _FULL if total else _OPEN)]
        if not in_notebook():
            self._lines.append(_line(None, _BARE))

    def show(self, figures: Figures) -> None:
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


def is_open() -> bool:
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
