"""A connection that several threads share, and that is open in one process only."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import weakref
from typing import TYPE_CHECKING

from openai_eval_client._forks import mind_forks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from openai_eval_client._database import Database


class Connection:
    """Opened when needed, lent to one thread at a time, closed before a fork and with its owner.

    Args:
        database: The file.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._open: list[sqlite3.Connection] = []  # one at most
        weakref.finalize(self, _close, self._open)  # also at the interpreter's end
        mind_forks(self)

    @contextlib.contextmanager
    def lent(self) -> Iterator[sqlite3.Connection]:
        """Lend it; whatever goes wrong is undone, and the next one gets a new one."""
        with self._lock:
            try:
                yield self._current()
            except BaseException:
                _close(self._open)
                raise

    def close(self) -> None:
        """Close it once nobody uses it; lending it again opens it again."""
        with self._lock:
            _close(self._open)

    def before_fork(self) -> None:
        """Close it: SQLite's locks do not survive a fork, https://www.sqlite.org/howtocorrupt.html."""
        self._lock.acquire()
        _close(self._open)

    def after_fork(self, *, child: bool) -> None:  # noqa: ARG002  # the same on both sides
        """Let it be used again."""
        self._lock.release()

    def _current(self) -> sqlite3.Connection:
        if not self._database.is_there():
            raise sqlite3.OperationalError("the file is gone, or another is in its place")
        if not self._open:
            self._open.append(self._database.connect())
        return self._open[0]


def _close(connections: list[sqlite3.Connection]) -> None:
    while connections:
        connections.pop().close()
