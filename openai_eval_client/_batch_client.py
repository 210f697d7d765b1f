"""The Batch API half of the evaluation client."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from openai_eval_client import _batch_lines
from openai_eval_client._batch_api import BatchApi
from openai_eval_client._batch_jobs import BatchJobs
from openai_eval_client._batch_journal import Journal
from openai_eval_client._batch_kept import Kept
from openai_eval_client._batch_meta import check_metadata, read_placement
from openai_eval_client._batch_requests import checked, endpoint_of, is_numbered, listed, refuse_online_only
from openai_eval_client._batch_run import BatchRun, Tools
from openai_eval_client._batch_status import (
    SEPARATOR,
    Grouping,
    as_time,
    failure_of,
    has_ended,
    job_status,
    request_counts,
    state_of,
    stated_errors,
    with_index,
)
from openai_eval_client._batch_submit import Submitter
from openai_eval_client._checks import check_window, refuse
from openai_eval_client._events import warn
from openai_eval_client._runner import handed_out
from openai_eval_client.errors import BatchError
from openai_eval_client.models import BatchJob, BatchJobStatus

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator, Sequence

    import openai
    from openai.types import Batch

    from openai_eval_client._attempt import Refusals
    from openai_eval_client._batch_journal import Store
    from openai_eval_client._cache import Cache
    from openai_eval_client._callbacks import Progress
    from openai_eval_client._governor import Governor
    from openai_eval_client._requests import Parameters
    from openai_eval_client._spending import Purse
    from openai_eval_client._tokens import TokenCounter
    from openai_eval_client.config import BatchConfig, OpenAIConfig


class Batches:
    """Batch jobs: submitted, looked at, settled, cancelled, listed; `OpenAIClient` documents the methods.

    Args:
        config: Where the API is.
        batch: How to batch.
        sdk: An SDK client that does not retry.
        governor: Keeps the bill and the statistics.
        counter: Counts tokens.
        refusals: What models are known to refuse.
        cache: Keeps answers and the journal of jobs.
    """

    def __init__(
        self,
        config: OpenAIConfig,
        batch: BatchConfig,
        *,
        sdk: openai.AsyncOpenAI,
        governor: Governor,
        counter: TokenCounter,
        refusals: Refusals,
        cache: Cache | None,
    ) -> None:
        self._config = config
        self._batch = batch
        self._is_closed = sdk.is_closed
        self._api = BatchApi(sdk, config, governor.config.max_wait)
        self._jobs = BatchJobs(self._api, counter, governor)
        self._tools = Tools(self._api, self._jobs, counter, batch, refusals, governor.payments)
        self._cache = cache
        self._store: Store | None = None if cache is None else cache.journal
        self._submitter = Submitter(
            config.base_url,
            self._api,
            self._jobs,
            self._store,
            ttl=None if cache is None else cache.ttl,
            payments=governor.payments,
            counter=counter,
        )

    async def collect(
        self,
        prompts: Sequence[Any],
        parameters: Parameters,
        *,
        purse: Purse | None,
        progress: Progress | None,
        return_exceptions: bool,
    ) -> list[Any]:
        """Answer prompts by batches, with the contract of `batch_generate`."""
        headers, query = parameters.headers or None, parameters.query or None
        refuse_online_only({**parameters.body, "extra_headers": headers, "extra_query": query})
        kept = Kept(self._cache, parameters)
        await kept.take(prompts)
        journal = Journal(self._store, f"batch {kept.name}")
        run = BatchRun(self._tools, prompts, parameters, progress, journal, kept, purse)
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
        parts = await _batch_lines.write_aside(items, most_lines=most)
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
        return handed_out(outcomes, return_exceptions=return_exceptions)

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
            refuse("job_id", job_id, "must be the job_id of a BatchJob, or the id of a batch")
        return [await self._api.get(name) for name in ids]

    async def _settle_all(self, batches: list[Batch]) -> list[Any]:
        if len(batches) > 1 and any(read_placement(batch.metadata) is None for batch in batches):
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
