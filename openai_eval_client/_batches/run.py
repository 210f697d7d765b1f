"""Many prompts by the Batch API, submitted again where that helps."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import openai

from openai_eval_client._batches.api import Order
from openai_eval_client._batches.budget import Funds
from openai_eval_client._batches.files import (
    ENDPOINTS,
    BatchLine,
    close_files,
    cut_lines,
    even_parts,
    number,
    recut,
    write_aside,
)
from openai_eval_client._batches.results import is_curable
from openai_eval_client._batches.resume import JobRecord, runs, unrolled
from openai_eval_client._batches.status import (
    SEPARATOR,
    JobMetadata,
    enqueued_limit,
    failure_of,
    has_ended,
    is_enqueued_limit,
    request_counts,
    state_of,
    was_refused,
)
from openai_eval_client._log import inform, warn
from openai_eval_client._online import attach_responses, outcomes_or_raise, responses_of
from openai_eval_client._report import report
from openai_eval_client._sdk import without
from openai_eval_client._validation import window_seconds
from openai_eval_client._wire import of_error, read_failure
from openai_eval_client.models import ModelResponse

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from openai.types import Batch

    from openai_eval_client._batches.api import BatchApi
    from openai_eval_client._batches.files import InputFile
    from openai_eval_client._batches.results import BatchJobs, Outcome
    from openai_eval_client._batches.resume import CachedAnswers, Journal
    from openai_eval_client._cost import Budgets, CostBudget
    from openai_eval_client._report import Progress
    from openai_eval_client._sdk import UnsupportedParameters
    from openai_eval_client._tokens import TokenCounter
    from openai_eval_client._wire import Parameters
    from openai_eval_client.config import BatchConfig
    from openai_eval_client.errors import BatchError, BudgetExceededError


@dataclass(frozen=True, slots=True)
class Plan:
    """What all batches of a round have in common."""

    endpoint: str  # such as "/v1/chat/completions"
    window: str  # the completion window
    polling_interval: float  # seconds between two looks
    schema: Any  # the pydantic class the answers are to fit, where there is one
    # called whenever the record has changed, before and after each step that costs
    save: Callable[[], Awaitable[None]]
    # called with the outcomes of each batch, before they are handed on
    keep: Callable[[dict[int, Outcome]], Awaitable[None]]
    tell: Callable[[int], Awaitable[None]]  # called with the number of requests that are done
    funds: Funds  # pays for them


_FILLED = 0.9  # of the enqueued limit by one part: the server counts a little differently
_ALONE = 1  # refusals of a part that is not cut yet, with no other of ours enqueued
_PATIENCE = 10  # polling intervals between two tries, at most, of a part that is refused again and again
_JITTER = 0.9, 1.1  # times the polling interval


@dataclass(slots=True)
class Round:
    """One pass of requests through the Batch API."""

    api: BatchApi  # the endpoints
    jobs: BatchJobs  # startThrottle and settles batches
    counter: TokenCounter  # counts the tokens of a part that is too large
    plan: Plan  # what all batches have in common
    record: JobRecord  # names them
    waiting: deque[InputFile]  # the parts not submitted yet
    running: dict[str, InputFile] = field(default_factory=dict)  # those submitted, by the id of their batch
    outcomes: dict[int, Outcome] = field(default_factory=dict)  # one for each index that is settled
    # why requests were never run: their batch was not created, or failed
    failed: list[Exception] = field(default_factory=list)
    never_ran: int = 0  # how many requests that are
    broke: BudgetExceededError | None = None  # why requests were not submitted for which no money is left
    _total: int = 0
    _give_up_at: float = 0.0
    _done: dict[str, int] = field(default_factory=dict)
    _tokens_of: dict[str, int] = field(default_factory=dict)
    _held: bool = False
    _paused: bool = False
    _refused_alone: int = 0

    async def run(self) -> dict[int, Outcome]:
        """Return the outcome of each request, by index."""
        self._total = sum(part.count for part in self.waiting)
        self._give_up_at = time.monotonic() + window_seconds(self.plan.window)
        try:
            await self.plan.funds.estimate(self.waiting)
            self.waiting = deque(sorted(self.waiting, key=lambda part: part.key not in self.record.made))
            await self._save()
            while True:
                await self._submit()
                if not self.running and not self.waiting:
                    return self.outcomes
                await asyncio.sleep(self._pause())
                await self._poll()
        finally:
            unclear = self.record.recovered or bool(self.record.unclear)
            self.plan.funds.leave(self.waiting, self.running, unclear=unclear)
            close_files([*self.waiting, *self.running.values()])

    def _pause(self) -> float:
        """Return the seconds until the next look: more and more where the server takes nothing of ours."""
        patience = 1 if self.running else min(1 + self._refused_alone, _PATIENCE)
        return self.plan.polling_interval * patience * random.uniform(*_JITTER)  # noqa: S311

    async def _save(self) -> None:
        """Record which parts there are and which batches were made of them."""
        self.record.note([*self.waiting, *self.running.values()])
        await self.plan.save()

    async def _submit(self) -> None:
        """Submit the parts that wait, as long as the server takes them."""
        while self.waiting and not self._held and not self._paused:
            part = self.waiting[0]
            order = Order(
                JobMetadata.of(part, self.record.name, self._total),
                self.plan.endpoint,
                self.plan.window,
                {},
            )
            batch = await self._found(part, order)
            if batch is None and not self._paused and await self._covered(part):
                batch = await self._made(part, order)
            if batch is not None:
                self.plan.funds.started(part, batch.id, watched=True)
                self.running[batch.id] = self.waiting.popleft()
                await self._save()

    async def _found(self, part: InputFile, order: Order) -> Batch | None:
        """Look for a batch that was created before; where that cannot be told now, pause."""
        try:
            batch = await self.jobs.found(part, order, self.record)
        except openai.APIError as error:
            self._pause_for(error)
            return None
        if batch is not None and not self.plan.funds.cover(part):
            self.plan.funds.commit(part)  # it costs that anyway
        return batch

    async def _covered(self, part: InputFile) -> bool:
        """Reserve what the first part may cost; with too little left, cut it, hold it back or give it up."""
        funds = self.plan.funds
        if self.broke is None and funds.cover(part):
            return True
        fitting = funds.fitting(part)
        if self.broke is None and fitting:
            await self._replace([fitting, part.count - fitting], "what is left of max_cost")
        elif self.broke is None and fitting is None and self._patient:
            self._paused = True
        else:
            self.broke = self.broke or funds.exceeded(part)
            self.outcomes.update(dict.fromkeys(part.indexes, self.broke))
            self.waiting.popleft().file.close()
        return False

    async def _made(self, part: InputFile, order: Order) -> Batch | None:
        try:
            return await self.jobs.make(part, order, self.record)
        except openai.OpenAIError as error:
            await self._refused(error)
            return None

    def _pause_for(self, error: openai.APIError) -> None:
        """Let what waits wait for the next poll; raise what no waiting cures."""
        if not read_failure(error).retry or not self._patient:
            raise error
        text, about = "%d requests could not be submitted (%s): later again", of_error(error)
        warn(text, self.waiting[0].count, about["error_type"], event="batch_not_submitted", **about)
        self._paused = True

    async def _refused(self, error: openai.OpenAIError) -> None:
        """Hold the first part back, whose batch was not created, or give it up."""
        code, message = getattr(error, "code", None), getattr(error, "message", str(error))
        if is_enqueued_limit(code, message) or not read_failure(error).retry:
            self.plan.funds.refused(self.waiting[0])
        if is_enqueued_limit(code, message):
            await self._hold(message, error)
        elif isinstance(error, openai.APIError) and self._is_worth_a_pause(error):
            self._pause_for(error)
        else:
            self._give_up(error)

    @property
    def _patient(self) -> bool:
        return time.monotonic() < self._give_up_at

    def _is_worth_a_pause(self, error: openai.APIError) -> bool:
        """Return whether a part whose batch was not created may be submitted later, or may be running."""
        begun = self.running or self.outcomes or self.waiting[0].key in self.record.unclear
        return bool(begun) and read_failure(error).retry and self._patient

    def _give_up(self, error: Exception) -> None:
        """Give the first part up."""
        part = self.waiting.popleft()
        self.plan.funds.unclear(part)
        self.failed.append(error)
        self.never_ran += part.count
        self.outcomes.update(dict.fromkeys(part.indexes, error))
        part.file.close()

    async def _hold(self, message: str, error: Exception) -> None:
        """Keep the first part until there is room for it; cut it where there will never be."""
        part = self.waiting[0]
        limit = enqueued_limit(message)
        tokens = await self._tokens(part) if limit is not None else 0
        often = _ALONE if limit is None else 2 * _ALONE  # others may have used it up; or it counts otherwise
        if not self._patient or (limit is not None and tokens > limit and part.count == 1):
            self._give_up(error)
        elif limit is not None and tokens > limit * _FILLED and part.count > 1:
            pieces = -int(-tokens // (limit * _FILLED))
            await self._replace(even_parts(part.count, pieces), "the enqueued limit")
        elif self._refused_alone >= often and part.count > 1 and not self.running:
            await self._replace(even_parts(part.count, 2), "the enqueued limit")
        else:
            self._refused_alone += not self.running
            self._held = True
            inform("%d requests held back: too many are enqueued", part.count, event="batch_held")

    async def _replace(self, counts: Sequence[int], limit: str) -> None:
        """Cut the first part into parts of so many requests."""
        part = self.waiting[0]
        smaller = cut_lines(part, counts)
        self.waiting.popleft()
        self.waiting.extendleft(reversed(smaller))
        text = "%d requests cut into %d batches, to fit %s"
        inform(text, part.count, len(smaller), limit, event="batch_cut", requests=part.count)
        await self._save()

    async def _tokens(self, part: InputFile) -> int:
        if part.key not in self._tokens_of:
            part.file.seek(0)
            total = 0
            for line in part.file:
                total += await self.counter.count_input(json.loads(line)["body"])
                await asyncio.sleep(0)  # counting short texts does not wait for anything
            self._tokens_of[part.key] = total
        return self._tokens_of[part.key]

    async def _poll(self) -> None:
        """Look at each batch once, and settle those that have ended."""
        self._paused = False
        if not self.running:
            self._held = False
        for batch_id, part in list(self.running.items()):
            await self._look(batch_id, part)
        await self.plan.tell(len(self.outcomes) + sum(self._done.values()))

    async def _look(self, batch_id: str, part: InputFile) -> None:
        try:
            await self._take(await self.api.get(batch_id), part)
        except openai.APIError as error:
            if not read_failure(error).retry:
                raise
            text, about = "batch %s could not be read (%s): later again", of_error(error)
            warn(text, batch_id, about["error_type"], event="batch_not_read", batch_id=batch_id, **about)

    async def _take(self, batch: Batch, part: InputFile) -> None:
        """Take in what a batch has become."""
        if not has_ended(batch):
            _, completed, failed = request_counts(batch)
            self._done[batch.id] = completed + failed
            self._refused_alone *= state_of(batch) == "validating"
            return
        refusal = was_refused(batch)
        if refusal is not None:
            await self._requeue(batch, part, refusal)
            return
        settlement = await self.jobs.settle(batch, part=part, schema=self.plan.schema)
        await self.plan.keep(settlement.outcomes)
        self._forget(batch)
        self._held = False
        self._refused_alone = 0
        part.file.close()
        if state_of(batch) == "failed" and not settlement.lines:
            self.failed.append(failure_of([batch]))
            self.never_ran += part.count
        self.outcomes.update(settlement.outcomes)

    async def _requeue(self, batch: Batch, part: InputFile, refusal: BatchError) -> None:
        """Have a part wait again whose batch was created, and refused when it was validated."""
        self._forget(batch)
        self.plan.funds.cancelled(batch.id)
        self.waiting.appendleft(part)
        self.record.made.pop(part.key, None)
        await self._hold(refusal.message, refusal)
        await self._save()

    @property
    def left(self) -> list[str]:
        """The ids of the batches that are not settled."""
        made = self.record.made
        return [*self.running, *(made[part.key] for part in self.waiting if part.key in made)]

    def _forget(self, batch: Batch) -> None:
        self.running.pop(batch.id)
        self._done.pop(batch.id, None)


@dataclass(frozen=True, slots=True)
class Tools:
    """What a run works with."""

    api: BatchApi  # the endpoints
    jobs: BatchJobs  # startThrottle and settles batches
    counter: TokenCounter  # counts tokens
    config: BatchConfig  # how to batch
    unsupported: UnsupportedParameters  # what models are known to refuse
    payments: Budgets  # the money of the client


@dataclass(slots=True)
class BatchRun:
    """Answers the prompts of one call by rounds: the second for what expired or failed by chance.

    There are more only where the model refuses one parameter after the other.
    """

    tools: Tools  # what it works with
    prompts: Sequence[Any]  # the prompts, checked
    parameters: Parameters  # what is asked, checked
    progress: Progress | None  # called with the finished fraction
    journal: Journal  # the record by which a killed run goes on
    kept: CachedAnswers  # the answers kept from earlier runs
    budget: CostBudget | None = None  # what it is paid from besides the client's budget
    _rounds: list[Round] = field(default_factory=list)
    _recorded: list[dict[str, Any]] = field(default_factory=list)
    _known: list[dict[str, Any]] = field(default_factory=list)
    _repeated: set[int] = field(default_factory=set)
    _told: float = 0.0

    async def collect(self, *, return_exceptions: bool) -> list[Any]:
        """Return the responses in input order."""
        try:
            async with self.journal.exclusive():
                await self.kept.look_up()
                self._known = (await self.journal.load()).get("rounds", [])
                await self._run()
                await self.journal.forget()
        except BaseException as error:  # raised where the rows are taken
            left = [batch_id for each in self._rounds for batch_id in each.left]
            error.__dict__["job_id"] = SEPARATOR.join(left) or None
            attach_responses(error, responses_of(self._in_order()))
            raise
        finally:
            responses = responses_of(self._in_order())
            self.kept.give_back({n for n, response in enumerate(responses) if response is not None})
        await report(self.progress, 1.0)
        return outcomes_or_raise(self._in_order(), return_exceptions=return_exceptions)

    async def _run(self) -> None:
        missing = [index for index in range(len(self.prompts)) if index not in self.kept.found]
        wanted = missing
        while wanted or len(self._rounds) < len(self._known):
            await self._round(wanted)
            if self._rounds[-1].broke:
                await self.journal.forget()
                raise self._rounds[-1].broke
            first = self._rounds[0]
            if first.failed and first.never_ran == len(first.outcomes):
                await self.journal.forget()
                raise first.failed[0]
            outcomes = self._outcomes()
            wanted = [index for index in missing if self._is_worth(index, outcomes.get(index))]

    async def _round(self, wanted: list[int]) -> None:
        """Run requests through the Batch API; where a round was recorded, that one instead."""
        place = len(self._rounds)
        known = self._known[place] if place < len(self._known) else None
        indexes = unrolled(known["indexes"]) if known else wanted
        record = JobRecord.recover(known["record"]) if known else JobRecord()
        refused = known["refused"] if known else self.tools.unsupported.of(self.parameters.model)
        most_lines = known["most_lines"] if known else self.tools.config.max_batch_size
        adapted = dataclasses.replace(self.parameters, body=without(self.parameters.body, refused))
        items = (BatchLine(index, number(index), adapted, self.prompts[index]) for index in indexes)
        parts = await write_aside(items, most_lines=most_lines)
        done = len(self.prompts) - len(indexes)
        tools, endpoint = self.tools, ENDPOINTS[self.parameters.api]
        plan = Plan(
            endpoint=endpoint,
            window=self.tools.config.completion_window,
            polling_interval=self.tools.config.polling_interval,
            schema=self.parameters.schema,
            save=self._save,
            keep=self._keep,
            tell=lambda more: self._tell((done + more) / len(self.prompts)),
            funds=Funds(tools.payments, tools.counter, endpoint, tools.jobs.bills, self.budget),
        )
        about = {"indexes": runs(indexes), "refused": refused, "most_lines": most_lines}
        self._recorded.append({**about, "record": record.to_dict()})
        waiting = deque(recut(parts, record.spans))
        self._rounds.append(Round(tools.api, tools.jobs, tools.counter, plan, record, waiting))
        await self._rounds[-1].run()

    async def _save(self) -> None:
        """Record all rounds so far."""
        for recorded, each in zip(self._recorded, self._rounds, strict=True):
            recorded["record"] = each.record.to_dict()
        await self.journal.save({"rounds": self._recorded})

    async def _keep(self, outcomes: dict[int, Outcome]) -> None:
        await self.kept.keep({n: each for n, each in outcomes.items() if isinstance(each, ModelResponse)})

    async def _tell(self, fraction: float) -> None:
        """Report progress that only grows, and ends before 1."""
        if self._told < fraction < 1:
            self._told = fraction
            await report(self.progress, fraction)

    def _is_worth(self, index: int, outcome: Outcome | None) -> bool:
        """Return whether a request is to be submitted again: what failed by chance, once."""
        if outcome is None:
            return True
        if isinstance(outcome, ModelResponse):
            return False
        if isinstance(outcome, openai.BadRequestError):
            sent = without(self.parameters.body, self._recorded[-1]["refused"])
            return self.tools.unsupported.learn(outcome, sent)
        again = is_curable(outcome) and index not in self._repeated
        self._repeated.add(index)
        return again

    def _outcomes(self) -> dict[int, Outcome]:
        """Return what is known so far, the later round's word before the first's."""
        merged: dict[int, Outcome] = dict(self.kept.found)
        for each in self._rounds:
            merged.update(each.outcomes)
        return merged

    def _in_order(self) -> list[Outcome | None]:
        outcomes = self._outcomes()
        return [outcomes.get(index) for index in range(len(self.prompts))]
