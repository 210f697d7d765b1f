"""A lock that survives the garbage collector."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Exclusive:
    """A lock for state that collected objects hand something back to.

    The collector may run anywhere, also in the middle of a locked region of the same thread. What a collected
    stream or coroutine wants done then waits until that region is left: it neither deadlocks nor sees the
    state half changed.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._inside = False
        self._later: deque[Callable[[], None]] = deque()

    def __enter__(self) -> None:
        self._lock.acquire()
        self._inside = True

    def __exit__(self, *_: object) -> None:
        try:
            while self._later:
                self._later.popleft()()
        finally:
            self._inside = False
            self._lock.release()

    def when_free(self, action: Callable[[], None]) -> None:
        """Do something alone: now, or when this thread leaves the region it is in."""
        with self._lock:
            if self._inside:
                self._later.append(action)
                return
        with self:
            action()
