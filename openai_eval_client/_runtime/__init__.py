"""What threads, event loops, forks and files ask of a library."""

from openai_eval_client._runtime.files import FileLock, replacing
from openai_eval_client._runtime.loops import (
    Background,
    DeferringLock,
    Monotonic,
    StartThrottle,
    call_on,
    mind_forks,
    resolve,
    running_loop,
)

__all__ = [
    "Background",
    "DeferringLock",
    "FileLock",
    "Monotonic",
    "StartThrottle",
    "call_on",
    "mind_forks",
    "replacing",
    "resolve",
    "running_loop",
]
