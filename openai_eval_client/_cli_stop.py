"""Ctrl-C and SIGTERM: what is in flight may finish, for a moment; the second time, nothing may."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from openai_eval_client import _bar
from openai_eval_client._cli_common import INTERRUPTED, say
from openai_eval_client.client import OpenAIClient

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine
    from types import TracebackType

    from typing_extensions import Self

    from openai_eval_client.config import OpenAIConfig

T = TypeVar("T")

GRACE = 5.0  # seconds that what is in flight has to finish
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_NOT_OURS = (signal.SIG_IGN, None)  # as a shell has it for what runs in the background; not from Python


class Interrupts:
    """Takes the signals while it is entered, inside a running event loop.

    Args:
        at_once: Whether there is nothing to wait for: the second signal is then as without this.
        farewell: What is said when the second signal ends it all.

    Attributes:
        event: Set by the first signal.
    """

    def __init__(self, *, at_once: bool = False, farewell: str = "") -> None:
        self.event = asyncio.Event()
        self._at_once = at_once
        self._farewell = farewell
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._timer: asyncio.TimerHandle | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._seen = False

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            heeded = [number for number in _SIGNALS if signal.getsignal(number) not in _NOT_OURS]
            self._before = {number: signal.signal(number, self._on_signal) for number in heeded}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._give_back()

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: object) -> None:  # noqa: ARG002  # what the system hands over
        if self._seen:
            self._end()
        self._seen = True
        self._loop.call_soon_threadsafe(self._stop)

    def _end(self) -> NoReturn:
        if self._at_once:
            self._give_back()
            raise KeyboardInterrupt
        below = "\n\n" if _bar.is_open() else ""
        with contextlib.suppress(OSError):  # as low as can be: a line may be half written
            os.write(sys.stderr.fileno(), f"{below}{self._farewell}\n".encode())
        os._exit(INTERRUPTED)

    def _stop(self) -> None:
        end: Callable[[], object] = self._task.cancel if self._task is not None else self._loop.stop
        self.event.set()
        if self._at_once:
            end()
            return
        self._timer = self._loop.call_later(GRACE, end)
        say(f"interrupted: what is in flight may finish, for {GRACE:g} s; again: end at once")


def complete(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end; a signal cancels it at once, whatever task of it is at work.

    Before Python 3.11, `asyncio.run` leaves it to chance which one meets the `KeyboardInterrupt`.

    Raises:
        KeyboardInterrupt: A signal came.
    """

    async def working() -> T:
        with Interrupts(at_once=True) as signals:
            try:
                return await work
            except asyncio.CancelledError:
                if not signals.event.is_set():
                    raise
                raise KeyboardInterrupt from None

    return asyncio.run(working())


def with_client(config: OpenAIConfig, work: Callable[[OpenAIClient], Awaitable[T]], **options: Any) -> T:
    """Do something with a client, which is closed afterwards; a signal ends it, as in `complete`."""

    async def working() -> T:
        async with OpenAIClient(config, **options) as client:
            return await work(client)

    return complete(working())


def command(*, add: str, without: str) -> str:
    """Return this program's command line with one option more, and without another."""
    program = Path(sys.argv[0]).name
    start = "python -m openai_eval_client" if program == "__main__.py" else program
    kept = [argument for argument in sys.argv[1:] if argument not in {without, add}]
    return f"{start} {shlex.join([*kept, add])}"
