"""What a failure means: whether the same request, or any other, is worth another attempt."""

from __future__ import annotations

import re
from typing import Any

import openai

from openai_eval_client._log import request_id
from openai_eval_client._wire.headers import stated_wait
from openai_eval_client._wire.usage import FOR_GOOD
from openai_eval_client.errors import (
    BudgetExceededError,
    QuotaError,
    ValidationError,
    sdk_httpx,
)


def of_error(error: BaseException) -> dict[str, Any]:
    """Return the fields of an error: its class, and of the API's its status, code and request id."""
    return {
        "error_type": type(error).__name__,
        "status": status_of(error),
        "code": code_of(error) or None,
        "request_id": request_id(error.response.headers)
        if isinstance(error, openai.APIStatusError)
        else None,
    }


_WORD = re.compile(r"[a-z]+(?:_[a-z]+)*")
_LONGEST = 48
_SERVER_ERROR = 500
_BY_STATUS: dict[int, type[openai.APIStatusError]] = {
    400: openai.BadRequestError,
    401: openai.AuthenticationError,
    403: openai.PermissionDeniedError,
    404: openai.NotFoundError,
    409: openai.ConflictError,
    422: openai.UnprocessableEntityError,
    429: openai.RateLimitError,
}


def class_of(status: int) -> type[openai.APIStatusError]:
    """Return the class of the error that the SDK makes of a status."""
    other = openai.InternalServerError if status >= _SERVER_ERROR else openai.APIStatusError
    return _BY_STATUS.get(status, other)


def status_of(error: object) -> int | None:
    """Return the HTTP status of an error; None where no answer came."""
    status = getattr(error, "status_code", None)
    return status if isinstance(status, int) else None


def code_of(error: object) -> str:
    """Return the API's word for an error; "" for anything that is no such word, as a key would be."""
    code = getattr(error, "code", None)
    return code if isinstance(code, str) and len(code) <= _LONGEST and _WORD.fullmatch(code) else ""


_SHORTEST_KEY = 6  # characters; shorter ones are placeholders, and stand in ordinary words
_TOO_MANY_REQUESTS = 429
_NUMBER = re.compile("[45][0-9][0-9]")
_BY_WORD = {
    "authentication_error": 401,
    "insufficient_quota": 429,
    "invalid_api_key": 401,
    "invalid_request_error": 400,
    "model_not_found": 404,
    "not_found_error": 404,
    "permission_error": 403,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
}
_OF_THE_BODY = {"content-encoding", "content-length", "transfer-encoding"}  # which is decoded by now


def forget_key(error: openai.APIError, key: str) -> None:
    """Take the key out of an error: out of its request's headers, and out of a message that echoes it."""
    for name in ("authorization", "api-key"):
        error.request.headers.pop(name, None)
    if len(key) >= _SHORTEST_KEY and key in f"{error.message}{error.body}{error.args}":
        error.message = error.message.replace(key, "[key]")
        error.args = (error.message,)
        error.body = None
        response = getattr(error, "response", None)
        if response is not None:
            error.__dict__["response"] = sdk_httpx().Response(response.status_code, request=error.request)


def status_error(status: int, body: Any, answer: Any) -> openai.APIStatusError:
    """Return the error that the SDK raises for a status."""
    details = body.get("error", body) if isinstance(body, dict) else body
    given = details if isinstance(details, dict) else {}
    kind: Any = class_of(status)
    if status == _TOO_MANY_REQUESTS and "insufficient_quota" in (given.get("code"), given.get("type")):
        kind = QuotaError
    text = given.get("message")
    message = text if isinstance(text, str) and text else f"status {status}"
    error: openai.APIStatusError = kind(message, response=answer, body=details)
    return error


def not_an_answer(reply: Any, body: Any, path: str) -> openai.APIError:
    """Return the error for a 200 that holds no answer."""
    # Proxies answer 200 before they know what comes of a request, and put an error into the body; its code is
    # often the status of the server behind them. Where it tells none, the error is one that is tried again.
    reported = isinstance(body, dict) and (body.get("error") or body.get("object") == "error")
    status = _stated_status(body) if reported else None
    if status is None:
        said = (
            f"an error: {body.get('error') or body}"
            if reported
            else f"not what {path} returns: {reply.content[:80]!r}"
        )
        message = f"the answer is {said}"
        return openai.APIResponseValidationError(response=reply, body=body, message=message)
    headers = [(name, text) for name, text in reply.headers.multi_items() if name not in _OF_THE_BODY]
    answer = sdk_httpx().Response(status, headers=headers, content=reply.content, request=reply.request)
    error = body.get("error")
    return status_error(status, {"message": error} if isinstance(error, str) else body, answer)


def _stated_status(body: dict[str, Any]) -> int | None:
    """Return the HTTP status that an error object names, as a number or by the API's word for it."""
    error = body.get("error")
    given = error if isinstance(error, dict) else body
    words = [str(given.get(name)) for name in ("code", "status", "status_code", "type")]
    named = [int(word) if _NUMBER.fullmatch(word) else _BY_WORD.get(word) for word in words]
    return next((status for status in named if status is not None), None)


_TRANSIENT = frozenset({408, 409, 429})
_NO_CONNECTION = frozenset(
    {"ConnectError", "ClientConnectorError", "ClientConnectorDNSError", "ClientConnectorCertificateError"},
)
_FATAL = (
    openai.AuthenticationError,
    openai.PermissionDeniedError,
    openai.NotFoundError,
    BudgetExceededError,
    QuotaError,
)


def is_transient(error: Exception) -> bool:
    """Return whether the same request may succeed later."""
    # So it is for connection errors, timeouts, answers that cannot be read, and statuses 408, 409, 429 and
    # 5xx, unless `x-should-retry` says otherwise; not when the credit is used up or the request is too large.
    if isinstance(error, QuotaError):
        return False
    if isinstance(error, openai.APIResponseValidationError | openai.APIConnectionError):
        return True
    if not isinstance(error, openai.APIStatusError):
        return False
    told = error.response.headers.get("x-should-retry")
    if told in {"true", "false"}:
        return bool(told == "true")
    if any(reason in error.message for reason in FOR_GOOD):
        return False
    return error.status_code in _TRANSIENT or error.status_code >= _SERVER_ERROR


def is_fatal(error: Exception, max_wait: float, *, answered: bool = True) -> bool:
    """Return whether an error would meet every other prompt too."""
    # So it is for key, model, credit, a budget, a very long pause, a closed client; and for no connection, as
    # long as no prompt was `answered`.
    if isinstance(error, ValidationError):
        return error.field in {"max_cost", "redis_url"}
    if not answered and was_never_sent(error):
        return True
    if isinstance(error, openai.RateLimitError) and (asked_wait(error) or 0.0) > max_wait:
        return True
    return isinstance(error, _FATAL) or type(error) is RuntimeError


def was_never_sent(error: BaseException | None) -> bool:
    """Return whether no connection came about: nobody listens, no such host, no TLS."""
    # httpx raises ConnectError for it, aiohttp ClientConnectorError under what the SDK makes of it.
    while error is not None:
        if type(error).__name__ in _NO_CONNECTION:
            return True
        error = error.__cause__
    return False


def asked_wait(error: Exception) -> float | None:
    """Return the seconds that the server asks to wait before the next attempt; None where it does not say."""
    return (
        stated_wait(error.response.headers, error.message)
        if isinstance(error, openai.APIStatusError)
        else None
    )
