"""Many workers on one shared quota, on a virtual clock, with the real script in a real Redis.

    python tests/benchmarks/shared_paper.py                    # about a minute
    python tests/benchmarks/shared_paper.py --workers 10

Needs redis-server. The quota is 20 requests of 400 tokens a second; the server keeps a full minute of it and
sends headers, the latency is 0.5 s, a round trip to Redis takes 2 ms. Each worker sends as much as it can, 64
requests at once. "overshoot" is the most that was sent in any 60 s, relative to what the limit allows in that
time (a full bucket and a minute's quota). In the second run Redis is lost for 60 s and comes back empty.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from local_redis import LocalRedis
from shared_quota import Fleet, VirtualRedis
from virtual import VirtualLoop, VirtualServer

from openai_eval_client import RateLimitConfig

RPM, TPM, RATE = 1800, 480_000, 20.0
AT_ONCE = RATE * 120  # a full bucket and a minute's quota
LOST, BACK = 70.0, 130.0  # seconds into the run


def measure(client, workers: int, *, seconds: float, lost: bool) -> Fleet:
    """Run that many workers for about that many seconds."""
    loop = VirtualLoop()
    limits = RateLimitConfig(requests_per_minute=RPM, tokens_per_minute=TPM, max_concurrent=64)
    fleet = Fleet(VirtualRedis(client, loop), VirtualServer(RPM, TPM), [limits] * workers)

    async def lose(fleet: Fleet) -> None:
        await asyncio.sleep(LOST)
        fleet.redis.down = True
        await asyncio.sleep(BACK - LOST)
        fleet.redis.flush()
        fleet.redis.down = False

    client.flushall()
    client.config_resetstat()
    try:
        return fleet.run(int(RATE * (seconds + 60) / workers), lose if lost else None)
    finally:
        loop.close()


def figures(client, workers: int, *, seconds: float = 240.0) -> dict:
    """Return the figures of both runs."""
    calm = measure(client, workers, seconds=seconds, lost=False)
    script = client.info("commandstats")["cmdstat_evalsha"]
    stormy = measure(client, workers, seconds=seconds, lost=True)
    return {
        "workers": workers,
        "Redis calls/s": round(calm.redis.asked / calm.wall, 1),
        "of Redis's time": script["usec"] / 1e6 / calm.wall,
        "wall / T*": round(calm.ratio, 3),
        "s between two requests of a worker": round(workers / RATE, 1),
        "overshoot": calm.most_in(60) / AT_ONCE,
        "429s": calm.server.refused / sum(calm.answered),
        "lost: wall / T*": round(stormy.ratio, 3),
        "lost: overshoot": stormy.most_in(60) / AT_ONCE,
        "lost: 429s": stormy.server.refused / sum(stormy.answered),
        "failed": calm.unanswered + stormy.unanswered,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="*", default=[10, 100, 1000])
    options = parser.parse_args()
    with LocalRedis() as redis, redis.client() as client:
        for number, workers in enumerate(options.workers):
            row = figures(client, workers)
            if not number:
                print("| " + " | ".join(row) + " |\n|" + " --- |" * len(row))
            cells = [
                f"{cell:.1%}" if isinstance(cell, float) and name in PERCENT else cell
                for name, cell in row.items()
            ]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)


PERCENT = {"of Redis's time", "overshoot", "429s", "lost: overshoot", "lost: 429s"}


if __name__ == "__main__":
    main()
