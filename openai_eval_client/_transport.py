"""The connections of `OpenAIClient`: aiohttp behind httpx's transport interface.

The SDK's own aiohttp transport works alike, under httpx's client, which takes as long again as aiohttp does:
authentication, redirects, cookies and hooks that no call of the API uses. `fetch` is the road past them.
"""

from __future__ import annotations

import functools
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from openai_eval_client.errors import sdk_httpx

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    import aiohttp
    from typing_extensions import Self

_KEEP_ALIVE = 5.0  # seconds that an idle connection is kept, as httpx does: servers close theirs soon after
_CHUNK = 16_384  # bytes of a stream
_LONGEST_HEADER = 100 * 1024  # bytes of one, as httpx allows; aiohttp's own bound is 8190


class Transport:
    """The connections of one event loop, as many as are in flight; made on the loop that uses them.

    Args:
        secure: Whether TLS is spoken, with the certificates that httpx trusts.
    """

    def __init__(self, *, secure: bool) -> None:
        import aiohttp

        tls = sdk_httpx().create_ssl_context() if secure else True
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE, ssl=tls)
        jar = aiohttp.DummyCookieJar()
        self._session = aiohttp.ClientSession(
            connector=connector, cookie_jar=jar, auto_decompress=False, max_field_size=_LONGEST_HEADER
        )

    async def fetch(self, request: Any) -> Any:
        """Send a request and return the whole response; its body is decoded.

        Raises:
            TransportError: httpx's, of the kind that fits.
        """
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
        total=None, connect=connect, sock_read=read
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
    """Return httpx's error, which the SDK knows, for aiohttp's; raise any other.

    Of aiohttp's errors, those of a response show the request's headers, and so the key: they are not even
    the cause, and what is returned is to be raised where they are no longer handled.
    """
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
