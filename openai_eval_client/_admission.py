"""The right to send one attempt, and who is refused it without having to wait."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Protocol

from openai_eval_client._events import debug, logger, request_id
from openai_eval_client.errors import RequestTooLargeError, rate_limited

if TYPE_CHECKING:
    from collections.abc import Mapping

    from openai_eval_client._limiter import Gate
    from openai_eval_client._payments import Payment
    from openai_eval_client._tickets import Ticket
    from openai_eval_client._wire import Demand, Outcome
    from openai_eval_client.errors import RateLimitError


class Admitter(Protocol):
    """Who gave it."""

    def hear(self, gate: Gate, ticket: Ticket, headers: Mapping[str, str]) -> None:
        """Heed the headers of an answer."""

    def settle(self, gate: Gate, ticket: Ticket, demand: Demand, outcome: Outcome) -> None:
        """Free the slot of an attempt, and account for what it came to."""


class Admission:
    """The right to send one attempt; settle it exactly once, whatever comes of the attempt."""

    __slots__ = ("_admitter", "_gate", "_payment", "_ticket", "_unsaid", "demand")

    def __init__(
        self, admitter: Admitter, gate: Gate, ticket: Ticket, demand: Demand, payment: Payment | None
    ) -> None:
        self._admitter = admitter
        self._gate = gate
        self._ticket = ticket
        self._payment = payment
        self._unsaid = True
        self.demand = demand

    def hear(self, headers: Mapping[str, str]) -> None:
        """Heed the headers of an answer whose body is still to come."""
        self._admitter.hear(self._gate, self._ticket, headers)

    def settle(self, outcome: Outcome) -> None:
        """Hand slot and money back and account for what the attempt came to; a second call does nothing."""
        payment, self._payment = self._payment, None
        if payment is not None:
            payment.settle(self.demand, outcome)
        self._admitter.settle(self._gate, self._ticket, self.demand, outcome)
        if self._unsaid and logger.isEnabledFor(logging.DEBUG):
            self._say(outcome)
        self._unsaid = False

    def _say(self, outcome: Outcome) -> None:
        ticket, model = self._ticket, self.demand.model
        about = {
            "model": model,
            "status": outcome.status,
            "wait_seconds": ticket.granted_at - ticket.asked_at,
            "seconds": ticket.ended_at - ticket.granted_at,
            "tokens": outcome.tokens,
            "request_id": request_id(outcome.headers),
        }
        text = "attempt for %s: %s after %.2f s"
        debug(text, model, outcome.status or "no answer", about["seconds"], event="attempt", **about)


def check_size(gate: Gate, demand: Demand, max_wait: float) -> None:
    """Refuse a request that is too large for the limit on tokens."""
    tokens = demand.input_tokens + (demand.max_output or 0)  # what is known of it, without guesses
    limit = gate.tokens.too_small_for(tokens, max_wait)
    if limit is not None:
        raise RequestTooLargeError(str(gate.model), tokens=tokens, limit=limit)


def check_pause(gate: Gate, max_wait: float) -> None:
    """Refuse whoever comes during a pause longer than `max_wait` seconds."""
    if gate.pause_left() > max_wait:
        raise too_long(gate, max_wait)


def too_long(gate: Gate, max_wait: float) -> RateLimitError:
    """Return the error for who would wait longer than `max_wait` seconds."""
    left = gate.pause_left()
    back = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() + left))
    message = (
        f"{gate.model}: rate limited for {left:.0f} s, more than max_wait={max_wait:g} s; come back at {back}"
    )
    return rate_limited(message, left)
