"""What one attempt may meet: a deadline, a model that refuses a parameter, an error that shows the key."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import TYPE_CHECKING, Any

import openai

from openai_eval_client._events import inform, of_error
from openai_eval_client.errors import QuotaError, TimeoutError, sdk_httpx

if sys.version_info >= (3, 11):
    from asyncio import timeout as deadline
else:
    from async_timeout import timeout as deadline

if TYPE_CHECKING:
    from collections.abc import Awaitable, Collection

__all__ = ["Refusals", "deadline", "forget_key", "typed", "without"]

# What a model may refuse, and what takes its place: learnt from its 400, never guessed from its name.
_SUBSTITUTES: dict[str, str | None] = {"max_tokens": "max_completion_tokens", "temperature": None}
_SHORTEST_KEY = 6  # characters; shorter ones are placeholders, and stand in ordinary words
_REFUSALS = frozenset({"unsupported_parameter", "unsupported_value"})


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
