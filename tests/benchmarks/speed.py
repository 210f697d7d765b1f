"""What a request costs in CPU, beside the raw SDK and others: each in a process of its own, interleaved.

    python tests/benchmarks/speed.py                     # 100 and 1,000 in flight, medians of 5; 5 minutes
    python tests/benchmarks/speed.py --quick             # 500 prompts, once
    python tests/benchmarks/speed.py --only ours,raw --in-flight 100 --json speed.json

The simulated server runs on the last core, the clients one after the other on the first. A client warms up
with as many prompts as are in flight, and is measured over the next ones: the CPU time of its process, the
wall time, and in the end its peak of resident memory. Where they are installed, lm-deluge, litellm and
langchain-openai are measured too. Exit code 1 if a bar of BARS is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import openai

from openai_eval_client import AsyncOpenAI, OpenAIClient, OpenAIConfig, RateLimitConfig
from openai_eval_client.testing import SimulatedServer

MODEL = "gpt-4o-mini"
ASKED = {"model": MODEL, "max_tokens": 20}
KEY = "sk-benchmark"
ANY = 10**9  # requests or tokens a minute: no limit binds
LATENCY = 0.05  # seconds
BARS = {  # times the CPU of the raw SDK, by requests in flight
    "batch_generate": {100: 0.35, 1000: 0.20},
    "client.openai": {100: 0.70, 1000: 0.35},
}

Run = Callable[[list[str]], Awaitable[Any]]
Measured = Callable[[Run], Awaitable[None]]


def texts(count: int) -> list[str]:
    """Return prompts of about 350 characters, no two alike."""
    return [
        f"Question {n}: " + "which of the two numbers is larger, and why is it so? " * 6 for n in range(count)
    ]


def each(call: Callable[[str], Awaitable[Any]], in_flight: int) -> Run:
    """Return what an evaluator writes by hand: `gather` and a semaphore."""

    async def run(prompts: list[str]) -> None:
        room = asyncio.Semaphore(in_flight)

        async def one(prompt: str) -> None:
            async with room:
                await call(prompt)

        await asyncio.gather(*map(one, prompts))

    return run


def creating(client: Any) -> Callable[[str], Awaitable[Any]]:
    """Return a call of the SDK."""
    return lambda prompt: client.chat.completions.create(
        messages=[{"role": "user", "content": prompt}], **ASKED
    )


async def raw(url: str, in_flight: int, measured: Measured) -> None:
    """The SDK as it is."""
    async with openai.AsyncOpenAI(api_key=KEY, base_url=url) as client:
        await measured(each(creating(client), in_flight))


async def raw_aiohttp(url: str, in_flight: int, measured: Measured) -> None:
    """The SDK on the aiohttp transport that it has as an extra."""
    http = openai.DefaultAioHttpClient()
    async with openai.AsyncOpenAI(api_key=KEY, base_url=url, http_client=http) as client:
        await measured(each(creating(client), in_flight))


async def floor(url: str, in_flight: int, measured: Measured) -> None:
    """A bare POST with aiohttp: no SDK, no limits, no types."""
    import aiohttp

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def call(prompt: str) -> Any:
            body = {"messages": [{"role": "user", "content": prompt}], **ASKED}
            headers = {"authorization": f"Bearer {KEY}"}
            async with session.post(f"{url}/chat/completions", json=body, headers=headers) as answer:
                return await answer.json()

        await measured(each(call, in_flight))


def _client(url: str, in_flight: int) -> OpenAIClient:
    limits = RateLimitConfig(requests_per_minute=ANY, tokens_per_minute=ANY, max_concurrent=in_flight)
    config = OpenAIConfig(api_key=KEY, base_url=url, default_model=MODEL)
    return OpenAIClient(config, rate_limit=limits)


async def batch_generate(url: str, in_flight: int, measured: Measured) -> None:
    """Ours, all at once."""
    async with _client(url, in_flight) as client:
        await measured(lambda prompts: client.batch_generate(prompts, max_tokens=20))


async def as_completed(url: str, in_flight: int, measured: Measured) -> None:
    """Ours, one after the other."""
    async with _client(url, in_flight) as client:

        async def run(prompts: list[str]) -> None:
            async with aclosing(client.as_completed(prompts, max_tokens=20)) as answers:
                async for _, answer in answers:
                    if isinstance(answer, Exception):
                        raise answer

        await measured(run)


async def generate_response(url: str, in_flight: int, measured: Measured) -> None:
    """Ours, gathered by hand: the client bounds what is in flight."""
    async with _client(url, in_flight) as client:

        async def run(prompts: list[str]) -> None:
            await asyncio.gather(*(client.generate_response(prompt, max_tokens=20) for prompt in prompts))

        await measured(run)


async def client_openai(url: str, in_flight: int, measured: Measured) -> None:
    """The SDK's calls on our client's limits and connections."""
    async with _client(url, in_flight) as client:
        await measured(each(creating(client.openai), in_flight))


async def drop_in(url: str, in_flight: int, measured: Measured) -> None:
    """The drop-in client, on the SDK's own transport."""
    limits = RateLimitConfig(requests_per_minute=ANY, tokens_per_minute=ANY, max_concurrent=in_flight)
    async with AsyncOpenAI(api_key=KEY, base_url=url, rate_limit=limits) as client:
        await measured(each(creating(client), in_flight))


async def lm_deluge(url: str, in_flight: int, measured: Measured) -> None:
    """lm-deluge: no SDK, aiohttp."""
    os.environ["BENCHMARK_KEY"] = KEY
    from lm_deluge import LLMClient
    from lm_deluge.models import register_model

    register_model(
        id="benchmark",
        name=MODEL,
        api_base=url,
        api_key_env_var="BENCHMARK_KEY",
        api_spec="openai",
        supports_json=True,
        supports_logprobs=True,
        supports_responses=False,
        input_cost=0.15,
        output_cost=0.6,
    )
    client = LLMClient(
        "benchmark",
        max_new_tokens=20,
        max_requests_per_minute=ANY,
        max_tokens_per_minute=ANY,
        max_concurrent_requests=in_flight,
    )

    async def run(prompts: list[str]) -> None:
        answers = await client.process_prompts_async(prompts, show_progress=False)
        if any(answer is None or answer.is_error for answer in answers):
            raise RuntimeError("lm-deluge failed")

    await measured(run)


async def litellm(url: str, in_flight: int, measured: Measured) -> None:
    """litellm, `acompletion`."""
    import litellm as theirs

    def call(prompt: str) -> Awaitable[Any]:
        messages = [{"role": "user", "content": prompt}]
        return theirs.acompletion(f"openai/{MODEL}", messages, api_base=url, api_key=KEY, max_tokens=20)

    await measured(each(call, in_flight))


async def langchain_openai(url: str, in_flight: int, measured: Measured) -> None:
    """langchain-openai, `abatch`."""
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(model=MODEL, base_url=url, api_key=KEY, max_tokens=20)
    await measured(lambda prompts: chat.abatch(prompts, {"max_concurrency": in_flight}))


CLIENTS: dict[str, tuple[Callable[[str, int, Measured], Awaitable[None]], str | None]] = {
    "raw": (raw, None),
    "raw + aiohttp": (raw_aiohttp, None),
    "aiohttp, no SDK": (floor, None),
    "batch_generate": (batch_generate, None),
    "as_completed": (as_completed, None),
    "generate_response": (generate_response, None),
    "client.openai": (client_openai, None),
    "AsyncOpenAI (drop-in)": (drop_in, None),
    "lm-deluge": (lm_deluge, "lm_deluge"),
    "litellm": (litellm, "litellm"),
    "langchain-openai": (langchain_openai, "langchain_openai"),
}


def work(name: str, url: str, prompts: int, in_flight: int) -> dict[str, float]:
    """Measure one client in this process."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    figures: dict[str, float] = {}

    async def measured(run: Run) -> None:
        await run(texts(in_flight))
        asked = texts(prompts)
        cpu, wall = time.process_time(), time.perf_counter()
        await run(asked)
        figures["cpu_ms"] = (time.process_time() - cpu) / prompts * 1000
        figures["per_second"] = prompts / (time.perf_counter() - wall)

    asyncio.run(CLIENTS[name][0](url, in_flight, measured))  # type: ignore[arg-type]
    figures["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return figures


def measure(names: list[str], prompts: int, in_flight: int, rounds: int) -> dict[str, dict[str, float]]:
    """Measure clients in turns, each time in a new process; return the medians."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with SimulatedServer(
        rpm=ANY, tpm=ANY, latency=LATENCY, process=True, cpu=max(os.sched_getaffinity(0))
    ) as server:
        for _ in range(rounds):
            for name in names:
                command = [sys.executable, __file__, "--work", name, "--url", server.base_url]
                numbers = ["--prompts", str(prompts), "--in-flight", str(in_flight)]
                done = subprocess.run([*command, *numbers], capture_output=True, text=True, check=False)
                if done.returncode:
                    sys.exit(f"{name}: {done.stderr[-2000:]}")
                runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    return {
        name: {key: statistics.median(run[key] for run in measured) for key in measured[0]}
        for name, measured in runs.items()
    }


def show(table: dict[str, dict[str, float]], in_flight: int) -> bool:
    """Print a table and return whether every bar was met."""
    print(f"\n{in_flight} in flight\n{'client':24} CPU ms/request  to raw  requests/s  peak MB")
    met = True
    for name, row in table.items():
        ratio = row["ratio"] = row["cpu_ms"] / table["raw"]["cpu_ms"]
        bar = BARS.get(name, {}).get(in_flight)
        met = met and (bar is None or ratio <= bar)
        note = "" if bar is None else f"  bar {bar:.2f}{'' if ratio <= bar else ': MISSED'}"
        figures = f"{row['cpu_ms']:14.2f} {ratio:7.2f} {row['per_second']:11.0f} {row['peak_mb']:8.0f}"
        print(f"{name:24} {figures}{note}")
    return met


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=3000)
    parser.add_argument("--in-flight", type=int, nargs="*", default=[100, 1000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="500 prompts, once")
    parser.add_argument("--only", type=lambda text: text.split(","), help="these clients alone, and raw")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> int:
    """Run what the command line says."""
    options = parsed()
    if options.work:
        print(json.dumps(work(options.work, options.url, options.prompts, options.in_flight[0])))
        return 0
    prompts, rounds = (500, 1) if options.quick else (options.prompts, options.rounds)
    there = [name for name, (_, needs) in CLIENTS.items() if needs is None or importlib.util.find_spec(needs)]
    names = [name for name in there if not options.only or name == "raw" or name in options.only]
    print(
        f"openai {openai.__version__}, Python {platform.python_version()}, {prompts} prompts, {rounds} rounds"
    )
    tables = {count: measure(names, prompts, count, rounds) for count in options.in_flight}
    met = [show(table, count) for count, table in tables.items()]
    if options.json:
        options.json.write_text(json.dumps(tables, indent=1))
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
