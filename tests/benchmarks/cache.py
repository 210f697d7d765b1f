"""The cache: answers read from a warm file, and commits, a second; memory of numbered requests.

    python tests/benchmarks/cache.py                   # 20,000 prompts: about a minute

Prints one line of JSON: prompts a second through `batch_generate` (at 10 and at 50 in flight) and through
`generate_response` one after the other, all from the cache, and commits a second of the store alone; then the
memory that 200,000 numbered requests take. Exit code 1 if a prompt was sent.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
import tracemalloc
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from openai_eval_client import OpenAIClient, OpenAIConfig, RateLimitConfig
from openai_eval_client._cache.cache import Occurrence, Occurrences
from openai_eval_client._cache.store import Store
from openai_eval_client.testing import SimulatedServer

WORDS = "Think about it carefully. " * 5


@dataclass
class Figures:
    """The figures of the benchmark; rates are per second."""

    prompts: int
    sent: int
    hits_at_10: float
    hits_at_50: float
    hits_one_by_one: float
    puts_at_100: float
    samples_mb: float


def connect(url: str, cache: Path, in_flight: int = 50) -> OpenAIClient:
    config = OpenAIConfig(api_key="sk-cache", base_url=url, default_model="gpt-4o-mini")
    limits = RateLimitConfig(requests_per_minute=None, tokens_per_minute=None, max_concurrent=in_flight)
    return OpenAIClient(config, rate_limit=limits, cache=cache)


async def warm(url: str, cache: Path, prompts: list[str], in_flight: int) -> float:
    """Return prompts answered a second, all at once and from the cache."""
    async with connect(url, cache, in_flight) as client:
        began = time.perf_counter()
        responses = await client.batch_generate(prompts, max_tokens=20)
        seconds = time.perf_counter() - began
        assert client.stats.cache_hits == len(responses) == len(prompts)
    return round(len(prompts) / seconds)


async def one_by_one(url: str, cache: Path, prompts: list[str]) -> float:
    """Return prompts answered a second, one after the other and from the cache."""
    async with connect(url, cache) as client:
        began = time.perf_counter()
        for prompt in prompts:
            await client.generate_response(prompt, max_tokens=20)
        return round(len(prompts) / (time.perf_counter() - began))


async def puts(path: Path, count: int) -> float:
    """Return commits a second of values of a usual size, with a hundred waiting at a time."""
    store, keys = Store(path), iter(range(count))

    async def worker() -> None:
        for n in keys:
            await store.put(n.to_bytes(32, "big"), bytes(1000))

    began = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(100)))
    seconds = time.perf_counter() - began
    await asyncio.to_thread(store.close)
    return round(count / seconds)


def samples_mb(count: int) -> float:
    """Return the megabytes that the occurrences of `count` different requests take."""
    keys = [Occurrence(b"", number, sampled=True).key for number in range(count)]
    samples, call = Occurrences(), object()
    tracemalloc.start()
    for key in keys:
        samples.take(key, call)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return round(size / 1e6, 1)


async def measure(server: SimulatedServer, folder: Path, count: int) -> Figures:
    cache, prompts = folder / "runs.sqlite", [f"{n} {WORDS}" for n in range(count)]
    async with connect(server.base_url, cache) as client:
        await client.batch_generate(prompts, max_tokens=20)
    asked = server.counts["200"]
    return Figures(
        prompts=count,
        hits_at_10=await warm(server.base_url, cache, prompts, 10),
        hits_at_50=await warm(server.base_url, cache, prompts, 50),
        hits_one_by_one=await one_by_one(server.base_url, cache, prompts[:2000]),
        puts_at_100=await puts(folder / "puts.sqlite", count),
        samples_mb=samples_mb(10 * count),
        sent=server.counts["200"] - asked,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=20_000)
    options = parser.parse_args()
    with SimulatedServer(process=True) as server, tempfile.TemporaryDirectory() as folder:
        figures = asyncio.run(measure(server, Path(folder), options.prompts))
    print(json.dumps(asdict(figures)))
    sys.exit(1 if figures.sent else 0)


if __name__ == "__main__":
    main()
