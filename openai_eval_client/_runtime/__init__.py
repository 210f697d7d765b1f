"""What threads, event loops, forks and files ask of a library."""

from openai_eval_client._runtime.loops import (
    Background,
    DeferringLock,
    FairQueue,
    FileLock,
    Queued,
    StartThrottle,
    call_on,
    mind_forks,
    replacing,
    running_loop,
)

__all__ = [
    "Background",
    "DeferringLock",
    "FairQueue",
    "FileLock",
    "Queued",
    "StartThrottle",
    "call_on",
    "mind_forks",
    "replacing",
    "running_loop",
]
