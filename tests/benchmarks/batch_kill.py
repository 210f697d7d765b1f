"""Kill a program that waits for a batch job, again and again: is anything lost, or created twice?

    python tests/benchmarks/batch_kill.py --kills 20

Each time a process submits a job, notes its job_id, waits for its end and collects the results; it is killed
with SIGKILL at a random moment after the job_id came back. Another process goes on from the job_id. The
server drops connections and cuts downloads short meanwhile. Prints where the kills hit; exit code 1 if a
request was not answered in its place, or the server has more than one batch for the same requests.
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
    "retrieve": {"500": 0.05, "drop": 0.05},
    "content": {"truncate": 0.4, "drop": 0.2},
    "create": {"drop_after": 0.2, "500_after": 0.2},
    "upload": {"500": 0.1},
}
ENDED = ("completed", "failed", "expired", "cancelled")
PARTS = 3


@dataclass
class Verdict:
    """The result of all kills."""

    kills: Counter[str] = field(default_factory=Counter)
    answered: int = 0
    wrong: int = 0
    batches_twice: int = 0

    @property
    def clean(self) -> bool:
        return not (self.wrong or self.batches_twice)


def connect(url: str, count: int) -> OpenAIClient:
    """Return a client that splits a job of `count` requests into several batches."""
    config = OpenAIConfig(api_key="any", base_url=url, default_model="gpt-4o-mini", max_retries=8)
    return OpenAIClient(config, batch=BatchConfig(max_batch_size=-(-count // PARTS)))


async def settled(client: OpenAIClient, job_id: str, note: Path | None = None) -> list[ModelResponse]:
    """Wait for the end of a job and return its responses; leave a file at each step."""
    while (await client.get_batch_status(job_id)).status not in ENDED:
        await asyncio.sleep(0.02)
    if note:
        note.with_suffix(".ended").touch()
    responses = await client.retrieve_batch_results(job_id)
    if note:
        note.with_suffix(".collected").touch()
    return responses


async def work(url: str, count: int, note: Path) -> None:
    """Run as the process that is killed."""
    async with connect(url, count) as client:
        requests = [BatchRequest(prompt=f"p{n}", temperature=n % 7 / 10) for n in range(count)]
        job = await client.submit_batch_job(requests)
        half = note.with_suffix(".half")
        half.write_text(job.job_id)
        half.rename(note)
        await settled(client, job.job_id, note)


def struck(note: Path) -> str:
    """Return where a process was when it was killed."""
    if note.with_suffix(".collected").exists():
        return "afterwards"
    return "collecting" if note.with_suffix(".ended").exists() else "polling"


async def kill_once(server: SimulatedServer, note: Path, count: int, moment: float) -> str:
    """Run the process and kill it `moment` seconds after it noted the job_id; return where it was."""
    command = [
        sys.executable,
        __file__,
        "--url",
        server.base_url,
        "--note",
        str(note),
        "--requests",
        str(count),
    ]
    child = subprocess.Popen(command)
    try:
        while not note.exists():
            if child.poll() is not None:
                raise RuntimeError(f"the process ended by itself, with code {child.returncode}")
            await asyncio.sleep(0.005)
        await asyncio.sleep(moment)
    finally:
        child.kill()
        child.wait()
    return struck(note)


async def trial(server: SimulatedServer, note: Path, count: int, moment: float, verdict: Verdict) -> None:
    """Kill once, go on from the job_id, and check."""
    before = len(server.batches)
    verdict.kills[await kill_once(server, note, count, moment)] += 1
    job_id = note.read_text()
    async with connect(server.base_url, count) as client:
        responses = await settled(client, job_id)
    for n, response in enumerate(responses):
        right = (response.content, response.temperature) == (f"echo: p{n}", n % 7 / 10)
        verdict.answered += right
        verdict.wrong += not right
    verdict.wrong += abs(count - len(responses))
    made = server.batches[before:]
    places = Counter((batch["metadata"][JOB_KEY], batch["metadata"][LINES_KEY]) for batch in made)
    verdict.batches_twice += sum(many - 1 for many in places.values())
    verdict.batches_twice += abs(len(places) - len(job_id.split("+")))


async def kill(kills: int, *, count: int = 300, seconds: float = 1.0, seed: int = 0) -> Verdict:
    """Kill `kills` processes, each within three times the `seconds` that a batch takes."""
    verdict = Verdict()
    moments = random.Random(seed)  # noqa: S311
    server = SimulatedServer(process=True, batch_seconds=seconds, endpoint_faults=FAULTS, seed=seed)
    with server, tempfile.TemporaryDirectory() as folder:
        for number in range(kills):
            moment = moments.uniform(0, 3 * seconds)
            await trial(server, Path(folder) / f"job{number}", count, moment, verdict)
    return verdict


def main() -> int:
    """Run as a script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--url")
    parser.add_argument("--note", type=Path)
    options = parser.parse_args()
    if options.note:
        asyncio.run(work(options.url, options.requests, options.note))
        return 0
    started = time.monotonic()
    verdict = asyncio.run(kill(options.kills, count=options.requests))
    print(f"{verdict}\n{'clean' if verdict.clean else 'NOT CLEAN'} after {time.monotonic() - started:.0f} s")
    return not verdict.clean


if __name__ == "__main__":
    sys.exit(main())
