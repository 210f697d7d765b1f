"""HTTP clients under the SDK: aiohttp behind httpx's interface, one client for each event loop."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import os
import sys
import time
import weakref
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import openai

from openai_eval_client._log import warn
from openai_eval_client._runtime import running_loop
from openai_eval_client._sdk.reading import (
    CARRIES,
    CODING,
    Carried,
    Slices,
    codings_in,
    decoded,
    read_whole,
    too_large,
)
from openai_eval_client._sdk.redirects import send_following
from openai_eval_client._wire import clear_frames, masked, secrets_in
from openai_eval_client.config import LARGEST_RESPONSE
from openai_eval_client.errors import sdk_httpx

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable

    import aiohttp

T = TypeVar("T")

_httpx: Any = sdk_httpx()  # httpx or httpx2: the one that the SDK is built on

_KEEP_ALIVE = 5.0  # seconds that an idle connection is kept, as httpx does: servers close theirs soon after
_CHUNK = 16_384  # bytes of a stream
_LARGE = 65_536  # bytes of a body that are sent at a time, where it has more
_LONGEST_HEADER = 100 * 1024  # bytes of one, as httpx allows; aiohttp's own bound is 8190
_UPLOAD = "openai_eval_client.upload"  # extension of a request: its large body, while it is sent
_LARGEST = "openai_eval_client.largest"  # extension of a request: how many bytes its answer may have
_FETCHED = "openai_eval_client.fetched"  # extension of a request: its response, which httpx is to go on from


class Transport(_httpx.AsyncBaseTransport):  # type: ignore[misc]  # of either httpx
    """The connections of one event loop, as many as are in flight; made on the loop that uses them."""

    def __init__(self, tls: Any) -> None:
        import aiohttp

        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE, ssl=tls),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            max_field_size=_LONGEST_HEADER,
        )

    async def fetch(self, request: Any, largest: float) -> Any:
        """Send a request and return the whole response, decoded and of so many bytes at most."""
        began = time.perf_counter()
        answer, body = await _in_httpx_terms(self._read(request, largest), request)
        if CODING in answer.headers:
            body = await decoded(body, answer.headers.getall(CODING), request, largest)
        response = _response(_WholeResponse, answer, request, _httpx.ByteStream(body))
        response.read()
        response.elapsed = timedelta(seconds=time.perf_counter() - began)
        return response

    async def handle_async_request(self, request: Any) -> Any:
        """Send a request of which httpx's client reads the answer piece by piece."""
        if (fetched := request.extensions.pop(_FETCHED, None)) is not None:
            return fetched
        answer = await _in_httpx_terms(_sent(self._send(request), request), request)
        return _response(_httpx.Response, answer, request, _StreamedBody(answer, request))

    async def aclose(self) -> None:
        """Close the connections."""
        await self._session.close()

    async def _read(self, request: Any, largest: float) -> tuple[aiohttp.ClientResponse, bytes]:
        async with await _sent(self._send(request), request) as answer:
            pieces, size = [], 0
            while piece := await answer.content.readany():
                size += len(piece)
                if size > largest:
                    raise too_large(request, largest)
                pieces.append(piece)
            return answer, b"".join(pieces)

    def _send(self, request: Any) -> Any:
        from yarl import URL

        encoding = request.headers.encoding
        return self._session.request(
            request.method,
            URL(str(request.url), encoded=True),  # which yarl remembers
            headers=[(name.decode(encoding), value.decode(encoding)) for name, value in request.headers.raw],
            data=_body(request),
            allow_redirects=False,
            timeout=_timeout(**request.extensions.get("timeout", {})),
            server_hostname=request.extensions.get("sni_hostname"),
        )


def _body(request: Any) -> Any:
    try:
        content = request.content
        return _Upload(_httpx.ByteStream(content), request) if len(content) > _LARGE else content or None
    except _httpx.RequestNotRead:  # a file that is streamed: its length is known, or it goes in chunks
        request.headers.pop("transfer-encoding", None)  # aiohttp's business
        return _Upload(request.stream, request)


class _Upload:
    """A large body on its way, in pieces: aiohttp has no timeout for what a server does not take."""

    def __init__(self, stream: Any, request: Any) -> None:
        self._stream = stream
        self.asked_at: float | None = None  # loop time of when a piece was handed over that is not taken yet
        request.extensions[_UPLOAD] = self

    async def __aiter__(self) -> AsyncIterator[bytes]:
        loop = asyncio.get_running_loop()
        async for chunk in self._stream:
            for start in range(0, len(chunk), _LARGE):
                self.asked_at = loop.time()
                yield chunk[start : start + _LARGE]
        self.asked_at = None


async def _sent(sending: Awaitable[T], request: Any) -> T:
    """Await aiohttp's request; one whose body is not taken within the timeout for writing fails."""
    upload = request.extensions.pop(_UPLOAD, None)
    seconds = request.extensions.get("timeout", {}).get("write")
    if upload is None or seconds is None:
        return await sending
    call, loop = asyncio.ensure_future(sending), asyncio.get_running_loop()
    try:
        while not (await asyncio.wait({call}, timeout=seconds))[0]:
            if upload.asked_at is not None and loop.time() - upload.asked_at >= seconds:
                raise _httpx.WriteTimeout("the server does not take the request", request=request)
        return call.result()
    finally:
        call.cancel()


@functools.lru_cache(maxsize=64)
def _timeout(connect: float | None = None, read: float | None = None, **_: object) -> aiohttp.ClientTimeout:
    """Return aiohttp's form of httpx's timeouts: `connect` counts the look-up of the name too."""
    import aiohttp

    return aiohttp.ClientTimeout(total=None, connect=connect, sock_read=read)


def _response(kind: Any, answer: aiohttp.ClientResponse, request: Any, body: Any) -> Any:
    reason = (answer.reason or "").encode("ascii", "ignore")
    more = {"http_version": b"HTTP/1.1", "reason_phrase": reason}
    return kind(answer.status, headers=answer.raw_headers, request=request, extensions=more, stream=body)


class _WholeResponse(_httpx.Response):  # type: ignore[misc]  # of either httpx
    """A response that has its body at hand, decoded: it reads it without httpx's decoders."""

    is_closed: bool

    def iter_bytes(self, chunk_size: int | None = None) -> Any:
        """Return the body, in pieces of that size."""
        if chunk_size is not None or self.is_closed:
            return super().iter_bytes(chunk_size)
        self.is_closed = self.is_stream_consumed = True
        return iter(self.stream)

    def __reduce__(self) -> Any:
        """Pickle as one of httpx's own class."""
        return _httpx.Response, (self.status_code,), self.__getstate__()


class _StreamedBody(_httpx.AsyncByteStream):  # type: ignore[misc]  # of either httpx
    """The body of an answer, as it comes."""

    def __init__(self, answer: aiohttp.ClientResponse, request: Any) -> None:
        self._answer = answer
        self._request = request

    async def __aiter__(self) -> AsyncIterator[bytes]:
        codings = codings_in(self._answer.headers.getall(CODING, ()))
        while chunk := await _in_httpx_terms(self._answer.content.read(_CHUNK), self._request):
            for piece in Slices([chunk], codings[-1]) if codings else (chunk,):
                yield piece

    async def aclose(self) -> None:
        """Hand the connection back, or close it where the answer was not read to its end."""
        self._answer.release()


_WAY_OUT = "the SDK's own transport reads the next ones; http_client= takes another"


async def _in_httpx_terms(call: Awaitable[T], request: Any) -> T:
    """Await a call of aiohttp's, whose errors become httpx's: those the SDK knows."""
    try:
        return await call
    except Exception as error:
        import aiohttp

        text = str(error) or type(error).__name__
        kinds = (
            (aiohttp.InvalidURL, _httpx.UnsupportedProtocol),
            (aiohttp.ConnectionTimeoutError, _httpx.ConnectTimeout),
            (aiohttp.ServerTimeoutError, _httpx.ReadTimeout),
            (aiohttp.ClientConnectorError, _httpx.ConnectError),
            (aiohttp.ClientResponseError, _httpx.RemoteProtocolError),
            ((aiohttp.ClientError, OSError), _httpx.ReadError),
        )
        kind = next((ours for theirs, ours in kinds if isinstance(error, theirs)), None)
        if kind is None:
            raise
        shows_key = isinstance(error, aiohttp.ClientResponseError)  # it holds the request's headers
        if shows_key:
            why = " ".join(getattr(error, "message", "").split())
            text = f"the server's answer is not valid HTTP{f' ({why})' if why else ''}: {_WAY_OUT}"
        failure: Any = kind(masked(text, *secrets_in(request.headers)), request=request)
        failure.__cause__ = None if shows_key else clear_frames(error)
        failure.is_unreadable = shows_key
    try:
        raise failure  # here aiohttp's error is no longer handled, and so is not its context
    finally:
        failure.__context__ = None  # Python 3.10 may still take what that error came from


_PLAIN = {"content", "timeout"}  # the options of a request that is built at once
_AUTOMATIC = {"content-length", "host", "transfer-encoding"}  # headers that httpx adds unless they are given
_URLS = 256  # of different URLs that are remembered: those with ids are many
_CLOSED = "Cannot send a request, as the client has been closed."  # as httpx says it
_DECODED = "accept-encoding"  # what httpx can decode: of its client's own headers the one that matters


class SdkClient(openai.AsyncOpenAI):
    """The SDK's client, which prepares each URL once and raises what is final at once."""

    if not TYPE_CHECKING:

        async def request(self, *args: Any, **options: Any) -> Any:
            """Send as the SDK does.

            Args:
                *args: What the SDK's `request` takes.
                **options: Likewise.

            Returns:
                What the SDK's returns.
            """
            try:
                return await super().request(*args, **options)
            except Carried as caught:
                error = caught.args[0]
            raise error  # without the frames that saw the request

        async def _prepare_request(self, request: Any) -> Any:
            request.extensions[CARRIES] = True
            return await super()._prepare_request(request)

        _prepared: tuple[Any, dict[str, Any]] = None, {}

        def _prepare_url(self, url: str) -> Any:
            base, known = self._prepared
            if base is not self.base_url or len(known) >= _URLS:
                base, known = self._prepared = self.base_url, {}
            if url not in known:
                known[url] = super()._prepare_url(url)
            return known[url]


SdkClient.__name__ = openai.AsyncOpenAI.__name__  # the SDK puts it into the User-Agent


class _OfThisLoop(_httpx.AsyncBaseTransport):  # type: ignore[misc]  # of either httpx
    """The transport of a LoopLocalClient: that of the running loop's own client."""

    def __init__(self, client: LoopLocalClient) -> None:
        self._client = weakref.ref(client)  # no circle: it is closed as soon as it is dropped

    async def handle_async_request(self, request: Any) -> Any:
        """Send through the transport, or the proxy, of the running loop's own client."""
        client = self._client()
        if client is None:
            raise RuntimeError(_CLOSED)
        real = await client.of_this_loop()
        transport = real._transport_for_url(request.url)  # noqa: SLF001  # a proxy's, where one applies
        return await transport.handle_async_request(request)


class LoopLocalClient(openai.DefaultAsyncHttpxClient):
    """An HTTP client that opens one real client per event loop, so that it outlives `asyncio.run`."""

    # Connections belong to the loop they were opened on. The real client of a loop is closed when the loop
    # shuts down, when this one is closed, or when it is garbage collected. All else is this client's own:
    # event hooks, cookies, mounts, and the transport that a user puts in the place of it.

    def __init__(self, factory: Callable[[], Any], *made: Any, largest: int = LARGEST_RESPONSE) -> None:
        super().__init__(transport=_OfThisLoop(self))
        self._largest = largest  # bytes of a whole answer
        self._factory = factory
        self._made = list(made)  # clients for the first loops
        self._real: dict[asyncio.AbstractEventLoop, tuple[Any, AsyncGenerator[None, None]]] = {}
        self._shut = False
        weakref.finalize(self, _close_later, self._real).atexit = False

    @property
    def is_closed(self) -> bool:
        """Whether `aclose` was called."""
        return self._shut

    async def send(self, request: Any, **options: Any) -> Any:
        """Send as httpx does; credentials do not follow a redirect to another server."""
        return await send_following(self._send, self, request, **options)

    async def _send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:
        """Send once; an answer that is not streamed, or an error, is read within the limit."""
        response = await super().send(request, stream=True, **options)
        if not response.is_closed and (response.is_error or not stream):
            await read_whole(response, self._largest_of(request))
        return response

    def _largest_of(self, request: Any) -> float:
        """Return how many bytes an answer may have: of a file that is downloaded any number."""
        is_file = request.method == "GET" and request.url.path.endswith("/content")
        # those that follow a redirect have the extensions of the first one
        return float(request.extensions.setdefault(_LARGEST, math.inf if is_file else self._largest))

    async def aclose(self) -> None:
        """Close this loop's client now, and those of other threads' loops soon, on their own loops."""
        self._shut = True
        loop = running_loop()
        if loop in self._real:
            _, guard = self._real.pop(loop)
            await guard.aclose()
        _close_later(self._real)
        await super().aclose()  # what a user put in the place of its transport, or mounted

    async def of_this_loop(self) -> Any:
        """Return the running loop's own client, made now where it has none."""
        if self._shut:
            raise RuntimeError(_CLOSED)
        loop = asyncio.get_running_loop()
        if loop not in self._real:
            for closed in [known for known in list(self._real) if known.is_closed()]:
                self._real.pop(closed, None)
            _warn_of_mocks()
            try:
                client = self._made.pop()
            except IndexError:
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
    """Close clients on their own loops, where those still run, without waiting for it."""
    for loop, (_, guard) in list(real.items()):
        with contextlib.suppress(RuntimeError):  # the loop has closed, and with it its connections
            loop.call_soon_threadsafe(close_soon, guard)


def close_soon(thing: Any) -> None:
    """Have the running loop close something by its `aclose`."""
    closing = asyncio.ensure_future(thing.aclose())
    _CLOSING.add(closing)  # a loop keeps only weak references to its tasks
    closing.add_done_callback(_CLOSING.discard)


_CLOSING: set[asyncio.Future[None]] = set()


class _Direct(openai.DefaultAsyncHttpxClient):
    """The real client of a FastClient: httpx's, on our transport."""

    def __init__(self, transport: Transport) -> None:
        super().__init__(transport=transport)
        self.fetch = transport.fetch


class FastClient(LoopLocalClient):
    """A client on aiohttp that spares plain requests httpx's detours: a third less time."""

    # A plain request is one with a body in memory and a whole answer, as nearly all are. Streams, uploads and
    # redirects go through httpx, with its authentication, cookies and hooks, on the same connections.

    def __init__(self, *, secure: bool, largest: int = LARGEST_RESPONSE) -> None:
        tls = _from_environment(_httpx.create_ssl_context) if secure else True
        super().__init__(lambda: _Direct(Transport(tls)), largest=largest)
        self._instead: LoopLocalClient | None = None  # what sends once aiohttp cannot read the answers
        self._decoded = (_DECODED, self.headers[_DECODED])
        self._as_made = self._transport, self._headers.raw

    def _is_as_made(self) -> bool:
        """Return whether a request may go without what a user can change afterwards."""
        transport, hooks = self._as_made[0], self._event_hooks
        asked = self._instead or hooks["request"] or hooks["response"] or self._mounts or self._auth
        wrapped = self._transport is not transport or "handle_async_request" in vars(transport)
        return not asked and not wrapped and not _is_patched()

    async def of_this_loop(self) -> Any:
        """Return the running loop's own client."""
        if self._instead is None:
            return await super().of_this_loop()
        return await self._instead.of_this_loop()

    def build_request(self, method: str, url: Any, *, headers: Any = None, **options: Any) -> Any:
        """Build a request as httpx does; that of a newer SDK, whose body is bytes, in half the time."""
        given = {name: value for name, value in options.items() if value is not None}
        content = given.get("content")
        plain = isinstance(headers, list) and given.keys() <= _PLAIN
        names = {name.lower() for name, _ in headers} if plain else set()
        plain = plain and self._headers.raw == self._as_made[1] and not self.cookies
        if not plain or not isinstance(content, bytes) or names & _AUTOMATIC:
            return super().build_request(method, url, headers=headers, **options)
        if _DECODED not in names:
            headers.append(self._decoded)
        parsed = _url(str(url))
        request = _httpx.Request(
            method,
            parsed,
            headers=[("Host", parsed.netloc.decode()), *headers, ("Content-Length", str(len(content)))],
            stream=_httpx.ByteStream(content),
            extensions={"timeout": _httpx.Timeout(given.get("timeout")).as_dict()},
        )
        request.headers.encoding = "ascii"  # as they were encoded: httpx would look at each of them
        request.read()
        return request

    async def _send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:
        """Send once, through the running loop's connections."""
        try:
            if stream or options.keys() - {"follow_redirects"} or not self._is_as_made():
                if self._instead is None and _is_patched():
                    self._instead = default_client(self._largest)
                return await super()._send(request, stream=stream, **options)
            real = await self.of_this_loop()
            response = await real.fetch(request, self._largest_of(request))
            if "set-cookie" in response.headers:
                self.cookies.extract_cookies(response)
            if not response.has_redirect_location:
                return response
            request.extensions[_FETCHED] = response
            return await super()._send(request, **options)
        except _httpx.RemoteProtocolError as error:
            # it was answered, and may be billed: only the next attempt differs
            if self._instead is None and getattr(error, "is_unreadable", False):
                self._instead = LoopLocalClient(openai.DefaultAsyncHttpxClient, largest=self._largest)
                now = "the SDK's own transport reads them from now on"
                warn("answers are not valid HTTP for aiohttp: %s", now, event="transport_changed")
            raise

    async def aclose(self) -> None:
        """Close both transports."""
        if self._instead is not None:
            await self._instead.aclose()
        await super().aclose()


_url = functools.lru_cache(maxsize=_URLS)(_httpx.URL)
_CORE = _httpx.__name__.replace("httpx", "httpcore")


@functools.lru_cache(maxsize=64)
def _is_own(send: Any) -> bool:
    """Return whether what sends at the bottom of httpx is httpx's own, neither replaced nor wrapped."""
    family = str(getattr(send, "__module__", "")).partition(".")[0]
    return family in {"httpx", "httpx2", "httpcore", "httpcore2"} and not hasattr(send, "__wrapped__")


def _is_patched() -> bool:
    """Return whether a test's mock, or an instrumentor, has patched the SDK's own transport."""
    core = sys.modules.get(_CORE)
    return not _is_own(_httpx.AsyncHTTPTransport.handle_async_request) or (
        core is not None and not _is_own(core.AsyncConnectionPool.handle_async_request)
    )


def _warn_of_mocks() -> None:
    """Say that a test's mock does not see these requests: it is one of the family that the SDK left."""
    kinds = ("httpx", "AsyncHTTPTransport"), ("httpcore", "AsyncConnectionPool")
    found = [getattr(sys.modules.get(name), kind, None) for name, kind in kinds]
    sends = [kind.handle_async_request for kind in found if kind is not None]
    mocked = not all(_is_own(send) or hasattr(send, "__wrapped__") for send in sends)
    if mocked and _httpx.__name__ != "httpx":
        instead = "pass http_client=httpx.AsyncClient()"
        warn("httpx is mocked, and these requests go through httpx2: %s", instead, event="not_mocked")


def _from_environment(make: Callable[[], T]) -> T:
    """Make what depends on the environment, as the SDK does; an error names the variables, no password."""
    try:
        return make()
    except OSError as error:  # of certificates, where the file is not named
        path = os.environ.get("SSL_CERT_FILE")
        if error.filename is None and path:
            error.filename = f"SSL_CERT_FILE={path}"
        raise
    except (ImportError, ValueError, _httpx.InvalidURL) as error:
        kinds = (ImportError, _httpx.InvalidURL, ValueError)
        kind = next(kind for kind in kinds if isinstance(error, kind))
        # what follows the colon may be a part of a password
        why = str(error).partition(":")[0] if kind is _httpx.InvalidURL else error
        names = ", ".join(sorted(name for name in os.environ if name.lower().endswith("_proxy")))
        failure = kind(f"the proxy that {names} names cannot be used: {why}")
    raise failure


def default_client(largest: int = LARGEST_RESPONSE) -> LoopLocalClient:
    """Return what the SDK uses by default."""
    make = openai.DefaultAsyncHttpxClient
    return LoopLocalClient(make, _from_environment(make), largest=largest)


def fast_client(base_url: str, largest: int = LARGEST_RESPONSE) -> LoopLocalClient:
    """Return a client on aiohttp, or the SDK's default where a proxy applies to `base_url`."""
    parts = urlsplit(base_url)
    has_proxy = {parts.scheme, "all"} & getproxies().keys()
    if has_proxy and not proxy_bypass(parts.hostname or ""):
        return default_client(largest)
    return FastClient(secure=parts.scheme == "https", largest=largest)
