"""The SDK's client: paced, on its own transport; one call of it, its errors and its retries."""

from openai_eval_client._sdk.attempts import (
    AsyncOpenAI,
    UnsupportedParameters,
    account_of,
    call_sdk,
    deadline,
    paced,
    retry_for,
    retrying,
    without,
)
from openai_eval_client._sdk.redirects import guarded
from openai_eval_client._sdk.transport import SdkClient, fast_client

__all__ = [
    "AsyncOpenAI",
    "SdkClient",
    "UnsupportedParameters",
    "account_of",
    "call_sdk",
    "deadline",
    "fast_client",
    "guarded",
    "paced",
    "retry_for",
    "retrying",
    "without",
]
