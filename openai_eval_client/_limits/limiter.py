"""What shares limits, and which requests are turned away without waiting."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from openai_eval_client._limits.queue import Gate
from openai_eval_client.errors import RequestTooLargeError, rate_limited

if TYPE_CHECKING:
    from openai_eval_client._limits.buckets import Clock
    from openai_eval_client._limits.shared import Link, SharedGate
    from openai_eval_client._runtime import Exclusive
    from openai_eval_client._wire import Demand
    from openai_eval_client.config import RateLimitConfig
    from openai_eval_client.errors import RateLimitError


class Sharing:
    """The part of a governor that knows of others; without a `redis_url` there are none."""

    if TYPE_CHECKING:
        config: RateLimitConfig
        _clock: Clock
        _lock: Exclusive
        _gates: dict[str | None, Gate]

        def _pump(self, gate: Gate) -> None: ...
        def _refuse_all(self, gate: Gate, reason: Exception | None = None) -> None: ...

    _link: Link | None = None

    def share(self, *account: str | None) -> None:
        """Share the limits with all who spend the same account's, where the config says through what."""
        if self.config.redis_url is not None and self._link is None:
            from openai_eval_client._limits.redis import RedisLink  # an extra

            self._link = RedisLink(self.config, account)

    def leave(self) -> None:
        """Tell those who share the limits that this client is done."""
        if self._link is not None:
            with self._lock:
                gates = self._gates.values()
                self._link.leave({str(gate.model): told for gate in gates if (told := gate.leave())})

    def _new_gate(self, model: str | None) -> Gate:
        if self._link is None or model is None:
            return Gate(model, self.config, self._clock)
        from openai_eval_client._limits.shared import (
            SharedGate,  # most clients have their limits to themselves
        )

        return SharedGate(model, self.config, self._clock, self._link, self._replied)

    def _replied(self, gate: SharedGate, outcome: Any) -> None:
        """Go by what comes back from the shared quota."""
        with self._lock:
            error = gate.take(outcome)
            if error is not None or gate.pause_left() > self.config.max_wait:
                self._refuse_all(gate, error)
            self._pump(gate)


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
