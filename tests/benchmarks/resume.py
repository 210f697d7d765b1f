"""Kill a run with a cache again and again: is every prompt answered, and what is paid for twice?

    python tests/benchmarks/resume.py                       # 2,000 prompts, killed ten times: a minute
    python tests/benchmarks/resume.py --prompts 300 --kills 3

The program is a process of its own that runs `batch_generate` with a cache, and is killed (SIGKILL) at random
moments; the simulated server in another process counts what it served. Exit code 1 if a prompt was not
answered, or more were sent twice than could be in flight at the kills.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from openai_eval_client import OpenAIClient, OpenAIConfig, RateLimitConfig
from openai_eval_client.testing import SimulatedServer


@dataclass
class Verdict:
    """The result of all kills."""

    prompts: int
    kills: int
    in_flight: int
    answered: int
    wrong: int
    from_cache: int
    twice: int  # answers served beyond the first for each prompt
    begun_twice: int  # requests sent beyond the first for each prompt
    max_in_flight: int
    seconds: float

    @property
    def clean(self) -> bool:
        right = self.answered == self.prompts and not self.wrong
        return right and self.twice <= self.begun_twice <= self.kills * self.in_flight


def prompts(count: int) -> list[str]:
    """Return the prompts; every tenth of them comes twice, and has two answers."""
    return [f"prompt {n - 1 if n % 10 == 9 else n}" for n in range(count)]


async def run(url: str, cache: str, count: int, in_flight: int) -> None:
    """Answer all prompts, and print how many were answered, answered wrongly, and answered from the cache."""
    config = OpenAIConfig(api_key="sk-resume", base_url=url, default_model="gpt-4o-mini")
    limits = RateLimitConfig(requests_per_minute=None, tokens_per_minute=None, max_concurrent=in_flight)
    async with OpenAIClient(config, rate_limit=limits, cache=cache) as client:
        asked = prompts(count)
        responses = await client.batch_generate(asked, max_tokens=20)
    pairs = zip(asked, responses, strict=True)
    wrong = sum(response.content != f"echo: {prompt}" for prompt, response in pairs)
    cached = sum(response.cached for response in responses)
    print(json.dumps({"answered": len(responses), "wrong": wrong, "from_cache": cached}))


def start(url: str, cache: Path, options: argparse.Namespace) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-W", "error", __file__, "--run", url, str(cache)]
    command += ["--prompts", str(options.prompts), "--in-flight", str(options.in_flight)]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


def measure(options: argparse.Namespace, cache: Path) -> Verdict:
    """Run and kill as often as the options say, then run to the end."""
    chance, began = random.Random(options.seed), time.monotonic()  # noqa: S311
    moments = sorted(chance.sample(range(1, options.prompts), options.kills))
    with SimulatedServer(latency=options.latency, process=True, seed=options.seed) as server:
        for moment in moments:
            child = start(server.base_url, cache, options)
            while server.counts["200"] < moment and child.poll() is None:
                time.sleep(0.005)
            time.sleep(chance.uniform(0, options.latency))
            child.kill()
            child.wait()
            child.stdout.close()
        with start(server.base_url, cache, options) as child:
            printed = json.loads(child.communicate()[0])
        counted = Counter(call.body["messages"][0]["content"] for call in server.calls if call.served)
        wanted = Counter(prompts(options.prompts))
        return Verdict(
            prompts=options.prompts,
            kills=options.kills,
            in_flight=options.in_flight,
            twice=sum((counted - wanted).values()),
            begun_twice=len(server.calls) - options.prompts,
            max_in_flight=server.max_in_flight,
            seconds=round(time.monotonic() - began, 1),
            **printed,
        )


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--latency", type=float, default=0.3, help="mean seconds")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--run", nargs=2, metavar=("URL", "CACHE"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    options = parsed()
    if options.run:
        asyncio.run(run(*options.run, options.prompts, options.in_flight))
        return
    with tempfile.TemporaryDirectory() as folder:
        verdict = measure(options, Path(folder) / "runs.sqlite")
    print(json.dumps(asdict(verdict)))
    sys.exit(0 if verdict.clean else 1)


if __name__ == "__main__":
    main()
