"""Batches: each from its creation to its end, and all of them as the API lists them."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from random import Random
from typing import TYPE_CHECKING, Any

from .._endpoints import required
from .._faults import ApiError, Faults, wrong_type, wrong_value
from .._options import TERMINAL, Plan, plan_of, window_seconds
from .files import Query, page, unknown_file
from .input import URLS, BatchInput, Reader, Task, Turns, batch_error
from .lines import Lines

if TYPE_CHECKING:
    import io
    from collections.abc import Awaitable, Callable, Collection, Sequence

    from .._endpoints import Count
    from .._options import Options
    from .files import Files, StoredFile

Json = dict[str, Any]
ORGANIZATION = "org-simulated"
MOST_PAIRS, LONGEST_KEY, LONGEST_VALUE = 16, 64, 512  # of metadata
VALIDATED, ANSWERED = 0.1, 0.9  # shares of a batch's time
TIMES = (
    "in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled",
)  # fmt: skip


class Batch:
    """A batch that lives in a task of its own; its object is consistent whenever that task waits."""

    def __init__(
        self,
        shown: Json,
        plan: Plan,
        options: Options,
        files: Files,
        *,
        seed: str,
        read: Callable[[], Awaitable[BatchInput]],
        refuse: Callable[[BatchInput], Json | None],  # returns the error that ends it after validation
        expires_after: int | None,
    ) -> None:
        self._shown, self._plan, self._files = shown, plan, files
        self._read, self._refuse, self._expires_after = read, refuse, expires_after
        faults = options.batch_faults if plan.lines is None else {}
        self._outcomes, self._random = Faults(faults, plan.lines or (), seed), Random(seed)
        self._lines = Lines(URLS[shown["endpoint"]][0], options)
        self._seconds = options.batch_seconds if plan.seconds is None else plan.seconds
        self._clock = asyncio.get_running_loop().time
        self._created = self._clock()
        self._left: list[tuple[Task, str]] = []  # requests not run yet, with their outcomes
        self._total = 0
        self.model: str | None = None
        self.tokens = 0
        self._task = asyncio.ensure_future(self._live())

    @property
    def ended(self) -> bool:
        return self._shown["status"] in TERMINAL

    def as_json(self) -> Json:
        counts = {"total": self._total, "completed": self._lines.completed, "failed": self._lines.failed}
        told = self._plan.counts if self._total or self.ended else {}
        return {**self._shown, "request_counts": {**counts, **told}}

    def enqueue(self, read: BatchInput) -> None:
        """Count its tokens as enqueued until it ends."""
        self.model = self._shown["model"] = read.model
        self.tokens = read.tokens

    def cancel(self) -> Json:
        """Cancel it and return the Batch object; raise a 409 if it has ended otherwise."""
        status = self._shown["status"]
        if status not in ("cancelling", "cancelled"):
            if self.ended:
                raise ApiError(409, f"Cannot cancel a batch with status '{status}'.")
            self._task.cancel()
            self._enter("cancelling")
            self._task = asyncio.ensure_future(self._wind_down())
        return self.as_json()

    async def _live(self) -> None:
        try:
            await self._pass_through()
        except Exception as problem:  # noqa: BLE001 - a bug must not look like a batch that takes long
            self._fail([batch_error("server_error", f"The simulation failed: {problem!r}")])

    async def _pass_through(self) -> None:
        """Go through the statuses up to the plan's."""
        last = self._plan.status
        read = await self._read()
        await self._until(VALIDATED)
        if last == "validating":
            return
        if errors := self._errors(read):
            self._fail(errors)
            return
        self.enqueue(read)
        self._enter("in_progress")
        await self._run(read.tasks)
        if last == "in_progress":
            return
        await self._until(ANSWERED)
        self._enter("cancelling" if last in ("cancelling", "cancelled") else "finalizing")
        if last in TERMINAL:
            await self._until(1)
            self._end(last)

    def _errors(self, read: BatchInput) -> list[Json]:
        """Return what ends the batch after its validation."""
        if read.errors:
            return read.errors
        if not self._plan.runs:
            return [batch_error("server_error", "The batch failed, as the simulation was told.")]
        refusal = self._refuse(read)
        return [refusal] if refusal else []

    async def _run(self, tasks: list[Task]) -> None:
        """Run the plan's share of the requests, in random order, each at its time."""
        self._total = len(tasks)
        self._left = [(task, self._outcomes.draw() or "ok") for task in tasks]
        tasks.clear()  # to free each once it is answered
        self._random.shuffle(self._left)
        many, turns = round(self._plan.share * self._total), Turns()
        for number in range(1, many + 1):
            moment = VALIDATED + (ANSWERED - VALIDATED) * number / many
            if self._seconds_to(moment) > 0:
                await self._until(moment)
            else:
                await turns.give()
            self._lines.run(*self._left.pop())

    async def _wind_down(self) -> None:
        await asyncio.sleep((1 - ANSWERED) * self._seconds)
        self._end("cancelled")

    def _seconds_to(self, share: float) -> float:
        """Return the seconds until this share of the batch's time is over."""
        return self._created + share * self._seconds - self._clock()

    async def _until(self, share: float) -> None:
        await asyncio.sleep(max(0.0, self._seconds_to(share)))

    def _enter(self, status: str) -> None:
        self._shown["status"] = status
        self._shown[f"{status}_at"] = int(time.time())

    def _fail(self, errors: Sequence[Json]) -> None:
        self._left, self._total = [], 0
        self._close("failed", errors)

    def _end(self, status: str) -> None:
        """Write the files and take the final status."""
        reason = "cancelled" if status == "cancelled" else "expired"
        for task, _ in self._left:
            self._lines.leave(task, reason)
        self._left = []
        lines, plan = self._lines, self._plan
        self._shown["output_file_id"] = self._write("output", lines.output, plan.output_file)
        self._shown["error_file_id"] = self._write("error", lines.failures, plan.error_file)
        self._shown["usage"] = lines.usage()
        self._close(status)

    def _write(self, name: str, lines: io.BytesIO, wanted: bool | str) -> str | None:
        """Write a file of these lines and return its id, as far as the plan wants it."""
        if wanted == "":
            return ""
        if wanted is False or not (lines.tell() or wanted == "empty"):
            return None
        content = b"" if wanted == "empty" else lines.getvalue()
        lines.truncate(0)  # only the file holds them now
        written = self._files.write(content, f"{self._shown['id']}_{name}.jsonl", self._expires_after)
        if wanted == "gone":
            self._files.forget(written.ident)
        return written.ident

    def _close(self, status: str, errors: Sequence[Any] | None = None) -> None:
        shown = errors if self._plan.errors is None else self._plan.errors
        if shown is not None:
            self._shown["errors"] = {"object": "list", "data": [dict(error) for error in shown]}
        if self._plan.input_gone:
            self._files.forget(self._shown["input_file_id"])
        self._enter(status)


class Batches:
    """The batches of a server, in the order of their creation."""

    def __init__(
        self, options: Options, files: Files, count: Count, check_model: Callable[[str], None]
    ) -> None:
        self._options, self._files, self._count, self._check_model = options, files, count, check_model
        self._plans = deque(plan_of(given) for given in options.batch_plans)
        self._batches: dict[str, Batch] = {}

    def as_json(self) -> list[Json]:
        return [batch.as_json() for batch in self._batches.values()]

    def list(self, query: Query) -> Json:
        return page(self.as_json()[::-1], query, default=20, most=100)

    def get(self, ident: str) -> Batch:
        """Return a batch; raise a 404 if it is unknown."""
        if batch := self._batches.get(ident):
            return batch
        raise ApiError(404, f"No batch found with id '{ident}'.")

    async def create(self, body: Json) -> Json:
        """Create a batch and return it; raise a 400 if it is refused, a 429 if too much is enqueued."""
        shown = self._new(body)
        url, file, after = shown["endpoint"], self._input(body), _expires_after(body)
        read = await self._read_at_once(url, file)
        held = [file]  # let go once read, as it may be large

        async def known() -> BatchInput:
            return read or await self._read(url, held.pop())

        batch = self._batches[shown["id"]] = Batch(
            shown,
            self._plans.popleft() if self._plans else plan_of({}),
            self._options,
            self._files,
            seed=f"batch {self._options.seed} {len(self._batches)}",
            read=known,
            refuse=self._refusal if read is None else lambda _: None,
            expires_after=after,
        )
        if read and not read.errors:
            batch.enqueue(read)
        return batch.as_json()

    def _new(self, body: Json) -> Json:
        for name in ("input_file_id", "endpoint", "completion_window"):
            required(body, name)
        _check_value(body, "endpoint", URLS)
        _check_value(body, "completion_window", self._options.completion_windows)
        now = int(time.time())
        return {
            "id": f"batch_{uuid.uuid4().hex}",
            "object": "batch",
            "endpoint": body["endpoint"],
            "model": None,
            "errors": None,
            "input_file_id": body["input_file_id"],
            "completion_window": body["completion_window"],
            "status": "validating",
            "output_file_id": None,
            "error_file_id": None,
            "created_at": now,
            "expires_at": now + window_seconds(body["completion_window"]),
            **{f"{status}_at": None for status in TIMES},
            "usage": None,
            "metadata": _metadata(body.get("metadata")),
        }

    def _input(self, body: Json) -> StoredFile | None:
        ident = body["input_file_id"]
        file = self._files.find(ident)
        if file is None and self._options.unknown_file == "create":
            raise unknown_file(400, ident, "input_file_id")
        if file and file.purpose != "batch":
            message = f"File '{ident}' has purpose '{file.purpose}', but 'batch' is required."
            raise ApiError(400, message, param="input_file_id", code="invalid_purpose")
        return file

    async def _read_at_once(self, url: str, file: StoredFile | None) -> BatchInput | None:
        """Read the input if the answer to the creation depends on it; raise a 429 for too many tokens."""
        at_once = self._options.enqueued_tokens is not None and self._options.enqueued_refusal == "create"
        if file is None or not at_once:
            return None
        read = await self._read(url, file)
        if not read.errors and (refusal := self._refusal(read)):
            raise ApiError(429, refusal["message"], code=refusal["code"])
        return read

    async def _read(self, url: str, file: StoredFile | None) -> BatchInput:
        if file is None:
            message = f"Cannot find file, or organization {ORGANIZATION} does not have access to it."
            return BatchInput(errors=[batch_error("invalid_request", message, "file_id")])
        return await Reader(url, self._count, self._check_model, self._options.lenient).all(file.content)

    def _refusal(self, read: BatchInput) -> Json | None:
        """Return the error for more enqueued tokens than the limit, if this input would exceed it."""
        limit = self._options.enqueued_tokens
        if limit is None:
            return None
        running = [one for one in self._batches.values() if not one.ended and one.model == read.model]
        if sum(batch.tokens for batch in running) + read.tokens <= limit:
            return None
        message = (
            f"Enqueued token limit reached for {read.model} in organization {ORGANIZATION}. Limit: {limit:,} "
            "enqueued tokens. Please try again once some in_progress batches have been completed."
        )
        return batch_error("token_limit_exceeded", message)


def _check_value(body: Json, name: str, allowed: Collection[str]) -> None:
    if not isinstance(body[name], str):
        raise wrong_type(name, "a string")
    if body[name] not in allowed:
        raise wrong_value(name, body[name], allowed)


def _metadata(given: Any) -> dict[str, str] | None:
    """Return the metadata; raise a 400 for more than the API takes."""
    if given is None:
        return None
    if not isinstance(given, dict):
        raise wrong_type("metadata", "an object")
    if len(given) > MOST_PAIRS:
        message = (
            f"Invalid 'metadata': too many properties. Expected an object with at most {MOST_PAIRS} "
            f"properties, but got an object with {len(given)} properties instead."
        )
        raise ApiError(400, message, param="metadata", code="object_above_max_properties")
    for key, value in given.items():
        if not isinstance(value, str):
            raise wrong_type(f"metadata.{key}", "a string")
        _check_length("metadata", "property name", key, LONGEST_KEY)
        _check_length(f"metadata.{key}", "string", value, LONGEST_VALUE)
    return given


def _check_length(name: str, what: str, text: str, most: int) -> None:
    if len(text) > most:
        message = (
            f"Invalid '{name}': {what} too long. Expected a string with maximum length {most}, "
            f"but got a string with length {len(text)} instead."
        )
        raise ApiError(400, message, param=name, code="string_above_max_length")


def _expires_after(body: Json) -> int | None:
    after = body.get("output_expires_after")
    seconds = after.get("seconds") if isinstance(after, dict) else None
    if after is not None and not isinstance(seconds, int):
        raise wrong_type("output_expires_after.seconds", "an integer")
    return seconds
