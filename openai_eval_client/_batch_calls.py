"""One call to the files and batches endpoints: with a deadline, typed errors, and repeats where they help."""

from __future__ import annotations

import asyncio
import functools
import json
from typing import TYPE_CHECKING, Any

import openai

from openai_eval_client._attempt import deadline, forget_key
from openai_eval_client._batch_status import is_enqueued_limit
from openai_eval_client._checks import shown
from openai_eval_client._retry import patient, retrying
from openai_eval_client.errors import QuotaError, TimeoutError, sdk_httpx

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from openai_eval_client.config import OpenAIConfig

_NOT_THERE = frozenset({400, 404})


class Calls:
    """Makes calls, and makes them again where that may help.

    Args:
        config: How long an attempt may take, and how often to retry.
        max_wait: Seconds beyond which a wait asked for by the server is not waited for.
    """

    def __init__(self, config: OpenAIConfig, max_wait: float) -> None:
        self._key = config.api_key
        self._timeout = config.timeout
        self._retries = config.max_retries
        self._max_wait = max_wait

    async def repeated(self, attempt: Callable[[], Awaitable[Any]], seconds: float | None = 0.0) -> Any:
        """Make the attempts.

        Args:
            attempt: Calls the SDK.
            seconds: For each attempt, besides the config's timeout; None: no deadline.

        Returns:
            What the attempt that succeeded did.

        Raises:
            openai.APIError: What the last one ended with, in the SDK's own classes or ours, without the key.
        """
        limit = None if seconds is None else self._timeout + seconds
        once = functools.partial(self._attempted, attempt, limit)
        return await retrying(
            once, max_retries=self._retries, max_wait=self._max_wait, on_retry=_nothing, governed=False
        )()

    async def _attempted(self, attempt: Callable[[], Awaitable[Any]], seconds: float | None) -> Any:
        try:
            return await _typed(attempt, self._timeout if seconds is None else seconds, seconds is not None)
        except openai.APIError as error:
            forget_key(error, self._key)
            raise


async def _typed(attempt: Callable[[], Awaitable[Any]], seconds: float, at_most: bool) -> Any:
    """Make one attempt; whatever the connection does is one of the SDK's errors."""
    request = _request()
    try:
        async with deadline(seconds if at_most else None):
            return await attempt()
    except asyncio.TimeoutError as error:
        raise TimeoutError(f"no answer within {seconds:g} s", request=request) from error
    except openai.APITimeoutError as error:  # the SDK has no timeout here: the connection failed
        message = f"connection failed: {error.__cause__ or error}"
        raise openai.APIConnectionError(message=message, request=error.request) from error
    except (json.JSONDecodeError, sdk_httpx().TransportError) as error:  # in the middle of an answer
        raise openai.APIConnectionError(message=f"answer cut short: {error}", request=request) from error
    except openai.APIStatusError as error:
        if "insufficient_quota" in {error.code, error.type} or is_enqueued_limit(error.code, error.message):
            raise QuotaError(error.message, response=error.response, body=error.body) from None
        raise


def object_of(answer: Any) -> Any:
    """Return an object of the API; not the garbage of something in between, which the SDK returns as text."""
    if not isinstance(getattr(answer, "id", None), str):
        raise no_object(answer)
    return answer


def no_object(answer: object) -> openai.APIConnectionError:
    """Return the error for an answer that is no object of the API."""
    return openai.APIConnectionError(message=f"no object of the API: {shown(answer)}", request=_request())


async def once_known(file_id: str, action: Callable[[], Awaitable[Any]], seconds: float) -> Any:
    """Do something with a file, again for so many seconds while the server does not know of it yet."""
    unknown = functools.partial(_is_unknown_file, file_id=file_id)
    return await patient(action, is_worth=unknown, seconds=seconds)()


def _is_unknown_file(error: openai.APIStatusError, *, file_id: str) -> bool:
    said = error.message.lower()
    return (
        error.status_code in _NOT_THERE
        and "file" in said
        and (file_id.lower() in said or "no such" in said or "not found" in said)
    )


def _request() -> Any:
    return sdk_httpx().Request("POST", "https://client.invalid/")


def _nothing() -> None:
    pass
