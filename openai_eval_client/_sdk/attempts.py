"""Attempts through the SDK: each one paced (the drop-in `AsyncOpenAI`), its errors, and when to try again."""

from __future__ import annotations

import asyncio
import inspect
import json
import sys
from typing import TYPE_CHECKING, Any

import backoff
import openai

from openai_eval_client._account import Account
from openai_eval_client._log import inform
from openai_eval_client._runtime import check_loop
from openai_eval_client._sdk.reading import Carried
from openai_eval_client._sdk.redirects import guarded
from openai_eval_client._sdk.streams import metered, outcome_of_reply, released_class
from openai_eval_client._sdk.transport import LoopLocalClient, SdkClient, default_client
from openai_eval_client._sdk.views import View, view_of
from openai_eval_client._tokens import TokenCounter
from openai_eval_client._validation import config_of
from openai_eval_client._wire import (
    Demand,
    Kind,
    endpoint_of,
    forget_key,
    max_output,
    of_error,
    read_failure,
    read_object,
    route_of,
    words_in,
)
from openai_eval_client.config import RateLimitConfig
from openai_eval_client.errors import QuotaError, TimeoutError, sdk_httpx

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Generator, Mapping

    from typing_extensions import Self

    from openai_eval_client._account import Attempt
    from openai_eval_client._wire import Failure
    from openai_eval_client.models import ClientStats

_ACCOUNT = "openai_eval_client.account"  # extension of a request: its account
_JSON = "application/json"


def paced(client: Any, account: Account, counter: TokenCounter) -> Any:
    """Return a view of an HTTP client of either httpx family whose every `send` is paced."""
    # The SDK calls `http_client.send()` once for every attempt, its own retries included, on any resource.
    # Mounts, proxies, event hooks and mock transports of the client go on working: nothing below is touched.
    view = view_of(client, _Paced)
    view.original = client if isinstance(client, LoopLocalClient) else guarded(client)
    view.account, view.counter, view.patched = account, counter, None
    return view


class _Paced(View):
    """What a paced view adds to the class of the client that it views."""

    __slots__ = ()
    own = ("account", "counter", "original", "patched")
    original: Any  # what sends
    account: Account  # of a request that names none
    counter: TokenCounter
    patched: Any  # what was put in the place of `send`, such as an instrumentor's function

    @property
    def send(self) -> Any:
        """Send one request, paced."""
        # a property goes before what was set on the client viewed, whose whole state it shares
        return self.patched or self._send

    @send.setter
    def send(self, function: Any) -> None:
        self.patched = function

    @send.deleter
    def send(self) -> None:
        self.patched = None

    async def _send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:
        """Wait for a permit, send, and settle: at once, or when a streamed answer is closed."""
        attempt = await self._admitted(request)
        async with attempt:
            response = await self.original.send(request, stream=stream, **options)
            if stream and not response.is_closed:
                return metered(response, attempt)  # it stays open until the stream ends
            api = endpoint_of(request.url.path, request.method).api
            outcome = outcome_of_reply(
                attempt.demand, response.status_code, response.headers, response.content, api
            )
            attempt.ended(outcome)
        used, demand = outcome.counted, attempt.demand
        if used is not None and demand.model is not None:
            self.counter.observe(demand.model, demand.input_tokens, used.prompt_tokens)
        return response

    async def _admitted(self, request: Any) -> Attempt:
        """Return an attempt that may be sent."""
        account = request.extensions.get(_ACCOUNT)
        try:
            check_loop()
            of = account or self.account
            return await of.attempt(await self._demand(request, of)).begin()
        except Exception as error:
            if account is not None:
                raise Carried(error) from None
            raise

    async def _demand(self, request: Any, account: Account) -> Demand:
        """Return what a request asks of the limits and budgets, as far as its body can be read."""
        path, headers = request.url.path, request.headers
        endpoint = endpoint_of(path, request.method)
        demand = Demand(None, route=route_of(request.method, path))
        body: dict[str, Any] = {}
        if endpoint.metered:
            retry = headers.get("x-stainless-retry-count", "0") != "0"  # the SDK says so
            if not headers.get("content-type", "").startswith(_JSON):  # a form: its model is not at hand
                demand = Demand(path.rpartition("/")[2], max_output=0, retry=retry)
            elif body := _body_of(request):
                tokens = await self.counter.count_input(body)
                most_output = max_output(body, path)
                demand = Demand(body["model"], tokens, most_output, retry=retry, free=endpoint.free)
        most = await account.budgets.most(body, path, self.counter) if endpoint.billed else None
        return demand if most is None else demand._replace(most_cost=most)


def _body_of(request: Any) -> dict[str, Any]:
    """Return the JSON body of a request; an empty one where it is streamed or names no model."""
    try:
        body = read_object(request.content)
    except RuntimeError:
        return {}
    return body if isinstance(body.get("model"), str) else {}


def _signature(function: Any) -> inspect.Signature:
    """Return the signature of a method of the SDK's, with `rate_limit` first, for help() and editors."""
    theirs = inspect.signature(function)
    first, *rest = theirs.parameters.values()
    ours = inspect.Parameter(
        "rate_limit", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="RateLimitConfig | None"
    )
    return theirs.replace(parameters=[first, ours, *rest])


class AsyncOpenAI(SdkClient):
    """The SDK's `AsyncOpenAI`, paced: change the import and nothing else.

    Every HTTP attempt of every resource waits for its place within the requests and tokens per minute of its
    model, the SDK's own retries included. Constructor, resources, transport and errors stay the SDK's. It
    runs on asyncio.

    Args:
        rate_limit: The limits; None: learn them from the response headers, and slow nothing down where the
            server sends none.
        **options: What `openai.AsyncOpenAI` takes, `http_client` of either httpx family included.
    """

    if TYPE_CHECKING:
        _account: Account
        _counter: TokenCounter

        def __init__(
            self,
            *,
            rate_limit: RateLimitConfig | None = None,
            api_key: str | Callable[[], Awaitable[str]] | None = None,
            organization: str | None = None,
            project: str | None = None,
            webhook_secret: str | None = None,
            base_url: Any = None,
            websocket_base_url: Any = None,
            timeout: Any = ...,
            max_retries: int = ...,
            default_headers: Mapping[str, str] | None = None,
            default_query: Mapping[str, object] | None = None,
            http_client: Any = None,
            **options: Any,
        ) -> None: ...

        def copy(self, *, rate_limit: RateLimitConfig | None = None, **options: Any) -> Self: ...

        with_options = copy

    else:

        def __init__(self, *, rate_limit: Any = None, http_client: Any = None, **options: Any) -> None:
            view = http_client if isinstance(http_client, _Paced) else None
            self._counter = TokenCounter() if view is None else view.counter
            if rate_limit is not None:
                self._account = Account(config_of("rate_limit", rate_limit, RateLimitConfig))
            else:
                self._account = Account() if view is None else view.account
            super().__init__(http_client=http_client or default_client(), **options)
            self._use(self._account)

        __init__.__signature__ = _signature(openai.AsyncOpenAI.__init__)

        @property
        def _client(self) -> Any:
            return self._http_client

        @_client.setter
        def _client(self, client: Any) -> None:  # by the SDK, and by a user who puts another in its place
            self._http_client = self._paced(client)

        def _paced(self, client: Any) -> Any:
            plain = any(base.__name__ == "AsyncClient" for base in type(client).__mro__)
            if not plain or isinstance(client, _Paced):  # what is no client is for the SDK to refuse
                return client
            return paced(client, self._account, self._counter)

        def _use(self, account: Account) -> None:
            self._account = account
            account.ledger.pricer_for(str(self.base_url))
            account.limiter.share(*account_of(self))

        def copy(self, *, rate_limit: Any = None, http_client: Any = None, **options: Any) -> Any:
            """Copy, with the same limits; a copy for another account has them to itself.

            Args:
                rate_limit: Limits of the copy's own; None: this client's.
                http_client: What the copy sends through; None: what this client does.
                **options: What is to differ, as the SDK's `copy` takes it.

            Returns:
                The copy.
            """
            limits = None if rate_limit is None else config_of("rate_limit", rate_limit, RateLimitConfig)
            copied = super().copy(http_client=self._paced(http_client), **options)
            account = self._account
            if limits is not None or _identity(copied) != _identity(self):
                account = account.fresh()
                account.limiter = account.limiter.fresh(account.reclaim, limits)
            copied._use(account)  # noqa: SLF001  # of this class
            return copied

        copy.__signature__ = _signature(openai.AsyncOpenAI.copy)
        with_options = copy

        async def request(self, *args: Any, stream_cls: Any = None, **options: Any) -> Any:
            """Send as the SDK does.

            Args:
                *args: What the SDK's `request` takes.
                stream_cls: The class of a streamed answer. It is returned as a subclass of it, which gives
                    its slot back as soon as it is dropped.
                **options: Likewise.

            Returns:
                What the SDK's returns.
            """
            check_loop()
            kind = None if stream_cls is None else released_class(stream_cls)
            return await super().request(*args, stream_cls=kind, **options)

        async def _prepare_request(self, request: Any) -> Any:
            request.extensions[_ACCOUNT] = self._account
            return await super()._prepare_request(request)

    @property
    def http_client(self) -> Any:
        """The HTTP client, paced, for what takes one rather than a client of the SDK."""
        client: Any = self._client
        if not isinstance(client, _Paced) or client.account is self._account:
            return client
        return paced(client.original, self._account, self._counter)

    @property
    def stats(self) -> ClientStats:
        """What went through this client, and through its copies that share its limits, so far."""
        return self._account.stats


# What tells two accounts apart. A key that a function returns may change from one request to the next.
_NAMES = ("base_url", "organization", "project", "_provider", "workload_identity")


def _identity(client: openai.AsyncOpenAI) -> tuple[str, ...]:
    key = getattr(client, "_api_key_provider", None) or client.api_key
    return _as_text(key), *[_as_text(getattr(client, name, None)) for name in _NAMES]


def account_of(client: openai.AsyncOpenAI) -> tuple[str | None, ...]:
    """Return the account that a client of the SDK uses: key, server, organisation, project."""
    return client.api_key, _as_text(client.base_url), client.organization, client.project


def _as_text(value: object) -> str:
    """Return a key, a name or an address as text; addresses end with a slash or not."""
    return str(value).rstrip("/")


# --- one call, its errors and its retries ------------------------------------------------------------------

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
        try:
            async with deadline(seconds):
                return await call
        except (Exception, asyncio.CancelledError) as error:
            forget_key(error)  # before any of it is quoted, or cut
            raise
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
    except openai.APIStatusError as error:
        words = words_in(error).message
        if words and words not in error.message:  # the SDK quotes one shape of body alone
            error.message = f"{error.message} - {words}"
            error.args = (error.message,)
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
_LONGEST_PATIENT_DELAY = 30.0
_SHORTEST_PATIENCE = 1.0  # seconds that a shorter wait counts as


def retrying(
    attempt: Callable[..., Awaitable[Any]],
    *,
    max_retries: int,
    max_wait: float,
    on_retry: Callable[[str, Exception, float], None] | None = None,
    model_of: Callable[..., str] | None = None,
    is_worth: Callable[[Failure], bool] = lambda failure: failure.retry,
    governed: bool = True,
) -> Callable[..., Awaitable[Any]]:
    """Return `attempt`, tried again where that may help."""

    def give_up(error: Exception) -> bool:
        failure = read_failure(error)
        return not is_worth(failure) or failure.is_too_long(max_wait)

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
        giveup=give_up,
        on_backoff=before_retry,
        jitter=None,
        logger=None,
        max_retries=max_retries,
        max_wait=max_wait,
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


def delays(
    *, max_retries: int, max_wait: float = float("inf"), governed: bool = True
) -> Generator[float, Any, None]:
    """Yield the seconds to wait after each error, until it is not worth another attempt."""
    # A refusal that says nothing against the request counts against `max_wait`, any other against
    # `max_retries`. The wait is the server's, else exponential with full jitter. Where a governed attempt's
    # whole model pauses for that long there is none here: the request queues in its old place.
    # https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
    failed = refused = 0
    patience = 0.0
    delay = 0.0
    while True:
        failure = read_failure((yield delay))
        is_patient = failure.is_patient and max_retries > 0
        count, longest = (refused, _LONGEST_PATIENT_DELAY) if is_patient else (failed, _LONGEST_DELAY)
        wait = failure.wait or backoff.full_jitter(min(_FIRST_DELAY * 2 ** min(count, 9), longest))
        if is_patient:
            refused += 1
            patience += max(wait, _SHORTEST_PATIENCE)
        else:
            failed += 1
        if failed > max_retries or (refused > max_retries and patience > max_wait):
            return
        pauses = governed and failure.wait and failure.kind in {Kind.RATE_LIMITED, Kind.OVERLOADED}
        delay = 0.0 if pauses else wait
