"""The command line, run as a user runs it: in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from openai_eval_client._cli.app import human_eval_prompts
from openai_eval_client.testing import SimulatedServer

COMMAND = [sys.executable, "-m", "openai_eval_client"]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    known = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")}
    return subprocess.run(
        [*COMMAND, *arguments],
        env={**known, "COLUMNS": "100", **environment},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )


def test_the_demonstration_has_real_prompts() -> None:
    """All 164 of HumanEval, each of them a function to complete."""
    prompts = human_eval_prompts()
    assert len(prompts) == 164
    assert all("def " in prompt for prompt in prompts)


def test_live_runs_the_same_on_the_api() -> None:
    """--live takes key and address from the environment; a summary ends it."""
    with SimulatedServer(api_key="sk-live-0123456789") as server:
        done = run("demo", "--live", OPENAI_API_KEY="sk-live-0123456789", OPENAI_BASE_URL=server.base_url)
        assert server.counts["200"] == 164
    assert done.returncode == 0, done.stderr
    for message in (
        "prompts answered",
        "164",
        "retries",
        "429s",
        "tokens in / out",
        "cost",
        "wall time",
        "p50 / p95",
    ):
        assert message in done.stdout
    assert "share of the limit used" in done.stdout


@pytest.mark.parametrize(
    ("environment", "code", "message"),
    [
        ({}, 2, "OPENAI_API_KEY"),
        ({"OPENAI_API_KEY": "sk-wrong-0123456789"}, 4, "Incorrect API key"),
    ],
)
def test_errors_of_the_user_are_said_in_a_line(environment, code, message) -> None:
    """No key, a wrong key: an exit code and a sentence, no traceback."""
    with SimulatedServer(api_key="sk-right-0123456789") as server:
        done = run("demo", "--live", OPENAI_BASE_URL=server.base_url, **environment)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert "sk-wrong-0123456789" not in done.stderr


def test_interrupting_ends_with_130() -> None:
    """Ctrl-C stops at once, without a traceback."""
    with SimulatedServer(latency=30, latency_sigma=0) as server:
        environment = {**os.environ, "OPENAI_API_KEY": "sk-x", "OPENAI_BASE_URL": server.base_url}
        running = subprocess.Popen(
            [*COMMAND, "demo", "--live"], env=environment, stderr=subprocess.PIPE, text=True
        )
        while not server.in_flight:
            assert running.poll() is None
        running.send_signal(signal.SIGINT)
        _, message = running.communicate(timeout=30)
    assert running.returncode == 130
    assert "Traceback" not in message


def test_help_names_the_commands() -> None:
    """Without arguments the help is shown."""
    assert "demo" in run("--help").stdout
