"""The server in a process of its own, and from a shell."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
from simulated_calls import CHAT, send

import openai_eval_client.testing as testing_package
from openai_eval_client.testing import Call, SimulatedServer

ROOT = Path(testing_package.__file__).parents[2]


@pytest.fixture
def server():
    with SimulatedServer() as running:
        yield running


@pytest.mark.parametrize("process", [False, True])
def test_a_taken_port_is_an_error_at_start(server, process):
    """A port that is in use is an OSError, in a thread and in a process."""
    with pytest.raises(OSError, match=r"in use|could not bind"):
        SimulatedServer(port=urlsplit(server.base_url).port, process=process).start()


def test_process_mode_does_it_all():
    """A server in a process of its own has the same options, calls and counters."""
    options = {"rpm": 2, "models": {"m"}, "script": ["500"], "api_key": "sk-test", "cpu": 0}
    with SimulatedServer(process=True, **options) as server:
        assert [send(server)[0] for _ in range(3)] == [500, 200, 429]
        assert send(server, key="sk-other")[0] == 401
        assert server.counts == {"500": 1, "200": 1, "429": 1, "401": 1}
        assert all(isinstance(call, Call) for call in server.calls)
        assert server.calls[0].body == CHAT
        assert (server.in_flight, server.max_in_flight, server.connections) == (0, 1, 0)
        server.set_limits(rpm=None)
        assert [send(server)[0] for _ in range(3)] == [200] * 3
        server.reset()
        assert (server.calls, server.counts) == ([], {})
        send(server)
    assert server.counts == {"200": 1}
    assert len(server.calls) == 1


def run_python(*arguments):
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
    )


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_parent_leaves_no_orphan():
    """The child ends with its parent, even if that is killed."""
    script = (
        "from openai_eval_client.testing import SimulatedServer\n"
        "print(SimulatedServer(process=True).start().base_url, flush=True)\n"
        "input()\n"
    )
    with run_python("-c", script) as parent:
        url = urlsplit(parent.stdout.readline())
        with socket.create_connection((url.hostname, url.port), timeout=30) as idle:
            parent.kill()
            assert idle.recv(1) == b""  # the child closed it, because it ended


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_told_to_end(end):
    """The command prints its URL, serves with its options, and ends with code 0."""
    flags = [
        "--rpm",
        "5",
        "--fault",
        "500=0.5",
        "--fault",
        "drop=0.1",
        "--script",
        "ok,500",
        "--when",
        'pot=>["ok", {"status": 418}]',
        "--when",
        "capital=>Paris",
        "--lenient",
        "--fault-wait",
        "2.5",
        "--background-polls",
        "0",
        "--models",
        "m,x",
        "--batch-seconds",
        "1",
        "--enqueued-tokens",
        "1000",
    ]
    with run_python("-m", testing_package.__name__, *flags) as process:
        server = SimpleNamespace(base_url=process.stdout.readline().strip())
        status, headers, _ = send(server)
        assert (status, headers["x-ratelimit-limit-requests"]) == (200, "5")
        wanted = {**CHAT, "messages": [{"role": "user", "content": "capital"}], "top_k": 5}
        assert b'"Paris"' in send(server, wanted)[2]
        wanted["messages"] = [{"role": "user", "content": "pot"}]
        assert [send(server, wanted)[0] for _ in range(2)] == [200, 418]
        process.send_signal(end)
        assert process.wait(30) == 0


@pytest.mark.parametrize(
    "wrong", ["--fault=599=1", "--fault=500", "--fault=500=often", "--when=a", "--when=(=>a"]
)
def test_the_command_refuses_nonsense(wrong):
    """A fault or a pattern that makes no sense ends the command with code 2."""
    with run_python("-m", testing_package.__name__, wrong) as process:
        assert process.wait(60) == 2
