"""What batches say: their ids and metadata, the record of a job, the fields of a batch object."""

from __future__ import annotations

import bisect
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
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from pydantic import ValidationError as PydanticError

from openai_eval_client._batches.files import Temperature
from openai_eval_client._validation import check_json, check_mapping, check_text, reject_input
from openai_eval_client._wire import BATCH_PATHS
from openai_eval_client.errors import BatchError
from openai_eval_client.models import BatchJobStatus

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterable, Mapping, Sequence

    from openai.types import Batch

    from openai_eval_client._batches.files import InputFile

# --- ids, and the metadata that name the batches of a job --------------------------------------------------

_IDENT = re.compile(r"(?!.*\.\.)[A-Za-z0-9][\w.:~=@+-]{0,499}", re.ASCII)


def is_id(name: object) -> bool:
    """Return whether a name can be the id of a file or batch: no URL, no path, no text of several words."""
    return isinstance(name, str) and _IDENT.fullmatch(name) is not None


MOST_LINES = 50_000  # of one batch of ours: `BatchConfig.max_batch_size` allows no more
JOB_KEY = "openai_eval_client_job"  # in a batch's metadata: the name of its job
LINES_KEY = "openai_eval_client_lines"  # which lines of the job the batch has
_MOST_INDEX = 10**12
_LONGEST_MODEL = 200  # characters: with the other values it fits in one of the metadata's
_PAIRS, _KEY, _VALUE = 16, 64, 512  # https://platform.openai.com/docs/api-reference/batch/create


class JobMetadata(BaseModel):
    """Which lines of which job a batch has."""

    model_config = ConfigDict(frozen=True, strict=True)

    job: str  # the job's name, which it has before it has an id
    total: int = Field(ge=0, le=_MOST_INDEX)  # requests of the whole job
    first: int = Field(
        ge=0, le=_MOST_INDEX
    )  # the position of the batch's first line among all lines of the job
    count: int = Field(ge=0, le=MOST_LINES)  # how many lines it has
    start: (
        Annotated[int, Field(ge=0, le=_MOST_INDEX)] | None
    )  # of the first request, where the indexes are consecutive
    numbered: bool  # whether each custom_id ends with the request's index
    temperature: Temperature
    model: str
    named: bool = True  # whether a custom_id may have anything else in it than the index

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
    pairs = {str(key).lower(): value for key, value in metadata.items()}  # some servers change the case
    try:
        found = JobMetadata(job=pairs[JOB_KEY], **json.loads(pairs[LINES_KEY]))
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
_RECORDED_SINCE = ("uploaded", "unclear")  # what earlier versions do not record


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
    uploaded: dict[str, str] = field(default_factory=dict)  # the id of each input file, by the file's key
    unclear: dict[str, float] = field(default_factory=dict)  # when a batch was asked for, which may be unseen
    recovered: bool = False  # whether an earlier program began it

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
            named=file.named,
        )
        return {**self.metadata, **lines.metadata()}

    def to_dict(self) -> dict[str, Any]:
        """Return it as it is recorded."""
        recorded = (*_RECORDED, *_RECORDED_SINCE)
        return {"indexes": self._index_spans, **{name: getattr(self, name) for name in recorded}}

    def recover(self, saved: Mapping[str, Any]) -> JobRecord:
        """Return it as an earlier program recorded it."""
        known = {name: saved[name] for name in _RECORDED}
        known["uploaded"] = saved.get("uploaded", {})
        keys = [f"{first}+{count}" for first, count in known["spans"]]
        known["unclear"] = saved.get(
            "unclear", {key: known["since"] for key in keys if key not in known["made"]}
        )
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
LOST = "lost_result"  # it was answered, as far as the batch tells, but no file has it
UNCLEAR = "unclear_creation"  # it is not known whether a batch was made
UNREADABLE, NO_ANSWER = "unreadable_result", "no_answer"
REFUSED_ANSWER = "unusable_answer"  # the same would come again
WRONG_BATCH, UNUSABLE_FILE = "wrong_batch", "unusable_file"
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
_MOST_REQUESTS = 10**6  # of a batch; a larger count is none
_TIME = TypeAdapter(datetime)
_SPELT = {"canceled": "cancelled", "canceling": "cancelling"}


def read_batch(batch: Any) -> Batch:
    """Return a batch of any server: what is used of it has its type, or is None."""
    for name in ("created_at", *_ENDS):
        setattr(batch, name, _seconds_in(getattr(batch, name, None)))
    for name in _TEXTS:
        value = getattr(batch, name, None)
        setattr(batch, name, value if isinstance(value, str) else None)
    state = re.sub(r"[\s-]+", "_", (batch.status or "").strip().lower())
    batch.status = _SPELT.get(state, state) or None
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


def api_in(url: object) -> str | None:
    """Return the API that an endpoint is of, however its address begins; None for one without responses."""
    path = url.rstrip("/") if isinstance(url, str) else ""
    known = ((api, known.removeprefix("/v1/")) for api, known in BATCH_PATHS.items())
    return next((api for api, name in known if f"/{path}".endswith(f"/{name}")), None)


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


def lost_error(batch: Batch) -> BatchError:
    """Return why requests have no result that were answered as far as a batch tells."""
    completed = request_counts(batch)[1]
    what = f"counts {completed} completed requests" if completed else f"is {state_of(batch)}"
    why = "but no file of it has this result: it may have been paid for, and is not submitted again unasked"
    return BatchError(f"batch {batch.id} {what}, {why}", code=LOST)


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
