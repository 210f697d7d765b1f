"""The evaluation client: it only composes the parts."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

from openai_eval_client import _clients, _runner
from openai_eval_client._batch_client import Batches
from openai_eval_client._batch_methods import BatchMethods
from openai_eval_client._callbacks import Guarded, both
from openai_eval_client._caller import Caller
from openai_eval_client._checks import check_callback, check_switch, config_of
from openai_eval_client._events import inform
from openai_eval_client._governor import Governor
from openai_eval_client._http import govern
from openai_eval_client._openai import AsyncOpenAI, account_of
from openai_eval_client._requests import check_prompt, list_prompts
from openai_eval_client._stream_methods import StreamMethods
from openai_eval_client._tokens import TokenCounter
from openai_eval_client.config import BatchConfig, CacheConfig, OpenAIConfig, RateLimitConfig

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Sequence
    from decimal import Decimal
    from pathlib import Path
    from types import TracebackType

    from typing_extensions import Self

    from openai_eval_client._cache import Cache
    from openai_eval_client.models import ClientStats, ModelResponse

    Prompt = str | Sequence[Any]


class OpenAIClient(BatchMethods, StreamMethods):
    """Answers prompts within the rate limits, retried, priced, in order.

    One client may be shared by any number of tasks, threads and event loops, and used by several
    `asyncio.run` one after the other: it has one budget.

    Args:
        config: Where the API is; None: from the environment.
        rate_limit: The key's limits; None: the defaults of `RateLimitConfig`.
        batch: How the Batch API is used; None: the defaults of `BatchConfig`.
        cache: A file, or its `CacheConfig`: answers are kept there before the call returns, and what was
            asked before, by an earlier run for instance, is answered from there. None: no cache. Streams and
            calls on `client.openai` are not kept.
        http_client: An HTTP client of your own, of either httpx family; None: one on aiohttp, which is
            faster, or the SDK's default client where a proxy is set in the environment.
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
        self._governor = Governor(limits, max_cost=self._config.max_cost)
        self._counter = TokenCounter()
        self._http = http_client or _clients.fast_client(self._config.base_url)
        sdk = _clients.AsyncOpenAI(http_client=self._http, **self._account(), max_retries=0)
        sdk.organization = self._config.organization_id  # None: the SDK would read the environment again
        self._governor.share(*account_of(sdk))
        pricer = self._governor.ledger.pricer_for(self._config.base_url)
        self._cache = self._opened(cache)
        self._call = Caller(self._config, sdk, self._governor, self._counter, pricer, cache=self._cache)
        self._jobs = Batches(
            self._config,
            self._batch,
            sdk=sdk,
            governor=self._governor,
            counter=self._counter,
            refusals=self._call.refusals,
            cache=self._cache,
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._config!r}, rate_limit={self._governor.config!r})"

    async def generate_response(  # the parameters of the specification
        self,
        prompt: Prompt,
        *,
        model: str | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        timeout: float | None = None,  # of one attempt: the specified name
        system: str | None = None,
        api: str = "chat",
        max_cost: float | Decimal | None = None,
        **chat_params: Any,
    ) -> ModelResponse:
        """Answer one prompt.

        Args:
            prompt: A text, or a list of chat messages.
            model: The model; None: the config's default.
            temperature: Sampling temperature; not sent when None.
            max_tokens: Output tokens at most; not sent when None.
            timeout: Seconds for one attempt, waiting for the rate limit not counted; None: the config's.
            system: A system prompt.
            api: "chat" for chat completions, "responses" for the Responses API.
            max_cost: USD that the call may cost, its retries included; see `batch_generate`.
            **chat_params: Any other parameter of that API; a pydantic class as `response_format` makes
                `ModelResponse.parsed` an instance of it. None values are not sent.

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
        parameters = self._parameters(model, temperature, max_tokens, timeout, system, api, chat_params)
        purse = self._purse_for(max_cost, parameters)
        check_prompt(prompt)
        return await self._call(prompt, parameters, purse=purse)

    async def batch_generate(  # the parameters of the specification
        self,
        prompts: Iterable[Prompt],
        *,
        model: str | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        timeout: float | None = None,  # of one attempt: the specified name
        system: str | None = None,
        api: str = "chat",
        max_concurrent: int | None = None,
        max_cost: float | Decimal | None = None,
        use_batch_api: bool = False,
        progress_callback: Callable[[float], Any] | None = None,
        progress: bool = False,
        return_exceptions: bool = False,
        **chat_params: Any,
    ) -> list[ModelResponse]:
        """Answer many prompts concurrently.

        Args:
            prompts: Texts, or lists of chat messages.
            model: The model; None: the config's default.
            temperature: Sampling temperature; not sent when None.
            max_tokens: Output tokens at most; not sent when None.
            timeout: Seconds for one attempt, waiting for the rate limit not counted; None: the config's.
            system: A system prompt for all of them.
            api: "chat" for chat completions, "responses" for the Responses API.
            max_concurrent: Requests in flight at once, for this call; None: the rate limit's.
            max_cost: USD that this call may cost; None: any amount. Every attempt reserves the most it can
                cost, and none is sent for which too little is left. Needs `max_tokens`.
            use_batch_api: Send `BatchConfig.auto_batch_threshold` prompts or more through the Batch API, at
                its price; fewer run online. What expires there or fails by chance is submitted once more.
            progress_callback: Called, or awaited, with the finished fraction after each prompt; what it
                raises is logged, once.
            progress: Show how far it is on standard error: a bar in a terminal or a notebook (extra
                `progress`), elsewhere a line every ten seconds.
            return_exceptions: Put a failed prompt's exception in its place instead of raising.
            **chat_params: Any other parameter of the API, as for `generate_response`.

        Returns:
            The responses, in the order of the prompts.

        Raises:
            ValidationError: The input is wrong; nothing was sent.
            PartialFailureError: Some prompts failed; it carries the responses of the others.
            APIError: An error that all prompts would meet (key, model, credit, a pause beyond `max_wait`, no
                server there at all); its `responses` are what was answered before.
            BudgetExceededError: The next request could cost more than what is left of `max_cost`; `responses`
                are what was answered before, all of it paid within the budget.
            BatchError: The Batch API ran none of the prompts.
            asyncio.CancelledError: The call was cancelled; its `responses` likewise. Batches go on: `job_id`
                names those not settled.
        """
        parameters = self._parameters(model, temperature, max_tokens, timeout, system, api, chat_params)
        purse = self._purse_for(max_cost, parameters)
        crew = _runner.crew(self._call, parameters, self._governor.config, max_concurrent, purse)
        if progress_callback is not None:
            check_callback(progress_callback, "progress_callback")
            progress_callback = Guarded(progress_callback)
        check_switch(progress, "progress")
        listed = list_prompts(prompts)
        online = not use_batch_api or len(listed) < self._batch.auto_batch_threshold
        if use_batch_api and online:
            least = self._batch.auto_batch_threshold
            text = "%d prompts, fewer than auto_batch_threshold=%d: sent online"
            inform(text, len(listed), least, event="batch_too_small", requests=len(listed))
        display = self._display(len(listed), parameters.model, crew if online else None) if progress else None
        with display or contextlib.nullcontext():
            if online:
                return await _runner.collect(
                    crew,
                    listed,
                    progress=progress_callback,
                    return_exceptions=return_exceptions,
                    display=display,
                )
            return await self._jobs.collect(
                listed,
                parameters,
                purse=purse,
                progress=both(progress_callback, None if display is None else display.reach),
                return_exceptions=return_exceptions,
            )

    @functools.cached_property
    def openai(self) -> AsyncOpenAI:
        """The SDK's client, paced by the same budget and on the same connections."""
        view = govern(self._http, self._governor, self._counter)
        config = self._config
        client = AsyncOpenAI(
            http_client=view, **self._account(), max_retries=config.max_retries, timeout=config.timeout
        )
        client.organization = config.organization_id
        return client

    @property
    def stats(self) -> ClientStats:
        """What the client did so far."""
        return self._governor.stats

    def report(self, path: str | os.PathLike[str], *, title: str | None = None) -> Path:
        """Write a page about what the client did so far: what held it up, what it cost, what failed.

        One HTML file, which loads nothing and runs nothing, without prompts, answers or keys. It may be
        written at any time, also in the middle of a run and after `close`.

        Args:
            path: The file; an older one is replaced, whole or not at all.
            title: Its heading; None: "Run report".

        Returns:
            The path.

        Raises:
            OSError: It cannot be written there.
        """
        from openai_eval_client._report import write_report  # nobody waits for pictures at the start

        return write_report(path, self._governor, self._config.base_url, title)

    async def close(self) -> None:
        """Close the connections and the cache; the client cannot be used after this."""
        self._governor.leave()
        try:
            await self._http.aclose()
        finally:
            if self._cache is not None:
                await self._cache.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _opened(self, cache: object) -> Cache | None:
        if cache is None:
            return None
        from openai_eval_client._cache import open_cache  # some Pythons are built without SQLite

        governor = self._governor
        return open_cache(cache, self._config.base_url, governor.recorder, governor.ledger)

    def _account(self) -> dict[str, Any]:
        config = self._config
        return {
            "api_key": config.api_key,
            "organization": config.organization_id,
            "base_url": config.base_url,
        }
