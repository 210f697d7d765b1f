"""The simulation in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from http.client import HTTPConnection
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ._options import CALLABLES, Options, as_json
from ._records import Call

if TYPE_CHECKING:
    from typing import IO

TIMEOUT = 60.0
ROOT = Path(__file__).parents[2]


def check_process_options(options: Options) -> None:
    """Raise ValueError for options that another process cannot be given."""
    if given := [name for name in CALLABLES if getattr(options, name) is not None]:
        raise ValueError(f"{', '.join(given)}: not with process=True, a function cannot be handed over")


class ProcessBackend:
    """A child process, up when the constructor returns; it ends when its standard input closes.

    Raises:
        OSError: The port is taken.
        RuntimeError: The child died before it listened.
    """

    def __init__(self, options: Options, cpu: int | None) -> None:
        command = [sys.executable, "-m", __package__, "--child"]
        self._child = subprocess.Popen(  # noqa: S603
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_environment()
        )
        try:
            self.base_url = self._greet({**as_json(options), "cpu": cpu})
        except BaseException:
            self.stop()
            raise

    def calls(self) -> list[Call]:
        """The calls recorded."""
        return [Call(**call) for call in self._ask("GET", "calls")]

    def batches(self) -> list[dict[str, Any]]:
        """The Batch objects, oldest first."""
        batches: list[dict[str, Any]] = self._ask("GET", "batches")
        return batches

    def state(self) -> dict[str, Any]:
        """Counters and gauges."""
        state: dict[str, Any] = self._ask("GET", "state")
        return state

    def reset(self) -> None:
        """Forget the calls and fill the buckets."""
        self._ask("POST", "reset")

    def set_limits(self, limits: dict[str, float | None]) -> None:
        """Change the limits of every model."""
        self._ask("POST", "limits", json.dumps(limits).encode())

    def stop(self) -> None:
        """End the child."""
        stdin, stdout = self._pipes()
        stdin.close()
        try:
            self._child.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        stdout.close()

    def _pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        if self._child.stdin is None or self._child.stdout is None:
            raise AssertionError("both were asked for as pipes")
        return self._child.stdin, self._child.stdout

    def _greet(self, options: dict[str, Any]) -> str:
        """Hand over the options, and learn the base URL."""
        stdin, stdout = self._pipes()
        stdin.write(json.dumps(options).encode() + b"\n")
        stdin.flush()
        line = stdout.readline()
        if not line:
            raise RuntimeError(
                f"the simulated server ended with code {self._child.wait()} before it listened"
            )
        answer = json.loads(line)
        if "base_url" not in answer:
            raise OSError(answer["errno"], answer["error"])
        return str(answer["base_url"])

    def _ask(self, method: str, what: str, body: bytes | None = None) -> Any:
        # not urllib: it would send this through the environment's proxy
        connection = HTTPConnection(urlsplit(self.base_url).netloc, timeout=TIMEOUT)
        try:
            connection.request(method, f"/_sim/{what}", body)
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()


def _environment() -> dict[str, str]:
    """The environment, with this very package importable however the parent found it."""
    known = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *([known] if known else [])])}
