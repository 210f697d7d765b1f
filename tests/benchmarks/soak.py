"""A long run of mixed sizes, faults and changing limits: does anything grow, hang, or stay behind?

    python tests/benchmarks/soak.py --minutes 20

Prints a line every ten seconds (answered, failed, 429s, memory, tasks, connections) and ends with a verdict;
exit code 1 if a prompt was not answered in order, or anything was left behind.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from openai_eval_client import OpenAIClient, OpenAIConfig, RateLimitConfig
from openai_eval_client.testing import SimulatedServer

FAULTS = {
    "500": 0.03,
    "503": 0.01,
    "drop": 0.02,
    "truncate": 0.01,
    "cut_json": 0.01,
    "hang": 0.002,
    "429": 0.005,
}
LIMITS = [(6000, 1_500_000), (2400, 600_000), (600, 1_500_000), (9000, 300_000)]  # RPM, TPM
SIZES = (5, 20, 100, 400, 2000)  # words


@dataclass
class Verdict:
    """The result of the run."""

    seconds: float
    answered: int
    failed: int
    out_of_order: int
    refused: float
    memory_mb_early: float
    memory_mb_late: float
    tasks_left: int
    slots_left: int
    connections_left: int

    @property
    def clean(self) -> bool:
        left = self.tasks_left + self.slots_left + self.connections_left
        return not (self.failed or self.out_of_order or left)


def memory() -> float:
    """Return the resident memory of this process, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return 0.0


async def soak(server: SimulatedServer, seconds: float, *, batch: int = 200, seed: int = 0) -> Verdict:
    """Run list after list of prompts for that long; the server's limits change eight times meanwhile."""
    generator = random.Random(seed)  # noqa: S311
    config = OpenAIConfig(
        api_key="sk-soak", base_url=server.base_url, default_model="gpt-4o-mini", max_retries=10, timeout=3.0
    )
    limits = RateLimitConfig(requests_per_minute=9000, tokens_per_minute=1_500_000, max_concurrent=100)
    before = len(asyncio.all_tasks())
    began, printed_at, number = time.monotonic(), 0.0, 0
    answered = failed = out_of_order = 0
    early = None
    async with OpenAIClient(config, rate_limit=limits) as client:
        while (passed := time.monotonic() - began) < seconds:
            rpm, tpm = LIMITS[int(8 * passed / seconds) % len(LIMITS)]
            server.set_limits(rpm=rpm, tpm=tpm)
            prompts = [f"{number + i} " + "word " * generator.choice(SIZES) for i in range(batch)]
            results = await client.batch_generate(prompts, max_tokens=20, return_exceptions=True)
            for offset, result in enumerate(results):
                failed += isinstance(result, Exception)
                content = getattr(result, "content", f"echo: {number + offset} ")
                out_of_order += not content.startswith(f"echo: {number + offset} ")
            number += batch
            answered = number - failed
            if passed > seconds / 4 and early is None:
                early = memory()
            if passed - printed_at >= 10:
                printed_at = passed
                stats = client.stats
                print(
                    f"{passed:6.0f} s  {answered:7d} answered  {failed} failed  {stats.rate_limited} x 429  "
                    f"{stats.retries} retries  {memory():.0f} MB  {len(asyncio.all_tasks())} tasks  "
                    f"{server.connections} connections",
                    flush=True,
                )
        late = memory()
        slots = sum(
            limit.in_flight
            for queue in client._account.limiter._queues.values()
            for limit in queue._concurrency_limits
        )
        stats = client.stats
    for _ in range(200):
        if not server.connections:
            break
        await asyncio.sleep(0.05)
    return Verdict(
        seconds=round(time.monotonic() - began, 1),
        answered=answered,
        failed=failed,
        out_of_order=out_of_order,
        refused=round(stats.rate_limited / max(stats.attempts, 1), 4),
        memory_mb_early=round(early or late, 1),
        memory_mb_late=round(late, 1),
        tasks_left=len(asyncio.all_tasks()) - before,
        slots_left=slots,
        connections_left=server.connections,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20.0)
    options = parser.parse_args()
    rpm, tpm = LIMITS[0]
    with SimulatedServer(
        rpm=rpm, tpm=tpm, window=5, latency=0.3, faults=FAULTS, seed=1, process=True, record=1000
    ) as server:
        verdict = asyncio.run(soak(server, options.minutes * 60))
    print(json.dumps(asdict(verdict)))
    sys.exit(0 if verdict.clean else 1)


if __name__ == "__main__":
    main()
