"""The way to the shared state, as its gates see it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

ALIVE_SECONDS = 10.0  # a worker that waits and was not heard of for so long is gone


class Link(Protocol):
    """One worker's way there.

    Attributes:
        generation: Another number in a forked child, which has to ask for itself.
        workers: How many were alive when one of the gates heard last; 0: none has heard yet.
    """

    generation: int
    workers: int

    def ask(self, model: str, told: dict[str, Any], done: Callable[[Any], None]) -> None:
        """Ask and tell; `done` is called later with the reply or the exception, on any thread."""

    def leave(self, told: dict[str, dict[str, Any]]) -> None:
        """Tell the last, by model, and ask no more."""
