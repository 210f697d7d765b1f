"""What a failure means: one table for limiter, retry, worker pool, batches, command line and report."""

from __future__ import annotations

import enum
import functools
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import openai

from openai_eval_client._log import request_id
from openai_eval_client._wire.headers import refused_dimension
from openai_eval_client._wire.refusals import Words, refusal_wait, until_midnight, words_of
from openai_eval_client._wire.usage import read_json, read_usage
from openai_eval_client.errors import (
    BudgetExceededError,
    QuotaError,
    RequestTooLargeError,
    ResponseTooLargeError,
    TimeoutError,
    ValidationError,
    sdk_httpx,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from openai_eval_client._wire.usage import Usage

_BAD_REQUEST, _TOO_MANY, _SERVER_ERROR = 400, 429, 500
_BY_MINUTE = re.compile(r"per[ _-]?(?:min|sec)|(?<!free )allocated quota exceeded", re.IGNORECASE)


class Kind(enum.Enum):
    """What went wrong."""

    RATE_LIMITED = "rate_limited"
    OVERLOADED = "overloaded"  # the server has too much to do, whoever asks
    CAPACITY = "capacity"  # of a cheaper tier: refused, not charged
    CONCURRENCY = "concurrency"  # too many in flight
    OUT_OF_QUOTA = "out_of_quota"  # credit or spending: waiting does not help
    TOO_LARGE = "too_large"
    REFUSED_KEY = "refused_key"
    REFUSED_MODEL = "refused_model"
    REFUSED_INPUT = "refused_input"
    CONTENT_REFUSED = "content_refused"
    NOT_FOUND = "not_found"
    NOT_AN_API = "not_an_api"  # an HTML page
    SERVER_ERROR = "server_error"
    UNREADABLE = "unreadable"  # a 200 that holds no answer
    TIMED_OUT = "timed_out"
    DROPPED = "dropped"  # the connection failed after the request may have been sent
    UNREACHABLE = "unreachable"  # no connection came about: nothing was sent
    LOCAL = "local"  # an error of our own, before anything was sent


class Scope(enum.Enum):
    """What else would meet the same failure."""

    REQUEST = "request"
    MODEL = "model"
    ACCOUNT = "account"


class Row(NamedTuple):
    """One row of the table of failures."""

    # a status, or the first digit of one, or several; the class of an error without one
    of: int | tuple[int, ...] | type[BaseException]
    kind: Kind
    retry: bool
    scope: Scope
    meaning: str  # for the user, in a report
    code: str = ""  # a pattern of the code or type; "": it needs none
    text: str = ""  # a pattern of the message or details; "": it needs none
    billed: bool = False  # whether it may have been billed

    def is_of(self, status: int) -> bool:
        """Return whether it is a row of a status."""
        of = self.of if isinstance(self.of, tuple) else (self.of,)
        return status in of or status // 100 in of


_AGAIN, _NEVER = True, False  # whether the same request is worth another attempt
_REQUEST, _MODEL, _ACCOUNT = Scope.REQUEST, Scope.MODEL, Scope.ACCOUNT
_4XX, _5XX = 4, 5
_INPUT = (400, 403, 404, 422)  # statuses of a refusal that may be about the input
_QUOTING = frozenset({400, 404, 422})  # statuses whose messages may quote a prompt
_SEE = "see its message"
_OF_ALL = frozenset({"cache", "max_cost", "redis_url"})  # fields that are wrong for every request
_LONGEST_BODY = 16_384  # bytes of a body that is no JSON
_NO_CREDIT = "the account's credit or limit on spending is used up, or it is suspended: waiting does not help"
_NO_MODEL = "no such model, or not for this key"
_NOT_THIS = "the provider refuses the content"
_WRONG_KEY = "the key is wrong or was withdrawn"
_BUSY = "the server has too much to do"
# What servers send: the API's codes (https://platform.openai.com/docs/guides/error-codes), and the words of
# compatible servers. A row whose code fits decides, else one whose type does, else one whose text fits the
# message, else the first that needs no word. The message may quote a prompt, and the details may too.
FAILURES = (
    Row(_4XX, Kind.OUT_OF_QUOTA, _NEVER, _ACCOUNT, _NO_CREDIT,
        code=r"insufficient_(?:user_)?(?:quota|balance|funds|credits?)|(?:exceeded_current|user)_quota.*"
        r"|billing_(?:not_active|hard_limit_reached)|(?:credit_)?balance_(?:exhausted|too_low|insufficient)"
        r"|(?:organization|project|account|user|team)_(?:spend|spending|usage|budget)_limit_(?:exceeded|reached)"
        r"|account_(?:suspended|deactivated|overdue|blocked)|budget_exceeded|payment_required|arrearage"
        r"|access_terminated|(?:prepaid|postpaid)_?bill_?overdue"
        r"|allocationquota\..*"),
    Row(402, Kind.OUT_OF_QUOTA, _NEVER, _ACCOUNT, _NO_CREDIT),
    Row(_4XX, Kind.OUT_OF_QUOTA, _NEVER, _ACCOUNT, _NO_CREDIT,
        text=r"insufficient[ _](?:\w+ )?(?:balance|funds|credits?|quota)|(?:more|out of|no) credits\b"
        r"|(?:balance|credits?|funds)\b.{0,40}\b(?:too low|insufficient|not enough|exhausted|depleted)"
        r"|(?:exceeded|exhausted) (?:your |the )?(?:current |monthly )?(?:free )?(?:quota|allowance|spend)"
        r"|account (?:\S+ )?(?:is |was |has been )?(?:suspended|deactivated|in arrears|overdue)"
        r"|spend(?:ing)? limit|free (?:tier|quota)\b.{0,40}\b(?:exhausted|used up)|欠费|余额不足"
        r"|billing\b.{0,40}\b(?:not active|hard limit)|budget has been exceeded|please recharge|top up your"),
    Row(429, Kind.TOO_LARGE, _NEVER, _REQUEST, "more tokens than the limit can ever admit",
        text="request too large"),
    Row(429, Kind.CONCURRENCY, _AGAIN, _MODEL, "too many requests in flight",
        code=".*concurren.*", text=r"concurren|parallel request|simultaneous"),
    Row((429, 503), Kind.OVERLOADED, _AGAIN, _MODEL, _BUSY, code=".*overload.*|slow_down",
        text="overload|slow down|too busy|heavy load|high (?:load|demand)"),
    Row(529, Kind.OVERLOADED, _AGAIN, _MODEL, _BUSY),
    Row((429, 503), Kind.CAPACITY, _AGAIN, _MODEL, "no capacity for this tier or model now",
        code="resource_unavailable|.*capacity.*",
        text=r"resources? (?:is |are )?(?:temporarily )?unavailable|\bcapacity\b"),
    Row(429, Kind.RATE_LIMITED, _AGAIN, _MODEL, "rate limited"),
    Row((401, 403), Kind.REFUSED_KEY, _NEVER, _ACCOUNT, _WRONG_KEY, code="invalid_api_key",
        text=r"your (?:account|access|organi[sz]ation)\b.{0,40}\b(?:flagged|terminated|banned)"),
    Row(_INPUT, Kind.REFUSED_INPUT, _NEVER, _REQUEST, "the server refuses the request itself",
        code=r"(?:invalid|unsupported|missing|unknown)_(?:value|type|parameter|\w*image\w*)|image_(?!content).*"),
    Row(_INPUT, Kind.CONTENT_REFUSED, _NEVER, _REQUEST, _NOT_THIS,
        code=r"content_(?:policy_violation|filter|moderation.*)|invalid_prompt|responsibleaipolicyviolation"
        r"|(?:.*_)?moderation(?:_.*)?|data_?inspection_?failed|image_content_policy_violation",
        text=r"usage (?:guideline|polic)|content (?:management )?(?:polic|filter)|moderation|flagged"
        r"|safety (?:system|polic|filter|settings)|violat\w{1,6}.{0,60}(?:polic|guideline|terms)"
        r"|inappropriate content"),
    Row(_INPUT, Kind.TOO_LARGE, _NEVER, _REQUEST, "the prompt and max_tokens do not fit the model",
        code="context_length_exceeded", text=r"maximum context length|context window|prompt is too long"),
    Row(_INPUT, Kind.REFUSED_INPUT, _NEVER, _REQUEST, "the model does not take such input",
        text=r"no endpoints found that|(?:does(?: not|n't)|cannot) (?:support|accept|handle)\b.{0,40}"
        r"\b(?:image|audio|video|file|tool|input)"),
    Row(_INPUT, Kind.REFUSED_MODEL, _NEVER, _MODEL, _NO_MODEL, code="model_not_found",
        text=r"\bmodel\b.{0,80}\b(?:does not exist|not (?:exist|found|available|allowed)|no access)"
        r"|access to (?:the )?model|no endpoints found for|(?:unknown|invalid) model"),
    Row(401, Kind.REFUSED_KEY, _NEVER, _ACCOUNT, _WRONG_KEY),
    Row(403, Kind.REFUSED_KEY, _NEVER, _ACCOUNT, "this key may not do that"),
    Row(404, Kind.NOT_FOUND, _NEVER, _ACCOUNT, "no such model or address"),
    # What a gateway ends may have been worked on behind it, and is billed then.
    Row(408, Kind.SERVER_ERROR, _AGAIN, _REQUEST, "the server gave up waiting", billed=True),
    Row(409, Kind.SERVER_ERROR, _AGAIN, _REQUEST, "conflicts with another request", billed=True),
    Row((460, 499), Kind.SERVER_ERROR, _NEVER, _REQUEST, "a gateway closed the request", billed=True),
    Row(413, Kind.TOO_LARGE, _NEVER, _REQUEST, "the request is too large for the server"),
    Row(_4XX, Kind.REFUSED_INPUT, _NEVER, _REQUEST, "the server refuses the request itself"),
    Row(_5XX, Kind.SERVER_ERROR, _AGAIN, _REQUEST, "the server failed", billed=True),
    Row(openai.APIResponseValidationError, Kind.NOT_AN_API, _NEVER, _ACCOUNT,
        "a page came in place of an answer: this is no API", text="^an HTML page"),
    Row(openai.APIResponseValidationError, Kind.UNREADABLE, _NEVER, _REQUEST,
        "a stream of events came in place of an answer", text="^a stream of events", billed=True),
    Row(openai.APIResponseValidationError, Kind.UNREADABLE, _NEVER, _REQUEST,
        "an unfinished response came, and cannot be asked for", billed=True,
        text="^the answer is a response of status '(?:queued|in_progress)'"),
    Row(openai.APIResponseValidationError, Kind.UNREADABLE, _AGAIN, _REQUEST, "what came was no answer",
        billed=True),
    Row(TimeoutError, Kind.TIMED_OUT, _NEVER, _REQUEST, "no answer within background_timeout", billed=True,
        text=r"^response \S+ was not done"),
    Row(TimeoutError, Kind.TIMED_OUT, _AGAIN, _REQUEST, "no answer within timeout", billed=True),
    Row(ResponseTooLargeError, Kind.UNREADABLE, _NEVER, _REQUEST,
        "the answer is larger than max_response_bytes", billed=True),
    Row(openai.APIConnectionError, Kind.DROPPED, _AGAIN, _REQUEST,
        "the connection failed, or the answer was cut short", billed=True),
    Row(openai.APIError, Kind.DROPPED, _NEVER, _REQUEST, _SEE, billed=True),
    Row(BudgetExceededError, Kind.LOCAL, _NEVER, _ACCOUNT, "max_cost left too little; not sent"),
    Row(RequestTooLargeError, Kind.TOO_LARGE, _NEVER, _REQUEST,
        "more tokens than the limit can ever admit; not sent"),
    Row(ValidationError, Kind.LOCAL, _NEVER, _REQUEST, "the input is wrong; not sent"),
    Row(openai.OpenAIError, Kind.LOCAL, _NEVER, _REQUEST, _SEE),
    Row(RuntimeError, Kind.LOCAL, _NEVER, _REQUEST, _SEE),
    Row(BaseException, Kind.DROPPED, _NEVER, _REQUEST, _SEE, billed=True),
)  # fmt: skip
_UNKNOWN = Row(0, Kind.SERVER_ERROR, _NEVER, _REQUEST, _SEE)
_UNREACHABLE = "no connection to the server"
_PATIENT = frozenset({Kind.OVERLOADED, Kind.CAPACITY, Kind.CONCURRENCY})
_PASSING = _PATIENT | {Kind.RATE_LIMITED}


class Failure(NamedTuple):
    """What a failed attempt means."""

    kind: Kind
    retry: bool = False  # whether the same request is worth another attempt
    scope: Scope = Scope.REQUEST
    wait: float | None = None  # seconds that the server asks to wait
    dimension: str | None = None  # the limit that it names: "requests" or "tokens"
    status: int | None = None
    code: str = ""  # the API's word for it; "" where it has none
    meaning: str = _SEE  # for the user, in a report
    billed: bool = False  # whether it may have been billed
    certain: bool = True  # False: its kind was read from a text, which may quote a prompt

    @property
    def is_patient(self) -> bool:
        """Whether it says nothing against the request: it is sent again for as long as `max_wait` lasts."""
        return self.kind in _PATIENT or (self.kind is Kind.RATE_LIMITED and self.wait is not None)

    def is_too_long(self, max_wait: float) -> bool:
        """Return whether the server asks for a longer wait than that, in seconds."""
        return (self.wait or 0.0) > max_wait

    def ends_run(self, max_wait: float) -> bool:
        """Return whether every other request would meet it for certain."""
        if self.kind in _PASSING:
            return self.is_too_long(max_wait)
        return self.certain and self.is_shared and self.kind in {Kind.OUT_OF_QUOTA, Kind.LOCAL}

    @property
    def is_shared(self) -> bool:
        """Whether every other request may meet it: what becomes of them shows whether they do."""
        return self.scope is not Scope.REQUEST and self.kind not in _PASSING


class Outcome(NamedTuple):
    """What came of one attempt."""

    status: int | None = None  # the HTTP status; None where no answer came
    headers: Mapping[str, str] | None = None
    usage: Usage | None = None  # None where the server did not say, and it was not estimated
    failure: Failure | None = None

    @property
    def ok(self) -> bool:
        """Whether it was answered."""
        return self.status is not None and self.status < _BAD_REQUEST

    @property
    def sent(self) -> bool:
        """Whether anything was sent, as far as is known."""
        return self.failure is None or self.failure.kind not in {Kind.UNREACHABLE, Kind.LOCAL}

    @property
    def may_be_billed(self) -> bool:
        """Whether the provider may have billed it, as far as its usage does not say."""
        return self.failure is None or self.failure.billed

    @property
    def counted(self) -> Usage | None:
        """What it used by the server's own count."""
        return None if self.usage is None or self.usage.estimated else self.usage

    @property
    def tokens(self) -> float | None:
        """The tokens it came to; None: unknown, the estimate stays."""
        # A request that was refused was not worked on, so its tokens were not spent, unless it says so.
        # Without an answer, or where a server or gateway failed, the server may have counted them.
        used = self.counted
        if used is None:
            return 0.0 if self.is_refusal else None
        return float(used.prompt_tokens + used.completion_tokens)

    @property
    def is_refusal(self) -> bool:
        """Whether the request was refused (4xx) without being worked on."""
        is_4xx = self.status is not None and _BAD_REQUEST <= self.status < _SERVER_ERROR
        return is_4xx and not (self.failure is not None and self.failure.billed)

    @property
    def is_rate_limit(self) -> bool:
        """Whether it was refused because a limit was reached, which time cures."""
        return self.failure is not None and self.failure.kind is Kind.RATE_LIMITED

    @property
    def is_overload(self) -> bool:
        """Whether it was refused because the server has too much to do."""
        return self.failure is not None and self.failure.kind is Kind.OVERLOADED


NOT_SENT = Outcome(failure=Failure(Kind.LOCAL))


def read_failure(error: BaseException) -> Failure:
    """Return what an exception means."""
    if isinstance(error, openai.APIStatusError):
        words = words_in(error)
        if not words.message:
            words = words._replace(message=error.message)
        failure = read_refusal(status_of(error) or 0, error.response.headers, words)
        if isinstance(error, QuotaError) and failure.kind is not Kind.OUT_OF_QUOTA:
            failure = read_refusal(_TOO_MANY, error.response.headers, Words("insufficient_quota"))
        return failure._replace(code=code_of(error))
    if _was_never_sent(error):
        return Failure(Kind.UNREACHABLE, retry=True, scope=Scope.ACCOUNT, meaning=_UNREACHABLE)
    row = next(row for row in FAILURES if _is_row_of(row, error))
    # A closed client, a wrong budget, a damaged cache, shared limits out of reach meet every request.
    meets_all = type(error) is RuntimeError or getattr(error, "field", None) in _OF_ALL
    scope = Scope.ACCOUNT if meets_all else row.scope
    return Failure(row.kind, row.retry, scope, meaning=row.meaning, billed=row.billed)


def _is_row_of(row: Row, error: BaseException) -> bool:
    is_class = isinstance(row.of, type) and isinstance(error, row.of)
    return is_class and (not row.text or re.search(row.text, str(error)) is not None)


def words_in(error: openai.APIStatusError) -> Words:
    """Return what the server says: the SDK's `body` leaves out what stands beside a field named error."""
    try:
        content = error.response.content
    except sdk_httpx().StreamError:  # it was not read
        content = b""
    return _words(content) if content else words_of(error.body)


def _words(content: bytes) -> Words:
    try:
        return words_of(read_json(content))
    except (ValueError, RecursionError):
        return words_of(content[:_LONGEST_BODY].decode(errors="replace"))


def outcome_of(error: BaseException) -> Outcome:
    """Return what came of an attempt that ended in an exception."""
    failure = read_failure(error)
    if isinstance(error, openai.APIStatusError):
        return Outcome(error.status_code, error.response.headers, _billed(error), failure)
    if isinstance(error, openai.APIResponseValidationError):
        return Outcome(usage=_billed(error), failure=failure)
    if failure.kind is Kind.LOCAL:  # raised while the request was in flight: it does not show what came of it
        failure = Failure(Kind.DROPPED, retry=True, billed=True)
    return Outcome(failure=failure)


def _billed(error: openai.APIStatusError | openai.APIResponseValidationError) -> Usage | None:
    """Return what an answer used that holds an error."""
    try:
        return read_usage(error.response.content)
    except sdk_httpx().StreamError:  # it was not read
        return None


def refused(status: int, headers: Mapping[str, str], body: bytes = b"") -> Outcome:
    """Return what came of an attempt that was answered with an error status; the body may be any bytes."""
    return Outcome(status, headers, read_usage(body), read_refusal(status, headers, _words(body)))


def read_refusal(status: int, headers: Mapping[str, str], words: Words) -> Failure:
    """Return what a refusal means."""
    row, wait = row_of(status, words), refusal_wait(headers, words)
    if wait is None and words.is_daily and (row.kind is Kind.RATE_LIMITED or (row.text and _is_credit(row))):
        wait = until_midnight()
    if status == _TOO_MANY and _is_credit(row) and _comes_back(row, words, wait):
        row = row_of(status, Words())
    wish = headers.get("x-should-retry")  # of the server, which the SDK obeys as well
    retry = wish == "true" if wish in {"true", "false"} and row.kind is not Kind.OUT_OF_QUOTA else row.retry
    return Failure(
        row.kind,
        retry=retry,
        scope=row.scope,
        wait=wait,
        dimension=refused_dimension(words.text) if row.kind is Kind.RATE_LIMITED else None,
        status=status,
        code=_as_code(words.code),
        meaning=row.meaning,
        billed=row.billed,
        certain=not row.text or status not in _QUOTING,
    )


def _is_credit(row: Row) -> bool:
    return row.kind is Kind.OUT_OF_QUOTA


def _comes_back(row: Row, words: Words, wait: float | None) -> bool:
    """Return whether what looks like used-up credit is a rate limit, with advice on how to raise it."""
    said = bool(row.text) and (wait is not None or words.code.lower().startswith("rate_limit"))
    return said or _BY_MINUTE.search(words.text if row.text else words.message) is not None


@functools.lru_cache(maxsize=64)  # limiter, retry, statistics and run ask about the same error in turn
def row_of(status: int, words: Words) -> Row:
    """Return the row of the table that a refusal fits."""
    rows = [row for row in FAILURES if not isinstance(row.of, type) and row.is_of(status)]
    for word in filter(None, (words.code, words.type)):
        for row in rows:
            if row.code and re.fullmatch(row.code, word, re.IGNORECASE):
                return row
    for row in rows:
        if row.text and re.search(row.text, words.text, re.IGNORECASE):
            return row
    return next((row for row in rows if not row.code and not row.text), _UNKNOWN)


_NO_CONNECTION = frozenset(
    {"ConnectError", "ClientConnectorError", "ClientConnectorDNSError", "ClientConnectorCertificateError"}
)


def _was_never_sent(error: BaseException | None) -> bool:
    """Return whether no connection came about: a refused connection, no such host, no TLS."""
    # httpx raises ConnectError for it, aiohttp ClientConnectorError under what the SDK makes of it.
    seen: set[int] = set()  # causes may form a circle
    while error is not None and id(error) not in seen:
        if type(error).__name__ in _NO_CONNECTION:
            return True
        seen.add(id(error))
        error = error.__cause__
    return False


# --- the fields of errors ----------------------------------------------------------------------------------

_CODE = re.compile(r"(?=.{1,48}$)[a-z]+(?:_[a-z]+)*")  # a word of the API, and not a key or a sentence


def _as_code(word: object) -> str:
    return word if isinstance(word, str) and _CODE.fullmatch(word) else ""


def code_of(error: object) -> str:
    """Return the API's word for an error; "" for anything that is no such word, as a key would be."""
    return _as_code(getattr(error, "code", None))


def status_of(error: object) -> int | None:
    """Return the HTTP status of an error; None where no answer came."""
    status = getattr(error, "status_code", None)
    return status if isinstance(status, int) else None


def of_error(error: BaseException) -> dict[str, Any]:
    """Return the fields of an error for the log: its class, and of the API's its status, code, request id."""
    headers = error.response.headers if isinstance(error, openai.APIStatusError) else None
    return {
        "error_type": type(error).__name__,
        "status": status_of(error),
        "code": code_of(error) or None,
        "request_id": request_id(headers),
    }


_OF_THE_BODY = {"content-encoding", "content-length", "transfer-encoding"}  # which is decoded by now
_CLASSES: dict[int, type[openai.APIStatusError]] = {
    400: openai.BadRequestError,
    401: openai.AuthenticationError,
    403: openai.PermissionDeniedError,
    404: openai.NotFoundError,
    409: openai.ConflictError,
    422: openai.UnprocessableEntityError,
    429: openai.RateLimitError,
}


def headers_of(response: Any) -> list[tuple[str, str]]:
    """Return the headers of a response that hold for another body as well."""
    return [(name, text) for name, text in response.headers.multi_items() if name not in _OF_THE_BODY]


def class_of(status: int) -> type[openai.APIStatusError]:
    """Return the class of the error that the SDK makes of a status."""
    other = openai.InternalServerError if status >= _SERVER_ERROR else openai.APIStatusError
    return _CLASSES.get(status, other)
