"""All batches: created, found, counted."""

from __future__ import annotations

import time
import uuid
from collections import deque
from functools import partial
from itertools import accumulate, chain, repeat
from random import Random
from typing import TYPE_CHECKING, Any

from .._endpoints.answers import required
from .._errors import ApiError, wrong_type
from .._plans import Plan, plan_of, window_seconds
from .._routes import EXACT, Generation
from .batch import Batch, Surroundings
from .files import unknown_file
from .input import NAMES, BatchInput, Reader, error
from .pages import Query, page

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from .._endpoints.answers import Ask, Count
    from .._options import Options
    from .files import Files, StoredFile

Json = dict[str, Any]
ORGANIZATION = "org-simulated"
MOST_PAIRS, LONGEST_KEY, LONGEST_VALUE = 16, 64, 512
STAMPS = (
    "in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled",
)  # fmt: skip


class Batches:
    """The batches of a server, in the order of their creation."""

    def __init__(self, options: Options, files: Files, count: Count, know: Callable[[str], None]) -> None:
        self._options, self._files, self._count, self._know = options, files, count, know
        self._plans = deque(plan_of(told) for told in options.batch_plans)
        self._bounds = tuple(
            zip(accumulate(options.batch_faults.values()), options.batch_faults, strict=True)
        )
        self._batches: dict[str, Batch] = {}

    def shown(self) -> list[Json]:
        """All Batch objects, oldest first."""
        return [batch.shown() for batch in self._batches.values()]

    def list(self, query: Query) -> Json:
        """GET /batches: newest first."""
        return page(self.shown()[::-1], query, default=20, most=100)

    def get(self, ident: str) -> Batch:
        """A batch.

        Raises:
            ApiError: 404 when there is none of that id.
        """
        if batch := self._batches.get(ident):
            return batch
        raise ApiError(404, f"No batch found with id '{ident}'.")

    async def create(self, body: Json) -> Json:
        """POST /batches.

        Raises:
            ApiError: 400 for what the API refuses at once, 429 where it has enough tokens enqueued.
        """
        shown = self._object(body)
        file = self._input(body)
        read = await self._admitted(shown["endpoint"], file)
        plan = self._plans.popleft() if self._plans else plan_of({})
        batch = self._started(shown, plan, file, read, _kept_for(body))
        self._batches[batch.ident] = batch
        return batch.shown()

    def _object(self, body: Json) -> Json:
        """The Batch object at its beginning."""
        for name in ("input_file_id", "endpoint", "completion_window"):
            required(body, name)
        _one_of(body, "endpoint", NAMES)
        _one_of(body, "completion_window", self._options.completion_windows)
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
            **{f"{status}_at": None for status in STAMPS},
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

    async def _admitted(self, url: str, file: StoredFile | None) -> BatchInput | None:
        """The input, read now only where the answer depends on it."""
        at_once = self._options.enqueued_tokens is not None and self._options.enqueued_refusal == "create"
        if file is None or not at_once:
            return None
        read = await self._read(url, file)
        if read.errors or not (refusal := self._over(read)):
            return read
        raise ApiError(429, refusal["message"], code=refusal["code"])

    def _started(
        self,
        shown: Json,
        plan: Plan,
        file: StoredFile | None,
        read: BatchInput | None,
        expires_after: int | None,
    ) -> Batch:
        held = [file]  # let go once read, as it may be large

        async def known() -> BatchInput:
            return read or await self._read(shown["endpoint"], held.pop())

        random = Random(f"batch {self._options.seed} {len(self._batches)}")
        around = Surroundings(
            files=self._files,
            read=known,
            refuse=self._over if read is None else lambda _: None,
            answer=partial(self._answer, _endpoint(shown["endpoint"])),
            outcomes=partial(self._outcomes, plan, random),
            random=random,
            expires_after=expires_after,
        )
        seconds = self._options.batch_seconds if plan.seconds is None else plan.seconds
        batch = Batch(shown, plan, seconds, around)
        if read and not read.errors:
            batch.enqueue(read)
        return batch

    async def _read(self, url: str, file: StoredFile | None) -> BatchInput:
        if file is None:
            message = f"Cannot find file, or organization {ORGANIZATION} does not have access to it."
            return BatchInput(errors=[error("invalid_request", message, "file_id")])
        return await Reader(url, _endpoint(url), self._count, self._know).all(file.content)

    def _over(self, read: BatchInput) -> Json | None:
        """The error for more enqueued tokens than the limit, if this would be more."""
        limit = self._options.enqueued_tokens
        if limit is None:
            return None
        running = (batch for batch in self._batches.values() if not batch.over and batch.model == read.model)
        if sum(batch.tokens for batch in running) + read.tokens <= limit:
            return None
        message = (
            f"Enqueued token limit reached for {read.model} in organization {ORGANIZATION}. Limit: {limit:,} "
            "enqueued tokens. Please try again once some in_progress batches have been completed."
        )
        return error("token_limit_exceeded", message)

    def _answer(self, endpoint: Generation, ask: Ask) -> Json:
        return endpoint.answer(ask, uuid.uuid4().hex, self._options)

    def _outcomes(self, plan: Plan, random: Random, many: int) -> Sequence[str]:
        if plan.lines is not None:
            return [outcome for outcome, _ in zip(chain(plan.lines, repeat("ok")), range(many), strict=False)]
        return [self._drawn(random) for _ in range(many)] if self._bounds else ["ok"] * many

    def _drawn(self, random: Random) -> str:
        point = random.random()
        return next((name for bound, name in self._bounds if point < bound), "ok")


def _endpoint(url: str) -> Generation:
    endpoint = EXACT["POST", url].endpoint
    if not isinstance(endpoint, Generation):
        raise AssertionError(f"{url} generates nothing")  # noqa: TRY004
    return endpoint


def _one_of(body: Json, name: str, allowed: Collection[str]) -> None:
    if not isinstance(body[name], str):
        raise wrong_type(name, "a string")
    if body[name] not in allowed:
        known = ", ".join(f"'{value}'" for value in allowed)
        message = f"Invalid value: '{body[name]}'. Supported values are: {known}."
        raise ApiError(400, message, param=name, code="invalid_value")


def _metadata(given: Any) -> dict[str, str] | None:
    """The metadata, within what the API takes."""
    if given is None:
        return None
    if not isinstance(given, dict):
        raise wrong_type("metadata", "an object")
    if len(given) > MOST_PAIRS:
        raise ApiError(
            400,
            f"Invalid 'metadata': too many properties. Expected an object with at most {MOST_PAIRS} "
            f"properties, but got an object with {len(given)} properties instead.",
            param="metadata",
            code="object_above_max_properties",
        )
    for key, value in given.items():
        if not isinstance(value, str):
            raise wrong_type(f"metadata.{key}", "a string")
        _short("metadata", "property name", key, LONGEST_KEY)
        _short(f"metadata.{key}", "string", value, LONGEST_VALUE)
    return given


def _short(name: str, what: str, text: str, most: int) -> None:
    if len(text) > most:
        raise ApiError(
            400,
            f"Invalid '{name}': {what} too long. Expected a string with maximum length {most}, "
            f"but got a string with length {len(text)} instead.",
            param=name,
            code="string_above_max_length",
        )


def _kept_for(body: Json) -> int | None:
    after = body.get("output_expires_after")
    seconds = after.get("seconds") if isinstance(after, dict) else None
    if after is not None and not isinstance(seconds, int):
        raise wrong_type("output_expires_after.seconds", "an integer")
    return seconds
