"""What threads, event loops, forks and files ask of a library."""

from openai_eval_client._runtime.loops import (
    Background,
    DeferringLock,
    FileLock,
    StartThrottle,
    call_on,
    mind_forks,
    replacing,
    resolve,
    running_loop,
)

__all__ = [
    "Background",
    "DeferringLock",
    "FileLock",
    "StartThrottle",
    "call_on",
    "mind_forks",
    "replacing",
    "resolve",
    "running_loop",
]
