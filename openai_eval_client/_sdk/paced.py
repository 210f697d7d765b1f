"""The drop-in `AsyncOpenAI`: the SDK's client whose every attempt is paced."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

import openai

from openai_eval_client._account import Account
from openai_eval_client._sdk.transport import SdkClient, default_client
from openai_eval_client._tokens import TokenCounter
from openai_eval_client._validation import config_of
from openai_eval_client._wire import (
    Demand,
    Outcome,
    Tail,
    endpoint_of,
    max_output,
    read_object,
    read_usage,
    refused,
)
from openai_eval_client.config import RateLimitConfig

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from openai_eval_client._account import Attempt
    from openai_eval_client.models import ClientStats


_UNWRAPS = "openai_eval_client.unwraps"  # extension of a request whose sender unwraps NotSent
_JSON = "application/json"
_BAD_REQUEST = 400


class NotSent(BaseException):
    """Holds one of our errors before a request was sent; were it an Exception, the SDK would send again."""


def paced(client: Any, account: Account, counter: TokenCounter) -> Any:
    """Return a view of an HTTP client of either httpx family whose every `send` is paced."""
    # The SDK calls `http_client.send()` once for every attempt, its own retries included, on any resource.
    # Mounts, proxies, event hooks and mock transports of the client go on working: nothing below is touched.
    # The view shares the client's whole state, so closing either closes both.
    view: Any = object.__new__(_paced_class(client.__class__))
    object.__setattr__(view, "__dict__", client.__dict__)
    view.original, view.account, view.counter = client, account, counter
    return view


@functools.lru_cache(maxsize=64)
def _paced_class(base: Any) -> Any:
    slots = ("counter", "account", "original")
    return type(f"Paced{base.__name__}", (_PacedClient, base), {"__slots__": slots})


class _PacedClient:
    """What a paced view adds to the class of the client that it views."""

    __slots__ = ()
    original: Any
    account: Account
    counter: TokenCounter

    async def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:
        """Wait for a permit, send, and settle: at once, or when a streamed answer is closed."""
        attempt = await self._admitted(request)
        async with attempt:
            send = super().send  # type: ignore[misc]  # of the client viewed
            response = await send(request, stream=stream, **options)
            if stream and not response.is_closed:
                response.stream = _metered_class(response.stream.__class__)(response, attempt)
                return response  # the attempt stays open until the stream ends
            outcome = _outcome(attempt.demand, response.status_code, response.headers, response.content)
            attempt.ended(outcome)
        used, demand = outcome.usage, attempt.demand
        if used is not None and demand.model is not None:
            self.counter.observe(demand.model, demand.input_tokens, used.prompt_tokens)
        return response

    async def _admitted(self, request: Any) -> Attempt:
        """Return an attempt that may be sent."""
        try:
            return await self.account.attempt(await self._demand(request)).begin()
        except openai.OpenAIError as error:
            if request.extensions.get(_UNWRAPS):
                raise NotSent(error) from None
            raise

    async def _demand(self, request: Any) -> Demand:
        """Return what a request asks of the limits and budgets, as far as its body can be read."""
        path, headers = request.url.path, request.headers
        endpoint = endpoint_of(path, request.method)
        demand = Demand(None)
        body: dict[str, Any] = {}
        if endpoint.metered:
            retry = headers.get("x-stainless-retry-count", "0") != "0"  # the SDK says so
            if not headers.get("content-type", "").startswith(_JSON):  # a form: its model is not at hand
                demand = Demand(path.rpartition("/")[2], max_output=0, retry=retry)
            elif body := _body_of(request):
                tokens = await self.counter.count_input(body)
                most_output = max_output(body, path)
                demand = Demand(body["model"], tokens, most_output, retry=retry, free=endpoint.free)
        most = await self.account.budgets.most(body, path, self.counter) if endpoint.billed else None
        return demand if most is None else demand._replace(most_cost=most)

    def __del__(self) -> None:
        """Leave closing to the client itself."""


def _body_of(request: Any) -> dict[str, Any]:
    """Return the JSON body of a request; an empty one where it is streamed or names no model."""
    try:
        body = read_object(request.content)
    except RuntimeError:
        return {}
    return body if isinstance(body.get("model"), str) else {}


def _outcome(demand: Demand, status: int, headers: Any, tail: bytes) -> Outcome:
    if status >= _BAD_REQUEST:
        return refused(status, headers, tail)
    usage = None if demand.model is None else read_usage(tail)  # a file may hold usage of other requests
    return Outcome(status, headers, usage)


@functools.lru_cache(maxsize=8)
def _metered_class(stream: type) -> type:
    interface = next(base for base in stream.__mro__ if base.__name__ == "AsyncByteStream")  # of either httpx
    return type("MeteredStream", (_MeteredStream, interface), {})


class _MeteredStream:
    """The body of a streamed answer: holds its slot until closed, then settles from the usage at its end."""

    def __init__(self, response: Any, attempt: Attempt) -> None:
        self._stream = response.stream
        self._status = response.status_code
        self._headers = response.headers
        self._attempt = attempt
        self._tail = Tail()
        if self._status < _BAD_REQUEST:  # they describe the limits now, not when the stream ends
            attempt.update_from_headers(self._headers)
            self._headers = None

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self._stream:
            self._tail.feed(chunk)
            yield chunk

    async def aclose(self) -> None:
        """Close the stream and give the slot back."""
        try:
            await self._stream.aclose()
        finally:
            self._settle()

    def _settle(self) -> None:
        demand = self._attempt.demand
        self._attempt.settle(_outcome(demand, self._status, self._headers, self._tail.read()))

    def __del__(self) -> None:
        """Give the slot back where the stream was dropped without being closed."""
        self._settle()


# Options of the SDK's constructor that may name another account.
_NAMES = ("api_key", "base_url", "data_residency", "organization", "project", "provider", "workload_identity")


def _signature() -> inspect.Signature:
    """Return the signature of the SDK's constructor, with `rate_limit` first, for help() and editors."""
    theirs = inspect.signature(openai.AsyncOpenAI.__init__)
    first, *rest = theirs.parameters.values()
    ours = inspect.Parameter("rate_limit", inspect.Parameter.KEYWORD_ONLY, default=None)
    return theirs.replace(parameters=[first, ours, *rest])


class AsyncOpenAI(SdkClient):
    """The SDK's `AsyncOpenAI`, paced: change the import and nothing else.

    Every HTTP attempt of every resource waits for its place within the requests and tokens per minute of its
    model, the SDK's own retries included. Constructor, resources, transport and errors stay the SDK's.

    Args:
        rate_limit: The limits; None: learn them from the response headers, and slow nothing down where the
            server sends none.
        **options: What `openai.AsyncOpenAI` takes, `http_client` of either httpx family included.
    """

    if TYPE_CHECKING:
        _account: Account

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

    else:

        def __init__(self, *, rate_limit: Any = None, http_client: Any = None, **options: Any) -> None:
            view = http_client if isinstance(getattr(http_client, "account", None), Account) else None
            self._account = view.account if view is not None else Account()
            if isinstance(rate_limit, Account):
                self._account = rate_limit
            elif rate_limit is not None:
                self._account = Account(config_of("rate_limit", rate_limit, RateLimitConfig))
            self._counter = view.counter if view is not None else TokenCounter()
            plain = view.original if view is not None else http_client or default_client()
            if hasattr(plain, "send"):  # anything else is for the SDK to refuse
                plain = paced(plain, self._account, self._counter)
            super().__init__(http_client=plain, **options)
            self._account.ledger.pricer_for(str(self.base_url))
            self._account.limiter.share(*account_of(self))

        __init__.__signature__ = _signature()

        def copy(self, *, _extra_kwargs: Any = None, **options: Any) -> Any:
            """Copy, with the same limits; a copy for another account has them to itself.

            Args:
                **options: What is to differ, as the SDK's `copy` takes it.

            Returns:
                The copy, on the same connections.
            """
            named = [name for name in _NAMES if options.get(name) is not None]
            same = all(_as_text(options[name]) == _as_text(getattr(self, name, None)) for name in named)
            account = self._account if same else self._account.fresh()
            return super().copy(_extra_kwargs={"rate_limit": account, **(_extra_kwargs or {})}, **options)

        with_options = copy

        async def request(self, *args: Any, **options: Any) -> Any:
            """Send as the SDK does; our own errors are raised at once and as they are.

            Args:
                *args: What the SDK's `request` takes.
                **options: Likewise.

            Returns:
                What the SDK's returns.
            """
            try:
                return await super().request(*args, **options)
            except NotSent as caught:
                raise caught.args[0] from None

        async def _prepare_request(self, request: Any) -> Any:
            request.extensions[_UNWRAPS] = True
            return await super()._prepare_request(request)

    @property
    def stats(self) -> ClientStats:
        """What went through this client and its copies so far."""
        return self._account.stats


def account_of(client: openai.AsyncOpenAI) -> tuple[str | None, ...]:
    """Return the account that a client of the SDK uses: key, server, organisation, project."""
    return client.api_key, _as_text(client.base_url), client.organization, client.project


def _as_text(value: object) -> str:
    """Return a key, a name or an address as text; addresses end with a slash or not."""
    return str(value).rstrip("/")
