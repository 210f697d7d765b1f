"""Whole answers, decoded and of a bounded size, whatever a server sends."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from openai_eval_client.errors import ResponseTooLargeError, sdk_httpx

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_httpx: Any = sdk_httpx()  # httpx or httpx2: the one that the SDK is built on

CODING = "content-encoding"
_MOST_CODINGS = 5  # of one body, one upon the other
# Bytes that a decoder is given at a time, so that what they decode to is bounded too: a megabyte of deflate,
# 32 of brotli, 8 of zstd.
_SLICE, _SLICES = 1024, {"br": 16, "zstd": 256}
_ON_LOOP = 4096  # encoded bytes: a megabyte or two once they are decoded; more are decoded in a thread
CARRIES = "openai_eval_client.carries"  # extension of a request whose sender unwraps `Carried`


class Carried(BaseException):
    """Holds an error of ours that is final; were it an Exception, the SDK would send again."""


def too_large(request: Any, largest: float) -> BaseException:
    """Return the error of an answer that is too large, in the form that its sender raises at once."""
    error = ResponseTooLargeError(int(largest), request=request)
    return Carried(error) if request.extensions.get(CARRIES) else error


async def read_whole(response: Any, largest: float) -> None:
    """Read a response that httpx streams: so many bytes at most, before they are decoded and after."""
    try:
        encoded = await _encoded(response, largest)
        body = await decoded(encoded, response.headers.get_list(CODING), response.request, largest)
    except BaseException:
        await response.aclose()
        raise
    response.aiter_bytes = _httpx.ByteStream(body).__aiter__
    try:
        await response.aread()
    finally:
        del response.aiter_bytes


async def _encoded(response: Any, largest: float) -> bytes:
    pieces, size = [], 0
    async with contextlib.aclosing(response.aiter_raw()) as raw:
        async for piece in raw:
            size += len(piece)
            if size > largest:
                raise too_large(response.request, largest)
            pieces.append(piece)
    return b"".join(pieces)


async def decoded(body: bytes, encodings: Iterable[str], request: Any, largest: float) -> bytes:
    """Decode a body as the values of its headers say: off the event loop, unless it is short."""
    codings = codings_in(encodings)
    if not codings:
        return body
    if len(body) <= _ON_LOOP:
        return _decode(body, codings, request, largest)
    return await asyncio.to_thread(_decode, body, codings, request, largest)


def codings_in(encodings: Iterable[str]) -> list[str]:
    """Return how a body is encoded, the outermost coding last, from the values of its headers."""
    names = (name.strip().lower() for value in encodings for name in value.split(","))
    return [name for name in names if name not in {"", "identity"}]


def _decode(body: bytes, codings: list[str], request: Any, largest: float) -> bytes:
    """Decode a body with httpx's decoders, until it is too large."""
    if len(codings) > _MOST_CODINGS:
        raise _httpx.DecodingError(f"encoded {len(codings)} times", request=request)
    pieces: Iterable[bytes] = [body]
    for coding in reversed(codings):
        headers, sliced = {CODING: coding}, Slices(pieces, coding)
        coded = _httpx.Response(200, headers=headers, stream=sliced, request=request)
        pieces = _up_to(largest, coded.iter_bytes(), request)
    return b"".join(pieces)


def _up_to(largest: float, pieces: Iterable[bytes], request: Any) -> Iterator[bytes]:
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > largest:
            raise too_large(request, largest)
        yield piece


class Slices(_httpx.SyncByteStream):  # type: ignore[misc]  # of either httpx
    """Encoded bytes in slices, each of as few as their decoder may be given."""

    def __init__(self, pieces: Iterable[bytes], coding: str) -> None:
        self._pieces = pieces
        self._size = _SLICES.get(coding, _SLICE)

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._pieces:
            for start in range(0, len(piece), self._size):
                yield piece[start : start + self._size]
