"""Many prompts by the Batch API, with the contract of answering them online."""

from __future__ import annotations

import dataclasses
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import openai

from openai_eval_client._attempt import without
from openai_eval_client._batch_funds import Funds
from openai_eval_client._batch_journal import Intent, runs, unrolled
from openai_eval_client._batch_lines import ENDPOINTS, Item, number, recut, write_aside
from openai_eval_client._batch_plan import Plan
from openai_eval_client._batch_results import is_curable
from openai_eval_client._batch_round import Round
from openai_eval_client._batch_status import SEPARATOR
from openai_eval_client._callbacks import report
from openai_eval_client._runner import answered, attach, handed_out
from openai_eval_client.models import ModelResponse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from openai_eval_client._attempt import Refusals
    from openai_eval_client._batch_api import BatchApi
    from openai_eval_client._batch_jobs import BatchJobs
    from openai_eval_client._batch_journal import Journal
    from openai_eval_client._batch_kept import Kept
    from openai_eval_client._batch_results import Outcome
    from openai_eval_client._callbacks import Progress
    from openai_eval_client._payments import Payments
    from openai_eval_client._requests import Parameters
    from openai_eval_client._spending import Purse
    from openai_eval_client._tokens import TokenCounter
    from openai_eval_client.config import BatchConfig


@dataclass(frozen=True, slots=True)
class Tools:
    """What a run works with.

    Attributes:
        api: The endpoints.
        jobs: Starts and settles batches.
        counter: Counts tokens.
        config: How to batch.
        refusals: What models are known to refuse.
        payments: The money of the client.
    """

    api: BatchApi
    jobs: BatchJobs
    counter: TokenCounter
    config: BatchConfig
    refusals: Refusals
    payments: Payments


@dataclass(slots=True)
class BatchRun:
    """Answers the prompts of one call by rounds: the second for what expired or failed by chance.

    There are more only where the model refuses one parameter after the other.

    Attributes:
        tools: What it works with.
        prompts: The prompts, checked.
        parameters: What is asked, checked.
        progress: Called with the finished fraction.
        journal: The record by which a killed run goes on.
        kept: The answers kept from earlier runs.
        purse: What it is paid from besides the client's purse.
    """

    tools: Tools
    prompts: Sequence[Any]
    parameters: Parameters
    progress: Progress | None
    journal: Journal
    kept: Kept
    purse: Purse | None = None
    _rounds: list[Round] = field(default_factory=list)
    _recorded: list[dict[str, Any]] = field(default_factory=list)
    _known: list[dict[str, Any]] = field(default_factory=list)
    _repeated: set[int] = field(default_factory=set)
    _told: float = 0.0

    async def collect(self, *, return_exceptions: bool) -> list[Any]:
        """Return the responses in input order.

        Args:
            return_exceptions: Put a failed prompt's exception in its place, instead of raising at the end.

        Returns:
            One entry per prompt.

        Raises:
            PartialFailureError: Some failed, and `return_exceptions` is False.
            BatchError: No batch ran at all.
            BudgetExceededError: Not enough was left for some of them; what was submitted is settled.
            openai.APIError: No batch could be created; or none can be read any more: then `.responses` has
                what was settled, and `.job_id` names the batches that are left.
            asyncio.CancelledError: The run was cancelled; it has both, too.
        """
        try:
            async with self.journal.exclusive():
                await self.kept.look_up()
                self._known = (await self.journal.load()).get("rounds", [])
                await self._run()
                await self.journal.forget()
        except BaseException as error:
            left = [batch_id for each in self._rounds for batch_id in each.left]
            error.__dict__["job_id"] = SEPARATOR.join(left) or None
            attach(error, answered(self._in_order()))
            raise
        finally:
            responses = answered(self._in_order())
            self.kept.give_back({n for n, response in enumerate(responses) if response is not None})
        await report(self.progress, 1.0)
        return handed_out(self._in_order(), return_exceptions=return_exceptions)

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
        intent = Intent.recover(known["intent"]) if known else Intent()
        refused = known["refused"] if known else self.tools.refusals.of(self.parameters.model)
        most_lines = known["most_lines"] if known else self.tools.config.max_batch_size
        adapted = dataclasses.replace(self.parameters, body=without(self.parameters.body, refused))
        items = (Item(index, number(index), adapted, self.prompts[index]) for index in indexes)
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
            funds=Funds(tools.payments, tools.counter, endpoint, tools.jobs.bills, self.purse),
        )
        record = {"indexes": runs(indexes), "refused": refused, "most_lines": most_lines}
        self._recorded.append({**record, "intent": intent.to_dict()})
        waiting = deque(recut(parts, intent.spans))
        self._rounds.append(Round(tools.api, tools.jobs, tools.counter, plan, intent, waiting))
        await self._rounds[-1].run()

    async def _save(self) -> None:
        """Record all rounds so far."""
        for recorded, each in zip(self._recorded, self._rounds, strict=True):
            recorded["intent"] = each.intent.to_dict()
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
            return self.tools.refusals.learn(outcome, sent)
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
