"""The README's code runs unchanged on the simulated server."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import openai_eval_client as package
from openai_eval_client import testing
from openai_eval_client.testing import SimulatedServer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FOR_WORKERS = re.findall(
    r"<!-- (?:scale|ecosystem): \w+ -->\n```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL
)
BLOCKS = [  # the others need Redis or frameworks: test_scale.py and test_ecosystem.py run them
    block
    for block in re.findall(r"^```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    if block not in FOR_WORKERS
]
SHELL_BLOCKS = re.findall(r"^([^\n]*)\n```(?:sh|bash)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
REFERENCE = README.partition("\n## API reference\n")[2].partition("\n## ")[0]
BASH = shutil.which("bash") or "bash"
OURS = {name: getattr(package, name) for name in package.__all__}
THEIRS = {"APIError", "RateLimitError", "QuotaError", "TimeoutError"}  # with the SDK's own arguments


def printed_by(block: str, folder: Path) -> str:
    """Run a block in a process of its own, with the server's address and a key in its environment."""
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
def test_a_python_block_runs_unchanged(block: str, tmp_path: Path) -> None:
    """If the text shows what it prints, it prints that."""
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
    assert tests.endswith("&& pytest -n 2")


def test_every_name_the_readme_imports_is_public() -> None:
    """No example imports a private module."""
    for block in BLOCKS + FOR_WORKERS:
        assert not re.search(r"openai_eval_client\._", block)


def test_lines_fit_an_editor() -> None:
    """No line of prose or code is longer than 130 characters."""
    assert max(map(len, README.splitlines())) <= 130


def test_every_link_within_leads_somewhere() -> None:
    """Anchors are as GitHub makes them: small letters, hyphens for spaces, no punctuation."""
    plain = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", plain, flags=re.MULTILINE)
    anchors = [re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings]
    assert len(set(anchors)) == len(anchors)
    assert set(re.findall(r"\]\(#([^)]*)\)", plain)) <= set(anchors)


# --- commands ---------------------------------------------------------------------------------------------


def test_every_shell_block_is_run_somewhere() -> None:
    """`.ci/run` runs set-up, the tests of the commands run batch and run, this file the other two."""
    markers = [marker for marker, _ in SHELL_BLOCKS]
    known = ["set-up", "batch", "run", "simulate", "rehearse"]
    assert sorted(markers) == sorted(f"<!-- {name} -->" for name in known)


def test_the_simulated_server_is_served_as_shown() -> None:
    """It is started in one shell and used from another, at any free port."""
    blocks = dict(SHELL_BLOCKS)
    command = [sys.executable, "-m", "openai_eval_client"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    program, *arguments = blocks["<!-- simulate -->"].replace("--port 8000", "--port 0").split()
    assert program == "openai-eval-client"
    with subprocess.Popen(
        [*command, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as serving:
        try:
            assert serving.stdout is not None
            asking = blocks["<!-- rehearse -->"].replace(
                "http://127.0.0.1:8000/v1", serving.stdout.readline().strip()
            )
            script = f'openai-eval-client() {{ "{sys.executable}" -m openai_eval_client "$@"; }}\n{asking}'
            done = subprocess.run(
                [BASH, "-euc", script], env=environment, capture_output=True, text=True, check=False
            )
        finally:
            serving.terminate()
    assert done.returncode == 0, done.stderr
    assert {"500", "100,000"} <= set(done.stdout.split())


def test_the_reference_has_every_command() -> None:
    """Commands for jobs are included."""
    from typer.main import get_command

    from openai_eval_client._cli.app import app

    commands = get_command(app).commands  # type: ignore[attr-defined]  # a group
    names = {name for name in commands if name != "batch"}
    names |= {f"batch {name}" for name in commands["batch"].commands}
    assert set(re.findall(r"^\| `openai-eval-client ([\w ]+)` \|", REFERENCE, flags=re.MULTILINE)) == names


# --- the reference ----------------------------------------------------------------------------------------


HOOKS = {"model_config", "model_fields", "model_post_init"}  # pydantic's


def own_methods(cls):
    """Return the public methods and properties that this package adds to a class, by name."""
    classes = [base for base in cls.__mro__ if base.__module__.startswith(package.__name__)]
    found = {name: member for base in reversed(classes) for name, member in vars(base).items()}
    return {name: member for name, member in found.items() if name[0] != "_" and name not in HOOKS}


def test_the_reference_has_every_public_name() -> None:
    """Each is listed once, and no other."""
    assert set(re.findall(r"`(\w+)", REFERENCE)) >= {*OURS, *testing.__all__}
    listed = re.findall(r"^\| `(\w+)", REFERENCE, flags=re.MULTILINE)
    commands_and_extras = {"openai", "cli", "progress", "pandas", "redis", "demo", "test"}
    assert len(set(listed)) == len(listed) - listed.count("openai") + 1
    assert set(listed) - commands_and_extras <= set(OURS)


def test_the_reference_has_every_method_of_the_client() -> None:
    """Each is listed by its name, and no other."""
    listed = re.findall(r"^\| `\.(\w+)", REFERENCE, flags=re.MULTILINE)
    assert sorted(listed) == sorted(own_methods(package.OpenAIClient))


def callables():
    """Yield every public function and method, with the name to show for it."""
    for name, value in {**OURS, **{name: getattr(testing, name) for name in testing.__all__}}.items():
        if inspect.isclass(value):
            for method, member in own_methods(value).items():
                if not isinstance(member, property) and callable(getattr(value, method)):
                    yield f"{name}.{method}", getattr(value, method)
        else:
            yield name, value


@pytest.mark.parametrize(("name", "called"), [pytest.param(*pair, id=pair[0]) for pair in callables()])
def test_pydoc_tells_what_goes_in_and_what_comes_out(name: str, called) -> None:
    """Its text has `Args` if there are arguments, and says what is returned if anything is."""
    text = inspect.getdoc(called) or ""
    signature = inspect.signature(called)
    takes = [parameter for parameter in signature.parameters if parameter != "self"]
    assert text
    assert ("Args:" in text) == bool(takes), name
    described = any(word in text for word in ("Returns:", "Yields:", "Return "))
    assert described or signature.return_annotation in {"None", "Self"}, name


PLAIN = {"BatchJob", "BatchJobStatus"}  # their fields explain themselves; users do not make them
DESCRIBED = [name for name in OURS if inspect.isclass(OURS[name]) and name not in THEIRS | PLAIN]


@pytest.mark.parametrize("name", DESCRIBED)
def test_pydoc_tells_what_a_class_holds(name: str) -> None:
    """Settings and errors describe their arguments, results their attributes."""
    text = inspect.getdoc(OURS[name]) or ""
    assert "Args:" in text or "Attributes:" in text
