"""One prompt, from its place in the queue to its answer: admitted, sent, settled, retried, priced."""

from __future__ import annotations

import functools
import itertools
import os
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import openai

from openai_eval_client._sdk import UnsupportedParameters, call_sdk, retrying
from openai_eval_client._wire import (
    PATHS,
    Demand,
    forget_key,
    max_output,
    read_answer,
    read_body,
    usage_of,
)
from openai_eval_client.errors import sdk_httpx

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Awaitable, Callable, Sequence
    from decimal import Decimal

    from openai_eval_client._account import Account
    from openai_eval_client._cache import Cache
    from openai_eval_client._cost import CostBudget, Pricer
    from openai_eval_client._limits import ConcurrencyLimit
    from openai_eval_client._tokens import TokenCounter
    from openai_eval_client._wire import Parameters
    from openai_eval_client.config import OpenAIConfig
    from openai_eval_client.models import ModelResponse


@dataclass(slots=True)
class _Job:
    """One prompt on its way."""

    parameters: Parameters
    body: dict[str, Any]  # of the request, as first asked for
    sent: dict[str, Any]  # the body of the latest attempt: without what the model is known to refuse
    concurrency: ConcurrencyLimit | None  # None: the model's
    budget: CostBudget | None  # the call's own, besides the client's
    sending: contextlib.AbstractContextManager[None] | None  # entered while a request is in flight
    keep: Callable[[ModelResponse], Awaitable[None]] | None = None  # stores the answer, still in flight
    input_tokens: int = 0
    most_cost: Decimal | None = None  # USD that one attempt can cost; None: there is no budget
    turn: int = 0  # its place in the queue, kept through all attempts


class Caller:
    """Sends prompts one at a time, any number of them concurrently."""

    def __init__(
        self,
        config: OpenAIConfig,
        sdk: openai.AsyncOpenAI,
        account: Account,
        counter: TokenCounter,
        pricer: Pricer,
        *,
        cache: Cache | None = None,
    ) -> None:
        self._key = config.api_key
        self._sdk = sdk
        self._account = account
        self._counter = counter
        self._pricer = pricer
        self._cache = cache
        self._urls = {api: str(sdk.base_url).rstrip("/") + path for api, path in PATHS.items()}
        self._reply_class = sdk_httpx().Response  # what post() casts to: both headers and body
        self._name, self._count = uuid.uuid4(), itertools.count()
        self.unsupported = UnsupportedParameters()
        self._retrying = retrying(
            self._again,
            max_retries=config.max_retries,
            max_wait=account.config.max_wait,
            on_retry=account.recorder.retry,
            model_of=lambda job, _: str(job.body["model"]),
        )

    def __call__(
        self,
        prompt: str | Sequence[Any],
        parameters: Parameters,
        *,
        concurrency: ConcurrencyLimit | None = None,
        budget: CostBudget | None = None,
        sending: contextlib.AbstractContextManager[None] | None = None,
    ) -> Awaitable[ModelResponse]:
        """Answer one prompt."""
        if self._sdk.is_closed():
            raise RuntimeError("this client was closed")
        body = parameters.with_prompt(prompt)
        job = _Job(parameters, body, body, concurrency, budget, sending)
        if self._cache is None:
            return self._answer(job)
        return self._cache.answer(body, parameters, functools.partial(self._answer, job))

    async def _answer(
        self, job: _Job, keep: Callable[[ModelResponse], Awaitable[None]] | None = None
    ) -> ModelResponse:
        """Send one prompt, which the cache does not know, until it is answered or failed for good."""
        account, counter, body = self._account, self._counter, job.body
        try:
            job.input_tokens = await counter.count_input(body)
            path = PATHS[job.parameters.api]
            job.most_cost = await account.budgets.most(body, path, counter, job.budget)
            job.turn, job.keep = account.limiter.next_turn(), keep
            failures = []
            try:
                response: ModelResponse = await self._send(job)
            except openai.APIError as error:
                failures.append(error)
            if failures:
                response = await self._retrying(job, failures)
        except openai.OpenAIError as error:
            if isinstance(error, openai.APIError):
                forget_key(error, self._key)
            account.recorder.failed(body["model"], error)
            raise
        account.recorder.answered(response.finish_reason)
        return response

    async def _again(self, job: _Job, failures: list[openai.APIError]) -> ModelResponse:
        """Go on where the first attempt failed: only a request that needs it pays for backoff."""
        try:
            if failures:
                raise failures.pop()
            return await self._send(job)
        except openai.BadRequestError as error:
            if not self.unsupported.learn(error, job.sent):
                raise
        return await self._again(job, failures)

    async def _send(self, job: _Job) -> ModelResponse:
        """Send once."""
        body = job.sent = self.unsupported.adapted(job.body)
        demand = Demand(body["model"], job.input_tokens, max_output(body), most_cost=job.most_cost)
        async with self._account.attempt(
            demand, concurrency=job.concurrency, turn=job.turn, budget=job.budget, sending=job.sending
        ) as attempt:
            started = time.perf_counter()
            reply = await self._post(job.parameters, body)
            latency = time.perf_counter() - started
            answer = read_body(reply, job.parameters.api)
            counted = usage_of(answer)
            response = read_answer(
                answer,
                job.parameters,
                usage=counted,
                kept=reply.content,  # less memory than what is read from it
                temperature=body.get("temperature"),
                request_id=reply.headers.get("x-request-id"),
                latency=latency,
            )
            usage = counted or await self._counter.estimate_usage(
                response, job.input_tokens, service_tier=answer.get("service_tier")
            )
            attempt.answered(reply.status_code, reply.headers, usage)
            if not self._pricer.loaded:  # as it is but for the first time
                await self._pricer.ready()
            cost = attempt.price()
            response.usage.estimated_cost = None if cost is None else float(cost)
            if job.keep is not None:
                await job.keep(response)
        if not usage.estimated:
            self._counter.observe(body["model"], job.input_tokens, usage.prompt_tokens)
        return response

    def _post(self, parameters: Parameters, body: dict[str, Any]) -> Awaitable[Any]:
        """Post through the SDK, which authenticates, sends and turns bad statuses into its errors."""
        url = self._urls[parameters.api]
        options: Any = {
            "headers": parameters.headers,
            "params": parameters.query,
            "timeout": None,
            "max_retries": 0,
            # not sent, but without it the SDK would draw a UUID
            "idempotency_key": f"{self._name}-{os.getpid()}-{next(self._count)}",
        }
        call = self._sdk.post(url, body=body, cast_to=self._reply_class, options=options)
        return call_sdk(call, seconds=parameters.timeout, url=url)
