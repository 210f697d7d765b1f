"""What must let go before a process forks, and start afresh in the child."""

from __future__ import annotations

import functools
import os
import threading
import weakref
from typing import Protocol


class ForkAware(Protocol):
    """Holds something that cannot be shared with a forked child."""

    def before_fork(self) -> None:
        """Let go, and keep others from taking it again until the fork is over."""

    def after_fork(self, *, child: bool) -> None:
        """Go on, in the parent or in the child."""


_LOCK = threading.RLock()  # one fork at a time, and no newcomers meanwhile
_THINGS: weakref.WeakSet[ForkAware] = weakref.WeakSet()
_HELD: list[ForkAware] = []  # by the fork going on


def mind_forks(thing: ForkAware) -> None:
    """Tell a thing of every fork for as long as it lives."""
    _register()
    with _LOCK:
        _THINGS.add(thing)


@functools.cache
def _register() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(
            before=_before,
            after_in_parent=functools.partial(_after, child=False),
            after_in_child=functools.partial(_after, child=True),
        )


def _before() -> None:
    _LOCK.acquire()
    _HELD.extend(_THINGS)
    for thing in _HELD:
        thing.before_fork()


def _after(*, child: bool) -> None:
    for thing in _HELD:
        thing.after_fork(child=child)
    _HELD.clear()
    _LOCK.release()
