"""Calls of the SDK: one attempt's deadline and errors, and when to try again."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import TYPE_CHECKING, Any

import backoff
import openai

from openai_eval_client._log import inform
from openai_eval_client._wire import Kind, of_error, read_failure
from openai_eval_client.errors import QuotaError, TimeoutError, sdk_httpx

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Generator


if sys.version_info >= (3, 11):
    deadline = asyncio.timeout
else:
    import async_timeout

    deadline = async_timeout.timeout

_httpx: Any = sdk_httpx()  # httpx or httpx2: the one that the SDK is built on

# What a model may refuse, and what takes its place: learned from its 400, never guessed from its name.
_SUBSTITUTES: dict[str, str | None] = {"max_tokens": "max_completion_tokens", "temperature": None}


async def call_sdk(call: Awaitable[Any], *, seconds: float | None, url: str) -> Any:
    """Make one call of the SDK; any failure of its connection is one of the SDK's errors, or ours."""
    try:
        async with deadline(seconds):
            return await call
    except asyncio.TimeoutError as error:
        limit = "in time" if seconds is None else f"within {seconds:g} s"
        raise TimeoutError(f"no answer {limit}", request=_httpx.Request("POST", url)) from error
    except openai.APIConnectionError as error:  # also where the SDK calls a refused connection a timeout
        if isinstance(error, TimeoutError) or error.__cause__ is None:
            raise
        message = f"connection failed: {error.__cause__}"
        raise openai.APIConnectionError(message=message, request=error.request) from error
    except (json.JSONDecodeError, _httpx.TransportError) as error:  # in the middle of an answer
        message = f"answer cut short: {error}"
        raise openai.APIConnectionError(message=message, request=_httpx.Request("POST", url)) from error
    except openai.RateLimitError as error:
        if read_failure(error).kind is Kind.OUT_OF_QUOTA:
            raise QuotaError(error.message, response=error.response, body=error.body) from None
        raise


class UnsupportedParameters:
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
        is_refusal = code in {"unsupported_parameter", "unsupported_value"}
        if not is_refusal or name not in _SUBSTITUTES or name not in sent:
            return False
        known = self._of_model.setdefault(model, set())
        if name not in known:
            known.add(name)
            instead = _SUBSTITUTES[name] or "without it"
            about = {"model": model, "parameter": name, **of_error(error)}
            text = "%s refuses %s: sending %s from now on"
            inform(text, model, name, instead, event="parameter_refused", **about)
        return True


def without(body: dict[str, Any], refused: Collection[str]) -> dict[str, Any]:
    """Return a body without what is refused, or with what takes its place."""
    adapted = {name: value for name, value in body.items() if name not in refused}
    for name in body.keys() & set(refused):
        substitute = _SUBSTITUTES[name]
        if substitute is not None:
            adapted.setdefault(substitute, body[name])
    return adapted


_FIRST_DELAY = 0.5  # seconds; the SDK's own first and longest delays
_LONGEST_DELAY = 8.0


def retrying(
    attempt: Callable[..., Awaitable[Any]],
    *,
    max_retries: int,
    max_wait: float,
    on_retry: Callable[[str, Exception, float], None] | None = None,
    model_of: Callable[..., str] | None = None,
    governed: bool = True,
) -> Callable[..., Awaitable[Any]]:
    """Return `attempt`, tried again where that may help."""

    def give_up(error: Exception) -> bool:
        failure = read_failure(error)
        return not failure.retry or (failure.wait or 0.0) > max_wait

    def before_retry(details: Any) -> None:
        tries, wait, error = details["tries"], details["wait"], details["exception"]
        model = None if model_of is None else model_of(*details["args"])
        if on_retry is not None:
            on_retry(str(model), error, wait)
        reason = getattr(error, "status_code", None) or type(error).__name__
        about = {"model": model, "attempt": tries, "wait_seconds": wait, **of_error(error)}
        inform("attempt %d failed (%s): next in %.2f s", tries, reason, wait, event="retry", **about)

    return backoff.on_exception(
        delays,
        openai.APIError,
        max_tries=max_retries + 1,
        giveup=give_up,
        on_backoff=before_retry,
        jitter=None,
        logger=None,
        governed=governed,
    )(attempt)


def retry_for(
    attempt: Callable[[], Awaitable[Any]], *, is_worth: Callable[[Any], bool], seconds: float
) -> Callable[[], Awaitable[Any]]:
    """Return `attempt`, tried again for up to so many seconds after each error that `is_worth` it."""
    return backoff.on_exception(
        backoff.expo,
        openai.APIStatusError,
        factor=_FIRST_DELAY / 2,
        max_value=_LONGEST_DELAY,
        max_time=seconds,
        giveup=lambda error: not is_worth(error),
        jitter=None,
        logger=None,
    )(attempt)


def delays(*, governed: bool = True) -> Generator[float, Any, None]:
    """Yield the seconds to wait after each error: the server's, else exponential with full jitter."""
    # After a 429 whose wait is known there is none here for a governed attempt: the whole model pauses, and
    # the request queues for it in its old place.
    # https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
    ceilings = backoff.expo(base=2, factor=_FIRST_DELAY, max_value=_LONGEST_DELAY)
    next(ceilings)
    delay = 0.0
    while True:
        error: Exception = yield delay
        ceiling, asked = next(ceilings), read_failure(error).wait
        if not asked:
            delay = backoff.full_jitter(ceiling)
        else:
            delay = 0.0 if governed and isinstance(error, openai.RateLimitError) else asked
