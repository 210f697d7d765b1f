"""Puts answers on the wire, whole or broken."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from aiohttp import web

from ._faults import NONSENSE

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._exchange import Exchange

JSON_TYPE = "application/json"
SSE_TYPE = "text/event-stream; charset=utf-8"
HTML = b"<html><head><title>502 Bad Gateway</title></head><body><h1>Bad Gateway</h1></body></html>"
DRIP_EXTRA = 1.0


@dataclass(slots=True)
class Delivery:
    """An answer ready to leave.

    Attributes:
        frames: The body, whole or event by event.
        stream: Whether it is a stream of events.
        latency: Seconds an event stream is spread over; the body of one piece has waited already.
        head: Makes the headers, when the first byte leaves.
    """

    frames: list[bytes]
    stream: bool
    latency: float
    head: Callable[[], dict[str, str]]


async def deliver(exchange: Exchange, delivery: Delivery) -> web.StreamResponse:
    """Send an answer the way the exchange's fault wants it."""
    fault, frames, latency = exchange.fault, delivery.frames, delivery.latency
    if fault == "garbage":
        return _whole(exchange, delivery, HTML, "text/html; charset=utf-8")
    if fault == "truncate":
        return await _truncated(exchange, delivery)
    if fault == "cut_json":
        frames = _cut(frames)
    if fault == "slow_drip":
        frames = [bytes((byte,)) for byte in b"".join(frames)]
        return await _paced(exchange, delivery, frames, latency + DRIP_EXTRA)
    if delivery.stream:
        return await _paced(exchange, delivery, frames, latency)
    return _whole(exchange, delivery, frames[0], JSON_TYPE)


def _cut(frames: list[bytes]) -> list[bytes]:
    """The body up to the middle of its middle frame."""
    middle = len(frames) // 2
    frame = frames[middle]
    return [*frames[:middle], frame[: len(frame) // 2]]


def _headers(exchange: Exchange, delivery: Delivery, content_type: str) -> dict[str, str]:
    headers = {"content-type": content_type, **delivery.head()}
    if exchange.fault == "malformed_headers":
        headers.update(NONSENSE)
    exchange.record(200)
    return headers


def _whole(exchange: Exchange, delivery: Delivery, body: bytes, content_type: str) -> web.Response:
    return web.Response(body=body, headers=_headers(exchange, delivery, content_type))


async def _begun(exchange: Exchange, delivery: Delivery) -> web.StreamResponse:
    content_type = SSE_TYPE if delivery.stream else JSON_TYPE
    response = web.StreamResponse(headers=_headers(exchange, delivery, content_type))
    if not delivery.stream:
        response.content_length = sum(map(len, delivery.frames))
    await response.prepare(exchange.request)
    return response


async def _paced(
    exchange: Exchange, delivery: Delivery, frames: list[bytes], seconds: float
) -> web.StreamResponse:
    """Send frame after frame, evenly over so many seconds, the headers with the first."""
    start, pause = time.monotonic(), seconds / len(frames)
    await asyncio.sleep(pause)
    response = await _begun(exchange, delivery)
    for number, frame in enumerate(frames[:-1], start=2):
        await response.write(frame)
        await asyncio.sleep(start + number * pause - time.monotonic())
    exchange.leave()
    await response.write(frames[-1])
    return response


async def _truncated(exchange: Exchange, delivery: Delivery) -> NoReturn:
    """Send half the bytes announced, then close."""
    body = b"".join(delivery.frames)
    await asyncio.sleep(delivery.latency)
    response = await _begun(exchange, delivery)
    exchange.leave()
    await response.write(body[: len(body) // 2])
    await drop(exchange)


async def drop(exchange: Exchange) -> NoReturn:
    """Close the connection under the request."""
    exchange.record(0)
    exchange.leave()
    if transport := exchange.request.transport:
        transport.close()
    await hang(exchange)


async def hang(exchange: Exchange) -> NoReturn:
    """Wait for the client to leave or the server to stop: either cancels this."""
    exchange.record(0)
    await asyncio.get_running_loop().create_future()
    raise AssertionError("nobody resolves this future")
