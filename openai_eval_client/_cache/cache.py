"""Answers given before: what makes two requests the same, and which answers are kept."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
import time
import zlib
from array import array
from bisect import bisect_left
from collections import defaultdict
from pathlib import Path  # typer reads the annotations
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import pydantic

from openai_eval_client._cache.store import Store, unpacked
from openai_eval_client._log import warn
from openai_eval_client._validation import reject_input
from openai_eval_client._wire import PATHS, Usage, is_answer, of_error, read_answer, read_json, usage_of
from openai_eval_client.config import CacheConfig
from openai_eval_client.models import TokenUsage

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from openai_eval_client._cost import Ledger
    from openai_eval_client._stats import Recorder
    from openai_eval_client._wire import Parameters
    from openai_eval_client.models import ModelResponse

    Keep = Callable[[ModelResponse], Awaitable[None]]
    Send = Callable[[Keep], Awaitable[ModelResponse]]


_VERSION = 1  # of the form below; another one makes all keys others
_PORTS = {"http": 80, "https": 443}
# Who asks and what the request is called: the answer does not depend on these headers.
_NO_MATTER = frozenset(
    {
        "api-key",
        "authorization",
        "idempotency-key",
        "openai-organization",
        "openai-project",
        "traceparent",
        "tracestate",
        "user-agent",
        "x-client-request-id",
        "x-request-id",
    },
)
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=repr)


def request_digest(base_url: str, parameters: Parameters, body: Mapping[str, Any]) -> bytes:
    """Return what a request has in common with the same one asked again, and with no other."""
    # Everything counts that can change the answer: the address, the API, the whole body as asked for (schema
    # of the answer included), and the extra query and headers. The account and the timeout do not.
    headers = {name.lower(): value for name, value in parameters.headers.items()}
    headers = {name: value for name, value in headers.items() if name not in _NO_MATTER}
    plain = {name: _whole(value) for name, value in body.items()}
    request = [_VERSION, base_url, PATHS[parameters.api], dict(parameters.query), headers, plain]
    return hashlib.sha256(_canonical(request).encode("utf-8", "surrogatepass")).digest()


class Occurrence(NamedTuple):
    """One answer to one request."""

    digest: bytes  # of the request
    number: int  # how often it was asked before
    sampled: bool  # whether asking again gives another answer

    @property
    def key(self) -> bytes:
        """What it is kept under."""
        return hashlib.sha256(b"%s %d" % (self.digest, self.number)).digest()


def is_sampled(body: Mapping[str, Any]) -> bool:
    """Return whether asking again is to give an answer of its own: not at temperature 0, nor with a seed."""
    return body.get("temperature") != 0 and body.get("seed") is None


def normalised(base_url: str) -> str:
    """Return an address as every way to write it comes out."""
    parts = urlsplit(base_url)
    host = parts.hostname or ""
    host = f"[{host}]" if ":" in host else host
    port = "" if parts.port in {None, _PORTS.get(parts.scheme)} else f":{parts.port}"
    query = f"?{parts.query}" if parts.query else ""
    return f"{parts.scheme}://{host}{port}{parts.path.rstrip('/')}{query}"


def _canonical(request: object) -> str:
    try:
        return _CANONICAL.encode(request)
    except TypeError:  # keys that are no strings stand in no order before they are written
        return _CANONICAL.encode(json.loads(json.dumps(request, default=repr)))


def _whole(value: object) -> object:
    """Return 1 for 1.0: the same to every API."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


class Occurrences:
    """Numbers the same request each time it is asked, from 0, so that each is a sample of its own.

    Numbers are given in the order asked for. That of a request that failed is given again, but not within the
    same call: there the numbers are to depend on the order of the prompts alone.

    What was asked once takes 8 bytes: the digest's first, in sorted segments.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._once: defaultdict[int, array[int]] = defaultdict(lambda: array("Q"))
        self._more: dict[int, int] = {}
        self._free: dict[int, list[tuple[int, object]]] = {}

    def take(self, digest: bytes, call: object) -> int:
        """Return the number of the next sample of a request, asked for by one call."""
        name = int.from_bytes(digest[:8], "big")
        with self._lock:
            free = self._take_free(name, call) if name in self._free else None
            return self._next(name) if free is None else free

    def give_back(self, digest: bytes, number: int, call: object) -> None:
        """Let other calls ask for a sample again: this one was not answered."""
        with self._lock:
            self._free.setdefault(int.from_bytes(digest[:8], "big"), []).append((number, call))

    def _take_free(self, name: int, call: object) -> int | None:
        numbers = self._free[name]
        others = [number for number, owner in numbers if owner is not call]
        if not others:
            return None
        least = min(others)
        numbers[:] = [pair for pair in numbers if pair[0] != least]
        if not numbers:
            del self._free[name]
        return least

    def _next(self, name: int) -> int:
        segment = self._once[name >> 52]
        at = bisect_left(segment, name)
        if at == len(segment) or segment[at] != name:
            segment.insert(at, name)
            return 0
        self._more[name] = self._more.get(name, 0) + 1
        return self._more[name]


_LARGE = 2048  # bytes from which a value is compressed
_INCOMPLETE = ("length", "content_filter")


class Cache:
    """The kept answers of one client."""

    def __init__(self, config: CacheConfig, base_url: str, recorder: Recorder, ledger: Ledger) -> None:
        self.store = Store(Path(config.path).expanduser(), read_only=not config.write)
        self._config = config
        self._base_url = normalised(base_url)
        self._recorder = recorder
        self._ledger = ledger
        self._samples = Occurrences()
        self._asking: dict[tuple[asyncio.AbstractEventLoop, bytes], asyncio.Future[bytes | None]] = {}

    async def answer(self, body: Mapping[str, Any], parameters: Parameters, send: Send) -> ModelResponse:
        """Answer one prompt: as it was answered before, else by sending it."""
        # The same request asked twice at a time, where both are to have one answer, is sent once.
        sample = self.take(body, parameters)  # no await before it: prompts come in order
        try:
            if self._config.read:
                return await self._answer_once(sample.key, parameters, send)
            return (await self._send(sample.key, send))[0]
        except BaseException:
            self.give_back(sample, parameters)
            raise

    def take(self, body: Mapping[str, Any], parameters: Parameters) -> Occurrence:
        """Return which sample of a request is asked for next."""
        digest = request_digest(self._base_url, parameters, body)
        sampled = is_sampled(body)
        return Occurrence(digest, self._samples.take(digest, parameters) if sampled else 0, sampled)

    def give_back(self, sample: Occurrence, parameters: Parameters) -> None:
        """Let a later call ask for a sample again: it was not answered."""
        if sample.sampled:
            self._samples.give_back(sample.digest, sample.number, parameters)

    async def kept(self, samples: Sequence[Occurrence], parameters: Parameters) -> dict[int, ModelResponse]:
        """Return the answers kept of these samples, by position; at the batch price they are savings."""
        if not self._config.read:
            return {}
        found = await asyncio.gather(
            *(self._look_up(sample.key, parameters, batch=True) for sample in samples),
        )
        return {n: pair[0] for n, pair in enumerate(found) if pair is not None}

    async def keep(self, key: bytes, response: ModelResponse) -> bytes | None:
        """Keep an answer, and return as what; None where it is not to be kept."""
        value = self._value(response)
        if value is None or not self._is_kept(response):
            return value
        if self._config.write and await self.store.put(key, value):
            self._recorder.stored()
        return value

    @property
    def ttl(self) -> float | None:
        """Seconds for which an answer counts."""
        return self._config.ttl

    @property
    def journal(self) -> Store | None:
        """Where jobs are recorded; None where the cache is only read, or only written."""
        return self.store if self._config.read and self._config.write else None

    async def close(self) -> None:
        """Keep what is waiting to be kept, and close the file."""
        await asyncio.to_thread(self.store.close)

    async def _answer_once(self, key: bytes, parameters: Parameters, send: Send) -> ModelResponse:
        """Answer, or wait for who is just being answered the same."""
        loop = asyncio.get_running_loop()
        while (first := self._asking.get((loop, key))) is not None:
            value = await asyncio.shield(first)
            response = None if value is None else self._read(value, parameters)
            if response is not None:
                return response
        self._asking[loop, key] = outcome = loop.create_future()
        value = None
        try:
            response, value = await self._look_up(key, parameters) or await self._send(key, send)
            return response
        finally:
            del self._asking[loop, key]
            outcome.set_result(value)

    async def _look_up(
        self,
        key: bytes,
        parameters: Parameters,
        *,
        batch: bool = False,
    ) -> tuple[ModelResponse, bytes] | None:
        ttl = self._config.ttl
        value = await self.store.get(key, since=0.0 if ttl is None else time.time() - ttl)
        response = None if value is None else self._read(value, parameters, batch=batch)
        return None if response is None or value is None else (response, value)

    async def _send(self, key: bytes, send: Send) -> tuple[ModelResponse, bytes | None]:
        value = None

        async def keep(response: ModelResponse) -> None:
            nonlocal value
            value = await self.keep(key, response)

        response = await send(keep)
        return response, value

    def _is_kept(self, response: ModelResponse) -> bool:
        """Return whether a response is to be kept; who waits for the same one gets it in any case."""
        return self._config.store_incomplete or not _is_incomplete(response)

    def _value(self, response: ModelResponse) -> bytes | None:
        """Return a response as it is kept; None where that cannot be."""
        body = response._decoded()  # noqa: SLF001  # what the server sent
        kept = {
            "response": {"body": body},  # as in a line of a batch's results
            "latency_ms": response.latency_ms,
            "request_id": response.request_id,
            "temperature": response.temperature,
            "cost": response.usage.estimated_cost,
        }
        if response.usage.estimated:
            kept["usage"] = response.usage.model_dump()  # the body has none
        try:
            value = json.dumps(kept, separators=(",", ":")).encode()
        except RecursionError:  # nested as deep as could just be read
            about = {"model": response.model, "request_id": response.request_id}
            text = "answer %s is nested too deeply to be kept"
            warn(text, response.request_id, event="cache_not_kept", **about)
            return None
        return zlib.compress(value, 1) if len(value) > _LARGE else value

    def _read(self, value: bytes, parameters: Parameters, *, batch: bool = False) -> ModelResponse | None:
        """Return the response as it was, None where the value cannot be one."""
        try:
            text = unpacked(value)
            response, usage = _rebuilt(read_json(text), parameters)
        except (ValueError, KeyError, TypeError, RecursionError, zlib.error) as error:
            reason, about = type(error).__name__, {"model": parameters.model, **of_error(error)}
            warn("a kept answer cannot be read (%s): asking again", reason, event="cache_unreadable", **about)
            return None
        response._body = text  # noqa: SLF001  # a tenth of the parsed body's memory
        self._recorder.cached()
        self._ledger.saved(parameters.model, usage or _estimate(response.usage), batch=batch)
        self._ledger.keep_up()
        return response


def open_cache(given: object, base_url: str, recorder: Recorder, ledger: Ledger) -> Cache:
    """Return the cache that the user asks for."""
    if isinstance(given, str | Path):
        try:
            given = CacheConfig(path=given)
        except pydantic.ValidationError as error:
            reject_input("cache", given, error.errors()[0]["msg"])
    if not isinstance(given, CacheConfig):
        reject_input("cache", given, f"must be a path or a CacheConfig, not {type(given).__name__}")
    return Cache(given, base_url, recorder, ledger)


def _estimate(usage: TokenUsage) -> Usage:
    return Usage(usage.prompt_tokens, usage.completion_tokens, estimated=True)


def _rebuilt(kept: dict[str, Any], parameters: Parameters) -> tuple[ModelResponse, Usage | None]:
    """Return the response as it was, and what the server said it used."""
    body, latency = kept["response"]["body"], kept["latency_ms"]
    if not is_answer(body, parameters.api):
        raise ValueError("no answer")
    usage = usage_of(body)
    response = read_answer(
        body,
        parameters,
        usage=usage,
        temperature=kept["temperature"],
        request_id=kept["request_id"],
        latency=latency / 1000,
    )
    if response.usage.estimated:
        response.usage = TokenUsage(**kept["usage"])
    response.usage.estimated_cost = kept["cost"]
    response.latency_ms = latency
    response.cached = True
    return response, usage


def _is_incomplete(response: ModelResponse) -> bool:
    choices = response._decoded().get("choices", ())  # noqa: SLF001  # all of them, for n > 1
    reasons = [choice.get("finish_reason") for choice in choices if isinstance(choice, dict)]
    return any(reason in _INCOMPLETE for reason in (response.finish_reason, *reasons))
