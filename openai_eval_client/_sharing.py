"""What the waiting has to do with others: joining those who share the limits, hearing from them, leaving."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from openai_eval_client._limiter import Gate

if TYPE_CHECKING:
    from openai_eval_client._bucket import Clock
    from openai_eval_client._exclusive import Exclusive
    from openai_eval_client._link import Link
    from openai_eval_client._shared import SharedGate
    from openai_eval_client.config import RateLimitConfig


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
            from openai_eval_client._redis import RedisLink  # an extra

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
        from openai_eval_client._shared import SharedGate  # most clients have their limits to themselves

        return SharedGate(model, self.config, self._clock, self._link, self._replied)

    def _replied(self, gate: SharedGate, outcome: Any) -> None:
        """Go by what comes back from the shared quota."""
        with self._lock:
            error = gate.take(outcome)
            if error is not None or gate.pause_left() > self.config.max_wait:
                self._refuse_all(gate, error)
            self._pump(gate)
