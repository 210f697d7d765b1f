"""The Batch API: its calls, each safe to repeat; what a batch object says; how a job is recorded."""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import dataclasses
import functools
import itertools
import json
import operator
import re
import time
import uuid
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import IO, TYPE_CHECKING, Annotated, Any, TypeVar

import openai
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from pydantic import ValidationError as PydanticError

from openai_eval_client._batches.files import Temperature, temporary_file
from openai_eval_client._sdk import call_sdk, deadline, retry_for, retrying
from openai_eval_client._validation import check_json, check_mapping, check_text, reject_input, shown
from openai_eval_client._wire import forget_key, masked, read_failure
from openai_eval_client.errors import BatchError, QuotaError, ValidationError, sdk_httpx
from openai_eval_client.models import BatchJobStatus

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Mapping, Sequence

    from openai.types import Batch, FileObject

    from openai_eval_client._batches.files import InputFile
    from openai_eval_client.config import OpenAIConfig

T = TypeVar("T")

# --- calls ------------------------------------------------------------------------------------------------

_URL = "https://client.invalid/"  # of the request that an error names
_FILE_LAG = 60.0  # seconds for which a new file may be unknown
_LATE = 2.0  # seconds in which a batch may still appear whose creation seemed to fail
_SLOWEST = 50_000  # bytes a second of the slowest upload that is waited for
_PARTIAL, _BAD_REQUEST, _NOT_FOUND, _NO_SUCH_RANGE = 206, 400, 404, 416
_WINDOW = "completion_window"
_CLOCKS_APART = 3600.0  # seconds; how much earlier than ours the server's clock may be


class BatchApi:
    """The endpoints of files and batches; a call is made again where that may help."""

    def __init__(self, sdk: openai.AsyncOpenAI, config: OpenAIConfig, max_wait: float) -> None:
        self._sdk = sdk
        self.key = config.api_key
        self._timeout = config.timeout
        self._retries = config.max_retries
        self._max_wait = max_wait

    async def upload(self, input_file: InputFile) -> str:
        """Upload an input file and return its id, once the server knows it."""
        files = self._sdk.files

        def attempt() -> Awaitable[FileObject]:
            file = ("requests.jsonl", input_file.lines(), "application/jsonl")
            return _checked(files.create(file=file, purpose="batch", timeout=None))

        uploaded = await self._repeat(attempt, self._timeout + input_file.size / _SLOWEST)
        look = functools.partial(files.retrieve, uploaded.id, timeout=None)
        with contextlib.suppress(openai.APIError):  # some servers have no such endpoint
            await _once_known(uploaded.id, functools.partial(self._repeat, look, self._timeout), _FILE_LAG)
        return uploaded.id

    async def create(self, job: JobRecord, file: InputFile) -> Batch:
        """Create the batch of an uploaded file, once: after an unclear failure it is looked for first."""

        async def attempt() -> Batch:
            if file.key in job.unclear:
                await asyncio.sleep(min(_LATE, self._timeout / 4))
                found = await self.find(job, file)
                if found is not None:
                    return found
            job.unclear.add(file.key)
            call = self._sdk.batches.create(
                completion_window=job.window,  # type: ignore[arg-type]  # others than OpenAI take "7d"
                endpoint=job.endpoint,  # type: ignore[arg-type]
                input_file_id=str(file.file_id),
                metadata=job.metadata_of(file),
                timeout=None,
            )
            try:
                return read_batch(await _checked(call))
            except openai.APIStatusError as error:
                is_bad = isinstance(error, openai.BadRequestError)
                refuses_window = error.param == _WINDOW or (is_bad and _WINDOW in error.message)
                is_unclear = read_failure(error).retry and not isinstance(error, openai.RateLimitError)
                if refuses_window or not is_unclear:
                    job.unclear.discard(file.key)
                if refuses_window:
                    why = f"{_WINDOW}={job.window!r}: the server refuses it: {error.message}"
                    raise ValidationError(why, field=_WINDOW) from None
                raise

        create = functools.partial(self._repeat, attempt, self._timeout)
        return await _once_known(str(file.file_id), create, _FILE_LAG)

    async def find(self, job: JobRecord, file: InputFile) -> Batch | None:
        """Return the newest batch that was made of a file, None where there is none."""
        wanted = job.name, file.first, file.count
        async with contextlib.aclosing(self.all_batches(since=job.since)) as batches:
            async for batch in batches:
                known = read_job_metadata(batch.metadata)
                if known is not None and known.key == wanted and not enqueued_refusal(batch):
                    return batch
        return None

    async def all_batches(self, *, since: float = 0.0) -> AsyncGenerator[Batch, None]:
        """Yield the account's batches, the newest first, back to a time (seconds since the epoch)."""
        after: dict[str, Any] = {}
        while True:
            page = await self._repeat(functools.partial(self._page, after), self._timeout)
            for batch in page.data:
                read_batch(batch)
                if batch.created_at is not None and batch.created_at < since - _CLOCKS_APART:
                    return
                yield batch
            if not page.data or not page.has_next_page():
                return
            after = {"after": page.data[-1].id}

    async def get(self, batch_id: str) -> Batch:
        """Look a batch up."""
        look = self._sdk.batches.retrieve
        return read_batch(await self._repeat(lambda: _checked(look(batch_id, timeout=None)), self._timeout))

    async def cancel(self, batch_id: str) -> Batch:
        """Ask for a batch to be cancelled; one that has ended stays as it is."""

        async def attempt() -> Batch | None:
            try:
                return read_batch(await _checked(self._sdk.batches.cancel(batch_id, timeout=None)))
            except (openai.BadRequestError, openai.ConflictError):  # it has ended
                return None

        return await self._repeat(attempt, self._timeout) or await self.get(batch_id)

    async def download(self, file_id: str, *, made_at: float = 0.0) -> IO[bytes]:
        """Download a file to disk; where the connection drops, go on from there, else from the start."""
        if not file_id:  # the server does not name it
            nothing = sdk_httpx().Response(_NOT_FOUND, request=sdk_httpx().Request("GET", _URL))
            raise openai.NotFoundError("no file is named", response=nothing, body=None)
        file = temporary_file()
        patience = max(0.0, _FILE_LAG - abs(time.time() - made_at))
        fetch = functools.partial(self._repeat, lambda: self._fetch(file_id, file), None)
        try:
            while True:
                before = file.tell()
                try:
                    await _once_known(file_id, fetch, patience)
                    break
                except openai.APIConnectionError:
                    if file.tell() <= before:  # as long as more of it arrives, drops are not counted
                        raise
        except BaseException:
            file.close()
            raise
        file.seek(0)
        return file

    async def _repeat(self, attempt: Callable[[], Awaitable[T]], seconds: float | None) -> T:
        """Make a call with so many seconds for each attempt, again where that may help."""

        async def once() -> Any:
            try:
                return await call_sdk(attempt(), seconds=seconds, url=_URL)
            except openai.APIError as error:
                forget_key(error, self.key)
                if isinstance(error, openai.APIStatusError) and is_enqueued_limit(error):
                    raise QuotaError(error.message, response=error.response, body=error.body) from None
                raise

        repeated = retrying(once, max_retries=self._retries, max_wait=self._max_wait, governed=False)
        answer: T = masked(await repeated(), self.key)
        return answer

    async def _page(self, after: dict[str, Any]) -> Any:
        try:
            page = await self._sdk.batches.list(limit=100, timeout=None, **after)
        except AttributeError as error:  # the SDK takes the page of something in between for a list
            raise _garbled(error) from error
        if not isinstance(page.data, list):
            raise _garbled(page.data)
        page.data = [each for each in page.data if isinstance(getattr(each, "id", None), str)]
        return page

    async def _fetch(self, file_id: str, file: IO[bytes]) -> None:
        """Append what is missing of a file; write all of it where the server does not send a part."""
        start = file.tell()
        headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={start}-"} if start else {})}
        content = self._sdk.files.with_streaming_response.content
        async with contextlib.AsyncExitStack() as stack:
            try:
                async with deadline(self._timeout):
                    answer = content(file_id, extra_headers=headers, timeout=None)
                    response = await stack.enter_async_context(answer)
            except openai.APIStatusError as error:
                if error.status_code == _NO_SUCH_RANGE:  # all of it was there, or never was
                    raise _from_the_start(file, error.request) from error
                raise
            if response.status_code != _PARTIAL:
                file.seek(0)
                file.truncate()
            elif not response.headers.get("content-range", "").startswith(f"bytes {start}-"):
                raise _from_the_start(file, response.http_request)
            chunks = response.iter_bytes()
            while True:
                async with deadline(self._timeout):
                    chunk = await anext(chunks, None)
                if chunk is None:
                    return
                file.write(chunk)


async def _checked(call: Awaitable[T]) -> T:
    """Return an object of the API; refuse a page of something in between, which the SDK returns as text."""
    answer = await call
    if not isinstance(getattr(answer, "id", None), str):
        raise _garbled(answer)
    return answer


def _garbled(answer: object) -> openai.APIConnectionError:
    request = sdk_httpx().Request("POST", _URL)
    return openai.APIConnectionError(message=f"no object of the API: {shown(answer)}", request=request)


async def _once_known(file_id: str, action: Callable[[], Awaitable[T]], seconds: float) -> T:
    """Do something with a file, again for so many seconds while the server does not know of it yet."""

    def is_unknown(error: openai.APIStatusError) -> bool:
        message = error.message.lower()
        names_it = any(text in message for text in (file_id.lower(), "no such", "not found"))
        return error.status_code in {_BAD_REQUEST, _NOT_FOUND} and "file" in message and names_it

    answer: T = await retry_for(action, is_worth=is_unknown, seconds=seconds)()
    return answer


def _from_the_start(file: IO[bytes], request: Any) -> openai.APIConnectionError:
    """Empty a file whose rest cannot be had, and return the error that has it downloaded once more."""
    file.seek(0)
    file.truncate()
    return openai.APIConnectionError(message="the rest of the file could not be had", request=request)


# --- how a job is recorded, and the metadata that name its batches -----------------------------------------

JOB_KEY = "openai_eval_client_job"  # in a batch's metadata: the name of its job
LINES_KEY = "openai_eval_client_lines"  # which lines of the job the batch has
_LONGEST_MODEL = 200  # characters: with the other values it fits in one of the metadata's
_PAIRS, _KEY, _VALUE = 16, 64, 512  # https://platform.openai.com/docs/api-reference/batch/create


class JobMetadata(BaseModel):
    """Which lines of which job a batch has."""

    model_config = ConfigDict(frozen=True, strict=True)

    job: str  # the job's name, which it has before it has an id
    total: int = Field(ge=0)  # requests of the whole job
    first: int = Field(ge=0)  # the position of the batch's first line among all lines of the job
    count: int = Field(ge=0)  # how many lines it has
    start: Annotated[int, Field(ge=0)] | None  # of the first request, where the indexes are consecutive
    numbered: bool  # whether each custom_id ends with the request's index
    temperature: Temperature
    model: str

    @property
    def key(self) -> tuple[str, int, int]:
        """What tells it from every other batch."""
        return self.job, self.first, self.count

    def metadata(self) -> dict[str, str]:
        """Return our two pairs."""
        return {JOB_KEY: self.job, LINES_KEY: self.model_dump_json(exclude={"job"})}


def read_job_metadata(metadata: object) -> JobMetadata | None:
    """Return which lines of which job a batch has; None where it is none of ours."""
    if not isinstance(metadata, dict):
        return None
    try:
        found = JobMetadata(job=metadata[JOB_KEY], **json.loads(metadata[LINES_KEY]))
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return found if found.first + found.count <= found.total else None


def check_metadata(metadata: Any) -> dict[str, str]:
    """Return the caller's metadata, None as an empty dict."""
    if metadata is None:
        return {}
    check_mapping(metadata, "metadata")
    if len(metadata) > _PAIRS - 2:
        why = f"has {len(metadata)} pairs; a batch takes {_PAIRS}, of which the package sets two"
        reject_input("metadata", metadata, why)
    for key, value in metadata.items():
        name = f"metadata[{key!r}]"
        check_text(key, "metadata")
        if key in {JOB_KEY, LINES_KEY}:
            reject_input(name, value, "this key is set by the package: choose another", field="metadata")
        if len(key) > _KEY:
            reject_input(name, value, f"the key has {len(key)} characters; {_KEY} at most", field="metadata")
        if not isinstance(value, str):
            reject_input(name, value, f"must be a str, not {type(value).__name__}", field="metadata")
        check_json({name: value}, field="metadata")
        if len(value) > _VALUE:
            reject_input(name, value, f"has {len(value)} characters; {_VALUE} at most", field="metadata")
    return dict(metadata)


_RECORDED = ("name", "since", "refused", "most_lines", "made", "spans")


@dataclass(kw_only=True)
class JobRecord:
    """A job, recorded before each call that costs, so that a killed run goes on with the same batches."""

    endpoint: str  # such as "/v1/chat/completions"
    window: str  # the completion window, such as "24h"
    metadata: dict[str, str] = field(default_factory=dict)  # the caller's own
    indexes: Sequence[int]  # of its requests, rising
    most_lines: int  # of an input file
    refused: list[str] = field(default_factory=list)  # parameters that the model is known to refuse
    name: str = field(default_factory=lambda: uuid.uuid4().hex)  # in the metadata of each of its batches
    since: float = field(default_factory=time.time)  # seconds since the epoch: no batch of it is older
    made: dict[str, str] = field(default_factory=dict)  # the id of the batch of each file, by the file's key
    spans: list[tuple[int, int]] = field(default_factory=list)  # first line and count of each file
    unclear: set[str] = field(default_factory=set)  # keys of files whose batch may have been created unseen
    recovered: bool = False  # whether an earlier program may have created batches that are not in `made`

    def metadata_of(self, file: InputFile) -> dict[str, str]:
        """Return the metadata of the batch of one of its files."""
        low, high = file.indexes[0], file.indexes[-1]
        lines = JobMetadata(
            job=self.name,
            total=len(self.indexes),
            first=file.first,
            count=file.count,
            start=low if high - low + 1 == file.count else None,  # they rise
            numbered=file.numbered,
            temperature=file.temperature,
            model=file.model if len(file.model) <= _LONGEST_MODEL else "",
        )
        return {**self.metadata, **lines.metadata()}

    def to_dict(self) -> dict[str, Any]:
        """Return it as it is recorded."""
        return {"indexes": self._index_spans, **{name: getattr(self, name) for name in _RECORDED}}

    def recover(self, saved: Mapping[str, Any]) -> JobRecord:
        """Return it as an earlier program recorded it."""
        known = {name: saved[name] for name in _RECORDED}
        indexes = [index for first, count in saved["indexes"] for index in range(first, first + count)]
        return dataclasses.replace(self, **known, indexes=indexes, recovered=True)

    @functools.cached_property
    def _index_spans(self) -> list[tuple[int, int]]:
        """The indexes as spans of consecutive ones: first and count of each."""
        gaps = itertools.groupby(enumerate(self.indexes), key=lambda pair: pair[1] - pair[0])
        spans = [[index for _, index in span] for _, span in gaps]
        return [(span[0], len(span)) for span in spans]


# --- what a batch object says ------------------------------------------------------------------------------

SEPARATOR = "+"  # between the ids of a job's batches
_RUNNING = ("validating", "in_progress", "finalizing", "cancelling")  # the least advanced first
_ENDED = ("completed", "expired", "cancelled", "failed")  # the most useful first
EXPIRED, MISSING = "batch_expired", "missing_result"  # the first is the API's
_NOT_ANSWERED = {  # why requests of a batch in this state have no result
    "expired": (EXPIRED, "expired before this request was answered"),
    "cancelled": ("batch_cancelled", "was cancelled before this request was answered"),
}
_NO_REASON = "no reason given"
_UNEXPLAINED = BatchError(_NO_REASON, code="batch_failed")
_LIMIT = re.compile(r"limit:\s*([\d,]+)", re.IGNORECASE)
_ENDS = ("completed_at", "failed_at", "expired_at", "cancelled_at")
_TEXTS = ("status", "endpoint", "input_file_id", "output_file_id", "error_file_id", "model")
_COUNTS = ("total", "completed", "failed")
_MOST_REQUESTS = 10**7  # of a batch; a larger count is none
_TIME = TypeAdapter(datetime)


def read_batch(batch: Any) -> Batch:
    """Return a batch of any server: what is used of it has its type, or is None."""
    for name in ("created_at", *_ENDS):
        setattr(batch, name, _seconds_in(getattr(batch, name, None)))
    for name in _TEXTS:
        value = getattr(batch, name, None)
        setattr(batch, name, value if isinstance(value, str) else None)
    counts = getattr(batch, "request_counts", None)
    batch.request_counts = counts if isinstance(counts, BaseModel) else None
    for name in _COUNTS if batch.request_counts else ():
        setattr(counts, name, _count_in(getattr(counts, name, None)))
    return batch  # type: ignore[no-any-return]


def _seconds_in(value: object) -> float | None:
    """Return a time in seconds since the epoch: from seconds, milliseconds or ISO 8601; None for none."""
    try:
        moment = _TIME.validate_python(value)
    except PydanticError:
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
    return moment.timestamp() or None  # some send 0 for a time that is still to come


def _count_in(value: object) -> int | None:
    """Return a number of requests: from a float or a text too; None for none."""
    try:
        number = float(value) if isinstance(value, int | float | str) else -1.0
    except (ValueError, OverflowError):
        return None
    return int(number) if 0 <= number <= _MOST_REQUESTS else None


def job_status(batches: Sequence[Batch], errors: Sequence[BatchError] = ()) -> BatchJobStatus:
    """Return the status of the job that consists of these batches."""
    # That of the least advanced one while any runs; then "completed" if any is, else "expired", "cancelled"
    # or "failed", the first of these that any is.
    states = [state_of(batch) for batch in batches]
    counts = [request_counts(batch) for batch in batches]
    total, completed, failed = (sum(column) for column in zip(*counts, strict=True))
    begins = [batch.created_at for batch in batches if batch.created_at is not None]
    ends = [end for batch in batches if (end := ended_at(batch)) is not None]
    status: Any = next(state for state in (*_RUNNING, *_ENDED) if state in states)
    return BatchJobStatus(
        job_id=SEPARATOR.join(batch.id for batch in batches),
        status=status,
        created_at=_as_time(min(begins)) if begins else None,
        completed_at=_as_time(max(ends)) if ends and all(map(has_ended, batches)) else None,
        request_count=total,
        completed_count=completed,
        failed_count=failed,
        errors=list(errors),
    )


async def group_jobs(batches: AsyncIterable[Batch]) -> AsyncGenerator[list[Batch], None]:
    """Yield jobs, of batches listed the newest first: each once it is whole, and the others at the end."""
    jobs: dict[str, list[tuple[int, int, Batch]]] = {}
    whole: set[str] = set()
    async for batch in batches:
        place = read_job_metadata(batch.metadata)
        if place is None or place.job in whole:
            continue
        found = jobs.setdefault(place.job, [])
        end = place.first + place.count
        if any(first < end and place.first < first + count for first, count, _ in found):
            continue  # a newer batch, which has some of its lines, has replaced it
        bisect.insort(found, (place.first, place.count, batch), key=operator.itemgetter(0))
        if sum(count for _, count, _ in found) >= place.total:
            whole.add(place.job)
            yield [part for _, _, part in jobs.pop(place.job)]
    for found in jobs.values():
        yield [part for _, _, part in found]


def state_of(batch: Batch) -> str:
    """Return a batch's status; one that is not known yet to us counts as running."""
    status = str(batch.status)
    return status if status in {*_RUNNING, *_ENDED} else "in_progress"


def has_ended(batch: Batch) -> bool:
    """Return whether nothing will change any more."""
    return state_of(batch) in _ENDED


def are_of_use(batches: Sequence[Batch]) -> bool:
    """Return whether a job submitted before is worth going on with: it runs, or has answers."""
    states = {state_of(batch) for batch in batches}
    given_up = states & {"cancelling", "cancelled", "failed"}
    return not given_up and (states != {"expired"} or any(request_counts(batch)[1] for batch in batches))


def request_counts(batch: Batch) -> tuple[int, int, int]:
    """Return how many requests a batch has, has completed, and has failed."""
    stated = batch.request_counts
    counts = (stated.total, stated.completed, stated.failed) if stated else (0, 0, 0)
    total, completed, failed = (count or 0 for count in counts)
    place = read_job_metadata(batch.metadata)
    if place is not None:
        total = place.count  # also while the API still says 0
    completed = min(completed, total)
    return total, completed, total - completed if has_ended(batch) else min(failed, total - completed)


def ended_at(batch: Batch) -> float | None:
    """Return when a batch ended, in seconds since the epoch."""
    return max(filter(None, (getattr(batch, name, None) for name in _ENDS)), default=None)


def _as_time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, tz=timezone.utc)


def stated_errors(batch: Batch) -> list[BatchError]:
    """Return why a batch failed, by the lines of its own file."""
    stated: Any = getattr(batch.errors, "data", batch.errors)  # some servers send the list itself, or a text
    listed = stated if isinstance(stated, list) else [stated] if stated else []
    return [_stated_error(each) for each in listed]


def _stated_error(error: object) -> BatchError:
    fields = dict(error) if isinstance(error, dict | BaseModel) else {"message": error}
    message, code, param = (
        str(value) if (value := fields.get(name)) else None for name in ("message", "code", "param")
    )
    return BatchError(
        message or code or _NO_REASON, code=code, line=_count_in(fields.get("line")), param=param
    )


def failure_of(batches: Sequence[Batch]) -> BatchError:
    """Return why batches failed of which no line ran."""
    reasons = [reason for batch in batches for reason in stated_errors(batch)]
    names = ", ".join(batch.id for batch in batches)
    first = next(iter(reasons), _UNEXPLAINED)
    more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
    message = f"{names} failed: {first.message}{more}"
    return BatchError(message, code=first.code, line=first.line, param=first.param)


def missing_error(batch: Batch) -> BatchError:
    """Return why requests of a batch that has ended have no line in any of its files."""
    state = state_of(batch)
    if state == "failed":
        first = next(iter(stated_errors(batch)), _UNEXPLAINED)
        return BatchError(f"batch {batch.id} failed: {first.message}", code=first.code, param=first.param)
    code, why = _NOT_ANSWERED.get(state, (MISSING, f"is {state}, but no file of it has this result"))
    return BatchError(f"batch {batch.id} {why}", code=code)


def with_index(error: BatchError, index: int) -> BatchError:
    """Return the same error for the request at this position in the caller's list."""
    return BatchError(error.message, code=error.code, line=index + 1, param=error.param)


def enqueued_refusal(batch: Batch) -> BatchError | None:
    """Return why a batch failed without having been begun: too many tokens were enqueued already."""
    if state_of(batch) != "failed":
        return None
    return next(filter(is_enqueued_limit, stated_errors(batch)), None)


def enqueued_limit(error: object) -> int | None:
    """Return how many tokens may be enqueued, as a refusal words it."""
    found = _LIMIT.search(getattr(error, "message", ""))
    return max(1, int(found[1].replace(",", ""))) if found else None


def is_enqueued_limit(error: object) -> bool:
    """Return whether an error says that too many tokens are enqueued."""
    code, message = getattr(error, "code", None), getattr(error, "message", "")
    return code == "token_limit_exceeded" or "enqueued token limit" in message.lower()
