"""Work for a thread of its own, asked for from any event loop: all that waits is done in one go."""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from openai_eval_client._forks import mind_forks
from openai_eval_client._loops import call_on

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_LINGER = (
    0.1  # seconds an idle thread waits for more; also the longest that it holds up the interpreter's end
)


class Background:
    """Does jobs in groups on one thread, which is there only as long as there are any.

    Args:
        name: The thread's.
        work: Called with a group of jobs in the order asked for; returns one outcome for each, an exception
            where it is to be raised.
    """

    def __init__(self, name: str, work: Callable[[Sequence[Any]], Sequence[Any]]) -> None:
        self._name = name
        self._work = work
        self._reset()
        mind_forks(self)

    def _reset(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[tuple[Any, asyncio.Future[Any]]] = []
        self._thread: threading.Thread | None = None
        self._linger = _LINGER

    async def do(self, job: Any) -> Any:
        """Have one job done and return its outcome; it is done also when nobody waits any more."""
        outcome = asyncio.get_running_loop().create_future()
        with self._changed:
            if self._thread is None:
                self._thread = self._started()
            self._waiting.append((job, outcome))
            self._changed.notify()
        return await outcome

    def finish(self) -> None:
        """Wait until all jobs are done and the thread has ended."""
        with self._changed:
            self._linger = 0.0
            self._changed.notify()
            thread = self._thread
        if thread is not None:
            thread.join()

    def before_fork(self) -> None:
        """Nothing: the jobs go on in the parent."""

    def after_fork(self, *, child: bool) -> None:
        """Forget thread and jobs in the child."""
        if child:
            self._reset()

    def _started(self) -> threading.Thread:
        thread = threading.Thread(target=self._run, name=self._name)
        thread.start()
        return thread

    def _run(self) -> None:
        while group := self._next_group():
            outcomes = self._outcomes([job for job, _ in group])
            by_loop = defaultdict(list)
            for (_, waiter), outcome in zip(group, outcomes, strict=True):
                by_loop[waiter.get_loop()].append((waiter, outcome))
            for loop, pairs in by_loop.items():
                call_on(loop, _hand_out, pairs)

    def _next_group(self) -> list[tuple[Any, asyncio.Future[Any]]]:
        with self._changed:
            if not self._waiting:
                self._changed.wait(self._linger)
            group, self._waiting = self._waiting, []
            if not group:
                self._thread = None
            return group

    def _outcomes(self, jobs: Sequence[Any]) -> Sequence[Any]:
        try:
            return self._work(jobs)
        except Exception as error:  # noqa: BLE001  # raised where each job was asked for
            return [error] * len(jobs)


def _hand_out(pairs: Sequence[tuple[asyncio.Future[Any], Any]]) -> None:
    for waiter, outcome in pairs:
        if waiter.done():
            continue
        if isinstance(outcome, Exception):
            waiter.set_exception(outcome)
        else:
            waiter.set_result(outcome)
