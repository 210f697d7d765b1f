"""The SDK's own errors for what says in its body, and not by its HTTP status, that a request failed."""

from __future__ import annotations

import re
from typing import Any

import openai

from openai_eval_client.errors import QuotaError, sdk_httpx

_TOO_MANY_REQUESTS, _SERVER_ERROR = 429, 500
_NUMBER = re.compile("[45][0-9][0-9]")
_BY_STATUS: dict[int, type[openai.APIStatusError]] = {
    400: openai.BadRequestError,
    401: openai.AuthenticationError,
    403: openai.PermissionDeniedError,
    404: openai.NotFoundError,
    409: openai.ConflictError,
    422: openai.UnprocessableEntityError,
    429: openai.RateLimitError,
}
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


def status_error(status: int, body: Any, answer: Any) -> openai.APIStatusError:
    """Return the error that the SDK raises for a status.

    Args:
        status: 400 or more.
        body: Decoded.
        answer: The SDK's response that the error is to carry, of that status.
    """
    details = body.get("error", body) if isinstance(body, dict) else body
    given = details if isinstance(details, dict) else {}
    kind: Any = _BY_STATUS.get(status)
    if kind is None:
        kind = openai.InternalServerError if status >= _SERVER_ERROR else openai.APIStatusError
    if status == _TOO_MANY_REQUESTS and "insufficient_quota" in (given.get("code"), given.get("type")):
        kind = QuotaError
    text = given.get("message", details)
    message = text if isinstance(text, str) and text else f"status {status}"
    error: openai.APIStatusError = kind(message, response=answer, body=details)
    return error


def not_an_answer(reply: Any, body: Any, path: str) -> openai.APIError:
    """Return the error for a 200 that holds no answer.

    Proxies answer 200 before they know what comes of a request, and put an error into the body; its code is
    often the status of the server behind them. Where it tells none, the error is one that is tried again.

    Args:
        reply: The SDK's response.
        body: Decoded; None where it is no JSON.
        path: What was asked.
    """
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
    return status_error(status, body, answer)


def _stated_status(body: dict[str, Any]) -> int | None:
    """Return the HTTP status that an error object names, as a number or by the API's word for it."""
    error = body.get("error")
    given = error if isinstance(error, dict) else body
    words = [str(given.get(name)) for name in ("code", "status", "status_code", "type")]
    named = [int(word) if _NUMBER.fullmatch(word) else _BY_WORD.get(word) for word in words]
    return next((status for status in named if status is not None), None)
