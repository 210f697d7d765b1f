"""A client on a server of the tests' own."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING

from openai_eval_client import OpenAIClient, OpenAIConfig, RateLimitConfig

if TYPE_CHECKING:
    from openai_eval_client import BatchConfig
    from openai_eval_client.testing import SimulatedServer

KEY = "sk-secret-1234567890"
WIDE = RateLimitConfig(requests_per_minute=None, tokens_per_minute=None, max_concurrent=50)


def connect(
    server: SimulatedServer,
    rate_limit: RateLimitConfig = WIDE,
    batch: BatchConfig | None = None,
    **options: object,
) -> OpenAIClient:
    settings = {"api_key": KEY, "base_url": server.base_url, "default_model": "gpt-4o-mini", **options}
    return OpenAIClient(OpenAIConfig(**settings), rate_limit=rate_limit, batch=batch)


@contextlib.contextmanager
def dead_address():
    """The base URL of a port that is taken and refuses connections."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}/v1"


def no_slot_is_taken(client: OpenAIClient) -> bool:
    return all(
        concurrency.in_flight == 0
        for queue in client._account.limiter._queues.values()
        for concurrency in queue._concurrency_limits
    )
