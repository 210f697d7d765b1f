"""One HTTP attempt, from its arrival to its record, and the sending of its answer, whole or broken."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import uuid
from collections import Counter, deque
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, NoReturn

from aiohttp import web

from ._faults import MALFORMED_HEADERS, ApiError, fault_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._background import Background

OK = 200
JSON_TYPE = "application/json"
SSE_TYPE = "text/event-stream; charset=utf-8"
HTML = b"<html><head><title>502 Bad Gateway</title></head><body><h1>Bad Gateway</h1></body></html>"
DONE = b"\n\ndata: [DONE]\n\n"
DRIP_SECONDS = 1.0  # how much longer than its latency a slow drip takes


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One HTTP attempt on an API path, refused ones included.

    Attributes:
        index: Order of arrival, from 0; goes on counting after a reset.
        at: Arrival, in seconds since the server started.
        method: HTTP method.
        path: Path, /v1 included.
        model: The model asked for; None if the request named none.
        status: HTTP status; 0 if nothing was answered: dropped, hung, or the client left first.
        fault: The fault that was injected, if any.
        prompt_tokens: Tokens of the prompt; 0 if none was read.
        completion_tokens: Tokens generated; 0 if no answer was produced.
        charged_tokens: Tokens taken from the model's tokens-per-minute budget.
        body: The JSON request; None if there was none.
        headers: Request headers in lower case, without authorization.
        served: Whether an answer was produced, and is billed, even if it did not arrive whole. One made in
            the background counts, with its `completion_tokens`, once it has come to its end.
    """

    index: int
    at: float
    method: str
    path: str
    model: str | None
    status: int
    fault: str | None
    prompt_tokens: int
    completion_tokens: int
    charged_tokens: int
    body: dict[str, Any] | None
    headers: dict[str, str]
    served: bool

    def as_json(self) -> dict[str, Any]:
        """Return the fields by name, not copied."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


class Recorder:
    """Keeps calls and counters; written by the server's event loop, read from any thread."""

    def __init__(self, keep: int) -> None:
        self._lock = threading.Lock()
        # bodies stay unparsed until they are read: kept objects slow the garbage collector
        self._calls: deque[tuple[Call, bytes | None, Background | None]] = deque(maxlen=keep)
        self._counts: Counter[str] = Counter()
        self._arrived = 0
        self.generations = 0
        self.in_flight = 0
        self.max_in_flight = 0

    def arrive(self) -> int:
        index, self._arrived = self._arrived, self._arrived + 1
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        return index

    def note(self, call: Call, raw: bytes | None, background: Background | None) -> None:
        """Keep a call, its JSON body and what it started, and count its status and fault."""
        keys = {str(call.status) if call.status else call.fault or "disconnect", call.fault}
        with self._lock:
            self._calls.append((call, raw, background))
            self._counts.update(key for key in keys if key)

    def reset(self) -> None:
        """Forget everything but the requests in flight."""
        with self._lock:
            self._calls.clear()
            self._counts.clear()
        self.generations = 0
        self.max_in_flight = self.in_flight

    def calls(self) -> list[Call]:
        with self._lock:
            kept = list(self._calls)
        kept.sort(key=lambda one: one[0].index)
        return [_as_of_now(*one) for one in kept]

    def state(self) -> dict[str, Any]:
        with self._lock:
            counts = dict(self._counts)
        return {"counts": counts, "in_flight": self.in_flight, "max_in_flight": self.max_in_flight}


def _as_of_now(call: Call, raw: bytes | None, background: Background | None) -> Call:
    changed: dict[str, Any] = {} if raw is None else {"body": json.loads(raw)}
    if background and not background.billed:
        changed.update(served=False, completion_tokens=0)
    return replace(call, **changed) if changed else call


class Exchange:
    """One HTTP attempt under way; recorded once, before the first byte of its answer is sent."""

    def __init__(self, request: web.BaseRequest, recorder: Recorder, started: float) -> None:
        self.request = request
        self.ident = uuid.uuid4().hex
        self.model: str | None = None
        self.fault: str | None = None
        self.limit_headers: Callable[[], dict[str, str]] = dict  # makes the x-ratelimit-* headers
        self.extra: dict[str, str] = {}  # more headers of the answer
        self.background: Background | None = None  # what it started
        self.prompt_tokens = self.completion_tokens = self.charged_tokens = 0
        self.served = False
        self._recorder, self._started = recorder, started
        self._arrived = time.monotonic()
        self._index = recorder.arrive()
        self._raw: bytes | None = None
        self._in_flight, self._recorded = True, False

    def parse(self, raw: bytes) -> dict[str, Any]:
        """Return the JSON object of a request's body, and keep it for the record; raise a 400 for others."""
        try:
            body = json.loads(raw)
        except ValueError:
            body = None
        if not isinstance(body, dict):
            message = "We could not parse the JSON body of your request. The API expects a JSON object."
            raise ApiError(400, message)
        self._raw = raw
        return body

    def headers(self) -> dict[str, str]:
        """Return the headers that every answer carries, and those of the rate limits."""
        elapsed = time.monotonic() - self._arrived
        head = {"x-request-id": f"req_{self.ident}", "openai-processing-ms": str(int(elapsed * 1000))}
        return {**head, **self.limit_headers(), **self.extra}

    def record(self, status: int) -> None:
        """Record the outcome, unless one is recorded already."""
        if self._recorded:
            return
        self._recorded = True
        headers = {name.lower(): value for name, value in self.request.headers.items()}
        headers.pop("authorization", None)
        call = Call(
            index=self._index,
            at=self._arrived - self._started,
            method=self.request.method,
            path=self.request.path,
            model=self.model,
            status=status,
            fault=self.fault,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            charged_tokens=self.charged_tokens,
            body=None,
            headers=headers,
            served=self.served and status == OK,
        )
        self._recorder.note(call, self._raw, self.background)

    def leave(self) -> None:
        """Count the request out, once: before the last byte, so that its client then sees it gone."""
        if self._in_flight:
            self._in_flight = False
            self._recorder.in_flight -= 1

    async def fail(self, fault: str, unavailable_retry_after: float | None) -> NoReturn:
        """Do not answer: drop the connection, hang, or raise the API's error."""
        if fault == "drop":
            await self.drop()
        if fault == "hang":
            await self.hang()
        raise fault_error(fault, unavailable_retry_after)

    async def drop(self) -> NoReturn:
        """Close the connection under the request."""
        self.record(0)
        self.leave()
        if transport := self.request.transport:
            transport.close()
        await self.hang()

    async def hang(self) -> NoReturn:
        """Wait until the client leaves or the server stops: either cancels this."""
        self.record(0)
        await asyncio.get_running_loop().create_future()
        raise AssertionError("this future is never resolved")


@dataclass(slots=True)
class Delivery:
    """The answer to a generation, to be sent as the fault of its exchange says."""

    exchange: Exchange
    frames: list[bytes]  # the body: in one piece, or event by event
    stream: bool
    latency: float  # seconds over which a stream is spread; a body in one piece has waited already

    async def send(self) -> web.StreamResponse:
        match self.exchange.fault:
            case "garbage":
                return self._whole(HTML, "text/html; charset=utf-8")
            case "truncate":
                await self._truncate()
            case "json_done":
                return self._whole(self.frames[0] + DONE, JSON_TYPE)
            case "slow_drip":
                drops = [bytes((byte,)) for byte in b"".join(self.frames)]
                return await self._paced(drops, self.latency + DRIP_SECONDS)
            case "cut_json":  # all up to the middle of the middle frame
                middle = len(self.frames) // 2
                frame = self.frames[middle]
                self.frames = [*self.frames[:middle], frame[: len(frame) // 2]]
        if self.stream:
            return await self._paced(self.frames, self.latency)
        return self._whole(self.frames[0], JSON_TYPE)

    def _whole(self, body: bytes, content_type: str) -> web.Response:
        return web.Response(body=body, headers=self._headers(content_type))

    def _headers(self, content_type: str) -> dict[str, str]:
        headers = {"content-type": content_type, **self.exchange.headers()}
        if self.exchange.fault == "malformed_headers":
            headers.update(MALFORMED_HEADERS)
        self.exchange.record(200)
        return headers

    async def _begin(self) -> web.StreamResponse:
        response = web.StreamResponse(headers=self._headers(SSE_TYPE if self.stream else JSON_TYPE))
        if not self.stream:
            response.content_length = sum(map(len, self.frames))
        await response.prepare(self.exchange.request)
        return response

    async def _paced(self, pieces: list[bytes], seconds: float) -> web.StreamResponse:
        """Send piece after piece, evenly over so many seconds, the headers with the first."""
        start, pause = time.monotonic(), seconds / len(pieces)
        await asyncio.sleep(pause)
        response = await self._begin()
        for number, piece in enumerate(pieces[:-1], start=2):
            await response.write(piece)
            await asyncio.sleep(start + number * pause - time.monotonic())
        self.exchange.leave()
        await response.write(pieces[-1])
        return response

    async def _truncate(self) -> NoReturn:
        """Send half the bytes announced, then close."""
        body = b"".join(self.frames)
        await asyncio.sleep(self.latency)
        response = await self._begin()
        self.exchange.leave()
        await response.write(body[: len(body) // 2])
        await self.exchange.drop()
