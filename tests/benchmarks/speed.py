"""CPU of a request, beside the raw SDK and other clients: each in a process of its own, in turns.

    python tests/benchmarks/speed.py                     # 100 and 1,000 in flight, medians of 5; 5 minutes
    python tests/benchmarks/speed.py --quick             # 500 prompts, once
    python tests/benchmarks/speed.py --only raw,as_completed --in-flight 100 --json speed.json
    python tests/benchmarks/speed.py --growth            # 1,000, 10,000 and 100,000 prompts; 3 minutes
    python tests/benchmarks/speed.py --latency           # 5,000 prompts, 1,000 in flight, 1 s each

The simulated server runs on the last core, the clients one after the other on the first. A client warms up
with as many prompts as are in flight, and is measured over the next ones: the CPU time of its process, the
wall time, and in the end its peak of resident memory. Where they are installed, lm-deluge, litellm and
langchain-openai are measured too. With --growth, a request's CPU must not depend on how many there are; with
--latency, the wall time must be that of the waves and of the CPU. Exit code 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
sys.path.insert(0, str(Path(__file__).parent))

import openai
from speed_clients import ANY, CLIENTS, texts
from vocabularies import unpack_vocabularies

from openai_eval_client.testing import SimulatedServer

if TYPE_CHECKING:
    from speed_clients import Run

LATENCY = 0.05  # seconds
BARS = {  # times the CPU of the raw SDK, by requests in flight
    "batch_generate": {100: 0.35, 1000: 0.20},
    "as_completed": {100: 0.35, 1000: 0.20},
    "generate_response": {100: 0.35, 1000: 0.20},
    "client.openai": {100: 0.70, 1000: 0.35},
}
GROWTH = 0.15  # largest difference of a request's CPU between the sizes
SIZES = {1_000: 6, 10_000: 3, 100_000: 2}  # prompts: rounds
WAVES = 1.10  # times the latency of the waves and the CPU


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
        figures["seconds"] = time.perf_counter() - wall
        figures["per_second"] = prompts / figures["seconds"]

    asyncio.run(CLIENTS[name][0](url, in_flight, measured))
    status = Path("/proc/self/status")  # `ru_maxrss` would include the parent's
    peak = re.search(r"VmHWM:\s+(\d+)", status.read_text()) if status.exists() else None
    figures["peak_mb"] = int(peak[1]) / 1024 if peak else 0.0
    return figures


def server(latency: float = LATENCY) -> SimulatedServer:
    """Return a server on the last core."""
    core = max(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return SimulatedServer(rpm=ANY, tpm=ANY, latency=latency, process=True, cpu=core)


def measure_one(name: str, url: str, prompts: int, in_flight: int) -> dict[str, float]:
    """Measure one client in a new process."""
    command = [sys.executable, __file__, "--work", name, "--url", url]
    numbers = ["--prompts", str(prompts), "--in-flight", str(in_flight)]
    done = subprocess.run([*command, *numbers], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name}: {done.stderr[-2000:]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def measure(names: list[str], prompts: int, in_flight: int, rounds: int) -> dict[str, dict[str, float]]:
    """Measure clients in turns; return medians, among them the ratio to the raw SDK in the same round."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with server() as running:
        for _ in range(rounds):
            for name in names:
                row = measure_one(name, running.base_url, prompts, in_flight)
                runs[name].append(row)
                row["ratio"] = row["cpu_ms"] / runs["raw"][-1]["cpu_ms"]
    return {
        name: {key: statistics.median(run[key] for run in measured) for key in measured[0]}
        for name, measured in runs.items()
    }


def growth() -> bool:
    """Print a request's CPU by the number of prompts; return whether it stays the same."""
    runs: dict[int, list[dict[str, float]]] = {size: [] for size in SIZES}
    most = max(SIZES.values())
    with server() as running:
        for turn in range(most):
            for size in [size for size, count in SIZES.items() if turn % (most // count) == 0]:
                runs[size].append(measure_one("batch_generate", running.base_url, size, 100))
    costs = [statistics.median(run["cpu_ms"] for run in rows) for rows in runs.values()]
    for cost, (size, rows) in zip(costs, runs.items(), strict=True):
        peak = max(run["peak_mb"] for run in rows)
        print(f"{size:8,} prompts: {cost:.3f} ms a request, median of {len(rows)}; peak {peak:.0f} MB")
    spread = max(costs) / min(costs) - 1
    print(f"spread {spread:.1%}, bar {GROWTH:.0%}")
    return spread <= GROWTH


def waves() -> bool:
    """Print how long 5,000 prompts take at 1,000 in flight and a latency of 1 s."""
    with server(latency=1.0) as running:
        row = measure_one("batch_generate", running.base_url, 5000, 1000)
    ideal = 5.0 + 5 * row["cpu_ms"]
    ratio = row["seconds"] / ideal
    print(f"{row['seconds']:.2f} s; 5 s and the CPU: {ideal:.2f} s; ratio {ratio:.3f}, bar {WAVES}")
    return ratio <= WAVES


def show(table: dict[str, dict[str, float]], in_flight: int) -> bool:
    """Print a table and return whether every bar was met."""
    print(f"\n{in_flight} in flight\n{'client':24} CPU ms/request  to raw  requests/s  peak MB")
    met = True
    for name, row in table.items():
        ratio = row["ratio"]
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
    parser.add_argument("--only", type=lambda text: text.split(","), help="only these clients, and raw")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--growth", action="store_true", help="1,000, 10,000 and 100,000 prompts")
    parser.add_argument("--latency", action="store_true", help="5,000 prompts, 1,000 in flight, 1 s each")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> int:
    """Run as a script."""
    options = parsed()
    if options.work:
        print(json.dumps(work(options.work, options.url, options.prompts, options.in_flight[0])))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        if "TIKTOKEN_CACHE_DIR" not in os.environ and importlib.util.find_spec("bpe_openai"):
            unpack_vocabularies(Path(folder))  # tokens are counted, not estimated, without a network
            os.environ["TIKTOKEN_CACHE_DIR"] = folder
        return compare(options)


def compare(options: argparse.Namespace) -> int:
    """Measure, print, and return the exit code."""
    if options.growth or options.latency:
        return 0 if (growth() if options.growth else waves()) else 1
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
