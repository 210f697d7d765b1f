"""A Redis server of the tests' own, on a free port."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time

import pytest

SERVER = shutil.which("redis-server") or shutil.which("valkey-server")


class LocalRedis:
    """A server that keeps nothing on disk: it is empty when it is started again."""

    def __init__(self, *, password: str = "") -> None:
        with socket.socket() as port, socket.socket() as bus:
            port.bind(("127.0.0.1", 0))
            bus.bind(("127.0.0.1", 0))
            self.port, self.bus = port.getsockname()[1], bus.getsockname()[1]
        self.password = password
        self.url = f"redis://{f':{password}@' if password else ''}127.0.0.1:{self.port}/0"
        self._folder = tempfile.TemporaryDirectory()  # removed with the server
        self.socket = f"{self._folder.name}/redis.sock"
        secret = ["--requirepass", password] if password else []
        quiet = ["--save", "", "--appendonly", "no", "--loglevel", "warning", "--dir", self._folder.name]
        quiet += ["--unixsocket", self.socket]
        self._command = [SERVER, "--port", str(self.port), "--bind", "127.0.0.1", *quiet, *secret]

    def as_node(self) -> LocalRedis:
        """Start it as a node of a cluster."""
        self._command += ["--cluster-enabled", "yes", "--cluster-port", str(self.bus)]
        return self

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stop()
        self._folder.cleanup()

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        while not self._answers():
            assert self._process.poll() is None, "redis-server did not start"
            time.sleep(0.01)

    def _answers(self) -> bool:
        """Return whether it serves; an open port alone could be one that it is about to fail on."""
        with socket.socket(socket.AF_UNIX) as own:
            own.settimeout(1)
            try:
                own.connect(self.socket)
                own.sendall(b"PING\r\n")
                return bool(own.recv(1))
            except OSError:
                return False

    def stop(self) -> None:
        """End it at once, as a crash would."""
        self._process.kill()
        self._process.wait()

    def hang(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def client(self):
        import redis

        return redis.Redis.from_url(self.url)

    def questions(self) -> int:
        """Return how many messages workers sent since the server started."""
        with self.client() as client:
            return client.info("commandstats").get("cmdstat_evalsha", {}).get("calls", 0)


def started_redis(**options) -> LocalRedis:
    """A Redis server of the tests' own; where there is none to start, the test is skipped."""
    if SERVER is None:
        reason = "no redis-server on this machine"
        pytest.fail(reason) if os.environ.get("OPENAI_EVAL_CLIENT_SKIP_NOTHING") else pytest.skip(reason)
    pytest.importorskip("redis")
    return LocalRedis(**options)
