"""Streamed answers: each holds its slot until it is closed, read to its end, or dropped."""

from __future__ import annotations

import asyncio
import functools
import types
import weakref
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any, get_origin

from openai_eval_client._runtime import call_on
from openai_eval_client._sdk.transport import close_soon
from openai_eval_client._wire import Outcome, Tail, read_outcome, refused

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from openai_eval_client._account import Attempt
    from openai_eval_client._wire import Demand

_BAD_REQUEST = 400


def outcome_of_reply(
    demand: Demand, status: int, headers: Any, tail: bytes, api: str | None = None
) -> Outcome:
    """Return what came of an attempt, by what was read of its body, or by the end of that."""
    if status >= _BAD_REQUEST:
        return refused(status, headers, tail)
    if demand.model is None:  # a file may hold usage of other requests
        return Outcome(status, headers)
    return read_outcome(status, headers, tail, api)


def metered(response: Any, attempt: Attempt) -> Any:
    """Return a response like this one, whose body settles an attempt when it ends or is closed or dropped."""
    # httpx's body refers to its response: only in another one can ours be dropped without the collector.
    copy = object.__new__(response.__class__)
    vars(copy).update(vars(response))
    copy.stream = _metered_class(response.stream.__class__)(response, attempt, weakref.ref(copy))
    return copy


@functools.lru_cache(maxsize=8)
def _metered_class(stream: type) -> type:
    interface = next(base for base in stream.__mro__ if base.__name__ == "AsyncByteStream")  # of either httpx
    return type("MeteredStream", (_MeteredStream, interface), {})


class _MeteredStream:
    """The body of a streamed answer, which settles from the usage at its end."""

    def __init__(self, response: Any, attempt: Attempt, owner: weakref.ref[Any]) -> None:
        self._response = response
        self._owner = owner  # the response that has this body
        self._status, self._headers = response.status_code, response.headers
        self._attempt = attempt
        self._tail = Tail()
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self.task: asyncio.Task[Any] | None = None  # that reads it
        self._on_end = functools.partial(_settle_with, weakref.ref(self))
        attempt.is_stream = True
        if self._status < _BAD_REQUEST:  # they describe the limits now, not when the stream ends
            attempt.update_from_headers(self._headers)
            self._headers = None

    async def __aiter__(self) -> AsyncIterator[bytes]:
        chunks = aiter(self._response.stream)
        try:
            async for chunk in chunks:
                self._tail.feed(chunk)
                self._watch()
                yield chunk
        except BaseException:  # an answer is read once: the rest is lost
            self.settle()
            if isinstance(chunks, AsyncGenerator):
                await chunks.aclose()
            await self.aclose()
            raise

    async def aclose(self) -> None:
        """Close the stream and give the slot back."""
        self._closed = True
        self.settle()
        try:
            await self._response.aclose()
        finally:
            owner, taken = self._owner(), getattr(self._response, "_elapsed", None)
            if owner is not None and taken is not None:  # httpx tells only the response that it knows
                owner.elapsed = taken

    @property
    def elapsed(self) -> Any:
        """How long the answer took, as httpx2 asks its body."""
        return self._response.stream.elapsed

    def _watch(self, *, no_more: bool = False) -> None:
        """Have the end of the task that reads settle it, where that leaves it unread."""
        # A task's exception, a CancelledError too, keeps its frames, and the stream in them, for as long as
        # somebody keeps the task or the exception.
        task = None if no_more else asyncio.current_task()
        if task is not self.task:
            if self.task is not None:
                self.task.remove_done_callback(self._on_end)
            if task is not None:
                task.add_done_callback(self._on_end)
            self.task = task

    def settle(self) -> None:
        """Give back what its attempt holds; a second call does nothing."""
        self._watch(no_more=True)
        outcome = outcome_of_reply(self._attempt.demand, self._status, self._headers, self._tail.read())
        self._attempt.settle(outcome)

    def __del__(self) -> None:
        """Give the slot back, and the connection, where the stream was dropped without being closed."""
        if not self._closed:
            self.settle()
            call_on(self._loop, close_soon, self._response.stream)


def _settle_with(stream: weakref.ref[_MeteredStream], task: asyncio.Task[Any]) -> None:
    """Settle a stream whose reader was cancelled or failed; `task.exception()` would count as handling it."""
    held = stream()
    if held is None or held.task is not task:  # another one reads on
        return
    if task.cancelled() or getattr(task, "_exception", None) is not None:
        held.settle()


@functools.lru_cache(maxsize=256)
def released_class(stream_cls: Any) -> Any:
    """Return a class of streams like one of the SDK's, each freed as soon as it is dropped."""
    # The SDK's stream holds the generator that reads it, and that the stream: dropped halfway, they would
    # keep slot and connection until the collector finds them. Here the generator holds a stream of its own.
    original = get_origin(stream_cls) or stream_cls

    def begin(self: Any, **options: Any) -> None:
        read = original(**options)
        vars(self).update(vars(read))
        del read._iterator  # noqa: SLF001  # of the SDK's

    return types.new_class(original.__name__, (stream_cls,), {}, lambda body: body.update(__init__=begin))
