"""Answers given before: what makes two requests the same, and which answers are kept."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import json
import os
import re
import time
import zlib
from array import array
from bisect import bisect_left
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import pydantic

from openai_eval_client._cache.store import Store
from openai_eval_client._format import to_json
from openai_eval_client._log import warn
from openai_eval_client._runtime import DeferringLock, running_loop
from openai_eval_client._validation import reject_input
from openai_eval_client._wire import PATHS, Usage, fault_in, of_error, read_answer, read_json, usage_of
from openai_eval_client.config import CacheConfig
from openai_eval_client.errors import ValidationError
from openai_eval_client.models import TokenUsage

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

    from openai_eval_client._cost import Ledger
    from openai_eval_client._stats import Recorder
    from openai_eval_client._wire import Parameters
    from openai_eval_client.models import ModelResponse

    Send = Callable[["Keeper"], Awaitable[ModelResponse]]

_PORTS = {"http": 80, "https": 443}
_VERSION = 2  # of the key
# What the answer does not depend on, by the version of the key: fields of the body that name a request, bill
# it or say how it is delivered and stored; headers and fields of the query that name account, request or
# program. What is not listed counts: to ask once more is better than a wrong answer.
_IGNORED_FIELDS = {1: frozenset[str](), 2: frozenset({
    "background", "metadata", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
    "safety_identifier", "service_tier", "store", "stream_options", "user",
})}  # fmt: skip
_IGNORED_HEADERS = {1: re.compile(
    "api-key|authorization|idempotency-key|openai-organization|openai-project|traceparent|tracestate|"
    "user-agent|x-client-request-id|x-request-id"
), 2: re.compile(
    "api-key|authorization|ocp-apim-subscription-key|openai-organization|openai-project|x-api-key|"
    "x-goog-api-key|b3|baggage|idempotency-key|request-id|sentry-trace|traceparent|tracestate|"
    "x-amzn-trace-id|x-client-request-id|x-cloud-trace-context|x-correlation-id|x-request-id|"
    "http-referer|referer|user-agent|x-title|x-(b3|datadog|stainless)-.*"
)}  # fmt: skip
_IGNORED_QUERY = {1: frozenset[str](), 2: frozenset({"api-key", "api_key", "subscription-key"})}
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=repr)


def request_digest(
    base_url: str, parameters: Parameters, body: Mapping[str, Any], version: int = _VERSION
) -> bytes:
    """Return what two requests have in common if, and only if, they ask for the same answer."""
    # Everything counts that can change the answer: the address, the API, the body as asked for (schema of the
    # answer included), and the extra query and headers. The account and the timeout do not.
    fields, names, keys = _IGNORED_FIELDS[version], _IGNORED_HEADERS[version], _IGNORED_QUERY[version]
    headers = {name.lower(): value for name, value in parameters.headers.items()}
    headers = {name: value for name, value in headers.items() if not names.fullmatch(name)}
    query = {name: value for name, value in parameters.query.items() if name not in keys}
    asked = {name: value for name, value in body.items() if name not in fields}
    whole = {name: int(n) for name, n in asked.items() if isinstance(n, float) and n.is_integer()}
    asked |= whole  # 1 for 1.0
    request = [version, base_url, PATHS[parameters.api], query, headers, asked]
    try:
        text = _CANONICAL.encode(request)
    except TypeError:  # keys of several types have no order until they are written as text
        text = _CANONICAL.encode(json.loads(json.dumps(request, default=repr)))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def normalised(base_url: str) -> str:
    """Return an address in the one form that all ways to write it share."""
    parts = urlsplit(base_url)
    host = parts.hostname or ""
    host = f"[{host}]" if ":" in host else host
    port = "" if parts.port in {None, _PORTS.get(parts.scheme)} else f":{parts.port}"
    query = f"?{parts.query}" if parts.query else ""
    return f"{parts.scheme}://{host}{port}{parts.path.rstrip('/')}{query}"


class Occurrence(NamedTuple):
    """One sample of a request: the answer to one time that it is asked."""

    digest: bytes  # of the request
    number: int  # how often the request was asked before
    sampled: bool  # whether asking again gives another answer
    earlier: Occurrence | None = None  # as version 1 of the key has it, where the file may hold such entries

    @property
    def key(self) -> bytes:
        """What its answer is kept under."""
        return hashlib.sha256(b"%s %d" % (self.digest, self.number)).digest()

    @property
    def keys(self) -> list[bytes]:
        """What its answer is looked up under, in this order."""
        return [self.key] if self.earlier is None else [self.key, self.earlier.key]


def is_sampled(body: Mapping[str, Any]) -> bool:
    """Return whether asking again gives another answer: not at temperature 0, nor with a seed."""
    return body.get("temperature") != 0 and body.get("seed") is None


class Occurrences:
    """Numbers a request each time it is asked, from 0, so that each time is a sample of its own.

    The number of a request that failed is given again, and so are all those of a call that was interrupted,
    but not within the same call: there the numbers depend on the order of the prompts alone. What was asked
    once takes 8 bytes: the digest's first.
    """

    def __init__(self) -> None:
        self._lock = DeferringLock()
        self._once: defaultdict[int, array[int]] = defaultdict(lambda: array("Q"))  # in sorted segments
        self._last: dict[int, int] = {}  # the highest number of what was asked more than once
        self._free: defaultdict[int, dict[int, object]] = defaultdict(dict)  # to give again, by call
        self._taken: dict[int, tuple[array[int], array[int]]] = {}  # names and numbers, by the call's id

    def take(self, digest: bytes, call: object) -> int:
        """Return the number of the next sample of a request, asked for by one call."""
        name = int.from_bytes(digest[:8], "big")
        with self._lock:
            free = self._free.get(name, {})
            number = min((number for number, by in free.items() if by is not call), default=None)
            if number is None:
                number = self._next(name)
            else:
                del free[number]
            if id(call) in self._taken:
                names, numbers = self._taken[id(call)]
                names.append(name)
                numbers.append(number)
            return number

    def give_back(self, digest: bytes, number: int, call: object) -> None:
        """Let other calls ask for a sample again: this one was not answered. A second time does nothing."""
        with self._lock:
            self._free[int.from_bytes(digest[:8], "big")].setdefault(number, call)

    @contextlib.contextmanager
    def of_call(self, call: object) -> Iterator[Callable[[], None]]:
        """Give all numbers of a call again if it ends in an exception, or calls what this yields."""
        self._taken[id(call)] = array("Q"), array("Q")
        try:
            yield functools.partial(self._give_back_all, call)
        except BaseException:
            self._give_back_all(call)
            raise
        finally:
            del self._taken[id(call)]

    def _give_back_all(self, call: object) -> None:
        with self._lock:
            for name, number in zip(*self._taken[id(call)], strict=True):
                self._free[name].setdefault(number, call)

    def _next(self, name: int) -> int:
        segment = self._once[name >> 52]
        at = bisect_left(segment, name)
        if at == len(segment) or segment[at] != name:
            segment.insert(at, name)
            return 0
        self._last[name] = self._last.get(name, 0) + 1
        return self._last[name]


_LARGE = 2048  # bytes from which a value is compressed
_INCOMPLETE = ("length", "content_filter")


class Cache:
    """The kept answers of one client."""

    def __init__(self, config: CacheConfig, base_url: str, recorder: Recorder, ledger: Ledger) -> None:
        self.store = Store(_file_path(config.path), read_only=not config.write)
        self._config = config
        self.ttl = config.ttl  # seconds for which an answer may be used again; None: for ever
        self._base_url = normalised(base_url)
        self._recorder = recorder
        self._ledger = ledger
        self._occurrences = Occurrences()
        self._has_version_1 = config.read and self.store.has_version_1  # entries with such keys
        self._warned = False  # that a kept answer cannot be read
        # what is being looked up or sent now; its result is the answer as it is kept
        self._asking: dict[tuple[asyncio.AbstractEventLoop, bytes], asyncio.Future[bytes | None]] = {}

    async def answer(self, body: Mapping[str, Any], parameters: Parameters, send: Send) -> ModelResponse:
        """Answer one prompt from what is kept, else by sending it, the same one only once at a time."""
        sample = self.take(body, parameters)  # no await before it: prompts come in order
        try:
            if self._config.read:
                return await self._answer_once(sample, parameters, send)
            return await send(Keeper(self, sample.key))
        except BaseException:
            self.give_back(sample, parameters)
            raise

    def take(self, body: Mapping[str, Any], parameters: Parameters) -> Occurrence:
        """Return the next sample of a request."""
        sample = self._numbered(body, parameters, _VERSION)
        if not self._has_version_1:
            return sample
        # It counts for itself, so no entry, under whichever key, is the answer to two samples.
        return sample._replace(earlier=self._numbered(body, parameters, 1))

    def _numbered(self, body: Mapping[str, Any], parameters: Parameters, version: int) -> Occurrence:
        digest, sampled = request_digest(self._base_url, parameters, body, version), is_sampled(body)
        return Occurrence(digest, self._occurrences.take(digest, parameters) if sampled else 0, sampled)

    def of_call(self, parameters: Parameters) -> contextlib.AbstractContextManager[Callable[[], None]]:
        """Enter for a call: if it ends in an exception, a later one asks for all its samples again."""
        return self._occurrences.of_call(parameters)

    def give_back(self, sample: Occurrence, parameters: Parameters) -> None:
        """Let a later call ask for a sample again: it was not answered."""
        if sample.sampled:
            self._occurrences.give_back(sample.digest, sample.number, parameters)
        if sample.earlier is not None:
            self.give_back(sample.earlier, parameters)

    async def kept(self, samples: Sequence[Occurrence], parameters: Parameters) -> dict[int, ModelResponse]:
        """Return the kept answers to these samples, by position; they save the price of a batch."""
        if not self._config.read:
            return {}
        found = await asyncio.gather(*(self._look_up(one, parameters, batch=True) for one in samples))
        return {n: pair[0] for n, pair in enumerate(found) if pair is not None}

    async def keep(self, key: bytes, response: ModelResponse) -> bytes | None:
        """Keep an answer if it is to be kept, and return it as it would be kept; None where it cannot be."""
        value = _packed(response)
        is_wanted = self._config.store_incomplete or not _is_incomplete(response)
        if value is not None and is_wanted and self._config.write and await self.store.put(key, value):
            self._recorder.stored()
        return value

    @property
    def journal(self) -> Store | None:
        """Where jobs are recorded; None where the cache is only read, or only written."""
        return self.store if self._config.read and self._config.write else None

    async def close(self) -> None:
        """Keep what is waiting to be kept, and close the file."""
        if running_loop() is None:  # `close` is stepped through by hand, or by trio
            self.store.close()
        else:
            await asyncio.to_thread(self.store.close)

    async def _answer_once(self, sample: Occurrence, parameters: Parameters, send: Send) -> ModelResponse:
        """Answer, or wait for the same request that is just being answered."""
        loop, key = asyncio.get_running_loop(), sample.key
        while (first := self._asking.get((loop, key))) is not None:
            value = await asyncio.shield(first)
            response = None if value is None else self._read(value, parameters)
            if response is not None:
                return response
        self._asking[loop, key] = outcome = loop.create_future()
        keeper = Keeper(self, key)
        try:
            found = await self._look_up(sample, parameters)
            if found is None:
                return await send(keeper)
            response, keeper.value = found
            return response
        finally:
            del self._asking[loop, key]
            outcome.set_result(keeper.value)

    async def _look_up(
        self, sample: Occurrence, parameters: Parameters, *, batch: bool = False
    ) -> tuple[ModelResponse, bytes] | None:
        since = 0.0 if self.ttl is None else time.time() - self.ttl
        for key in sample.keys:
            value = await self.store.get(key, since=since)
            if value is not None and (response := self._read(value, parameters, batch=batch)) is not None:
                return response, value
        return None

    def _read(self, value: bytes, parameters: Parameters, *, batch: bool = False) -> ModelResponse | None:
        """Return the response as it was; None where the value holds none."""
        try:
            text = value if value[:1] == b"{" else zlib.decompress(value)
            response, usage = _unpacked(read_json(text), parameters)
        except (ValueError, KeyError, TypeError, RecursionError, zlib.error) as error:
            if not self._warned:  # an old file may hold thousands
                self._warned = True
                reason, about = type(error).__name__, {"model": parameters.model, **of_error(error)}
                message = "a kept answer cannot be read (%s): asking again, as for each one like it"
                warn(message, reason, event="cache_unreadable", **about)
            return None
        response._body = text  # noqa: SLF001  # a tenth of the parsed body's memory
        self._recorder.answered(response, cached=True)
        self._ledger.saved(parameters.model, usage, batch=batch)
        self._ledger.keep_up()
        return response


class Keeper:
    """Keeps the answer to one sample, and the name of the response in the background that is to be it."""

    def __init__(self, cache: Cache, key: bytes) -> None:
        self._cache = cache
        self._key = key
        self._entry = f"background:{key.hex()}"  # in the journal
        self.is_saved = False  # whether such a name is in the journal
        self.value: bytes | None = None  # the answer as it is kept

    async def __call__(self, response: ModelResponse) -> None:
        """Keep the answer, if it is to be kept."""
        self.value = await self._cache.keep(self._key, response)
        if self.is_saved:
            await self.forget()

    async def saved_id(self) -> str | None:
        """Return the name of the response that was submitted for this sample, and is not known to be over."""
        journal = self._cache.journal
        entry = None if journal is None else await journal.journal_get(self._entry)
        self.is_saved = entry is not None
        return str(entry["id"]) if entry else None

    async def save_id(self, name: str) -> None:
        """Note that this response was submitted, so that another process finds it after a kill."""
        if self._cache.journal is not None and not self.is_saved:
            self.is_saved = True
            with _logged():
                await self._cache.journal.journal_put(self._entry, {"id": name})

    async def forget(self) -> None:
        """Note that the response is over."""
        if self._cache.journal is not None and self.is_saved:
            self.is_saved = False
            with _logged():
                await self._cache.journal.journal_delete(self._entry)


@contextlib.contextmanager
def _logged() -> Iterator[None]:
    """Log that the journal cannot be written: what was submitted is paid for, and goes on."""
    try:
        yield
    except ValidationError as error:
        warn("a response in the background is not noted: %s", error, event="cache_failed")


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


def _file_path(given: str | Path) -> Path:
    try:
        path = Path(given).expanduser()
        os.fsencode(path)
    except (RuntimeError, UnicodeError) as error:  # no such user; half of a surrogate pair
        reject_input("cache", given, str(error))
    return path


def _packed(response: ModelResponse) -> bytes | None:
    """Return a response as it is kept; None where it is nested too deeply for that."""
    kept = {
        "response": {"body": response._decoded()},  # noqa: SLF001  # as in a line of a batch's results
        "latency_ms": response.latency_ms,
        "request_id": response.request_id,
        "temperature": response.temperature,
        "cost": response.usage.estimated_cost,
    }
    if response.usage.estimated:
        kept["usage"] = response.usage.model_dump()  # the body has none, or not all of it
    try:
        value = to_json(kept, only_ascii=True)
    except RecursionError:  # nested as deep as could just be read
        about = {"model": response.model, "request_id": response.request_id}
        text = "answer %s is nested too deeply to be kept"
        warn(text, response.request_id, event="cache_not_kept", **about)
        return None
    return zlib.compress(value, 1) if len(value) > _LARGE else value


def _unpacked(kept: dict[str, Any], parameters: Parameters) -> tuple[ModelResponse, Usage]:
    """Return the response as it was, and its usage: the server's, or else our estimate."""
    body, latency = kept["response"]["body"], kept["latency_ms"]
    if fault_in(body, parameters.api) is not None:
        raise ValueError("no answer")
    usage = usage_of(body)
    same = {name: kept[name] for name in ("temperature", "request_id")}
    response = read_answer(body, parameters, usage=usage, latency=latency / 1000, **same)
    if response.usage.estimated and "usage" in kept:
        response.usage = TokenUsage(**kept["usage"])
    response.usage.estimated_cost = kept["cost"]
    response.latency_ms = latency
    response.cached = True
    tokens = response.usage
    if usage is None or usage.estimated:
        usage = Usage(tokens.prompt_tokens, tokens.completion_tokens, tokens.cached_tokens, estimated=True)
    return response, usage


def _is_incomplete(response: ModelResponse) -> bool:
    choices = response._decoded().get("choices", ())  # noqa: SLF001  # all of them, for n > 1
    reasons = [choice.get("finish_reason") for choice in choices if isinstance(choice, dict)]
    return any(reason in _INCOMPLETE for reason in (response.finish_reason, *reasons))
