"""Many processes on one quota, with real sockets and a real Redis; each test takes some seconds."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from local_redis import started_redis

from openai_eval_client import OpenAIClient, OpenAIConfig, RateLimitConfig
from openai_eval_client.testing import SimulatedServer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from local_redis import LocalRedis

pytestmark = [pytest.mark.scale, pytest.mark.timeout(120)]

TESTS = Path(__file__).parent
README = (TESTS.parent / "README.md").read_text("utf-8")
BLOCK = r"<!-- scale: {} -->\n```python\n(.*?)^```$"


@pytest.fixture
def own_redis() -> Iterator[LocalRedis]:
    """Start a Redis server that the test may stop."""
    with started_redis() as server:
        yield server


def benchmark(name: str):
    spec = importlib.util.spec_from_file_location(name, TESTS / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.usefixtures("redis_server")
@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"prompts": 320, "event": "kill", "after": 1.5}, 0),
        ({"prompts": 200, "event": "stop", "after": 2, "seconds": 2}, 0.05),
    ],
    ids=["one killed", "redis lost"],
)
def test_four_processes_on_one_quota(options: dict, most: float) -> None:
    """Every prompt of the living processes is answered, with few or no refusals."""
    shared = benchmark("shared")
    figures = shared.measure(shared.Row("", window=5, **options))
    assert figures["failed"] == 0
    assert figures["refused"] <= most
    assert figures.get("full_again", 0) <= 10


async def test_a_lost_redis_and_its_return_are_each_logged_once(
    own_redis: LocalRedis, caplog: pytest.LogCaptureFixture
) -> None:
    """While Redis is stopped or hangs, every prompt is answered."""
    limits = RateLimitConfig(
        requests_per_minute=6000, tokens_per_minute=None, max_concurrent=8, redis_url=own_redis.url
    )
    with SimulatedServer(latency=0.02, process=True) as server:
        config = OpenAIConfig(api_key="k", base_url=server.base_url, default_model="m")
        async with OpenAIClient(config, rate_limit=limits) as client:

            async def until(alone: bool) -> None:
                while client._account.limiter._queues["m"]._alone != alone:
                    assert len(await client.batch_generate(["hello"] * 8)) == 8
                    await asyncio.sleep(0.02)

            await client.generate_response("hello")
            for lose, bring_back in (
                (own_redis.stop, own_redis.start),
                (own_redis.hang, own_redis.go_on),
            ):
                lose()
                with caplog.at_level(logging.WARNING, "openai_eval_client"):
                    await until(alone=True)
                    bring_back()
                    await until(alone=False)
        assert client.stats.failures == client.stats.rate_limited == 0
    logged = [record.message for record in caplog.records if "redis://" in record.message]
    assert [re.sub(r" \(.*\)", "", line.partition(" is ")[2]) for line in logged] == [
        "gone: going on with 1/1 of the limits",
        "back: sharing the limits again",
    ] * 2


async def test_a_cluster_keeps_each_quota_on_one_node() -> None:
    """With models on both nodes, the two keys of a model are on the same node."""
    first, second = started_redis().as_node(), started_redis().as_node()
    with first, second, first.client() as one, second.client() as other:
        one.execute_command("CLUSTER ADDSLOTSRANGE", 0, 8191)
        other.execute_command("CLUSTER ADDSLOTSRANGE", 8192, 16383)
        one.execute_command("CLUSTER MEET", "127.0.0.1", second.port, second.bus)
        while not all("ok" in str(node.execute_command("CLUSTER INFO"))[:30] for node in (one, other)):
            await asyncio.sleep(0.05)
        with SimulatedServer() as server:
            config = OpenAIConfig(api_key="k", base_url=server.base_url)
            async with OpenAIClient(config, rate_limit=RateLimitConfig(redis_url=first.url)) as client:
                for model in "abcdef":
                    assert (await client.generate_response("hello", model=model)).content == "echo: hello"
                assert one.dbsize() + other.dbsize() == 12
                assert one.dbsize() % 2 == 0


def run_block(name: str, server: SimulatedServer, redis: LocalRedis, folder: str, **environment: str) -> str:
    """Run one of the README's recipes and return what it prints."""
    (block,) = re.findall(BLOCK.format(name), README, flags=re.MULTILINE | re.DOTALL)
    program = Path(folder) / f"{name}_recipe.py"
    program.write_text(block)
    known = {
        "OPENAI_API_KEY": "k",
        "OPENAI_BASE_URL": server.base_url,
        "REDIS_URL": redis.url,
        "PYTHONPATH": str(TESTS.parent),
    }
    done = subprocess.run(
        [sys.executable, str(program)],
        env={**os.environ, **known, **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_recipe_for_multiprocessing(redis_server: LocalRedis, tmp_path: Path) -> None:
    """Four processes share quota and cache; a second run sends nothing."""
    with SimulatedServer(process=True) as server:
        for _ in range(2):
            assert "100 answers" in run_block("multiprocessing", server, redis_server, str(tmp_path))
        assert server.counts == {"200": 100}


def test_the_recipe_for_ray(redis_server: LocalRedis) -> None:
    """The clients of all actors share one quota."""
    if not os.environ.get("OPENAI_EVAL_CLIENT_SKIP_NOTHING"):
        pytest.importorskip("ray")
    offline = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    }
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, SimulatedServer(process=True) as server:
        # in /tmp, since the paths of Ray's sockets have to be short
        printed = run_block("ray", server, redis_server, folder, RAY_TMPDIR=folder, **offline)
        assert "100 answers" in printed
        assert server.counts == {"200": 100}


@pytest.mark.usefixtures("redis_server")
def test_the_simulation_of_many_workers_in_short(redis_server: LocalRedis) -> None:
    """Fifty workers stay within the limit, with Redis and while it is lost."""
    paper = benchmark("shared_paper")
    with redis_server.client() as client:
        figures = paper.figures(client, 50, seconds=90)
    assert figures["failed"] == 0
    assert figures["overshoot"] <= 1
    assert figures["lost: overshoot"] <= 1
    assert figures["lost: 429s"] <= 0.05
