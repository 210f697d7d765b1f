"""The simulation in a thread of this process."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from ._simulation import Simulation

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._options import Options
    from ._records import Call

HOST = "127.0.0.1"
BACKLOG = 4096


class ThreadBackend:
    """An event loop in a thread of its own; up when the constructor returns.

    Raises:
        OSError: The port is taken.
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
        """The calls recorded."""
        return self._simulation.recorder.calls()

    def batches(self) -> list[dict[str, Any]]:
        """The Batch objects, oldest first."""
        found: list[dict[str, Any]] = []
        self._in_loop(lambda: found.extend(self._simulation.storage.batches()))
        return deepcopy(found)

    def state(self) -> dict[str, Any]:
        """Counters and gauges."""
        return self._simulation.state()

    def reset(self) -> None:
        """Forget the calls and fill the buckets."""
        self._in_loop(self._simulation.reset)

    def set_limits(self, limits: dict[str, float | None]) -> None:
        """Change the limits of every model."""
        self._in_loop(lambda: self._simulation.limits.change(limits))

    def stop(self) -> None:
        """Close every connection and end the thread."""
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()

    def _in_loop(self, action: Callable[[], None]) -> None:
        """Run an action between two steps of the loop, and wait for it."""
        if threading.current_thread() is self._thread:  # asked from within answer()
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
        """Abort what is open; each connection's task ends with it."""
        for connection in self._simulation.server.connections:
            if isinstance(connection.transport, asyncio.Transport):
                connection.transport.abort()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
