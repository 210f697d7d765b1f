"""How much memory prompts from a generator take: 20,000 beside 200,000, answered or only estimated.

    python tests/benchmarks/memory.py            # four runs, the longest about 5 minutes
    python tests/benchmarks/memory.py --quick    # a tenth of the prompts

Each run is a process of its own, and the simulated server another. The peak is the resident memory of the
whole process (VmHWM: unlike `ru_maxrss` it does not begin with that of the parent); "objects" is the peak
of what Python allocated after a warm-up of 2,000 prompts, by tracemalloc in a run of its own with a tenth of
the prompts, for it slows everything down. "ahead" is the most prompts that were taken and not yet consumed.
"""

from __future__ import annotations

import argparse
import asyncio
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
SIZES = (20_000, 200_000)
MOST = 1.1  # times the memory of the smaller run
TRACED = 10  # a traced run has so many times fewer prompts


@dataclass
class Figures:
    """What one run came to.

    Attributes:
        ahead: Most prompts taken and not yet consumed.
        peak: Resident memory, in MB.
        objects: What Python allocated since the warm-up, in MB; 0 where it was not traced.
    """

    road: str
    prompts: int
    answered: int = 0
    ahead: int = 0
    seconds: float = 0.0
    peak: float = 0.0
    objects: float = 0.0


class Source:
    """A generator of prompts that knows how far it is ahead of its consumer."""

    def __init__(self, prompts: int) -> None:
        self.prompts = prompts
        self.taken = self.consumed = self.ahead = 0

    def __iter__(self) -> Iterator[str]:
        for number in range(self.prompts):
            self.taken += 1
            self.ahead = max(self.ahead, self.taken - self.consumed)
            yield f"{number} {TEXT}"


def peak() -> float:
    """Return the most resident memory this process ever had, in MB."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes, where there is no /proc
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024 / 1e6


async def answer(client: OpenAIClient, source: Source, pause: float) -> int:
    """Consume the outcomes, with a pause after each; return how many are right."""
    right = 0
    async for index, outcome in client.as_completed(source, max_tokens=20):
        source.consumed += 1
        right += getattr(outcome, "content", "").startswith(f"echo: {index} ")
        if pause:
            await asyncio.sleep(pause)
    return right


async def measure(
    base_url: str,
    road: str,
    prompts: int,
    *,
    traced: bool = False,
    in_flight: int = 100,
    warm: int = WARM,
    pause: float = 0.0,
) -> Figures:
    """Run so many prompts in this process."""
    figures = Figures(road, prompts)
    limits = RateLimitConfig(requests_per_minute=None, tokens_per_minute=None, max_concurrent=in_flight)
    config = OpenAIConfig(api_key="sk-memory", base_url=base_url, default_model=MODEL)
    async with OpenAIClient(config, rate_limit=limits) as client:
        for count in (warm, prompts):
            source, began = Source(count), time.perf_counter()
            if road == "estimate":
                figures.answered = (await client.estimate(source, max_tokens=20)).requests
            else:
                figures.answered = await answer(client, source, pause)
                figures.ahead = source.ahead
            figures.seconds = time.perf_counter() - began
            if traced and count is warm:
                tracemalloc.start()
    figures.peak = peak()
    figures.objects = tracemalloc.get_traced_memory()[1] / 1e6 if traced else 0.0
    return figures


def in_a_process(base_url: str, road: str, prompts: int, *, traced: bool = False) -> Figures:
    """Run so many prompts in a process of its own."""
    command = [sys.executable, __file__, "--worker", json.dumps([base_url, road, prompts, traced])]
    return Figures(**json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout))


def row(figures: Figures) -> str:
    cells = (
        figures.road,
        figures.prompts,
        figures.answered,
        figures.ahead or "",
        f"{figures.seconds:.1f}",
        f"{figures.peak:.1f}",
        f"{figures.objects:.2f}",
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
    print("| road | prompts | right | ahead | s | peak MB | objects MB |\n| - | - | - | - | - | - | - |")
    flat = True
    for road in ("estimate", "as_completed"):
        both = []
        for size in SIZES:
            prompts = size // (10 if options.quick else 1)
            with SimulatedServer(process=True, record=100) as server:
                figures = in_a_process(server.base_url, road, prompts)
                traced = in_a_process(server.base_url, road, prompts // TRACED, traced=True)
            figures.objects = traced.objects
            both.append(figures)
            print(row(figures), flush=True)
        small, large = both
        ratios = large.peak / small.peak, large.objects / small.objects
        flat = flat and max(ratios) <= MOST and all(each.answered == each.prompts for each in both)
        print(f"{road}: {ratios[0]:.3f} x the peak, {ratios[1]:.3f} x the objects", flush=True)
    sys.exit(0 if flat else 1)


if __name__ == "__main__":
    main()
