"""The installed parts together: needs only the wheel and pytest."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import openai_eval_client
from openai_eval_client import AsyncOpenAI, BatchConfig, OpenAIClient, OpenAIConfig
from openai_eval_client.testing import SimulatedServer


@pytest.fixture(scope="module")
def server():
    with SimulatedServer(batch_seconds=0.01) as running:
        yield running


def connect(server: SimulatedServer, **options) -> OpenAIClient:
    config = OpenAIConfig(api_key="k", base_url=server.base_url, default_model="gpt-4o-mini")
    return OpenAIClient(config, **options)


def test_many_prompts_with_a_cache_and_a_report(server, tmp_path: Path) -> None:
    """Prompts are answered in order, cached, and reported on."""

    async def run() -> list[str]:
        async with connect(server, cache=tmp_path / "cache.sqlite") as client:
            responses = await client.batch_generate([f"p{n}" for n in range(30)])
            page = client.report(tmp_path / "run.html")
            assert client.stats.requests == 30
        assert "</html>" in page.read_text("utf-8")
        return [response.content for response in responses]

    assert asyncio.run(run()) == asyncio.run(run()) == [f"echo: p{n}" for n in range(30)]


def test_the_drop_in_and_the_batch_api(server) -> None:
    """A call on the drop-in client and a run by the Batch API are both answered."""

    async def run() -> tuple[str | None, str]:
        async with AsyncOpenAI(api_key="k", base_url=server.base_url) as client:
            messages = [{"role": "user", "content": "hi"}]
            answer = await client.chat.completions.create(model="gpt-4o-mini", messages=messages)
        async with connect(
            server, batch=BatchConfig(auto_batch_threshold=1, polling_interval=0.05)
        ) as client:
            (response,) = await client.batch_generate(["ho"], use_batch_api=True)
        return answer.choices[0].message.content, response.content

    assert asyncio.run(run()) == ("echo: hi", "echo: ho")


def test_the_command_line(server, tmp_path: Path) -> None:
    """It shows its version and answers a file."""
    (tmp_path / "in.jsonl").write_text('"one"\n{"prompt": "two"}\n')
    command = [sys.executable, "-m", "openai_eval_client"]
    shown = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert version("openai-eval-client") in shown.stdout
    more = ["--base-url", server.base_url, "--model", "gpt-4o-mini", "--output", "out.jsonl", "--no-progress"]
    environment = {
        "OPENAI_API_KEY": "k",
        "PATH": "",
        "PYTHONPATH": str(Path(openai_eval_client.__file__).parents[1]),
    }
    subprocess.run([*command, "run", "in.jsonl", *more], cwd=tmp_path, env=environment, check=True)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sorted(row["response"]["content"] for row in rows) == ["echo: one", "echo: two"]


def test_data_files_are_installed() -> None:
    """The wheel has the files that are not Python."""
    root = Path(openai_eval_client.__file__).parent
    assert all((root / name).is_file() for name in ("py.typed", "_report/report.html", "_limits/shared.lua"))
