"""The Batch API's calls: upload, create, look up, list, cancel, download, each safe to repeat."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from typing import IO, TYPE_CHECKING, Any, TypeVar

import openai

from openai_eval_client._batches.files import temporary_file
from openai_eval_client._batches.status import enqueued_refusal, is_enqueued_limit, read_job_metadata
from openai_eval_client._sdk import call_sdk, deadline, retry_for, retrying
from openai_eval_client._validation import shown
from openai_eval_client._wire import forget_key, read_failure
from openai_eval_client.errors import QuotaError, ValidationError, sdk_httpx

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from openai.types import Batch, FileObject

    from openai_eval_client._batches.files import InputFile
    from openai_eval_client._batches.status import JobRecord
    from openai_eval_client.config import OpenAIConfig

T = TypeVar("T")

_URL = "https://client.invalid/"  # of the request that an error names
_FILE_LAG = 60.0  # seconds for which a new file may be unknown
_LATE = 2.0  # seconds in which a batch may still appear whose creation seemed to fail
_SLOWEST = 50_000  # bytes a second of the slowest upload that is waited for
_PARTIAL, _BAD_REQUEST, _NOT_FOUND, _NO_SUCH_RANGE = 206, 400, 404, 416
_WINDOW = "completion_window"
_CLOCKS_APART = 3600.0  # seconds; how much earlier than ours the server's clock may be


class BatchApi:
    """The endpoints of files and batches; a call is made again where that may help."""

    def __init__(self, sdk: openai.AsyncOpenAI, config: OpenAIConfig, max_wait: float) -> None:
        self._sdk = sdk
        self._key = config.api_key
        self._timeout = config.timeout
        self._retries = config.max_retries
        self._max_wait = max_wait

    async def upload(self, input_file: InputFile) -> str:
        """Upload an input file and return its id, once the server knows it."""
        files = self._sdk.files

        def attempt() -> Awaitable[FileObject]:
            file = ("requests.jsonl", input_file.lines(), "application/jsonl")
            return _checked(files.create(file=file, purpose="batch", timeout=None))

        uploaded = await self._repeat(attempt, self._timeout + input_file.size / _SLOWEST)
        look = functools.partial(files.retrieve, uploaded.id, timeout=None)
        with contextlib.suppress(openai.APIError):  # some servers have no such endpoint
            await _once_known(uploaded.id, functools.partial(self._repeat, look, self._timeout), _FILE_LAG)
        return uploaded.id

    async def create(self, job: JobRecord, file: InputFile) -> Batch:
        """Create the batch of an uploaded file, once: after an unclear failure it is looked for first."""

        async def attempt() -> Batch:
            if file.key in job.unclear:
                await asyncio.sleep(min(_LATE, self._timeout / 4))
                found = await self.find(job, file)
                if found is not None:
                    return found
            job.unclear.add(file.key)
            call = self._sdk.batches.create(
                completion_window=job.window,  # type: ignore[arg-type]  # others than OpenAI take "7d"
                endpoint=job.endpoint,  # type: ignore[arg-type]
                input_file_id=str(file.file_id),
                metadata=job.metadata_of(file),
                timeout=None,
            )
            try:
                return await _checked(call)
            except openai.APIStatusError as error:
                is_bad = isinstance(error, openai.BadRequestError)
                refuses_window = error.param == _WINDOW or (is_bad and _WINDOW in error.message)
                is_unclear = read_failure(error).retry and not isinstance(error, openai.RateLimitError)
                if refuses_window or not is_unclear:
                    job.unclear.discard(file.key)
                if refuses_window:
                    why = f"{_WINDOW}={job.window!r}: the server refuses it: {error.message}"
                    raise ValidationError(why, field=_WINDOW) from None
                raise

        create = functools.partial(self._repeat, attempt, self._timeout)
        return await _once_known(str(file.file_id), create, _FILE_LAG)

    async def find(self, job: JobRecord, file: InputFile) -> Batch | None:
        """Return the newest batch that was made of a file, None where there is none."""
        wanted = job.name, file.first, file.count
        async with contextlib.aclosing(self.all_batches(since=job.since)) as batches:
            async for batch in batches:
                known = read_job_metadata(batch.metadata)
                if known is not None and known.key == wanted and not enqueued_refusal(batch):
                    return batch
        return None

    async def all_batches(self, *, since: float = 0.0) -> AsyncGenerator[Batch, None]:
        """Yield the account's batches, the newest first, back to a time (seconds since the epoch)."""
        after: dict[str, Any] = {}
        while True:
            page = await self._repeat(functools.partial(self._page, after), self._timeout)
            for batch in page.data:
                if batch.created_at < since - _CLOCKS_APART:
                    return
                yield batch
            if not page.data or not page.has_next_page():
                return
            after = {"after": page.data[-1].id}

    async def get(self, batch_id: str) -> Batch:
        """Look a batch up."""
        look = functools.partial(self._sdk.batches.retrieve, batch_id, timeout=None)
        return await self._repeat(lambda: _checked(look()), self._timeout)

    async def cancel(self, batch_id: str) -> Batch:
        """Ask for a batch to be cancelled; one that has ended stays as it is."""

        async def attempt() -> Batch | None:
            try:
                return await _checked(self._sdk.batches.cancel(batch_id, timeout=None))
            except (openai.BadRequestError, openai.ConflictError):  # it has ended
                return None

        return await self._repeat(attempt, self._timeout) or await self.get(batch_id)

    async def download(self, file_id: str, *, made_at: float = 0.0) -> IO[bytes]:
        """Download a file to disk; where the connection drops, go on from there, else from the start."""
        file = temporary_file()
        patience = max(0.0, _FILE_LAG - abs(time.time() - made_at))
        fetch = functools.partial(self._repeat, lambda: self._fetch(file_id, file), None)
        try:
            while True:
                before = file.tell()
                try:
                    await _once_known(file_id, fetch, patience)
                    break
                except openai.APIConnectionError:
                    if file.tell() <= before:  # as long as more of it arrives, drops are not counted
                        raise
        except BaseException:
            file.close()
            raise
        file.seek(0)
        return file

    async def _repeat(self, attempt: Callable[[], Awaitable[T]], seconds: float | None) -> T:
        """Make a call with so many seconds for each attempt, again where that may help."""

        async def once() -> Any:
            try:
                return await call_sdk(attempt(), seconds=seconds, url=_URL)
            except openai.APIError as error:
                forget_key(error, self._key)
                if isinstance(error, openai.APIStatusError) and is_enqueued_limit(error):
                    raise QuotaError(error.message, response=error.response, body=error.body) from None
                raise

        repeated = retrying(once, max_retries=self._retries, max_wait=self._max_wait, governed=False)
        answer: T = await repeated()
        return answer

    async def _page(self, after: dict[str, Any]) -> Any:
        try:
            page = await self._sdk.batches.list(limit=100, timeout=None, **after)
        except AttributeError as error:  # the SDK takes the page of something in between for a list
            raise _garbled(error) from error
        if not isinstance(page.data, list):
            raise _garbled(page.data)
        return page

    async def _fetch(self, file_id: str, file: IO[bytes]) -> None:
        """Append what is missing of a file; write all of it where the server does not send a part."""
        start = file.tell()
        headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={start}-"} if start else {})}
        content = self._sdk.files.with_streaming_response.content
        async with contextlib.AsyncExitStack() as stack:
            try:
                async with deadline(self._timeout):
                    answer = content(file_id, extra_headers=headers, timeout=None)
                    response = await stack.enter_async_context(answer)
            except openai.APIStatusError as error:
                if error.status_code == _NO_SUCH_RANGE:  # all of it was there, or never was
                    raise _from_the_start(file, error.request) from error
                raise
            if response.status_code != _PARTIAL:
                _empty(file)
            elif not response.headers.get("content-range", "").startswith(f"bytes {start}-"):
                raise _from_the_start(file, response.http_request)
            chunks = response.iter_bytes()
            while True:
                async with deadline(self._timeout):
                    chunk = await anext(chunks, None)
                if chunk is None:
                    return
                file.write(chunk)


async def _checked(call: Awaitable[T]) -> T:
    """Return an object of the API; refuse a page of something in between, which the SDK returns as text."""
    answer = await call
    if not isinstance(getattr(answer, "id", None), str):
        raise _garbled(answer)
    return answer


def _garbled(answer: object) -> openai.APIConnectionError:
    request = sdk_httpx().Request("POST", _URL)
    return openai.APIConnectionError(message=f"no object of the API: {shown(answer)}", request=request)


async def _once_known(file_id: str, action: Callable[[], Awaitable[T]], seconds: float) -> T:
    """Do something with a file, again for so many seconds while the server does not know of it yet."""

    def is_unknown(error: openai.APIStatusError) -> bool:
        message = error.message.lower()
        names_it = any(text in message for text in (file_id.lower(), "no such", "not found"))
        return error.status_code in {_BAD_REQUEST, _NOT_FOUND} and "file" in message and names_it

    answer: T = await retry_for(action, is_worth=is_unknown, seconds=seconds)()
    return answer


def _from_the_start(file: IO[bytes], request: Any) -> openai.APIConnectionError:
    """Empty a file whose rest cannot be had, and return the error that has it downloaded once more."""
    _empty(file)
    return openai.APIConnectionError(message="the rest of the file could not be had", request=request)


def _empty(file: IO[bytes]) -> None:
    file.seek(0)
    file.truncate()
