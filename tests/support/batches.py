"""What the tests of batches share: clients, jobs made by hand, and answers spoilt on their way back."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections import deque
from typing import TYPE_CHECKING, Any

from hypothesis import HealthCheck, settings

from openai_eval_client import (
    BatchConfig,
    BatchJobStatus,
    BatchRequest,
    ModelResponse,
    OpenAIClient,
    OpenAIConfig,
    RateLimitConfig,
)
from openai_eval_client.errors import sdk_httpx

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
    from pathlib import Path

    from openai_eval_client.testing import SimulatedServer

KEY = "sk-secret-1234567890"
MODEL, OTHER_MODEL = "gpt-4o-mini", "gpt-4.1"
PRICES = {MODEL: (0.15, 0.6), OTHER_MODEL: (2.0, 8.0)}  # USD a million tokens, online
ENDED = ("completed", "failed", "expired", "cancelled")
SOON = 0.005  # seconds
CHAT = "/v1/chat/completions"
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def connect(
    server: SimulatedServer | str,
    *,
    http_client: Any = None,
    batch: dict[str, Any] | None = None,
    cache: Path | None = None,
    **options: Any,
) -> OpenAIClient:
    """Return a client of a server, which polls often and knows no rate limits."""
    url = server if isinstance(server, str) else server.base_url
    config = OpenAIConfig(**{"api_key": KEY, "base_url": url, "default_model": MODEL, **options})
    often = BatchConfig(**{"polling_interval": SOON, "auto_batch_threshold": 1, **(batch or {})})
    unlimited = RateLimitConfig(requests_per_minute=None, tokens_per_minute=None, max_concurrent=50)
    return OpenAIClient(config, batch=often, rate_limit=unlimited, cache=cache, http_client=http_client)


def asked(count: int, **params: Any) -> list[BatchRequest]:
    """Return requests that tell each other apart."""
    return [BatchRequest(prompt=f"p{n}", **params) for n in range(count)]


async def ended(client: OpenAIClient, job_id: str) -> BatchJobStatus:
    """Wait until a job has ended."""
    while (status := await client.get_batch_status(job_id)).status not in ENDED:
        await asyncio.sleep(SOON)
    return status


async def by_hand(client: OpenAIClient, lines: Iterable[dict[str, Any] | None], **options: Any) -> str:
    """Create a batch through the SDK's own endpoints, and return its id; None stands for an empty line."""
    content = "".join("\n" if line is None else f"{json.dumps(line)}\n" for line in lines)
    file = await client.openai.files.create(file=("mine.jsonl", content.encode()), purpose="batch")
    given = {"endpoint": CHAT, "completion_window": "24h", **options}
    return (await client.openai.batches.create(input_file_id=file.id, **given)).id


def line(custom_id: str, prompt: str, **params: Any) -> dict[str, Any]:
    """Return a line of an input file."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": prompt}], **params}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body}


async def cancelled(call: Coroutine[Any, Any, Any], when: Callable[[], Awaitable[Any]]) -> Any:
    """Run a call in a task, cancel it at some moment, and return what it raised, else what it returned.

    The error is taken where it is raised: a task hands out another one before Python 3.11.
    """

    async def outcome() -> Any:
        try:
            return await call
        except asyncio.CancelledError as error:
            return error

    task = asyncio.create_task(outcome())
    await when()
    task.cancel()
    try:
        return await task
    except asyncio.CancelledError as error:  # before its first step
        call.close()
        return error


def fingerprint(outcome: Any) -> Any:
    """Return what tells outcomes apart: an answer itself, an error's class, code, place and text."""
    if isinstance(outcome, ModelResponse):
        return outcome
    return type(outcome), outcome.code, getattr(outcome, "line", None), str(outcome)


def batch_price(response: ModelResponse) -> float:
    """Return what an answer costs by the Batch API: half the price."""
    usage, (given, made) = response.usage, PRICES[response.model]
    return (given * usage.prompt_tokens + made * usage.completion_tokens) / 2e6


def creations(server: SimulatedServer) -> list[Any]:
    """Return the calls that create batches."""
    return [call for call in server.calls if (call.method, call.path) == ("POST", "/v1/batches")]


def places(server: SimulatedServer) -> list[tuple[str, str]]:
    """Return the job and the lines of every batch on the server."""
    return [tuple((batch["metadata"] or {}).values())[-2:] for batch in server.batches]


class Spoiling:
    """An HTTP client whose answers arrive spoilt: what the server did, it has done.

    Args:
        method: Of the calls to spoil.
        path: The end of their path.
        spoils: One for each of these calls in their order; None leaves it alone. Each is given the answer,
            and returns another, or raises.
        effect: Whether the server gets these calls at all; else a spoil is given the request as if it were
            the answer.
    """

    def __init__(self, method: str, path: str, spoils: Sequence[Any], *, effect: bool = True) -> None:
        self._method, self._left, self._effect = method, deque(spoils), effect
        self.path = path
        module = sdk_httpx()
        inner = module.AsyncHTTPTransport()
        outer = self

        class Transport(module.AsyncBaseTransport):
            async def handle_async_request(self, request: Any) -> Any:
                return await outer._handle(inner, request)

            async def aclose(self) -> None:
                await inner.aclose()

        self.client = module.AsyncClient(transport=Transport())

    def spoil_next(self, spoil: Any) -> None:
        """Spoil the next of these calls."""
        self._left.append(spoil)

    async def _handle(self, inner: Any, request: Any) -> Any:
        hit = request.method == self._method and request.url.path.endswith(self.path) and self._left
        spoil = self._left.popleft() if hit else None
        if spoil is not None and not self._effect:
            await request.aread()
            spoilt = spoil(sdk_httpx().Response(200, content=request.content))
            return await spoilt if inspect.isawaitable(spoilt) else spoilt
        response = await inner.handle_async_request(request)
        if spoil is None:
            return response
        await response.aread()
        spoilt = spoil(response)
        return await spoilt if inspect.isawaitable(spoilt) else spoilt


def html(response: Any) -> Any:
    """Spoil an answer: a page of something in between, with status 200."""
    page = b"<html><body>Please wait</body></html>"
    return sdk_httpx().Response(200, headers={"content-type": "text/html"}, content=page)


def cut_json(response: Any) -> Any:
    """Spoil an answer: half of it, as if it were whole."""
    half = response.content[: len(response.content) // 2]
    return sdk_httpx().Response(200, headers={"content-type": "application/json"}, content=half)


def refusal(status: int, message: str, **error: Any) -> Callable[[Any], Any]:
    """Spoil an answer: a refusal of the API's; headers under "headers"."""
    headers = error.pop("headers", {})
    body = {"error": {"message": message, "type": "x", "param": None, "code": None, **error}}
    return lambda _: sdk_httpx().Response(status, headers=headers, json=body)


async def steps(many: int) -> None:
    """Let the event loop make so many steps."""
    for _ in range(many):
        await asyncio.sleep(0)
