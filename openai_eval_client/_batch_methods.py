"""The methods of the evaluation client for batch jobs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Mapping

    from openai_eval_client._batch_client import Batches
    from openai_eval_client.models import BatchJob, BatchJobStatus, BatchRequest, ModelResponse


class BatchMethods:
    """Batch jobs: half the price, within a day; a `job_id` is enough to go on in another process."""

    _jobs: Batches

    async def submit_batch_job(
        self,
        requests: Iterable[BatchRequest],
        *,
        completion_window: str | None = None,
        metadata: Mapping[str, str] | None = None,
        api: str = "chat",
    ) -> BatchJob:
        """Submit requests as a batch job: one batch for each model and each 50,000 requests or 200 MB.

        Args:
            requests: The requests; any number of models.
            completion_window: What the provider may take, "24h" or "7d"; None: the config's.
            metadata: Up to 14 pairs of texts, the keys of up to 64 characters and the values of up to 512,
                that the provider keeps with each batch.
            api: "chat" for chat completions, "responses" for the Responses API.

        Returns:
            The job; its `job_id` names all its batches, and works in any process.

        Raises:
            ValidationError: A request is wrong, with its `index` and `field`; nothing was sent. Or the server
                refuses the completion window.
            BudgetExceededError: All requests together can cost more than what is left of the client's
                `max_cost`; nothing was sent. Else what they can cost stays reserved until their results are
                retrieved with this client.
            QuotaError: The server takes no more tokens now, or the credit is used up.
            APIError: Any other failure, in the SDK's own classes. Of this and QuotaError: what was created
                of the job has been cancelled, and `job_id` names it.
        """
        return await self._jobs.submit(requests, api=api, window=completion_window, metadata=metadata)

    async def get_batch_status(self, job_id: str) -> BatchJobStatus:
        """Look at a batch job.

        Args:
            job_id: That of a `BatchJob`, or the id of any batch.

        Returns:
            Its status. Counts are sums over its batches; an error's `line` is the request's position in the
            list that was submitted, counted from 1.

        Raises:
            APIError: There is no such job, or the server cannot be asked.
        """
        return await self._jobs.status(job_id)

    async def retrieve_batch_results(
        self, job_id: str, *, return_exceptions: bool = False
    ) -> list[ModelResponse]:
        """Collect the results of a batch job that has ended, completed or not.

        Args:
            job_id: That of a `BatchJob`, or the id of any batch.
            return_exceptions: Put a failed request's exception in its place instead of raising.

        Returns:
            The responses, in the order of the requests, at the batch price.

        Raises:
            BatchError: It has not ended, and `code` is its status; or it failed, and no request was run.
            PartialFailureError: Some requests failed, expired, were cancelled, or have no result; it carries
                the responses of the others.
            APIError: There is no such job, or the server cannot be asked.
        """
        return await self._jobs.results(job_id, return_exceptions=return_exceptions)

    async def cancel_batch_job(self, job_id: str) -> BatchJobStatus:
        """Cancel a batch job; what is answered already stays, and is paid.

        Args:
            job_id: That of a `BatchJob`, or the id of any batch.

        Returns:
            Its status, "cancelling" at first. A job that has ended stays as it is.
        """
        return await self._jobs.cancel(job_id)

    def list_batch_jobs(self) -> AsyncIterator[BatchJobStatus]:
        """List the batch jobs that this package submitted with this account.

        Yields:
            The status of each, the newest first; those of which batches are missing come last.
        """
        return self._jobs.jobs()
