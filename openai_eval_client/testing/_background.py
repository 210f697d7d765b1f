"""Responses made in the background: polled, cancelled and deleted by their id."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ._faults import ApiError

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._options import Options

Json = dict[str, Any]
UNDER_WAY = ("queued", "in_progress")


class Background:
    """One response: it ends when it was polled often enough and its time is over."""

    def __init__(self, final: Json, polls: int, seconds: float, clock: Callable[[], float]) -> None:
        self._final, self._polls, self._clock = final, polls, clock
        self._due = clock() + seconds
        self._cancelled = False

    @property
    def ended(self) -> bool:
        """Whether the next poll finds it ended."""
        return self._cancelled or (not self._polls and self._clock() >= self._due)

    @property
    def billed(self) -> bool:
        """Whether it came to its end, and so is on the bill."""
        return self.ended and not self._cancelled

    def start(self) -> Json:
        """Return the response as its creation shows it."""
        return self._without_output("queued")

    def poll(self) -> Json:
        """Return the response as of now; count the poll."""
        if self.ended:
            return self._without_output("cancelled") if self._cancelled else self._final
        self._polls = max(0, self._polls - 1)
        return self._without_output("in_progress")

    def cancel(self) -> Json:
        """Cancel the response unless it has ended; return it."""
        self._cancelled = self._cancelled or not self.ended
        return self.poll()

    def _without_output(self, status: str) -> Json:
        empty: Json = {"output": [], "usage": None, "error": None, "incomplete_details": None}
        return {**self._final, "status": status, **empty}


class StoredResponses:
    """The responses of a server that were created with `background`, by their id."""

    def __init__(self, options: Options, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._options, self._clock = options, clock
        self._responses: dict[str, Background] = {}

    def keep(self, final: Json, latency: float, *, streamed: bool) -> Background:
        """Keep a response that ends as `final`: when the options say, after its latency, or once streamed."""
        polls, seconds = self._options.background_polls, self._options.background_seconds
        if streamed or seconds is None:
            seconds = latency
        response = Background(final, 0 if streamed else polls, seconds, self._clock)
        self._responses[final["id"]] = response
        return response

    def get(self, ident: str) -> Background:
        """Return a response; raise a 404 if it is unknown."""
        if response := self._responses.get(ident):
            return response
        raise ApiError(404, f"Response with id '{ident}' not found.")

    def delete(self, ident: str) -> Json:
        """Forget a response; raise a 404 if it is unknown."""
        self.get(ident)
        del self._responses[ident]
        return {"id": ident, "object": "response", "deleted": True}

    def headers(self, shown: Any) -> dict[str, str]:
        """Return the header that says when to poll again, while the response shown is under way."""
        after = self._options.background_poll_after
        response = isinstance(shown, dict) and shown.get("object") == "response"
        waits = response and shown.get("status") in UNDER_WAY
        return {} if after is None or not waits else {"openai-poll-after-ms": str(round(after * 1000))}
