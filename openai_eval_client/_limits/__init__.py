"""When a request may go: queues, token buckets, what the server says, limits shared over machines."""

from openai_eval_client._limits.buckets import MINUTE, Clock, Limit
from openai_eval_client._limits.limiter import Limiter, Permit
from openai_eval_client._limits.queue import (
    FIRST_OUTPUT_GUESS,
    ConcurrencyLimit,
    LimitStatus,
    ModelLimits,
    ModelQueue,
    Waiter,
)

__all__ = [
    "FIRST_OUTPUT_GUESS",
    "MINUTE",
    "Clock",
    "ConcurrencyLimit",
    "Limit",
    "LimitStatus",
    "Limiter",
    "ModelLimits",
    "ModelQueue",
    "Permit",
    "Waiter",
]
