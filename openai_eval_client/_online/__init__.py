"""Prompts answered online: one, many by a pool of workers, an estimate."""

from openai_eval_client._online.caller import Caller
from openai_eval_client._online.estimate import estimate
from openai_eval_client._online.pool import Crew, answered, attach, collect, handed_out, start_pool

__all__ = ["Caller", "Crew", "answered", "attach", "collect", "estimate", "handed_out", "start_pool"]
