"""The HTTP clients under the SDK: one real client per event loop, on httpx's transport or on aiohttp's."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import weakref
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import openai

from openai_eval_client._transport import Transport
from openai_eval_client.errors import sdk_httpx

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

_PLAIN = {"content", "timeout"}  # what is given of a request that is built at once
_AUTOMATIC = {"content-length", "host", "transfer-encoding"}  # headers; who sets one means something by it
_URLS = 256  # of different URLs that are remembered: those with ids are many
_DECODED = "accept-encoding"  # what httpx can decode: of its client's own headers the one that matters


class AsyncOpenAI(openai.AsyncOpenAI):  # by its name the SDK calls itself in the User-Agent
    """The SDK's client, which does not take apart again the URL that it asks for again."""

    if not TYPE_CHECKING:
        _prepared: tuple[Any, dict[str, Any]] = None, {}

        def _prepare_url(self, url: str) -> Any:
            base, known = self._prepared
            if base is not self.base_url or len(known) >= _URLS:
                base, known = self._prepared = self.base_url, {}
            if url not in known:
                known[url] = super()._prepare_url(url)
            return known[url]


class LoopLocalClient(openai.DefaultAsyncHttpxClient):
    """An HTTP client that opens one real client per event loop, so that it outlives `asyncio.run`.

    Connections belong to the loop they were opened on. The real client of a loop is closed when the loop
    shuts down, when this one is closed, or when it is garbage collected.

    Args:
        factory: Makes a real client, on the loop that is to use it.
    """

    def __init__(self, factory: Callable[[], Any]) -> None:
        super().__init__(transport=_Unused())  # type: ignore[arg-type]  # its base differs between SDKs
        self._factory = factory
        self._real: dict[asyncio.AbstractEventLoop, tuple[Any, AsyncGenerator[None, None]]] = {}
        self._shut = False
        weakref.finalize(self, _close_later, self._real).atexit = False

    @property
    def is_closed(self) -> bool:
        """Whether `aclose` was called."""
        return self._shut

    async def send(self, request: Any, **options: Any) -> Any:
        """Send through the running loop's own client."""
        return await (await self._of_this_loop()).send(request, **options)

    async def aclose(self) -> None:
        """Close this loop's client now, and those of other threads' loops soon, on their own loops."""
        self._shut = True
        _, guard = self._real.pop(asyncio.get_running_loop(), (None, None))
        if guard is not None:
            await guard.aclose()
        _close_later(self._real)

    async def _of_this_loop(self) -> Any:
        if self._shut:
            raise RuntimeError("Cannot send a request, as the client has been closed.")
        loop = asyncio.get_running_loop()
        if loop not in self._real:
            for closed in [known for known in list(self._real) if known.is_closed()]:
                self._real.pop(closed, None)
            client = self._factory()
            guard = _closing(client, functools.partial(self._real.pop, loop, None))
            self._real[loop] = client, guard
            await guard.__anext__()
        return self._real[loop][0]


async def _closing(client: Any, forget: Callable[[], Any]) -> AsyncGenerator[None, None]:
    """Close `client` when the running loop shuts down: a loop finishes its started async generators last."""
    try:
        yield
    finally:
        forget()
        await client.aclose()


def _close_later(real: dict[asyncio.AbstractEventLoop, tuple[Any, AsyncGenerator[None, None]]]) -> None:
    """Close clients on their own loops, where those still run; nobody waits for it."""
    for loop, (_, guard) in list(real.items()):
        with contextlib.suppress(RuntimeError):  # the loop has closed, and with it its connections
            loop.call_soon_threadsafe(_close_soon, loop, guard)


def _close_soon(loop: asyncio.AbstractEventLoop, guard: AsyncGenerator[None, None]) -> None:
    closing = loop.create_task(_finish(guard))
    _CLOSING.add(closing)  # a loop keeps only weak references to its tasks
    closing.add_done_callback(_CLOSING.discard)


async def _finish(guard: AsyncGenerator[None, None]) -> None:
    await guard.aclose()


_CLOSING: set[asyncio.Task[None]] = set()


class _Unused:
    """The transport of a LoopLocalClient itself, which sends nothing."""

    async def aclose(self) -> None:
        """Close nothing."""


class _Direct(openai.DefaultAsyncHttpxClient):
    """The real client of a FastClient: httpx's, on our transport."""

    def __init__(self, transport: Transport) -> None:
        super().__init__(transport=transport)  # type: ignore[arg-type]  # its base differs between SDKs
        self.fetch = transport.fetch


class FastClient(LoopLocalClient):
    """A client on aiohttp that spares the SDK's plain requests what httpx's client does for others.

    A plain request is one with a body in memory and a whole answer, as nearly all are. It is built from what
    the SDK gives alone, and sent without httpx's authentication, redirects, cookies and hooks: a third less
    time. Streams, uploads and redirects take httpx's road, on the same connections.

    Args:
        secure: Whether TLS is spoken.
    """

    def __init__(self, *, secure: bool) -> None:
        super().__init__(lambda: _Direct(Transport(secure=secure)))
        self._decoded = (_DECODED, self.headers[_DECODED])

    def build_request(self, method: str, url: Any, *, headers: Any = None, **options: Any) -> Any:
        """Build a request as httpx does; that of a newer SDK, whose body is bytes, in half the time."""
        given = {name: value for name, value in options.items() if value is not None}
        content = given.get("content")
        plain = isinstance(headers, list) and given.keys() <= _PLAIN
        names = {name.lower() for name, _ in headers} if plain else set()
        if not plain or not isinstance(content, bytes) or names & _AUTOMATIC:
            return super().build_request(method, url, headers=headers, **options)
        if _DECODED not in names:
            headers.append(self._decoded)
        whole, terms = _url(str(url)), sdk_httpx()
        request = terms.Request(
            method,
            whole,
            headers=[("Host", whole.netloc.decode()), *headers, ("Content-Length", str(len(content)))],
            stream=terms.ByteStream(content),
            extensions={"timeout": terms.Timeout(given.get("timeout")).as_dict()},
        )
        request.headers.encoding = "ascii"  # as they were encoded: httpx would look at each of them
        request.read()
        return request

    async def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:
        """Send through the running loop's connections."""
        real = await self._of_this_loop()
        if stream or options:
            return await real.send(request, stream=stream, **options)
        response = await real.fetch(request)
        return await real.send(request) if response.has_redirect_location else response


@functools.lru_cache(maxsize=_URLS)
def _url(url: str) -> Any:
    return sdk_httpx().URL(url)


def default_client() -> LoopLocalClient:
    """Return what the SDK uses by default."""
    return LoopLocalClient(openai.DefaultAsyncHttpxClient)


def fast_client(base_url: str) -> LoopLocalClient:
    """Return a client on aiohttp, or the SDK's default where a proxy applies to `base_url`."""
    parts = urlsplit(base_url)
    proxies = getproxies()
    proxied = parts.scheme in proxies or "all" in proxies
    if proxied and not proxy_bypass(parts.hostname or ""):
        return default_client()
    return FastClient(secure=parts.scheme == "https")
