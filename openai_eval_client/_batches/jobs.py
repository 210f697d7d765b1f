"""Jobs of the Batch API: submit, look at, cancel, list, settle."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import openai

from openai_eval_client._batches.api import BatchApi, Order
from openai_eval_client._batches.budget import Funds
from openai_eval_client._batches.files import (
    checked,
    close_files,
    endpoint_of,
    is_numbered,
    listed,
    refuse_online_only,
    write_aside,
)
from openai_eval_client._batches.results import BatchJobs
from openai_eval_client._batches.resume import CachedAnswers, JobRecord, Journal
from openai_eval_client._batches.run import BatchRun, Tools
from openai_eval_client._batches.status import (
    SEPARATOR,
    Grouping,
    JobMetadata,
    as_time,
    check_metadata,
    failure_of,
    has_ended,
    job_status,
    read_job_metadata,
    request_counts,
    state_of,
    stated_errors,
    with_index,
)
from openai_eval_client._log import warn
from openai_eval_client._online import outcomes_or_raise
from openai_eval_client._validation import check_window, reject_input
from openai_eval_client._wire import of_error
from openai_eval_client.errors import BatchError
from openai_eval_client.models import BatchJob, BatchJobStatus

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator, Sequence

    from openai.types import Batch

    from openai_eval_client._account import Account
    from openai_eval_client._batches.files import InputFile
    from openai_eval_client._batches.resume import Store
    from openai_eval_client._cache import Cache
    from openai_eval_client._cost import Budgets, CostBudget
    from openai_eval_client._report import Progress
    from openai_eval_client._sdk import UnsupportedParameters
    from openai_eval_client._tokens import TokenCounter
    from openai_eval_client._wire import Parameters
    from openai_eval_client.config import BatchConfig, OpenAIConfig


class Submitter:
    """Submits jobs."""

    def __init__(
        self,
        base_url: str,
        api: BatchApi,
        jobs: BatchJobs,
        store: Store | None,
        *,
        ttl: float | None,
        payments: Budgets,
        counter: TokenCounter,
    ) -> None:
        self._ttl = ttl
        self._base_url = base_url
        self._api = api
        self._jobs = jobs
        self._store = store
        self._payments = payments
        self._counter = counter
        self._submitted: Counter[str] = Counter()

    async def submit(
        self,
        parts: list[InputFile],
        endpoint: str,
        window: str,
        metadata: dict[str, str],
    ) -> list[Batch]:
        """Create the batch of each part; where a program was killed at it, only those it had not."""
        asked = (self._base_url, endpoint, window, sorted(metadata.items()))
        name = hashlib.sha256(repr((asked, [part.digest.hexdigest() for part in parts])).encode()).hexdigest()
        journal = Journal(self._store, f"submit {name} {self._submitted[name]}")
        self._submitted[name] += 1
        funds = Funds(self._payments, self._counter, endpoint, self._jobs.bills)
        options = (endpoint, window, metadata)
        try:
            await funds.estimate(parts)
            async with journal.exclusive():
                saved = await journal.load()
                record = JobRecord.recover(saved) if saved and not self._is_old(saved) else JobRecord()
                batches = await self._create_all(parts, record, journal, options, funds)
                if record.recovered and not _are_of_use(batches):
                    for batch in batches:
                        funds.cancelled(batch.id)
                    batches = await self._create_all(parts, JobRecord(), journal, options, funds)
                return batches
        except BaseException:
            self._submitted[name] -= 1
            raise
        finally:
            close_files(parts)

    def _is_old(self, record: dict[str, Any]) -> bool:
        return self._ttl is not None and record["since"] < time.time() - self._ttl

    async def _create_all(
        self,
        parts: list[InputFile],
        record: JobRecord,
        journal: Journal,
        options: tuple[str, str, dict[str, str]],
        funds: Funds,
    ) -> list[Batch]:
        await _reserve(parts, record, funds)
        total = sum(part.count for part in parts)
        made: list[Batch] = []
        await journal.save(record.to_dict())
        try:
            for part in parts:
                order = Order(JobMetadata.of(part, record.name, total), *options)
                made.append(await self._jobs.start(part, order, record))
                funds.started(part, made[-1].id, watched=False)
                await journal.save(record.to_dict())
        except BaseException as error:  # raised where the rows are taken
            left = parts[len(made) :]
            ours = isinstance(error, Exception) and not record.recovered
            if ours and await self._undo(made, left, order, record, funds):
                await journal.forget()
            _leave(left, funds, unclear=record.recovered or bool(record.unclear))
            _name_made(made, record, error)
            raise
        return made

    async def _undo(
        self,
        made: list[Batch],
        left: list[InputFile],
        last: Order,
        record: JobRecord,
        funds: Funds,
    ) -> bool:
        """Cancel the batches of a job that could not be created whole; the last may have been created."""
        try:
            found = await self._api.find(last.placement, since=record.since) if record.unclear else None
            record.unclear.clear()
            if found is not None:
                made.append(found)
                funds.started(left.pop(0), found.id, watched=False)
            for batch in made:
                await self._api.cancel(batch.id)
        except openai.OpenAIError as error:
            text = "batches of a job that failed could not be cancelled (%s)"
            warn(text, type(error).__name__, event="batch_not_cancelled", **of_error(error))
            return False
        return True


async def _reserve(parts: list[InputFile], record: JobRecord, funds: Funds) -> None:
    """Reserve what all parts can cost; those that an earlier program submitted cost that anyway."""
    known = [part for part in parts if part.key in record.made]
    for part in known:
        funds.commit(part)
    try:
        await funds.cover_all([part for part in parts if part.key not in record.made])
    except BaseException:
        for part in known:
            funds.started(part, record.made[part.key], watched=False)
        raise


def _leave(left: list[InputFile], funds: Funds, *, unclear: bool) -> None:
    """Give back what is reserved for parts of which no batch was made; of the first that may be unclear."""
    funds.leave(left[:1], (), unclear=unclear)
    funds.leave(left[1:], (), unclear=False)


def _name_made(made: list[Batch], record: JobRecord, error: BaseException) -> None:
    """Name the batches of a job that was not created whole: they may cost."""
    ids = list(dict.fromkeys([*(batch.id for batch in made), *record.made.values()]))
    if ids:
        job_id = error.__dict__["job_id"] = SEPARATOR.join(ids)
        about = {"batch_id": job_id, **of_error(error)}
        text = "job not submitted whole (%s): created were %s"
        warn(text, type(error).__name__, job_id, event="batch_job_incomplete", **about)


def _are_of_use(batches: list[Batch]) -> bool:
    """Return whether a job submitted before is worth going on with: it runs, or has answers."""
    states = {state_of(batch) for batch in batches}
    given_up = states & {"cancelling", "cancelled", "failed"}
    return not given_up and (states != {"expired"} or any(request_counts(batch)[1] for batch in batches))


class Batches:
    """Batch jobs: submitted, looked at, settled, cancelled, listed; `OpenAIClient` documents the methods."""

    def __init__(
        self,
        config: OpenAIConfig,
        batch: BatchConfig,
        *,
        sdk: openai.AsyncOpenAI,
        account: Account,
        counter: TokenCounter,
        unsupported: UnsupportedParameters,
        cache: Cache | None,
    ) -> None:
        self._config = config
        self._batch = batch
        self._is_closed = sdk.is_closed
        self._api = BatchApi(sdk, config, account.config.max_wait)
        self._jobs = BatchJobs(self._api, counter, account)
        self._tools = Tools(self._api, self._jobs, counter, batch, unsupported, account.budgets)
        self._cache = cache
        self._store: Store | None = None if cache is None else cache.journal
        self._submitter = Submitter(
            config.base_url,
            self._api,
            self._jobs,
            self._store,
            ttl=None if cache is None else cache.ttl,
            payments=account.budgets,
            counter=counter,
        )

    async def collect(
        self,
        prompts: Sequence[Any],
        parameters: Parameters,
        *,
        budget: CostBudget | None,
        progress: Progress | None,
        return_exceptions: bool,
    ) -> list[Any]:
        """Answer prompts by batches, with the contract of `batch_generate`."""
        headers, query = parameters.headers or None, parameters.query or None
        refuse_online_only({**parameters.body, "extra_headers": headers, "extra_query": query})
        kept = CachedAnswers(self._cache, parameters)
        await kept.take(prompts)
        journal = Journal(self._store, f"batch {kept.name}")
        run = BatchRun(self._tools, prompts, parameters, progress, journal, kept, budget)
        self._check_open()
        return await run.collect(return_exceptions=return_exceptions)

    async def submit(self, requests: object, *, api: str, window: str | None, metadata: object) -> BatchJob:
        """Check all requests, upload them, and create the batches: all of them or none."""
        if window is not None:
            check_window(window, "completion_window")
        order = (endpoint_of(api), window or self._batch.completion_window, check_metadata(metadata))
        given = listed(requests)
        items = checked(given, api=api, default_model=self._config.default_model)
        most = self._batch.max_batch_size
        self._check_open()
        parts = await write_aside(items, most_lines=most)
        numbered = is_numbered(given, default_model=self._config.default_model)
        for part in parts:
            part.numbered = numbered
        batches = await self._submitter.submit(parts, *order)
        return BatchJob(
            job_id=SEPARATOR.join(batch.id for batch in batches),
            status=job_status(batches, ()).status,
            created_at=as_time(min(batch.created_at for batch in batches)),
            request_count=len(given),
        )

    async def status(self, job_id: str) -> BatchJobStatus:
        """Look at every batch of a job."""
        self._check_open()
        return await self._status_of(await self._all(job_id))

    async def results(self, job_id: str, *, return_exceptions: bool) -> list[Any]:
        """Settle every batch of a job that has ended."""
        self._check_open()
        batches = await self._all(job_id)
        running = [batch for batch in batches if not has_ended(batch)]
        if running:
            state = job_status(batches, ()).status
            message = f"job {job_id} is {state}: {len(running)} of {len(batches)} batches have not ended"
            raise BatchError(message, code=state)
        outcomes = await self._settle_all(batches)
        return outcomes_or_raise(outcomes, return_exceptions=return_exceptions)

    async def cancel(self, job_id: str) -> BatchJobStatus:
        """Cancel what still runs of a job."""
        self._check_open()
        batches = await self._all(job_id)
        after = [batch if has_ended(batch) else await self._api.cancel(batch.id) for batch in batches]
        return await self._status_of(after)

    async def jobs(self) -> AsyncIterator[BatchJobStatus]:
        """Yield the account's jobs that this package submitted, the newest first."""
        grouping = Grouping()
        self._check_open()
        async with contextlib.aclosing(self._api.all_batches()) as batches:
            async for batch in batches:
                job = grouping.add(batch)
                if job:
                    yield await self._status_of(job)
        for job in grouping.incomplete():
            yield await self._status_of(job)

    async def _all(self, job_id: str) -> list[Batch]:
        ids = job_id.split(SEPARATOR) if isinstance(job_id, str) else []
        if not ids or any(not name or not name.isascii() or not name.isprintable() for name in ids):
            reject_input("job_id", job_id, "must be the job_id of a BatchJob, or the id of a batch")
        return [await self._api.get(name) for name in ids]

    async def _settle_all(self, batches: list[Batch]) -> list[Any]:
        if len(batches) > 1 and any(read_job_metadata(batch.metadata) is None for batch in batches):
            text = "job of %d batches that do not say where they stand: theirs is the order"
            warn(text, len(batches), event="batch_order_unknown")
        outcomes: dict[int, Any] = {}
        unplaced: list[BatchError] = []
        lines = 0
        for batch in batches:
            settlement = await self._jobs.settle(batch, offset=len(outcomes) + len(unplaced))
            lines += settlement.lines
            outcomes.update(settlement.outcomes)
            unplaced += settlement.unplaced
        if not lines and all(state_of(batch) == "failed" for batch in batches):
            raise failure_of(batches)
        free = [index for index in range(len(outcomes) + len(unplaced)) if index not in outcomes]
        outcomes.update(
            (index, with_index(error, index)) for index, error in zip(free, unplaced, strict=False)
        )
        return [outcome for _, outcome in sorted(outcomes.items())]

    async def _status_of(self, batches: list[Batch]) -> BatchJobStatus:
        errors: list[BatchError] = []
        for batch, offset in _with_offsets(batches):
            said = stated_errors(batch)
            await self._jobs.name_requests(batch, said, offset)
            errors += said
        return job_status(batches, errors)

    def _check_open(self) -> None:
        if self._is_closed():
            raise RuntimeError("this client was closed")


def _with_offsets(batches: Iterable[Batch]) -> Iterator[tuple[Batch, int]]:
    """Yield each batch with the index of its first request, for those that do not say it themselves."""
    offset = 0
    for batch in batches:
        yield batch, offset
        offset += request_counts(batch)[0]
