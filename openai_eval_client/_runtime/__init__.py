"""What threads, event loops, forks and files ask of a library."""

from openai_eval_client._runtime.loops import (
    STATE_LOCK,
    Background,
    DeferringLock,
    FairQueue,
    FileLock,
    ForkAware,
    Queued,
    StartThrottle,
    call_on,
    check_loop,
    mind_forks,
    replacing,
    running_loop,
)

__all__ = [
    "STATE_LOCK",
    "Background",
    "DeferringLock",
    "FairQueue",
    "FileLock",
    "ForkAware",
    "Queued",
    "StartThrottle",
    "call_on",
    "check_loop",
    "mind_forks",
    "replacing",
    "running_loop",
]
