"""From input files to batches, each made once, and from prompts to answers by them, killed runs included."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import random
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import openai

from openai_eval_client._batches.files import (
    ENDPOINTS,
    BatchLine,
    close_files,
    cut_file,
    even_counts,
    numbered_id,
    recut,
    write_in_thread,
)
from openai_eval_client._batches.results import is_curable
from openai_eval_client._batches.resume import JobRecord
from openai_eval_client._batches.status import (
    SEPARATOR,
    are_of_use,
    enqueued_limit,
    enqueued_refusal,
    failure_of,
    has_ended,
    is_enqueued_limit,
    request_counts,
    state_of,
)
from openai_eval_client._log import inform, warn
from openai_eval_client._online import attach_responses, outcomes_or_raise, responses_of
from openai_eval_client._sdk import without
from openai_eval_client._validation import window_seconds
from openai_eval_client._wire import of_error, read_failure
from openai_eval_client.models import ModelResponse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from openai.types import Batch

    from openai_eval_client._batches.api import BatchApi
    from openai_eval_client._batches.files import InputFile
    from openai_eval_client._batches.results import BatchBudget, BatchSettler, Outcome
    from openai_eval_client._batches.resume import CachedAnswers, Journal
    from openai_eval_client._report import Progress
    from openai_eval_client._sdk import UnsupportedParameters
    from openai_eval_client._tokens import TokenCounter
    from openai_eval_client._wire import Parameters
    from openai_eval_client.config import BatchConfig
    from openai_eval_client.errors import BatchError, BudgetExceededError


# --- batches made of input files --------------------------------------------------------------------------


@dataclass(kw_only=True, eq=False)
class Submission:
    """Makes the batches of a job from its input files, each once: all of them or none."""

    api: BatchApi
    settler: BatchSettler
    budget: BatchBudget
    journal: Journal
    jobs: list[JobRecord] = field(default_factory=list)  # as they are recorded; the last is worked on
    waiting: deque[InputFile] = field(default_factory=deque)  # of which no batch is made yet
    running: dict[str, InputFile] = field(default_factory=dict)  # by the id of their batch
    batches: list[Batch] = field(default_factory=list)  # as they were when they were made or found

    @property
    def job(self) -> JobRecord:
        """The job that is worked on."""
        return self.jobs[-1]

    @property
    def unsettled(self) -> list[str]:
        """The ids of the batches that are not settled."""
        waiting = [self.job.made[file.key] for file in self.waiting if file.key in self.job.made]
        return [*self.running, *waiting]

    async def submit(self, job: JobRecord, files: Sequence[InputFile], *, ttl: float | None) -> list[Batch]:
        """Make all batches of a job; go on with those recorded in the last `ttl` seconds, by a killed run."""
        await self.budget.estimate(files, job.endpoint)
        async with self.journal.exclusive():
            saved = await self.journal.load()
            if saved and (ttl is None or saved[0]["since"] >= time.time() - ttl):
                batches = await self._submit_whole(job.recover(saved[0]), files)
                if are_of_use(batches):
                    return batches
                for batch, file in zip(batches, files, strict=True):  # it is submitted anew
                    self.settler.unsettled.pop(batch.id, None)
                    self.budget.release(file)
            return await self._submit_whole(job, files)

    async def _submit_whole(self, job: JobRecord, files: Sequence[InputFile]) -> list[Batch]:
        self.jobs, self.waiting, self.running, self.batches = [job], deque(files), {}, []
        try:
            for file in files:
                if file.key in job.made:
                    self.budget.commit(file)  # it costs that anyway
            await self.budget.reserve_all([file for file in files if file.key not in job.made])
            await self._save()
            try:
                await self._submit_waiting()
            except BaseException as error:
                if isinstance(error, Exception) and not job.recovered and await self._undo():
                    await self.journal.forget()
                self._name_batches(error)
                raise
        finally:
            self._end()
        return self.batches

    async def _submit_waiting(self) -> None:
        """Make a batch of each file that waits, in their order, as long as none has to be held back."""
        while self.waiting and not self._is_held_back():
            file = self.waiting[0]
            batch = await self._find(file)
            if batch is None and not self._is_held_back() and await self._reserve(file):
                batch = await self._create(file)
            if batch is not None:
                self._start(self.waiting.popleft(), batch)
                await self._save()

    def _start(self, file: InputFile, batch: Batch) -> None:
        """Note the batch of a file."""
        self.running[batch.id] = file
        self.batches.append(batch)
        self.job.made[file.key] = batch.id
        self.job.unclear.discard(file.key)

    async def _save(self) -> None:
        """Record which batches there are, and how the files are cut."""
        spans = dict(self.job.spans)
        spans.update((file.first, file.count) for file in [*self.waiting, *self.running.values()])
        self.job.spans = sorted(spans.items())
        await self.journal.save(self.jobs)

    async def _find(self, file: InputFile) -> Batch | None:
        """Return the batch that was made of a file before."""
        try:
            batch = await self._look_for(file)
        except openai.APIError as error:
            self._pause_for(error)
            return None
        if batch is not None:
            kept = self.settler.unsettled.pop(batch.id, None)
            if kept is not None:  # from an earlier call: it is reserved anew
                self.budget.release(kept)
            if not self.budget.reserve(file):
                self.budget.commit(file)  # it costs that anyway
            about = {"batch_id": batch.id, "batch_status": batch.status}
            inform("going on with batch %s: %s", batch.id, batch.status, event="batch_resumed", **about)
        return batch

    async def _look_for(self, file: InputFile) -> Batch | None:
        known = self.job.made.get(file.key)
        if known is not None:
            with contextlib.suppress(openai.NotFoundError):  # of another account, or long ago: made anew
                return await self.api.get(known)
        if not (self.job.recovered or file.key in self.job.unclear):
            return None
        return await self.api.find(self.job, file)

    async def _create(self, file: InputFile) -> Batch | None:
        """Upload a file, once, and create its batch."""
        try:
            if file.file_id is None:
                file.file_id = await self.api.upload(file)
            batch = await self.api.create(self.job, file)
        except openai.OpenAIError as error:
            await self._refused(error)
            return None
        about = {"batch_id": batch.id, "model": file.model, "requests": file.count}
        text = "batch %s created: %d requests of %s"
        inform(text, batch.id, file.count, file.model, event="batch_created", **about)
        return batch

    def _is_held_back(self) -> bool:
        """Return whether the files that wait cannot be submitted now."""
        return False

    async def _reserve(self, file: InputFile) -> bool:
        """Return whether what a file may cost is reserved."""
        return self.budget.reserve(file)

    def _pause_for(self, error: openai.APIError) -> None:
        """React to a failure that leaves it open whether the first file that waits has a batch."""
        raise error

    async def _refused(self, error: openai.OpenAIError) -> None:
        """React to a failure to create the batch of the first file that waits."""
        raise error

    async def _undo(self) -> bool:
        """Cancel the batches of a job that could not be made whole; the last may have been created unseen."""
        try:
            if self.job.unclear:
                found = await self.api.find(self.job, self.waiting[0])
                self.job.unclear.clear()
                if found is not None:
                    self._start(self.waiting.popleft(), found)
            for batch_id in self.running:
                await self.api.cancel(batch_id)
        except openai.OpenAIError as error:
            text = "batches of a job that failed could not be cancelled (%s)"
            warn(text, type(error).__name__, event="batch_not_cancelled", **of_error(error))
            return False
        return True

    def _name_batches(self, error: BaseException) -> None:
        """Name the batches of a job that was not created whole: they may cost."""
        if self.unsettled:
            job_id = error.__dict__["job_id"] = SEPARATOR.join(self.unsettled)
            about = {"batch_id": job_id, **of_error(error)}
            text = "job not submitted whole (%s): created were %s"
            warn(text, type(error).__name__, job_id, event="batch_job_incomplete", **about)

    def _end(self) -> None:
        """Keep what batches may still cost reserved, though no request waits for that; give back the rest."""
        for file in [*self.running.values(), *self.waiting]:
            batch_id = self.job.made.get(file.key)
            if batch_id is not None and file.reservation is not None:
                self.settler.unsettled[batch_id] = file
            may_run = batch_id is not None or file.key in self.job.unclear or self.job.recovered
            self.budget.release(file, keep=may_run)


# --- prompts answered by batches --------------------------------------------------------------------------

_FILLED = 0.9  # of the enqueued limit by one file: the server counts a little differently
_ALONE = 1  # refusals of a file that is not cut yet, with no other of ours enqueued
_PATIENCE = 10  # polling intervals between two tries, at most, of a file that is refused again and again
_JITTER = 0.9, 1.1  # times the polling interval


@dataclass(kw_only=True, eq=False)
class BatchRun(Submission):
    """Answers the prompts of one call by jobs: a second one for what expired or failed by chance.

    There are more only where the model refuses one parameter after the other.
    """

    config: BatchConfig
    counter: TokenCounter
    unsupported: UnsupportedParameters
    prompts: Sequence[Any]  # checked
    parameters: Parameters
    cached: CachedAnswers
    progress: Progress
    outcomes: dict[int, Outcome] = field(default_factory=dict)  # by the index of the prompt
    failed: Exception | None = None  # why the first of those requests was never run
    never_ran: int = 0  # requests whose batch was not created, or failed
    broke: BudgetExceededError | None = None  # why requests were not submitted: too little money is left
    _held: bool = False  # until a batch ends: too many tokens are enqueued
    _paused: bool = False  # until the next poll
    _refused_alone: int = 0  # how often a file was refused with no other of ours enqueued
    _give_up_at: float = 0.0
    _repeated: set[int] = field(default_factory=set)  # requests that failed by chance once
    _reported: float = 0.0

    async def collect(self, *, return_exceptions: bool) -> list[Any]:
        """Return the responses in input order."""
        try:
            async with self.journal.exclusive():
                await self.cached.look_up()
                self.outcomes.update(self.cached.found)
                await self._run()
                await self.journal.forget()
        except BaseException as error:
            error.__dict__["job_id"] = SEPARATOR.join(self.unsettled if self.jobs else ()) or None
            attach_responses(error, responses_of(self._in_order()))
            raise
        finally:
            self.cached.give_back(responses_of(self._in_order()))
        await self.progress(1.0)
        return outcomes_or_raise(self._in_order(), return_exceptions=return_exceptions)

    async def _run(self) -> None:
        """Run job after job, first those recorded, until every request has an outcome to be handed out."""
        recorded = deque(await self.journal.load())
        missing = [index for index in range(len(self.prompts)) if index not in self.outcomes]
        wanted = missing
        while wanted or recorded:
            job = JobRecord(
                endpoint=ENDPOINTS[self.parameters.api],
                window=self.config.completion_window,
                indexes=wanted,
                most_lines=self.config.max_batch_size,
                refused=self.unsupported.of(self.parameters.model),
            )
            await self._run_job(job.recover(recorded.popleft()) if recorded else job)
            reason: Exception | None = self.broke
            if len(self.jobs) == 1 and self.never_ran == self.job.total:
                reason = reason or self.failed
            if reason is not None:
                await self.journal.forget()
                raise reason
            wanted = [index for index in missing if self._is_worth(index, self.outcomes.get(index))]

    async def _run_job(self, job: JobRecord) -> None:
        """Make the batches of a job, and wait until all are settled."""
        adapted = dataclasses.replace(self.parameters, body=without(self.parameters.body, job.refused))
        lines = (BatchLine(n, numbered_id(n), adapted, self.prompts[n]) for n in job.indexes)
        files = recut(await write_in_thread(lines, most_lines=job.most_lines), job.spans)
        self.jobs.append(job)
        self.waiting = deque(sorted(files, key=lambda file: file.key not in job.made))
        self._give_up_at = time.monotonic() + window_seconds(job.window)
        try:
            await self.budget.estimate(files, job.endpoint)
            await self._save()
            while True:
                await self._submit_waiting()
                if not self.running and not self.waiting:
                    return
                await asyncio.sleep(self._pause())
                await self._poll()
        finally:
            self._end()
            close_files([*self.waiting, *self.running.values()])

    def _pause(self) -> float:
        """Return the seconds until the next look: more and more where the server takes nothing of ours."""
        patience = 1 if self.running else min(1 + self._refused_alone, _PATIENCE)
        return self.config.polling_interval * patience * random.uniform(*_JITTER)  # noqa: S311

    def _is_patient(self) -> bool:
        return time.monotonic() < self._give_up_at

    def _is_held_back(self) -> bool:
        return self._held or self._paused

    async def _reserve(self, file: InputFile) -> bool:
        """Reserve what a file may cost; with too little left, cut it, let it wait, or give it up."""
        if self.broke is None:
            if self.budget.reserve(file):
                return True
            fitting = self.budget.fitting(file)
            if fitting:
                await self._cut([fitting, file.count - fitting], "what is left of max_cost")
                return False
            if fitting is None and self._is_patient():
                self._paused = True
                return False
            self.broke = self.budget.exceeded(file)
        self._drop(self.broke)
        return False

    def _pause_for(self, error: openai.APIError) -> None:
        """Let what waits wait for the next poll; raise what no waiting cures."""
        if not read_failure(error).retry or not self._is_patient():
            raise error
        text, about = "%d requests could not be submitted (%s): later again", of_error(error)
        warn(text, self.waiting[0].count, about["error_type"], event="batch_not_submitted", **about)
        self._paused = True

    async def _refused(self, error: openai.OpenAIError) -> None:
        """Hold the first file back, or give it up."""
        file = self.waiting[0]
        code, message = getattr(error, "code", None), getattr(error, "message", str(error))
        is_limit = is_enqueued_limit(code, message)
        if is_limit or not read_failure(error).retry:
            self.budget.release(file, keep=file.key in self.job.unclear)
        if is_limit:
            await self._hold(message, error)
            return
        left = sum(file.count for file in self.waiting)
        has_begun = left < self.job.total or file.key in self.job.unclear  # else nothing would be lost
        if (
            isinstance(error, openai.APIError)
            and has_begun
            and read_failure(error).retry
            and self._is_patient()
        ):
            self._pause_for(error)
        else:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Give the first file up, which was never run."""
        file = self.waiting[0]
        self.budget.release(file, keep=file.key in self.job.unclear)
        self.failed = self.failed or error
        self.never_ran += file.count
        self._drop(error)

    def _drop(self, error: Exception) -> None:
        """Let the requests of the first file fail."""
        file = self.waiting.popleft()
        self.outcomes.update(dict.fromkeys(file.indexes, error))
        file.file.close()

    async def _hold(self, message: str, error: Exception) -> None:
        """Keep the first file until there is room for it; cut it where there will never be."""
        file = self.waiting[0]
        limit = enqueued_limit(message)
        tokens = await self._tokens(file) if limit is not None else 0
        often = _ALONE if limit is None else 2 * _ALONE  # others may have used it up; or it counts otherwise
        if not self._is_patient() or (limit is not None and tokens > limit and file.count == 1):
            self._give_up(error)
        elif limit is not None and tokens > limit * _FILLED and file.count > 1:
            pieces = -int(-tokens // (limit * _FILLED))
            await self._cut(even_counts(file.count, pieces), "the enqueued limit")
        elif self._refused_alone >= often and file.count > 1 and not self.running:
            await self._cut(even_counts(file.count, 2), "the enqueued limit")
        else:
            self._refused_alone += not self.running
            self._held = True
            inform("%d requests held back: too many are enqueued", file.count, event="batch_held")

    async def _cut(self, counts: Sequence[int], limit: str) -> None:
        """Cut the first file into files of so many requests."""
        file = self.waiting[0]
        pieces = cut_file(file, [count for count in counts if count])
        self.waiting.popleft()
        self.waiting.extendleft(reversed(pieces))
        text = "%d requests cut into %d batches, to fit %s"
        inform(text, file.count, len(pieces), limit, event="batch_cut", requests=file.count)
        await self._save()

    async def _tokens(self, file: InputFile) -> int:
        if file.tokens is None:
            total = 0
            for line in file.lines():
                total += await self.counter.count_input(json.loads(line)["body"])
                await asyncio.sleep(0)  # counting short texts does not wait for anything
            file.tokens = total
        return file.tokens

    async def _poll(self) -> None:
        """Look at each batch once, settle those that have ended, and report how far the run is."""
        self._paused = False
        if not self.running:
            self._held = False
        for batch_id, file in list(self.running.items()):
            await self._look(batch_id, file)
        left = sum(file.count - file.done for file in [*self.waiting, *self.running.values()])
        fraction = (len(self.prompts) - left) / len(self.prompts)
        if self._reported < fraction < 1:
            self._reported = fraction
            await self.progress(fraction)

    async def _look(self, batch_id: str, file: InputFile) -> None:
        try:
            await self._update(await self.api.get(batch_id), file)
        except openai.APIError as error:
            if not read_failure(error).retry:
                raise
            text, about = "batch %s could not be read (%s): later again", of_error(error)
            warn(text, batch_id, about["error_type"], event="batch_not_read", batch_id=batch_id, **about)

    async def _update(self, batch: Batch, file: InputFile) -> None:
        """Take in what a batch has become."""
        if not has_ended(batch):
            _, completed, failed = request_counts(batch)
            file.done = completed + failed
            self._refused_alone *= state_of(batch) == "validating"
            return
        refusal = enqueued_refusal(batch)
        if refusal is not None:
            await self._submit_again(batch, file, refusal)
            return
        results = await self.settler.settle(batch, file=file, schema=self.parameters.schema)
        await self.cached.keep(results.outcomes)
        self.running.pop(batch.id)
        self._held = False
        self._refused_alone = 0
        file.file.close()
        if state_of(batch) == "failed" and not results.lines:
            self.failed = self.failed or failure_of([batch])
            self.never_ran += file.count
        self.outcomes.update(results.outcomes)

    async def _submit_again(self, batch: Batch, file: InputFile, refusal: BatchError) -> None:
        """Let a file wait again whose batch was created, and refused when it was validated."""
        self.running.pop(batch.id)
        self.budget.release(file)
        file.done = 0
        self.waiting.appendleft(file)
        self.job.made.pop(file.key, None)
        await self._hold(refusal.message, refusal)
        await self._save()

    def _is_worth(self, index: int, outcome: Outcome | None) -> bool:
        """Return whether a request is to be submitted again: what failed by chance, once."""
        if outcome is None:
            return True
        if isinstance(outcome, ModelResponse):
            return False
        if isinstance(outcome, openai.BadRequestError):
            return self.unsupported.learn(outcome, without(self.parameters.body, self.job.refused))
        again = is_curable(outcome) and index not in self._repeated
        self._repeated.add(index)
        return again

    def _in_order(self) -> list[Outcome | None]:
        return [self.outcomes.get(index) for index in range(len(self.prompts))]
