"""The files and batches endpoints through the SDK: each call with a deadline, repeated where that is safe."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import tempfile
import time
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import openai

from openai_eval_client._attempt import deadline
from openai_eval_client._batch_meta import Placement, read_placement
from openai_eval_client._batch_status import is_enqueued_limit, was_refused
from openai_eval_client._checks import shown
from openai_eval_client._retry import is_transient, patient, retrying
from openai_eval_client.errors import QuotaError, TimeoutError, ValidationError, sdk_httpx

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from openai.types import Batch

    from openai_eval_client._batch_lines import Part
    from openai_eval_client.config import OpenAIConfig

_NOT_THERE = frozenset({400, 404})
_FILE_LAG = 60.0  # seconds for which a new file may be unknown
_SLOWEST = 50_000  # bytes a second: the deadline of an upload
_PARTIAL = 206
_CLOCKS_APART = 3600.0  # seconds; how much earlier than ours the server's clock may be


@dataclass(frozen=True, slots=True)
class Order:
    """What a batch is created with, besides its file.

    Attributes:
        placement: Where its lines stand in the job.
        endpoint: Such as "/v1/chat/completions".
        window: The completion window, such as "24h".
        metadata: The caller's own.
    """

    placement: Placement
    endpoint: str
    window: str
    metadata: dict[str, str]


class BatchApi:
    """Uploads, creates, looks up, cancels, downloads.

    Args:
        sdk: An SDK client that does not retry.
        config: How long an attempt may take, and how often to retry.
        max_wait: Seconds beyond which a wait asked for by the server is not waited for.
    """

    def __init__(self, sdk: openai.AsyncOpenAI, config: OpenAIConfig, max_wait: float) -> None:
        self._sdk = sdk
        self._timeout = config.timeout
        self._retries = config.max_retries
        self._max_wait = max_wait

    async def upload(self, part: Part) -> str:
        """Upload the lines of a part and return the file's id."""
        file = ("requests.jsonl", part.file, "application/jsonl")

        async def attempt() -> Any:
            part.file.seek(0)
            return _object(await self._sdk.files.create(file=file, purpose="batch", timeout=None))

        uploaded = await self._repeated(attempt, part.size / _SLOWEST)
        return str(uploaded.id)

    async def create(self, order: Order, file_id: str, *, since: float) -> Batch:
        """Create a batch, once: after an unclear failure it is looked for before it is created again.

        Args:
            order: What to create it with.
            file_id: Its input.
            since: Time (seconds since the epoch) before which it was certainly not created.

        Returns:
            The batch.

        Raises:
            QuotaError: Too many tokens are enqueued already.
            ValidationError: The server refuses the completion window.
        """
        unclear = False

        async def attempt() -> Any:
            nonlocal unclear
            if unclear:
                found = await self.find(order.placement, since=since)
                if found is not None:
                    return found
            unclear = True
            try:
                batch = await self._create(order, file_id)
            except openai.APIStatusError as error:
                unclear = is_transient(error) and not isinstance(error, openai.RateLimitError)
                raise
            unclear = False
            return batch

        made: Batch = await _once_known(file_id, functools.partial(self._repeated, attempt), _FILE_LAG)
        return made

    async def find(self, placement: Placement, *, since: float) -> Batch | None:
        """Return the newest batch with this placement, None where there is none."""
        async with contextlib.aclosing(self.all_batches(since=since)) as batches:
            async for batch in batches:
                known = read_placement(batch.metadata)
                if known is not None and known.key == placement.key and not was_refused(batch):
                    return batch
        return None

    async def all_batches(self, *, since: float = 0.0) -> AsyncGenerator[Batch, None]:
        """Yield the account's batches, the newest first, back to a time (seconds since the epoch)."""
        after: dict[str, Any] = {}
        while True:
            listing = functools.partial(self._sdk.batches.list, limit=100, timeout=None, **after)
            page = await self._repeated(listing)
            for batch in page.data:
                if batch.created_at < since - _CLOCKS_APART:
                    return
                yield batch
            if not page.data or not page.has_next_page():
                return
            after = {"after": page.data[-1].id}

    async def get(self, batch_id: str) -> Batch:
        """Look a batch up."""

        async def attempt() -> Any:
            return _object(await self._sdk.batches.retrieve(batch_id, timeout=None))

        batch: Batch = await self._repeated(attempt)
        return batch

    async def cancel(self, batch_id: str) -> Batch:
        """Ask for a batch to be cancelled; one that has ended stays as it is."""

        async def attempt() -> Any:
            return _object(await self._sdk.batches.cancel(batch_id, timeout=None))

        try:
            cancelled: Batch = await self._repeated(attempt)
        except (openai.BadRequestError, openai.ConflictError):  # it has ended
            return await self.get(batch_id)
        return cancelled

    async def download(self, file_id: str, *, made_at: float = 0.0) -> IO[bytes]:
        """Download a file to disk; where the connection drops, go on from there, else from the start.

        Args:
            file_id: The file.
            made_at: When it was made, in seconds since the epoch: for a moment after, it may be unknown.

        Returns:
            An unnamed file at its start, to be closed by the caller.
        """
        file = tempfile.TemporaryFile(prefix="openai_eval_client-")  # noqa: SIM115  # the caller's
        try:
            fetch = functools.partial(self._fetch, file_id, file)
            patience = max(0.0, _FILE_LAG - abs(time.time() - made_at))
            await _once_known(file_id, functools.partial(self._repeated, fetch, None), patience)
        except BaseException:
            file.close()
            raise
        file.seek(0)
        return file

    async def _fetch(self, file_id: str, file: IO[bytes]) -> None:
        had = file.tell()
        headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={had}-"} if had else {})}
        content = self._sdk.files.with_streaming_response.content
        async with contextlib.AsyncExitStack() as stack:
            async with deadline(self._timeout):
                response = await stack.enter_async_context(
                    content(file_id, extra_headers=headers, timeout=None)
                )
            whole = response.status_code != _PARTIAL
            if whole or not response.headers.get("content-range", "").startswith(f"bytes {had}-"):
                _empty(file)
            chunks = response.iter_bytes()
            while True:
                async with deadline(self._timeout):
                    chunk = await anext(chunks, None)
                if chunk is None:
                    return
                file.write(chunk)

    async def _create(self, order: Order, file_id: str) -> Batch:
        metadata = {**order.metadata, **order.placement.metadata()}
        window, endpoint = order.window, order.endpoint
        try:
            made: Batch = _object(
                await self._sdk.batches.create(
                    completion_window=window,  # type: ignore[arg-type]  # others than OpenAI take "7d"
                    endpoint=endpoint,  # type: ignore[arg-type]
                    input_file_id=file_id,
                    metadata=metadata,
                    timeout=None,
                )
            )
        except openai.APIStatusError as error:
            if is_enqueued_limit(error.code, error.message):
                raise QuotaError(error.message, response=error.response, body=error.body) from None
            if error.param == "completion_window" or (
                isinstance(error, openai.BadRequestError) and "completion_window" in error.message
            ):
                why = f"completion_window={window!r}: the server refuses it: {error.message}"
                raise ValidationError(why, field="completion_window") from error
            raise
        return made

    async def _repeated(self, attempt: Callable[[], Awaitable[Any]], seconds: float | None = 0.0) -> Any:
        """Make an attempt, and further ones where they may help.

        Args:
            attempt: Calls the SDK.
            seconds: For each attempt, besides the config's timeout; None: no deadline.
        """
        limit = None if seconds is None else self._timeout + seconds
        once = functools.partial(self._attempted, attempt, limit)
        more = retrying(once, max_retries=self._retries, max_wait=self._max_wait, on_retry=_nothing)
        return await more()

    async def _attempted(self, attempt: Callable[[], Awaitable[Any]], seconds: float | None) -> Any:
        """Make one attempt; whatever the connection does is one of the SDK's errors."""
        request = sdk_httpx().Request("GET", str(self._sdk.base_url))
        try:
            async with deadline(seconds):
                return await attempt()
        except asyncio.TimeoutError as error:
            raise TimeoutError(f"no answer within {seconds or self._timeout:g} s", request=request) from error
        except openai.APITimeoutError as error:  # the SDK has no timeout here: the connection failed
            message = f"connection failed: {error.__cause__ or error}"
            raise openai.APIConnectionError(message=message, request=error.request) from error
        except (json.JSONDecodeError, sdk_httpx().TransportError) as error:  # in the middle of an answer
            raise openai.APIConnectionError(message=f"answer cut short: {error}", request=request) from error


def _object(answer: Any) -> Any:
    """Return an object of the API; not the garbage of something in between, which the SDK returns as text."""
    if not isinstance(getattr(answer, "id", None), str):
        request = sdk_httpx().Request("GET", "https://client.invalid/")
        raise openai.APIConnectionError(message=f"no object of the API: {shown(answer)}", request=request)
    return answer


async def _once_known(file_id: str, action: Callable[[], Awaitable[Any]], seconds: float) -> Any:
    """Do something with a file, again for so many seconds while the server does not know of it yet."""
    unknown = functools.partial(_is_unknown_file, file_id=file_id)
    return await patient(action, is_worth=unknown, seconds=seconds)()


def _is_unknown_file(error: openai.APIStatusError, *, file_id: str) -> bool:
    said = error.message.lower()
    return (
        error.status_code in _NOT_THERE
        and "file" in said
        and (file_id.lower() in said or "no such" in said or "not found" in said)
    )


def _empty(file: IO[bytes]) -> None:
    file.seek(0)
    file.truncate()


def _nothing() -> None:
    pass
