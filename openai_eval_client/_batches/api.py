"""The Batch API's calls: upload, create, list, download, each safe to repeat."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import tempfile
import time
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import openai

from openai_eval_client._batches.status import JobMetadata, is_enqueued_limit, read_job_metadata, was_refused
from openai_eval_client._sdk import call_sdk, deadline, retry_for, retrying
from openai_eval_client._validation import shown
from openai_eval_client._wire import forget_key, read_failure
from openai_eval_client.errors import QuotaError, ValidationError, sdk_httpx

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from openai.types import Batch

    from openai_eval_client._batches.files import InputFile
    from openai_eval_client.config import OpenAIConfig


_URL = "https://client.invalid/"  # of the request that an error names
_NOT_THERE = frozenset({400, 404})


class Calls:
    """Makes calls, and makes them again where that may help."""

    def __init__(self, config: OpenAIConfig, max_wait: float) -> None:
        self._key = config.api_key
        self._timeout = config.timeout
        self._retries = config.max_retries
        self._max_wait = max_wait

    async def repeated(self, attempt: Callable[[], Awaitable[Any]], seconds: float | None = 0.0) -> Any:
        """Make the attempts."""
        limit = None if seconds is None else self._timeout + seconds
        once = functools.partial(self._attempted, attempt, limit)
        return await retrying(once, max_retries=self._retries, max_wait=self._max_wait, governed=False)()

    async def _attempted(self, attempt: Callable[[], Awaitable[Any]], seconds: float | None) -> Any:
        try:
            return await call_sdk(attempt(), seconds=seconds, url=_URL)
        except openai.APIError as error:
            forget_key(error, self._key)
            if isinstance(error, openai.APIStatusError) and is_enqueued_limit(error.code, error.message):
                raise QuotaError(error.message, response=error.response, body=error.body) from None
            raise


def object_of(answer: Any) -> Any:
    """Return an object of the API; not the garbage of something in between, which the SDK returns as text."""
    if not isinstance(getattr(answer, "id", None), str):
        raise no_object(answer)
    return answer


def no_object(answer: object) -> openai.APIConnectionError:
    """Return the error for an answer that is no object of the API."""
    return openai.APIConnectionError(message=f"no object of the API: {shown(answer)}", request=_request())


async def once_known(file_id: str, action: Callable[[], Awaitable[Any]], seconds: float) -> Any:
    """Do something with a file, again for so many seconds while the server does not know of it yet."""
    unknown = functools.partial(_is_unknown_file, file_id=file_id)
    return await retry_for(action, is_worth=unknown, seconds=seconds)()


def _is_unknown_file(error: openai.APIStatusError, *, file_id: str) -> bool:
    said = error.message.lower()
    return (
        error.status_code in _NOT_THERE
        and "file" in said
        and (file_id.lower() in said or "no such" in said or "not found" in said)
    )


def _request() -> Any:
    return sdk_httpx().Request("POST", _URL)


_FILE_LAG = 60.0  # seconds for which a new file may be unknown
_LATE = 2.0  # seconds after which a batch may still come about whose creation failed
_SLOWEST = 50_000  # bytes a second: the deadline of an upload
_PARTIAL, _NO_SUCH_RANGE = 206, 416
_CLOCKS_APART = 3600.0  # seconds; how much earlier than ours the server's clock may be


@dataclass(frozen=True, slots=True)
class Order:
    """What a batch is created with, besides its file."""

    placement: JobMetadata  # where its lines stand in the job
    endpoint: str  # such as "/v1/chat/completions"
    window: str  # the completion window, such as "24h"
    metadata: dict[str, str]  # the caller's own


class BatchApi:
    """Uploads, creates, looks up, cancels, downloads."""

    def __init__(self, sdk: openai.AsyncOpenAI, config: OpenAIConfig, max_wait: float) -> None:
        self._sdk = sdk
        self._timeout = config.timeout
        self._repeated = Calls(config, max_wait).repeated

    async def upload(self, part: InputFile) -> str:
        """Upload the lines of a part and return the file's id, once the server knows it."""
        file = ("requests.jsonl", part.file, "application/jsonl")

        async def attempt() -> Any:
            part.file.seek(0)
            return object_of(await self._sdk.files.create(file=file, purpose="batch", timeout=None))

        uploaded = await self._repeated(attempt, part.size / _SLOWEST)
        look = functools.partial(self._sdk.files.retrieve, uploaded.id, timeout=None)
        with contextlib.suppress(openai.APIError):  # some servers have no such endpoint
            await once_known(uploaded.id, functools.partial(self._repeated, look), _FILE_LAG)
        return str(uploaded.id)

    async def create(self, order: Order, file_id: str, *, since: float, unclear: set[str]) -> Batch:
        """Create a batch, once: after an unclear failure it is looked for before it is created again."""
        key = order.placement.part_key

        async def attempt() -> Any:
            if key in unclear:
                await asyncio.sleep(min(_LATE, self._timeout / 4))
                found = await self.find(order.placement, since=since)
                if found is not None:
                    return found
            unclear.add(key)
            try:
                batch = await self._create(order, file_id)
            except (openai.APIStatusError, ValidationError) as error:
                if not read_failure(error).retry or isinstance(error, openai.RateLimitError):
                    unclear.discard(key)
                raise
            return batch

        made: Batch = await once_known(file_id, functools.partial(self._repeated, attempt), _FILE_LAG)
        unclear.discard(key)
        return made

    async def find(self, placement: JobMetadata, *, since: float) -> Batch | None:
        """Return the newest batch with this placement, None where there is none."""
        async with contextlib.aclosing(self.all_batches(since=since)) as batches:
            async for batch in batches:
                known = read_job_metadata(batch.metadata)
                if known is not None and known.key == placement.key and not was_refused(batch):
                    return batch
        return None

    async def all_batches(self, *, since: float = 0.0) -> AsyncGenerator[Batch, None]:
        """Yield the account's batches, the newest first, back to a time (seconds since the epoch)."""
        after: dict[str, Any] = {}
        while True:
            page = await self._repeated(functools.partial(self._page, after))
            for batch in page.data:
                if batch.created_at < since - _CLOCKS_APART:
                    return
                yield batch
            if not page.data or not page.has_next_page():
                return
            after = {"after": page.data[-1].id}

    async def _page(self, after: dict[str, Any]) -> Any:
        try:
            page = await self._sdk.batches.list(limit=100, timeout=None, **after)
        except AttributeError as error:  # the SDK takes the page of something in between for a list
            raise no_object(error) from error
        return page if isinstance(page.data, list) else object_of(None)

    async def get(self, batch_id: str) -> Batch:
        """Look a batch up."""

        async def attempt() -> Any:
            return object_of(await self._sdk.batches.retrieve(batch_id, timeout=None))

        batch: Batch = await self._repeated(attempt)
        return batch

    async def cancel(self, batch_id: str) -> Batch:
        """Ask for a batch to be cancelled; one that has ended stays as it is."""

        async def attempt() -> Any:
            try:
                return object_of(await self._sdk.batches.cancel(batch_id, timeout=None))
            except (openai.BadRequestError, openai.ConflictError):  # it has ended
                return None

        cancelled: Batch | None = await self._repeated(attempt)
        return cancelled or await self.get(batch_id)

    async def download(self, file_id: str, *, made_at: float = 0.0) -> IO[bytes]:
        """Download a file to disk; where the connection drops, go on from there, else from the start."""
        # As long as more of it arrives, drops are not counted as retries.
        file = tempfile.TemporaryFile(prefix="openai_eval_client-")  # noqa: SIM115  # the caller's
        try:
            await self._fill(file, file_id, patience=max(0.0, _FILE_LAG - abs(time.time() - made_at)))
        except BaseException:
            file.close()
            raise
        file.seek(0)
        return file

    async def _fill(self, file: IO[bytes], file_id: str, *, patience: float) -> None:
        fetch = functools.partial(self._fetch, file_id, file)
        while True:
            had = file.tell()
            try:
                await once_known(file_id, functools.partial(self._repeated, fetch, None), patience)
            except openai.APIConnectionError:
                if file.tell() <= had:
                    raise
            else:
                return

    async def _fetch(self, file_id: str, file: IO[bytes]) -> None:
        had = file.tell()
        async with contextlib.AsyncExitStack() as stack:
            async with deadline(self._timeout):
                response = await stack.enter_async_context(self._rest(file_id, file, had))
            if response.status_code != _PARTIAL:
                _empty(file)
            elif not response.headers.get("content-range", "").startswith(f"bytes {had}-"):
                raise _from_the_start(file, response.http_request)
            chunks = response.iter_bytes()
            while True:
                async with deadline(self._timeout):
                    chunk = await anext(chunks, None)
                if chunk is None:
                    return
                file.write(chunk)

    @contextlib.asynccontextmanager
    async def _rest(self, file_id: str, file: IO[bytes], had: int) -> AsyncGenerator[Any, None]:
        """Ask for what is missing of a file; the answer may be the whole of it."""
        headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={had}-"} if had else {})}
        content = self._sdk.files.with_streaming_response.content
        try:
            async with content(file_id, extra_headers=headers, timeout=None) as response:
                yield response
        except openai.APIStatusError as error:
            if error.status_code == _NO_SUCH_RANGE:  # all of it was there, or never was
                raise _from_the_start(file, error.request) from error
            raise

    async def _create(self, order: Order, file_id: str) -> Batch:
        metadata = {**order.metadata, **order.placement.metadata()}
        window, endpoint = order.window, order.endpoint
        try:
            made: Batch = object_of(
                await self._sdk.batches.create(
                    completion_window=window,  # type: ignore[arg-type]  # others than OpenAI take "7d"
                    endpoint=endpoint,  # type: ignore[arg-type]
                    input_file_id=file_id,
                    metadata=metadata,
                    timeout=None,
                ),
            )
        except openai.APIStatusError as error:
            if error.param == "completion_window" or (
                isinstance(error, openai.BadRequestError) and "completion_window" in error.message
            ):
                why = f"completion_window={window!r}: the server refuses it: {error.message}"
                raise ValidationError(why, field="completion_window") from None
            raise
        return made


def _from_the_start(file: IO[bytes], request: Any) -> openai.APIConnectionError:
    """Empty a file whose rest cannot be had, and return the error that has it downloaded once more."""
    _empty(file)
    return openai.APIConnectionError(message="the rest of the file could not be had", request=request)


def _empty(file: IO[bytes]) -> None:
    file.seek(0)
    file.truncate()
