"""From the output files of a batch to one outcome for each request; what it may cost, and what it cost."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

import openai

from openai_eval_client._batches.budget import settle_reservation
from openai_eval_client._batches.files import (
    MIXED,
    RequestIndex,
    custom_id_of,
    first_line,
    guess_index,
    numbered_id,
    parse_line,
    read_bodies,
    read_index,
)
from openai_eval_client._batches.objects import (
    EXPIRED,
    LOST,
    MISSING,
    NO_ANSWER,
    REFUSED_ANSWER,
    UNREADABLE,
    UNUSABLE_FILE,
    JobMetadata,
    api_in,
    is_id,
    lost_error,
    missing_error,
    read_job_metadata,
    request_counts,
    state_of,
    stated_errors,
    with_index,
)
from openai_eval_client._cost import exact
from openai_eval_client._log import inform, warn
from openai_eval_client._validation import is_header_text, shown
from openai_eval_client._wire import (
    Kind,
    Parameters,
    Usage,
    decoded,
    dict_in,
    error_of,
    fault_in,
    forget_key,
    masked,
    read_answer,
    read_failure,
    read_usage,
    status_error,
    usage_of,
    without_key,
    words_of,
)
from openai_eval_client.errors import BatchError, sdk_httpx
from openai_eval_client.models import ModelResponse

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from decimal import Decimal

    from openai.types import Batch

    from openai_eval_client._account import Account
    from openai_eval_client._batches.api import BatchApi
    from openai_eval_client._batches.budget import Outcome
    from openai_eval_client._batches.files import InputFile
    from openai_eval_client._cost import Pricer
    from openai_eval_client._tokens import TokenCounter


_OK, _REDIRECT, _BAD_REQUEST, _NOT_FOUND = 200, 300, 400, 404
_SHOWN = 500  # characters of why a line holds no answer
_STATUS = re.compile(r"[1-5][0-9][0-9](?:\.0)?")
PATIENCE = 60.0  # seconds for which results are looked for that should be there
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 8.0  # seconds between two looks
_NOT_OURS = JobMetadata(
    job="", total=0, first=0, count=0, start=None, numbered=False, temperature=None, model=""
)
_TIMED_OUT = "request_timeout"  # https://platform.openai.com/docs/api-reference/batch/request-output
_TRANSIENT = frozenset({EXPIRED, MISSING, _TIMED_OUT, NO_ANSWER})
_MAYBE_PAID = frozenset({LOST, UNREADABLE})  # answered, and not to be paid twice unasked


@dataclass(slots=True)
class BatchResults:
    """The outcomes of one batch, and what was odd about its files."""

    outcomes: dict[int, Outcome] = field(default_factory=dict)  # by the index of the request
    oddities: Counter[str] = field(default_factory=Counter)  # how often each thing happened that should not
    lines: int = 0  # in all files
    unplaced: list[BatchError] = field(default_factory=list)  # of requests of which no index is known
    ran: set[int] = field(default_factory=set)  # requests that a model answered, readable or not
    is_late: bool = False  # whether more results may come: these are not settled
    gone: list[str] = field(default_factory=list)  # files that the batch names and that are not there
    is_cut: bool = False  # whether a file ends in the middle of a line

    @property
    def responses(self) -> dict[int, ModelResponse]:
        """The outcomes that are responses."""
        return {n: outcome for n, outcome in self.outcomes.items() if isinstance(outcome, ModelResponse)}


class LineReader:
    """Reads the result lines of one batch into responses and errors, and prices the responses."""

    def __init__(
        self, api: str, pricer: Pricer, *, model: str = "", asked: Parameters | None = None, key: str = ""
    ) -> None:
        self.prices: list[tuple[str, Usage, Decimal | None]] = []  # of each answer, in USD
        nothing = Parameters(api=api, model=model, timeout=0.0, body={})
        self._parameters = nothing if asked is None else dataclasses.replace(asked, model=model)
        self._pricer = pricer
        self.billed: dict[int, float | None] = {}  # USD of errors that were billed, by index of the request
        self._key = key  # of the API, which a server may echo

    def read(self, files: Iterable[Iterable[bytes]], index: RequestIndex) -> BatchResults:
        """Read the lines of a batch's output and error files."""
        # An answer counts more than an error, and the first of two answers more than the second. Every oddity
        # is counted: none loses another request's result.
        results = BatchResults()
        expected = frozenset(index.indexes) if index.by_name is None else None
        with exact():
            for file in files:
                raw = b"\n"
                for raw in file:
                    if not raw.isspace():
                        results.lines += 1
                        self._read_line(raw, index, expected, results)
                results.is_cut |= not raw.endswith(b"\n") and parse_line(raw) is None
        return results

    def price(self, model: str, usage: Usage) -> float | None:
        """Note and return the price of an answer in USD; None where it is not known."""
        cost = self._pricer.cost(model, usage, batch=True)
        self.prices.append((model, usage, cost))
        return None if cost is None else float(cost)

    def _read_line(
        self, raw: bytes, index: RequestIndex, expected: frozenset[int] | None, results: BatchResults
    ) -> None:
        raw = without_key(raw, self._key)
        line = parse_line(raw)
        results.oddities["unreadable lines"] += line is None
        name = custom_id_of(line, raw)
        request = index.index_of(name)
        if request is None or (expected is not None and request not in expected):
            results.oddities["lines of no request of this job"] += line is not None
            return
        before = results.outcomes.get(request)
        results.oddities["second lines of one request"] += before is not None
        if isinstance(before, ModelResponse):  # not read: it would be priced twice
            return
        outcome = self._outcome(line, raw, request, index.temperature_of(request))
        status = None if line is None else _status_in(dict_in(line.get("response")), default=None)
        if line is None or status == _OK or isinstance(outcome, ModelResponse):
            results.ran.add(request)
        if before is None or isinstance(outcome, ModelResponse):
            results.outcomes[request] = outcome

    def _outcome(
        self, line: dict[str, Any] | None, raw: bytes, index: int, temperature: float | None
    ) -> Outcome:
        if line is None:
            why = "its result is cut short, or nested too deeply to be read"
            return BatchError(why, code=UNREADABLE, line=index + 1)
        response = line.get("response")
        if not isinstance(response, dict):
            return _line_error(masked(line.get("error"), self._key), index)
        status, request_id = _status_in(response), response.get("request_id")
        body = _body_in(response, self._parameters.api)
        if status is None and fault_in(body, self._parameters.api) is None:
            status = _OK  # it cannot be read, but there is a whole answer
        request_id = request_id if isinstance(request_id, str) else None
        error = None if status is None else _failure(status, body, request_id, self._parameters.api)
        if error is not None:
            forget_key(error, self._key)
            used = _usage_in(body) if status == _OK else None
            if used is not None:
                self.billed[index] = self.price(used.model or self._parameters.model, used)
        if status is not None and error is None:
            usage = usage_of(body)
            return read_answer(
                body,
                self._parameters,
                usage=usage,
                cost=None  # what is missing is estimated first
                if usage is None or usage.estimated
                else self.price(usage.model or self._parameters.model, usage),
                kept=raw if body is response.get("body") else None,  # a tenth of the parsed body's memory
                temperature=temperature,
                request_id=request_id,
                latency=0.0,
            )
        if isinstance(error, openai.APIStatusError):
            return error
        if line.get("error"):
            return _line_error(masked(line["error"], self._key), index)
        why = f"status {response.get('status_code')!r} and no answer" if error is None else error.message
        failure = None if error is None else read_failure(error)
        may_pass = failure is None or failure.retry or failure.kind is Kind.NOT_AN_API
        return BatchError(why[:_SHOWN], code=NO_ANSWER if may_pass else REFUSED_ANSWER, line=index + 1)


def _status_in(response: Mapping[str, Any], default: int | None = _OK) -> int | None:
    """Return the HTTP status of a result, which some servers send as a text; None where it is none."""
    # Any that says success is 200 here: it is the body that tells whether there is an answer.
    status = response.get("status_code")
    if status is None:
        return _OK if response.get("body") else default
    text = str(status) if isinstance(status, str | int | float) else ""
    number = int(float(text)) if _STATUS.fullmatch(text) else 0
    return _OK if _OK <= number < _REDIRECT else number if number >= _BAD_REQUEST else None


def _body_in(response: Mapping[str, Any], api: str) -> Any:
    """Return the body of a result, which some servers send as JSON in a text."""
    body = response.get("body")
    return decoded(body.encode(errors="replace"), api)[0] or body if isinstance(body, str) else body


def _usage_in(body: object) -> Usage | None:
    if isinstance(body, str):
        return read_usage(body.encode(errors="replace"))
    return usage_of(body) if isinstance(body, dict) else None


def is_curable(error: Exception, on_unclear: str = "raise") -> bool:
    """Return whether the same request may succeed in another batch, and is to be paid for again."""
    if not isinstance(error, BatchError):
        return read_failure(error).retry
    return error.code in _TRANSIENT or (error.code in _MAYBE_PAID and on_unclear == "retry")


def _line_error(error: object, index: int) -> BatchError:
    """Return the error of a request that the API never ran."""
    words, given = words_of({"error": error}), error if isinstance(error, dict) else {}
    param = given.get("param")
    return BatchError(
        words.message or "no response and no error",
        code=words.code or NO_ANSWER,
        line=index + 1,
        param=param if isinstance(param, str) else None,
    )


def _failure(status: int, body: Any, request_id: str | None, api: str) -> openai.APIError | None:
    """Return the error that such a response is online; None for an answer."""
    fault = fault_in(body, api) if status == _OK else None
    if status == _OK and fault is None:
        return None
    headers = {"content-type": "application/json"}
    if request_id is not None and is_header_text(request_id):
        headers["x-request-id"] = request_id
    request = sdk_httpx().Request("POST", "https://batch.invalid/")
    content = body.encode(errors="replace") if isinstance(body, str) else json.dumps(body).encode()
    reply = sdk_httpx().Response(status, headers=headers, content=content, request=request)
    return status_error(status, body, reply) if fault is None else error_of(fault, body, reply)


class BatchSettler:
    """Settles batches that have ended: reads their results, and books what they cost, once."""

    def __init__(self, api: BatchApi, counter: TokenCounter, account: Account) -> None:
        self._api = api
        self._counter = counter
        self._ledger = account.ledger
        self._recorder = account.recorder
        self._booked: set[str] = set()
        self.unsettled: dict[str, InputFile] = {}  # with a reservation, by the id of their batch

    async def settle(
        self,
        batch: Batch,
        *,
        file: InputFile | None = None,
        offset: int = 0,
        asked: Parameters | None = None,
        seconds: float = 0.0,
        is_last: bool = True,
    ) -> BatchResults:
        """Read the results of a batch; without its input file, its first request may have index `offset`.

        Where results are not there that should be, look again for so many seconds. If they still are not,
        the results are late, and are booked and settled only if it is the last time.
        """
        pricer = self._ledger.pricer_for(None)
        await pricer.ready()
        end, pause = time.monotonic() + seconds, _FIRST_PAUSE
        known = None if file is None else RequestIndex(file.indexes, temperature=file.temperature)
        while True:
            results, index, reader = await self._read(batch, pricer, file, known, offset, asked)
            known = index
            is_short = _is_short(batch, results, index)
            left = end - time.monotonic()
            if not is_short or left <= 0:
                break
            text = "batch %s: not all of its results are there: looking again in %.1f s"
            inform(text, batch.id, pause, event="batch_results_late", batch_id=batch.id)
            await asyncio.sleep(min(pause, left))
            pause = min(2 * pause, _LONGEST_PAUSE)
            with contextlib.suppress(openai.APIError):
                batch = await self._api.get(batch.id)
        if is_short and not is_last:
            results.is_late = True
            return results
        if index.is_guess and not index.numbered:
            text = "batch %s: the order of its requests is not known any more"
            warn(text, batch.id, event="batch_order_unknown", batch_id=batch.id)
        for file_id in results.gone:
            _warn_of_gone(batch, "result", file_id)
        _warn_of_oddities(batch, results)
        explain_missing(batch, results, index)
        _name_outcomes(results, index)
        await self._count_missing_usage(batch, results, index.indexes, reader)
        if batch.id not in self._booked:  # else it was settled before
            self._booked.add(batch.id)
            self._ledger.book_batch(reader.prices)
            answers = results.responses.values()
            self._recorder.settled(answers, len(results.outcomes) - len(answers))
        submitted = self.unsettled.pop(batch.id, file)
        if submitted is not None:
            settle_reservation(submitted, batch, results.outcomes, reader.billed)
        return results

    async def _read(  # noqa: PLR0917
        self,
        batch: Batch,
        pricer: Pricer,
        file: InputFile | None,
        known: RequestIndex | None,
        offset: int,
        asked: Parameters | None,
    ) -> tuple[BatchResults, RequestIndex, LineReader]:
        """Read the result files of a batch, as far as they are there."""
        source = file or read_job_metadata(batch.metadata)
        model = (source and source.model) or getattr(batch, "model", None) or ""
        async with contextlib.AsyncExitStack() as stack:
            files, gone = [], []
            for file_id in filter(is_id, (batch.output_file_id, batch.error_file_id)):
                found = await self._download(batch, "result", file_id)
                if found is None:
                    gone.append(str(file_id))
                else:
                    files.append(stack.enter_context(found))
            api = await self._api_of(batch, files) if asked is None else asked.api
            reader = LineReader(api, pricer, model=model, asked=asked, key=self._api.key)
            if known is None:
                known = await self._stated_index(batch, offset)
            index = known
            if index is None or index.is_guess:
                index = await _guess_index(batch, files, offset)
            results = await asyncio.to_thread(reader.read, files, index)
        results.gone = gone
        return results, index, reader

    async def _api_of(self, batch: Batch, files: Sequence[IO[bytes]]) -> str:
        """Return the API that a batch is of; if the server leaves it out, by what was asked or answered."""
        api = api_in(batch.endpoint)
        if api is None and (batch.endpoint or "").strip():
            message = f"batch {batch.id} is of {batch.endpoint}: read it with client.openai.files.content"
            raise BatchError(message, code="unsupported_endpoint")
        if api is None:
            asked = await self._download(batch, "input", batch.input_file_id)
            with asked or contextlib.nullcontext():
                api = _api_in_lines([*([] if asked is None else [asked]), *files])
        return api or "chat"

    async def name_requests(self, batch: Batch, errors: Iterable[BatchError], offset: int) -> None:
        """Turn the lines of a batch's file, in its errors, into positions in the caller's list."""
        named = [error for error in errors if error.line is not None]
        index = await self._stated_index(batch, offset) if named else None
        if index is None:
            return
        for error in named:
            request = index.index_at(error.line or 0)
            error.line = None if request is None else request + 1

    async def _stated_index(self, batch: Batch, offset: int) -> RequestIndex | None:
        """Return what a batch was asked, by its metadata or its input file; None where both do not tell."""
        stated, job = None, read_job_metadata(batch.metadata) or _NOT_OURS
        start = offset if job.start is None else job.start
        if job.start is not None and job.numbered and not job.named:
            stated = RequestIndex(range(start, start + job.count), temperature=job.temperature)
            if job.temperature != MIXED:
                return stated
        file = await self._download(batch, "input", batch.input_file_id)
        if file is None:
            return stated
        with file:
            return await asyncio.to_thread(read_index, file, numbered=job.numbered, start=start)

    async def _download(self, batch: Batch, kind: str, file_id: str | None) -> IO[bytes] | None:
        """Download a file of a batch; None where it is gone, or not there yet."""
        try:
            return await self._api.download(file_id or "")
        except openai.APIStatusError as error:
            if error.status_code != _NOT_FOUND and (error.status_code != _BAD_REQUEST or kind != "result"):
                raise
            if kind == "input":
                _warn_of_gone(batch, kind, file_id)
            return None

    async def _count_missing_usage(
        self, batch: Batch, results: BatchResults, indexes: Sequence[int], reader: LineReader
    ) -> None:
        """Estimate the usage that the server left out, as for answers online."""
        without = {n: response for n, response in results.responses.items() if response.usage.estimated}
        if not without:
            return
        bodies: dict[int, Any] = {}
        file = await self._download(batch, "input", batch.input_file_id)
        if file is not None:
            wanted = {line: index for line, index in enumerate(indexes) if index in without}
            with file:
                bodies = await asyncio.to_thread(read_bodies, file, wanted)
        for index, response in without.items():
            tokens = await self._counter.count_input(bodies[index]) if index in bodies else 0
            estimate = await self._counter.estimate_usage(response, tokens)
            with exact():
                response.usage.estimated_cost = reader.price(response.model, estimate)


def _api_in_lines(files: Iterable[IO[bytes]]) -> str | None:
    """Return the API that the first line of a file is of, asked or answered."""
    for line in map(first_line, files):
        body = dict_in(dict_in(line.get("response")).get("body"))
        if (api := api_in(line.get("url"))) or body:
            return api or ("responses" if "output" in body else "chat")
    return None


def _is_short(batch: Batch, results: BatchResults, index: RequestIndex) -> bool:
    """Return whether there should be more results than there are now."""
    if _unusable_files(batch):
        return False
    is_missing = any(request not in results.outcomes for request in index.indexes) or index.is_guess
    return results.is_cut or (is_missing and (bool(results.gone) or _is_lost_by(batch, results)))


def _is_lost_by(batch: Batch, results: BatchResults) -> bool:
    """Return whether a batch says that it answered more requests than its files do."""
    total, completed, _ = request_counts(batch)
    stated = batch.request_counts
    is_counted = stated is not None and bool(stated.completed or stated.failed)
    has_files = batch.output_file_id or batch.error_file_id or not total
    is_empty = state_of(batch) == "completed" and not is_counted and not has_files
    return state_of(batch) != "failed" and (completed > len(results.ran) or is_empty)


def _unusable_files(batch: Batch) -> list[str]:
    """Return what a batch names as its result files that cannot be the id of one."""
    named = {name: getattr(batch, name) for name in ("output_file_id", "error_file_id")}
    return [f"{name}={shown(value)}" for name, value in named.items() if value and not is_id(value)]


def explain_missing(batch: Batch, results: BatchResults, index: RequestIndex) -> None:
    """Give each request without a result the reason: that of its line in the batch's errors, else its end."""
    reason = lost_error(batch) if _is_lost_by(batch, results) else missing_error(batch)
    if unusable := _unusable_files(batch):
        what = f"batch {batch.id} names {unusable[0]}, which is not the id of a file"
        reason = BatchError(f"{what}: it is not asked for", code=UNUSABLE_FILE)
    of_request = {index.index_at(each.line): each for each in stated_errors(batch) if each.line is not None}
    for request in index.indexes:
        if request not in results.outcomes:
            results.outcomes[request] = with_index(of_request.get(request, reason), request)
    if index.is_guess:
        results.unplaced = [reason] * (request_counts(batch)[0] - len(index.indexes))


def _name_outcomes(results: BatchResults, index: RequestIndex) -> None:
    """Give each outcome the custom_id that the caller gave its request."""
    for name, request in (index.by_name or {}).items():
        outcome: Any = results.outcomes.get(request)
        if name == numbered_id(request) or outcome is None:
            continue
        own = name.removesuffix(f"#{request}") if index.numbered else name
        if isinstance(outcome, ModelResponse):
            outcome._custom_id = own  # noqa: SLF001  # read by users, set here alone
        else:
            outcome.custom_id = own


def _warn_of_gone(batch: Batch, kind: str, file_id: str | None) -> None:
    text = "batch %s: its %s file %s is gone"
    warn(text, batch.id, kind, file_id, event="batch_file_gone", batch_id=batch.id)


def _warn_of_oddities(batch: Batch, results: BatchResults) -> None:
    """Warn of what is odd about the files, and where the API counts otherwise."""
    for what, times in results.oddities.items():
        if times:
            text = "batch %s: %d %s in its result files"
            warn(text, batch.id, times, what, event="batch_results_odd", batch_id=batch.id)
    stated, held = batch.request_counts, len(results.responses)
    if stated is not None and (stated.completed or 0) != held:
        text = "batch %s: the API counts %d completed requests, its files hold %d answers"
        warn(text, batch.id, stated.completed or 0, held, event="batch_results_odd", batch_id=batch.id)


async def _guess_index(batch: Batch, files: Sequence[IO[bytes]], offset: int) -> RequestIndex:
    """Return what a batch was asked whose input file is gone, as far as its results tell."""
    job = read_job_metadata(batch.metadata) or _NOT_OURS
    start = offset if job.start is None else job.start
    count = request_counts(batch)[0]
    index = await asyncio.to_thread(
        guess_index, files, numbered=job.numbered, start=start, count=count, named=job.named
    )
    index.temperature = job.temperature
    return index
