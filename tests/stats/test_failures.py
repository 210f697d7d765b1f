"""What went wrong, by kind."""

import json

import openai
import pytest

from openai_eval_client._stats import Failures
from openai_eval_client._wire.failures import Outcome, code_of
from openai_eval_client._wire.failures import refused as refused_with
from openai_eval_client.errors import BudgetExceededError, sdk_httpx


def refused(status, code="", message="m"):
    """An error as the SDK makes it."""
    httpx = sdk_httpx()
    request = httpx.Request("POST", "http://x/")
    response = httpx.Response(status, request=request)
    body = {"message": message, "code": code, "type": "t", "param": None}
    return openai.APIStatusError(message, response=response, body=body)


def test_failures_are_counted_by_model_class_status_and_code():
    """Their messages make no difference."""
    failures = Failures()
    failures.raised("a", refused(500, message="one"), for_good=False)
    failures.raised("a", refused(500, message="two"), for_good=True)
    failures.raised("b", refused(500), for_good=False)
    failures.raised("a", refused(400, "context_length_exceeded"), for_good=True)
    rows = [(row.model, row.status, row.code, row.attempts, row.prompts) for row in failures.rows()]
    assert rows == [
        ("a", 500, "", 2, 1),
        ("a", 400, "context_length_exceeded", 1, 1),
        ("b", 500, "", 1, 0),
    ]


def test_what_was_not_sent_is_no_attempt():
    """A budget that is used up fails the prompt before an attempt."""
    failures = Failures()
    failures.raised("a", BudgetExceededError("m"), for_good=True)
    assert [(row.attempts, row.prompts) for row in failures.rows()] == [(0, 1)]


def test_no_more_kinds_than_a_page_holds():
    """A server may invent any number of codes."""
    failures = Failures()
    for number in range(1000):
        failures.raised(f"m{number}", refused(500), for_good=False)
    assert len(failures.rows()) == 61
    assert sum(row.attempts for row in failures.rows()) == 1000


@pytest.mark.parametrize(
    "code", ["sk-proj-abc", "a b", "What is my password?", "x" * 60, 7, None, "<b>", "K3Y"]
)
def test_a_code_that_is_not_one_of_the_api_is_left_out(code):
    """It may be anything, even a key."""
    error = refused(400)
    error.code = code
    assert code_of(error) == ""


@pytest.mark.parametrize(
    ("status", "body", "kind", "code"),
    [
        (
            429,
            json.dumps({"error": {"message": "x", "code": "rate_limit_exceeded"}}),
            "RateLimitError",
            "rate_limit_exceeded",
        ),
        (None, "", "APIConnectionError", ""),
        (503, "<html>", "InternalServerError", ""),
        (418, "{", "APIStatusError", ""),
        (400, json.dumps({"error": {"code": "sk-12"}}), "BadRequestError", ""),
    ],
)
def test_failures_of_the_sdk_are_named_by_status_and_code(status, body, kind, code):
    """Of calls on the drop-in client only status and body are seen."""
    failures = Failures()
    outcome = Outcome() if status is None else refused_with(status, {}, body.encode())
    failures.refused("m", outcome, for_good=False)
    (row,) = failures.rows()
    assert (row.kind, row.code, row.attempts) == (kind, code, 1)
