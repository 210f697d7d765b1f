"""When an attempt is worth another, and how long to wait first: the server's word before ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import backoff
import openai

from openai_eval_client._events import inform, of_error
from openai_eval_client._headers import stated_wait
from openai_eval_client._wire import FOR_GOOD
from openai_eval_client.errors import BudgetExceededError, QuotaError, ValidationError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator

_FIRST_DELAY = 0.5  # seconds; the SDK's own first and longest delays
_LONGEST_DELAY = 8.0
_TRANSIENT = frozenset({408, 409, 429})
_SERVER_ERROR = 500
_NO_CONNECTION = frozenset(
    {"ConnectError", "ClientConnectorError", "ClientConnectorDNSError", "ClientConnectorCertificateError"}
)
_DOOMED = (
    openai.AuthenticationError,
    openai.PermissionDeniedError,
    openai.NotFoundError,
    BudgetExceededError,
    QuotaError,
)


def retrying(
    attempt: Callable[..., Awaitable[Any]],
    *,
    max_retries: int,
    max_wait: float,
    on_retry: Callable[[str, Exception, float], None] | None = None,
    model_of: Callable[..., str] | None = None,
    governed: bool = True,
) -> Callable[..., Awaitable[Any]]:
    """Return `attempt`, tried again where that may help.

    Args:
        attempt: Sends one request; raises the SDK's errors.
        max_retries: Attempts after the first.
        max_wait: Seconds beyond which a wait asked for by the server is not waited for.
        on_retry: Called before each further attempt with the model, the error, and the seconds until then.
        model_of: Which model an attempt asks, from its arguments; None: none.
        governed: Whether an attempt itself waits for as long as the server asked after a 429.

    Returns:
        The same callable, raising the last attempt's error.
    """

    def give_up(error: Exception) -> bool:
        return not is_transient(error) or (asked_wait(error) or 0.0) > max_wait

    def before_retry(details: Any) -> None:
        tries, wait, error = details["tries"], details["wait"], details["exception"]
        model = None if model_of is None else model_of(*details["args"])
        if on_retry is not None:
            on_retry(str(model), error, wait)
        reason = getattr(error, "status_code", None) or type(error).__name__
        about = {"model": model, "attempt": tries, "wait_seconds": wait, **of_error(error)}
        inform("attempt %d failed (%s): next in %.2f s", tries, reason, wait, event="retry", **about)

    repeated: Callable[..., Awaitable[Any]] = backoff.on_exception(
        delays,
        openai.APIError,
        max_tries=max_retries + 1,
        giveup=give_up,
        on_backoff=before_retry,
        jitter=None,
        logger=None,
        governed=governed,
    )(attempt)
    return repeated


def patient(
    attempt: Callable[[], Awaitable[Any]], *, is_worth: Callable[[Any], bool], seconds: float
) -> Callable[[], Awaitable[Any]]:
    """Return `attempt`, tried again for up to so many seconds while `is_worth` says so of its error."""
    repeated: Callable[[], Awaitable[Any]] = backoff.on_exception(
        backoff.expo,
        openai.APIStatusError,
        factor=_FIRST_DELAY / 2,
        max_value=_LONGEST_DELAY,
        max_time=seconds,
        giveup=lambda error: not is_worth(error),
        jitter=None,
        logger=None,
    )(attempt)
    return repeated


def is_transient(error: Exception) -> bool:
    """Return whether the same request may succeed later.

    So it is for connection errors, timeouts, answers that cannot be read, and statuses 408, 409, 429 and 5xx,
    unless `x-should-retry` says otherwise; not when the credit is used up or the request is too large.
    """
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


def is_doom(error: Exception, max_wait: float, *, answered: bool = True) -> bool:
    """Return whether an error would meet every other prompt too.

    So it is for key, model, credit, a budget, a very long pause, a closed client; and for no connection, as
    long as no prompt was `answered`.
    """
    if isinstance(error, ValidationError):
        return error.field in {"max_cost", "redis_url"}
    if not answered and was_never_sent(error):
        return True
    if isinstance(error, openai.RateLimitError) and (asked_wait(error) or 0.0) > max_wait:
        return True
    return isinstance(error, _DOOMED) or type(error) is RuntimeError


def was_never_sent(error: BaseException | None) -> bool:
    """Return whether no connection came about: nobody listens, no such host, no TLS.

    httpx raises ConnectError for it, aiohttp ClientConnectorError under what the SDK makes of it.
    """
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


def delays(*, governed: bool = True) -> Generator[float, Any, None]:
    """Yield the seconds to wait after each error sent in: the server's, else exponential with full jitter.

    After a 429 whose wait is known there is none here for a governed attempt: the whole model pauses, and the
    request queues for it in its old place.
    https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
    """
    ceilings = backoff.expo(base=2, factor=_FIRST_DELAY, max_value=_LONGEST_DELAY)
    next(ceilings)
    delay = 0.0
    while True:
        error: Exception = yield delay
        ceiling, asked = next(ceilings), asked_wait(error)
        if not asked:
            delay = backoff.full_jitter(ceiling)
        else:
            delay = 0.0 if governed and isinstance(error, openai.RateLimitError) else asked
