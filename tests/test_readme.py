"""The README's code runs as it stands, on the simulated server."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from openai_eval_client.testing import SimulatedServer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FOR_WORKERS = re.findall(
    r"<!-- scale: \w+ -->\n```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL
)
BLOCKS = [  # those for workers need Redis, and are run by test_scale.py
    block
    for block in re.findall(r"^```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    if block not in FOR_WORKERS
]


def printed_by(block: str, folder: Path) -> str:
    """What a block prints, in a process of its own, with the API's address and key in its environment."""
    with SimulatedServer() as server:
        environment = {
            **os.environ,
            "OPENAI_API_KEY": "sk-readme",
            "OPENAI_BASE_URL": server.base_url,
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "-W", "error", "-c", block]
        done = subprocess.run(
            command, env=environment, cwd=folder, capture_output=True, text=True, timeout=60, check=False
        )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("block", BLOCKS, ids=[f"block{n}" for n in range(len(BLOCKS))])
def test_a_python_block_runs_as_it_stands(block: str, tmp_path: Path) -> None:
    """As a user would run it; where the text shows what it prints, it prints that."""
    if "to_pandas" in block:
        pytest.importorskip("pandas")
    shown = re.search(
        re.escape(block) + r"```\n\n[^`]*prints this[^`]*```text\n(.*?)```", README, flags=re.DOTALL
    )
    printed = printed_by(block, tmp_path)
    assert printed.startswith(shown[1] if shown else printed[0])


def test_there_are_exactly_two_set_up_commands() -> None:
    """One runs the demonstration, the other the tests."""
    (block,) = re.findall(r"<!-- set-up -->\n```sh\n(.*?)```", README, flags=re.DOTALL)
    demo, tests = block.splitlines()
    assert demo.endswith("&& openai-eval-client demo")
    assert tests.endswith("&& pytest")


def test_every_name_the_readme_imports_is_public() -> None:
    """No example reaches for a private module."""
    for block in BLOCKS + FOR_WORKERS:
        assert not re.search(r"openai_eval_client\._", block)


def test_lines_fit_an_editor() -> None:
    """No line of prose or code is longer than 130 characters."""
    assert max(map(len, README.splitlines())) <= 130
