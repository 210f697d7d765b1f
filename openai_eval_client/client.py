"""The evaluation client: every public method, a few lines each."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Sequence, Sized
from typing import TYPE_CHECKING, Any, TypeVar

from openai_eval_client._account import Account
from openai_eval_client._batches import Batches
from openai_eval_client._log import inform
from openai_eval_client._online import NO_SAMPLES, Caller, collect, estimate, pool_for
from openai_eval_client._report import NO_LIMITS, Display, Progress, ProgressSnapshot, write_report
from openai_eval_client._runtime import check_loop
from openai_eval_client._sdk import AsyncOpenAI, SdkClient, account_of, fast_client, guarded, paced
from openai_eval_client._tokens import TokenCounter
from openai_eval_client._validation import check_callback, check_choice, check_event, check_switch, config_of
from openai_eval_client._wire import PATHS, check_iterable, check_parameters, check_prompt, list_prompts
from openai_eval_client.config import BatchConfig, CacheConfig, OpenAIConfig, RateLimitConfig

if TYPE_CHECKING:
    import asyncio
    import os
    from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Mapping
    from decimal import Decimal
    from pathlib import Path

    from typing_extensions import Self

    from openai_eval_client._cache import Cache
    from openai_eval_client._cost import CostBudget
    from openai_eval_client._online import WorkerPool
    from openai_eval_client._wire import Parameters
    from openai_eval_client.models import (
        BatchJob,
        BatchJobStatus,
        BatchRequest,
        ClientStats,
        CostEstimate,
        ModelResponse,
    )

    Prompt = str | Sequence[Any]

SDK = TypeVar("SDK", AsyncOpenAI, SdkClient)
_ON_UNCLEAR = ("raise", "retry")


class OpenAIClient:
    """Answers prompts within the rate limits, retried, priced, in order.

    One client may be shared by any number of tasks, threads and event loops, and used by several
    `asyncio.run` one after the other: its limits and budget hold for all of them together. It runs on
    asyncio alone.

    Args:
        config: Where the API is; None: from the environment.
        rate_limit: The key's limits; None: the defaults of `RateLimitConfig`.
        batch: How the Batch API is used; None: the defaults of `BatchConfig`.
        cache: A file, or a `CacheConfig`: answers are kept there before the call returns, and what was asked
            before, by an earlier run too, is answered from there. None: no cache. Streams and calls on
            `client.openai` are not kept.
        http_client: Your own HTTP client, of either httpx family; None: one on aiohttp, which is faster, or
            the SDK's default where a proxy is set in the environment.
    """

    def __init__(
        self,
        config: OpenAIConfig | None = None,
        *,
        rate_limit: RateLimitConfig | None = None,
        batch: BatchConfig | None = None,
        cache: CacheConfig | Path | str | None = None,
        http_client: Any = None,
    ) -> None:
        self._config = config_of("config", config, OpenAIConfig)
        self._batch = config_of("batch", batch, BatchConfig)
        limits = config_of("rate_limit", rate_limit, RateLimitConfig)
        account = self._account = Account(limits, max_cost=self._config.max_cost)
        self._counter = TokenCounter()
        self._http = http_client or fast_client(self._config.base_url, self._config.max_response_bytes)
        plain = guarded(http_client) if http_client else self._http
        sdk = self._sdk_client(SdkClient, plain, max_retries=0)
        account.limiter.share(*account_of(sdk))
        pricer = account.ledger.pricer_for(self._config.base_url)
        self._cache: Cache | None = None
        if cache is not None:
            from openai_eval_client._cache import open_cache  # some Pythons are built without SQLite

            self._cache = open_cache(cache, self._config.base_url, account.recorder, account.ledger)
        self._call = Caller(self._config, sdk, account, self._counter, pricer, cache=self._cache)
        self._jobs = Batches(
            self._config,
            self._batch,
            sdk=sdk,
            account=account,
            counter=self._counter,
            unsupported=self._call.unsupported,
            cache=self._cache,
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._config!r}, rate_limit={self._account.config!r})"

    async def generate_response(
        self,
        prompt: Prompt,
        *,
        model: str | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        timeout: float | None = None,
        system: str | None = None,
        api: str = "chat",
        max_cost: float | Decimal | None = None,
        **chat_params: Any,
    ) -> ModelResponse:
        """Answer one prompt.

        Args:
            prompt: A text, or a list of chat messages.
            model: The model; None: the config's.
            temperature: Sampling temperature; None: not sent.
            max_tokens: Output tokens at most; None: not sent.
            timeout: Seconds for one attempt, from when it is sent; None: the config's.
            system: A system prompt.
            api: "chat" (chat completions) or "responses" (the Responses API).
            max_cost: USD that the call may cost, as for `batch_generate`.
            **chat_params: Any other parameter of the API; None values are not sent. A pydantic class as
                `response_format` makes `ModelResponse.parsed` an instance of it.

        Returns:
            The response.

        Raises:
            ValidationError: The input is wrong; nothing was sent.
            RateLimitError: Rate limited through all retries, or for longer than `max_wait`.
            QuotaError: The account's credit is used up.
            TimeoutError: No attempt was answered within its timeout.
            BudgetExceededError: It could cost more than what is left of a budget; nothing was sent.
            RequestTooLargeError: The limit on tokens cannot admit it; nothing was sent.
            APIError: Any other failure, in the SDK's own classes.
        """
        check_loop()
        parameters = self._parameters(model, temperature, max_tokens, timeout, system, api, chat_params)
        budget = self._budget_for(max_cost, parameters)
        check_prompt(prompt, api=api)
        return await self._call(prompt, parameters, budget=budget)

    async def batch_generate(
        self,
        prompts: Iterable[Prompt],
        *,
        model: str | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        timeout: float | None = None,
        system: str | None = None,
        api: str = "chat",
        max_concurrent: int | None = None,
        max_cost: float | Decimal | None = None,
        max_failures: float | None = None,
        use_batch_api: bool = False,
        on_unclear: str = "raise",
        progress_callback: Callable[[float], Any] | None = None,
        progress: bool = False,
        return_exceptions: bool = False,
        **chat_params: Any,
    ) -> list[ModelResponse]:
        """Answer many prompts concurrently.

        Args:
            prompts: Texts, or lists of chat messages.
            model: The model; None: the config's.
            temperature: Sampling temperature; None: not sent.
            max_tokens: Output tokens at most; None: not sent.
            timeout: Seconds for one attempt, from when it is sent; None: the config's.
            system: A system prompt.
            api: "chat" (chat completions) or "responses" (the Responses API).
            max_concurrent: Requests of this call in flight at once; None: the rate limit's.
            max_cost: USD that the call may cost; None: any amount. Every attempt reserves the most it can
                cost, and none is sent for which too little is left. Needs `max_tokens`.
            max_failures: Prompts that may fail before the run ends early: a whole number, or a share of those
                done as a float below 1.0, judged from 20 prompts on; None: any number.
            use_batch_api: Send `BatchConfig.auto_batch_threshold` prompts or more through the Batch API, at
                its price; fewer run online. What expires there or fails by chance is submitted once more.
            on_unclear: What to do about what may have been paid for unseen: the creation of a batch failed,
                and the list of batches does not tell whether it was made; or a batch counts an answer that is
                in none of its files. It is looked for, for up to ten minutes. Then "raise", the default:
                those prompts fail with a BatchError (`unclear_creation`, `lost_result`, `unreadable_result`).
                "retry": they are submitted again.
            progress_callback: Called, or awaited, with the finished fraction after each prompt; the first
                exception that it raises is logged.
            progress: Show the progress on standard error: a bar in a terminal or a notebook (extra
                `progress`), elsewhere a line every ten seconds.
            return_exceptions: Put a failed prompt's exception in its place instead of raising.
            **chat_params: Any other parameter of the API, as for `generate_response`.

        Returns:
            The responses, in the order of the prompts.

        Raises:
            ValidationError: The input is wrong; nothing was sent.
            PartialFailureError: Some prompts failed; its `responses` are those of the others.
            APIError: An error that all prompts would meet; its `responses` are the answers so far. Credit and
                a pause beyond `max_wait` end the run at once; what may be one prompt's own (key, permission,
                model, address) when 3 different prompts in a row met it before any answer, or 20 after one.
            TooManyFailuresError: More prompts failed than `max_failures`; its `responses` likewise.
            BudgetExceededError: The next request could cost more than is left of a budget; `responses`
                likewise, all of them paid within the budget.
            BatchError: The Batch API ran none of the prompts.
            asyncio.CancelledError: The call was cancelled; `responses` likewise. Its batches go on: `job_id`
                names those whose results have not been read.
        """
        check_loop()
        parameters = self._parameters(model, temperature, max_tokens, timeout, system, api, chat_params)
        budget = self._budget_for(max_cost, parameters)
        pool = self._pool(parameters, budget, max_concurrent, max_failures, prompts)
        check_choice(on_unclear, "on_unclear", _ON_UNCLEAR)
        check_callback(progress_callback, "progress_callback")
        callback = Progress(progress_callback)
        check_switch(progress, "progress")
        listed = list_prompts(prompts, api)
        by_batch = use_batch_api and self._are_enough(listed)
        display = None
        if progress:
            display = self._display(parameters.model, len(listed), None if by_batch else pool)
        if not by_batch:
            with self._samples_of(parameters):
                return await collect(
                    pool, listed, progress=callback, display=display, return_exceptions=return_exceptions
                )
        with self._samples_of(parameters), display or contextlib.nullcontext():
            shown = Progress(None if display is None else display.reach, callback)
            return await self._jobs.collect(
                listed,
                parameters,
                budget=budget,
                progress=shown,
                max_failures=max_failures,
                on_unclear=on_unclear,
                return_exceptions=return_exceptions,
            )

    def as_completed(
        self,
        prompts: Iterable[Prompt] | AsyncIterable[Prompt],
        *,
        model: str | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        timeout: float | None = None,
        system: str | None = None,
        api: str = "chat",
        max_concurrent: int | None = None,
        max_cost: float | Decimal | None = None,
        max_failures: float | None = None,
        progress: bool = False,
        stop_event: asyncio.Event | None = None,
        **chat_params: Any,
    ) -> AsyncGenerator[tuple[int, ModelResponse | Exception], None]:
        """Answer prompts and yield each outcome as it comes, in bounded memory however many there are.

        At most twice `max_concurrent` prompts are taken and not yet consumed, so a slow consumer slows their
        source down. Ending the loop early (`break`, `aclose`, cancellation) ends what is in flight.

        Args:
            prompts: Texts, or lists of chat messages, from an iterable or async iterable. They are taken on
                the event loop, so one that blocks holds it up. An async generator is closed in the end.
                Requests see the context variables of the first `anext`.
            model: The model; None: the config's.
            temperature: Sampling temperature; None: not sent.
            max_tokens: Output tokens at most; None: not sent.
            timeout: Seconds for one attempt, from when it is sent; None: the config's.
            system: A system prompt.
            api: "chat" (chat completions) or "responses" (the Responses API).
            max_concurrent: Requests of this call in flight at once; None: the rate limit's.
            max_cost: USD that the call may cost, as for `batch_generate`.
            max_failures: Prompts that may fail before the run ends early, as for `batch_generate`.
            progress: Show the progress, as for `batch_generate`.
            stop_event: Once it is set, nothing more is sent: what is in flight is yielded, and the iterator
                ends. Prompts that were taken and not sent have no outcome.
            **chat_params: Any other parameter of the API, as for `generate_response`.

        Yields:
            The prompt's index, from 0, and its response or the exception it failed with: a ValidationError
            for a prompt that is wrong.

        Raises:
            ValidationError: A parameter is wrong; raised by the call itself.
            APIError: An error that all prompts would meet, as for `batch_generate`; raised after what was in
                flight has been yielded. An exception of `prompts` itself is raised after all it gave.
            BudgetExceededError: The next request could cost more than is left of a budget; likewise.
            TooManyFailuresError: More prompts failed than `max_failures`; likewise.
        """
        parameters = self._parameters(model, temperature, max_tokens, timeout, system, api, chat_params)
        budget = self._budget_for(max_cost, parameters)
        pool = self._pool(parameters, budget, max_concurrent, max_failures, prompts, check=True)
        check_iterable(prompts, "__iter__", "__aiter__")
        check_switch(progress, "progress")
        check_event(stop_event, "stop_event")
        total = len(prompts) if isinstance(prompts, Sized) else None
        display = self._display(parameters.model, total, pool) if progress else None
        samples = self._samples_of(parameters)
        return pool.run(prompts, display=display, stop_event=stop_event, samples=samples)

    async def estimate(
        self,
        prompts: Iterable[Prompt] | AsyncIterable[Prompt],
        *,
        model: str | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        system: str | None = None,
        api: str = "chat",
        progress_callback: Callable[[float], Any] | None = None,
        **chat_params: Any,
    ) -> CostEstimate:
        """Estimate what prompts would need before any is sent: tokens, dollars, minutes. Sends nothing.

        Args:
            prompts: Texts, or lists of chat messages, from an iterable or async iterable. They are taken on
                the event loop, a few at a time, and counted in a thread.
            model: The model; None: the config's.
            temperature: Checked; it changes nothing here.
            max_tokens: Output tokens at most; without it, no upper bound is known.
            system: A system prompt.
            api: "chat" (chat completions) or "responses" (the Responses API).
            progress_callback: Called, or awaited, with the counted fraction now and then where `len(prompts)`
                is known, and with 1.0 at the end; the first exception that it raises is logged.
            **chat_params: Any other parameter of the API, as for `generate_response`.

        Returns:
            The estimate.

        Raises:
            ValidationError: A parameter or a prompt is wrong; `index` says which prompt.
        """
        check_loop()
        parameters = self._parameters(model, temperature, max_tokens, None, system, api, chat_params)
        check_iterable(prompts, "__iter__", "__aiter__")
        check_callback(progress_callback, "progress_callback")
        progress = Progress(progress_callback)
        return await estimate(
            prompts, parameters, counter=self._counter, account=self._account, progress=progress
        )

    async def submit_batch_job(
        self,
        requests: Iterable[BatchRequest],
        *,
        completion_window: str | None = None,
        metadata: Mapping[str, str] | None = None,
        api: str = "chat",
        on_unclear: str = "raise",
    ) -> BatchJob:
        """Submit requests as a batch job: one batch for each model and each 50,000 requests or 200 MB.

        Args:
            requests: The requests; any number of models.
            completion_window: How long the provider may take, "24h" or "7d"; None: the config's.
            metadata: What the provider keeps with each batch: up to 14 pairs of texts, keys of up to 64
                characters, values of up to 512.
            api: "chat" (chat completions) or "responses" (the Responses API).
            on_unclear: What to do where the creation of a batch failed and the list of batches does not tell
                whether it was made: "raise", the default: a BatchError, `unclear_creation`. "retry": create
                it again, although it may be paid for twice.

        Returns:
            The job; its `job_id` names all its batches, and works in any process.

        Raises:
            ValidationError: A request is wrong, with its `index` and `field`; nothing was sent. Or the server
                refuses the completion window.
            BudgetExceededError: All requests together can cost more than is left of the client's `max_cost`;
                nothing was sent. Else what they can cost stays reserved until their results are retrieved
                with this client.
            QuotaError: The server takes no more tokens now, or the credit is used up.
            BatchError: It is not known whether a batch was created (`unclear_creation`).
            APIError: Any other failure, in the SDK's own classes. As with QuotaError, the batches of the job
                that were created have been cancelled, and `job_id` names them.
        """
        check_loop()
        check_choice(on_unclear, "on_unclear", _ON_UNCLEAR)
        return await self._jobs.submit(
            requests, api=api, window=completion_window, metadata=metadata, on_unclear=on_unclear
        )

    async def get_batch_status(self, job_id: str) -> BatchJobStatus:
        """Look at a batch job.

        Args:
            job_id: The `job_id` of a `BatchJob`, or the id of any batch.

        Returns:
            Its status. Counts are sums over its batches; an error's `line` is the request's position in the
            list that was submitted, from 1.

        Raises:
            APIError: There is no such job, or the server cannot be asked.
        """
        check_loop()
        return await self._jobs.status(job_id)

    async def retrieve_batch_results(
        self, job_id: str, *, return_exceptions: bool = False
    ) -> list[ModelResponse]:
        """Collect the results of a batch job that has ended, completed or not.

        Args:
            job_id: The `job_id` of a `BatchJob`, or the id of any batch.
            return_exceptions: Put a failed request's exception in its place instead of raising.

        Returns:
            The responses, in the order of the requests, at the batch price.

        Raises:
            BatchError: It has not ended, and `code` is its status; or it failed, and no request was run.
            PartialFailureError: Some requests failed, expired, were cancelled, or have no result; its
                `responses` are those of the others.
            APIError: There is no such job, or the server cannot be asked.
        """
        check_loop()
        return await self._jobs.results(job_id, return_exceptions=return_exceptions)

    async def cancel_batch_job(self, job_id: str) -> BatchJobStatus:
        """Cancel a batch job; what is answered already stays, and is billed.

        Args:
            job_id: The `job_id` of a `BatchJob`, or the id of any batch.

        Returns:
            Its status, "cancelling" at first. A job that has ended stays as it is.
        """
        check_loop()
        return await self._jobs.cancel(job_id)

    def list_batch_jobs(self) -> AsyncIterator[BatchJobStatus]:
        """List the batch jobs that this package submitted with this account.

        Yields:
            The status of each, the newest first; jobs of which batches are missing come last.
        """
        return self._jobs.jobs()

    @functools.cached_property
    def openai(self) -> AsyncOpenAI:
        """The SDK's client, paced by the same limits and on the same connections."""
        view = paced(self._http, self._account, self._counter)
        config = self._config
        return self._sdk_client(AsyncOpenAI, view, max_retries=config.max_retries, timeout=config.timeout)

    @property
    def stats(self) -> ClientStats:
        """What the client did so far."""
        return self._account.stats

    def report(self, path: str | os.PathLike[str], *, title: str | None = None) -> Path:
        """Write a page about what the client did so far: what held it up, what it cost, what failed.

        One HTML file, which loads nothing and runs nothing, without prompts, answers or keys. It may be
        written at any time, also in the middle of a run and after `close`.

        Args:
            path: The file; an older one is replaced as a whole.
            title: Its heading; None: "Run report".

        Returns:
            The path.

        Raises:
            OSError: It cannot be written there.
        """
        return write_report(path, self._account, self._config.base_url, title)

    async def close(self) -> None:
        """Close the connections and the cache; the client cannot be used after this."""
        self._account.limiter.leave()
        try:
            await self._http.aclose()
        finally:
            if self._cache is not None:
                await self._cache.close()

    async def __aenter__(self) -> Self:
        check_loop()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _parameters(  # noqa: PLR0917  # in the order of the methods that call it
        self,
        model: str | None,
        temperature: float | None,
        max_tokens: int | None,
        timeout: float | None,
        system: str | None,
        api: str,
        params: dict[str, Any],
    ) -> Parameters:
        if self._http.is_closed:
            raise RuntimeError("this client was closed")
        given = params.copy()
        for name in ("extra_headers", "extra_query"):  # may hold a key, which no frame of an error shows
            params.pop(name, None)
        return check_parameters(
            model=self._config.default_model if model is None else model,
            timeout=self._config.timeout if timeout is None else timeout,
            temperature=temperature,
            max_tokens=max_tokens,
            system=system,
            api=api,
            params=given,
        )

    def _budget_for(self, max_cost: float | Decimal | None, parameters: Parameters) -> CostBudget | None:
        """Return the budget of one call, besides the client's; None without `max_cost`."""
        return self._account.budgets.budget_for(max_cost, parameters.body, PATHS[parameters.api])

    def _are_enough(self, prompts: Sequence[Prompt]) -> bool:
        """Return whether prompts are enough for the Batch API; log it if not."""
        count, least = len(prompts), self._batch.auto_batch_threshold
        if count < least:
            text = "%d prompts, fewer than auto_batch_threshold=%d: sent online"
            inform(text, count, least, event="batch_too_small", requests=count)
        return count >= least

    def _samples_of(self, parameters: Parameters) -> contextlib.AbstractContextManager[Callable[[], None]]:
        """Enter for a call of many prompts: interrupted and made again, it finds its answers in the cache."""
        return NO_SAMPLES if self._cache is None else self._cache.of_call(parameters)

    def _pool(
        self,
        parameters: Parameters,
        budget: CostBudget | None,
        max_concurrent: int | None,
        max_failures: float | None,
        prompts: object,
        *,
        check: bool = False,
    ) -> WorkerPool:
        """Return the pool that answers prompts; with `check`, each is checked as it is taken."""
        return pool_for(
            self._call,
            parameters,
            self._account.config,
            budget,
            max_concurrent=max_concurrent,
            max_failures=max_failures,
            total=len(prompts) if isinstance(prompts, Sized) else None,
            check=check,
        )

    def _display(self, model: str, total: int | None, pool: WorkerPool | None) -> Display:
        """Return what shows the progress of a call; without a pool the Batch API is at work."""

        def probe() -> ProgressSnapshot:
            rate_limited, retries = self._account.recorder.rate_limited_and_retries
            if pool is None:
                return ProgressSnapshot(rate_limited=rate_limited, retries=retries)
            limits = self._account.limiter.status(model) or NO_LIMITS
            return ProgressSnapshot(limits, pool.in_flight, rate_limited, retries)

        return Display(total, probe)

    def _sdk_client(self, kind: type[SDK], http_client: Any, **options: Any) -> SDK:
        config = self._config
        client = kind(
            api_key=config.api_key,
            organization=config.organization_id,
            base_url=config.base_url,
            http_client=http_client,
            **options,
        )
        client.organization = config.organization_id  # None: the SDK would read the environment again
        return client
