"""What shares limits, and which requests are turned away without waiting."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from openai_eval_client._limits.queue import ModelQueue
from openai_eval_client.errors import RequestTooLargeError, rate_limited

if TYPE_CHECKING:
    from openai_eval_client._limits.buckets import Clock
    from openai_eval_client._limits.shared import SharedBackend, SharedModelQueue
    from openai_eval_client._runtime import DeferringLock
    from openai_eval_client._wire import Demand
    from openai_eval_client.config import RateLimitConfig
    from openai_eval_client.errors import RateLimitError


class Sharing:
    """The part of a account that knows of others; without a `redis_url` there are none."""

    if TYPE_CHECKING:
        config: RateLimitConfig
        _clock: Clock
        _lock: DeferringLock
        _queues: dict[str | None, ModelQueue]

        def _pump(self, queue: ModelQueue) -> None: ...
        def _fail_all(self, queue: ModelQueue, reason: Exception | None = None) -> None: ...

    _backend: SharedBackend | None = None

    def share(self, *account: str | None) -> None:
        """Share the limits with all who spend the same account's, where the config says through what."""
        if self.config.redis_url is not None and self._backend is None:
            from openai_eval_client._limits.redis import RedisBackend  # an extra

            self._backend = RedisBackend(self.config, account)

    def leave(self) -> None:
        """Tell those who share the limits that this client is done."""
        if self._backend is not None:
            with self._lock:
                queues = self._queues.values()
                self._backend.leave({str(queue.model): told for queue in queues if (told := queue.leave())})

    def _new_queue(self, model: str | None) -> ModelQueue:
        if self._backend is None or model is None:
            return ModelQueue(model, self.config, self._clock)
        from openai_eval_client._limits.shared import (
            SharedModelQueue,  # most clients have their limits to themselves
        )

        return SharedModelQueue(model, self.config, self._clock, self._backend, self._replied)

    def _replied(self, queue: SharedModelQueue, outcome: Any) -> None:
        """Go by what comes back from the shared stated."""
        with self._lock:
            error = queue.take(outcome)
            if error is not None or queue.pause_left() > self.config.max_wait:
                self._fail_all(queue, error)
            self._pump(queue)


def check_size(queue: ModelQueue, demand: Demand, max_wait: float) -> None:
    """Refuse a request that is too large for the limit on tokens."""
    tokens = demand.input_tokens + (demand.max_output or 0)  # what is known of it, without guesses
    limit = queue.tokens.too_small_for(tokens, max_wait)
    if limit is not None:
        raise RequestTooLargeError(str(queue.model), tokens=tokens, limit=limit)


def check_pause(queue: ModelQueue, max_wait: float) -> None:
    """Refuse whoever comes during a pause longer than `max_wait` seconds."""
    if queue.pause_left() > max_wait:
        raise too_long(queue, max_wait)


def too_long(queue: ModelQueue, max_wait: float) -> RateLimitError:
    """Return the error for who would wait longer than `max_wait` seconds."""
    left = queue.pause_left()
    back = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() + left))
    waits = f"rate limited for {left:.0f} s, more than max_wait={max_wait:g} s"
    message = f"{queue.model}: {waits}; come back at {back}"
    return rate_limited(message, left)
