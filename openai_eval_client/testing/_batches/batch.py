"""One batch, from its creation to its end."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .._errors import ApiError
from .._plans import TERMINAL
from .input import SLICE, BatchInput, Task, error
from .lines import Lines

if TYPE_CHECKING:
    import io
    from collections.abc import Awaitable, Callable, Sequence
    from random import Random

    from .._endpoints.answers import Ask
    from .._plans import Plan
    from .files import Files

Json = dict[str, Any]
VALIDATED, ANSWERED = 0.1, 0.9  # shares of a batch's time


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a batch needs of the server.

    Attributes:
        files: Where its files go.
        read: Reads its input.
        refuse: Called with the input once read; returns the error that ends the batch, if any.
        answer: Answers one request.
        outcomes: Draws what becomes of so many lines, in input order.
        random: Shuffles the lines.
        expires_after: Seconds its files are said to be kept; None is for ever.
    """

    files: Files
    read: Callable[[], Awaitable[BatchInput]]
    refuse: Callable[[BatchInput], Json | None]
    answer: Callable[[Ask], Json]
    outcomes: Callable[[int], Sequence[str]]
    random: Random
    expires_after: int | None


class Batch:
    """A batch living in a task of its own, whose object is whole whenever that task waits."""

    def __init__(self, shown: Json, plan: Plan, seconds: float, around: Surroundings) -> None:
        self._shown, self._plan, self._around = shown, plan, around
        self._clock = asyncio.get_running_loop().time
        self._seconds, self._created = seconds, self._clock()
        self._lines = Lines(around.answer)
        self._left: list[tuple[Task, str]] = []
        self._total = 0
        self.tokens = 0
        self._task = asyncio.ensure_future(self._live())

    @property
    def ident(self) -> str:
        """Its id."""
        return str(self._shown["id"])

    @property
    def model(self) -> str | None:
        """Its model, once known."""
        model: str | None = self._shown["model"]
        return model

    @property
    def over(self) -> bool:
        """Whether nothing more will happen to it."""
        return self._shown["status"] in TERMINAL

    def shown(self) -> Json:
        """The Batch object as of now."""
        counts = {"total": self._total, "completed": self._lines.completed, "failed": self._lines.failed}
        told = self._plan.counts if self._total or self.over else {}
        return {**self._shown, "request_counts": {**counts, **told}}

    def enqueue(self, read: BatchInput) -> None:
        """Count its tokens as enqueued until it is over."""
        self._shown["model"], self.tokens = read.model, read.tokens

    def cancel(self) -> None:
        """Stop it, as POST /batches/{id}/cancel does.

        Raises:
            ApiError: 409 when it has come to another end.
        """
        status = self._shown["status"]
        if status in ("cancelling", "cancelled"):
            return
        if self.over:
            raise ApiError(409, f"Cannot cancel a batch with status '{status}'.")
        self._task.cancel()
        self._enter("cancelling")
        self._task = asyncio.ensure_future(self._wind_down())

    async def _live(self) -> None:
        try:
            await self._pass()
        except Exception as problem:  # noqa: BLE001 - a fault must not look like a batch that takes long
            self._fail([error("server_error", f"The simulation failed: {problem!r}")])

    async def _pass(self) -> None:
        plan = self._plan
        read = await self._around.read()
        await self._until(VALIDATED)
        if plan.status == "validating":
            return
        if errors := self._errors(read):
            self._fail(errors)
            return
        self.enqueue(read)
        self._enter("in_progress")
        await self._run(read.tasks)
        if plan.status == "in_progress":
            return
        await self._until(ANSWERED)
        self._enter("cancelling" if plan.status in ("cancelling", "cancelled") else "finalizing")
        if plan.status in ("finalizing", "cancelling"):
            return
        await self._until(1)
        self._end(plan.status)

    def _errors(self, read: BatchInput) -> list[Json]:
        """What ends the batch after its validation."""
        if read.errors:
            return read.errors
        if not self._plan.runs:
            return [error("server_error", "The batch failed, as the simulation was told.")]
        refusal = self._around.refuse(read)
        return [refusal] if refusal else []

    async def _run(self, tasks: list[Task]) -> None:
        """Answer the plan's share of the lines, in another order than they came, each in its time."""
        self._total = len(tasks)
        self._left = list(zip(tasks, self._around.outcomes(len(tasks)), strict=True))
        tasks.clear()  # each goes as it is answered
        self._around.random.shuffle(self._left)
        many = round(self._plan.share * self._total)
        due = time.monotonic() + SLICE
        for number in range(1, many + 1):
            moment = VALIDATED + (ANSWERED - VALIDATED) * number / many
            if self._wait(moment) > 0:
                await self._until(moment)
            elif time.monotonic() >= due:
                await asyncio.sleep(0)
                due = time.monotonic() + SLICE
            self._lines.run(*self._left.pop())

    async def _wind_down(self) -> None:
        await asyncio.sleep((1 - ANSWERED) * self._seconds)
        self._end("cancelled")

    def _wait(self, share: float) -> float:
        """Seconds until this share of the batch's time is over."""
        return self._created + share * self._seconds - self._clock()

    async def _until(self, share: float) -> None:
        await asyncio.sleep(max(0.0, self._wait(share)))

    def _enter(self, status: str) -> None:
        self._shown["status"] = status
        self._shown[f"{status}_at"] = int(time.time())

    def _fail(self, errors: Sequence[Any]) -> None:
        told = errors if self._plan.errors is None else self._plan.errors
        self._shown["errors"] = {"object": "list", "data": [dict(one) for one in told]}
        self._left, self._total = [], 0
        self._close("failed")

    def _end(self, status: str) -> None:
        """Write the files, and be over."""
        reason = "cancelled" if status == "cancelled" else "expired"
        for task, _ in self._left:
            self._lines.leave(task, reason)
        self._left = []
        lines, plan = self._lines, self._plan
        if plan.errors is not None:
            self._shown["errors"] = {"object": "list", "data": [dict(one) for one in plan.errors]}
        self._shown["output_file_id"] = self._write("output", lines.output, plan.output_file)
        self._shown["error_file_id"] = self._write("error", lines.failures, plan.error_file)
        self._shown["usage"] = lines.usage()
        self._close(status)

    def _write(self, name: str, lines: io.BytesIO, wanted: bool | str) -> str | None:
        """The id of a file of these lines, where there are any and it is to be there."""
        if wanted == "":
            return ""
        if wanted is False or not (lines.tell() or wanted == "empty"):
            return None
        content = b"" if wanted == "empty" else lines.getvalue()
        lines.truncate(0)  # the file alone holds them now
        written = self._around.files.write(content, f"{self.ident}_{name}.jsonl", self._around.expires_after)
        if wanted == "gone":
            self._around.files.forget(written.ident)
        return written.ident

    def _close(self, status: str) -> None:
        if self._plan.input_gone:
            self._around.files.forget(self._shown["input_file_id"])
        self._enter(status)
