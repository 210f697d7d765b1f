"""What threads, event loops, forks and files ask of a library."""

from openai_eval_client._runtime.files import FileLock, replacing
from openai_eval_client._runtime.loops import (
    Background,
    Exclusive,
    Monotonic,
    Starts,
    call_on,
    mind_forks,
    refuse,
    resolve,
    running_loop,
)

__all__ = [
    "Background",
    "Exclusive",
    "FileLock",
    "Monotonic",
    "Starts",
    "call_on",
    "mind_forks",
    "refuse",
    "replacing",
    "resolve",
    "running_loop",
]
