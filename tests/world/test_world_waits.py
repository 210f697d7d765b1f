"""What a server asks to wait, in all its forms; whose limit it is; what counts as a retry."""

from __future__ import annotations

import time
from email.utils import formatdate

import pytest
from wire_rows import (
    FOREVER,
    LIMITED,
    SERVER,
    Row,
    check_alone,
    check_batch,
    check_drop_in,
    check_limiter,
    check_one,
    check_run,
    connect,
    over,
)
from wire_server import GOOD, GOOD_RESPONSE, Reply, refusal, serving

pytestmark = pytest.mark.usefixtures("no_pauses", "few_certificates", "far_east")
MESSAGE = "Rate limit reached for gpt-4o-mini on requests per min (RPM): Limit 3, Used 3, Requested 1."
SOON = "retry-after-ms: 5"
AFTER = "Sun, 06 Nov 1994 08:49:44 GMT"


@pytest.fixture
def far_east(monkeypatch):
    """A machine whose local time is nine hours before UTC's."""
    monkeypatch.setenv("TZ", "XST-9")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def limited(message=MESSAGE, *headers, **more):
    return refusal(message, "rate_limit_exceeded", "requests", headers=headers, **more)


def too_long(name, reply, wait, error=LIMITED, **more):
    """A row of a wait longer than max_wait, which shows as the model's pause."""
    return Row(name, (reply,), error, ends=True, pause=wait, cut=None, max_wait=0.5, **more)


def dated(after, date, offset=0.0):
    """A rate limit until a date, by a clock that is off by so many seconds."""

    def now(seconds):
        return formatdate(time.time() + offset + seconds, usegmt=True)

    return limited(MESSAGE, lambda: f"date: {now(0)}" if date else "x-no-date: 1",
                   lambda: f"retry-after: {now(after)}")  # fmt: skip


def on(date, retry_after):
    return limited(MESSAGE, f"date: {date}", f"retry-after: {retry_after}")


SUNDAY = "Sun, 06 Nov 1994 08:49:37 GMT"
HEADERS = [
    too_long("retry-after in seconds", limited(MESSAGE, "retry-after: 7"), 7),
    too_long("retry-after in parts of seconds", limited(MESSAGE, "retry-after: 7.5"), 7.5),
    too_long("retry-after-ms", limited(MESSAGE, "retry-after-ms: 7250"), 7.25),
    too_long("retry-after-ms before retry-after", limited(MESSAGE, "retry-after: 90", "retry-after-ms: 7000"),
        7),
    too_long("headers before the message", limited("Please try again in 90s.", "retry-after: 7"), 7),
    too_long("a date, both clocks right", dated(7, date=True), 7),
    too_long("a date, no Date of its own", dated(7, date=False), 7),
    too_long("a date, 20 minutes ahead", dated(7, date=True, offset=1200), 7),
    too_long("a date, 20 minutes behind", dated(7, date=True, offset=-1200), 7),
    too_long("a date, 3 minutes ahead", dated(7, date=True, offset=180), 7),
    too_long("a date, 3 minutes behind", dated(7, date=True, offset=-180), 7),
    too_long("a date of years ago by its own Date", on(SUNDAY, AFTER), 7),
    too_long("asctime", on(SUNDAY, "Sun Nov  6 08:49:44 1994"), 7),
    too_long("asctime in both", on("Sun Nov  6 08:49:37 1994", "Sun Nov  6 08:49:44 1994"), 7),
    too_long("zone -0000", on(SUNDAY, "Sun, 06 Nov 1994 08:49:44 -0000"), 7),
    too_long("zone +0000", on(SUNDAY, "Sun, 06 Nov 1994 08:49:44 +0000"), 7),
    too_long("zone +0200", on(SUNDAY, "Sun, 06 Nov 1994 10:49:44 +0200"), 7),
    too_long("RFC 850", on(SUNDAY, "Sunday, 06-Nov-94 08:49:44 GMT"), 7),
    too_long("a Date that is none", on("yesterday", formatdate(time.time() + 4000, usegmt=True)), None),
]  # fmt: skip
MESSAGES = [
    too_long("try again in 20s", limited("Please try again in 20s."), 20),
    too_long("try again in 6m0s", limited("Please try again in 6m0s."), 360),
    too_long("try again in 1m26.4s", limited("Please try again in 1m26.4s. Visit the docs."), 86.4),
    too_long("try again in 1h2m3s", limited("Please try again in 1h2m3s."), 3723),
    too_long("try again in 950ms", limited("Please try again in 950ms."), 0.95),
    too_long("try again in 1 minute", limited("Please try again in 1 minute."), 60),
    too_long("try again in 2 minutes", limited("Please try again in 2 minutes."), 120),
    too_long("try again in 1h 2m", limited("Please try again in 1h 2m."), 3720),
    too_long("try again in 1 hour", limited("Please try again in 1 hour."), 3600),
    too_long("try again in 3 seconds", limited("Please try again in 3 seconds."), 3),
    too_long("try again after 3 seconds", limited("max RPM: 3, please try again after 3 seconds"), 3),
    too_long("Azure: retry after 6 seconds", refusal(
        "Requests have exceeded token rate limit of your current OpenAI S0 pricing tier. Please retry after "
        "6 seconds.", "429"), 6),
    too_long("retry in 11.6s", limited("Quota exceeded for metric: requests.\nPlease retry in 11.6s."), 11.6),
    too_long("retry in 11.600553788s", limited("Please retry in 11.600553788s."), 11.600553788),
    too_long("wait 42 seconds", limited("Rate limit of 10 per 60s exceeded. Please wait 42 seconds."), 42),
    too_long("a text as error", Reply({"error": "Please try again in 20s"}, 429), 20),
    too_long("FastAPI's form", Reply({"detail": "Rate limited. Try again in 20 seconds."}, 429), 20),
    too_long("plain text", Reply(b"Too many requests: retry after 20 seconds", 429, kind="text/plain"), 20),
    too_long("no message at all but a header", Reply(b"", 429, ("retry-after: 20",), kind=None), 20),
]  # fmt: skip


def google(message, delay=None, quota="GenerateRequestsPerMinutePerProjectPerModel", status=429):
    """A refusal in Google's form, in a list."""
    details = [{"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": [{"quotaId": quota}]}]
    if delay is not None:
        details.append({"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay})
    name = "RESOURCE_EXHAUSTED" if status == 429 else "UNAVAILABLE"
    error = {"code": status, "message": message, "status": name, "details": details}
    return Reply([{"error": error}], status)


QUOTA_TEXT = "You exceeded your current quota, please check your plan and billing details."
GOOGLE = [
    too_long("Google, retryDelay", google(QUOTA_TEXT, "11s"), 11),
    too_long("Google, retryDelay with a fraction", google(QUOTA_TEXT, "11.25s"), 11.25),
    too_long("Google, both", google(f"{QUOTA_TEXT}\nPlease retry in 11.25s.", "11s"), 11.25),
    too_long("Google, its message alone", google(f"{QUOTA_TEXT}\nPlease retry in 11.25s."), 11.25),
    too_long("Google, of a day with a wait", google(QUOTA_TEXT, "11s", "GenerateRequestsPerDay"), 11),
    too_long("Google, no list", Reply(google(QUOTA_TEXT, "11s").body[0], 429), 11),
    Row("Google, then answered", (*[google(QUOTA_TEXT, "0.005s")] * 5, GOOD), calls=6, pause=0.005, cut=True),
    Row("Google, a rate without a wait", (google("Resource has been exhausted (e.g. check quota)."),),
        LIMITED, FOREVER, cut=True),
]  # fmt: skip


def patient(name, reply, *, cut=True, pause: float | None = 0.005, good=GOOD, **more):
    """A row of refusals that are no retries: five of them, and then the answer."""
    return Row(name, (*[reply] * 5, good), calls=6, cut=cut, pause=pause, **more)


def overloaded(message="Slow Down", code=None, kind=None, *headers, status=503):
    return refusal(message, code, kind, status=status, headers=headers)


FLEX = "Resource Unavailable"
PARALLEL = "Max parallel request limit reached. Limit: 3, current: 4"
PATIENT = [
    patient("a rate limit with a wait", limited(MESSAGE, SOON)),
    patient("a rate limit with a wait in its message", limited("Please try again in 5ms.")),
    patient("a rate limit with a wait, for the other API", limited(MESSAGE, SOON), good=GOOD_RESPONSE,
        api="responses"),
    patient("503 Slow Down", overloaded("Slow Down", "slow_down", "server_error", SOON)),
    patient("503 slow_down by its code", overloaded("m", "slow_down", None, SOON)),
    patient("503 Slow Down by its message", overloaded("Please slow down your requests.", None, None, SOON)),
    patient("503 overloaded", overloaded("The engine is currently overloaded", None, "server_error", SOON)),
    patient("503 overloaded, in Google's words", google("Model overloaded. Try again in 5ms.",
        status=503)),
    patient("529", overloaded("Overloaded", None, "overloaded_error", SOON, status=529)),
    patient("529 without a body", Reply(b"", 529, (SOON,))),
    patient("429 overloaded", overloaded("The engine is currently overloaded, please try again later", None,
        "engine_overloaded_error", SOON, status=429)),
    patient("429 overloaded by its message", overloaded("That model is currently overloaded with requests.",
        None, None, SOON, status=429)),
    patient("503 server_is_overloaded", overloaded("m", "server_is_overloaded", "service_unavailable_error",
        SOON)),
    patient("429 Resource Unavailable", refusal(FLEX, "resource_unavailable", "resource_unavailable"),
        cut=False, pause=None),
    patient("429 Resource Unavailable by its message", refusal(FLEX), cut=False, pause=None),
    patient("429 Resource Unavailable, for the other API", refusal(FLEX, "resource_unavailable"), cut=False,
        pause=None, good=GOOD_RESPONSE, api="responses"),
    patient("429 Resource Unavailable with a wait", refusal(FLEX, "resource_unavailable", headers=(SOON,)),
        cut=False, pause=None),
    patient("429 No capacity, in Google's words", google("No capacity available for model on the server"),
        cut=False, pause=None),
    patient("429 too many concurrent requests", refusal("Too many concurrent requests"), cut=False,
        pause=None),
    patient("429 max parallel requests", refusal(PARALLEL, "429", "None"), cut=False, pause=None),
    patient("429 of concurrency, Moonshot", refusal(
        "Your account reached max organization concurrency: 3, please try again after 0.005 seconds",
        kind="rate_limit_reached_error"), cut=False, pause=None),
    patient("429 of concurrency, Zhipu", Reply({"error": {"code": "1302", "message":
        "High concurrency usage of this API, please reduce concurrency"}}, 429), cut=False, pause=None),
    patient("429 of concurrency with a wait", refusal("concurrent request limit", headers=(SOON,)),
        cut=False, pause=None),
]  # fmt: skip
BUSY = "Service Unavailable"
OTHERS = [
    Row("a rate limit without a wait", (limited(),), LIMITED, FOREVER, cut=True, words=("Limit 3",)),
    Row("a rate limit without a wait, then answered", (limited(), limited(), GOOD), calls=3, cut=True),
    Row("Retry-After: soon", (limited(MESSAGE, "retry-after: soon"),), LIMITED, FOREVER, cut=True),
    Row("Retry-After: -1", (limited(MESSAGE, "retry-after: -1"),), LIMITED, FOREVER, cut=True),
    Row("Retry-After: nan", (limited(MESSAGE, "retry-after: nan"),), LIMITED, FOREVER, cut=True),
    Row("Retry-After: 0", (limited(MESSAGE, "retry-after: 0"), GOOD), calls=2, cut=True),
    Row("a date that is past", (on(SUNDAY, "Sun, 06 Nov 1994 08:49:30 GMT"), GOOD), calls=2, cut=True),
    Row("503 Slow Down without a wait", (overloaded(), GOOD), calls=2, pause=1.0, cut=True, roads="limiter"),
    Row("529 without a wait", (overloaded("Overloaded", status=529), GOOD), calls=2, pause=1.0, cut=True,
        roads="limiter drop-in"),
    Row("429 overloaded without a wait", (overloaded("The engine is overloaded", status=429), GOOD), calls=2,
        pause=1.0, cut=True, roads="limiter drop-in"),
    Row("503", (refusal(BUSY, status=503),), SERVER, FOREVER, words=(BUSY,)),
    Row("503, then answered", (refusal(BUSY, status=503), GOOD), calls=2),
    Row("503 with a wait, which is the request's alone", (
        refusal(BUSY, status=503, headers=("retry-after-ms: 20",)), GOOD), calls=2),
    Row("500", (refusal("The server had an error", "server_error", "server_error", status=500),), SERVER,
        FOREVER),
    Row("500 as a page", (Reply(b"<html>500</html>", 500, kind="text/html"),), SERVER, FOREVER),
    Row("502 as a page", (Reply(b"<html>502 Bad Gateway</html>", 502, kind="text/html"),), SERVER, FOREVER),
    Row("504", (refusal("upstream timed out", status=504),), SERVER, FOREVER),
    Row("520", (Reply(b"error code: 520", 520, kind="text/plain"),), SERVER, FOREVER, words=("520",)),
    Row("408", (refusal("Request timeout", status=408), GOOD), calls=2),
    Row("409", (refusal("Conflict", status=409), GOOD), calls=2),
    Row("500 that is not to be retried", (refusal("m", status=500, headers=("x-should-retry: false",)),),
        SERVER),
    Row("400 that is to be retried", (refusal("m", status=400, headers=("x-should-retry: true",)), GOOD),
        calls=2),
    too_long("503 with a wait beyond max_wait", refusal(BUSY, status=503, headers=("retry-after: 7",)), 0,
        SERVER, roads="one batch drop-in"),
    too_long("503 Slow Down with a wait beyond max_wait", overloaded("Slow Down", None, None,
        "retry-after: 7"), 7, (LIMITED, SERVER)),
    too_long("429 Resource Unavailable beyond max_wait", refusal(FLEX, headers=("retry-after: 7",)), None,
        roads="one batch"),
]  # fmt: skip
ROWS = [*HEADERS, *MESSAGES, *GOOGLE, *PATIENT, *OTHERS]


@over(ROWS, "limiter")
async def test_how_long_the_model_is_paused(row):
    """And whether its rate is lowered."""
    await check_limiter(row)


@over(ROWS, "drop-in", first=1, every=2)
async def test_the_drop_in_client_pauses_as_long(row):
    """The same limits hold for the SDK's own calls."""
    await check_drop_in(row)


@over([*HEADERS[::5], *MESSAGES[::5], *GOOGLE, *PATIENT, *OTHERS], "one")
async def test_one_prompt(row, tmp_path):
    """The calls, the error or the answer, the bill, and whether a second client finds it in the cache."""
    await check_one(row, tmp_path / "cache.sqlite")


@over([*HEADERS[:3], *GOOGLE, *PATIENT, *OTHERS], "run", every=2)
async def test_a_run_goes_on_or_ends(row):
    """A wait beyond max_wait ends it, in its middle too; no shorter one costs a row."""
    await check_run(row)


@over([*HEADERS[:2], *GOOGLE[:-2]], "run", every=2)
async def test_a_run_of_nothing_else(row):
    """It ends at the first prompt."""
    await check_alone(row)


@over([*HEADERS[:2], *MESSAGES[:2], *GOOGLE, *PATIENT, *OTHERS], "batch", every=3)
async def test_the_same_in_a_batch(row):
    """A line that fails so fails for this time, in the server's words."""
    await check_batch(row)


def rowed(*replies):
    return {"<mixed>": replies}


@pytest.mark.parametrize(
    ("replies", "calls", "answered"),
    [
        ((limited(MESSAGE, SOON), refusal(BUSY, status=500), limited(MESSAGE, SOON), GOOD), 4, True),
        ((*[limited(MESSAGE, SOON), refusal(BUSY, status=500)] * 2, limited(MESSAGE, SOON), GOOD), 6, True),
        ((*[limited(MESSAGE, SOON), refusal(BUSY, status=500)] * 3, GOOD), 6, False),
        ((*[overloaded("Slow Down", None, None, SOON), limited()] * 2, GOOD), 5, True),
        ((*[refusal(FLEX), limited()] * 3, GOOD), 6, False),
    ],
    ids=["1 retry", "2 retries", "3 retries", "2 rate limits", "3 rate limits"],
)
async def test_only_failures_count_as_retries(replies, calls, answered):
    """What the server asks to wait for is waited for, between retries as well."""
    async with serving(rowed(*replies)) as server, connect(server) as client:
        (outcome,) = await client.batch_generate(["<mixed>"], return_exceptions=True)
        assert server.calls == client.stats.attempts == calls
        assert (getattr(outcome, "content", None) == "yes") is answered, repr(outcome)


@pytest.mark.parametrize(
    "reply",
    [limited(MESSAGE, SOON), overloaded("Slow Down", None, None, SOON), refusal(FLEX)],
    ids=["rate limit", "overloaded", "capacity"],
)
async def test_patience_ends(reply):
    """A server that asks for a wait each time is left alone once they come to max_wait."""
    async with serving(rowed(reply)) as server, connect(server, max_wait=6) as client:
        (outcome,) = await client.batch_generate(["<mixed>"], return_exceptions=True)
        assert isinstance(outcome, Exception)
        assert FOREVER < server.calls <= 1200


async def test_no_retries_means_one_attempt():
    """`max_retries=0` is asked once, however patient the server would like us."""
    for reply in (limited(MESSAGE, SOON), overloaded("Slow Down", None, None, SOON), refusal(FLEX)):
        async with serving(rowed(reply)) as server, connect(server, max_retries=0) as client:
            (outcome,) = await client.batch_generate(["<mixed>"], return_exceptions=True)
            assert isinstance(outcome, Exception)
            assert server.calls == 1


async def test_a_pause_holds_for_all_requests_of_the_model():
    """While one waits for an overloaded server, no other is sent."""
    slow = overloaded("Slow Down", None, None, "retry-after: 60")
    async with serving(rowed(slow)) as server, connect(server, max_retries=0, max_wait=99) as client:
        (outcome,) = await client.batch_generate(["<mixed>"], return_exceptions=True)
        assert isinstance(outcome, Exception)
        limiter = client._account.limiter
        (queue,) = (queue for queue in limiter._queues.values() if queue.model == "gpt-4o-mini")
        assert queue.pause_left() > 55
