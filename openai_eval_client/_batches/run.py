"""From prompts to answers by batches, killed runs included."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import random
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import openai

from openai_eval_client._batches.files import (
    BatchLine,
    close_files,
    cut_file,
    even_counts,
    numbered_id,
    recut,
    write_in_thread,
)
from openai_eval_client._batches.objects import (
    LOST,
    SEPARATOR,
    UNCLEAR,
    JobRecord,
    enqueued_limit,
    enqueued_refusal,
    failure_of,
    has_ended,
    is_enqueued_limit,
    request_counts,
    state_of,
)
from openai_eval_client._batches.results import is_curable
from openai_eval_client._batches.submission import Submission
from openai_eval_client._log import inform, warn
from openai_eval_client._online import attach_responses, outcomes_or_raise, responses_of, too_many_failures
from openai_eval_client._sdk import without
from openai_eval_client._validation import window_seconds
from openai_eval_client._wire import BATCH_PATHS, of_error, read_failure, read_json
from openai_eval_client.errors import BatchError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from openai.types import Batch

    from openai_eval_client._batches.budget import Outcome
    from openai_eval_client._batches.files import InputFile
    from openai_eval_client._batches.submission import CachedAnswers
    from openai_eval_client._report import Progress
    from openai_eval_client._sdk import UnsupportedParameters
    from openai_eval_client._tokens import TokenCounter
    from openai_eval_client._wire import Parameters
    from openai_eval_client.config import BatchConfig
    from openai_eval_client.errors import BudgetExceededError

_FILLED = 0.9  # of the enqueued limit by one file: the server counts a little differently
_DOUBTFUL = frozenset({UNCLEAR, LOST})  # errors of requests that may have been paid for
_UNSEEN = 600.0  # seconds for which batches and results are looked for that may be there unseen
_OVERDUE = 3600.0  # seconds after its completion window in which a batch may still end
_PATIENCE = 10  # polling intervals between two tries, at most, of a file that is refused again and again


@dataclass(kw_only=True, eq=False)
class BatchRun(Submission):
    """Answers the prompts of one call by jobs: a second one for what expired or failed by chance."""

    # There are more only where the model refuses one parameter after the other.

    config: BatchConfig
    counter: TokenCounter
    unsupported: UnsupportedParameters
    prompts: Sequence[Any]  # checked
    parameters: Parameters
    cached: CachedAnswers
    progress: Progress
    max_failures: float | None = None
    outcomes: dict[int, Outcome] = field(default_factory=dict)  # by the index of the prompt
    never_ran: int = 0  # requests whose batch was not created, or failed
    failed: Exception | None = None  # the first reason for that
    over_budget: BudgetExceededError | None = None  # the same, where too little money is left
    _refused_alone: int = 0  # how often a file was refused with no other of ours enqueued
    _give_up_at: float = 0.0  # of the monotonic clock, as the next
    _moved_at: float = 0.0  # when anything was seen to move, or the log said that nothing does
    _seen: object = None  # what there was to see then
    _repeated: set[int] = field(default_factory=set)  # requests that failed by chance once
    _reported: float = 0.0

    async def collect(self, *, return_exceptions: bool) -> list[Any]:
        """Return the responses in input order."""
        try:
            async with self.journal.exclusive():
                self.outcomes.update(await self.cached.look_up())
                await self._run()
                await self._forget()
            await self.progress(1.0)
        except BaseException as error:
            error.__dict__["job_id"] = SEPARATOR.join(self.unsettled) or None
            attach_responses(error, responses_of(self._in_order()))
            self.cached.give_back([])
            raise
        try:
            outcomes = outcomes_or_raise(self._in_order(), return_exceptions=return_exceptions)
        except BaseException:
            self.cached.give_back([])
            raise
        self.cached.give_back(responses_of(outcomes))
        return outcomes

    async def _run(self) -> None:
        """Run job after job, first those recorded, until every request has an outcome to be handed out."""
        later = self.journal.later
        later.extend(await self.journal.load())
        missing = [index for index in range(len(self.prompts)) if index not in self.outcomes]
        wanted = missing
        while wanted or later:
            job = JobRecord(
                endpoint=BATCH_PATHS[self.parameters.api],
                window=self.config.completion_window,
                indexes=wanted,
                most_lines=self.config.max_batch_size,
                refused=self.unsupported.of(self.parameters.model),
            )
            if later:
                job = job.recover(later.popleft())
            await self._run_job(job)
            none_ran = len(self.jobs) == 1 and self.never_ran == len(job.indexes)
            reason = self.over_budget or (self.failed if none_ran else None)
            if reason is not None:
                await self._forget()
                raise reason
            wanted = [index for index in missing if self._is_worth(index, self.outcomes.get(index))]
            self._repeated.update(
                index
                for index in missing
                if isinstance(error := self.outcomes.get(index), Exception)
                and not isinstance(error, openai.BadRequestError)  # which counts by the parameter refused
            )

    async def _forget(self) -> None:
        """Forget what is recorded, but for what is still to be done or may have been paid for unseen."""
        if any(isinstance(each, BatchError) and each.code in _DOUBTFUL for each in self.outcomes.values()):
            await self.journal.save(self.jobs)
        elif self.journal.later:
            await self.journal.save(())
        else:
            await self.journal.forget()

    async def _run_job(self, job: JobRecord) -> None:
        """Make the batches of a job, and wait until all are settled."""
        adapted = dataclasses.replace(self.parameters, body=without(self.parameters.body, job.refused))
        lines = (BatchLine(n, numbered_id(n), adapted, self.prompts[n]) for n in job.indexes)
        files = recut(await write_in_thread(lines, most_lines=job.most_lines), job.spans)
        self.jobs.append(job)
        self.waiting = deque(sorted(files, key=lambda file: file.key not in job.made))
        self._moved_at = time.monotonic()
        self._give_up_at = self._moved_at + window_seconds(job.window)
        try:
            await self.budget.estimate(files, job.endpoint)
            await self._save()
            while True:
                await self._submit_waiting()
                if not self.running and not self.waiting:
                    return
                # longer and longer while the server takes none of our files
                patience = 1 if self.running else min(1 + self._refused_alone, _PATIENCE)
                await asyncio.sleep(self.config.polling_interval * patience * random.uniform(0.9, 1.1))  # noqa: S311
                await self._poll()
        finally:
            self._end()
            close_files([*self.waiting, *self.running.values()])

    def _is_patient(self) -> bool:
        return time.monotonic() < self._give_up_at

    async def _make(self, file: InputFile) -> Batch | None:
        """Return the batch of a file; None where it has to wait, was cut, or was given up."""
        try:
            batch = await self._find(file)
        except openai.OpenAIError as error:
            self._doubt(error)
            return None
        if batch is not None or not await self._reserve(file):
            return batch
        try:
            return await self._create(file)
        except openai.OpenAIError as error:
            await self._refused(error)
            return None

    async def _reserve(self, file: InputFile) -> bool:
        """Reserve what a file may cost; with too little left, cut it, let it wait, or give it up."""
        if self.over_budget is None and self.budget.reserve(file):
            return True
        if self.over_budget is None:
            fitting = self.budget.fitting(file)
            if fitting:
                await self._cut([fitting, file.count - fitting], "what is left of max_cost")
            elif fitting is None and self._is_patient():
                self._paused = True
            else:
                self.over_budget = self.budget.exceeded(file)
        if self.over_budget is not None:
            self._give_up(self.over_budget)
        return False

    def _pause_for(self, error: openai.OpenAIError) -> None:
        """Put the files that wait off until the next poll; raise an error that time does not cure."""
        if not read_failure(error).retry or not self._is_patient():
            raise error
        text, about = "%d requests could not be submitted (%s): later again", of_error(error)
        warn(text, self.waiting[0].count, about["error_type"], event="batch_not_submitted", **about)
        self._paused = True

    def _doubt(self, error: openai.OpenAIError) -> None:
        """Put the first file off, whose batch may have been made unseen; give it up in the end."""
        file = self.waiting[0]
        if not isinstance(error, BatchError):
            self._pause_for(error)
        elif error.code != UNCLEAR:
            raise error
        elif self._is_recent(file) and self._is_patient():
            text = "%d requests: %s: looking again later"
            warn(text, file.count, error, event="batch_unclear", **of_error(error))
            self._paused = True
        else:
            self._give_up(error)

    def _is_recent(self, file: InputFile) -> bool:
        """Return whether a batch was asked for so lately that it may still appear."""
        return 0 <= time.time() - self.job.unclear.get(file.key, 0.0) < min(_UNSEEN, self.api.max_wait)

    async def _refused(self, error: openai.OpenAIError) -> None:
        """Hold the first file back, or give it up."""
        file = self.waiting[0]
        if isinstance(error, BatchError):
            self._doubt(error)
            return
        left = sum(each.count for each in self.waiting)
        has_begun = left < len(self.job.indexes) or file.key in self.job.unclear  # else nothing is lost
        if is_enqueued_limit(error):
            await self._hold(error)
        elif has_begun and read_failure(error).retry and self._is_patient():
            self._pause_for(error)
        else:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Give the first file up, which was never run: its requests fail."""
        file = self.waiting.popleft()
        self.budget.release(file, keep=file.key in self.job.unclear)
        self.failed = self.failed or error
        self.never_ran += file.count
        self.outcomes.update(dict.fromkeys(file.indexes, error))
        file.file.close()

    async def _hold(self, error: Exception) -> None:
        """Keep the first file until there is room for it; cut it where there will never be."""
        file, limit = self.waiting[0], enqueued_limit(error)
        self.budget.release(file, keep=file.key in self.job.unclear)
        pieces, often, is_too_large = 1, 1, False
        if limit is not None:
            tokens = await self._tokens(file)
            pieces, is_too_large = math.ceil(tokens / (limit * _FILLED)), tokens > limit
            often = 2  # others may have used the limit up, or the server counts otherwise
        if pieces <= 1 and self._refused_alone >= often and not self.running:
            pieces = 2
        if not self._is_patient() or (is_too_large and file.count == 1):
            self._give_up(error)
        elif pieces > 1 and file.count > 1:
            await self._cut(even_counts(file.count, pieces), "the enqueued limit")
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
                total += await self.counter.count_input(read_json(line)["body"])
                await asyncio.sleep(0)  # counting short texts does not wait for anything
            file.tokens = total
        return file.tokens

    async def _poll(self) -> None:
        """Look at each batch once, settle those that have ended, and report how far the run is."""
        self._paused, self._held = False, self._held and bool(self.running)
        for batch_id, file in list(self.running.items()):
            await self._look(batch_id, file)
        self._say_what_is_waited_for()
        left = sum(file.count - file.done for file in [*self.waiting, *self.running.values()])
        fraction = (len(self.prompts) - left) / len(self.prompts)
        if self._reported < fraction < 1:
            self._reported = fraction
            await self.progress(fraction)

    def _say_what_is_waited_for(self) -> None:
        """Log it where nothing has moved for as long as the longest pause."""
        now = time.monotonic()
        seen = [(batch_id, file.done) for batch_id, file in self.running.items()], len(self.waiting)
        if seen != self._seen:
            self._seen, self._moved_at = seen, now
        elif now - self._moved_at >= self.api.max_wait:
            self._moved_at = now
            names = SEPARATOR.join(self.running) or "the server to take a batch"
            inform(
                "nothing has moved for a while: waiting for %s", names, event="batch_waiting", batch_id=names
            )

    async def _look(self, batch_id: str, file: InputFile) -> None:
        try:
            batch = await self.api.get(batch_id)
            if not has_ended(batch) and time.monotonic() > self._give_up_at + _OVERDUE:
                state = state_of(batch)
                message = f"batch {batch_id} is {state} an hour after its window of {self.job.window}"
                raise BatchError(f"{message}: no longer waited for", code=state)
            await self._update(batch, file)
        except openai.APIError as error:
            if not read_failure(error).retry or time.monotonic() > self._give_up_at + _OVERDUE:
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
        if refusal is not None:  # it was created, and refused when it was validated: its file waits again
            self.running.pop(batch.id)
            file.done = 0
            self.waiting.appendleft(file)
            self.job.made.pop(file.key, None)
            await self._hold(refusal)
            await self._save()
            return
        file.ended_at = file.ended_at or time.monotonic()
        is_last = time.monotonic() - file.ended_at >= min(_UNSEEN, self.api.max_wait)
        results = await self.settler.settle(batch, file=file, asked=self.parameters, is_last=is_last)
        if results.is_late:  # it is looked at again with the next poll
            return
        await self.cached.keep(results.responses)
        self.running.pop(batch.id)
        self._held, self._refused_alone = False, 0
        file.file.close()
        if state_of(batch) == "failed" and not results.lines:
            self.failed = self.failed or failure_of([batch])
            self.never_ran += file.count
        self.outcomes.update(results.outcomes)
        self._check_failures()

    def _check_failures(self) -> None:
        """End the run where more requests failed for good than the caller allows."""
        if self.max_failures is None:
            return
        errors = {n: error for n, error in self.outcomes.items() if isinstance(error, Exception)}
        lost = [error for n, error in errors.items() if not self._is_worth(n, error)]
        if lost:
            counts = len(lost), len(self.outcomes), len(self.prompts)
            ended = too_many_failures(self.max_failures, *counts, lost[-1])
            if ended is not None:
                raise ended

    def _is_worth(self, index: int, outcome: Outcome | None) -> bool:
        """Return whether a request is to be submitted again: what failed by chance, once."""
        if outcome is None:
            return True
        if isinstance(outcome, openai.BadRequestError):
            return self.unsupported.learn(outcome, without(self.parameters.body, self.job.refused))
        is_worth = isinstance(outcome, Exception) and is_curable(outcome, self.on_unclear)
        return is_worth and index not in self._repeated

    def _in_order(self) -> list[Outcome | None]:
        return [self.outcomes.get(index) for index in range(len(self.prompts))]
