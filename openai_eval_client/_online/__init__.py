"""Prompts answered online: one, many by a pool of workers, an estimate."""

from openai_eval_client._online.caller import Caller
from openai_eval_client._online.estimate import estimate
from openai_eval_client._online.pool import WorkerPool, answered, attach, collect, handed_out, pool_for

__all__ = ["Caller", "WorkerPool", "answered", "attach", "collect", "estimate", "handed_out", "pool_for"]
