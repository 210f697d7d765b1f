"""One call to the files and batches endpoints: with a deadline, typed errors, and repeats where they help."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import openai

from openai_eval_client._attempt import forget_key, typed
from openai_eval_client._batch_status import is_enqueued_limit
from openai_eval_client._checks import shown
from openai_eval_client._retry import patient, retrying
from openai_eval_client.errors import QuotaError, sdk_httpx

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from openai_eval_client.config import OpenAIConfig

_URL = "https://client.invalid/"  # of the request that an error names
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
        return await retrying(once, max_retries=self._retries, max_wait=self._max_wait, governed=False)()

    async def _attempted(self, attempt: Callable[[], Awaitable[Any]], seconds: float | None) -> Any:
        try:
            return await typed(attempt(), seconds=seconds, url=_URL)
        except openai.APIError as error:
            forget_key(error, self._key)
            if isinstance(error, openai.APIStatusError) and is_enqueued_limit(error.code, error.message):
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
    return sdk_httpx().Request("POST", _URL)
