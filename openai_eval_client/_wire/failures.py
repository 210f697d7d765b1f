"""What a failure means: one table for limiter, retry, worker pool, batches, command line and report."""

from __future__ import annotations

import enum
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import openai

from openai_eval_client._log import request_id
from openai_eval_client._wire.answers import is_answer
from openai_eval_client._wire.headers import refused_dimension, stated_wait
from openai_eval_client._wire.requests import PATHS
from openai_eval_client._wire.usage import read_json, read_object, read_usage
from openai_eval_client.errors import (
    BudgetExceededError,
    QuotaError,
    RequestTooLargeError,
    TimeoutError,
    ValidationError,
    sdk_httpx,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from openai_eval_client._wire.usage import Usage

_BAD_REQUEST, _SERVER_ERROR = 400, 500


class Kind(enum.Enum):
    """What went wrong."""

    RATE_LIMITED = "rate_limited"
    OUT_OF_QUOTA = "out_of_quota"
    TOO_LARGE = "too_large"
    REFUSED_KEY = "refused_key"
    REFUSED_MODEL = "refused_model"
    REFUSED_INPUT = "refused_input"
    CONTENT_REFUSED = "content_refused"
    NOT_FOUND = "not_found"
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
    """One row of the table of failures: the first that fits decides."""

    of: int | type[BaseException]  # a status, or the first digit of one; the class of an error without one
    word: str | None  # the error's code or type, or a text in its message; None: any
    kind: Kind
    retry: bool
    scope: Scope
    meaning: str  # for the user, in a report
    billed: bool = False  # whether it may have been billed


_AGAIN, _NEVER = True, False  # whether the same request is worth another attempt
_REQUEST, _MODEL, _ACCOUNT = Scope.REQUEST, Scope.MODEL, Scope.ACCOUNT
_4XX, _5XX = 4, 5
_SEE = "see the exception"
# The API's codes: https://platform.openai.com/docs/guides/error-codes
FAILURES = (
    Row(429, "insufficient_quota", Kind.OUT_OF_QUOTA, _NEVER, _ACCOUNT,
        "the account's credit is used up: waiting does not help"),
    Row(429, "Request too large", Kind.TOO_LARGE, _NEVER, _REQUEST,
        "more tokens than the limit can ever admit"),
    Row(429, None, Kind.RATE_LIMITED, _AGAIN, _MODEL,
        "rate limited; sent again after the wait that the server asked for"),
    Row(401, None, Kind.REFUSED_KEY, _NEVER, _ACCOUNT, "the key is wrong or was withdrawn"),
    Row(403, "invalid_api_key", Kind.REFUSED_KEY, _NEVER, _ACCOUNT, "the key is wrong or was withdrawn"),
    Row(403, None, Kind.REFUSED_KEY, _NEVER, _ACCOUNT, "this key may not do that"),
    Row(404, "model_not_found", Kind.REFUSED_MODEL, _NEVER, _MODEL, "no such model, or not for this key"),
    Row(404, None, Kind.NOT_FOUND, _NEVER, _ACCOUNT, "no such model or address"),
    Row(408, None, Kind.SERVER_ERROR, _AGAIN, _REQUEST, "the server gave up waiting; sent again"),
    Row(409, None, Kind.SERVER_ERROR, _AGAIN, _REQUEST, "conflicts with another request; sent again"),
    Row(413, None, Kind.TOO_LARGE, _NEVER, _REQUEST, "the request is too large for the server"),
    Row(_4XX, "context_length_exceeded", Kind.TOO_LARGE, _NEVER, _REQUEST,
        "the prompt and max_tokens do not fit the model"),
    Row(_4XX, "content_policy_violation", Kind.CONTENT_REFUSED, _NEVER, _REQUEST,
        "the provider refuses the content"),
    Row(_4XX, None, Kind.REFUSED_INPUT, _NEVER, _REQUEST, "the server refuses the request itself"),
    Row(_5XX, None, Kind.SERVER_ERROR, _AGAIN, _REQUEST, "the server failed; sent again"),
    Row(openai.APIResponseValidationError, None, Kind.UNREADABLE, _AGAIN, _REQUEST,
        "what came was no answer; sent again", billed=True),
    Row(TimeoutError, None, Kind.TIMED_OUT, _AGAIN, _REQUEST,
        "no answer within timeout; sent again", billed=True),
    Row(openai.APIConnectionError, None, Kind.DROPPED, _AGAIN, _REQUEST,
        "the connection failed, or the answer was cut short; sent again", billed=True),
    Row(openai.APIError, None, Kind.DROPPED, _NEVER, _REQUEST, _SEE, billed=True),
    Row(BudgetExceededError, None, Kind.LOCAL, _NEVER, _ACCOUNT, "max_cost left too little; not sent"),
    Row(RequestTooLargeError, None, Kind.TOO_LARGE, _NEVER, _REQUEST,
        "more tokens than the limit can ever admit; not sent"),
    Row(ValidationError, None, Kind.LOCAL, _NEVER, _REQUEST, "the input is wrong; not sent"),
    Row(openai.OpenAIError, None, Kind.LOCAL, _NEVER, _REQUEST, _SEE),
    Row(RuntimeError, None, Kind.LOCAL, _NEVER, _REQUEST, _SEE),
    Row(BaseException, None, Kind.DROPPED, _NEVER, _REQUEST, _SEE, billed=True),
)  # fmt: skip
_UNKNOWN = Row(0, None, Kind.SERVER_ERROR, _NEVER, _REQUEST, _SEE)


class Failure(NamedTuple):
    """What a failed attempt means."""

    kind: Kind
    retry: bool = False  # whether the same request is worth another attempt
    scope: Scope = Scope.REQUEST
    wait: float | None = None  # seconds that the server asks to wait
    dimension: str | None = None  # the limit that it names: "requests" or "tokens"
    status: int | None = None
    code: str = ""  # the API's word for it; "" where it has none
    billed: bool = False  # whether it may have been billed

    def ends_run(self, max_wait: float, *, answered: bool) -> bool:
        """Return whether every other prompt would meet it; `answered`: whether any was answered so far."""
        if self.kind is Kind.UNREACHABLE:
            return not answered
        if self.kind is Kind.RATE_LIMITED:
            return (self.wait or 0.0) > max_wait
        return self.scope is not Scope.REQUEST


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
        # A request refused with a 4xx was not worked on, so its tokens were not spent. Without an answer, or
        # with a server error, the server may have counted them.
        if self.is_refusal:
            return 0.0
        used = self.counted
        return None if used is None else float(used.prompt_tokens + used.completion_tokens)

    @property
    def is_refusal(self) -> bool:
        """Whether the request was refused (4xx) without being worked on."""
        return self.status is not None and _BAD_REQUEST <= self.status < _SERVER_ERROR

    @property
    def is_rate_limit(self) -> bool:
        """Whether it was refused because a limit was reached, which time cures."""
        return self.failure is not None and self.failure.kind is Kind.RATE_LIMITED


NOT_SENT = Outcome(failure=Failure(Kind.LOCAL))


def read_failure(error: BaseException) -> Failure:
    """Return what an exception means."""
    if isinstance(error, openai.APIStatusError):
        words = [str(error.code), str(error.type)]  # servers send lists here too
        if isinstance(error, QuotaError):
            words.append("insufficient_quota")
        status = status_of(error) or 0
        return _refusal(status, error.response.headers, words, f"{error.code} {error.message}")
    if _was_never_sent(error):
        return Failure(Kind.UNREACHABLE, retry=True, scope=Scope.ACCOUNT)
    row = next(row for row in FAILURES if isinstance(row.of, type) and isinstance(error, row.of))
    # A closed client, a wrong budget and shared limits out of reach are met by every request.
    meets_all = type(error) is RuntimeError or getattr(error, "field", None) in {"max_cost", "redis_url"}
    return Failure(row.kind, row.retry, Scope.ACCOUNT if meets_all else row.scope, billed=row.billed)


def outcome_of(error: BaseException) -> Outcome:
    """Return what came of an attempt that ended in an exception."""
    failure = read_failure(error)
    if isinstance(error, openai.APIStatusError):
        return Outcome(error.status_code, error.response.headers, failure=failure)
    if isinstance(error, openai.APIResponseValidationError):
        return Outcome(usage=read_usage(error.response.content), failure=failure)
    if failure.kind is Kind.LOCAL:  # raised while the request was in flight: it does not show what came of it
        failure = Failure(Kind.DROPPED, retry=True, billed=True)
    return Outcome(failure=failure)


def refused(status: int, headers: Mapping[str, str], body: bytes = b"") -> Outcome:
    """Return what came of an attempt that was answered with an error status; the body may be any bytes."""
    error = read_object(body).get("error")
    words = [str(error.get("code")), str(error.get("type"))] if isinstance(error, dict) else []
    failure = _refusal(status, headers, words, body.decode(errors="replace"))
    return Outcome(status, headers, failure=failure)


def _refusal(status: int, headers: Mapping[str, str], words: list[str], message: str) -> Failure:
    row = _fitting(status, words, message)
    wish = headers.get("x-should-retry")  # of the server, which the SDK obeys as well
    retry = wish == "true" if wish in {"true", "false"} and row.kind is not Kind.OUT_OF_QUOTA else row.retry
    return Failure(
        row.kind,
        retry=retry,
        scope=row.scope,
        wait=stated_wait(headers, message),
        dimension=refused_dimension(message) if row.kind is Kind.RATE_LIMITED else None,
        status=status,
        code=_as_code(words[0]) if words else "",
    )


def _fitting(status: int, words: list[str], message: str = "") -> Row:
    for row in FAILURES:
        word_fits = row.word is None or row.word in words or row.word in message
        if word_fits and row.of in {status, status // 100}:
            return row
    return _UNKNOWN


def meaning_of(name: str, status: int | None, code: str) -> str:
    """Return what an error means, for a reader, from the name of its class, its status and its code."""
    if status is not None:
        return _fitting(status, [code]).meaning
    return next((row.meaning for row in FAILURES if getattr(row.of, "__name__", None) == name), _SEE)


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


_SHORTEST_KEY = 6  # characters; shorter ones are placeholders, and stand in ordinary words


def forget_key(error: openai.APIError, key: str) -> None:
    """Take the key out of an error: out of its request's headers, and out of a message that echoes it."""
    for name in ("authorization", "api-key"):
        error.request.headers.pop(name, None)
    if len(key) >= _SHORTEST_KEY and key in f"{error.message}{error.body}{error.args}":
        error.message = error.message.replace(key, "[key]")
        error.args = (error.message,)
        error.body = None
        response = getattr(error, "response", None)
        if response is not None:  # its headers say how long to wait, and whether to try again
            headers = [pair for pair in _headers_of(response) if key not in pair[1]]
            status, request = response.status_code, error.request
            error.__dict__["response"] = sdk_httpx().Response(status, headers=headers, request=request)


# --- errors made from an answer ----------------------------------------------------------------------------

_CLASSES: dict[int, tuple[type[openai.APIStatusError], tuple[str, ...]]] = {  # with the API's codes and types
    400: (openai.BadRequestError, ("invalid_request_error",)),
    401: (openai.AuthenticationError, ("authentication_error", "invalid_api_key")),
    403: (openai.PermissionDeniedError, ("permission_error",)),
    404: (openai.NotFoundError, ("model_not_found", "not_found_error")),
    409: (openai.ConflictError, ()),
    422: (openai.UnprocessableEntityError, ()),
    429: (openai.RateLimitError, ("insufficient_quota", "rate_limit_error", "rate_limit_exceeded")),
}
_STATUS_BY_WORD = {word: status for status, (_, words) in _CLASSES.items() for word in words}
_NUMBER = re.compile("[45][0-9][0-9]")
_OF_THE_BODY = {"content-encoding", "content-length", "transfer-encoding"}  # which is decoded by now


def class_of(status: int) -> type[openai.APIStatusError]:
    """Return the class of the error that the SDK makes of a status."""
    if status in _CLASSES:
        return _CLASSES[status][0]
    return openai.InternalServerError if status >= _SERVER_ERROR else openai.APIStatusError


def status_error(status: int, body: Any, answer: Any) -> openai.APIStatusError:
    """Return the error that the SDK raises for a status, or ours where the account's credit is used up."""
    details = body.get("error", body) if isinstance(body, dict) else body
    fields = details if isinstance(details, dict) else {}
    row = _fitting(status, [str(fields.get("code")), str(fields.get("type"))])
    kind = QuotaError if row.kind is Kind.OUT_OF_QUOTA else class_of(status)
    text = fields.get("message")
    message = text if isinstance(text, str) and text else f"status {status}"
    return kind(message, response=answer, body=details)


def read_body(reply: Any, api: str) -> dict[str, Any]:
    """Return the JSON body of a 200.

    Raises:
        openai.APIResponseValidationError: It is cut short, or no answer at all; worth another attempt.
        openai.APIStatusError: It is an error that names a status.
    """
    try:
        body = read_json(reply.content)
    except (ValueError, RecursionError):
        body = None
    if not is_answer(body, api) or (api == "chat" and body.get("error") and not body["choices"]):
        raise _not_an_answer(reply, body, PATHS[api])
    decoded: dict[str, Any] = body
    return decoded


def _not_an_answer(reply: Any, body: Any, path: str) -> openai.APIError:
    """Return the error for a 200 that holds no answer."""
    # Proxies answer 200 before they know what comes of a request, and put an error into the body; its code is
    # often the status of the server behind them. Where it names none, the error is one that is tried again.
    reported = isinstance(body, dict) and (body.get("error") or body.get("object") == "error")
    status = _stated_status(body) if reported else None
    if status is None:
        what = f"an error: {body.get('error') or body}" if reported else f"not what {path} returns"
        shown = "" if reported else f": {reply.content[:80]!r}"
        message = f"the answer is {what}{shown}"
        return openai.APIResponseValidationError(response=reply, body=body, message=message)
    headers, request = _headers_of(reply), reply.request
    answer = sdk_httpx().Response(status, headers=headers, content=reply.content, request=request)
    error = body.get("error")
    return status_error(status, {"message": error} if isinstance(error, str) else body, answer)


def _headers_of(response: Any) -> list[tuple[str, str]]:
    """Return the headers of a response that hold for another body as well."""
    return [(name, text) for name, text in response.headers.multi_items() if name not in _OF_THE_BODY]


def _stated_status(body: dict[str, Any]) -> int | None:
    """Return the HTTP status that an error object names, as a number or by the API's word for it."""
    error = body.get("error")
    fields = error if isinstance(error, dict) else body
    words = [str(fields.get(name)) for name in ("code", "status", "status_code", "type")]
    named = [int(word) if _NUMBER.fullmatch(word) else _STATUS_BY_WORD.get(word) for word in words]
    return next((status for status in named if status is not None), None)
