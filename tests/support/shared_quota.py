"""Many workers on one quota in virtual time: the real script in a real Redis, on the clock of the test."""

from __future__ import annotations

import asyncio
import itertools
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from openai_eval_client import RateLimitConfig  # noqa: TC001
from openai_eval_client._account import Account
from openai_eval_client._limits.queue import ConcurrencyLimit
from openai_eval_client._wire.requests import Demand

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from virtual import VirtualLoop, VirtualServer

_NAMES = itertools.count()
_EPOCH = 1_700_000_000.0  # what Redis's clock says when a run begins


class VirtualRedis:
    """The Redis of one run: it may be down, and counts the messages that it answers."""

    def __init__(self, client, loop: VirtualLoop, *, trip: float = 0.002) -> None:
        from openai_eval_client._limits.shared import script  # an extra

        self.loop = loop
        self.trip = trip
        self.down = False
        self.asked = 0
        self.epoch = _EPOCH
        self.client = client
        self._script = client.register_script(script())
        self._keys = [f"{{{next(_NAMES)}}}:state", f"{{{next(_NAMES)}}}:workers"]

    def answer(self, message: dict):
        if self.down:
            return ConnectionError("down")
        self.asked += 1
        message = {**message, "now": self.epoch + self.loop.time()}
        return [float(number) for number in self._script(self._keys, [json.dumps(message)])]

    def flush(self) -> None:
        """Forget everything, as a Redis does that is started again."""
        self.client.flushall()


class VirtualBackend:
    """One worker's way to the virtual Redis."""

    def __init__(self, redis: VirtualRedis) -> None:
        self.redis = redis
        self.name = f"worker {next(_NAMES)}"
        self.generation = self.workers = 0

    def ask(self, _model, message, done) -> None:
        """The reply comes a round trip later."""
        outcome = self.redis.answer({**message, "worker": self.name})
        if "leaving" not in message:
            self.redis.loop.call_later(self.redis.trip, done, outcome)

    def close(self) -> None:
        pass


@dataclass
class Fleet:
    """Workers that share a quota, and what came of their run."""

    redis: VirtualRedis
    server: VirtualServer
    configs: Sequence[RateLimitConfig]
    tokens: int = 400
    in_flight: int = 64
    retries: int = 10
    answered: list[int] = field(default_factory=list)  # by each worker
    sent: list[tuple[float, int]] = field(default_factory=list)  # when a request left, and whose it was
    unanswered: int = 0  # requests given up
    accounts: list[Account] = field(default_factory=list)
    wall: float = 0.0

    def __post_init__(self) -> None:
        self.answered = [0] * len(self.configs)

    async def one(self, number: int, concurrency: ConcurrencyLimit) -> None:
        loop, account = self.redis.loop, self.accounts[number]
        turn = account.limiter.next_turn()
        for _ in range(self.retries + 1):
            permit = await account.attempt(
                Demand("m", self.tokens, 0), concurrency=concurrency, turn=turn
            ).begin()
            self.sent.append((loop.time(), number))
            outcome = await self.server.answer(self.tokens)
            permit.settle(outcome)
            if outcome.status == 200:
                self.answered[number] += 1
                return
            if "retry-after-ms" not in outcome.headers:
                await asyncio.sleep(self.server.random.uniform(0, 2))
        self.unanswered += 1

    async def worker(self, number: int, requests: int) -> None:
        concurrency, left = ConcurrencyLimit(self.in_flight), iter(range(requests))

        async def send_in_turn() -> None:
            for _ in left:
                await self.one(number, concurrency)

        await asyncio.gather(*[send_in_turn() for _ in range(min(self.in_flight, requests))])
        self.accounts[number].limiter.leave()

    def run(self, requests: int, meanwhile: Callable[[Fleet], Awaitable[None]] | None = None) -> Fleet:
        """Send so many requests through each worker, in virtual time."""
        loop = self.redis.loop
        for config in self.configs:
            account = Account(config, clock=loop)
            account.limiter._backend = VirtualBackend(self.redis)
            self.accounts.append(account)

        async def run_all() -> None:
            others = [meanwhile(self)] if meanwhile is not None else []
            workers = [self.worker(number, requests) for number in range(len(self.configs))]
            self.tasks = [asyncio.create_task(worker) for worker in workers]
            await asyncio.gather(*self.tasks, *others, return_exceptions=bool(others))

        loop.run_until_complete(run_all())
        self.wall = loop.time()
        return self

    @property
    def ratio(self) -> float:
        """Wall time over the least possible."""
        server = self.server
        rate = min(server.tpm / self.tokens, server.rpm) / 60
        least = (sum(self.answered) - rate * server.window) / rate + server.latency
        return self.wall / least

    def most_in(self, seconds: float) -> int:
        """Return the most requests sent in so many seconds on end."""
        times, first, most = [at for at, _ in self.sent], 0, 0
        for last, at in enumerate(times):
            while times[first] < at - seconds:
                first += 1
            most = max(most, last - first + 1)
        return most
