"""HTTP clients under the SDK: aiohttp behind httpx's interface, one client for each event loop."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
import weakref
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import openai

from openai_eval_client.errors import sdk_httpx

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator

    import aiohttp
    from typing_extensions import Self


_KEEP_ALIVE = 5.0  # seconds that an idle connection is kept, as httpx does: servers close theirs soon after
_CHUNK = 16_384  # bytes of a stream
_LONGEST_HEADER = 100 * 1024  # bytes of one, as httpx allows; aiohttp's own bound is 8190


class Transport:
    """The connections of one event loop, as many as are in flight; made on the loop that uses them."""

    def __init__(self, *, secure: bool) -> None:
        import aiohttp

        tls = sdk_httpx().create_ssl_context() if secure else True
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE, ssl=tls)
        jar = aiohttp.DummyCookieJar()
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=jar,
            auto_decompress=False,
            max_field_size=_LONGEST_HEADER,
        )

    async def fetch(self, request: Any) -> Any:
        """Send a request and return the whole response; its body is decoded."""
        began = time.perf_counter()
        try:
            async with await self._sent(request) as answer:
                body = await answer.read()
        except Exception as error:  # noqa: BLE001  # what is not aiohttp's is raised again
            failure = _in_httpx_terms(error, request)
        else:
            response = _response(_whole_class(), answer, request, sdk_httpx().ByteStream(body))
            response.read()
            response.elapsed = timedelta(seconds=time.perf_counter() - began)
            return response
        raise failure

    async def handle_async_request(self, request: Any) -> Any:
        """Send a request of which httpx's client reads the answer piece by piece."""
        try:
            answer = await self._sent(request)
        except Exception as error:  # noqa: BLE001  # what is not aiohttp's is raised again
            failure = _in_httpx_terms(error, request)
        else:
            return _response(sdk_httpx().Response, answer, request, _stream_class()(answer, request))
        raise failure

    async def aclose(self) -> None:
        """Close the connections."""
        await self._session.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def _sent(self, request: Any) -> Any:
        from yarl import URL

        return self._session.request(
            request.method,
            URL(str(request.url), encoded=True),  # which yarl remembers
            headers=_headers(request.headers),
            data=_body(request),
            allow_redirects=False,
            timeout=_timeout(**request.extensions.get("timeout", {})),
            server_hostname=request.extensions.get("sni_hostname"),
        )


def _headers(headers: Any) -> list[tuple[str, str]]:
    encoding = headers.encoding
    return [(name.decode(encoding), value.decode(encoding)) for name, value in headers.raw]


def _body(request: Any) -> Any:
    try:
        return request.content or None
    except sdk_httpx().RequestNotRead:  # a file that is streamed: its length is known, or it goes in chunks
        request.headers.pop("transfer-encoding", None)  # aiohttp's business
        return request.stream


def _response(kind: Any, answer: aiohttp.ClientResponse, request: Any, body: Any) -> Any:
    reason = (answer.reason or "").encode("ascii", "ignore")
    said = {"http_version": b"HTTP/1.1", "reason_phrase": reason}
    return kind(answer.status, headers=answer.raw_headers, request=request, extensions=said, stream=body)


@functools.lru_cache(maxsize=64)
def _timeout(
    connect: float | None = None,
    read: float | None = None,
    write: float | None = None,  # noqa: ARG001  # aiohttp has none
    pool: float | None = None,  # noqa: ARG001  # nobody waits for a connection here
) -> aiohttp.ClientTimeout:
    import aiohttp

    return aiohttp.ClientTimeout(
        total=None,
        connect=connect,
        sock_read=read,
    )  # connect: with the name's look-up


@functools.cache
def _whole_class() -> type:
    return type("Response", (_Whole, sdk_httpx().Response), {})


class _Whole:
    """A response that has its body at hand; what is not encoded it reads without httpx's decoders."""

    status_code: int
    stream: Any
    headers: Any
    is_closed: bool
    is_stream_consumed: bool

    def iter_bytes(self, chunk_size: int | None = None) -> Iterator[bytes]:
        """Return the body, in pieces of that size."""
        if chunk_size is not None or self.is_closed or "content-encoding" in self.headers:
            pieces: Iterator[bytes] = super().iter_bytes(chunk_size)  # type: ignore[misc]  # of httpx's class
            return pieces
        self.is_closed = self.is_stream_consumed = True
        return iter(self.stream)

    def __reduce__(self) -> Any:
        """Pickle as one of httpx's own class."""
        return sdk_httpx().Response, (self.status_code,), self.__getstate__()


@functools.cache
def _stream_class() -> type:
    return type("Stream", (_Stream, sdk_httpx().AsyncByteStream), {})


class _Stream:
    """The body of an answer, as it comes."""

    def __init__(self, answer: aiohttp.ClientResponse, request: Any) -> None:
        self._answer = answer
        self._request = request

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._answer.content.iter_chunked(_CHUNK):
                yield chunk
        except Exception as error:  # noqa: BLE001  # what is not aiohttp's is raised again
            failure = _in_httpx_terms(error, self._request)
        else:
            return
        raise failure

    async def aclose(self) -> None:
        """Hand the connection back, or close it where the answer was not read to its end."""
        self._answer.release()


def _in_httpx_terms(error: Exception, request: Any) -> Exception:
    """Return httpx's error, which the SDK knows, for aiohttp's; raise any other."""
    # Of aiohttp's errors, those of a response show the request's headers, and so the key: they are not even
    # the cause, and what is returned is to be raised where they are no longer handled.
    import aiohttp

    terms = sdk_httpx()
    for theirs, ours in (
        (aiohttp.InvalidURL, terms.UnsupportedProtocol),
        (aiohttp.ConnectionTimeoutError, terms.ConnectTimeout),
        (aiohttp.ServerTimeoutError, terms.ReadTimeout),
        (aiohttp.ClientConnectorError, terms.ConnectError),
        (aiohttp.ClientError, terms.ReadError),
        (OSError, terms.ReadError),
    ):
        if isinstance(error, theirs):
            made: Exception = ours(str(error) or type(error).__name__, request=request)
            made.__cause__ = None if isinstance(error, aiohttp.ClientResponseError) else error
            return made
    raise error


_PLAIN = {"content", "timeout"}  # what is given of a request that is built at once
_AUTOMATIC = {"content-length", "host", "transfer-encoding"}  # headers; who sets one means something by it
_URLS = 256  # of different URLs that are remembered: those with ids are many
_DECODED = "accept-encoding"  # what httpx can decode: of its client's own headers the one that matters


class SdkClient(openai.AsyncOpenAI):
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


SdkClient.__name__ = openai.AsyncOpenAI.__name__  # the SDK puts it into the User-Agent


class LoopLocalClient(openai.DefaultAsyncHttpxClient):
    """An HTTP client that opens one real client per event loop, so that it outlives `asyncio.run`.

    Connections belong to the loop they were opened on. The real client of a loop is closed when the loop
    shuts down, when this one is closed, or when it is garbage collected.
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
