"""The public API as a type checker sees it: checked by `mypy --strict`, never run."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import openai
from openai import AsyncStream
from openai.types import CreateEmbeddingResponse
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ParsedChatCompletion
from openai.types.responses import Response
from pydantic import BaseModel
from typing_extensions import assert_type

from openai_eval_client import (
    APIError,
    AsyncOpenAI,
    BatchConfig,
    BatchError,
    BatchJob,
    BatchJobStatus,
    BatchRequest,
    BudgetExceededError,
    CacheConfig,
    ClientStats,
    CostEstimate,
    CostLedger,
    ModelCost,
    ModelResponse,
    OpenAIClient,
    OpenAIConfig,
    PartialFailureError,
    QuotaError,
    RateLimitConfig,
    RateLimitError,
    RequestTooLargeError,
    ResponseTooLargeError,
    TimeoutError,
    TokenUsage,
    ValidationError,
    to_pandas,
)
from openai_eval_client.testing import Call, SimulatedServer

if TYPE_CHECKING:
    import builtins
    from collections.abc import AsyncIterator, Iterator


class City(BaseModel):
    """What an answer is to fit."""

    name: str


def configs() -> None:
    """All fields are optional, all have their types."""
    config = OpenAIConfig()
    config = OpenAIConfig(
        api_key="sk",
        organization_id=None,
        base_url="https://host/v1",
        default_model="m",
        timeout=5,
        max_retries=0,
    )
    assert_type(config.api_key, str)
    assert_type(config.organization_id, str | None)
    assert_type(config.base_url, str)
    assert_type(config.default_model, str)
    assert_type(config.timeout, float)
    assert_type(config.max_retries, int)
    limits = RateLimitConfig(
        requests_per_minute=None, tokens_per_minute=None, max_concurrent=5, burst_seconds=5
    )
    assert_type(limits.requests_per_minute, int | None)
    assert_type(limits.tokens_per_minute, int | None)
    assert_type(limits.max_concurrent, int)
    assert_type(limits.adaptive_throttling, bool)
    assert_type(limits.burst_seconds, float)
    assert_type(limits.max_wait, float)
    cache = CacheConfig(path="runs.sqlite", ttl=3600, read=True, write=False, store_incomplete=False)
    assert_type(cache.path, str | Path)
    assert_type(cache.ttl, float | None)
    assert_type(cache.read, bool)
    assert_type(cache.write, bool)
    assert_type(cache.store_incomplete, bool)
    batch = BatchConfig(completion_window="7d")
    assert_type(batch.auto_batch_threshold, int)
    assert_type(batch.polling_interval, float)
    assert_type(batch.completion_window, str)
    assert_type(batch.max_batch_size, int)


def wrong_configs() -> None:
    """What is refused when run is refused when checked."""
    OpenAIConfig(timeout="5")  # type: ignore[arg-type]
    OpenAIConfig(apikey="sk")  # type: ignore[call-arg]
    RateLimitConfig(max_concurrent=None)  # type: ignore[arg-type]
    OpenAIClient("sk")  # type: ignore[arg-type]
    OpenAIClient(None, {})  # type: ignore[call-arg, arg-type]


async def responses(client: OpenAIClient) -> None:
    """One prompt and many."""
    response = await client.generate_response(
        "hello", model="m", temperature=0, max_tokens=5, timeout=5, system="s", api="responses", seed=7
    )
    assert_type(response, ModelResponse)
    assert_type(await client.generate_response([{"role": "user", "content": "hello"}]), ModelResponse)
    assert_type(response.content, str)
    assert_type(response.usage, TokenUsage)
    assert_type(response.usage.prompt_tokens, int)
    assert_type(response.usage.estimated_cost, float | None)
    assert_type(response.model, str)
    assert_type(response.request_id, str)
    assert_type(response.latency_ms, float)
    assert_type(response.temperature, float)
    assert_type(response.finish_reason, str)
    assert_type(response.cached, bool)
    assert_type(response.choices, list[str])
    assert_type(response.tool_calls, list[dict[str, Any]])
    assert_type(response.refusal, str | None)
    assert_type(response.logprobs, dict[str, Any] | None)
    assert_type((await client.generate_response("hello", response_format=City)).parsed, Any)


async def many(client: OpenAIClient, prompts: Iterator[str]) -> None:
    """Any iterable of prompts, and a callback of either kind."""

    async def shown(fraction: float) -> None:
        """Show it."""

    answers = await client.batch_generate(
        prompts, model="m", temperature=0.5, max_concurrent=20, use_batch_api=False, progress_callback=shown
    )
    assert_type(answers, list[ModelResponse])
    await client.batch_generate(["hello"], progress_callback=print, return_exceptions=True)
    await client.batch_generate(5)  # type: ignore[arg-type]
    await client.batch_generate(["hello"], None)  # type: ignore[call-arg]


async def any_number(client: OpenAIClient, prompts: AsyncIterator[str]) -> None:
    """Prompts of either kind of iterable: each outcome as it comes; and what they would need."""
    stream = client.as_completed(prompts, model="m", temperature=0, max_tokens=5, max_concurrent=20, seed=7)
    async for index, outcome in stream:
        assert_type(index, int)
        assert_type(outcome, ModelResponse | Exception)
    await stream.aclose()
    client.as_completed(["hello", [{"role": "user", "content": "hello"}]])
    client.as_completed(5)  # type: ignore[arg-type]
    estimate = await client.estimate(prompts, model="m", max_tokens=5, n=2, progress_callback=print)
    assert_type(estimate, CostEstimate)
    assert_type(estimate.requests, int)
    assert_type(estimate.completion_tokens_high, int | None)
    assert_type(estimate.cost_low, float | None)
    assert_type(estimate.batch_cost_high, float | None)
    assert_type(estimate.minutes, float | None)
    await client.estimate(["hello"], timeout="5", system=5)  # type: ignore[arg-type]


async def life() -> None:
    """The client is its own context manager."""
    async with OpenAIClient(OpenAIConfig(), rate_limit=RateLimitConfig(), batch=BatchConfig()) as client:
        assert_type(client, OpenAIClient)
        assert_type(client.openai, AsyncOpenAI)
        assert_type(client.stats, ClientStats)
        assert_type(client.stats.cost, CostLedger)
        assert_type(float(client.stats.cost), float)
        assert_type(f"{client.stats.cost:.4f}", str)
        assert_type(client.stats.cost.total, Decimal)
        assert_type(client.stats.cost.rows, list[ModelCost])
        assert_type(client.stats.cost.by_model, dict[str, Decimal | None])
        assert_type(client.stats.cost.saved_by_cache, Decimal)
        print(client.stats.cost < 5, client.stats.cost - client.stats.cost, 2 * client.stats.cost)
        assert_type(client.stats.latency_p50, float | None)
    OpenAIClient(cache="runs.sqlite")
    OpenAIClient(cache=Path("runs.sqlite"))
    OpenAIClient(cache=CacheConfig(path="runs.sqlite"))
    OpenAIClient(cache=b"runs.sqlite")  # type: ignore[arg-type]
    await OpenAIClient().close()


async def drop_in() -> None:
    """The drop-in client returns the SDK's own types, overloads and all."""
    client = AsyncOpenAI(rate_limit=RateLimitConfig(), api_key="sk", timeout=5, max_retries=1)
    raw: openai.AsyncOpenAI = client
    assert_type(client.stats, ClientStats)
    messages: list[Any] = [{"role": "user", "content": "hello"}]
    assert_type(await client.chat.completions.create(model="m", messages=messages), ChatCompletion)
    stream = await client.chat.completions.create(model="m", messages=messages, stream=True)
    assert_type(stream, AsyncStream[ChatCompletionChunk])
    async for chunk in stream:
        assert_type(chunk, ChatCompletionChunk)
    parsed = await client.chat.completions.parse(model="m", messages=messages, response_format=City)
    assert_type(parsed, ParsedChatCompletion[City])
    assert_type(await client.responses.create(model="m", input="hello"), Response)
    assert_type(await client.embeddings.create(model="m", input="hello"), CreateEmbeddingResponse)
    reply = await client.chat.completions.with_raw_response.create(model="m", messages=messages)
    assert_type(reply.parse(), ChatCompletion)
    assert_type(client.with_options(timeout=5), AsyncOpenAI)
    assert_type(client.copy(), AsyncOpenAI)
    async with AsyncOpenAI() as entered:
        assert_type(entered, AsyncOpenAI)
    await raw.close()


def jobs(status: BatchJobStatus, job: BatchJob) -> None:
    """The Batch API's models."""
    assert_type(job.job_id, str)
    assert_type(job.status, str)
    assert_type(job.created_at, datetime | None)
    assert_type(job.request_count, int)
    assert_type(
        status.status,
        Literal[
            "validating",
            "in_progress",
            "finalizing",
            "completed",
            "failed",
            "expired",
            "cancelling",
            "cancelled",
        ],
    )
    assert_type(status.completed_at, datetime | None)
    assert_type(status.errors, list[BatchError])
    assert_type(status.has_ended, bool)
    request = BatchRequest(prompt="hello", temperature=0.5)
    assert_type(request.prompt, str | list[dict[str, Any]] | None)


async def batches(client: OpenAIClient, requests: Iterator[BatchRequest]) -> None:
    """A job, from its requests to its results."""
    job = await client.submit_batch_job(
        requests, completion_window="24h", metadata={"run": "7"}, api="responses"
    )
    assert_type(job, BatchJob)
    await client.submit_batch_job([BatchRequest(messages=[{"role": "user", "content": "hello"}], seed=7)])
    assert_type(await client.get_batch_status(job.job_id), BatchJobStatus)
    assert_type(await client.cancel_batch_job(job.job_id), BatchJobStatus)
    assert_type(await client.retrieve_batch_results(job.job_id), list[ModelResponse])
    await client.retrieve_batch_results(job.job_id, return_exceptions=True)
    async for each in client.list_batch_jobs():
        assert_type(each, BatchJobStatus)


async def wrong_batches(client: OpenAIClient) -> None:
    """What is refused when run is refused when checked."""
    await client.submit_batch_job(["hello"])  # type: ignore[list-item]
    await client.submit_batch_job([BatchRequest(prompt="hello")], "24h")  # type: ignore[call-arg]
    await client.submit_batch_job([BatchRequest(prompt="hello")], metadata={"run": 7})  # type: ignore[dict-item]
    BatchRequest(prompt=7)  # type: ignore[arg-type]
    await client.get_batch_status(7)  # type: ignore[arg-type]


def caught(error: Exception) -> None:
    """Each error is what it is said to be, and carries what it is said to carry."""
    sdk: type[openai.APIError] = APIError
    limited: type[openai.RateLimitError] = RateLimitError
    quota: type[openai.RateLimitError] = QuotaError
    slow: type[openai.APITimeoutError] = TimeoutError
    late: type[builtins.TimeoutError] = TimeoutError
    wrong: type[ValueError] = ValidationError
    ours: list[type[openai.OpenAIError]] = [
        sdk, limited, quota, slow, ValidationError, BatchError, PartialFailureError, BudgetExceededError,
        RequestTooLargeError,
    ]  # fmt: skip
    assert issubclass(late, wrong) or ours
    if isinstance(error, PartialFailureError):
        assert_type(error.responses, list[ModelResponse | None])
        assert_type(error.failures, dict[int, Exception])
    elif isinstance(error, BudgetExceededError):
        assert_type(error.responses, list[ModelResponse | None])
    elif isinstance(error, ValidationError):
        assert_type(error.field, str | None)
        assert_type(error.index, int | None)
    elif isinstance(error, RequestTooLargeError):
        assert_type(error.tokens, int)
        assert_type(error.limit, int)
    elif isinstance(error, ResponseTooLargeError):
        assert_type(error.limit, int)
    elif isinstance(error, BatchError):
        assert_type(error.message, str)
        assert_type(error.code, str | None)
        assert_type(error.line, int | None)
        assert_type(error.param, str | None)


def shown(client: OpenAIClient, response: ModelResponse) -> None:
    """Pages and plain data."""
    assert_type(client.report("run.html", title="Nightly"), Path)
    assert_type(client.stats.to_dict(), dict[str, Any])
    assert_type(response.to_dict(), dict[str, Any])
    to_pandas([response, ValueError(), None], parsed=True)
    to_pandas([(0, response)])


def server() -> None:
    """The simulated server."""
    with SimulatedServer(rpm=500, tpm=90_000, latency=0.5, faults={"500": 0.01}, seed=1) as running:
        assert_type(running.base_url, str)
        assert_type(running.calls, list[Call])
