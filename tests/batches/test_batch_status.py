"""The status of a job from those of its batches, and the jobs of an account from its batches."""

from __future__ import annotations

import asyncio
import json
import math
from datetime import datetime, timezone
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from batches import MODEL, patient
from hypothesis import assume, given
from hypothesis import strategies as st
from openai.types import Batch

from openai_eval_client import BatchError, BatchJobStatus, BatchRequest
from openai_eval_client._batches.files import check_requests, write_files
from openai_eval_client._batches.objects import (
    JOB_KEY,
    LINES_KEY,
    JobMetadata,
    JobRecord,
    are_of_use,
    enqueued_limit,
    enqueued_refusal,
    failure_of,
    group_jobs,
    has_ended,
    is_enqueued_limit,
    job_status,
    missing_error,
    read_batch,
    read_job_metadata,
    request_counts,
    stated_errors,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

RUNNING = ("validating", "in_progress", "finalizing", "cancelling")
ENDED = ("completed", "expired", "cancelled", "failed")
NEW = ("paused", "queued", "")  # not known yet to us
AT = 1_700_000_000


def batch(status: str = "completed", name: str = "batch_1", **fields: Any) -> Batch:
    counts = fields.pop("counts", None)
    given_fields = {
        "id": name,
        "object": "batch",
        "endpoint": "/v1/chat/completions",
        "input_file_id": "file-1",
        "completion_window": "24h",
        "created_at": AT,
        "status": status,
        "request_counts": None
        if counts is None
        else dict(zip(("total", "completed", "failed"), counts, strict=True)),
        **fields,
    }
    return Batch.construct(**given_fields)


def placed(first: int, count: int, total: int, job: str = "i", **fields: Any) -> Batch:
    place = JobMetadata(
        job=job, total=total, first=first, count=count, start=first, numbered=True, temperature=None, model=""
    )
    return batch(metadata=place.metadata(), **fields)


counts = st.none() | st.tuples(*[st.none() | st.integers(0, 9)] * 3)
stated_batches = st.lists(st.tuples(st.sampled_from(RUNNING + ENDED + NEW), counts), min_size=1, max_size=5)


@patient
@given(stated_batches)
def test_any_batches_have_a_status(given_batches: list[tuple[str, Any]]) -> None:
    """Never ended while a batch runs, completed if any is; the counts add up; it survives JSON."""
    batches = [batch(status, f"b{n}", counts=stated) for n, (status, stated) in enumerate(given_batches)]
    status = job_status(batches, ())
    states = [state if state in RUNNING + ENDED else "in_progress" for state, _ in given_batches]
    running = [state for state in states if state in RUNNING]
    if running:
        assert status.status == min(running, key=RUNNING.index)
        assert status.completed_at is None
    else:
        assert status.status == min(states, key=ENDED.index)
        assert status.completed_count + status.failed_count == status.request_count
    assert 0 <= status.completed_count + status.failed_count <= status.request_count
    assert status.request_count == sum((stated[0] or 0) if stated else 0 for _, stated in given_batches)
    assert status.job_id == "+".join(each.id for each in batches)
    assert BatchJobStatus.model_validate_json(status.model_dump_json()) == status


def test_times() -> None:
    """From the first creation to the last end, with their zone."""
    batches = [
        batch(created_at=AT + 5, completed_at=AT + 90),
        batch("expired", created_at=AT, expired_at=AT + 80, completed_at=None),
    ]
    status = job_status(batches, ())
    assert status.created_at == datetime.fromtimestamp(AT, tz=timezone.utc)
    assert status.completed_at == datetime.fromtimestamp(AT + 90, tz=timezone.utc)
    assert job_status([*batches, batch("cancelling", cancelling_at=AT)], ()).completed_at is None
    assert job_status([batch("failed")], ()).completed_at is None


@pytest.mark.parametrize("status", RUNNING)
def test_what_was_submitted_counts_while_the_api_says_nothing(status: str) -> None:
    """A batch that is being validated has a total of 0, or none."""
    for stated in ((0, 0, 0), (None, None, None), None):
        each = placed(0, 7, 7, status=status, counts=stated)
        assert request_counts(each) == (7, 0, 0)


def test_what_an_ended_batch_did_not_complete_has_failed() -> None:
    """Expired requests are in neither of the API's counts."""
    assert request_counts(placed(0, 7, 7, status="expired", counts=(7, 3, 1))) == (7, 3, 4)
    assert request_counts(placed(0, 7, 7, status="in_progress", counts=(7, 3, 1))) == (7, 3, 1)
    assert request_counts(placed(0, 7, 7, counts=(9, 9, 9))) == (7, 7, 0)


def test_an_unknown_state_has_not_ended() -> None:
    assert not has_ended(batch("paused"))
    assert all(has_ended(batch(state)) for state in ENDED)


# --- batch objects of other servers -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stated", "seconds"),
    [
        (AT, AT),
        (AT + 0.5, AT + 0.5),
        (AT * 1000, AT),
        (str(AT), AT),
        ("2023-11-14T22:13:20Z", AT),
        ("2023-11-14T23:13:20+01:00", AT),
        ("2023-11-14T22:13:20", AT),
        *((nothing, None) for nothing in (None, 0, "", "soon", [], {}, math.nan, math.inf, 10**400, -1e300)),
    ],
)
def test_a_time_in_any_form(stated: Any, seconds: float | None) -> None:
    """In seconds, milliseconds or ISO 8601; one that cannot be read is none."""
    found = job_status([read_batch(batch(created_at=stated, completed_at=stated))])
    moment = None if seconds is None else datetime.fromtimestamp(seconds, tz=timezone.utc)
    assert (found.created_at, found.completed_at) == (moment, moment)
    assert BatchJobStatus.model_validate_json(found.model_dump_json()) == found


@pytest.mark.parametrize(
    ("stated", "counts"),
    [
        ({"total": 7.0, "completed": "3", "failed": None}, (7, 3, 0)),
        ({"total": 7}, (7, 0, 0)),
        ({"total": "7", "completed": "many", "failed": -1}, (7, 0, 0)),
        ({"total": 10**400, "completed": math.inf, "failed": [1]}, (0, 0, 0)),
        *((nothing, (0, 0, 0)) for nothing in (None, "7", [7, 3, 0], 7)),
    ],
)
def test_counts_in_any_form(stated: Any, counts: tuple[int, int, int]) -> None:
    """As floats, as texts, or not at all."""
    assert request_counts(read_batch(batch("in_progress", request_counts=stated))) == counts


@pytest.mark.parametrize(
    ("errors", "found"),
    [
        ([{"code": "c", "message": "m"}], [BatchError("m", code="c")]),
        ("broken", [BatchError("broken")]),
        ({"data": ["broken", None, {"code": 5, "line": "3"}]}, [
            BatchError("broken"), BatchError("no reason given"), BatchError("5", code="5", line=3)]),
        ({"data": {"message": "m"}}, [BatchError("m")]),
        (5, [BatchError("5")]),
    ],
)  # fmt: skip
def test_errors_in_any_form(errors: Any, found: list[BatchError]) -> None:
    """A list, a text, or a list of texts."""
    assert stated_errors(read_batch(batch("failed", errors=errors))) == found


ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = (
    *("status", "endpoint", "created_at", "completed_at", "expired_at", "request_counts", "errors"),
    *("metadata", "input_file_id", "output_file_id", "model"),
)


@patient
@given(st.dictionaries(st.sampled_from(FIELDS), ODD), st.sampled_from(ENDED + RUNNING))
def test_anything_in_a_batch_is_read(fields: dict[str, Any], status: str) -> None:
    """With any JSON in place of any field, or without it, no question to a batch raises."""
    each = read_batch(Batch.construct(**{"id": "batch_1", "status": status, **fields}))
    found = job_status([each], stated_errors(each))
    assert BatchJobStatus.model_validate_json(found.model_dump_json()) == found
    assert isinstance(are_of_use([each]), bool)
    assert isinstance(failure_of([each]), BatchError)
    assert isinstance(missing_error(each), BatchError)
    assert enqueued_refusal(each) is None or status == "failed" or fields.get("status") == "failed"


# --- errors ----------------------------------------------------------------------------------------------


def with_errors(*errors: dict[str, Any] | None, status: str = "failed") -> Batch:
    return batch(status, errors={"object": "list", "data": list(errors)})


def test_errors_are_read_whatever_they_leave_out() -> None:
    found = stated_errors(
        with_errors({"code": "c", "message": "m", "line": 3, "param": "p"}, {"code": "d"}, {})
    )
    assert found == [
        BatchError("m", code="c", line=3, param="p"),
        BatchError("d", code="d"),
        BatchError("no reason given"),
    ]
    assert stated_errors(batch("failed", errors=None)) == []
    assert stated_errors(batch("failed", errors={"object": "list", "data": None})) == []


def test_a_message_with_half_an_emoji_can_be_written() -> None:
    """The API may quote a text that was cut."""
    found = stated_errors(with_errors({"code": "c", "message": "no \ud83d, 🦄"}))
    status = job_status([batch("failed")], found)
    assert status.errors == [BatchError("no \ufffd, 🦄", code="c")]
    assert BatchJobStatus.model_validate_json(status.model_dump_json()) == status


def test_the_reason_of_a_missing_result() -> None:
    """The first that a failed batch states, else what its status says."""
    failed = with_errors({"code": "c", "message": "m", "line": 3}, {"code": "d", "message": "n"})
    assert missing_error(failed) == BatchError("batch batch_1 failed: m", code="c")
    codes = {"expired": "batch_expired", "cancelled": "batch_cancelled", "completed": "missing_result"}
    for status, code in codes.items():
        error = missing_error(batch(status))
        assert (error.code, error.index) == (code, None)
        assert "batch_1" in str(error)
    assert missing_error(batch("failed")).code == "batch_failed"


def test_the_failure_of_a_job() -> None:
    """Its first reason, and how many there are."""
    error = failure_of(
        [batch("failed"), with_errors({"code": "c", "message": "m"}, {"code": "d", "message": "n"})]
    )
    assert error.code == "c"
    assert "m" in str(error)
    assert failure_of([batch("failed")]).code == "batch_failed"


def test_a_refusal_for_enqueued_tokens_is_known() -> None:
    """By its code, or by its text; only of a batch that failed."""
    stated = {"code": "token_limit_exceeded", "message": "m"}
    assert enqueued_refusal(with_errors({"code": "x", "message": "y"}, stated)).code == "token_limit_exceeded"
    assert enqueued_refusal(with_errors({"code": None, "message": "Enqueued token limit reached for m"}))
    assert enqueued_refusal(with_errors({"code": "x", "message": "y"})) is None
    assert enqueued_refusal(with_errors(stated, status="completed")) is None
    assert not is_enqueued_limit(BatchError(""))


@pytest.mark.parametrize(
    ("message", "limit"), [("Limit: 90,000 enqueued tokens", 90_000), ("limit: 0", 1), ("too many", None)]
)
def test_how_many_tokens_may_be_enqueued(message: str, limit: int | None) -> None:
    """As a refusal words it; 0 counts as 1, so that a file is cut down to single requests."""
    assert enqueued_limit(BatchError(message)) == limit


# --- grouped into jobs -----------------------------------------------------------------------------------


@st.composite
def accounts(draw: Any) -> list[tuple[str, int, int, int]]:
    """Batches of several jobs in any order: record, first, count, total; later ones may repeat places."""
    found = []
    for record in "abc"[: draw(st.integers(1, 3))]:
        cuts = sorted(draw(st.sets(st.integers(1, 9), max_size=3)))
        edges = [0, *cuts, 10]
        for first, last in pairwise(edges):  # the second of two replaced the first
            found += [(record, first, last - first, 10)] * draw(st.integers(1, 2))
    return draw(st.permutations(found))


def grouped(batches: list[Batch]) -> tuple[list[list[Batch]], list[list[Batch]]]:
    """Return the jobs that come while batches are listed, and those that come at the end."""
    whole: list[list[Batch]] = []
    incomplete: list[list[Batch]] = []
    jobs = whole

    async def listed() -> AsyncIterator[Batch]:
        nonlocal jobs
        for each in batches:
            yield each
        jobs = incomplete

    async def group() -> None:
        async for job in group_jobs(listed()):
            jobs.append(job)

    asyncio.run(group())
    return whole, incomplete


@patient
@given(accounts())
def test_batches_are_grouped_into_whole_jobs(account: list[tuple[str, int, int, int]]) -> None:
    """Each job once, its batches in the order of their requests, of each place the newest."""
    batches = [
        placed(first, count, total, record, name=f"b{n}")
        for n, (record, first, count, total) in enumerate(account)
    ]
    jobs, incomplete = grouped(batches)
    assert incomplete == []
    assert len(jobs) == len({record for record, *_ in account})
    for job in jobs:
        records = {each.metadata[JOB_KEY] for each in job}
        assert len(records) == 1
        (record,) = records
        places = [account[int(each.id[1:])] for each in job]
        assert [first for _, first, _, _ in places] == sorted(
            {entry[1] for entry in account if entry[0] == record}
        )
        for each, place in zip(job, places, strict=True):
            assert batches[account.index(place)] is each


@patient
@given(accounts(), st.integers(0, 5))
def test_a_job_without_one_of_its_batches_is_incomplete(
    account: list[tuple[str, int, int, int]], which: int
) -> None:
    """It is handed out at the end, and the whole ones are not held up."""
    lost = account[which % len(account)]
    left = [entry for entry in account if entry != lost]
    assume(left)
    whole, incomplete = grouped([placed(f, c, t, i, name=f"b{n}") for n, (i, f, c, t) in enumerate(left)])
    found = whole + incomplete
    names = [{each.metadata[JOB_KEY] for each in job} for job in found]
    assert sorted(name for (name,) in names) == sorted({entry[0] for entry in left})
    assert len(incomplete) == (lost[0] in {entry[0] for entry in left})


def test_batches_of_others_are_no_jobs() -> None:
    odd = [
        None,
        {},
        {"mine": "x"},
        {JOB_KEY: "x"},
        {LINES_KEY: "{}"},
        {JOB_KEY: "x", LINES_KEY: "no"},
        "text",
    ]
    assert grouped([batch(metadata=metadata) for metadata in odd]) == ([], [])


# --- the metadata of a batch --------------------------------------------------------------------------------


@patient
@given(
    st.lists(st.tuples(st.sampled_from("mno"), st.sampled_from([None, 0.0, 0.5])), min_size=1, max_size=30),
    st.integers(1, 7),
)
def test_metadata_say_where_the_lines_stand(pairs: list[tuple[str, float | None]], most: int) -> None:
    """What a batch's metadata say, read back, is where its lines stand; and it fits the API's limits."""
    requests = [BatchRequest(prompt="x", model=model, temperature=value) for model, value in pairs]
    files = write_files(check_requests(requests, api="chat", default_model=MODEL), most_lines=most)
    indexes = range(len(pairs))
    job = JobRecord(endpoint="/v1", window="24h", indexes=indexes, most_lines=most, name="a" * 32)
    seen: list[int] = []
    for file in files:
        metadata = job.metadata_of(file)
        assert all(len(key) <= 64 and len(value) <= 512 for key, value in metadata.items())
        place = read_job_metadata(metadata)
        assert place is not None
        assert place.key == ("a" * 32, file.first, file.count)
        assert (place.total, place.numbered, place.model) == (len(pairs), file.numbered, file.model)
        assert place.temperature == file.temperature
        assert place.start in {None, file.indexes[0]}
        assert place.first == len(seen)
        assert {pairs[index][0] for index in file.indexes} == {file.model}
        seen += file.indexes
        if place.start is not None:
            assert list(file.indexes) == list(range(place.start, place.start + place.count))
        values = {pairs[index][1] for index in file.indexes}
        assert place.temperature == (values.pop() if len(values) == 1 else "mixed")
        file.file.close()
    assert sorted(seen) == list(range(len(pairs)))


odd = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=4,
)
fields = st.sampled_from(["total", "first", "count", "start", "numbered", "temperature"])


@patient
@given(st.dictionaries(fields, odd), odd)
def test_metadata_of_others_are_never_mistaken_for_ours(values: dict[str, Any], record: Any) -> None:
    """Whatever stands under our keys: a sound place in a job, or None."""
    right = {
        "total": 5,
        "first": 0,
        "count": 2,
        "start": 0,
        "numbered": True,
        "temperature": None,
        "model": "m",
    }
    for text in (json.dumps({**right, **values}), json.dumps(values), "[" * 100_000, "", "7"):
        place = read_job_metadata({JOB_KEY: record, LINES_KEY: text})
        if place is not None:
            assert place.first + place.count <= place.total
            assert isinstance(place.job, str)
            assert read_job_metadata(place.metadata()) == place or place.temperature != place.temperature
    assert read_job_metadata(values) is None
