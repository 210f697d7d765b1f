"""What the simulated API does with a request; knows nothing of threads and processes."""

from __future__ import annotations

import asyncio
import json
import time
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from aiohttp import web

from ._batches.storage import Storage
from ._batches.upload import Form, read_form
from ._endpoints.answers import Ask, quarter_bytes
from ._endpoints.sse import dumps
from ._errors import ApiError, missing_key, quota_exhausted, unknown_model, unreadable_body, wrong_key
from ._exchange import Exchange
from ._faults import ERROR_STATUSES, Faults, Latency, fault_error, spoil_usage
from ._limits import Limits
from ._records import Recorder
from ._routes import UPLOAD, Generation, Stored, find
from ._wire import JSON_TYPE, Delivery, deliver, drop, hang

if TYPE_CHECKING:
    from ._options import Options

CONTROL = "/_sim/"
UNANSWERED = (*ERROR_STATUSES, "drop")
WHOLE = (*UNANSWERED, "garbage")  # in one piece even where a stream was asked for


class Simulation:
    """The API behind one listening socket. All of it runs in the server's event loop."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._count = options.count_tokens or quarter_bytes
        self._faults = Faults(options.faults, options.script or (), options.seed)
        self._latency = Latency(options.latency, options.latency_sigma, options.seed)
        self._models = set(options.models or ())
        self._started = time.monotonic()
        self.limits = Limits(options)
        self.recorder = Recorder(options.record)
        self.storage = Storage(options, self._count, self._know)
        self.server = web.Server(self.handle, handler_cancellation=True, access_log=None)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request, whatever it is."""
        if request.path.startswith(CONTROL):
            return await self._control(request)
        exchange = Exchange(request, self.recorder, self._started)
        try:
            return await self._answer(exchange)
        except ApiError as error:
            return self._refuse(exchange, error)
        except asyncio.CancelledError:
            exchange.abandon()
            raise
        finally:
            exchange.leave()

    def reset(self) -> None:
        """Forget the calls and fill the buckets."""
        self.recorder.reset()
        self.limits.refill()

    def state(self) -> dict[str, Any]:
        """Counters and gauges."""
        return {**self.recorder.state(), "connections": len(self.server.connections)}

    async def _answer(self, exchange: Exchange) -> web.StreamResponse:
        request = exchange.request
        if (request.method, request.path) == UPLOAD:
            form = await read_form(request)
            self._authorize(request)
            return await self._stored(exchange, "upload", "", form)
        raw = await request.content.read()
        self._authorize(request)
        route, parameters = find(request.method, request.path)
        if isinstance(route.endpoint, Generation):
            return await self._generate(exchange, route.endpoint, raw)
        if isinstance(route.endpoint, Stored):
            return await self._stored(exchange, route.endpoint.name, parameters.get("id", ""), raw)
        if model := parameters.get("model"):
            self._know(model)
        return self._reply(exchange, 200, route.endpoint.answer(sorted(self._models), parameters), {})

    def _authorize(self, request: web.BaseRequest) -> None:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise missing_key()
        if self._options.api_key not in (None, key.strip()):
            raise wrong_key(key.strip())

    def _know(self, model: str) -> None:
        if self._options.models is None:
            self._models.add(model)
        elif model not in self._models:
            raise unknown_model(model)

    async def _stored(
        self, exchange: Exchange, name: str, ident: str, sent: Form | bytes
    ) -> web.StreamResponse:
        told: Form | dict[str, Any] = {}
        if isinstance(sent, Form):
            told = sent
        elif name == "create":
            told, exchange.raw = _parsed(sent), sent
        answer = await self.storage.answer(exchange, name, ident, told)
        return answer if isinstance(answer, web.StreamResponse) else self._reply(exchange, 200, answer, {})

    async def _generate(self, exchange: Exchange, endpoint: Generation, raw: bytes) -> web.StreamResponse:
        body = _parsed(raw)
        exchange.raw = raw
        ask = endpoint.read(body, self._count)
        self._admit(exchange, ask)
        exchange.fault = self._faults.draw()
        latency = self._latency.draw()
        if exchange.fault == "429":
            raise self._spurious(exchange)
        if exchange.fault == "hang":
            await hang(exchange)
        stream = endpoint.stream if ask.stream and exchange.fault not in WHOLE else None
        if not stream:
            await asyncio.sleep(latency)
        if exchange.fault in UNANSWERED:
            await self._break(exchange)
        answer = spoil_usage(self._written(exchange, endpoint, ask), exchange.fault)
        frames = stream(ask, answer) if stream else [dumps(answer)]
        head = partial(self._headers, exchange)
        return await deliver(exchange, Delivery(frames, bool(stream), latency if stream else 0.0, head))

    def _admit(self, exchange: Exchange, ask: Ask) -> None:
        """Let the request in and charge it, or raise the error that keeps it out."""
        exchange.model, exchange.prompt_tokens = ask.model, ask.prompt_tokens
        self._know(ask.model)
        exchange.limited = True
        allowed = self._options.quota_exhausted_after
        if allowed is not None and self.recorder.generations >= allowed:
            raise quota_exhausted()
        tokens = ask.reserved(self._options.default_output)
        self.limits.admit(ask.model, tokens)
        exchange.charged_tokens = tokens
        if self._options.stamp == "admission":
            exchange.stamped = self.limits.headers(ask.model)

    async def _break(self, exchange: Exchange) -> NoReturn:
        """Fail without an answer, billing nothing."""
        self._settle(exchange, 0)
        if exchange.fault == "drop":
            await drop(exchange)
        raise fault_error(str(exchange.fault), self._options.unavailable_retry_after)

    def _spurious(self, exchange: Exchange) -> ApiError:
        """A 429 although there was room: charged nothing, and without headers."""
        self.limits.give_back(str(exchange.model), requests=1, tokens=exchange.charged_tokens)
        exchange.charged_tokens = 0
        exchange.limited, exchange.stamped = False, None
        return fault_error("429", None)

    def _written(self, exchange: Exchange, endpoint: Generation, ask: Ask) -> dict[str, Any]:
        """The answer, counted and charged."""
        body = endpoint.answer(ask, exchange.ident, self._options)
        usage = body["usage"]
        exchange.completion_tokens = usage["total_tokens"] - ask.prompt_tokens
        self._settle(exchange, usage["total_tokens"])
        self.recorder.generations += 1
        return body

    def _settle(self, exchange: Exchange, used: int) -> None:
        if self._options.charge == "actual":
            self.limits.give_back(str(exchange.model), tokens=exchange.charged_tokens - used)
            exchange.charged_tokens = used

    def _refuse(self, exchange: Exchange, error: ApiError) -> web.Response:
        return self._reply(exchange, error.status, error.body, error.headers)

    def _reply(self, exchange: Exchange, status: int, body: Any, extra: dict[str, str]) -> web.Response:
        headers = {"content-type": JSON_TYPE, **self._headers(exchange), **extra}
        exchange.record(status)
        return web.Response(status=status, body=dumps(body), headers=headers)

    def _headers(self, exchange: Exchange) -> dict[str, str]:
        limits = exchange.stamped
        if limits is None and exchange.limited:
            limits = self.limits.headers(str(exchange.model))
        return {**exchange.headers(), **(limits or {})}

    async def _control(self, request: web.BaseRequest) -> web.Response:
        """The routes by which the parent process looks in: state, calls, reset, limits."""
        match request.method, request.path.removeprefix(CONTROL):
            case "GET", "state":
                state = self.state()
                # the connection that asks is none of the client's
                return _control_reply({**state, "connections": state["connections"] - 1})
            case "GET", "batches":
                return _control_reply(self.storage.batches())
            case "GET", "calls":
                return _control_reply([call.as_json() for call in self.recorder.calls()])
            case "POST", "reset":
                self.reset()
            case "POST", "limits":
                self.limits.change(json.loads(await request.content.read()))
            case _:
                return web.Response(status=404)
        return _control_reply(None)


def _control_reply(value: Any) -> web.Response:
    return web.Response(body=dumps(value), content_type=JSON_TYPE)


def _parsed(raw: bytes) -> dict[str, Any]:
    try:
        body = json.loads(raw)
    except ValueError:
        raise unreadable_body() from None
    if not isinstance(body, dict):
        raise unreadable_body()
    return body
