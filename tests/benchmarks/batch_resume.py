"""Kill a program that uses the Batch API with a cache, at any moment: is anything lost, or created twice?

    python tests/benchmarks/batch_resume.py --kills 20

The program is killed with SIGKILL again and again, each time a random moment after its start, and started
again with the same arguments: only the cache knows what was begun. Half of the trials call
`batch_generate(use_batch_api=True)`, half `submit_batch_job`. The server drops connections, cuts downloads
short and does not confirm some batches that it creates. Prints where the kills hit; exit code 1 if a request
was not answered in its place, or the server has more than one batch for the same requests.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from openai_eval_client import BatchConfig, BatchRequest, ModelResponse, OpenAIClient, OpenAIConfig
from openai_eval_client._batches.objects import JOB_KEY, LINES_KEY
from openai_eval_client.testing import SimulatedServer

FAULTS = {
    "retrieve": {"500": 0.03, "drop": 0.03},
    "content": {"truncate": 0.2, "drop": 0.1},
    "create": {"drop_after": 0.2, "500_after": 0.2},
    "upload": {"500": 0.1},
}
PARTS = 3
WAYS = ("generate", "submit")


@dataclass
class Verdict:
    """The result of all kills."""

    kills: Counter[str] = field(default_factory=Counter)
    answered: int = 0
    wrong: int = 0
    batches: int = 0
    batches_twice: int = 0

    @property
    def clean(self) -> bool:
        return not (self.wrong or self.batches_twice)


def connect(url: str, cache: Path, count: int) -> OpenAIClient:
    """Return a client that splits a job of `count` requests into several batches."""
    config = OpenAIConfig(api_key="any", base_url=url, default_model="gpt-4o-mini", max_retries=8)
    batch = BatchConfig(max_batch_size=-(-count // PARTS), polling_interval=0.05, auto_batch_threshold=1)
    return OpenAIClient(config, batch=batch, cache=cache)


async def answers(way: str, client: OpenAIClient, count: int) -> list[ModelResponse]:
    """Answer so many prompts by batches."""
    prompts = [f"p{n}" for n in range(count)]
    if way == "generate":
        return await client.batch_generate(prompts, use_batch_api=True)
    job = await client.submit_batch_job([BatchRequest(prompt=prompt) for prompt in prompts])
    while not (await client.get_batch_status(job.job_id)).has_ended:
        await asyncio.sleep(0.05)
    return await client.retrieve_batch_results(job.job_id)


async def work(url: str, way: str, cache: Path, count: int) -> None:
    """What the killed process does."""
    cache.with_suffix(".started").touch()
    async with connect(url, cache, count) as client:
        responses = await answers(way, client, count)
    wrong = sum(response.content != f"echo: p{n}" for n, response in enumerate(responses))
    cache.with_suffix(".wrong").write_text(str(wrong + abs(count - len(responses))))


def start(url: str, way: str, cache: Path, count: int) -> subprocess.Popen[bytes]:
    """Start the process, and return once it has set out."""
    begun = cache.with_suffix(".started")
    begun.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--url", url, "--way", way]
    child = subprocess.Popen([*command, "--cache", str(cache), "--requests", str(count)])
    while not begun.exists() and child.poll() is None:
        time.sleep(0.005)
    return child


def struck(server: SimulatedServer, before: int) -> str:
    """Return how far a trial's job was when its process was killed."""
    batches = server.batches[before:]
    if len(batches) < PARTS:
        return f"{len(batches)} of {PARTS} batches created"
    return "polling" if any(batch["status"] != "completed" for batch in batches) else "collecting"


def trial(server: SimulatedServer, way: str, cache: Path, count: int, moments: list[float]) -> Verdict:
    """Kill at each of these moments, let it end, and check."""
    verdict, before = Verdict(), len(server.batches)
    for moment in moments:
        child = start(server.base_url, way, cache, count)
        try:
            child.wait(moment)
        except subprocess.TimeoutExpired:
            verdict.kills[struck(server, before)] += 1
        finally:
            child.kill()
            child.wait()
        if cache.with_suffix(".wrong").exists():
            break
    else:
        child = start(server.base_url, way, cache, count)
        if child.wait(60):
            raise RuntimeError(f"the process ended with code {child.returncode}")
    verdict.wrong = int(cache.with_suffix(".wrong").read_text())
    verdict.answered = count - verdict.wrong
    made = server.batches[before:]
    places = Counter((batch["metadata"][JOB_KEY], batch["metadata"][LINES_KEY]) for batch in made)
    verdict.batches = len(made)
    verdict.batches_twice = len(made) - len(places) + abs(len(places) - PARTS)
    return verdict


def kill(kills: int, *, count: int = 300, seconds: float = 1.0, seed: int = 0) -> Verdict:
    """Run trials until at least `kills` processes were killed; a batch takes that many `seconds`."""
    total, moments = Verdict(), random.Random(seed)  # noqa: S311
    server = SimulatedServer(
        process=True, batch_seconds=seconds, endpoint_faults=FAULTS, file_lag=0.05, seed=seed
    )
    with server, tempfile.TemporaryDirectory() as folder:
        number = 0
        while total.kills.total() < kills:
            some = [moments.uniform(0, 2.5 * seconds) * moments.random() for _ in range(4)]
            way = WAYS[number % len(WAYS)]
            one = trial(server, way, Path(folder) / f"{number}.sqlite", count, some)
            number += 1
            total.kills += one.kills
            total.answered += one.answered
            total.wrong += one.wrong
            total.batches += one.batches
            total.batches_twice += one.batches_twice
    return total


def main() -> int:
    """Run as a script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--url")
    parser.add_argument("--way", choices=WAYS)
    parser.add_argument("--cache", type=Path)
    options = parser.parse_args()
    if options.cache:
        asyncio.run(work(options.url, options.way, options.cache, options.requests))
        return 0
    started = time.monotonic()
    verdict = kill(options.kills, count=options.requests, seed=options.seed)
    print(f"{verdict}\n{'clean' if verdict.clean else 'NOT CLEAN'} after {time.monotonic() - started:.0f} s")
    return not verdict.clean


if __name__ == "__main__":
    sys.exit(main())
