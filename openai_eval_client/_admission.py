"""The right to send one attempt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from openai_eval_client._limiter import Gate
    from openai_eval_client._payments import Payment
    from openai_eval_client._tickets import Ticket
    from openai_eval_client._wire import Demand, Outcome


class Admitter(Protocol):
    """Who gave it."""

    def hear(self, gate: Gate, ticket: Ticket, headers: Mapping[str, str]) -> None:
        """Heed the headers of an answer."""

    def settle(self, gate: Gate, ticket: Ticket, demand: Demand, outcome: Outcome) -> None:
        """Free the slot of an attempt, and account for what it came to."""


class Admission:
    """The right to send one attempt; settle it exactly once, whatever comes of the attempt."""

    __slots__ = ("_admitter", "_gate", "_payment", "_ticket", "demand")

    def __init__(
        self, admitter: Admitter, gate: Gate, ticket: Ticket, demand: Demand, payment: Payment | None
    ) -> None:
        self._admitter = admitter
        self._gate = gate
        self._ticket = ticket
        self._payment = payment
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
