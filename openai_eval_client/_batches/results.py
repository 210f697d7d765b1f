"""From the output files of a job to one outcome for each request."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

import openai

from openai_eval_client._batches.files import (
    ENDPOINTS,
    MIXED,
    RequestIndex,
    guess_manifest,
    name_of,
    number,
    parsed,
    read_bodies,
    read_manifest,
)
from openai_eval_client._batches.status import (
    EXPIRED,
    MISSING,
    Reasons,
    ended_at,
    read_job_metadata,
    request_counts,
)
from openai_eval_client._cost import exact
from openai_eval_client._log import inform, warn
from openai_eval_client._validation import is_header_text
from openai_eval_client._wire import (
    Parameters,
    Usage,
    estimate_usage,
    is_answer,
    read_answer,
    read_failure,
    status_error,
    usage_of,
)
from openai_eval_client.errors import BatchError, sdk_httpx
from openai_eval_client.models import ModelResponse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from decimal import Decimal

    from openai.types import Batch

    from openai_eval_client._account import Account
    from openai_eval_client._batches.api import BatchApi, Order
    from openai_eval_client._batches.budget import Bill
    from openai_eval_client._batches.files import InputFile
    from openai_eval_client._batches.resume import JobRecord
    from openai_eval_client._batches.status import JobMetadata
    from openai_eval_client._cost import Pricer
    from openai_eval_client._tokens import TokenCounter

    Outcome = ModelResponse | Exception


_OK, _BAD_REQUEST = 200, 400
UNREADABLE, NO_ANSWER = "unreadable_result", "no_answer"
_TIMED_OUT = "request_timeout"  # https://platform.openai.com/docs/api-reference/batch/request-output
_TRANSIENT = frozenset({EXPIRED, MISSING, _TIMED_OUT, UNREADABLE, NO_ANSWER})


@dataclass(slots=True)
class BatchResults:
    """The outcomes of one batch, and what was odd about its files."""

    outcomes: dict[int, Outcome] = field(default_factory=dict)  # one for each index
    oddities: Counter[str] = field(default_factory=Counter)  # how often each thing happened that should not
    lines: int = 0  # how many lines the files have
    # the errors of requests without a result of which even the index is not known
    unplaced: list[BatchError] = field(default_factory=list)
    # the custom_id that the caller gave a request, by its index, where one is known
    names: dict[int, str] = field(default_factory=dict)

    @property
    def answered(self) -> int:
        """How many requests have a response."""
        return sum(isinstance(outcome, ModelResponse) for outcome in self.outcomes.values())

    def counts(self) -> tuple[int, int, int, int]:
        """Return how many requests were answered and how many failed, and the answers' tokens in and out."""
        usages = [each.usage for each in self.outcomes.values() if isinstance(each, ModelResponse)]
        tokens = [sum(u.prompt_tokens for u in usages), sum(u.completion_tokens for u in usages)]
        return len(usages), len(self.outcomes) - len(usages), tokens[0], tokens[1]


class Reader:
    """Reads result lines into responses and errors."""

    def __init__(
        self,
        api: str,
        schema: Any,
        price: Callable[[str, Usage], float | None],
        *,
        model: str = "",
    ) -> None:
        self._parameters = Parameters(api=api, model=model, timeout=0.0, body={}, schema=schema)
        self._price = price

    def read(self, files: Iterable[Iterable[bytes]], manifest: RequestIndex) -> BatchResults:
        """Read the lines of a batch's output and error files."""
        # An answer counts more than an error, and the first of two answers more than the second. Every oddity
        # is counted: none loses another request's result.
        settlement = BatchResults()
        expected = frozenset(manifest.indexes) if manifest.by_name is None else None
        for file in files:
            for raw in file:
                if not raw.isspace():
                    settlement.lines += 1
                    self._take(raw, manifest, expected, settlement)
        return settlement

    def _take(
        self,
        raw: bytes,
        manifest: RequestIndex,
        expected: frozenset[int] | None,
        settlement: BatchResults,
    ) -> None:
        line = parsed(raw)
        if line is None:
            settlement.oddities["unreadable lines"] += 1
        name = name_of(line, raw)
        index = manifest.index_of(name)
        if index is None or (expected is not None and index not in expected):
            settlement.oddities["lines of no request of this job"] += line is not None
            return
        if name is not None and manifest.by_name is None and name != number(index):
            settlement.names[index] = name.removesuffix(f"#{index}")
        before = settlement.outcomes.get(index)
        settlement.oddities["second lines of one request"] += before is not None
        if isinstance(before, ModelResponse):  # not read: it would be priced twice
            return
        outcome = self._outcome(line, raw, index, manifest.temperature_of(index))
        if before is None or isinstance(outcome, ModelResponse):
            settlement.outcomes[index] = outcome

    def _outcome(
        self,
        line: dict[str, Any] | None,
        raw: bytes,
        index: int,
        temperature: float | None,
    ) -> Outcome:
        if line is None:
            return BatchError("its result is cut short", code=UNREADABLE, line=index + 1)
        response = line.get("response")
        if not isinstance(response, dict):
            return _line_error(line.get("error"), index)
        status, body = response.get("status_code", _OK), response.get("body")
        if status == _OK and isinstance(body, dict) and is_answer(body, self._parameters.api):
            return self._answer(body, raw, temperature, response.get("request_id"))
        if isinstance(status, int) and status >= _BAD_REQUEST:
            return _status_error(status, body, response.get("request_id"))
        if line.get("error"):
            return _line_error(line["error"], index)
        return BatchError(f"status {status} and no answer", code=NO_ANSWER, line=index + 1)

    def _answer(
        self,
        body: dict[str, Any],
        raw: bytes,
        temperature: float | None,
        request_id: Any,
    ) -> ModelResponse:
        usage = usage_of(body)
        return read_answer(
            body,
            self._parameters,
            usage=usage,
            cost=None if usage is None else self._price(usage.model or self._parameters.model, usage),
            kept=raw,  # a tenth of the parsed body's memory
            temperature=temperature,
            request_id=request_id if isinstance(request_id, str) else None,
            latency=0.0,
        )


def name_outcomes(settlement: BatchResults, manifest: RequestIndex) -> None:
    """Give each outcome the custom_id that the caller gave its request."""
    named = manifest.by_name or {}
    settlement.names.update({index: name for name, index in named.items() if name != number(index)})
    for index, name in settlement.names.items():
        outcome: Any = settlement.outcomes.get(index)
        if isinstance(outcome, ModelResponse):
            outcome._custom_id = name  # noqa: SLF001  # read by users, set here alone
        elif outcome is not None:
            outcome.custom_id = name


def is_curable(error: Exception) -> bool:
    """Return whether the same request may succeed in another batch."""
    if isinstance(error, BatchError):
        return error.code in _TRANSIENT
    return read_failure(error).retry


def _line_error(error: Any, index: int) -> BatchError:
    """Return the error of a request that the API never ran."""
    given = error if isinstance(error, dict) else {}
    code, message, param = given.get("code"), given.get("message"), given.get("param")
    return BatchError(
        str(message) if message else "no response and no error",
        code=str(code) if code else NO_ANSWER,
        line=index + 1,
        param=param if isinstance(param, str) else None,
    )


def _status_error(status: int, body: Any, request_id: Any) -> openai.APIStatusError:
    """Return the SDK's own error for a line that was refused."""
    headers = {"content-type": "application/json"}
    if isinstance(request_id, str) and is_header_text(request_id):
        headers["x-request-id"] = request_id
    request = sdk_httpx().Request("POST", "https://batch.invalid/")
    content = json.dumps(body).encode()  # half a surrogate pair stays escaped
    answer = sdk_httpx().Response(status, headers=headers, content=content, request=request)
    return status_error(status, body, answer)


class BatchJobs:
    """StartThrottle batches, and settles them to one call_sdk outcome for each request."""

    def __init__(self, api: BatchApi, counter: TokenCounter, account: Account) -> None:
        self._api = api
        self._counter = counter
        self._ledger = account.ledger
        self._recorder = account.recorder
        self._booked: set[str] = set()
        self.bills: dict[str, Bill] = {}

    async def found(self, part: InputFile, order: Order, record: JobRecord) -> Batch | None:
        """Return the batch of a part, where it was created before."""
        known = record.made.get(part.key)
        if known is not None:
            with contextlib.suppress(openai.NotFoundError):  # of another account, or long ago: made anew
                made = await self._api.get(known)
                _say_resumed(made)
                return made
        if not (record.recovered or part.key in record.unclear):
            return None
        batch = await self._api.find(order.placement, since=record.since)
        if batch is not None:
            self._note(part, batch, record)
            _say_resumed(batch)
        return batch

    async def make(self, part: InputFile, order: Order, record: JobRecord) -> Batch:
        """Upload a part, once, and create its batch."""
        if part.file_id is None:
            part.file_id = await self._api.upload(part)
        batch = await self._api.create(order, part.file_id, since=record.since, unclear=record.unclear)
        self._note(part, batch, record)
        about = {"batch_id": batch.id, "model": part.model, "requests": part.count}
        text = "batch %s created: %d requests of %s"
        inform(text, batch.id, part.count, part.model, event="batch_created", **about)
        return batch

    async def start(self, part: InputFile, order: Order, record: JobRecord) -> Batch:
        """Upload a part and create its batch, unless that was done before."""
        return await self.found(part, order, record) or await self.make(part, order, record)

    def _note(self, part: InputFile, batch: Batch, record: JobRecord) -> None:
        record.made[part.key] = batch.id
        record.unclear.discard(part.key)

    async def settle(
        self,
        batch: Batch,
        *,
        part: InputFile | None = None,
        offset: int = 0,
        schema: Any = None,
    ) -> BatchResults:
        """Read the results of a batch that has ended."""
        api = next((api for api, path in ENDPOINTS.items() if path == batch.endpoint), None)
        if api is None:
            message = f"batch {batch.id} is of {batch.endpoint}: read it with client.openai.files.content"
            raise BatchError(message, code="unsupported_endpoint")
        tab = Tab(self._ledger.pricer_for(None))
        await tab.pricer.ready()
        reader = Reader(api, schema, tab.price, model=_model_of(batch, part))
        async with contextlib.AsyncExitStack() as stack:
            files = [
                stack.enter_context(file)
                for file_id in (batch.output_file_id, batch.error_file_id)
                if file_id and (file := await self._result_file(batch, file_id)) is not None
            ]
            manifest = await self._manifest(batch, offset) if part is None else _of_part(part)
            if manifest is None:
                manifest = await asyncio.to_thread(_guessed, batch, files, offset)
            settlement = await asyncio.to_thread(_read_exactly, reader, files, manifest)
        self._compare(batch, settlement)
        _explain_missing(batch, settlement, manifest)
        name_outcomes(settlement, manifest)
        await self._count_missing_usage(batch, settlement, manifest.indexes, tab)
        if batch.id not in self._booked:  # else it was settled before
            self._booked.add(batch.id)
            self._ledger.book_batch(tab.entries)
            self._recorder.settled(*settlement.counts())
        bill = self.bills.pop(batch.id, None)
        if bill is not None:
            bill.settle(batch, settlement.outcomes)
        return settlement

    async def name_requests(self, batch: Batch, errors: Iterable[BatchError], offset: int) -> None:
        """Turn the lines of a batch's file, in its errors, into positions in the caller's list."""
        named = [error for error in errors if error.line is not None]
        manifest = await self._manifest(batch, offset) if named else None
        if manifest is None:
            return
        for error in named:
            index = manifest.index_at(error.line or 0)
            error.line = None if index is None else index + 1

    async def _manifest(self, batch: Batch, offset: int) -> RequestIndex | None:
        """Return what a batch was asked; None where its input file is gone and nothing else tells."""
        placement = read_job_metadata(batch.metadata)
        consecutive = placement is not None and placement.start is not None and placement.numbered
        if placement is not None and consecutive and placement.temperature != MIXED:
            return _consecutive(placement)
        file = await self._input_file(batch)
        if file is None:
            return _consecutive(placement) if placement is not None and consecutive else None
        numbered = placement is not None and placement.numbered
        start = offset if placement is None or placement.start is None else placement.start
        with file:
            return await asyncio.to_thread(read_manifest, file, numbered=numbered, start=start)

    async def _input_file(self, batch: Batch) -> IO[bytes] | None:
        return await self._file(batch, "input", batch.input_file_id)

    async def _result_file(self, batch: Batch, file_id: str) -> IO[bytes] | None:
        return await self._file(batch, "result", file_id, made_at=ended_at(batch) or 0)

    async def _file(self, batch: Batch, kind: str, file_id: str, *, made_at: float = 0.0) -> IO[bytes] | None:
        """Download a file of a batch; None where it is gone."""
        try:
            return await self._api.download(file_id, made_at=made_at)
        except openai.NotFoundError:
            text = "batch %s: its %s file %s is gone"
            warn(text, batch.id, kind, file_id, event="batch_file_gone", batch_id=batch.id)
            return None

    def _compare(self, batch: Batch, settlement: BatchResults) -> None:
        """Say what is odd about the files, and where the API counts otherwise."""
        for what, times in settlement.oddities.items():
            if times:
                text = "batch %s: %d %s in its result files"
                warn(text, batch.id, times, what, event="batch_results_odd", batch_id=batch.id)
        said = batch.request_counts
        if said is not None and (said.completed or 0) != settlement.answered:
            text = "batch %s: the API counts %d completed requests, its files hold %d answers"
            counts = said.completed or 0, settlement.answered
            warn(text, batch.id, *counts, event="batch_results_odd", batch_id=batch.id)

    async def _count_missing_usage(
        self,
        batch: Batch,
        settlement: BatchResults,
        indexes: Sequence[int],
        tab: Tab,
    ) -> None:
        """Estimate the usage that the server left out, as for answers online."""
        bare: dict[int, ModelResponse] = {
            index: outcome
            for index, outcome in settlement.outcomes.items()
            if not isinstance(outcome, Exception) and outcome.usage.estimated
        }
        if not bare:
            return
        bodies = await self._bodies(
            batch,
            {line: index for line, index in enumerate(indexes) if index in bare},
        )
        for index, response in bare.items():
            tokens = await self._counter.count_input(bodies[index]) if index in bodies else 0
            await estimate_usage(response, tokens, self._counter)
            usage = response.usage
            estimate = Usage(usage.prompt_tokens, usage.completion_tokens, estimated=True)
            with exact():
                usage.estimated_cost = tab.price(response.model, estimate)

    async def _bodies(self, batch: Batch, lines: Mapping[int, int]) -> dict[int, Any]:
        """Return the body of each of these requests, by index, where the input file is still there."""
        file = await self._input_file(batch)
        if file is None:
            return {}
        with file:
            return await asyncio.to_thread(read_bodies, file, lines)


class Tab:
    """Prices the answers of one batch, and keeps the prices until all of it is settled."""

    def __init__(self, pricer: Pricer) -> None:
        self.pricer = pricer
        self.entries: list[tuple[str, Usage, Decimal | None]] = []

    def price(self, model: str, usage: Usage) -> float | None:
        """Return the price of an answer in USD; None where that is not known."""
        cost = self.pricer.cost(model, usage, batch=True)
        self.entries.append((model, usage, cost))
        return None if cost is None else float(cost)


def _model_of(batch: Batch, part: InputFile | None) -> str:
    """Return the model that a batch was asked for, as far as that is known."""
    source = part or read_job_metadata(batch.metadata)
    return (source and source.model) or getattr(batch, "model", None) or ""


def _read_exactly(reader: Reader, files: Iterable[IO[bytes]], manifest: RequestIndex) -> BatchResults:
    with exact():
        return reader.read(files, manifest)


def _of_part(part: InputFile) -> RequestIndex:
    """Return the manifest of a part, whose requests all have one temperature."""
    return RequestIndex(part.indexes, temperature=_shared(part.temperature))


def _consecutive(placement: JobMetadata) -> RequestIndex:
    """Return the manifest of a batch whose metadata say all."""
    start = placement.start or 0
    return RequestIndex(range(start, start + placement.count), temperature=_shared(placement.temperature))


def _say_resumed(batch: Batch) -> None:
    about = {"batch_id": batch.id, "batch_status": batch.status}
    inform("going on with batch %s: %s", batch.id, batch.status, event="batch_resumed", **about)


def _shared(temperature: float | str | None) -> float | None:
    return None if isinstance(temperature, str) else temperature


def _guessed(batch: Batch, files: Sequence[IO[bytes]], offset: int) -> RequestIndex:
    """Return the manifest of a batch whose input file is gone, as far as its results tell."""
    placement = read_job_metadata(batch.metadata)
    count = request_counts(batch)[0]
    if placement is not None and placement.numbered:
        manifest = guess_manifest(files, numbered=True, start=0, count=count)
    else:
        text = "batch %s: the order of its requests is not known any more"
        warn(text, batch.id, event="batch_order_unknown", batch_id=batch.id)
        start = offset if placement is None or placement.start is None else placement.start
        manifest = guess_manifest(files, numbered=False, start=start, count=count)
    manifest.temperature = None if placement is None else _shared(placement.temperature)
    return manifest


def _explain_missing(batch: Batch, settlement: BatchResults, manifest: RequestIndex) -> None:
    """Give each request without a result the reason."""
    reasons = Reasons(batch, manifest.index_at)
    for index in manifest.indexes:
        if index not in settlement.outcomes:
            settlement.outcomes[index] = reasons.of(index)
    unknown = request_counts(batch)[0] - len(manifest.indexes)
    settlement.unplaced = [reasons.of_any()] * unknown
