"""Pacing: wall time over the least possible time, and 429s, of this package and of the raw SDK.

    python tests/benchmarks/pacing.py            # every row: about 20 minutes
    python tests/benchmarks/pacing.py --quick    # a fifth of the prompts
    python tests/benchmarks/pacing.py --rows "4x" --json figures.json

The simulated server runs in a process of its own, on another core than the clients if there are two.
Its token buckets refill continuously; tokens bind at 20 requests of 400 tokens a second, the latency is
0.5 s lognormal, 64 requests are in flight. T* = (prompts - what the server's full bucket admits at once) /
rate + one latency: no client can be faster. Each client first makes one call to warm up.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from openai_eval_client import OpenAIClient, OpenAIConfig, RateLimitConfig
from openai_eval_client.testing import SimulatedServer

RPM, TPM, TOKENS, LATENCY = 1800, 480_000, 400, 0.5
RATE = TPM / TOKENS / 60
MODEL = "gpt-4o-mini"
OUTPUT = 20


@dataclasses.dataclass
class Row:
    """One row of the table."""

    name: str
    factor: int | None = 1  # the configured limits, as a multiple of the server's; None: not configured
    window: float = 60.0
    headers: bool = True
    in_flight: int = 64
    clients: int = 1
    client: str = "OpenAIClient"

    @property
    def prompts(self) -> int:
        return 2000 if self.window == 60 else 900


ROWS = [
    Row("limits right, full-minute bucket"),
    Row("limits right, 5 s windows", window=5),
    Row("limits 4x too high, 5 s windows, 64 in flight", factor=4, window=5),
    Row("limits 4x too high, 5 s windows, 256 in flight", factor=4, window=5, in_flight=256),
    Row("limits 4x too high, 5 s windows, no headers", factor=4, window=5, headers=False),
    Row("no limits configured, 5 s windows", factor=None, window=5),
    Row("two processes, one quota", clients=2),
    Row("four processes, one quota", clients=4),
    Row("raw AsyncOpenAI + gather, 5 s windows", window=5, client="raw"),
    Row("raw AsyncOpenAI + gather, full-minute bucket", client="raw"),
]


def prompt(index: int) -> str:
    """Return a prompt of 400 tokens with its answer, by the server's count and about so by tiktoken's."""
    return f"{index:08d}" + " the" * (TOKENS - OUTPUT - 6 - 2)


async def ours(base_url: str, row: Row, indexes: range) -> tuple[float, float, int]:
    rpm, tpm = (RPM * row.factor, TPM * row.factor) if row.factor else (None, None)
    limits = RateLimitConfig(requests_per_minute=rpm, tokens_per_minute=tpm, max_concurrent=row.in_flight)
    config = OpenAIConfig(api_key="sk-benchmark", base_url=base_url, default_model=MODEL, max_retries=10)
    async with OpenAIClient(config, rate_limit=limits) as client:
        await client.generate_response(prompt(0), max_tokens=OUTPUT)
        ready()
        began = time.time()
        results = await client.batch_generate(
            [prompt(index) for index in indexes], max_tokens=OUTPUT, return_exceptions=True
        )
        return began, time.time(), wrong(indexes, [getattr(r, "content", None) for r in results])


async def raw(base_url: str, row: Row, indexes: range) -> tuple[float, float, int]:
    import openai

    bound = asyncio.Semaphore(row.in_flight)
    async with openai.AsyncOpenAI(api_key="sk-benchmark", base_url=base_url) as client:

        async def one(index: int) -> str:
            async with bound:
                message = {"role": "user", "content": prompt(index)}
                answer = await client.chat.completions.create(
                    model=MODEL, messages=[message], max_tokens=OUTPUT
                )
                return answer.choices[0].message.content

        await one(0)
        ready()
        began = time.time()
        results = await asyncio.gather(*[one(index) for index in indexes], return_exceptions=True)
        return began, time.time(), wrong(indexes, results)


def ready() -> None:
    """Tell the parent process, and wait until it says go."""
    print("ready", flush=True)
    sys.stdin.readline()


def wrong(indexes: range, answers: list) -> int:
    """Count the prompts that were not answered, or not in order."""
    expected = [f"echo: {index:08d}" for index in indexes]
    return sum(not isinstance(a, str) or not a.startswith(e) for a, e in zip(answers, expected, strict=True))


def measure(row: Row, share: float) -> dict:
    """Run one row and return its figures."""
    prompts = max(int(row.prompts * share), int(RATE * row.window) + 100)
    cores = os.cpu_count() or 1
    server = SimulatedServer(
        rpm=RPM, tpm=TPM, window=row.window, headers=row.headers, latency=LATENCY, process=True, cpu=cores - 1
    )
    with server:
        share_of_one = prompts // row.clients
        workers = [
            subprocess.Popen(
                [
                    sys.executable,
                    __file__,
                    "--worker",
                    json.dumps([server.base_url, dataclasses.asdict(row), i, share_of_one]),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for i in range(row.clients)
        ]
        for worker in workers:
            assert worker.stdout.readline() == "ready\n"
        for worker in workers:
            worker.stdin.write("go\n")
            worker.stdin.flush()
        ends = [json.loads(worker.communicate(timeout=600)[0]) for worker in workers]
        refused = server.counts["429"]
    wall = max(end for _, end, _ in ends) - min(began for began, _, _ in ends)
    least = (prompts - RATE * row.window) / RATE + LATENCY
    return {
        "case": row.name,
        "prompts": prompts,
        "wall": round(wall, 2),
        "ratio": round(wall / least, 3),
        "refused": round(refused / prompts, 4),
        "failed": sum(failed for _, _, failed in ends),
    }


def work(base_url: str, row: dict, number: int, count: int) -> None:
    """Run as one client process."""
    if hasattr(os, "sched_setaffinity") and (os.cpu_count() or 1) > 1:
        os.sched_setaffinity(0, {0})
    options = Row(**row)
    run = raw if options.client == "raw" else ours
    print(json.dumps(asyncio.run(run(base_url, options, range(number * count, (number + 1) * count)))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="a fifth of the prompts")
    parser.add_argument("--rows", default="", help="only rows whose name contains this")
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    if options.worker:
        work(*json.loads(options.worker))
        return
    print("| case | prompts | wall s | wall / T* | 429s | failed |\n| --- | --- | --- | --- | --- | --- |")
    figures = []
    for row in ROWS:
        if options.rows not in row.name:
            continue
        f = measure(row, 0.2 if options.quick else 1.0)
        figures.append(f)
        cells = (f["case"], f["prompts"], f["wall"], f["ratio"], f"{f['refused']:.2%}", f["failed"])
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
