"""What one attempt may meet: a deadline, a parameter refused, an error in a 200, one that shows the key."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from typing import TYPE_CHECKING, Any

import openai

from openai_eval_client._events import inform, of_error
from openai_eval_client._failures import class_of
from openai_eval_client.errors import QuotaError, TimeoutError, sdk_httpx

if sys.version_info >= (3, 11):
    from asyncio import timeout as deadline
else:
    from async_timeout import timeout as deadline

if TYPE_CHECKING:
    from collections.abc import Awaitable, Collection

__all__ = ["Refusals", "deadline", "forget_key", "not_an_answer", "status_error", "typed", "without"]

# What a model may refuse, and what takes its place: learnt from its 400, never guessed from its name.
_SUBSTITUTES: dict[str, str | None] = {"max_tokens": "max_completion_tokens", "temperature": None}
_SHORTEST_KEY = 6  # characters; shorter ones are placeholders, and stand in ordinary words
_REFUSALS = frozenset({"unsupported_parameter", "unsupported_value"})
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


async def typed(call: Awaitable[Any], *, seconds: float | None, url: str) -> Any:
    """Make one call of the SDK; whatever the connection does to it is one of the SDK's errors, or ours.

    Args:
        call: The call, which must have no timeout of its own.
        seconds: The deadline; None: the call has its own.
        url: Of the request that an error names.

    Returns:
        What the call returns.

    Raises:
        TimeoutError: It took longer than `seconds`.
        QuotaError: The account's credit is used up.
        openai.APIError: Anything else, in the SDK's own classes.
    """
    try:
        async with deadline(seconds):
            return await call
    except asyncio.TimeoutError as error:
        limit = "in time" if seconds is None else f"within {seconds:g} s"
        raise TimeoutError(f"no answer {limit}", request=_request(url)) from error
    except openai.APIConnectionError as error:  # also where the SDK calls a refused connection a timeout
        if isinstance(error, TimeoutError) or error.__cause__ is None:
            raise
        message = f"connection failed: {error.__cause__}"
        raise openai.APIConnectionError(message=message, request=error.request) from error
    except (json.JSONDecodeError, sdk_httpx().TransportError) as error:  # in the middle of an answer
        message = f"answer cut short: {error}"
        raise openai.APIConnectionError(message=message, request=_request(url)) from error
    except openai.RateLimitError as error:
        if "insufficient_quota" in (error.code, error.type):  # which may be anything, lists too
            raise QuotaError(error.message, response=error.response, body=error.body) from None
        raise


def _request(url: str) -> Any:
    return sdk_httpx().Request("POST", url)


class Refusals:
    """Remembers which parameters each model refuses."""

    def __init__(self) -> None:
        self._of_model: dict[str, set[str]] = {}

    def adapted(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the body without what its model is known to refuse."""
        refused = self._of_model.get(body["model"])
        return without(body, refused) if refused else body

    def of(self, model: str) -> list[str]:
        """Return the parameters that a model is known to refuse."""
        return sorted(self._of_model.get(model, ()))

    def learn(self, error: openai.BadRequestError, sent: dict[str, Any]) -> bool:
        """Remember a parameter that the model refuses; False where sending again would not help."""
        code, name, model = str(error.code), str(error.param), sent["model"]  # servers send lists here too
        if code not in _REFUSALS or name not in _SUBSTITUTES or name not in sent:
            return False
        known = self._of_model.setdefault(model, set())
        if name not in known:
            instead = _SUBSTITUTES[name] or "without it"
            about = {"model": model, "parameter": name, **of_error(error)}
            text = "%s refuses %s: sending %s from now on"
            inform(text, model, name, instead, event="parameter_refused", **about)
            known.add(name)
        return True


def without(body: dict[str, Any], refused: Collection[str]) -> dict[str, Any]:
    """Return a body without what is refused, or with what takes its place."""
    adapted = {name: value for name, value in body.items() if name not in refused}
    for name in body.keys() & set(refused):
        substitute = _SUBSTITUTES[name]
        if substitute is not None:
            adapted.setdefault(substitute, body[name])
    return adapted


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
    """Return the error that the SDK raises for a status.

    Args:
        status: 400 or more.
        body: Decoded.
        answer: The SDK's response that the error is to carry, of that status.
    """
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
    error = body.get("error")
    return status_error(status, {"message": error} if isinstance(error, str) else body, answer)


def _stated_status(body: dict[str, Any]) -> int | None:
    """Return the HTTP status that an error object names, as a number or by the API's word for it."""
    error = body.get("error")
    given = error if isinstance(error, dict) else body
    words = [str(given.get(name)) for name in ("code", "status", "status_code", "type")]
    named = [int(word) if _NUMBER.fullmatch(word) else _BY_WORD.get(word) for word in words]
    return next((status for status in named if status is not None), None)
