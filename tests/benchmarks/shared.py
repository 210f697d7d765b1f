"""Four processes on one quota and one Redis: wall time over the least possible time, also through failures.

    python tests/benchmarks/shared.py                # every row: about 7 minutes
    python tests/benchmarks/shared.py --rows kill

Needs redis-server. Server, load and T* are those of pacing.py; each process has a quarter of the prompts and
64 in flight. "least share" is what the slowest process had been served when the first was done, relative to
an equal part. After a kill, "full again" is the time until the others use 95% of the quota over 3 s.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
sys.path.insert(0, str(Path(__file__).parent))

from local_redis import LocalRedis
from pacing import LATENCY, MODEL, OUTPUT, RATE, RPM, TPM, prompt, ready, wrong

from openai_eval_client import OpenAIClient, OpenAIConfig, RateLimitConfig
from openai_eval_client.testing import SimulatedServer


@dataclasses.dataclass
class Row:
    """One row of the table."""

    name: str
    factors: tuple[float, ...] = (
        1,
        1,
        1,
        1,
    )  # each process's configured limits, as a multiple of the server's
    window: float = 60.0
    headers: bool = True
    prompts: int = 2000
    event: str = ""
    after: float = 10.0  # seconds into the run
    seconds: float = 5.0


ROWS = [
    Row("limits right, full-minute bucket"),
    Row("limits right, 5 s windows", window=5, prompts=900),
    Row("limits 4x too high, 5 s windows", (4, 4, 4, 4), window=5, prompts=900),
    Row("limits 4x too high, 5 s windows, no headers", (4, 4, 4, 4), window=5, prompts=900, headers=False),
    Row("configured limits differ: 1x, 1x, 2x, 4x; no headers", (1, 1, 2, 4), headers=False),
    Row("kill -9 of one after 10 s", window=5, prompts=1200, event="kill"),
    Row("Redis down for 5 s, back empty", window=5, prompts=900, event="stop"),
    Row("Redis down for 5 s, back empty, full-minute bucket", event="stop"),
    Row("Redis hangs for 5 s", window=5, prompts=900, event="hang"),
]


async def work(url: str, base_url: str, factor: float, number: int, count: int) -> None:
    """Run as one of the processes."""
    limits = RateLimitConfig(
        requests_per_minute=int(RPM * factor),
        tokens_per_minute=int(TPM * factor),
        max_concurrent=64,
        redis_url=url,
    )
    config = OpenAIConfig(api_key="sk-benchmark", base_url=base_url, default_model=MODEL, max_retries=10)
    indexes = range(number * count, (number + 1) * count)
    async with OpenAIClient(config, rate_limit=limits) as client:
        await client.generate_response(prompt(number * count), max_tokens=OUTPUT)
        ready()
        began = time.time()
        results = await client.batch_generate(
            [prompt(index) for index in indexes], max_tokens=OUTPUT, return_exceptions=True
        )
        failed = wrong(indexes, [getattr(result, "content", None) for result in results])
        print(json.dumps([began, time.time(), failed, client.stats.attempts]))


def start(arguments: list) -> subprocess.Popen:
    command = [sys.executable, __file__, "--worker", json.dumps(arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def disturb(row: Row, redis: LocalRedis, victim: subprocess.Popen) -> None:
    """Kill a process, or stop or hang Redis for a while, as the row says."""
    time.sleep(row.after)
    if row.event == "kill":
        victim.send_signal(signal.SIGKILL)
        return
    (redis.stop if row.event == "stop" else redis.hang)()
    time.sleep(row.seconds)
    (redis.start if row.event == "stop" else redis.go_on)()


def measure(row: Row) -> dict:
    """Run one row and return its figures."""
    count = row.prompts // len(row.factors)
    options = {"rpm": RPM, "tpm": TPM, "window": row.window, "headers": row.headers, "latency": LATENCY}
    with (
        LocalRedis() as redis,
        SimulatedServer(**options, process=True, cpu=(os.cpu_count() or 1) - 1) as server,
    ):
        workers = [start([redis.url, server.base_url, f, i, count]) for i, f in enumerate(row.factors)]
        for worker in workers:
            assert worker.stdout.readline() == "ready\n"
        before = redis.questions(), len(server.calls)
        for worker in workers:
            worker.stdin.write("go\n")
            worker.stdin.flush()
        if row.event:
            disturb(row, redis, workers[-1])
        outputs = [worker.communicate(timeout=600)[0] for worker in workers]
        calls = server.calls[before[1] :]
        questions = redis.questions() - (before[0] if row.event != "stop" else 0)
    ends = [json.loads(output) for output in outputs if output]
    assert len(ends) == len(workers) - (row.event == "kill")
    wall = max(end for _, end, _, _ in ends) - min(began for began, _, _, _ in ends)
    served = [call for call in calls if call.served]
    figures = {
        "case": row.name,
        "prompts": row.prompts,
        "wall": round(wall, 2),
        "ratio": round(wall / ((len(served) - RATE * row.window) / RATE + LATENCY), 3),
        "refused": round(sum(call.status == 429 for call in calls) / row.prompts, 4),
        "failed": sum(failed for _, _, failed, _ in ends),
        "least_share": round(least_share(served, count, [*range(len(workers) - (row.event == "kill"))]), 2),
        "questions": round(questions / len(calls), 2) if row.event != "stop" else None,
    }
    if row.event == "kill":
        figures["full_again"] = full_again(served, count, len(workers) - 1)
    return figures


def worker_of(call, count: int) -> int:
    return int(call.body["messages"][0]["content"][:8]) // count


def least_share(served: list, count: int, workers: list) -> float:
    """Return how much of an equal part the slowest process had been served when the first was done."""
    got: Counter = Counter()
    for call in served:
        got[worker_of(call, count)] += 1
        if got[worker_of(call, count)] == count:
            break
    parts = [got[number] for number in workers]
    return min(parts) * len(parts) / sum(parts)


def full_again(served: list, count: int, victim: int) -> float:
    """Return the seconds from the last request of the killed process until the quota was used again."""
    killed = max(call.at for call in served if worker_of(call, count) == victim)
    times = [call.at for call in served]
    for step in range(200):
        since = killed + step / 10
        if sum(since <= at < since + 3 for at in times) >= 0.95 * 3 * RATE:
            return step / 10
    return float("inf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--rows", default="", help="only rows whose name contains this")
    options = parser.parse_args()
    if options.worker:
        asyncio.run(work(*json.loads(options.worker)))
        return
    print("| case | prompts | wall s | wall / T* | 429s | failed | least share | Redis calls a request |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in ROWS:
        if options.rows in row.name:
            f = measure(row)
            cells = (f["case"], f["prompts"], f["wall"], f["ratio"], f"{f['refused']:.2%}", f["failed"])
            print(
                "| " + " | ".join(map(str, [*cells, f["least_share"], f["questions"] or ""])) + " |",
                flush=True,
            )
            if "full_again" in f:
                print(f"full again after {f['full_again']} s")


if __name__ == "__main__":
    main()
