"""The table of failures: each row with what servers send, and each error without a status."""

import json
import time

import openai
import pytest

from openai_eval_client import (
    BudgetExceededError,
    QuotaError,
    RequestTooLargeError,
    TimeoutError,
    ValidationError,
)
from openai_eval_client._wire.bodies import status_error
from openai_eval_client._wire.failures import (
    FAILURES,
    Kind,
    Scope,
    outcome_of,
    read_failure,
    refused,
    row_of,
)
from openai_eval_client._wire.masking import forget_key
from openai_eval_client._wire.refusals import words_of
from openai_eval_client.errors import rate_limited, sdk_httpx

REQUEST, MODEL, ACCOUNT = Scope.REQUEST, Scope.MODEL, Scope.ACCOUNT
# The status, the error's code, its message; what it is, whether it is tried again, what else would meet it.
TABLE = [
    (429, "insufficient_quota", "You exceeded your current quota", Kind.OUT_OF_QUOTA, False, ACCOUNT),
    (429, None, "insufficient_quota: check your plan", Kind.OUT_OF_QUOTA, False, ACCOUNT),
    (429, "billing_not_active", "Your account is not active", Kind.OUT_OF_QUOTA, False, ACCOUNT),
    (429, "credit_balance_exhausted", "Add credits", Kind.OUT_OF_QUOTA, False, ACCOUNT),
    (429, "organization_spend_limit_exceeded", "m", Kind.OUT_OF_QUOTA, False, ACCOUNT),
    (429, "project_spend_limit_exceeded", "m", Kind.OUT_OF_QUOTA, False, ACCOUNT),
    (429, "organization_usage_limit_exceeded", "m", Kind.OUT_OF_QUOTA, False, ACCOUNT),
    (400, "billing_hard_limit_reached", "Billing hard limit reached", Kind.OUT_OF_QUOTA, False, ACCOUNT),
    (402, None, "Insufficient Balance", Kind.OUT_OF_QUOTA, False, ACCOUNT),
    (402, None, "m", Kind.OUT_OF_QUOTA, False, ACCOUNT),
    (400, None, "Your credit balance is too low to use the API", Kind.OUT_OF_QUOTA, False, ACCOUNT),
    (403, "insufficient_user_quota", "quota left: $0.00", Kind.OUT_OF_QUOTA, False, ACCOUNT),
    (
        429,
        "exceeded_current_quota_error",
        "Your account org-1 is suspended",
        Kind.OUT_OF_QUOTA,
        False,
        ACCOUNT,
    ),
    (429, None, "your account is suspended, please recharge", Kind.OUT_OF_QUOTA, False, ACCOUNT),
    (429, None, "You exceeded your current quota, check billing", Kind.OUT_OF_QUOTA, False, ACCOUNT),
    (429, None, "You exceeded your current quota. Please retry in 11.6s.", Kind.RATE_LIMITED, True, MODEL),
    (429, "rate_limit_exceeded", "20 a minute. Top up your balance", Kind.RATE_LIMITED, True, MODEL),
    (429, None, "You have exceeded the quota of 60 requests per minute", Kind.RATE_LIMITED, True, MODEL),
    (429, "insufficient_quota", "allocated quota exceeded, increase it", Kind.RATE_LIMITED, True, MODEL),
    (403, "access_terminated", "violation of our policies", Kind.OUT_OF_QUOTA, False, ACCOUNT),
    (403, None, "Your account has been flagged. Contact support.", Kind.REFUSED_KEY, False, ACCOUNT),
    (400, "invalid_image_url", "image for the model not found", Kind.REFUSED_INPUT, False, REQUEST),
    (429, "rate_limit_exceeded", "Request too large for gpt-4o on TPM", Kind.TOO_LARGE, False, REQUEST),
    (429, "rate_limit_exceeded", "Rate limit reached on tokens per min", Kind.RATE_LIMITED, True, MODEL),
    (429, None, "too many concurrent requests", Kind.CONCURRENCY, True, MODEL),
    (429, None, "Max parallel request limit reached", Kind.CONCURRENCY, True, MODEL),
    (429, "resource_unavailable", "m", Kind.CAPACITY, True, MODEL),
    (429, None, "Resource Unavailable", Kind.CAPACITY, True, MODEL),
    (429, "engine_overloaded_error", "m", Kind.OVERLOADED, True, MODEL),
    (503, "slow_down", "m", Kind.OVERLOADED, True, MODEL),
    (503, None, "Slow down: reduce your request rate", Kind.OVERLOADED, True, MODEL),
    (503, None, "The model is overloaded", Kind.OVERLOADED, True, MODEL),
    (529, None, "m", Kind.OVERLOADED, True, MODEL),
    (401, "invalid_api_key", "Incorrect API key provided", Kind.REFUSED_KEY, False, ACCOUNT),
    (401, None, "m", Kind.REFUSED_KEY, False, ACCOUNT),
    (403, "invalid_api_key", "Incorrect API key provided", Kind.REFUSED_KEY, False, ACCOUNT),
    (403, "unsupported_country", "Country not supported", Kind.REFUSED_KEY, False, ACCOUNT),
    (403, None, "Content violates usage guidelines", Kind.CONTENT_REFUSED, False, REQUEST),
    (403, None, "Your input was flagged for violence", Kind.CONTENT_REFUSED, False, REQUEST),
    (400, "invalid_prompt", "m", Kind.CONTENT_REFUSED, False, REQUEST),
    (400, "content_filter", "m", Kind.CONTENT_REFUSED, False, REQUEST),
    (400, None, "triggering Azure OpenAI's content management policy", Kind.CONTENT_REFUSED, False, REQUEST),
    (404, "model_not_found", "The model `gpt-9` does not exist", Kind.REFUSED_MODEL, False, MODEL),
    (400, None, "Model Not Exist", Kind.REFUSED_MODEL, False, MODEL),
    (404, None, "No endpoints found that support image input", Kind.REFUSED_INPUT, False, REQUEST),
    (404, None, "No endpoints found for a/b.", Kind.REFUSED_MODEL, False, MODEL),
    (404, None, "Not Found", Kind.NOT_FOUND, False, ACCOUNT),
    (408, None, "Request timeout", Kind.SERVER_ERROR, True, REQUEST),
    (409, None, "Conflict", Kind.SERVER_ERROR, True, REQUEST),
    (499, None, "client closed request", Kind.SERVER_ERROR, False, REQUEST),
    (413, None, "Payload too large", Kind.TOO_LARGE, False, REQUEST),
    (400, "context_length_exceeded", "maximum context length is 128000", Kind.TOO_LARGE, False, REQUEST),
    (400, "content_policy_violation", "rejected by our safety system", Kind.CONTENT_REFUSED, False, REQUEST),
    (400, "unsupported_value", "temperature does not support 0", Kind.REFUSED_INPUT, False, REQUEST),
    (422, None, "Unprocessable", Kind.REFUSED_INPUT, False, REQUEST),
    (500, "server_error", "The server had an error", Kind.SERVER_ERROR, True, REQUEST),
    (503, None, "Service unavailable", Kind.SERVER_ERROR, True, REQUEST),
]


def error_of(status, code, message, **headers):
    """The SDK's error for an answer with such a body."""
    body = {"error": {"message": message, "code": code, "type": None}}
    httpx = sdk_httpx()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = httpx.Request("POST", "http://127.0.0.1/v1/chat/completions")
    return status_error(status, body, httpx.Response(status, json=body, headers=named, request=request))


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row[0]} {row[1] or row[2]}")
def test_an_error_and_the_bytes_it_is_made_of_mean_the_same(row):
    """Our own calls see the SDK's error, the drop-in client the status and the body."""
    status, code, message, *expected = row
    body = json.dumps({"error": {"message": message, "code": code}}).encode()
    for failure in (read_failure(error_of(status, code, message)), refused(status, {}, body).failure):
        assert [failure.kind, failure.retry, failure.scope] == expected
        assert failure.billed is (failure.kind is Kind.SERVER_ERROR)
        assert (failure.status, failure.code) == (status, code or "")


def test_every_row_is_met():
    """Each row with a status decides some line above."""
    met = {row_of(status, words_of({"code": code, "message": text})) for status, code, text, *_ in TABLE}
    assert {row for row in FAILURES if not isinstance(row.of, type)} == met


@pytest.mark.parametrize("wish", [True, False])
def test_the_servers_own_word_on_trying_again_wins(wish):
    """As it does with the SDK; but nothing makes an account without credit worth another attempt."""
    word = {"x_should_retry": str(wish).lower()}
    assert read_failure(error_of(500, None, "m", **word)).retry is wish
    assert read_failure(error_of(400, None, "m", **word)).retry is wish
    assert not read_failure(error_of(429, "insufficient_quota", "m", **word)).retry


def test_a_refusal_states_its_wait_and_its_limit():
    """The header's wait before the message's; the limit that the message names."""
    message = "Rate limit reached for m on tokens per min (TPM). Please try again in 6m0s."
    failure = read_failure(error_of(429, None, message))
    assert (failure.wait, failure.dimension) == (360.0, "tokens")
    assert read_failure(error_of(429, None, message, retry_after="2")).wait == 2.0
    assert refused(429, {"retry-after-ms": "70"}, b"on requests per min").failure.dimension == "requests"


def caused_by(error, name):
    """The same error, with a cause of a class of that name."""
    error.__cause__ = type(name, (Exception,), {})()
    return error


def connection_error():
    """The SDK's error for a connection that failed."""
    return openai.APIConnectionError(request=sdk_httpx().Request("POST", "http://127.0.0.1/"))


def unreadable():
    """The error for a 200 that holds no answer."""
    request = sdk_httpx().Request("POST", "http://127.0.0.1/")
    response = sdk_httpx().Response(200, content=b"<html>", request=request)
    return openai.APIResponseValidationError(response=response, body=None)


@pytest.mark.parametrize(
    ("error", "kind", "retry", "billed"),
    [
        (TimeoutError("no answer", request=None), Kind.TIMED_OUT, True, True),
        (connection_error(), Kind.DROPPED, True, True),
        (caused_by(connection_error(), "ConnectError"), Kind.UNREACHABLE, True, False),
        (caused_by(connection_error(), "ClientConnectorError"), Kind.UNREACHABLE, True, False),
        (unreadable(), Kind.UNREADABLE, True, True),
        (KeyboardInterrupt(), Kind.DROPPED, False, True),
        (openai.APIError("m", connection_error().request, body=None), Kind.DROPPED, False, True),
        (ValidationError("m", field="prompt"), Kind.LOCAL, False, False),
        (RequestTooLargeError("m", tokens=9, limit=1), Kind.TOO_LARGE, False, False),
    ],
)
def test_an_error_without_a_status(error, kind, retry, billed):
    """Whether it is worth another attempt, and whether it may have been billed."""
    failure = read_failure(error)
    assert (failure.kind, failure.retry, failure.billed) == (kind, retry, billed)
    outcome = outcome_of(error)
    assert outcome.sent is (kind is not Kind.UNREACHABLE)
    assert outcome.may_be_billed is (billed or kind is Kind.LOCAL)  # it does not show what came of it


def test_a_circle_of_causes_is_followed_once():
    """An error may be the cause of its own cause."""
    error, cause = connection_error(), ValueError()
    error.__cause__, cause.__cause__ = cause, error
    assert read_failure(error).kind is Kind.DROPPED


@pytest.mark.parametrize(
    ("error", "meaning"),
    [
        (TimeoutError("no answer", request=None), "no answer within timeout"),
        (connection_error(), "the connection failed, or the answer was cut short"),
        (caused_by(connection_error(), "ConnectError"), "no connection to the server"),
        (unreadable(), "what came was no answer"),
        (BudgetExceededError("m"), "max_cost left too little; not sent"),
        (RequestTooLargeError("m", tokens=9, limit=1), "more tokens than the limit can ever admit; not sent"),
        (ValidationError("m", field="prompt"), "the input is wrong; not sent"),
        (error_of(429, None, "too many concurrent requests"), "too many requests in flight"),
        (error_of(403, None, "flagged"), "the provider refuses the content"),
        (ValueError("m"), "see its message"),
    ],
)
def test_an_error_has_a_meaning_for_a_reader(error, meaning):
    """By the row of the table that it fits."""
    assert read_failure(error).meaning == meaning


@pytest.mark.parametrize(
    ("error", "ends", "shared"),
    [
        (error_of(401, None, "m"), False, True),
        (error_of(403, None, "m"), False, True),
        (error_of(404, None, "m"), False, True),
        (QuotaError("m", response=error_of(429, None, "m").response, body=None), True, True),
        (BudgetExceededError("m"), True, True),
        (ValidationError("m", field="max_cost"), True, True),
        (RuntimeError("this client was closed"), True, True),
        (rate_limited("m", 601.0), True, False),
        (rate_limited("m", 599.0), False, False),
        (error_of(429, None, "a free allowance of 50 per day"), None, False),
        (error_of(403, None, "Content violates usage guidelines"), False, False),
        (error_of(400, None, "m"), False, False),
        (error_of(500, None, "m"), False, False),
        (ValidationError("m", field="prompt"), False, False),
        (connection_error(), False, False),
        (caused_by(connection_error(), "ConnectError"), False, True),
    ],
)
def test_what_every_other_prompt_would_meet(error, ends, shared):
    """For certain: credit, a budget, a closed client, a long wait. Perhaps: key, model, address."""
    failure = read_failure(error)
    assert failure.is_shared is shared
    assert ends is None or failure.ends_run(600) is ends


def test_an_allowance_for_a_day_comes_back_at_midnight(monkeypatch):
    """In UTC, where the server names no other time."""
    monkeypatch.setattr("time.time", lambda: 10 * 86_400.0 + 3_600)
    for text in (
        "Rate limit exceeded: free-models-per-day",
        "GenerateRequestsPerDayPerProject",
        "daily limit",
    ):
        assert read_failure(error_of(429, None, text)).wait == 23 * 3_600
    assert (
        read_failure(error_of(429, None, "10 requests per day (RPD). Please try again in 7m12s")).wait == 432
    )


@pytest.mark.parametrize(
    ("body", "message", "wait"),
    [
        ({"error": {"message": "m"}}, "m", None),
        ({"error": "text"}, "text", None),
        ({"detail": "text"}, "text", None),
        ({"detail": [{"loc": ["body"], "msg": "field required"}]}, "field required", None),
        ({"detail": {"error": {"message": "deep"}}}, "deep", None),
        ({"message": "m", "code": 7}, "m", None),
        ([{"error": {"message": "m", "code": 429}}], "m", None),
        ("<html><body>Bad <b>gateway</b></body></html>", "Bad  gateway", None),
        ({"error": {"message": "m", "details": [{"retryDelay": "11s"}]}}, "m", 11.0),
        ({"error": {"message": "m", "metadata": {"headers": {"Retry-After": "9"}}}}, "m", 9.0),
        ({"error": {"message": "m", "metadata": {"retry_after_seconds": 3}}}, "m", 3.0),
        ({"error": {"message": ["m"], "metadata": 5, "details": 5}}, "m", None),
        (None, "", None),
        (5, "", None),
        ([], "", None),
    ],
)
def test_the_words_of_a_refusal_are_read_from_any_shape(body, message, wait):
    """OpenAI's, FastAPI's, Google's, OpenRouter's, a gateway's."""
    words = words_of(body)
    assert (words.message, words.wait) == (message, wait)


def test_an_allowance_for_a_minute_as_well_is_no_wait_for_a_day():
    """Nor is what is no rate limit."""
    assert read_failure(error_of(429, None, "20 requests per minute, 200 requests per day")).wait is None
    assert read_failure(error_of(500, None, "the daily backup")).wait is None


@pytest.mark.parametrize(
    "text", ["violat" * 682, "balance " * 500, "account " * 500, "does not support " * 250]
)
def test_a_long_message_is_read_in_linear_time(text):
    """The patterns look at bounded parts of it."""
    body = {"error": {"message": text, "metadata": {"raw": text}}}
    began = time.process_time()
    for status in (400, 403, 429):
        row_of(status, words_of(body))
    assert time.process_time() - began < 2  # seconds of CPU; one pattern took 12


def test_reasons_of_a_moderation_are_enough():
    """A 403 that names reasons refuses the content, whatever its message is."""
    body = {"error": {"message": "m", "code": 403, "metadata": {"reasons": ["violence"]}}}
    assert row_of(403, words_of(body)).kind is Kind.CONTENT_REFUSED


def test_an_error_that_forgets_the_key_still_says_how_long_to_wait():
    """A server that echoes the key in its message, with a wait in its headers."""
    error = error_of(429, None, "key sk-0123456789 is rate limited", retry_after="601", x_key="sk-0123456789")
    forget_key(error, "sk-0123456789")
    assert "sk-0123456789" not in f"{error}{error.body}{error.response.headers}"
    assert read_failure(error).wait == 601
    assert read_failure(error).ends_run(600)
