"""Retries: which error is worth another attempt, how long to wait first, and what the log says of it."""

import contextlib
import logging

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openai_eval_client import (
    OpenAIClient,
    OpenAIConfig,
    RateLimitConfig,
    RequestTooLargeError,
    TimeoutError,
    ValidationError,
)
from openai_eval_client._sdk.attempts import delays, retrying
from openai_eval_client._wire.failures import read_failure
from openai_eval_client.errors import PartialFailureError, QuotaError, rate_limited, sdk_httpx
from openai_eval_client.testing import SimulatedServer

KEY = "sk-never-to-be-seen-0123456789"
PROMPT = "a prompt that is to be read nowhere else"
TOO_LARGE = "Request too large for gpt-4o on tokens per min (TPM): Limit 30000, Requested 40000."


def request():
    return sdk_httpx().Request("POST", "http://test/v1/chat/completions", headers={"authorization": KEY})


def from_the_sdk(status, message="What the server says.", code=None, **headers):
    """The error that the SDK itself raises for that answer."""
    httpx = sdk_httpx()
    body = {"error": {"message": message, "type": "a_type", "param": None, "code": code}}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    transport = httpx.MockTransport(lambda _: httpx.Response(status, json=body, headers=named))
    with (
        httpx.Client(transport=transport) as http,
        openai.OpenAI(api_key=KEY, base_url="http://test/v1", max_retries=0, http_client=http) as client,
        pytest.raises(openai.APIStatusError) as caught,
    ):
        client.models.list()
    return caught.value


def error_of(status, **headers):
    """The same more quickly, for thousands of them."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    response = sdk_httpx().Response(status, headers=named, request=request())
    kind = openai.RateLimitError if status == 429 else openai.APIStatusError
    return kind("message", response=response, body=None)


def quota_error(**headers):
    error = error_of(429, **headers)
    return QuotaError("used up", response=error.response, body=None)


def connection_error():
    return openai.APIConnectionError(message="refused", request=request())


def timeout_error():
    return TimeoutError("no answer within 30 s", request=request())


def unreadable(status=200, **headers):
    return openai.APIResponseValidationError(response=error_of(status, **headers).response, body=None)


TRANSIENT = {408, 409, 429, 500, 501, 502, 503, 504, 520, 529, 599}
FINAL = {400, 401, 402, 403, 404, 405, 406, 410, 411, 413, 415, 418, 422, 424, 425, 431, 451, 498, 499}


@pytest.mark.parametrize("status", sorted(TRANSIENT | FINAL))
def test_the_status_says_whether_to_try_again(status):
    """Timeouts, conflicts, rate limits and server errors are worth it, refusals are not."""
    assert read_failure(from_the_sdk(status)).retry is (status in TRANSIENT)


@given(st.integers(400, 599))
def test_every_other_status_is_decided_by_its_class(status):
    """5xx is the server's trouble, 4xx the request's, but for three."""
    assert read_failure(error_of(status)).retry is (status >= 500 or status in {408, 409, 429})


@given(st.integers(400, 599).filter(lambda status: status != 402), st.booleans())
def test_the_servers_own_word_is_taken(status, wish):
    """`x-should-retry` overrides the status, as in the SDK, unless the credit is used up."""
    assert read_failure(error_of(status, x_should_retry=str(wish).lower())).retry is wish


@pytest.mark.parametrize("wish", ["", "TRUE", "yes", "1", "maybe"])
def test_another_word_is_no_word(wish):
    """Only "true" and "false" mean anything."""
    assert read_failure(error_of(500, x_should_retry=wish)).retry
    assert not read_failure(error_of(400, x_should_retry=wish)).retry


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (connection_error(), True),
        (openai.APITimeoutError(request=request()), True),
        (timeout_error(), True),
        (unreadable(), True),
        (quota_error(), False),
        (quota_error(x_should_retry="true"), False),
        (rate_limited("come back later", 5), True),
        (ValidationError("prompt=''"), False),
        (openai.OpenAIError("other"), False),
        (openai.APIError("no status", request(), body=None), False),
        (ValueError("other"), False),
        (PartialFailureError([None], {0: connection_error()}), False),
    ],
    ids=lambda item: type(item).__name__,
)
def test_other_errors(error, again):
    """What never reached the server, or came back unreadable, may work next time."""
    assert read_failure(error).retry is again


def test_a_request_that_is_too_large_is_not_sent_again():
    """The API answers 429 to a request that its limit can never admit."""
    assert not read_failure(from_the_sdk(429, TOO_LARGE, "rate_limit_exceeded")).retry
    assert read_failure(from_the_sdk(429, "Rate limit reached for gpt-4o", "rate_limit_exceeded")).retry


@pytest.mark.parametrize(
    ("error", "ends", "shared"),
    [
        (from_the_sdk(401), False, True),
        (from_the_sdk(403), False, True),
        (from_the_sdk(404), False, True),
        (quota_error(), True, True),
        (rate_limited("too long", 601), True, False),
        (from_the_sdk(429, retry_after="601"), True, False),
        (from_the_sdk(429, retry_after="600"), False, False),
        (from_the_sdk(529, retry_after="601"), True, False),
        (from_the_sdk(429), False, False),
        (from_the_sdk(400), False, False),
        (from_the_sdk(500), False, False),
        (connection_error(), False, False),
        (timeout_error(), False, False),
        (ValueError("other"), False, False),
    ],
    ids=lambda item: f"{type(item).__name__}{getattr(item, 'status_code', '')}",
)
def test_what_meets_every_prompt(error, ends, shared):
    """Credit and a pause beyond max_wait for certain; key, permission and model perhaps."""
    assert read_failure(error).ends_run(600) is ends
    assert read_failure(error).is_shared is shared


def test_the_wait_is_read_from_the_errors_headers():
    """None where there is no answer, or no word in it."""
    assert read_failure(from_the_sdk(503, retry_after="7")).wait == 7.0
    assert read_failure(from_the_sdk(429, retry_after_ms="70")).wait == 0.07
    assert read_failure(from_the_sdk(500)).wait is None
    assert read_failure(connection_error()).wait is None
    assert read_failure(ValueError("other")).wait is None


# --- delays -----------------------------------------------------------------------------------------------

CAP = 8.0
WAITS = st.none() | st.integers(0, 3600)


@st.composite
def errors(draw):
    seconds = draw(WAITS)
    headers = {} if seconds is None else {"retry_after": str(seconds)}
    kinds = [
        connection_error,
        timeout_error,
        lambda: error_of(500, **headers),
        lambda: error_of(429, **headers),
        lambda: unreadable(**headers),
    ]
    return draw(st.sampled_from(kinds))()


@given(st.lists(errors(), max_size=40))
def test_a_delay_is_the_servers_or_within_the_cap(sequence):
    """Whatever errors come in whatever order: the server's word exactly, else between 0 and the ceiling."""
    waits = delays(max_retries=99)
    next(waits)
    for attempt, error in enumerate(sequence):
        delay, asked = waits.send(error), read_failure(error).wait
        if not asked:  # none, or one of nought, which is no advice
            cap = 30 if read_failure(error).is_patient else CAP
            assert 0 <= delay <= min(cap, 0.5 * 2**attempt)
        else:
            assert delay == (0 if isinstance(error, openai.RateLimitError) else asked)


def test_delays_without_a_word_grow_and_vary():
    """Full jitter: the mean doubles up to the cap, and no two clients wait alike."""
    rounds = []
    for _ in range(400):
        waits = delays(max_retries=99)
        next(waits)
        rounds.append([waits.send(connection_error()) for _ in range(7)])
    means = [sum(column) / len(rounds) for column in zip(*rounds, strict=True)]
    for mean, ceiling in zip(means, (0.5, 1, 2, 4, 8, 8, 8), strict=True):
        assert ceiling * 0.4 < mean < ceiling * 0.6
    assert len({tuple(row) for row in rounds}) == len(rounds)


def test_after_a_rate_limit_the_pause_is_not_waited_here():
    """The request waits in the model's queue, which pauses once for all."""
    waits = delays(max_retries=99)
    next(waits)
    assert waits.send(error_of(429, retry_after="30")) == 0.0
    assert waits.send(error_of(503, retry_after="30")) == 30.0


def wait_all(errors_, **limits):
    """The delays after these errors, up to where it is not worth another attempt."""
    waits = delays(**limits)
    next(waits)
    found: list[float] = []
    with contextlib.suppress(StopIteration):
        for error in errors_:
            found += [waits.send(error)]
    return found


def test_a_refusal_that_says_nothing_against_the_request_counts_against_max_wait():
    """A rate limit with a stated wait, overload, no capacity, too many in flight."""
    limited = error_of(429, retry_after="10")
    assert len(wait_all([limited] * 99, max_retries=3, max_wait=60.0)) == 6
    assert len(wait_all([limited] * 99, max_retries=3, max_wait=5.0)) == 3  # never fewer than other failures
    assert len(wait_all([limited] * 99, max_retries=0, max_wait=60.0)) == 0
    soon_again = error_of(429, retry_after="0.02")
    assert len(wait_all([soon_again] * 999, max_retries=3, max_wait=60.0)) == 60
    for busy in (error_of(529), from_the_sdk(429, "too many concurrent requests")):
        slept = wait_all([busy] * 999, max_retries=3, max_wait=600.0)
        assert 20 <= len(slept) <= 100
        assert 500 <= sum(slept) <= 600


def test_patience_is_apart_from_the_attempts():
    """Other failures in between still count against max_retries."""
    story = [error_of(429, retry_after="1"), error_of(500)] * 4
    assert len(wait_all(story, max_retries=3, max_wait=600.0)) == 7


# --- retrying ---------------------------------------------------------------------------------------------


class Attempts:
    """Attempts that fail with the given errors in turn, and then succeed."""

    def __init__(self, *errors_):
        self.errors = list(errors_)
        self.count = self.retries = 0

    async def attempt(self, value):
        self.count += 1
        if self.errors:
            raise self.errors.pop(0)
        return value

    def note(self, *_):
        self.retries += 1

    def retried(self, max_retries, max_wait=600.0):
        return retrying(self.attempt, max_retries=max_retries, max_wait=max_wait, on_retry=self.note)


def soon(status=503):
    """Return an error that asks for a wait of 1 ms."""
    return error_of(status, retry_after_ms="1")


async def test_success_is_one_attempt():
    """A success is not tried again, and its value is returned."""
    attempts = Attempts()
    assert await attempts.retried(3)("value") == "value"
    assert (attempts.count, attempts.retries) == (1, 0)


@pytest.mark.parametrize("max_retries", [0, 1, 2, 5])
async def test_there_are_max_retries_attempts_after_the_first(max_retries):
    """After `max_retries` + 1 attempts the last error is raised unchanged."""
    raised = [soon() for _ in range(max_retries + 1)]
    attempts = Attempts(*raised)
    with pytest.raises(openai.APIStatusError) as caught:
        await attempts.retried(max_retries)("value")
    assert caught.value is raised[-1]
    assert (attempts.count, attempts.retries) == (max_retries + 1, max_retries)


@pytest.mark.parametrize("failures", [1, 2, 3])
async def test_a_success_in_time_is_returned(failures):
    """Even the last attempt may succeed."""
    attempts = Attempts(*(soon() for _ in range(failures)))
    assert await attempts.retried(3)("value") == "value"
    assert (attempts.count, attempts.retries) == (failures + 1, failures)


async def test_a_rate_limit_is_tried_again_at_once():
    """The account waits for it, not the retry."""
    attempts = Attempts(error_of(429, retry_after="500"), rate_limited("paused", 500))
    assert await attempts.retried(3)("value") == "value"
    assert attempts.count == 3


@pytest.mark.parametrize(
    "error",
    [
        from_the_sdk(400),
        from_the_sdk(401),
        from_the_sdk(404),
        from_the_sdk(500, x_should_retry="false"),
        quota_error(retry_after="0"),
        ValidationError("prompt=''"),
        RuntimeError("a bug"),
        error_of(503, retry_after="601"),
        error_of(429, retry_after="601"),
        rate_limited("too long", 601),
    ],
    ids=lambda error: f"{type(error).__name__}{getattr(error, 'status_code', '')}",
)
async def test_it_gives_up_at_once(error):
    """Refusals, errors not of the API, and waits beyond max_wait are not retried."""
    attempts = Attempts(error)
    with pytest.raises(type(error)) as caught:
        await attempts.retried(5)("value")
    assert caught.value is error
    assert (attempts.count, attempts.retries) == (1, 0)


async def test_two_callers_do_not_share_their_attempts():
    """Each call counts its own attempts."""
    attempts = Attempts()
    call = attempts.retried(1)
    for _ in range(3):
        attempts.errors = [soon()]
        assert await call("value") == "value"
    assert (attempts.count, attempts.retries) == (6, 3)


async def test_the_log_says_why_and_how_long(caplog):
    """Each retry has one line at INFO with its number, the reason and the seconds."""
    attempts = Attempts(soon(503), error_of(429, retry_after="9"), error_of(409, retry_after_ms="1"))
    with caplog.at_level(logging.DEBUG):
        await attempts.retried(3)(PROMPT)
    ours = [record for record in caplog.records if record.name == "openai_eval_client"]
    assert [record.levelno for record in ours] == [logging.INFO] * 3
    assert [record.getMessage() for record in ours] == [
        "attempt 1 failed (503): next in 0.00 s",
        "attempt 2 failed (429): next in 0.00 s",
        "attempt 3 failed (409): next in 0.00 s",
    ]
    assert {record.name for record in caplog.records} == {"openai_eval_client"}  # not backoff's own


async def test_the_log_names_an_error_without_a_status_by_its_class(caplog):
    """A failed connection, for example, has no status."""
    error = error_of(503, retry_after_ms="1", x_should_retry="true")
    error.status_code = None
    with caplog.at_level(logging.INFO):
        await Attempts(error).retried(1)(PROMPT)
    assert "attempt 1 failed (APIStatusError): next in 0.00 s" in caplog.text


# --- through the client ------------------------------------------------------------------------------------


def client_of(server, **options):
    limits = RateLimitConfig(requests_per_minute=None, tokens_per_minute=None)
    return OpenAIClient(OpenAIConfig(api_key=KEY, base_url=server.base_url, **options), rate_limit=limits)


def speaking(*answers):
    """Return an HTTP client that gets these answers in turn, then good ones."""
    httpx, left = sdk_httpx(), list(answers)
    good = {"id": "x", "model": "m", "choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}]}

    def answer(_):
        status, headers, body = left.pop(0) if left else (200, {}, good)
        return httpx.Response(status, headers=headers, json=body)

    return httpx.AsyncClient(transport=httpx.MockTransport(answer))


async def test_the_log_of_a_run_holds_neither_prompt_nor_key(caplog):
    """The log at INFO shows failures, but not what was sent."""
    script = ["503", "ok", "503", "503", "ok"]
    with (
        caplog.at_level(logging.INFO),
        SimulatedServer(script=script, unavailable_retry_after=0) as server,
    ):
        async with client_of(server) as client:
            await client.generate_response(PROMPT, system=PROMPT)
            await client.batch_generate([PROMPT], temperature=0.5)
            assert client.stats.retries == 3
    assert "attempt 1 failed (503)" in caplog.text
    assert KEY not in caplog.text
    assert PROMPT not in caplog.text


async def test_a_too_large_request_is_refused_once():
    """It would only be refused again."""
    body = {"error": {"message": TOO_LARGE, "type": "tokens", "param": None, "code": "rate_limit_exceeded"}}
    refusals = [(429, {"retry-after-ms": "1"}, body)] * 2
    config = OpenAIConfig(api_key=KEY, base_url="http://test/v1", default_model="m")
    async with OpenAIClient(config, http_client=speaking(*refusals)) as client:
        with pytest.raises((openai.RateLimitError, RequestTooLargeError)):
            await client.generate_response("hello")
        assert client.stats.attempts == 1


@pytest.mark.parametrize("wait", ["1e15", "1e300", "Fri, 31 Dec 9999 23:59:59 GMT"])
async def test_an_absurd_wait_is_a_rate_limit_error(wait):
    """A wait of any length raises the error that callers handle."""
    body = {"error": {"message": "Rate limit reached", "type": "requests", "code": "rate_limit_exceeded"}}
    config = OpenAIConfig(api_key=KEY, base_url="http://test/v1", default_model="m")
    async with OpenAIClient(config, http_client=speaking((429, {"retry-after": wait}, body))) as client:
        for _ in range(2):
            with pytest.raises(openai.RateLimitError):
                await client.generate_response("hello")
        assert client.stats.attempts == 1
