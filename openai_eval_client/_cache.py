"""Answers that were paid for once: looked up before anything is sent, kept before anybody sees them."""

from __future__ import annotations

import asyncio
import json
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pydantic

from openai_eval_client._answers import is_answer, read_answer
from openai_eval_client._checks import refuse
from openai_eval_client._events import of_error, warn
from openai_eval_client._keys import Sample, Samples, is_sampled, normalised, request_digest
from openai_eval_client._store import Store, unpacked
from openai_eval_client._wire import Usage, read_json, usage_of
from openai_eval_client.config import CacheConfig
from openai_eval_client.models import TokenUsage

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from openai_eval_client._ledger import Ledger
    from openai_eval_client._requests import Parameters
    from openai_eval_client._stats import Recorder
    from openai_eval_client.models import ModelResponse

    Keep = Callable[[ModelResponse], Awaitable[None]]
    Send = Callable[[Keep], Awaitable[ModelResponse]]

_LARGE = 2048  # bytes from which a value is compressed
_INCOMPLETE = ("length", "content_filter")


class Cache:
    """The kept answers of one client.

    Args:
        config: Where they are, and what may be done with them.
        base_url: The API's address.
        recorder: Counts what is answered from here, and what is kept.
        ledger: Is told what that saved.

    Raises:
        ValidationError: The file is not ours, damaged, of a newer version, or cannot be used.
    """

    def __init__(self, config: CacheConfig, base_url: str, recorder: Recorder, ledger: Ledger) -> None:
        self.store = Store(Path(config.path).expanduser(), read_only=not config.write)
        self._config = config
        self._base_url = normalised(base_url)
        self._recorder = recorder
        self._ledger = ledger
        self._samples = Samples()
        self._asking: dict[tuple[asyncio.AbstractEventLoop, bytes], asyncio.Future[bytes | None]] = {}

    async def answer(self, body: Mapping[str, Any], parameters: Parameters, send: Send) -> ModelResponse:
        """Answer one prompt: as it was answered before, else by sending it.

        The same request asked twice at a time, where both are to have one answer, is sent once.

        Args:
            body: The body for the prompt, as first asked for.
            parameters: What is asked; one object for all prompts of a call.
            send: Sends it, and calls what it is given with the answer before anybody else sees it.

        Returns:
            The response, `cached` where it is not new.

        Raises:
            ValidationError: The file is damaged; nothing was sent.
            openai.APIError: What `send` ended with.
        """
        sample = self.take(body, parameters)  # no await before it: prompts come in order
        try:
            if self._config.read:
                return await self._answer_once(sample.key, parameters, send)
            return (await self._send(sample.key, send))[0]
        except BaseException:
            self.give_back(sample, parameters)
            raise

    def take(self, body: Mapping[str, Any], parameters: Parameters) -> Sample:
        """Return which sample of a request is asked for next."""
        digest = request_digest(self._base_url, parameters, body)
        sampled = is_sampled(body)
        return Sample(digest, self._samples.take(digest, parameters) if sampled else 0, sampled)

    def give_back(self, sample: Sample, parameters: Parameters) -> None:
        """Let a later call ask for a sample again: it was not answered."""
        if sample.sampled:
            self._samples.give_back(sample.digest, sample.number, parameters)

    async def kept(self, samples: Sequence[Sample], parameters: Parameters) -> dict[int, ModelResponse]:
        """Return the answers kept of these samples, by position; at the batch price they are savings."""
        if not self._config.read:
            return {}
        found = await asyncio.gather(
            *(self._look_up(sample.key, parameters, batch=True) for sample in samples)
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
        self, key: bytes, parameters: Parameters, *, batch: bool = False
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
    """Return the cache that the user asks for.

    Raises:
        ValidationError: It is neither a path nor a CacheConfig, or its file cannot be used.
    """
    if isinstance(given, str | Path):
        try:
            given = CacheConfig(path=given)
        except pydantic.ValidationError as error:
            refuse("cache", given, error.errors()[0]["msg"])
    if not isinstance(given, CacheConfig):
        refuse("cache", given, f"must be a path or a CacheConfig, not {type(given).__name__}")
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
