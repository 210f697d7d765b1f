"""Memory of prompts from a generator: 20,000 beside 200,000, answered or only estimated.

    python tests/benchmarks/memory.py            # the longest run takes about 5 minutes
    python tests/benchmarks/memory.py --quick    # a tenth of the prompts

Each run is a process of its own, and the simulated server another. The peak is the resident memory of the
whole process (VmHWM, which unlike `ru_maxrss` does not include the parent's). "kept" is what Python
allocated after a warm-up of 2,000 prompts and still holds at the end, measured by tracemalloc in a run of its
own with a tenth of the prompts, since it is slow. "ahead" is the most prompts that were taken and not yet
consumed. Exit code 1 if the larger run's peak is above 1.1 times the smaller's, or 50 bytes or more are kept
of each prompt.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import resource
import subprocess
import sys
import time
import tracemalloc
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[2]))

from openai_eval_client import OpenAIClient, OpenAIConfig, RateLimitConfig
from openai_eval_client.testing import SimulatedServer

if TYPE_CHECKING:
    from collections.abc import Iterator

MODEL = "gpt-4o-mini"
TEXT = "Write a function that returns the sum of all even numbers below its argument. " * 4
WARM = 2000
LATENCY = 0.1  # seconds; long enough that as many are in flight as allowed
FIRST_PAUSE = 1.0  # seconds of the consumer at the first outcome; as many are taken ahead as allowed
SIZES = (20_000, 200_000)
MOST = 1.1  # times the memory of the smaller run
KEPT = 50  # bytes of a prompt
TRACED = 10  # a traced run has a tenth of the prompts


@dataclass
class Figures:
    """The figures of one run."""

    method: str
    prompts: int
    answered: int = 0
    ahead: int = 0  # most prompts taken and not yet consumed
    seconds: float = 0.0
    peak: float = 0.0  # MB of resident memory
    kept: float = 0.0  # KB allocated since the warm-up and still held; 0 if not traced


class Source:
    """Prompts from a generator, and how far it is ahead of its consumer."""

    def __init__(self, prompts: int) -> None:
        self.prompts = prompts
        self.taken = self.consumed = self.ahead = 0

    def __iter__(self) -> Iterator[str]:
        for number in range(self.prompts):
            self.taken += 1
            self.ahead = max(self.ahead, self.taken - self.consumed)
            yield f"{number} {TEXT}"


def peak() -> float:
    """Return the peak of this process's resident memory, in MB."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes, on systems without /proc
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024 / 1e6


async def answer(client: OpenAIClient, source: Source, pause: float) -> int:
    """Consume the outcomes, with a pause after each; return how many are right."""
    right = 0
    async for index, outcome in client.as_completed(source, max_tokens=20):
        source.consumed += 1
        right += getattr(outcome, "content", "").startswith(f"echo: {index} ")
        await asyncio.sleep(FIRST_PAUSE if source.consumed == 1 else pause)
    return right


async def measure(
    base_url: str,
    method: str,
    prompts: int,
    *,
    traced: bool = False,
    in_flight: int = 100,
    warm: int = WARM,
    pause: float = 0.0,
) -> Figures:
    """Run `prompts` prompts in this process."""
    figures = Figures(method, prompts)
    limits = RateLimitConfig(requests_per_minute=None, tokens_per_minute=None, max_concurrent=in_flight)
    config = OpenAIConfig(api_key="sk-memory", base_url=base_url, default_model=MODEL)
    async with OpenAIClient(config, rate_limit=limits) as client:
        for count in (warm, prompts):
            source, began = Source(count), time.perf_counter()
            if method == "estimate":
                figures.answered = (await client.estimate(source, max_tokens=20)).requests
            else:
                figures.answered = await answer(client, source, pause)
                figures.ahead = source.ahead
            figures.seconds = time.perf_counter() - began
            if traced and count is warm:
                tracemalloc.start()
        gc.collect()
        figures.kept = tracemalloc.get_traced_memory()[0] / 1e3
    figures.peak = peak()
    return figures


def in_a_process(base_url: str, method: str, prompts: int, *, traced: bool = False) -> Figures:
    """Run `prompts` prompts in a new process."""
    command = [sys.executable, __file__, "--worker", json.dumps([base_url, method, prompts, traced])]
    return Figures(**json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout))


def row(figures: Figures) -> str:
    cells = (
        figures.method,
        figures.prompts,
        figures.answered,
        figures.ahead or "",
        f"{figures.seconds:.1f}",
        f"{figures.peak:.1f}",
        f"{figures.kept:.0f}",
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="a tenth of the prompts")
    options = parser.parse_args()
    if options.worker:
        *run, traced = json.loads(options.worker)
        print(json.dumps(asdict(asyncio.run(measure(*run, traced=traced)))))
        return
    print("| method | prompts | right | ahead | s | peak MB | kept KB |\n| - | - | - | - | - | - | - |")
    flat = True
    for method in ("estimate", "as_completed"):
        both = []
        for size in SIZES:
            prompts = size // (10 if options.quick else 1)
            with SimulatedServer(process=True, record=100, latency=LATENCY) as server:
                figures = in_a_process(server.base_url, method, prompts)
                traced = in_a_process(server.base_url, method, prompts // TRACED, traced=True)
            figures.kept = traced.kept
            both.append(figures)
            print(row(figures), flush=True)
        small, large = both
        ratio = large.peak / small.peak
        of_each = (large.kept - small.kept) * 1e3 / ((large.prompts - small.prompts) / TRACED)
        flat = flat and ratio <= MOST and of_each < KEPT and all(run.answered == run.prompts for run in both)
        print(f"{method}: {ratio:.3f} x the peak, {of_each:.1f} bytes more for each prompt", flush=True)
    sys.exit(0 if flat else 1)


if __name__ == "__main__":
    main()
