"""From input files to batches, each made once: what is recorded of a call, and how a job is submitted."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import itertools
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import openai

from openai_eval_client._batches.objects import (
    SEPARATOR,
    JobRecord,
    are_of_use,
)
from openai_eval_client._log import inform, warn
from openai_eval_client._wire import of_error

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Mapping, Sequence

    from openai.types import Batch

    from openai_eval_client._batches.api import BatchApi
    from openai_eval_client._batches.budget import BatchBudget
    from openai_eval_client._batches.files import InputFile
    from openai_eval_client._batches.results import BatchSettler
    from openai_eval_client._cache import Cache, Occurrence
    from openai_eval_client._wire import Parameters
    from openai_eval_client.models import ModelResponse

# --- what is kept of a call -------------------------------------------------------------------------------

_AT_ONCE = 100  # answers looked up or kept at a time
_SAYS = 5.0  # seconds of waiting for another process until the log says so


class Journal:
    """The jobs of one call as the cache remembers them; without a cache, none."""

    def __init__(self, cache: Cache | None, name: str, *earlier: str) -> None:
        self._store = None if cache is None else cache.journal
        self._name = name
        self.later: deque[dict[str, Any]] = deque()  # records of jobs that are still to be taken up
        self._names = (name, *earlier)  # the others are those under which earlier versions record the call

    @contextlib.asynccontextmanager
    async def exclusive(self) -> AsyncIterator[None]:
        """Wait until no other process works under these names, and keep others waiting."""
        async with contextlib.AsyncExitStack() as stack:
            if self._store is not None:
                text = "waiting for another call or process that answers the same requests by batch"
                about = {"event": "batch_waiting"}
                waits = asyncio.get_running_loop().call_later(_SAYS, functools.partial(inform, text, **about))
                stack.callback(waits.cancel)
                for name in self._names:
                    await stack.enter_async_context(self._store.exclusive(name))
                waits.cancel()
            yield

    async def load(self) -> list[dict[str, Any]]:
        """Return the records of the jobs, and stay with the name under which they are."""
        if self._store is None:
            return []
        for name in self._names:
            found = await self._store.journal_get(name)
            if found is not None:
                self._name = name
                break
        return found["jobs"] if found else []

    async def save(self, jobs: Iterable[JobRecord]) -> None:
        """Record the jobs, and those still to be taken up; they are on disk when the call returns."""
        if self._store is not None:
            records = [*(job.to_dict() for job in jobs), *self.later]
            await self._store.journal_put(self._name, {"jobs": records})

    async def forget(self) -> None:
        """Forget the records."""
        if self._store is not None:
            await self._store.journal_delete(self._name)


class CachedAnswers:
    """The cached answers to the prompts of one call; without a cache, none."""

    def __init__(self, cache: Cache | None, parameters: Parameters) -> None:
        self.names = [""]  # of these prompts and parameters alone, by each version of the key
        self._cache = cache
        self._parameters = parameters
        self._samples: list[Occurrence] = []

    async def take(self, prompts: Sequence[Any]) -> None:
        """Take the next sample of each prompt."""
        cache = self._cache
        if cache is not None:
            abandoned = threading.Event()

            def take() -> None:
                bodies = map(self._parameters.with_prompt, prompts)
                self._samples = [cache.take(body, self._parameters) for body in bodies]
                if abandoned.is_set():
                    self.give_back([])

            try:
                await asyncio.to_thread(take)
            except BaseException:
                abandoned.set()
                self.give_back([])
                raise
            keys = list(zip(*(sample.keys for sample in self._samples), strict=True)) or [()]
            self.names = [hashlib.sha256(b"".join(each)).hexdigest() for each in keys]

    async def look_up(self) -> dict[int, ModelResponse]:
        """Return the answers there are, by the index of their prompt."""
        answers: dict[int, ModelResponse] = {}
        if self._cache is not None:
            for first in range(0, len(self._samples), _AT_ONCE):
                some = await self._cache.kept(self._samples[first : first + _AT_ONCE], self._parameters)
                answers.update({first + n: response for n, response in some.items()})
        return answers

    async def keep(self, responses: Mapping[int, ModelResponse]) -> None:
        """Keep new answers, by the index of their prompt."""
        cache, answers = self._cache, list(responses.items())
        if cache is not None:
            for first in range(0, len(answers), _AT_ONCE):
                some = answers[first : first + _AT_ONCE]
                await asyncio.gather(*(cache.keep(self._samples[n].key, answer) for n, answer in some))

    def give_back(self, responses: Sequence[ModelResponse | None]) -> None:
        """Let a later call ask again for the prompts without an answer among those that are handed out."""
        samples, self._samples = self._samples, []
        for sample, response in itertools.zip_longest(samples, responses):
            if self._cache is not None and sample is not None and response is None:
                self._cache.give_back(sample, self._parameters)


# --- batches made of input files --------------------------------------------------------------------------


@dataclass(kw_only=True, eq=False)
class Submission:
    """Makes the batches of a job from its input files, each once: all of them or none."""

    api: BatchApi
    settler: BatchSettler
    budget: BatchBudget
    journal: Journal
    on_unclear: str = "raise"  # or "retry": submit again what may have been paid already
    jobs: list[JobRecord] = field(default_factory=list)  # as they are recorded; the last is worked on
    waiting: deque[InputFile] = field(default_factory=deque)  # of which no batch is made yet
    running: dict[str, InputFile] = field(default_factory=dict)  # by the id of their batch
    batches: list[Batch] = field(default_factory=list)  # as they were when they were made or found
    _held: bool = False  # until a batch ends: too many tokens are enqueued
    _paused: bool = False  # until the next poll

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
                    self.budget.reserve(file, is_made=True)
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
        while self.waiting and not self._held and not self._paused:
            batch = await self._make(self.waiting[0])
            if batch is not None:
                self._start(self.waiting.popleft(), batch)
                await self._save()

    async def _make(self, file: InputFile) -> Batch | None:
        """Return the batch of a file: the one that was made before, else a new one."""
        return await self._find(file) or await self._create(file)

    def _start(self, file: InputFile, batch: Batch) -> None:
        self.running[batch.id] = file
        self.batches.append(batch)
        self.job.made[file.key] = batch.id
        self.job.unclear.pop(file.key, None)

    async def _save(self) -> None:
        """Record which batches there are, and how the files are cut."""
        spans = dict(self.job.spans)
        spans.update((file.first, file.count) for file in [*self.waiting, *self.running.values()])
        self.job.spans = sorted(spans.items())
        await self.journal.save(self.jobs)

    async def _find(self, file: InputFile) -> Batch | None:
        """Return the batch that was made of a file before, with what it may cost reserved."""
        batch, made = None, self.job.made.get(file.key)
        if made is not None:
            with contextlib.suppress(openai.NotFoundError):  # of another account, or long ago: made anew
                batch = await self.api.get(made)
        if batch is None and file.key in self.job.unclear:
            batch = await self.api.look_for(self.job, file, on_unclear=self.on_unclear)
            self.job.unclear.pop(file.key)
        for key in (self._unseen(file), *([] if batch is None else [batch.id])):
            earlier = self.settler.unsettled.pop(key, None)
            if earlier is not None:  # from an earlier call: it is reserved anew
                self.budget.release(earlier)
        if batch is None:
            return None
        self.budget.reserve(file, is_made=True)
        about = {"batch_id": batch.id, "batch_status": batch.status}
        inform("going on with batch %s: %s", batch.id, batch.status, event="batch_resumed", **about)
        return batch

    async def _create(self, file: InputFile) -> Batch:
        """Upload a file, once, and create its batch."""
        if file.file_id is None:
            file.file_id = self.job.uploaded[file.key] = await self.api.upload(file)
        batch = await self.api.create(self.job, file, on_unclear=self.on_unclear, record=self._save)
        about = {"batch_id": batch.id, "model": file.model, "requests": file.count}
        text = "batch %s created: %d requests of %s"
        inform(text, batch.id, file.count, file.model, event="batch_created", **about)
        return batch

    async def _undo(self) -> bool:
        """Cancel the batches of a job that could not be made whole; the last may have been created unseen."""
        try:
            for batch_id in self.running:
                await self.api.cancel(batch_id)
            if self.job.unclear:
                found = await self.api.look_for(self.job, self.waiting[0], on_unclear="raise")
                self.job.unclear.clear()
                if found is not None:
                    self._start(self.waiting.popleft(), found)
                    await self.api.cancel(found.id)
        except openai.OpenAIError as error:
            text = "batches of a job that failed could not be cancelled (%s)"
            warn(text, type(error).__name__, event="batch_not_cancelled", **of_error(error))
            return False
        return True

    def _name_batches(self, error: BaseException) -> None:
        """Name the batches of a job that was not created whole: they may cost."""
        if self.unsettled:
            job_id = error.__dict__["job_id"] = SEPARATOR.join(self.unsettled)
            text, about = "job not submitted whole (%s): created were %s", of_error(error)
            warn(text, about["error_type"], job_id, event="batch_job_incomplete", batch_id=job_id, **about)

    def _end(self) -> None:
        """Keep what batches may still cost reserved, though no request waits for that; give back the rest."""
        for file in [*self.running.values(), *self.waiting]:
            batch_id = self.job.made.get(file.key)
            if batch_id is not None and file.reservation is not None:
                self.settler.unsettled[batch_id] = file
            may_run = batch_id is not None or file.key in self.job.unclear or self.job.recovered
            if batch_id is None and may_run and file.reservation is not None:
                self.settler.unsettled[self._unseen(file)] = file
            self.budget.release(file, keep=may_run)

    def _unseen(self, file: InputFile) -> str:
        """Return what stands for the id of a batch that may have been made, but was not seen."""
        return f"{self.job.name} {file.key}"
