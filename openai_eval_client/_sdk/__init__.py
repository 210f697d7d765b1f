"""The SDK's client: paced, on its own transport, one call typed and retried."""

from openai_eval_client._sdk.calls import Refusals, deadline, patient, retrying, typed, without
from openai_eval_client._sdk.paced import AsyncOpenAI, account_of, govern
from openai_eval_client._sdk.transport import SdkClient, fast_client

__all__ = [
    "AsyncOpenAI",
    "Refusals",
    "SdkClient",
    "account_of",
    "deadline",
    "fast_client",
    "govern",
    "patient",
    "retrying",
    "typed",
    "without",
]
