"""The Batch API: its calls, each safe to repeat."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from typing import IO, TYPE_CHECKING, Any, TypeVar

import openai

from openai_eval_client._batches.files import temporary_file
from openai_eval_client._batches.objects import (
    UNCLEAR,
    WRONG_BATCH,
    enqueued_refusal,
    is_enqueued_limit,
    is_id,
    read_batch,
    read_job_metadata,
)
from openai_eval_client._log import warn
from openai_eval_client._sdk import call_sdk, deadline, retry_for, retrying
from openai_eval_client._validation import shown
from openai_eval_client._wire import Kind, forget_key, masked, of_error, read_failure
from openai_eval_client.errors import BatchError, QuotaError, ValidationError, sdk_httpx

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from openai.types import Batch, FileObject

    from openai_eval_client._batches.files import InputFile
    from openai_eval_client._batches.objects import JobRecord
    from openai_eval_client.config import OpenAIConfig

T = TypeVar("T")

_URL = "https://client.invalid/"  # of the request that an error names
_FILE_LAG = 60.0  # seconds for which a new file may be unknown
_LATE = 2.0  # seconds; for 7.5 times as long a batch is looked for whose creation seemed to fail
_LISTING = 60.0  # seconds that one look through the list of batches may take
_MOST_PAGES, _RECENT_PAGES = 2_000, 200  # of that list; of what is looked through for one batch
_SLOWEST = 50_000  # bytes a second of the slowest upload that is waited for
_PARTIAL, _BAD_REQUEST, _NOT_FOUND, _NO_SUCH_RANGE = 206, 400, 404, 416
_WINDOW = "completion_window"
_CLOCKS_APART = 90_000.0  # seconds; how much earlier than ours the server's clock may be: a day and zones


class BatchApi:
    """The endpoints of files and batches; a call is made again where that may help."""

    def __init__(self, sdk: openai.AsyncOpenAI, config: OpenAIConfig, max_wait: float) -> None:
        self._sdk = sdk
        self.key = config.api_key
        self._timeout = config.timeout
        self._retries = config.max_retries
        self.max_wait = max_wait

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

    async def create(
        self, job: JobRecord, file: InputFile, *, on_unclear: str, record: Callable[[], Awaitable[None]]
    ) -> Batch:
        """Create the batch of an uploaded file, once; `record` puts on disk that it is asked for."""

        async def attempt() -> Batch:
            if file.key in job.unclear:
                found = await self.look_for(job, file, on_unclear=on_unclear)
                if found is not None:
                    return found
            job.unclear[file.key] = time.time()
            await record()
            call = self._sdk.batches.create(
                completion_window=job.window,  # type: ignore[arg-type]  # others than OpenAI take "7d"
                endpoint=job.endpoint,  # type: ignore[arg-type]
                input_file_id=str(file.file_id),
                metadata=job.metadata_of(file),
                timeout=None,
            )
            try:
                return read_batch(await self._call(_checked(call), self._timeout))
            except openai.APIError as error:
                failure = read_failure(error)
                if failure.retry and isinstance(error, openai.RateLimitError):
                    found = await self.look_for(job, file, on_unclear="retry")  # nothing was made, it says
                    if found is not None:
                        return found
                is_clear = not failure.retry or failure.kind is Kind.UNREACHABLE
                if is_clear or isinstance(error, openai.RateLimitError):
                    job.unclear.pop(file.key, None)
                    await record()
                _check_window(error, job.window)
                raise

        create = self._retrying(attempt)
        return await _once_known(str(file.file_id), create, _FILE_LAG)

    async def look_for(self, job: JobRecord, file: InputFile, *, on_unclear: str) -> Batch | None:
        """Return the batch of a file whose creation was unclear; None where there is none.

        Raises:
            BatchError: It is not known whether there is one, and nothing is to be paid twice.
        """
        waits = [_LATE * share for share in (0.5, 1, 2, 4)]
        age = time.time() - job.unclear.get(file.key, 0.0)
        waits = waits if 0 <= age < sum(waits) else [0.0]
        doubt = ""
        for wait in waits:
            await asyncio.sleep(wait)
            found, doubt = await self._find(job, file)
            if found is not None:
                return found
        if doubt and on_unclear == "raise":
            what = f"it is not known whether the batch of {file.count} requests was created: {doubt}"
            advice = "look for it at the provider; on_unclear='retry' submits it again"
            raise BatchError(f"{what}; {advice}", code=UNCLEAR)
        return None

    async def _find(self, job: JobRecord, file: InputFile) -> tuple[Batch | None, str]:
        """Return the newest batch that was made of a file, and else why the list may not show it."""
        wanted, file_id = (job.name, file.first, file.count), job.uploaded.get(file.key)
        seen: set[str] = set()
        nameless = False
        try:
            async with (
                deadline(_LISTING),
                contextlib.aclosing(self._listed(job.since, pages=_RECENT_PAGES)) as batches,
            ):
                async for batch in batches:
                    seen.add(batch.id)
                    known = read_job_metadata(batch.metadata)
                    is_same_file = file_id is not None and batch.input_file_id == file_id
                    if (is_same_file or (known and known.key == wanted)) and not enqueued_refusal(batch):
                        return batch, ""
                    nameless |= known is None and batch.input_file_id is None
        except openai.AuthenticationError:
            raise
        except (openai.OpenAIError, asyncio.TimeoutError) as error:
            return None, f"the list of batches cannot be read ({error or 'it takes too long'})"
        lacking = set(job.made.values()) - seen
        if not seen:
            return None, "the list of batches is empty"
        if lacking:
            return None, f"the list of batches lacks {min(lacking)}, which was created before"
        return None, "the list of batches does not say what they were made of" if nameless else ""

    async def all_batches(self) -> AsyncGenerator[Batch, None]:
        """Yield the account's batches, the newest first."""
        try:
            async with contextlib.aclosing(self._listed()) as batches:
                async for batch in batches:
                    yield batch
        except BatchError as error:
            warn("%s: what was read of it counts", error, event="batch_list_odd", **of_error(error))

    async def _listed(self, since: float = 0.0, *, pages: int = _MOST_PAGES) -> AsyncGenerator[Batch, None]:
        """Yield the account's batches, the newest first, back to a time (seconds since the epoch)."""
        after: dict[str, Any] = {}
        seen: set[str] = set()
        for _ in range(pages):
            page = await self._repeat(functools.partial(self._page, after), self._timeout)
            fresh = [read_batch(batch) for batch in page.data if batch.id not in seen]
            for batch in fresh:
                yield batch
            times = [batch.created_at for batch in fresh]
            is_older = all(at is not None and at < since - _CLOCKS_APART for at in times)
            if fresh and (is_older or not page.has_next_page()):
                return
            if not fresh and page.has_more is not True:
                return
            if not fresh:
                break
            seen.update(batch.id for batch in fresh)
            after = {"after": page.data[-1].id}
        raise BatchError("the list of batches does not end", code="endless_list")

    async def get(self, batch_id: str) -> Batch:
        """Look a batch up."""
        look = self._sdk.batches.retrieve
        return await self._repeat(lambda: _named(batch_id, look(batch_id, timeout=None)), self._timeout)

    async def cancel(self, batch_id: str) -> Batch:
        """Ask for a batch to be cancelled; one that has ended stays as it is."""

        async def attempt() -> Batch | None:
            try:
                return await _named(batch_id, self._sdk.batches.cancel(batch_id, timeout=None))
            except (openai.BadRequestError, openai.ConflictError):  # it has ended
                return None

        return await self._repeat(attempt, self._timeout) or await self.get(batch_id)

    async def download(self, file_id: str) -> IO[bytes]:
        """Download a file to disk; where the connection drops, go on from there, else from the start."""
        if not is_id(file_id):  # the server does not name it, or names something else
            nothing = sdk_httpx().Response(_NOT_FOUND, request=sdk_httpx().Request("GET", _URL))
            raise openai.NotFoundError("no file is named", response=nothing, body=None)
        file = temporary_file()
        fetch = functools.partial(self._repeat, lambda: self._fetch(file_id, file), None)
        try:
            while True:
                before = file.tell()
                try:
                    await fetch()
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

        async def once() -> T:
            return await self._call(attempt(), seconds)

        return await self._retrying(once)()

    def _retrying(self, attempt: Callable[[], Awaitable[T]]) -> Callable[[], Awaitable[T]]:
        return retrying(attempt, max_retries=self._retries, max_wait=self.max_wait, governed=False)

    async def _call(self, call: Awaitable[T], seconds: float | None) -> T:
        """Make one call; its error is one of the SDK's, or ours, without the key."""
        try:
            answer: T = masked(await call_sdk(call, seconds=seconds, url=_URL), self.key)
        except openai.APIError as error:
            forget_key(error, self.key)
            if isinstance(error, openai.APIStatusError) and is_enqueued_limit(error):
                raise QuotaError(error.message, response=error.response, body=error.body) from None
            raise
        return answer

    async def _page(self, after: dict[str, Any]) -> Any:
        try:
            page = await self._sdk.batches.list(limit=100, timeout=None, **after)
        except AttributeError as error:  # the SDK takes the page of something in between for a list
            raise _garbled(error) from error
        if not isinstance(page.data, list):
            raise _garbled(page.data)
        page.data = [each for each in page.data if is_id(getattr(each, "id", None))]
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
                file.seek(0)
                file.truncate()
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
    if not is_id(getattr(answer, "id", None)):
        raise _garbled(answer)
    return answer


async def _named(batch_id: str, call: Awaitable[Batch]) -> Batch:
    """Return the batch that was asked for, also where the server leaves its id out; refuse another."""
    batch: Any = await call
    name = getattr(batch, "id", None)
    if isinstance(name, str) and name and name != batch_id:
        message = f"batch {batch_id} was asked for, and the server answers with id={shown(name)}"
        raise BatchError(message, code=WRONG_BATCH)
    if getattr(batch, "status", None) is None:  # a page, an empty object, one of another kind
        raise _garbled(batch)
    batch.id = batch_id
    return read_batch(batch)


def _check_window(error: openai.APIError, window: str) -> None:
    """Raise a ValidationError where the server refuses the completion window."""
    is_bad = isinstance(error, openai.BadRequestError)
    is_status = isinstance(error, openai.APIStatusError)
    if (is_status and error.param == _WINDOW) or (is_bad and _WINDOW in error.message):
        why = f"{_WINDOW}={window!r}: the server refuses it: {error.message}"
        raise ValidationError(why, field=_WINDOW) from None


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
    file.seek(0)
    file.truncate()
    return openai.APIConnectionError(message="the rest of the file could not be had", request=request)
