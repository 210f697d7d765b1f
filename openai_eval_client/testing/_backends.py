"""The two places where a simulation runs: a thread of this process, or a process of its own."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import Future
from copy import deepcopy
from http.client import HTTPConnection
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ._exchange import Call
from ._options import Options, as_json
from ._simulation import Simulation

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import IO

HOST = "127.0.0.1"
BACKLOG = 4096
TIMEOUT = 60.0  # seconds for a child to answer or to end
ROOT = Path(__file__).parents[2]


class ThreadBackend:
    """A simulation in an event loop of its own thread; it listens when the constructor returns.

    The constructor raises OSError if the port is taken.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self._ready: Future[int] = Future()
        self._thread = threading.Thread(target=self._run, name="simulated-openai-server", daemon=True)
        self._thread.start()
        try:
            self.base_url = f"http://{HOST}:{self._ready.result()}/v1"
        except BaseException:
            self._thread.join()
            raise

    def calls(self) -> list[Call]:
        return self._simulation.recorder.calls()

    def batches(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        self._in_loop(lambda: found.extend(self._simulation.storage.batches()))
        return deepcopy(found)

    def state(self) -> dict[str, Any]:
        return self._simulation.state()

    def reset(self) -> None:
        self._in_loop(self._simulation.reset)

    def set_limits(self, limits: dict[str, float | None]) -> None:
        self._in_loop(lambda: self._simulation.limits.change(limits))

    def stop(self) -> None:
        """Close every connection and end the thread."""
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()

    def _in_loop(self, action: Callable[[], None]) -> None:
        """Run an action between two steps of the loop, and wait for it."""
        if threading.current_thread() is self._thread:  # called from within answer()
            action()
            return

        async def step() -> None:
            action()

        asyncio.run_coroutine_threadsafe(step(), self._loop).result()

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:
            if self._ready.done():
                raise
            self._ready.set_exception(error)

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self._simulation = Simulation(self._options)
        factory = self._simulation.server
        listener = await self._loop.create_server(factory, HOST, self._options.port, backlog=BACKLOG)
        self._ready.set_result(listener.sockets[0].getsockname()[1])
        await self._stopping.wait()
        listener.close()
        await self._close_connections()

    async def _close_connections(self) -> None:
        """Abort what is open; the task of each connection ends with it."""
        for connection in self._simulation.server.connections:
            if isinstance(connection.transport, asyncio.Transport):
                connection.transport.abort()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class ProcessBackend:
    """A simulation in a child process, with the methods of ThreadBackend.

    The child listens when the constructor returns, and ends when its standard input closes. The constructor
    raises OSError if the port is taken, and RuntimeError if the child ends before it listens.
    """

    def __init__(self, options: Options, cpu: int | None) -> None:
        # the child finds this very package, however the parent found it
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        command = [sys.executable, "-m", __package__, "--child"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        pipe = subprocess.PIPE
        self._child = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment)  # noqa: S603
        try:
            self.base_url = self._greet({**as_json(options), "cpu": cpu})
        except BaseException:
            self.stop()
            raise

    def calls(self) -> list[Call]:
        return [Call(**call) for call in self._ask("GET", "calls")]

    def batches(self) -> list[dict[str, Any]]:
        return list(self._ask("GET", "batches"))

    def state(self) -> dict[str, Any]:
        return dict(self._ask("GET", "state"))

    def reset(self) -> None:
        self._ask("POST", "reset")

    def set_limits(self, limits: dict[str, float | None]) -> None:
        self._ask("POST", "limits", json.dumps(limits).encode())

    def stop(self) -> None:
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
        """Pass the options to the child and return its base URL."""
        stdin, stdout = self._pipes()
        stdin.write(json.dumps(options).encode() + b"\n")
        stdin.flush()
        line = stdout.readline()
        if not line:
            code = self._child.wait()
            raise RuntimeError(f"the simulated server ended with code {code} before it listened")
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
