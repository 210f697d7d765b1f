"""What a batch object says: status, counts, errors, and the metadata that names its job."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from openai_eval_client._batches.files import MIXED, part_key
from openai_eval_client._validation import check_mapping, check_text, reject_input
from openai_eval_client.errors import BatchError
from openai_eval_client.models import BatchJobStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from openai.types import Batch

    from openai_eval_client._batches.files import InputFile


INTENT = "openai_eval_client_intent"
PART = "openai_eval_client_part"
_LONGEST_MODEL = 200  # characters: with the other values it fits in one of the metadata's
_PAIRS, _KEY, _VALUE = 16, 64, 512  # https://platform.openai.com/docs/api-reference/batch/create


@dataclass(frozen=True, slots=True)
class JobMetadata:
    """Where the lines of a batch stand in their job."""

    record: str  # names the job, before it has an id
    total: int  # requests of the whole job
    first: int  # the position of the batch's first line among all lines of the job
    count: int  # how many lines it has
    start: int | None  # the index of its first request where the indexes are consecutive, else None
    numbered: bool  # whether each custom_id ends with the request's index
    temperature: float | str | None  # what all requests ask; None: nothing; "mixed": they differ
    model: str = ""  # the model they ask

    @classmethod
    def of(cls, part: InputFile, record: str, total: int) -> JobMetadata:
        """Say where a part stands."""
        low, high = part.indexes[0], part.indexes[-1]
        consecutive = high - low + 1 == part.count  # they rise
        return cls(
            record=record,
            total=total,
            first=part.first,
            count=part.count,
            start=low if consecutive else None,
            numbered=part.numbered,
            temperature=part.temperature,
            model=part.model if len(part.model) <= _LONGEST_MODEL else "",
        )

    @property
    def part_key(self) -> str:
        """The key of the part that it is of."""
        return part_key(self.first, self.count)

    @property
    def key(self) -> tuple[str, int, int]:
        """What tells it from every other batch."""
        return self.record, self.first, self.count

    def metadata(self) -> dict[str, str]:
        """Return our two pairs."""
        values = {name: getattr(self, name) for name in _FIELDS}
        return {INTENT: self.record, PART: json.dumps(values, separators=(",", ":"))}


_FIELDS = ("total", "first", "count", "start", "numbered", "temperature", "model")


def read_job_metadata(metadata: object) -> JobMetadata | None:
    """Return where a batch stands in its job; None where it is none of ours."""
    if not isinstance(metadata, dict):
        return None
    try:
        values = json.loads(metadata[PART])
        placement = JobMetadata(record=metadata[INTENT], **{name: values[name] for name in _FIELDS})
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return placement if _is_sound(placement) else None


def _is_sound(placement: JobMetadata) -> bool:
    whole = (
        placement.total,
        placement.first,
        placement.count,
        0 if placement.start is None else placement.start,
    )
    temperature = placement.temperature
    return (
        all(type(number) is int and number >= 0 for number in whole)
        and isinstance(placement.record, str)
        and isinstance(placement.numbered, bool)
        and isinstance(placement.model, str)
        and placement.first + placement.count <= placement.total
        and (temperature is None or temperature == MIXED or type(temperature) in {int, float})
    )


def check_metadata(metadata: object) -> dict[str, str]:
    """Return the caller's metadata, None as an empty dict."""
    if metadata is None:
        return {}
    check_mapping(metadata, "metadata")
    pairs: Mapping[str, Any] = metadata  # type: ignore[assignment]  # just checked
    if len(pairs) > _PAIRS - 2:
        reject_input(
            "metadata", metadata, f"has {len(pairs)} pairs; a batch takes {_PAIRS}, and two are ours"
        )
    for key, value in pairs.items():
        _check_pair(key, value)
    return dict(pairs)


def _check_pair(key: str, value: object) -> None:
    name = f"metadata[{key!r}]"
    check_text(key, "metadata")
    if key in {INTENT, PART}:
        reject_input(name, value, "this key is ours", field="metadata")
    if len(key) > _KEY:
        reject_input(name, value, f"the key has {len(key)} characters; {_KEY} at most", field="metadata")
    if not isinstance(value, str):
        reject_input(name, value, f"must be a str, not {type(value).__name__}", field="metadata")
    if not _is_unicode(value):
        reject_input(name, value, "holds a lone surrogate: not valid Unicode", field="metadata")
    if len(value) > _VALUE:
        reject_input(name, value, f"has {len(value)} characters; {_VALUE} at most", field="metadata")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


SEPARATOR = "+"  # between the ids of a job's batches
_RUNNING = ("validating", "in_progress", "finalizing", "cancelling")  # the least advanced first
_ENDED = ("completed", "expired", "cancelled", "failed")  # the most useful first
EXPIRED, CANCELLED, MISSING = "batch_expired", "batch_cancelled", "missing_result"  # the first two the API's
_LIMIT = re.compile(r"limit:\s*([\d,]+)", re.IGNORECASE)
_ENDS = ("completed_at", "failed_at", "expired_at", "cancelled_at")


def job_status(batches: Sequence[Batch], errors: Sequence[BatchError]) -> BatchJobStatus:
    """Return the status of the job that consists of these batches."""
    # That of the least advanced one while any runs; then "completed" if any is, else "expired", "cancelled"
    # or "failed", the first of these that any is.
    counts = [request_counts(batch) for batch in batches]
    total, completed, failed = (sum(column) for column in zip(*counts, strict=True))
    ends = [end for batch in batches if (end := ended_at(batch)) is not None]
    return BatchJobStatus(
        job_id=SEPARATOR.join(batch.id for batch in batches),
        status=_joint([state_of(batch) for batch in batches]),
        created_at=as_time(min(batch.created_at for batch in batches)),
        completed_at=as_time(max(ends)) if ends and all(map(has_ended, batches)) else None,
        request_count=total,
        completed_count=completed,
        failed_count=failed,
        errors=list(errors),
    )


class Grouping:
    """Puts the batches of an account together into jobs, as they are listed: the newest first."""

    def __init__(self) -> None:
        self._jobs: dict[str, list[tuple[int, int, Batch]]] = {}
        self._whole: set[str] = set()

    def add(self, batch: Batch) -> list[Batch]:
        """Take in the next batch; return its job where that is whole now, else nothing."""
        # A batch whose requests a newer one has too was replaced by it.
        placement = read_job_metadata(batch.metadata)
        if placement is None or placement.record in self._whole:
            return []
        found = self._jobs.setdefault(placement.record, [])
        last = placement.first + placement.count
        if any(first < last and placement.first < first + count for first, count, _ in found):
            return []
        found.append((placement.first, placement.count, batch))
        if sum(count for _, count, _ in found) < placement.total:
            return []
        self._whole.add(placement.record)
        return _sorted(self._jobs.pop(placement.record))

    def incomplete(self) -> list[list[Batch]]:
        """Return the jobs of which batches are missing."""
        return [_sorted(found) for found in self._jobs.values()]


def _sorted(found: list[tuple[int, int, Batch]]) -> list[Batch]:
    return [batch for _, _, batch in sorted(found, key=lambda entry: entry[0])]


def _joint(states: list[str]) -> Any:
    return next(state for state in (*_RUNNING, *_ENDED) if state in states)


def state_of(batch: Batch) -> str:
    """Return a batch's status; one that is not known yet to us counts as running."""
    status = str(batch.status)
    return status if status in {*_RUNNING, *_ENDED} else "in_progress"


def has_ended(batch: Batch) -> bool:
    """Return whether nothing will change any more."""
    return state_of(batch) in _ENDED


def request_counts(batch: Batch) -> tuple[int, int, int]:
    """Return how many requests a batch has, has completed, and has failed."""
    said = batch.request_counts
    total, completed, failed = (said.total or 0, said.completed or 0, said.failed or 0) if said else (0, 0, 0)
    placement = read_job_metadata(batch.metadata)
    if placement is not None:
        total = placement.count  # also while the API still says 0
    completed = min(completed, total)
    return total, completed, total - completed if has_ended(batch) else min(failed, total - completed)


def ended_at(batch: Batch) -> int | None:
    """Return when a batch ended, in seconds since the epoch."""
    times = [getattr(batch, name, None) for name in _ENDS]
    return max((time for time in times if time), default=None)


def as_time(seconds: float) -> datetime:
    """Return a time of the API, which counts seconds since the epoch, with its zone."""
    return datetime.fromtimestamp(seconds, tz=timezone.utc)


def stated_errors(batch: Batch) -> list[BatchError]:
    """Return why a batch failed, by the lines of its own file."""
    said = batch.errors.data if batch.errors else None
    return [
        BatchError(
            each.message or each.code or "no reason given",
            code=each.code,
            line=each.line,
            param=each.param,
        )
        for each in said or []
    ]


def failure_of(batches: Sequence[Batch]) -> BatchError:
    """Return why batches failed of which no line ran."""
    reasons = [reason for batch in batches for reason in stated_errors(batch)]
    names = ", ".join(batch.id for batch in batches)
    first = reasons[0] if reasons else BatchError("no reason given", code="batch_failed")
    more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
    message = f"{names} failed: {first.message}{more}"
    return BatchError(message, code=first.code, line=first.line, param=first.param)


def was_refused(batch: Batch) -> BatchError | None:
    """Return why a batch failed without having been begun: too many tokens were enqueued already."""
    if state_of(batch) != "failed":
        return None
    return next((each for each in stated_errors(batch) if is_enqueued_limit(each.code, each.message)), None)


def enqueued_limit(message: str) -> int | None:
    """Return how many tokens may be enqueued, as a refusal words it."""
    found = _LIMIT.search(message)
    return int(found[1].replace(",", "")) if found else None


def is_enqueued_limit(code: object, message: str) -> bool:
    """Return whether a refusal says that too many tokens are enqueued."""
    return code == "token_limit_exceeded" or "enqueued token limit" in message.lower()


class Reasons:
    """Why requests of a batch that has ended have no line in any of its files."""

    def __init__(self, batch: Batch, index_at: Callable[[int], int | None]) -> None:
        errors = stated_errors(batch)
        self._of_index = {index_at(error.line): error for error in errors if error.line is not None}
        self._general = _general(batch, errors)

    def of(self, index: int) -> BatchError:
        """Return the error of one request, by its position in the caller's list."""
        return with_index(self._of_index.get(index, self._general), index)

    def of_any(self) -> BatchError:
        """Return the error of a request whose position is not known."""
        return self._general


def with_index(error: BatchError, index: int) -> BatchError:
    """Return the same error for the request at this position in the caller's list."""
    return BatchError(error.message, code=error.code, line=index + 1, param=error.param)


def _general(batch: Batch, errors: Sequence[BatchError]) -> BatchError:
    state = state_of(batch)
    if state == "failed":
        why = errors[0] if errors else BatchError("no reason given", code="batch_failed")
        return BatchError(f"batch {batch.id} failed: {why.message}", code=why.code, param=why.param)
    if state == "expired":
        return BatchError(f"batch {batch.id} expired before this request was answered", code=EXPIRED)
    if state == "cancelled":
        return BatchError(f"batch {batch.id} was cancelled before this request was answered", code=CANCELLED)
    return BatchError(f"batch {batch.id} is {state}, but no file of it has this result", code=MISSING)
