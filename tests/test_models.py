"""What the user gets back survives JSON and pickle, and compares by its fields."""

import json
import math
import pickle
from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion
from openai.types.responses import Response
from pydantic import BaseModel
from pydantic import ValidationError as PydanticError

from openai_eval_client import (
    BatchError,
    BatchJob,
    BatchJobStatus,
    BatchRequest,
    ClientStats,
    ModelResponse,
    TokenUsage,
)

STATUSES = (
    "validating",
    "in_progress",
    "finalizing",
    "completed",
    "failed",
    "expired",
    "cancelling",
    "cancelled",
)
COUNTS = st.integers(0, 10**9)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | NUMBERS | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(), JSON, max_size=3)
TIMES = st.datetimes(timezones=st.just(timezone.utc))
USAGES = st.builds(
    TokenUsage,
    prompt_tokens=COUNTS,
    completion_tokens=COUNTS,
    total_tokens=COUNTS,
    estimated_cost=st.none() | st.floats(0, 1e6),
    cached_tokens=COUNTS,
    reasoning_tokens=COUNTS,
    estimated=st.booleans(),
)
RESPONSES = st.builds(
    ModelResponse,
    content=st.text(),
    usage=USAGES,
    model=st.text(),
    request_id=st.text(),
    latency_ms=st.floats(0, 1e9),
    temperature=st.floats(0, 2),
    finish_reason=st.text(),
    cached=st.booleans(),
    choices=st.lists(st.text()),
    tool_calls=st.lists(OBJECTS, max_size=2),
    refusal=st.none() | st.text(),
    logprobs=st.none() | OBJECTS,
    reasoning=st.none() | st.text(),
    audio=st.none() | OBJECTS,
    annotations=st.lists(OBJECTS, max_size=2),
)
REQUESTS = st.builds(
    BatchRequest,
    prompt=st.text() | st.lists(OBJECTS, max_size=2),
    model=st.none() | st.text(),
    temperature=st.none() | st.floats(0, 2),
    max_tokens=st.none() | COUNTS,
    custom_id=st.none() | st.text(),
    seed=COUNTS,
)
BATCH_STATUSES = st.builds(
    BatchJobStatus,
    job_id=st.text(),
    status=st.sampled_from(STATUSES),
    created_at=TIMES,
    completed_at=st.none() | TIMES,
    request_count=COUNTS,
    completed_count=COUNTS,
    failed_count=COUNTS,
    errors=st.lists(st.builds(BatchError, st.text(), code=st.none() | st.text(), line=st.none() | COUNTS)),
)


def pickled(value, protocol=None):
    return pickle.loads(pickle.dumps(value, protocol))  # noqa: S301


def response(**fields):
    usage = TokenUsage(prompt_tokens=1, completion_tokens=2, total_tokens=3)
    given_ = {"content": "yes", "usage": usage, "model": "m", "request_id": "req_1", "latency_ms": 12.5}
    return ModelResponse(**{**given_, "temperature": 1.0, "finish_reason": "stop", **fields})


@pytest.mark.parametrize("kind", [USAGES, RESPONSES, REQUESTS, BATCH_STATUSES], ids=lambda _: None)
@given(data=st.data())
def test_a_model_reads_back_as_it_was(kind, data):
    """It reads back from JSON, dict and pickle, whatever texts and numbers it holds."""
    model = data.draw(kind)
    assert type(model).model_validate_json(model.model_dump_json()) == model
    assert type(model).model_validate(model.model_dump()) == model
    assert pickled(model) == model


@given(RESPONSES)
def test_the_json_can_be_read_without_this_package(answer):
    """Python's own json reads it."""
    assert ModelResponse.model_validate(json.loads(answer.model_dump_json())) == answer


@pytest.mark.parametrize("number", [-math.inf, math.inf, math.nan])
def test_a_number_that_json_does_not_have_is_null_there(number):
    """For a token of no probability some servers send -Infinity; old files that hold it are read."""
    odd = {"content": [{"token": "a", "logprob": number, "top_logprobs": [{"logprob": number}]}]}
    valid = {"content": [{"token": "a", "logprob": None, "top_logprobs": [{"logprob": None}]}]}
    answer = response(logprobs=odd, audio={"expires_at": number}, annotations=[{"score": number}])
    text = answer.model_dump_json()
    found = json.loads(text, parse_constant=pytest.fail)
    assert (found["logprobs"], found["audio"], found["annotations"]) == (
        valid, {"expires_at": None}, [{"score": None}],
    )  # fmt: skip
    assert ModelResponse.model_validate_json(text).logprobs == valid
    old = json.dumps({**answer.model_dump(), "audio": None, "annotations": []})
    assert str(ModelResponse.model_validate_json(old).logprobs) == str(odd)


def test_an_unknown_price_stays_unknown():
    """It is null in JSON, never 0."""
    usage = response().usage
    assert usage.estimated_cost is None
    assert json.loads(usage.model_dump_json())["estimated_cost"] is None


def test_the_specified_fields_are_enough():
    """All other fields have a default."""
    answer = response()
    assert answer.cached is False
    assert answer.choices == []
    assert answer.tool_calls == []
    assert answer.refusal is None
    assert answer.logprobs is None
    assert answer.parsed is None
    assert answer.raw is None


def test_defaults_are_not_shared():
    """One response's list is not another's."""
    one, other = response(), response()
    one.choices.append("x")
    assert other.choices == []


class City(BaseModel):
    name: str


CHAT_BODY = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1_700_000_000,
    "model": "m",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "yes"}, "finish_reason": "stop"}],
}
RESPONSES_BODY = {
    "id": "resp_1",
    "object": "response",
    "created_at": 1_700_000_000,
    "model": "m",
    "status": "completed",
    "output": [],
}


def with_extras(body, parsed):
    answer = response()
    answer._body, answer._parsed = body, parsed
    return answer


@pytest.mark.parametrize(("body", "kind"), [(CHAT_BODY, ChatCompletion), (RESPONSES_BODY, Response)])
def test_raw_is_the_sdks_own_object(body, kind):
    """Its class is that of the API that answered."""
    raw = with_extras(body, None).raw
    assert type(raw) is kind
    assert raw.id == body["id"]
    if kind is ChatCompletion:
        assert raw.choices[0].message.content == "yes"


def test_the_extras_are_not_compared():
    """Two responses with the same fields are equal, wherever they come from."""
    assert with_extras(CHAT_BODY, City(name="Paris")) == response()
    assert response() != response(content="no")
    assert response() != response().model_dump()


def test_the_extras_are_not_in_the_json():
    """Neither the SDK's object nor the parsed one is dumped, nor read back."""
    answer = with_extras(CHAT_BODY, City(name="Paris"))
    assert answer.model_dump() == response().model_dump()
    assert answer.model_dump_json() == response().model_dump_json()
    copied = ModelResponse.model_validate_json(answer.model_dump_json())
    assert copied.raw is None
    assert copied.parsed is None
    assert "Paris" not in repr(answer)


@pytest.mark.parametrize("status", STATUSES)
def test_the_api_has_these_statuses(status):
    """The specification's five, and the three more of the API."""
    made = BatchJobStatus(job_id="j", status=status, created_at=datetime.now(timezone.utc), request_count=1)
    assert made.status == status
    assert made.completed_at is None
    assert (made.completed_count, made.failed_count, made.errors) == (0, 0, [])


def test_a_job_ends_in_four_ways():
    """Every other status can still change."""
    now = datetime.now(timezone.utc)
    ended = {
        status
        for status in STATUSES
        if BatchJobStatus(job_id="j", status=status, created_at=now, request_count=1).has_ended
    }
    assert ended == {"completed", "failed", "expired", "cancelled"}


def test_another_status_is_rejected():
    """The message names the field and the value."""
    with pytest.raises(PydanticError, match=r"(?s)status.*'done'"):
        BatchJobStatus(job_id="j", status="done", created_at=datetime.now(timezone.utc), request_count=1)


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        (1_700_000_000, datetime(2023, 11, 14, 22, 13, 20, tzinfo=timezone.utc)),
        ("2023-11-14T22:13:20Z", datetime(2023, 11, 14, 22, 13, 20, tzinfo=timezone.utc)),
        (
            "2023-11-14T23:13:20.5+01:00",
            datetime(2023, 11, 14, 23, 13, 20, 500_000, tzinfo=timezone(timedelta(hours=1))),
        ),
    ],
)
def test_times_know_their_zone(given_, expected):
    """The API's Unix time is UTC, and a zone given is kept through JSON."""
    job = BatchJob(job_id="j", status="validating", created_at=given_, request_count=2)
    assert job.created_at == expected
    copied = BatchJob.model_validate_json(job.model_dump_json())
    assert copied == job
    assert copied.created_at.utcoffset() == expected.utcoffset()


def test_a_batch_request_takes_every_parameter():
    """Parameters without a field go to the API as they are."""
    request = BatchRequest(prompt="hello", seed=7, response_format={"type": "json_object"})
    assert request.model_extra == {"seed": 7, "response_format": {"type": "json_object"}}
    assert BatchRequest.model_validate_json(request.model_dump_json()) == request


def test_a_batch_request_takes_messages():
    """They may be given as `messages` or as `prompt`."""
    messages = [{"role": "user", "content": "hello"}]
    assert BatchRequest(messages=messages).messages == messages
    assert BatchRequest(prompt=messages).prompt == messages


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"prompt": None},
        {"prompt": "hello", "messages": [{"role": "user", "content": "hello"}]},
        {"prompt": 5},
        {"prompt": "hello", "temperature": "hot"},
        {"prompt": "hello", "max_tokens": 1.5},
        {"prompt": "hello", "model": 5},
        {"messages": "hello"},
    ],
)
def test_a_batch_request_without_a_clear_input_is_rejected(fields):
    """It needs exactly one of prompt and messages, and each field of its type."""
    with pytest.raises(PydanticError) as caught:
        BatchRequest(**fields)
    wrong = [name for name in fields if name not in {"prompt", "messages"}] or ["prompt", "messages"]
    assert any(name in str(caught.value) for name in wrong)


def test_new_statistics_are_zero():
    """Before the first attempt counts are 0 and latencies None."""
    stats = ClientStats()
    assert all(value in (0, {}) for name, value in stats if not name.startswith("latency"))
    assert (stats.latency_p50, stats.latency_p95, stats.latency_p99) == (None, None, None)
    assert ClientStats.model_validate_json(stats.model_dump_json()) == stats


@pytest.mark.parametrize(
    "kind", [TokenUsage, ModelResponse, BatchRequest, BatchJob, BatchJobStatus, ClientStats]
)
def test_every_model_has_a_json_schema(kind):
    """The schema names every field."""
    assert set(kind.model_json_schema()["properties"]) == set(kind.model_fields)
