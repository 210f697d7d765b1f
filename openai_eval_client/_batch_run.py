"""Many prompts by the Batch API, with the contract of answering them online."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import deque
from typing import TYPE_CHECKING, Any

import openai

from openai_eval_client._batch_jobs import Intent
from openai_eval_client._batch_lines import ENDPOINTS, Item, number, write_parts
from openai_eval_client._batch_results import is_curable
from openai_eval_client._batch_round import Plan, Round
from openai_eval_client._batch_status import SEPARATOR
from openai_eval_client._runner import attach, report
from openai_eval_client.errors import PartialFailureError
from openai_eval_client.models import ModelResponse

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from openai_eval_client._attempt import Refusals
    from openai_eval_client._batch_api import BatchApi
    from openai_eval_client._batch_jobs import BatchJobs
    from openai_eval_client._batch_results import Outcome
    from openai_eval_client._requests import Parameters
    from openai_eval_client._runner import Progress
    from openai_eval_client._tokens import TokenCounter
    from openai_eval_client.config import BatchConfig


class BatchRun:
    """Answers prompts by batches: at most two rounds, the second for what expired or failed by chance.

    Args:
        api: The endpoints.
        jobs: Starts and settles batches.
        counter: Counts tokens.
        config: How to batch.
        refusals: What models are known to refuse.
    """

    def __init__(
        self, api: BatchApi, jobs: BatchJobs, counter: TokenCounter, config: BatchConfig, refusals: Refusals
    ) -> None:
        self._api = api
        self._jobs = jobs
        self._counter = counter
        self._config = config
        self._refusals = refusals

    async def collect(
        self,
        prompts: Sequence[Any],
        parameters: Parameters,
        *,
        progress: Progress | None,
        return_exceptions: bool,
    ) -> list[Any]:
        """Answer all prompts and return the responses in input order.

        Args:
            prompts: The prompts, checked.
            parameters: What is asked, checked.
            progress: Called with the finished fraction.
            return_exceptions: Put a failed prompt's exception in its place, instead of raising at the end.

        Returns:
            One entry per prompt.

        Raises:
            PartialFailureError: Some failed, and `return_exceptions` is False.
            BatchError: No batch ran at all.
            openai.APIError: No batch could be created; or none can be read any more: then `.responses` has
                what was settled, and `.job_id` names the batches that are left.
            asyncio.CancelledError: The run was cancelled; it has both, too.
        """
        rounds: list[Round] = []
        steps = _Steps(progress, len(prompts))
        try:
            await self._run(prompts, parameters, rounds, steps)
        except (openai.OpenAIError, asyncio.CancelledError) as error:
            left = [batch_id for each in rounds for batch_id in each.running]
            error.__dict__["job_id"] = SEPARATOR.join(left) or None
            attach(error, _in_order(_merged(rounds), len(prompts)))
            raise
        outcomes = _merged(rounds)
        failures = {index: error for index, error in outcomes.items() if isinstance(error, Exception)}
        await report(progress, 1.0)
        if failures and not return_exceptions:
            raise PartialFailureError(_in_order(outcomes, len(prompts)), dict(sorted(failures.items())))
        return [outcomes[index] for index in range(len(prompts))]

    async def _run(
        self, prompts: Sequence[Any], parameters: Parameters, rounds: list[Round], steps: _Steps
    ) -> None:
        outcomes = await self._round(range(len(prompts)), prompts, parameters, rounds, steps)
        if rounds[0].never_ran == len(prompts):
            raise rounds[0].failed[0]
        again = [index for index, outcome in sorted(outcomes.items()) if self._is_worth(outcome, parameters)]
        if again:
            steps.before = len(prompts) - len(again)
            await self._round(again, prompts, parameters, rounds, steps)

    async def _round(
        self,
        indexes: Iterable[int],
        prompts: Sequence[Any],
        parameters: Parameters,
        rounds: list[Round],
        steps: _Steps,
    ) -> dict[int, Outcome]:
        adapted = dataclasses.replace(parameters, body=self._refusals.adapted(parameters.body))
        items = (Item(index, number(index), adapted, prompts[index]) for index in indexes)
        parts = await asyncio.to_thread(write_parts, items, most_lines=self._config.max_batch_size)
        plan = Plan(
            endpoint=ENDPOINTS[parameters.api],
            window=self._config.completion_window,
            polling_interval=self._config.polling_interval,
            schema=parameters.schema,
            save=_nothing,
            tell=steps.tell,
        )
        intent = Intent()
        rounds.append(Round(self._api, self._jobs, self._counter, plan, intent, deque(parts)))
        return await rounds[-1].run()

    def _is_worth(self, outcome: Outcome, parameters: Parameters) -> bool:
        """Return whether a request that failed is to be submitted once more."""
        if isinstance(outcome, ModelResponse):
            return False
        if isinstance(outcome, openai.BadRequestError):
            return self._refusals.learn(outcome, parameters.body)
        return is_curable(outcome)


@dataclasses.dataclass(slots=True)
class _Steps:
    """Turns the number of requests done into progress that only grows, and ends before 1.

    Attributes:
        progress: Called with the fraction.
        total: Requests of the run.
        before: Of which so many were done before this round.
    """

    progress: Progress | None
    total: int
    before: int = 0
    _told: float = 0.0

    async def tell(self, done: int) -> None:
        """Report so many requests of this round as done."""
        fraction = (self.before + done) / self.total
        if self._told < fraction < 1:
            self._told = fraction
            await report(self.progress, fraction)


def _merged(rounds: Iterable[Round]) -> dict[int, Outcome]:
    merged: dict[int, Outcome] = {}
    for each in rounds:
        merged.update(each.outcomes)
    return merged


def _in_order(outcomes: dict[int, Outcome], count: int) -> list[ModelResponse | None]:
    found = (outcomes.get(index) for index in range(count))
    return [outcome if isinstance(outcome, ModelResponse) else None for outcome in found]


async def _nothing() -> None:
    pass
