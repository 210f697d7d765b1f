"""What the simulated API does with a request; knows nothing of threads and processes."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from aiohttp import web

from ._batches import Storage, read_form
from ._catalog import REFUSALS, Refusal, spoil
from ._endpoints import RESPONSES, Ask, Generation, dumps, quarter_bytes
from ._exchange import JSON_TYPE, OK, Delivery, Exchange, Recorder
from ._faults import FAULTS, ApiError, Faults, Latency, Script, fault_error, missing_key, wrong_key
from ._limits import Limits
from ._options import script_parts
from ._routes import UPLOAD, find

if TYPE_CHECKING:
    from ._options import Options

CONTROL = "/_sim/"
SCRIPTED = "scripted"  # the name of an answer that a script gives in full
UNANSWERED = ("500", "503", "408", "409", "drop")  # charged all the same
WHOLE = (*UNANSWERED, "garbage", "json_done", "wrong_types")  # in one piece even if a stream was asked for


class Simulation:
    """The API behind one listening socket; all of it runs in the server's event loop."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._count = options.count_tokens or quarter_bytes
        names, rules = script_parts(options.script or ())
        self._script = Script(rules)
        self._faults = Faults(options.faults, names, options.seed)
        self._latency = Latency(options.latency, options.latency_sigma, options.seed)
        self._models = set(options.models or ())
        self._started = time.monotonic()
        self.limits = Limits(options)
        self.recorder = Recorder(options.record)
        self.storage = Storage(options, self._count, self._check_model)
        self.server = web.Server(self.handle, handler_cancellation=True, access_log=None)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.path.startswith(CONTROL):
            return await self._control(request)
        exchange = Exchange(request, self.recorder, self._started)
        try:
            return await self._answer(exchange)
        except ApiError as error:
            return _reply(exchange, error.body, error.status, error.headers)
        except asyncio.CancelledError:  # the client has left, or the server stops
            exchange.fault = None
            exchange.record(0)
            raise
        except ConnectionResetError:  # it has left, and this was not cancelled yet
            exchange.fault = None
            exchange.record(0)
            raise asyncio.CancelledError from None
        finally:
            exchange.leave()

    def reset(self) -> None:
        self.recorder.reset()
        self.limits.refill()

    def state(self) -> dict[str, Any]:
        return {**self.recorder.state(), "connections": len(self.server.connections)}

    async def _answer(self, exchange: Exchange) -> web.StreamResponse:
        request = exchange.request
        form = await read_form(request) if (request.method, request.path) == UPLOAD else None
        raw = await request.content.read()  # nothing is left of a form
        self._authorize(request)
        route, parameters = find(request.method, request.path)
        if isinstance(route.endpoint, Generation):
            return await self._generate(exchange, route.endpoint, raw)
        if route.endpoint == "list_models":
            models = [_model_object(name) for name in sorted(self._models)]
            return _reply(exchange, {"object": "list", "data": models})
        if route.endpoint == "retrieve_model":
            self._check_model(parameters["model"])
            return _reply(exchange, _model_object(parameters["model"]))
        answer = await self.storage.answer(exchange, route.endpoint, parameters.get("id", ""), form or raw)
        return answer if isinstance(answer, web.StreamResponse) else _reply(exchange, answer)

    def _authorize(self, request: web.BaseRequest) -> None:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise missing_key()
        if self._options.api_key not in (None, key.strip()):
            raise wrong_key(key.strip())

    def _check_model(self, model: str) -> None:
        """Raise a 404 if the model does not exist; without a list of models, list it from now on."""
        if self._options.models is None:
            self._models.add(model)
        elif model not in self._models:
            message = f"The model `{model}` does not exist or you do not have access to it."
            raise ApiError(404, message, code="model_not_found")

    async def _generate(self, exchange: Exchange, endpoint: Generation, raw: bytes) -> web.StreamResponse:
        ask = endpoint.understand(exchange.parse(raw), self._count, lenient=self._options.lenient)
        self._admit(exchange, ask)
        ask, refusal = self._outcome(exchange, ask)
        latency = self._latency.draw()
        if refusal and refusal.status != OK and exchange.fault not in UNANSWERED:
            return self._refuse(exchange, refusal)
        if exchange.fault == "hang":
            await exchange.hang()
        wanted = ask.body.get("stream") or exchange.fault == "sse"
        stream = endpoint.stream if wanted and not refusal and exchange.fault not in WHOLE else None
        background = bool(ask.body.get("background")) and endpoint is RESPONSES
        if not (stream or background):
            await asyncio.sleep(latency)
        if exchange.fault in UNANSWERED:
            self._settle(exchange, 0)
            await exchange.fail(str(exchange.fault), self._options.unavailable_retry_after)
        if refusal:
            self._bill_given(exchange, refusal.body)
            return _reply(exchange, *refusal.rendered(self._options.fault_wait))
        answer = self._write(exchange, endpoint, ask)
        if background:
            exchange.background = self.storage.responses.keep(answer, latency, streamed=bool(stream))
            answer = answer if stream else exchange.background.start()
            exchange.extra = self.storage.responses.headers(answer)
        if exchange.fault == "sse":  # whoever did not ask for events needs their usage
            ask = replace(ask, body={**ask.body, "stream_options": {"include_usage": True}})
        frames = stream(ask, answer) if stream else [dumps(answer)]
        return await Delivery(exchange, frames, bool(stream), latency if stream else 0.0).send()

    def _admit(self, exchange: Exchange, ask: Ask) -> None:
        """Admit the request and charge it, or raise the error that refuses it."""
        exchange.model, exchange.prompt_tokens = ask.model, ask.prompt_tokens
        self._check_model(ask.model)
        exchange.limit_headers = partial(self.limits.headers, ask.model)
        allowed = self._options.quota_exhausted_after
        if allowed is not None and self.recorder.generations >= allowed:
            raise fault_error("insufficient_quota")
        tokens = ask.reserved(self._options.default_output)
        self.limits.admit(ask.model, tokens)
        exchange.charged_tokens = tokens
        if self._options.stamp == "admission":
            stamped = self.limits.headers(ask.model)
            exchange.limit_headers = lambda: stamped

    def _outcome(self, exchange: Exchange, ask: Ask) -> tuple[Ask, Refusal | None]:
        """Note the fault that comes next; return the request, and what is sent in place of an answer."""
        scripted = self._script.find("\n".join(ask.prompts))
        if isinstance(scripted, Refusal):
            exchange.fault = SCRIPTED
            return ask, scripted
        if scripted is None:
            exchange.fault = self._faults.draw()
        elif scripted in FAULTS:
            exchange.fault = scripted
        elif scripted != "ok":
            ask = replace(ask, text=scripted)
        refusal = REFUSALS.get(exchange.fault or "")
        if refusal and refusal.tier not in (None, ask.body.get("service_tier")):
            exchange.fault = refusal = None
        return ask, refusal

    def _refuse(self, exchange: Exchange, refusal: Refusal) -> web.Response:
        """Refuse although there was room: charge nothing, and send no headers of the limits."""
        self.limits.give_back(str(exchange.model), requests=1, tokens=exchange.charged_tokens)
        exchange.charged_tokens = 0
        exchange.limit_headers = dict
        return _reply(exchange, *refusal.rendered(self._options.fault_wait))

    def _bill_given(self, exchange: Exchange, body: Any) -> None:
        """Bill an answer that a script gives by the usage that it states."""
        usage = body.get("usage") if isinstance(body, Mapping) else None
        stated = usage if isinstance(usage, Mapping) else {}
        prompt, total = stated.get("prompt_tokens", stated.get("input_tokens")), stated.get("total_tokens")
        if isinstance(prompt, int) and isinstance(total, int):
            exchange.served = True
            exchange.prompt_tokens, exchange.completion_tokens = prompt, total - prompt
        self._settle(exchange, total if isinstance(total, int) else 0)

    def _write(self, exchange: Exchange, endpoint: Generation, ask: Ask) -> dict[str, Any]:
        """Return the answer as its fault leaves it, counted, charged and, unless it failed, billed."""
        body = endpoint.write(ask, self._options, exchange.ident)
        spoiled = spoil(body, exchange.fault)
        total = (spoiled if exchange.fault == "reasoning_outside" else body)["usage"]["total_tokens"]
        exchange.served = exchange.fault in ("null_usage", "no_usage") or spoiled["usage"] is not None
        exchange.completion_tokens = total - ask.prompt_tokens if exchange.served else 0
        self._settle(exchange, total)
        self.recorder.generations += 1
        return spoiled

    def _settle(self, exchange: Exchange, used: int) -> None:
        if self._options.charge == "actual":
            self.limits.give_back(str(exchange.model), tokens=exchange.charged_tokens - used)
            exchange.charged_tokens = used

    async def _control(self, request: web.BaseRequest) -> web.Response:
        """Answer a question about the simulation itself, from the parent process or a shell."""
        value: Any = None
        match request.method, request.path.removeprefix(CONTROL):
            case "GET", "state":
                value = self.state()
                value["connections"] -= 1  # the one that asks is not a client's
            case "GET", "batches":
                value = self.storage.batches()
            case "GET", "calls":
                value = [call.as_json() for call in self.recorder.calls()]
            case "POST", "reset":
                self.reset()
            case "POST", "limits":
                self.limits.change(json.loads(await request.content.read()))
            case _:
                return web.Response(status=404)
        return web.Response(body=dumps(value), content_type=JSON_TYPE)


def _reply(
    exchange: Exchange, body: Any, status: int = 200, extra: dict[str, str] | None = None
) -> web.Response:
    headers = {"content-type": JSON_TYPE, **exchange.headers(), **(extra or {})}
    exchange.record(status)
    raw = body if isinstance(body, bytes) else dumps(body)
    return web.Response(status=status, body=raw, headers=headers)


def _model_object(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 1_700_000_000, "owned_by": "openai"}
