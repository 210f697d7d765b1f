"""A large batch job: memory of 120,000 requests, and CPU of their lines beside plain JSON.

    python tests/benchmarks/batch.py

Submits 120,000 requests (three files) to the simulated server, settles a file of 50,000 results and then the
whole job, and prints the peak memory of each step above that of the imports; then the CPU time of building
and reading 50,000 lines, as a ratio to json.dumps and json.loads of the same lines in the same run.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import gc
import json
import resource
import sys
import time
from pathlib import Path
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from openai_eval_client import BatchConfig, BatchRequest, OpenAIClient, OpenAIConfig
from openai_eval_client._batches.files import RequestIndex, check_requests, close_files, write_files
from openai_eval_client._batches.results import LineReader
from openai_eval_client.testing import SimulatedServer

TEXT = "Write a function that returns the sum of all even numbers below its argument, naïvely. " * 5
MEGABYTE = 1e6


def peak() -> float:
    """Return the peak memory of this process, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MEGABYTE


def requests(count: int) -> list[BatchRequest]:
    """Make requests of about 450 characters."""
    return [BatchRequest(prompt=f"{n} {TEXT}", temperature=0.5, max_tokens=200) for n in range(count)]


async def memory(count: int, per_file: int) -> dict[str, float]:
    """Return the peak memory of submitting, of settling one file, and of settling all."""
    with SimulatedServer(batch_seconds=1, process=True) as server:
        config = OpenAIConfig(api_key="any", base_url=server.base_url, default_model="gpt-4o-mini")
        async with OpenAIClient(config, batch=BatchConfig(max_batch_size=per_file)) as client:
            await client.generate_response("warm")  # so that late imports are done
            base = peak()
            job = await client.submit_batch_job(requests(count))
            figures = {"submitted": peak() - base}
            gc.collect()
            while (await client.get_batch_status(job.job_id)).status != "completed":
                await asyncio.sleep(0.2)
            first = await client.retrieve_batch_results(job.job_id.split("+")[0])
            figures["one file settled"] = peak() - base
            one = len(first)
            del first
            gc.collect()
            responses = await client.retrieve_batch_results(job.job_id)
            figures["all settled"] = peak() - base
    in_order = all(response.content.startswith(f"echo: {n} ") for n, response in enumerate(responses))
    return {"requests": count, "one file": one, "answered": len(responses), "in order": in_order, **figures}


def cpu(action: Any, *args: Any, **options: Any) -> tuple[float, Any]:
    """Return the CPU seconds of a call, and what it returns."""
    gc.collect()
    start = time.process_time()
    result = action(*args, **options)
    return time.process_time() - start, result


def build_ratio(count: int) -> tuple[float, float]:
    """Return the CPU seconds of checking and building lines, and their ratio to plain json.dumps."""
    given = requests(count)
    items = check_requests(given, api="chat", default_model="gpt-4o-mini")
    ours, files = cpu(write_files, items, most_lines=count)
    files[0].file.seek(0)
    objects = [json.loads(line) for line in files[0].file]
    close_files(files)
    plain, _ = cpu(lambda: collections.deque(map(json.dumps, objects), maxlen=0))
    return ours, ours / plain


async def read_ratios(count: int) -> tuple[float, float, float]:
    """Return the CPU seconds of reading results into responses, and their ratios to plain json.loads.

    The first ratio is to lines that are kept, as the responses are; the second to lines that are thrown away,
    with which the garbage collector has nothing to do.
    """
    with SimulatedServer(batch_seconds=0.5, process=True) as server:
        config = OpenAIConfig(api_key="any", base_url=server.base_url, default_model="gpt-4o-mini")
        async with OpenAIClient(config) as client:
            job = await client.submit_batch_job(requests(count))
            while (await client.get_batch_status(job.job_id)).status != "completed":
                await asyncio.sleep(0.2)
            batch = await client.openai.batches.retrieve(job.job_id)
            await client.retrieve_batch_results(job.job_id)  # so that the prices are loaded
            api = client._jobs._api
            file: IO[bytes] = await api.download(str(batch.output_file_id))
            reader = LineReader("chat", client._account.ledger.pricer_for(None))
    with file:
        ours, results = cpu(reader.read, [file], RequestIndex(range(count), temperature=0.5))
        if len(results.responses) != count:
            raise SystemExit(f"{len(results.responses)} of {count} results were read")
        del results
        file.seek(0)
        kept, _ = cpu(lambda: list(map(json.loads, file)))
        file.seek(0)
        thrown_away, _ = cpu(lambda: collections.deque(map(json.loads, file), maxlen=0))
    return ours, ours / kept, ours / thrown_away


def measure(count: int = 120_000, per_file: int = 50_000) -> dict[str, Any]:
    """Return all figures."""
    figures: dict[str, Any] = asyncio.run(memory(count, per_file))
    figures["build s"], figures["build ratio"] = build_ratio(per_file)
    names = ("read s", "read ratio", "read ratio, not kept")
    figures.update(zip(names, asyncio.run(read_ratios(per_file)), strict=True))
    return figures


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=120_000)
    parser.add_argument("--per-file", type=int, default=50_000)
    options = parser.parse_args()
    for name, figure in measure(options.count, options.per_file).items():
        print(f"{name:>20}: {figure:,.2f}" if isinstance(figure, float) else f"{name:>20}: {figure}")


if __name__ == "__main__":
    main()
