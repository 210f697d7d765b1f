"""Jobs created whole: all batches of one, or none."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import openai

from openai_eval_client import _batch_lines
from openai_eval_client._batch_api import Order
from openai_eval_client._batch_funds import Funds
from openai_eval_client._batch_journal import Intent, Journal
from openai_eval_client._batch_meta import Placement
from openai_eval_client._batch_status import SEPARATOR, request_counts, state_of
from openai_eval_client._events import of_error, warn

if TYPE_CHECKING:
    from openai.types import Batch

    from openai_eval_client._batch_api import BatchApi
    from openai_eval_client._batch_jobs import BatchJobs
    from openai_eval_client._batch_journal import Store
    from openai_eval_client._batch_lines import Part
    from openai_eval_client._payments import Payments
    from openai_eval_client._tokens import TokenCounter


class Submitter:
    """Submits jobs.

    Args:
        base_url: Where the API is.
        api: The endpoints.
        jobs: Starts batches.
        store: Where jobs are recorded; None: nowhere.
        ttl: Seconds for which a job that was recorded is gone on with; None: for ever.
        payments: The money of the client.
        counter: Counts tokens.
    """

    def __init__(
        self,
        base_url: str,
        api: BatchApi,
        jobs: BatchJobs,
        store: Store | None,
        *,
        ttl: float | None,
        payments: Payments,
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
        self, parts: list[Part], endpoint: str, window: str, metadata: dict[str, str]
    ) -> list[Batch]:
        """Create the batch of each part; where a program was killed at it, only those it had not.

        Args:
            parts: The parts of the job; their files are closed in the end.
            endpoint: Such as "/v1/chat/completions".
            window: The completion window.
            metadata: The caller's own.

        Returns:
            The batches.

        Raises:
            BudgetExceededError: There is too little left for all of them together; none was created.
            openai.OpenAIError: One could not be created; the others were cancelled.
        """
        asked = (self._base_url, endpoint, window, sorted(metadata.items()))
        name = hashlib.sha256(repr((asked, [part.digest.hexdigest() for part in parts])).encode()).hexdigest()
        journal = Journal(self._store, f"submit {name} {self._submitted[name]}")
        self._submitted[name] += 1
        funds = Funds(self._payments, self._counter, endpoint, self._jobs.bills)
        options = (endpoint, window, metadata)
        try:
            await funds.estimate(parts)
            async with journal.exclusive():
                record = await journal.load()
                intent = Intent.recover(record) if record and not self._is_old(record) else Intent()
                batches = await self._create_all(parts, intent, journal, options, funds)
                if intent.recovered and not _are_of_use(batches):
                    for batch in batches:
                        funds.cancelled(batch.id)
                    batches = await self._create_all(parts, Intent(), journal, options, funds)
                return batches
        except BaseException:
            self._submitted[name] -= 1
            raise
        finally:
            _batch_lines.close(parts)

    def _is_old(self, record: dict[str, Any]) -> bool:
        return self._ttl is not None and record["since"] < time.time() - self._ttl

    async def _create_all(
        self,
        parts: list[Part],
        intent: Intent,
        journal: Journal,
        options: tuple[str, str, dict[str, str]],
        funds: Funds,
    ) -> list[Batch]:
        await _reserve(parts, intent, funds)
        total = sum(part.count for part in parts)
        made: list[Batch] = []
        await journal.save(intent.to_dict())
        try:
            for part in parts:
                order = Order(Placement.of(part, intent.name, total), *options)
                made.append(await self._jobs.start(part, order, intent))
                funds.started(part, made[-1].id, watched=False)
                await journal.save(intent.to_dict())
        except BaseException as error:
            left = parts[len(made) :]
            ours = isinstance(error, Exception) and not intent.recovered
            if ours and await self._undo(made, left, order, intent, funds):
                await journal.forget()
            _leave(left, funds, unclear=intent.recovered or bool(intent.unclear))
            _name_made(made, intent, error)
            raise
        return made

    async def _undo(
        self, made: list[Batch], left: list[Part], last: Order, intent: Intent, funds: Funds
    ) -> bool:
        """Cancel the batches of a job that could not be created whole; the last may have been created.

        Returns:
            False where that did not succeed.
        """
        try:
            found = await self._api.find(last.placement, since=intent.since) if intent.unclear else None
            intent.unclear.clear()
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


async def _reserve(parts: list[Part], intent: Intent, funds: Funds) -> None:
    """Reserve what all parts can cost; those that an earlier program submitted cost that anyway."""
    known = [part for part in parts if part.key in intent.made]
    for part in known:
        funds.commit(part)
    try:
        await funds.cover_all([part for part in parts if part.key not in intent.made])
    except BaseException:
        for part in known:
            funds.started(part, intent.made[part.key], watched=False)
        raise


def _leave(left: list[Part], funds: Funds, *, unclear: bool) -> None:
    """Give back what is reserved for parts of which no batch was made; of the first that may be unclear."""
    funds.leave(left[:1], (), unclear=unclear)
    funds.leave(left[1:], (), unclear=False)


def _name_made(made: list[Batch], intent: Intent, error: BaseException) -> None:
    """Name the batches of a job that was not created whole: they may cost."""
    ids = list(dict.fromkeys([*(batch.id for batch in made), *intent.made.values()]))
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
