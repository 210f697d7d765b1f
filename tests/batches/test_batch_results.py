"""Reading the result files of a batch: whatever stands in them, every request has its outcome."""

from __future__ import annotations

import io
import json
import pickle
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import openai
import pytest
from batches import patient
from hypothesis import example, given
from hypothesis import strategies as st
from openai.types import Batch

from openai_eval_client import BatchError, ModelResponse, QuotaError
from openai_eval_client._batches.files import (
    RequestIndex,
    guess_index,
    index_in,
    read_bodies,
    read_index,
)
from openai_eval_client._batches.results import BatchResults, LineReader, explain_missing, is_curable

if TYPE_CHECKING:
    from openai_eval_client._wire.usage import Usage

USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


class HalfADollar:
    """A pricer: every answer costs the same."""

    def cost(self, _model: str, _usage: Usage, *, batch: bool) -> Decimal:
        assert batch
        return Decimal("0.5")


def body_of(text: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    return {"id": "x", "model": "m", "choices": [choice], "usage": USAGE}


def answer(name: Any, text: str = "hi") -> bytes:
    response = {"status_code": 200, "request_id": "r1", "body": body_of(text)}
    return json.dumps({"id": "l", "custom_id": name, "response": response, "error": None}).encode() + b"\n"


def refusal(name: Any, status: Any, body: Any) -> bytes:
    response = {"status_code": status, "request_id": "r2", "body": body}
    return json.dumps({"id": "l", "custom_id": name, "response": response, "error": None}).encode() + b"\n"


def unrun(name: Any, error: Any) -> bytes:
    return json.dumps({"custom_id": name, "response": None, "error": error}).encode() + b"\n"


def read(*files: list[bytes], count: int = 1, api: str = "chat") -> Any:
    return LineReader(api, HalfADollar()).read(files, RequestIndex(range(count), temperature=0.5))


# --- one line ----------------------------------------------------------------------------------------------


def test_an_answer_is_read() -> None:
    """Text, usage, price, temperature, and the SDK's own object."""
    results = read([answer("request-0")])
    (response,) = results.outcomes.values()
    assert (response.content, response.temperature, response.model) == ("hi", 0.5, "m")
    assert (response.usage.total_tokens, response.usage.estimated_cost) == (5, 0.5)
    assert (response.request_id, response.latency_ms) == ("r1", 0.0)
    assert response.raw.choices[0].message.content == "hi"
    assert (results.lines, len(results.responses), +results.oddities) == (1, 1, {})


def test_usage_that_cannot_be_read_is_priced_once_it_is_estimated() -> None:
    """Not before: it would be in the ledger twice."""
    body = {**body_of("hi"), "usage": {"prompt_tokens": 3, "completion_tokens": None}}
    reader = LineReader("chat", HalfADollar())
    results = reader.read([[refusal("request-0", 200, body)]], RequestIndex(range(1), temperature=None))
    (response,) = results.responses.values()
    assert (response.usage.prompt_tokens, response.usage.estimated) == (3, True)
    assert (response.usage.estimated_cost, reader.prices) == (None, [])


def test_half_an_emoji_in_an_answer_is_replaced() -> None:
    """A cut text is still an answer, and paid for."""
    (response,) = read([answer("request-0", "hi \ud83d")]).outcomes.values()
    assert response.content == "hi \ufffd"
    assert ModelResponse.model_validate_json(response.model_dump_json()) == response


REFUSED = {
    "the API's error": ({"error": {"message": "no", "code": "c", "param": "p", "type": "t"}}, "no", "c"),
    "an error without its envelope": ({"message": "no", "code": "c"}, "no", "c"),
    "a text": ("<html>", "status {}", None),
    "nothing": (None, "status {}", None),
    "a list": ([1], "status {}", None),
    "not a number": ({"error": {"message": "no", "code": "c", "param": float("nan")}}, "no", "c"),
    "half an emoji": ({"error": {"message": "no \ud83d", "code": "c"}}, None, "c"),
    "an error that is a text": ({"error": "no"}, "no", None),
    "a message that is none": ({"error": {"message": {"a": 1}, "code": ["c"]}}, None, None),
}
KINDS = {
    400: openai.BadRequestError,
    401: openai.AuthenticationError,
    403: openai.PermissionDeniedError,
    404: openai.NotFoundError,
    409: openai.ConflictError,
    418: openai.APIStatusError,
    422: openai.UnprocessableEntityError,
    429: openai.RateLimitError,
    500: openai.InternalServerError,
    503: openai.InternalServerError,
    599: openai.InternalServerError,
}


@pytest.mark.parametrize("status", KINDS)
@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_line_is_the_sdks_own_error(status: int, case: str) -> None:
    """Its class by the status, with message, code and request id; it pickles."""
    body, message, code = REFUSED[case]
    (error,) = read([refusal("request-0", status, body)]).outcomes.values()
    assert type(error) is KINDS[status]
    assert (error.status_code, error.request_id) == (status, "r2")
    assert message is None or error.message == message.format(status)
    assert code is None or error.code == code
    again = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert (type(again), str(again), again.status_code) == (type(error), str(error), status)


def test_credit_used_up_is_a_quota_error() -> None:
    """As online."""
    body = {"error": {"message": "no credit", "code": "insufficient_quota", "type": "insufficient_quota"}}
    (error,) = read([refusal("request-0", 429, body)]).outcomes.values()
    assert type(error) is QuotaError
    assert not is_curable(error)


UNRUN = {
    "expired": ({"code": "batch_expired", "message": "too late"}, "batch_expired", True),
    "cancelled": ({"code": "batch_cancelled", "message": "stopped"}, "batch_cancelled", False),
    "timed out": ({"code": "request_timeout", "message": "slow"}, "request_timeout", True),
    "no error": (None, "no_answer", True),
    "a text": ("oops", "no_answer", True),
    "empty": ({}, "no_answer", True),
    "numbers": ({"code": 7, "message": 8, "param": 9}, "7", False),
}


@pytest.mark.parametrize("case", UNRUN)
def test_a_line_that_was_never_run_is_a_batch_error(case: str) -> None:
    """With the API's code and message, the request's place, and whether another batch may cure it."""
    given_error, code, curable = UNRUN[case]
    (error,) = read([unrun("request-0", given_error)]).outcomes.values()
    assert (type(error), error.code, error.line, error.index) == (BatchError, code, 1, 0)
    assert is_curable(error) == curable
    assert error.message


NO_ANSWERS = {
    "null": None,
    "html": "<html>",
    "no choices": {"id": "x"},
    "choices no list": {"choices": {}},
    "a list": [body_of("hi")],
}


@pytest.mark.parametrize("case", NO_ANSWERS)
@pytest.mark.parametrize("status", [200, 0, None, "200", -1, 204, 399.5])
def test_a_200_without_an_answer_is_no_answer(case: str, status: Any) -> None:
    """Whatever the status says, and worth another batch."""
    (error,) = read([refusal("request-0", status, NO_ANSWERS[case])]).outcomes.values()
    assert (type(error), error.code, error.line) == (BatchError, "no_answer", 1)
    assert is_curable(error)


PROXY_ERRORS = {
    "a status": ({"error": {"message": "busy", "code": 503}}, openai.InternalServerError),
    "the API's word": ({"error": {"message": "slow", "type": "rate_limit_error"}}, openai.RateLimitError),
    "beside no choices": ({"choices": [], "error": {"message": "no", "code": 400}}, openai.BadRequestError),
}


@pytest.mark.parametrize("case", PROXY_ERRORS)
def test_a_200_that_holds_an_error_is_that_error(case: str) -> None:
    """As online: its class is that of the status that it names."""
    body, kind = PROXY_ERRORS[case]
    (error,) = read([refusal("request-0", 200, body)]).outcomes.values()
    assert (type(error), error.request_id) == (kind, "r2")
    assert is_curable(error) == (kind is not openai.BadRequestError)


def test_an_answer_with_an_error_beside_it_is_an_error() -> None:
    """As online, with the server's words."""
    (error,) = read([refusal("request-0", 200, {**body_of("hi"), "error": "odd"})]).outcomes.values()
    assert isinstance(error, BatchError)
    assert (error.code, error.line) == ("no_answer", 1)
    assert "odd" in str(error)


def test_a_line_cut_anywhere_loses_no_other_result() -> None:
    """Where its custom_id is still readable, it is that request's; else of no request; the others stay."""
    whole = answer("request-1")
    for length in range(1, len(whole) - 1):
        results = read([answer("request-0"), whole[:length] + b"\n", answer("request-2")], count=3)
        assert results.lines == 3 - whole[:length].isspace()
        assert results.oddities["unreadable lines"] == 1
        assert [results.outcomes[n].content for n in (0, 2)] == ["hi", "hi"]
        named = whole.index(b'"request-1"') + len(b'"request-1"') <= length
        assert (1 in results.outcomes) == named
        if named:
            assert results.outcomes[1].code == "unreadable_result"


# --- several lines -----------------------------------------------------------------------------------------

FAILED = {"message": "failed", "code": "c"}


@pytest.mark.parametrize("split", [False, True], ids=["one file", "two files"])
@pytest.mark.parametrize("swapped", [False, True])
def test_an_answer_counts_more_than_an_error(split: bool, swapped: bool) -> None:
    """In whatever order they stand, in one file or two; the second line is counted."""
    lines = [answer("request-0"), unrun("request-0", FAILED)]
    lines = lines[::-1] if swapped else lines
    results = read(*([[line] for line in lines] if split else [lines]))
    assert results.outcomes[0].content == "hi"
    assert +results.oddities == {"second lines of one request": 1}


def test_the_first_of_two_answers_counts() -> None:
    """And the first of two errors."""
    results = read([answer("request-0", "one"), answer("request-0", "two")])
    assert results.outcomes[0].content == "one"
    results = read([unrun("request-0", {"code": "one", "message": "m"}), unrun("request-0", FAILED)])
    assert results.outcomes[0].code == "one"


def test_lines_of_no_request_are_counted() -> None:
    """Other names, no names, indexes that the batch does not have."""
    names = ["unknown", "unknown-0", "request-7", "request--0", "request-0x", "0", "", None, 5, "x#9"]
    results = read([*(answer(name) for name in names), answer("request-1"), b"[]\n"], count=3)
    assert list(results.outcomes) == [1]
    assert +results.oddities == {"lines of no request of this job": 10, "unreadable lines": 1}


def test_blank_lines_are_nothing() -> None:
    assert read([b"\n", b"  \r\n", answer("request-0")]).lines == 1


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("request-0", 0),
        ("request-41", 41),
        ("mine#41", 41),
        ("a#1#2", 2),
        ("request-1#3", 3),
        ("request-", None),
        ("unknown-7", None),
        ("my request-7", None),
        ("7", None),
        ("#" + "9" * 5000, None),
        ("request-٣", None),
        ("request-1\n", None),
    ],
)
def test_the_index_in_a_name(name: str, index: int | None) -> None:
    """Only in a custom_id of ours."""
    assert index_in(name) == index


# --- what was asked ----------------------------------------------------------------------------------------


def asked(name: Any, **body: Any) -> bytes:
    line = {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}
    return json.dumps(line).encode() + b"\n"


def test_the_index_of_an_input_file() -> None:
    """Order and temperatures; empty lines are none of the requests, but count as lines of the file."""
    lines = [b"\n", asked("b", temperature=0.5), b" \n", asked("a"), asked("c", temperature=0)]
    index = read_index(lines, numbered=False, start=10)
    assert list(index.indexes) == [10, 11, 12]
    assert [index.index_of(name) for name in ("b", "a", "c", "d", None)] == [10, 11, 12, None, None]
    assert [index.temperature_of(n) for n in (10, 11, 12)] == [0.5, None, 0]
    assert [index.index_at(n) for n in range(8)] == [None, None, 10, None, 11, 12, None, None]
    assert read_bodies(lines, {0: 10, 2: 12}) == {10: {"temperature": 0.5}, 12: {"temperature": 0}}


def test_the_index_of_numbered_lines() -> None:
    """The index is the name's, not the line's."""
    index = read_index([asked("x#4"), asked("request-9")], numbered=True, start=0)
    assert list(index.indexes) == [4, 9]
    assert (index.index_at(1), index.index_at(2), index.index_at(-1)) == (4, 9, None)


def test_a_guessed_index() -> None:
    """In the order of the results, or by their numbers; the files are at their start again."""
    files = [io.BytesIO(answer("b") + answer("a")), io.BytesIO(unrun("c", None) + answer("a"))]
    index = guess_index(files, numbered=False, start=5, count=4)
    assert list(index.indexes) == [5, 6, 7, 8]
    assert [index.index_of(name) for name in "bac"] == [5, 6, 7]
    assert [file.tell() for file in files] == [0, 0]
    files = [io.BytesIO(answer("b#7") + answer("nobody") + answer("a#2"))]
    index = guess_index(files, numbered=True, start=0, count=9)
    assert list(index.indexes) == [2, 7]
    assert index.index_of("nobody") is None


def test_a_request_without_a_result_has_the_reason_of_its_line() -> None:
    """Where the batch's errors name the line; else the first reason of the batch."""
    errors = [{"code": "c", "message": "m", "line": 3}, {"code": "d", "message": "n"}]
    failed = Batch.construct(
        id="batch_1", status="failed", metadata=None, request_counts=None, errors={"data": errors}
    )
    results = BatchResults()
    explain_missing(failed, results, RequestIndex(range(10, 14)))
    assert results.outcomes[12] == BatchError("m", code="c", line=13)
    assert results.outcomes[10] == BatchError("batch batch_1 failed: m", code="c", line=11)
    assert sorted(results.outcomes) == [10, 11, 12, 13]


# --- anything at all ---------------------------------------------------------------------------------------

names = st.sampled_from(
    ["request-0", "request-1", "request-2", "x#1", "nobody", "", None, 3, "#" + "9" * 5000]
)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters())
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
errors = values | st.fixed_dictionaries(
    {"message": values, "code": values}, optional={"param": values, "type": values}
)
statuses = st.sampled_from([200, 400, 404, 429, 500, 0, 10**30]) | values
bodies = values | st.just(body_of("hi")) | st.fixed_dictionaries({"error": errors})
bodies |= st.fixed_dictionaries(
    {"choices": st.lists(values, max_size=2)}, optional={"usage": values, "model": values}
)
responses = values | st.fixed_dictionaries(
    {}, optional={"status_code": statuses, "body": bodies, "request_id": values}
)
objects = st.fixed_dictionaries({}, optional={"custom_id": names, "response": responses, "error": errors})
cuts = st.floats(0, 1)


def written(value: Any, cut: float) -> bytes:
    line = json.dumps(value).encode("utf-8", "surrogatepass")
    return line[: int(len(line) * cut)] + b"\n"


lines = st.builds(written, objects, st.just(1.0)) | st.builds(written, objects, cuts) | st.binary(max_size=40)


@patient
@given(st.lists(lines, max_size=6), st.lists(lines, max_size=6), st.sampled_from(["chat", "responses"]))
@example([refusal("request-0", 10**30, {"error": {"message": "\ud800"}})], [], "chat")
def test_any_bytes_give_typed_outcomes(output: list[bytes], failures: list[bytes], api: str) -> None:
    """Never an error of the reader's own; each outcome belongs to a request, is typed, and pickles."""
    results = read(output, failures, count=3, api=api)
    assert set(results.outcomes) <= {0, 1, 2}
    for outcome in results.outcomes.values():
        assert isinstance(outcome, ModelResponse | BatchError | openai.APIStatusError)
        pickle.loads(pickle.dumps(outcome))  # noqa: S301
        str(outcome)
        if isinstance(outcome, ModelResponse):
            outcome.model_dump_json()


@patient
@given(
    st.permutations([answer("request-0"), answer("request-1", "b"), unrun("request-2", FAILED), answer("x")])
)
def test_the_order_of_the_lines_does_not_matter(lines: list[bytes]) -> None:
    """The outcomes are the same in any order, in one file or two."""
    for cut in range(len(lines) + 1):
        outcomes = read(lines[:cut], lines[cut:], count=3).outcomes
        assert [getattr(outcomes[n], "content", None) for n in range(3)] == ["hi", "b", None]


@patient
@given(st.lists(lines | st.builds(asked, names, temperature=values), max_size=6), st.booleans())
def test_any_input_file_gives_an_index(lines: list[bytes], numbered: bool) -> None:
    """As many indexes as lines that are not empty; guessing from it does not fail either."""
    index = read_index(lines, numbered=numbered, start=0)
    assert len(index.indexes) == sum(not line.isspace() for line in lines)
    guess_index([io.BytesIO(b"".join(lines))], numbered=numbered, start=0, count=3)
