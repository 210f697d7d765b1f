"""Virtual time: an event loop that never sleeps, and a server with token buckets on it, without HTTP.

A run of minutes takes a second and is the same each time, so that counts can be asserted.
"""

from __future__ import annotations

import asyncio
import random
import selectors
from dataclasses import dataclass, field
from math import ceil
from typing import TYPE_CHECKING

from openai_eval_client import RateLimitConfig  # noqa: TC001
from openai_eval_client._account import Account
from openai_eval_client._limits.queue import ConcurrencyLimit
from openai_eval_client._wire.failures import Outcome, refused
from openai_eval_client._wire.requests import Demand
from openai_eval_client._wire.usage import Usage

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


class _Jump(selectors.DefaultSelector):
    """A selector that never sleeps: it counts how long it would have."""

    slept = 0.0

    def select(self, timeout=None):
        ready = super().select(0)
        if not ready and timeout is not None:
            self.slept += timeout
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time passes as soon as nothing else is to be done."""

    def __init__(self) -> None:
        self.jump = _Jump()
        super().__init__(self.jump)

    def time(self) -> float:
        return self.jump.slept


@dataclass
class FullBucket:
    """A server's bucket of one dimension."""

    per_minute: float
    window: float
    left: float = field(init=False)
    at: float = 0.0

    def __post_init__(self) -> None:
        self.left = self.capacity

    @property
    def capacity(self) -> float:
        return self.per_minute / 60 * self.window

    def now(self, time: float) -> float:
        self.left = min(self.capacity, self.left + (time - self.at) * self.per_minute / 60)
        self.at = time
        return self.left


@dataclass
class VirtualServer:
    """Admits by requests and tokens per minute over `window` seconds, and answers after a latency."""

    rpm: float
    tpm: float
    window: float = 60.0
    headers: bool = True
    retry_after: bool = True
    stamp: str = "answer"  # when the headers are made: at the "answer" or at "admission"
    latency: float = 0.5
    network: float = 0.003
    seed: int = 0
    refused: int = 0
    served: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)  # noqa: S311
        self.buckets = {
            "requests": FullBucket(self.rpm, self.window),
            "tokens": FullBucket(self.tpm, self.window),
        }

    async def answer(self, tokens: float) -> Outcome:
        """Serve one request."""
        loop = asyncio.get_running_loop()
        await asyncio.sleep(self.random.expovariate(1 / self.network))
        costs = {"requests": 1.0, "tokens": tokens}
        short = {
            name: (costs[name] - bucket.now(loop.time())) * 60 / bucket.per_minute
            for name, bucket in self.buckets.items()
            if bucket.now(loop.time()) < costs[name]
        }
        if short:
            self.refused += 1
            name, wait = max(short.items(), key=lambda item: item[1])
            await asyncio.sleep(self.network)
            waits = {"retry-after-ms": str(ceil(wait * 1000))} if self.retry_after else {}
            return refused(429, {**waits, **self.stamped(loop.time())}, (f"limit on {name} per min").encode())
        for name, bucket in self.buckets.items():
            bucket.left -= costs[name]
        early = self.stamped(loop.time())
        await asyncio.sleep(self.latency * self.random.lognormvariate(-0.03, 0.25))
        self.served += 1
        return Outcome(
            200, early if self.stamp == "admission" else self.stamped(loop.time()), Usage(int(tokens), 0)
        )

    def stamped(self, time: float) -> dict[str, str]:
        """Return the rate-limit headers."""
        if not self.headers:
            return {}
        stamps = {}
        for name, bucket in self.buckets.items():
            left = bucket.now(time)
            stamps[f"x-ratelimit-limit-{name}"] = str(int(bucket.per_minute))
            stamps[f"x-ratelimit-remaining-{name}"] = str(int(left))
            missing = (bucket.capacity - left) * 60 / bucket.per_minute
            stamps[f"x-ratelimit-reset-{name}"] = f"{missing * 1000:.0f}ms"
        return stamps


@dataclass
class RunFigures:
    """What a run came to."""

    ratio: float  # wall time over T*, the least possible
    refused: float  # 429s per request
    unanswered: int  # requests given up after `retries`


def rehearse(
    server: VirtualServer,
    config: RateLimitConfig | None,
    *,
    requests: int = 2000,
    tokens: int = 400,
    in_flight: int = 64,
    clients: int = 1,
    retries: int = 10,
    meanwhile: Callable[[], Awaitable[None]] | None = None,
) -> RunFigures:
    """Send that many requests through that many uncoordinated clients, in virtual time."""
    loop = VirtualLoop()
    unanswered = 0

    async def one(account: Account, concurrency: ConcurrencyLimit) -> None:
        nonlocal unanswered
        turn = account.limiter.next_turn()
        for _ in range(retries + 1):
            permit = await account.attempt(Demand("m", tokens, 0), concurrency=concurrency, turn=turn).begin()
            outcome = await server.answer(tokens)
            permit.settle(outcome)
            if outcome.status == 200:
                return
            if "retry-after-ms" not in outcome.headers:
                await asyncio.sleep(server.random.uniform(0, 2))
        unanswered += 1

    async def client(share: int) -> None:
        account, concurrency = Account(config, clock=loop), ConcurrencyLimit(in_flight)
        permit = await account.attempt(Demand("m", tokens, 0)).begin()  # one call to warm up
        permit.settle(await server.answer(tokens))
        await asyncio.gather(*[one(account, concurrency) for _ in range(share)])

    async def run_all() -> None:
        others = [meanwhile()] if meanwhile is not None else []
        await asyncio.gather(*[client(requests // clients) for _ in range(clients)], *others)

    try:
        loop.run_until_complete(run_all())
        wall = loop.time() - server.latency  # the call that warms up
    finally:
        loop.close()
    rate = min(server.tpm / tokens, server.rpm) / 60
    least = (requests - rate * server.window) / rate + server.latency
    return RunFigures(wall / least, server.refused / requests, unanswered)
