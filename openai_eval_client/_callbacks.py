"""The caller's progress_callback, which may raise without harm."""

from __future__ import annotations

import inspect
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    Progress = Callable[[float], Any]

logger = logging.getLogger("openai_eval_client")


class Guarded:
    """A callback whose first exception is logged, and whose later ones are passed over.

    Args:
        callback: Takes the finished fraction; sync or async.
    """

    def __init__(self, callback: Progress) -> None:
        self._callback = callback
        self._has_raised = False

    async def __call__(self, fraction: float) -> None:
        """Call or await it."""
        try:
            result = self._callback(fraction)
            if inspect.isawaitable(result):
                await result
        except Exception:
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
