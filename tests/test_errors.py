"""The errors: whose subclasses they are, that they pickle, and that none of it shows the key."""

import builtins
import copy
import json
import pickle
import traceback

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter
from pydantic import ValidationError as PydanticError

import openai_eval_client as package
from openai_eval_client import (
    BatchError,
    BatchJobStatus,
    BudgetExceededError,
    ModelResponse,
    OpenAIClient,
    OpenAIConfig,
    PartialFailureError,
    QuotaError,
    RequestTooLargeError,
    ResponseTooLargeError,
    TimeoutError,
    TokenUsage,
    TooManyFailuresError,
    ValidationError,
)
from openai_eval_client.errors import rate_limited, sdk_httpx

KEY = "sk-never-to-be-seen-0123456789"
URL = "https://api.example.com/v1"
STATUSES = {
    400: openai.BadRequestError,
    401: openai.AuthenticationError,
    403: openai.PermissionDeniedError,
    404: openai.NotFoundError,
    409: openai.ConflictError,
    422: openai.UnprocessableEntityError,
    429: openai.RateLimitError,
    500: openai.InternalServerError,
    418: openai.APIStatusError,
}
HTTP_DETAILS = {
    "code": "some_code",
    "type": "some_type",
    "param": "some_param",
    "message": "What the server says.",
}
REPLY_HEADERS = {
    "x-request-id": "req_1",
    "retry-after": "3",
    "x-ratelimit-limit-requests": "500",
    "set-cookie": "session=secret",
}


def pickled(value, protocol=None):
    return pickle.loads(pickle.dumps(value, protocol))  # noqa: S301


def answering(status, body=None, headers=None):
    """The SDK's HTTP library, answering every request alike."""
    httpx = sdk_httpx()
    return httpx.MockTransport(lambda _: httpx.Response(status, json=body, headers=headers))


def from_the_sdk(status):
    """The error that the SDK itself raises for an answer of that status, the key in its request."""
    transport = answering(status, {"error": HTTP_DETAILS}, REPLY_HEADERS)
    with (
        sdk_httpx().Client(transport=transport) as http,
        openai.OpenAI(api_key=KEY, base_url=URL, max_retries=0, http_client=http) as client,
        pytest.raises(openai.APIStatusError) as caught,
    ):
        client.models.list()
    assert caught.value.request.headers["authorization"] == f"Bearer {KEY}"
    return caught.value


def a_request():
    return sdk_httpx().Request("POST", f"{URL}/chat/completions", headers={"authorization": f"Bearer {KEY}"})


def a_reply(status=200):
    return sdk_httpx().Response(status, headers=REPLY_HEADERS, request=a_request(), json={})


def response(content="yes"):
    usage = TokenUsage(prompt_tokens=1, completion_tokens=2, total_tokens=3)
    return ModelResponse(
        content=content,
        usage=usage,
        model="m",
        request_id="req_2",
        latency_ms=1.0,
        temperature=1.0,
        finish_reason="stop",
    )


def quota_error():
    return QuotaError("used up", response=a_reply(429), body={"code": "insufficient_quota"})


def oauth_error():
    reply = sdk_httpx().Response(401, headers=REPLY_HEADERS, request=a_request())
    return openai.OAuthError(response=reply, body={"error": "invalid_grant"})


ERRORS = {
    **({"OAuthError": oauth_error} if hasattr(openai, "OAuthError") else {}),  # not in openai 2.0
    **{f"status {status}": (lambda status=status: from_the_sdk(status)) for status in STATUSES},
    "APIError": lambda: openai.APIError("broken", a_request(), body={"message": "broken"}),
    "APIConnectionError": lambda: openai.APIConnectionError(message="refused", request=a_request()),
    "APITimeoutError": lambda: openai.APITimeoutError(request=a_request()),
    "APIResponseValidationError": lambda: openai.APIResponseValidationError(a_reply(), {"odd": 1}),
    "our RateLimitError": lambda: rate_limited("come back later", 700.0),
    "TimeoutError": lambda: TimeoutError("no answer within 30 s", request=a_request()),
    "QuotaError": quota_error,
    "ValidationError": lambda: ValidationError("model='': must not be empty", field="model", index=3),
    "RequestTooLargeError": lambda: RequestTooLargeError("gpt-4o", tokens=100_000, limit=90_000),
    "ResponseTooLargeError": lambda: ResponseTooLargeError(5_000, request=a_request()),
    "BudgetExceededError": lambda: BudgetExceededError("0.02 USD left", responses=[response(), None]),
    "BatchError": lambda: BatchError("too much", code="token_limit_exceeded", line=7, param="body"),
    "PartialFailureError": lambda: PartialFailureError(
        [response(), None, None], {1: from_the_sdk(429), 2: TimeoutError("too slow", request=a_request())}
    ),
    "TooManyFailuresError": lambda: TooManyFailuresError(3, 20, 0.1, responses=[response(), None]),
    "nested PartialFailureError": lambda: PartialFailureError(
        [None], {0: PartialFailureError([None], {0: quota_error()})}
    ),
}


@pytest.fixture(params=ERRORS)
def error(request):
    return ERRORS[request.param]()


@pytest.mark.parametrize(
    ("ours", "bases"),
    [
        (TimeoutError, (openai.APITimeoutError, builtins.TimeoutError)),
        (QuotaError, (openai.RateLimitError,)),
        (ValidationError, (openai.OpenAIError, ValueError)),
        (BatchError, (openai.OpenAIError,)),
        (PartialFailureError, (openai.OpenAIError,)),
        (BudgetExceededError, (openai.OpenAIError,)),
        (RequestTooLargeError, (openai.OpenAIError,)),
        (ResponseTooLargeError, (openai.APIConnectionError,)),
    ],
)
def test_an_except_clause_for_raw_calls_catches_ours(ours, bases):
    """Each error is a subclass of the SDK's (and the builtin) error of the same meaning."""
    assert issubclass(ours, bases)
    assert all(issubclass(ours, base) for base in bases)


def test_two_errors_are_the_sdks_own():
    """`APIError` and `RateLimitError` are not copies."""
    assert package.APIError is openai.APIError
    assert package.RateLimitError is openai.RateLimitError


def test_errors_that_are_not_the_apis_are_no_api_errors():
    """What was never sent, or concerns many prompts, is not caught by `except APIError`."""
    for ours in (
        *(ValidationError, BatchError, PartialFailureError),
        *(BudgetExceededError, RequestTooLargeError, TooManyFailuresError),
    ):
        assert not issubclass(ours, openai.APIError)


@pytest.mark.parametrize(("status", "kind"), STATUSES.items())
def test_sdk_errors_come_back_from_pickle_as_they_were(status, kind):
    """Class, message, status, code, body, request id and the rate-limit headers survive."""
    error = from_the_sdk(status)
    copied = pickled(error)
    assert type(copied) is type(error) is kind
    assert str(copied) == str(error)
    assert copied.args == error.args
    for name in ("message", "body", "code", "type", "param", "status_code", "request_id"):
        assert getattr(copied, name) == getattr(error, name), name
    assert copied.response.status_code == status
    assert copied.response.headers["retry-after"] == "3"
    assert copied.response.headers["x-ratelimit-limit-requests"] == "500"
    assert "set-cookie" not in copied.response.headers
    assert copied.request.method == "GET"
    assert str(copied.request.url) == f"{URL}/models"


def test_every_error_of_the_sdk_pickles():
    """No subclass of APIError that the SDK exports is left out."""
    exported = [getattr(openai, name) for name in openai.__all__ if name.endswith("Error")]
    kinds = {kind for kind in exported if issubclass(kind, openai.APIError)}
    made = {type(make()) for make in ERRORS.values()}
    assert kinds <= made


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_every_error_pickles(error, protocol):
    """Worker processes hand errors back, in whatever protocol."""
    copied = pickled(error, protocol)
    assert type(copied) is type(error)
    assert str(copied) == str(error)
    assert repr(copied) == repr(error)


def test_every_error_copies(error):
    """`copy` works as pickle does."""
    for copied in (copy.copy(error), copy.deepcopy(error)):
        assert type(copied) is type(error)
        assert str(copied) == str(error)


def test_no_error_shows_the_key(error):
    """The Authorization header of the request is in no text and in no pickle."""
    assert KEY not in str(error)
    assert KEY not in repr(error)
    assert KEY not in "".join(traceback.format_exception(error))
    assert KEY.encode() not in pickle.dumps(error)
    assert KEY.encode() not in pickle.dumps(error, 0)


def test_no_unpickled_error_holds_the_key_anywhere(error):
    """Nor can it be reached from the copy."""
    copied = pickled(error)
    request = getattr(copied, "request", None)
    assert request is None or "authorization" not in request.headers
    assert KEY not in repr(vars(copied))


def test_notes_survive_pickle(error):
    """What `add_note` attached is still there in the parent process."""
    error.__dict__["__notes__"] = ["while asking about Paris"]  # add_note() of Python 3.11
    copied = pickled(error)
    assert copied.__notes__ == ["while asking about Paris"]


@pytest.mark.parametrize("name", ["status 401", "status 404", "QuotaError", "our RateLimitError"])
def test_attached_responses_survive_pickle(name):
    """A run that a fatal error stopped hands over the answers until then, also to another process."""
    error = ERRORS[name]()
    error.responses = [response("paid for"), None]
    assert pickled(error).responses == [response("paid for"), None]


def test_the_query_of_the_url_is_left_out():
    """A key may stand in the query as well."""
    request = sdk_httpx().Request("GET", f"{URL}/models?api-key={KEY}")
    error = openai.APIConnectionError(message="refused", request=request)
    assert KEY.encode() not in pickle.dumps(error)


def test_fields_survive_pickle():
    """Our own errors keep what they carry."""
    error = pickled(ERRORS["ValidationError"]())
    assert (error.field, error.index) == ("model", 3)
    error = pickled(ERRORS["RequestTooLargeError"]())
    assert (error.model, error.tokens, error.limit) == ("gpt-4o", 100_000, 90_000)
    error = pickled(ERRORS["BudgetExceededError"]())
    assert error.responses == [response(), None]
    error = pickled(ERRORS["PartialFailureError"]())
    assert error.responses == [response(), None, None]
    assert [type(error.failures[index]) for index in (1, 2)] == [openai.RateLimitError, TimeoutError]


def test_a_partial_failure_sums_up():
    """Its text says how many failed of how many, of what kinds, and quotes the first."""
    failures = {4: quota_error(), 2: TimeoutError("too slow", request=a_request()), 5: quota_error()}
    text = str(PartialFailureError([None] * 9, failures))
    assert text == "3 of 9 prompts failed (2 QuotaError, 1 TimeoutError); first, prompt 2: too slow"


def test_a_request_too_large_names_the_numbers():
    """Model, tokens and limit are in the text."""
    text = str(RequestTooLargeError("gpt-4o", tokens=100_000, limit=90_000))
    assert text == "gpt-4o: a request of 100,000 tokens is too large for the limit of 90,000 per minute"


@pytest.mark.parametrize("status", [401, 400, 500])
async def test_a_server_that_echoes_the_key_does_not_get_it_into_an_error(status):
    """Some compatible servers quote the whole key in their refusal."""
    body = {"error": {"message": f"Incorrect API key provided: {KEY}.", "code": "invalid_api_key"}}
    http = sdk_httpx().AsyncClient(transport=answering(status, body, {"x-echo": KEY, "retry-after": "0"}))
    config = OpenAIConfig(api_key=KEY, base_url=URL, max_retries=0)
    async with OpenAIClient(config, http_client=http) as client:
        with pytest.raises(openai.APIStatusError) as caught:
            await client.generate_response("hello")
    error = caught.value
    assert "Incorrect API key provided" in str(error)
    seen = [str(error), repr(error), repr(vars(error)), repr(error.body), error.response.text]
    seen += [repr(dict(error.response.headers)), repr(dict(error.request.headers))]
    seen += [repr(dict(error.response.request.headers)), "".join(traceback.format_exception(error))]
    assert [text for text in seen if KEY in text] == []
    assert KEY.encode() not in pickle.dumps(error)
    assert error.status_code == status


# --- BatchError: an exception and a field ----------------------------------------------------------------

TEXTS = st.none() | st.text()
BATCH_ERRORS = st.builds(BatchError, st.text(), code=TEXTS, line=st.none() | st.integers(), param=TEXTS)


class Holder(BaseModel):
    errors: list[BatchError]


@given(BATCH_ERRORS)
def test_a_batch_error_round_trips(error):
    """As JSON, as dict and as pickle, it comes back equal."""
    holder = Holder(errors=[error])
    assert Holder.model_validate_json(holder.model_dump_json()) == holder
    assert Holder.model_validate(holder.model_dump()) == holder
    assert holder.model_dump()["errors"] == [error.to_dict()]
    copied = pickled(error)
    assert copied == error
    assert hash(copied) == hash(error)


def test_a_batch_error_can_be_raised():
    """It is an exception whose text is the reason."""
    with pytest.raises(openai.OpenAIError, match=r"^no room$") as caught:
        raise BatchError("no room", code="token_limit_exceeded")
    assert caught.value.code == "token_limit_exceeded"


def test_a_batch_error_reads_what_the_api_sends():
    """Code and message are enough; an instance is taken as it is."""
    sent = {"code": "invalid_json_line", "message": "not JSON", "line": 4, "param": None}
    expected = BatchError("not JSON", code="invalid_json_line", line=4)
    assert TypeAdapter(BatchError).validate_python(sent) == expected
    assert TypeAdapter(BatchError).validate_python({"message": "not JSON"}) == BatchError("not JSON")
    assert TypeAdapter(BatchError).validate_python(expected) is expected


@pytest.mark.parametrize(
    "wrong", ["text", 5, None, {}, {"message": 5}, {"message": "m", "line": "x"}, ValueError("m")]
)
def test_a_batch_error_refuses_anything_else(wrong):
    """What is no reason is not made one."""
    with pytest.raises(PydanticError):
        TypeAdapter(BatchError).validate_python(wrong)


def test_batch_errors_compare_by_what_they_say():
    """Each of the four fields counts, and another class is never equal."""
    one = BatchError("m", code="c", line=1, param="p")
    others = [
        BatchError("x", code="c", line=1, param="p"),
        BatchError("m", code="x", line=1, param="p"),
        BatchError("m", code="c", line=2, param="p"),
        BatchError("m", code="c", line=1, param="x"),
        ValueError("m"),
        one.to_dict(),
    ]
    assert one == BatchError("m", code="c", line=1, param="p")
    assert all(one != other for other in others)
    assert len({one, BatchError("m", code="c", line=1, param="p"), others[0]}) == 2


def test_a_batch_errors_repr_shows_what_is_there():
    """Fields that are None are left out."""
    assert repr(BatchError("m", line=1)) == "BatchError(message='m', line=1)"
    assert repr(BatchError("m", code="c", param="p")) == "BatchError(code='c', message='m', param='p')"


def test_a_batch_error_has_a_json_schema():
    """A status can be described to other programs: an error is an object with its four fields."""
    schema = BatchJobStatus.model_json_schema()
    item = schema["properties"]["errors"]["items"]
    item = schema["$defs"][item["$ref"].rpartition("/")[2]] if "$ref" in item else item
    assert item["type"] == "object"
    assert set(item["properties"]) == {"code", "message", "line", "param"}
    assert item["required"] == ["message"]
    json.dumps(BatchJobStatus.model_json_schema(mode="serialization"))
