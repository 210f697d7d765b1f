"""Prompts answered online: one, many by a pool of workers, an estimate."""

from openai_eval_client._online.estimate import estimate
from openai_eval_client._online.prompts import (
    NO_SAMPLES,
    Caller,
    WorkerPool,
    attach_responses,
    collect,
    outcomes_or_raise,
    pool_for,
    responses_of,
)
from openai_eval_client._online.stopping import too_many_failures

__all__ = [
    "NO_SAMPLES",
    "Caller",
    "WorkerPool",
    "attach_responses",
    "collect",
    "estimate",
    "outcomes_or_raise",
    "pool_for",
    "responses_of",
    "too_many_failures",
]
