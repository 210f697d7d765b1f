"""Redirects, followed as httpx does, but without credentials where they lead to another server."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any

from openai_eval_client._sdk.views import View, view_of
from openai_eval_client.errors import sdk_httpx

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

_httpx: Any = sdk_httpx()  # httpx or httpx2: the one that the SDK is built on

# What a header that is a credential may have in its name, or at the start of its value.
_NAMES = re.compile("auth|key|token|secret|cookie|credential|pass|session|signature|jwt|hmac", re.IGNORECASE)
_VALUES = re.compile(r"(?:basic|bearer|digest)\s|sk-", re.IGNORECASE)
_NO_SECRET = frozenset({"idempotency-key"})
_LAST_PORT = 65535
_PORTS = {"http": 80, "https": 443}


async def send_following(
    send: Callable[..., Awaitable[Any]],
    client: Any,
    request: Any,
    *,
    follow_redirects: Any = None,
    **options: Any,
) -> Any:
    """Send by a client's `send` and follow redirects as httpx does, but take no credential elsewhere."""
    if not isinstance(follow_redirects, bool):
        follow_redirects = getattr(client, "follow_redirects", None)
    if follow_redirects is not None:
        options["follow_redirects"] = False
    response = await send(request, **options)
    history: list[Any] = []
    while follow_redirects and response.has_redirect_location:
        request = response.next_request
        is_valid = request is not None and (request.url.port or 0) <= _LAST_PORT
        if not is_valid or len(history) == client.max_redirects:
            await response.aclose()
            kind = _httpx.TooManyRedirects if is_valid else _httpx.RemoteProtocolError
            raise kind("the server redirects to no valid URL, or too often", request=response.request)
        history.append(response)
        await response.aclose()
        if not _is_same_server(response.request.url, request.url):
            options["auth"] = None
            _drop_secrets(request.headers)
        response = await send(request, **options)
        response.history = list(history)
    return response


class _Guarded(View):
    """What a guarded view adds to the class of the client that it views."""

    __slots__ = ()

    @property
    def send(self) -> Any:
        """Send; credentials do not follow a redirect to another server."""
        # a property goes before what was set on the client viewed, whose whole state it shares
        send = vars(self).get("send") or super().send  # type: ignore[misc]  # of the client viewed
        return functools.partial(send_following, send, self)


def guarded(client: Any) -> Any:
    """Return a view of a caller's own HTTP client, whose credentials do not follow a redirect elsewhere."""
    bases = type(client).__mro__
    is_known = any(base.__name__ == "AsyncClient" and base.__module__.startswith("httpx") for base in bases)
    if not is_known or isinstance(client, View):  # a view is guarded; the others are for the SDK to refuse
        return client
    return view_of(client, _Guarded)


def _is_same_server(before: Any, after: Any) -> bool:
    """Return whether what one address may know, another may: it is the same, or its form with TLS."""
    (old, old_port), (new, new_port) = (
        ((url.scheme, url.host), url.port or _PORTS.get(url.scheme)) for url in (before, after)
    )
    if old == new:
        return bool(old_port == new_port)
    upgraded = (old[0], old_port, new[0], new_port) == ("http", 80, "https", 443)
    return upgraded and bool(old[1] == new[1])


def _drop_secrets(headers: Any) -> None:
    """Drop every header that looks like a credential, by its name or its value."""
    for name, value in list(headers.multi_items()):
        if (_NAMES.search(name) or _VALUES.match(value)) and name.lower() not in _NO_SECRET:
            headers.pop(name, None)
