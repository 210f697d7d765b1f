"""The drop-in client: the SDK's own `AsyncOpenAI`, with every attempt paced."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import openai

from openai_eval_client import _clients
from openai_eval_client._governor import Governor
from openai_eval_client._http import UNWRAPS, Refused, govern
from openai_eval_client._tokens import TokenCounter
from openai_eval_client.config import RateLimitConfig
from openai_eval_client.errors import ValidationError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from openai_eval_client.models import ClientStats

_ACCOUNT = (
    "api_key",
    "base_url",
    "data_residency",
    "organization",
    "project",
    "provider",
    "workload_identity",
)


def _signature() -> inspect.Signature:
    """Return the signature of the SDK's constructor, with `rate_limit` first, for help() and editors."""
    theirs = inspect.signature(openai.AsyncOpenAI.__init__)
    first, *rest = theirs.parameters.values()
    ours = inspect.Parameter("rate_limit", inspect.Parameter.KEYWORD_ONLY, default=None)
    return theirs.replace(parameters=[first, ours, *rest])


class AsyncOpenAI(_clients.AsyncOpenAI):
    """The SDK's `AsyncOpenAI`, paced: change the import and nothing else.

    Every HTTP attempt of every resource waits for its place within the requests and tokens per minute of its
    model, the SDK's own retries included. Constructor, resources, transport and errors stay the SDK's.

    Args:
        rate_limit: The limits; None: learn them from the response headers, and slow nothing down where the
            server sends none.
        **options: What `openai.AsyncOpenAI` takes, `http_client` of either httpx family included.
    """

    if TYPE_CHECKING:
        _governor: Governor

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
            view = http_client if isinstance(getattr(http_client, "governor", None), Governor) else None
            self._governor = _governor(rate_limit, view)
            self._counter = view.counter if view is not None else TokenCounter()
            plain = view.original if view is not None else http_client or _clients.default_client()
            if hasattr(plain, "send"):  # anything else is for the SDK to refuse
                plain = govern(plain, self._governor, self._counter)
            super().__init__(http_client=plain, **options)
            self._governor.ledger.pricer_for(str(self.base_url))
            self._governor.share(*account_of(self))

        __init__.__signature__ = _signature()

        def copy(self, *, _extra_kwargs: Any = None, **options: Any) -> Any:
            """Copy, on the same budget; one for another account has the same limits to itself.

            Args:
                **options: What is to differ, as the SDK's `copy` takes it.

            Returns:
                The copy, on the same connections.
            """
            named = {name: value for name in _ACCOUNT if (value := options.get(name)) is not None}
            same = all(_same(value, getattr(self, name, None)) for name, value in named.items())
            governor = self._governor if same else self._governor.fresh()
            return super().copy(_extra_kwargs={"rate_limit": governor, **(_extra_kwargs or {})}, **options)

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
            except Refused as refused:
                raise refused.error from None

        async def _prepare_request(self, request: Any) -> Any:
            request.extensions[UNWRAPS] = True
            return await super()._prepare_request(request)

    @property
    def stats(self) -> ClientStats:
        """What went through this client and its copies so far."""
        return self._governor.stats


def account_of(client: openai.AsyncOpenAI) -> tuple[str | None, ...]:
    """Return whose limits a client of the SDK spends: key, server, organisation, project."""
    return client.api_key, str(client.base_url).rstrip("/"), client.organization, client.project


def _same(value: object, other: object) -> bool:
    """Whether a key, a name or an address is the one already used; addresses end with a slash or not."""
    return str(value).rstrip("/") == str(other).rstrip("/")


def _governor(rate_limit: Any, view: Any) -> Governor:
    if isinstance(rate_limit, Governor):
        return rate_limit
    if rate_limit is None and view is not None:
        governor: Governor = view.governor
        return governor
    if rate_limit is not None and not isinstance(rate_limit, RateLimitConfig):
        message = f"rate_limit: must be of class RateLimitConfig, not {type(rate_limit).__name__}"
        raise ValidationError(message, field="rate_limit")
    return Governor(rate_limit)
