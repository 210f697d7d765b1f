"""Jobs of the Batch API: submit, look at, settle, cancel, list; prompts answered by them."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from openai_eval_client._batches.api import BatchApi
from openai_eval_client._batches.budget import BatchBudget
from openai_eval_client._batches.files import (
    check_requests,
    close_files,
    list_requests,
    refuse_online_only,
    write_in_thread,
)
from openai_eval_client._batches.objects import (
    SEPARATOR,
    JobRecord,
    check_metadata,
    failure_of,
    group_jobs,
    has_ended,
    job_status,
    read_job_metadata,
    request_counts,
    state_of,
    stated_errors,
    with_index,
)
from openai_eval_client._batches.results import PATIENCE, BatchSettler
from openai_eval_client._batches.run import BatchRun
from openai_eval_client._batches.submission import CachedAnswers, Journal, Submission
from openai_eval_client._log import warn
from openai_eval_client._online import outcomes_or_raise
from openai_eval_client._validation import check_window, reject_input
from openai_eval_client._wire import BATCH_PATHS
from openai_eval_client.errors import BatchError
from openai_eval_client.models import BatchJob, BatchJobStatus

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    import openai
    from openai.types import Batch

    from openai_eval_client._account import Account
    from openai_eval_client._batches.files import InputFile
    from openai_eval_client._cache import Cache
    from openai_eval_client._cost import CostBudget
    from openai_eval_client._report import Progress
    from openai_eval_client._sdk import UnsupportedParameters
    from openai_eval_client._tokens import TokenCounter
    from openai_eval_client._wire import Parameters
    from openai_eval_client.config import BatchConfig, OpenAIConfig


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
        self._settler = BatchSettler(self._api, counter, account)
        self._payments = account.budgets
        self._counter = counter
        self._unsupported = unsupported
        self._cache = cache
        self._submitted = defaultdict[str, set[int]](set)  # the numbers of the same job submitted repeatedly

    async def collect(
        self,
        prompts: Sequence[Any],
        parameters: Parameters,
        *,
        budget: CostBudget | None,
        progress: Progress,
        max_failures: float | None,
        on_unclear: str,
        return_exceptions: bool,
    ) -> list[Any]:
        """Answer prompts by batches, with the contract of `batch_generate`."""
        headers, query = parameters.headers or None, parameters.query or None
        refuse_online_only({**parameters.body, "extra_headers": headers, "extra_query": query})
        cached = CachedAnswers(self._cache, parameters)
        self._check_open()
        await cached.take(prompts)
        run = BatchRun(
            api=self._api,
            settler=self._settler,
            budget=BatchBudget(self._payments, self._counter, budget),
            journal=Journal(self._cache, *(f"batch {name}" for name in cached.names)),
            config=self._batch,
            counter=self._counter,
            unsupported=self._unsupported,
            prompts=prompts,
            parameters=parameters,
            cached=cached,
            progress=progress,
            max_failures=max_failures,
            on_unclear=on_unclear,
        )
        return await run.collect(return_exceptions=return_exceptions)

    async def submit(
        self, requests: object, *, api: str, window: str | None, metadata: object, on_unclear: str
    ) -> BatchJob:
        """Check all requests, upload them, and create the batches: all of them or none."""
        if window is not None:
            check_window(window, "completion_window")
        if not isinstance(api, str) or api not in BATCH_PATHS:
            reject_input("api", api, "must be 'chat' or 'responses'")
        pairs = check_metadata(metadata)
        given = list_requests(requests)
        lines = check_requests(given, api=api, default_model=self._config.default_model)
        self._check_open()
        job = JobRecord(
            endpoint=BATCH_PATHS[api],
            window=window or self._batch.completion_window,
            metadata=pairs,
            indexes=range(len(given)),
            most_lines=self._batch.max_batch_size,
        )
        files = await write_in_thread(lines, most_lines=job.most_lines)
        try:
            batches = await self._submit(job, files, on_unclear)
        finally:
            close_files(files)
        status = job_status(batches)
        return BatchJob(
            job_id=status.job_id, status=status.status, created_at=status.created_at, request_count=len(given)
        )

    async def _submit(self, job: JobRecord, files: list[InputFile], on_unclear: str) -> list[Batch]:
        digests = [file.digest.hexdigest() for file in files]
        asked = (self._config.base_url, job.endpoint, job.window, sorted(job.metadata.items()), digests)
        name = hashlib.sha256(repr(asked).encode()).hexdigest()
        taken = self._submitted[name]
        number = next(number for number in itertools.count() if number not in taken)
        submission = Submission(
            api=self._api,
            settler=self._settler,
            budget=BatchBudget(self._payments, self._counter),
            journal=Journal(self._cache, f"submit {name} {number}"),
            on_unclear=on_unclear,
        )
        taken.add(number)
        try:
            return await submission.submit(job, files, ttl=None if self._cache is None else self._cache.ttl)
        except BaseException:  # the next call of the same job goes on with it
            taken.remove(number)
            raise

    async def status(self, job_id: str) -> BatchJobStatus:
        """Look at every batch of a job."""
        return await self._status_of(await self._all(job_id))

    async def results(self, job_id: str, *, return_exceptions: bool) -> list[Any]:
        """Settle every batch of a job that has ended."""
        batches = await self._all(job_id)
        running = [batch for batch in batches if not has_ended(batch)]
        if running:
            state = job_status(batches).status
            message = f"job {job_id} is {state}: {len(running)} of {len(batches)} batches have not ended"
            raise BatchError(message, code=state)
        outcomes = await self._settle_all(batches)
        return outcomes_or_raise(outcomes, return_exceptions=return_exceptions)

    async def cancel(self, job_id: str) -> BatchJobStatus:
        """Cancel what still runs of a job."""
        batches = await self._all(job_id)
        after = [batch if has_ended(batch) else await self._api.cancel(batch.id) for batch in batches]
        return await self._status_of(after)

    async def jobs(self) -> AsyncIterator[BatchJobStatus]:
        """Yield the account's jobs that this package submitted, the newest first."""
        self._check_open()
        aclosing = contextlib.aclosing
        async with aclosing(self._api.all_batches()) as batches, aclosing(group_jobs(batches)) as jobs:
            async for job in jobs:
                yield await self._status_of(job)

    async def _all(self, job_id: str) -> list[Batch]:
        self._check_open()
        ids = job_id.split(SEPARATOR) if isinstance(job_id, str) else []
        if not ids or any(not name or not name.isascii() or not name.isprintable() for name in ids):
            reject_input("job_id", job_id, "must be the job_id of a BatchJob, or the id of a batch")
        return [await self._api.get(name) for name in ids]

    async def _settle_all(self, batches: list[Batch]) -> list[Any]:
        if len(batches) > 1 and any(read_job_metadata(batch.metadata) is None for batch in batches):
            text = "job of %d batches without our metadata: their results are in the order of the ids"
            warn(text, len(batches), event="batch_order_unknown")
        outcomes: dict[int, Any] = {}
        unplaced: list[BatchError] = []
        lines = 0
        end = time.monotonic() + PATIENCE
        for batch in batches:
            offset, seconds = len(outcomes) + len(unplaced), end - time.monotonic()
            results = await self._settler.settle(batch, offset=offset, seconds=seconds)
            lines += results.lines
            outcomes.update(results.outcomes)
            unplaced += results.unplaced
        if not lines and all(state_of(batch) == "failed" for batch in batches):
            raise failure_of(batches)
        free = [index for index in range(len(outcomes) + len(unplaced)) if index not in outcomes]
        placed = zip(free, unplaced, strict=False)
        outcomes.update((index, with_index(error, index)) for index, error in placed)
        return [outcome for _, outcome in sorted(outcomes.items())]

    async def _status_of(self, batches: list[Batch]) -> BatchJobStatus:
        errors: list[BatchError] = []
        offset = 0  # of the batch's first request, where its metadata do not say it
        for batch in batches:
            stated = stated_errors(batch)
            await self._settler.name_requests(batch, stated, offset)
            errors += stated
            offset += request_counts(batch)[0]
        return job_status(batches, errors)

    def _check_open(self) -> None:
        if self._is_closed():
            raise RuntimeError("this client was closed")
