"""Run thousands of prompts against the OpenAI API: paced within its limits, retried, priced, in order."""

from openai_eval_client._report import to_pandas
from openai_eval_client._sdk import AsyncOpenAI
from openai_eval_client.client import OpenAIClient
from openai_eval_client.config import BatchConfig, CacheConfig, OpenAIConfig, RateLimitConfig
from openai_eval_client.errors import (
    APIError,
    BatchError,
    BudgetExceededError,
    PartialFailureError,
    QuotaError,
    RateLimitError,
    RequestTooLargeError,
    TimeoutError,
    ValidationError,
)
from openai_eval_client.models import (
    BatchJob,
    BatchJobStatus,
    BatchRequest,
    ClientStats,
    CostEstimate,
    CostLedger,
    ModelCost,
    ModelResponse,
    TokenUsage,
)

__all__ = [
    "APIError",
    "AsyncOpenAI",
    "BatchConfig",
    "BatchError",
    "BatchJob",
    "BatchJobStatus",
    "BatchRequest",
    "BudgetExceededError",
    "CacheConfig",
    "ClientStats",
    "CostEstimate",
    "CostLedger",
    "ModelCost",
    "ModelResponse",
    "OpenAIClient",
    "OpenAIConfig",
    "PartialFailureError",
    "QuotaError",
    "RateLimitConfig",
    "RateLimitError",
    "RequestTooLargeError",
    "TimeoutError",
    "TokenUsage",
    "ValidationError",
    "to_pandas",
]
