"""When a request may go: queues, token buckets, what the server says, limits shared over machines."""

from openai_eval_client._limits.buckets import MINUTE, Clock, Limit
from openai_eval_client._limits.limiter import Sharing, check_pause, check_size, too_long
from openai_eval_client._limits.queue import (
    FIRST_OUTPUT_GUESS,
    ConcurrencyLimit,
    LimitStatus,
    ModelLimits,
    ModelQueue,
    State,
    Waiter,
    describe,
)

__all__ = [
    "FIRST_OUTPUT_GUESS",
    "MINUTE",
    "Clock",
    "ConcurrencyLimit",
    "Limit",
    "LimitStatus",
    "ModelLimits",
    "ModelQueue",
    "Sharing",
    "State",
    "Waiter",
    "check_pause",
    "check_size",
    "describe",
    "too_long",
]
