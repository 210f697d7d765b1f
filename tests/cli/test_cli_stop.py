"""What ends `run` from outside, in a terminal of its own: Ctrl-C, SIGTERM, kill -9, a reader that leaves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from openai_eval_client import OpenAIConfig, _interrupts
from openai_eval_client._cli import common
from openai_eval_client.testing import SimulatedServer

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "openai_eval_client"]
KEY = "sk-right-0123456789"
ROWS = 40
# What a shell does: the terminal becomes that of the session, whose keys are then signals.
TAKE_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


def environment(server):
    """What a user has set."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")}
    paths = {"PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "80"}
    return {**known, **paths, "OPENAI_BASE_URL": server.base_url, "OPENAI_API_KEY": KEY}


@pytest.fixture
def folder(tmp_path):
    """With an input of forty rows."""
    lines = [json.dumps({"prompt": f"row {n}", "id": n}) for n in range(ROWS)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    return tmp_path


def rows(path):
    """The rows of an output, whole lines of JSON all of them."""
    text = path.read_bytes()
    assert not text or text.endswith(b"\n")
    return [json.loads(line) for line in text.splitlines()]


class Terminal:
    """A terminal session: the command is its foreground process group, as under a shell."""

    def __init__(self, server, folder, *arguments):
        self.screen, inside = pty.openpty()
        self.child = subprocess.Popen(
            [sys.executable, "-S", "-c", TAKE_TERMINAL, *COMMAND, "run", "in.jsonl", *arguments],
            env=environment(server),
            cwd=folder,
            start_new_session=True,
            stdin=inside,
            stdout=inside,
            stderr=inside,
        )
        os.close(inside)
        self.shown = ""

    def read(self):
        """Take what is written next; False at the end."""
        try:
            ready, _, _ = select.select([self.screen], [], [], 30)
            assert ready, self.shown
            text = os.read(self.screen, 65536)
        except OSError:  # how a terminal says that its program has ended
            return False
        self.shown += text.decode()
        return bool(text)

    def type(self, text):
        """Press keys."""
        os.write(self.screen, text)

    def ended(self):
        """Read to the end, and return the exit code."""
        while self.read():
            pass
        os.close(self.screen)
        return self.child.wait(timeout=30)


def started(server, terminal, answered):
    """Wait until so many rows were answered; the screen is read meanwhile."""
    while server.counts["200"] < answered:
        ready, _, _ = select.select([terminal.screen], [], [], 0.01)
        if ready:
            assert terminal.read(), terminal.shown


def test_ctrl_c_and_resume(folder):
    """What is in flight is finished and written, the command to go on is shown, and it does."""
    out = folder / "out.jsonl"
    with SimulatedServer(api_key=KEY, latency=0.1) as server:
        terminal = Terminal(server, folder, "-o", "out.jsonl", "--max-concurrent", "2")
        started(server, terminal, 6)
        terminal.type(b"\x03")
        assert terminal.ended() == 130
        before, sent = rows(out), len(server.calls)
        assert 6 <= len(before) == sent < ROWS
        assert "Traceback" not in terminal.shown
        assert "may finish" in terminal.shown
        assert f"of {ROWS} answered" in terminal.shown
        assert "run in.jsonl -o out.jsonl --max-concurrent 2 --resume" in " ".join(terminal.shown.split())
        assert "%|" in terminal.shown

        again = Terminal(server, folder, "-o", "out.jsonl", "--max-concurrent", "20", "--resume")
        assert again.ended() == 0
        assert len(server.calls) == ROWS
    assert sorted(row["index"] for row in rows(out)) == list(range(ROWS))
    assert all(row["id"] == row["index"] for row in rows(out))


def test_a_second_ctrl_c_ends_at_once(folder):
    """What is in flight is not waited for."""
    with SimulatedServer(api_key=KEY, latency=30, latency_sigma=0) as server:
        terminal = Terminal(server, folder, "-o", "out.jsonl")
        while not server.in_flight:
            ready, _, _ = select.select([terminal.screen], [], [], 0.01)
            if ready:
                assert terminal.read(), terminal.shown
        terminal.type(b"\x03")
        while "may finish" not in terminal.shown:
            assert terminal.read()
        terminal.type(b"\x03")
        assert terminal.ended() == 130
    assert "Traceback" not in terminal.shown
    assert "run in.jsonl -o out.jsonl --resume" in terminal.shown
    assert rows(folder / "out.jsonl") == []


@contextlib.contextmanager
def interrupting(is_time):
    """Send this process SIGINT once it is time."""
    ended = threading.Event()

    def wait():
        while not ended.wait(0.01):
            if is_time():
                os.kill(os.getpid(), signal.SIGINT)
                return

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_what_takes_too_long_is_not_waited_for(cli, folder, monkeypatch):
    """After the time it is given, the run ends as if it had finished."""
    monkeypatch.setattr(common, "GRACE", 0.05)
    before = signal.getsignal(signal.SIGINT)
    with (
        SimulatedServer(api_key=KEY, latency=30, latency_sigma=0) as server,
        interrupting(lambda: server.in_flight),
    ):
        options = ["-o", folder / "out.jsonl", "--json", "--report", folder / "run.html"]
        assert cli("run", folder / "in.jsonl", *options, server=server) == 130
    assert json.loads(cli.out)["interrupted"] is True
    assert "gpt-3.5-turbo" in (folder / "run.html").read_text()
    assert "--resume" in cli.err
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("cached", [True, False])
def test_batches_go_on(cli, folder, cached):
    """The command for their results is shown; with a cache, the same command waits for the same batches."""
    options = ["-o", folder / "out.jsonl", "--batch", "--interval", "0.05"]
    options += ["--cache", folder / "cache.sqlite"] if cached else []
    with SimulatedServer(api_key=KEY, batch_seconds=1.0) as server:
        with interrupting(lambda: server.batches and server.batches[0]["status"] == "in_progress"):
            assert cli("run", folder / "in.jsonl", *options, server=server) == 130
        (batch,) = server.batches
        if cached:
            assert cli("run", folder / "in.jsonl", *options, "--resume", server=server) == 0
            assert len(server.batches) == 1
            assert len(rows(folder / "out.jsonl")) == ROWS
        else:
            assert f"batch results {batch['id']}" in cli.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_other_ends(folder, number):
    """SIGTERM is as Ctrl-C; after kill -9 the file is valid, but for a last line that resuming mends."""
    out = folder / "out.jsonl"
    options = ["-o", "out.jsonl", "--max-concurrent", "4"]
    with SimulatedServer(api_key=KEY, latency=0.1) as server:
        terminal = Terminal(server, folder, *options)
        started(server, terminal, 8)
        terminal.child.send_signal(number)
        assert terminal.ended() == (130 if number == signal.SIGTERM else -number)
        assert 0 < len(rows(out)) < ROWS
        if number == signal.SIGTERM:
            return
        out.write_bytes(out.read_bytes() + b'{"prompt":"row')
        done = subprocess.run(
            [*COMMAND, "run", "in.jsonl", *options, "--resume"],
            env=environment(server),
            cwd=folder,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert len(server.calls) <= ROWS + 2 * 4  # what was in flight, and what had just been answered
    assert sorted(row["index"] for row in rows(out)) == list(range(ROWS))


def test_rows_are_piped(folder):
    """A row is answered before the input ends, and a reader that leaves is no fault of ours."""
    with (
        SimulatedServer(api_key=KEY) as server,
        subprocess.Popen(
            [*COMMAND, "run", "-"],
            env=environment(server),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as running,
    ):
        running.stdin.write(b'"first"\n')
        running.stdin.flush()
        row = json.loads(running.stdout.readline())
        assert (row["index"], row["response"]["content"]) == (0, "echo: first")
        running.stdout.close()
        running.stdin.write(b'"second"\n"third"\n')
        running.stdin.flush()
        errors = running.stderr.read().decode()
        running.stdin.close()
    assert running.returncode == 1
    assert "Traceback" not in errors
    assert "Exception" not in errors


def complete(work):
    """Do what a command without rows does with its client."""
    return common.with_client(OpenAIConfig(api_key=KEY), lambda _: work())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_ends_the_work_whatever_task_it_meets(number):
    """A command without rows is cancelled as a whole: no task is left with an error that is not read."""
    tasks, before = [], signal.getsignal(number)

    async def busy():
        signal.raise_signal(number)
        await asyncio.sleep(30)

    async def work():
        tasks.append(asyncio.create_task(busy()))
        await asyncio.sleep(30)

    with pytest.raises(KeyboardInterrupt):
        complete(work)
    assert tasks[0].cancelled()
    assert signal.getsignal(number) is before


def test_a_cancellation_of_its_own_is_not_taken_for_a_signal():
    """Work that is cancelled without a signal ends as it would alone."""

    async def work():
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        complete(work)


def test_the_second_signal_ends_even_the_clearing_up():
    """It is not waited for any more; what is entered is still left."""
    steps = []

    async def work():
        try:
            signal.raise_signal(signal.SIGINT)
            await asyncio.sleep(30)
        finally:
            steps.append("cancelled")
            try:
                signal.raise_signal(signal.SIGINT)
                await asyncio.sleep(30)
            finally:
                steps.append("interrupted")

    with pytest.raises(KeyboardInterrupt):
        complete(work)
    assert steps == ["cancelled", "interrupted"]


def test_a_signal_that_is_ignored_stays_ignored():
    """As a shell has it for what a script runs in the background."""

    async def work():
        signal.raise_signal(signal.SIGINT)
        await asyncio.sleep(0.01)
        return "done"

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert complete(work) == "done"
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


# A module that Python imports first of all, which sends signals when the command imports a module, or ends.
AT_A_MOMENT = """
import atexit, os, signal, sys

def send(names):
    if names:
        try:
            signal.raise_signal(getattr(signal, names[0]))
        finally:
            send(names[1:])

class Finder:
    def find_spec(name, *_):
        if name == os.environ["MOMENT"]:
            send(os.environ["SIGNALS"].split())

sys.meta_path.insert(0, Finder)
if os.environ["MOMENT"] == "the end":
    atexit.register(lambda: send(os.environ["SIGNALS"].split()))
"""
SCRIPT = "import sys; from openai_eval_client.__main__ import main; sys.exit(main())"


@pytest.mark.parametrize(
    ("moment", "signals", "program"),
    [
        ("openai_eval_client._report", "SIGINT", "module"),
        ("pydantic", "SIGINT SIGINT", "script"),
        ("openai", "SIGTERM", "module"),
        ("openai_eval_client.testing", "SIGTERM", "module"),
        ("openai_eval_client.testing", "SIGINT SIGINT SIGTERM", "script"),
        ("the end", "SIGINT", "module"),
    ],
)
def test_a_signal_at_any_moment_ends_without_a_traceback(tmp_path, moment, signals, program):
    """While the package is imported, and in a command before its work; what has ended keeps its exit code."""
    (tmp_path / "sitecustomize.py").write_text(AT_A_MOMENT)
    (tmp_path / "openai-eval-client").write_text(SCRIPT)
    command = COMMAND if program == "module" else [sys.executable, tmp_path / "openai-eval-client"]
    arguments = ["--version"] if moment == "the end" else ["demo"]
    paths = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "MOMENT": moment, "SIGNALS": signals}
    done = subprocess.run(
        [*command, *arguments], env={**os.environ, **paths}, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == (0 if moment == "the end" else 130)
    assert done.stderr.splitlines()[:1] == ([] if moment == "the end" else [b"interrupted"])
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "program", "ours"),
    [
        ("python -m openai_eval_client run in.jsonl", "-m", True),
        ("python -W error -m openai_eval_client.testing", "-m", True),
        ("python /usr/bin/openai-eval-client run in.jsonl", "/usr/bin/openai-eval-client", True),
        ("python -m pytest", "-m", False),
        ("python evaluate.py openai_eval_client", "evaluate.py", False),
        ("python", "", False),
    ],
)
def test_only_our_commands_end_at_a_signal(monkeypatch, arguments, program, ours):
    """Another program that imports the package keeps its KeyboardInterrupt."""
    monkeypatch.setattr(sys, "orig_argv", arguments.split())
    monkeypatch.setattr(sys, "argv", [program])
    assert _interrupts.is_command() is ours
