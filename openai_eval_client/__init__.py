"""Run thousands of prompts against the OpenAI API: paced within its limits, retried, priced, in order.

Public, beside the names below: `client` (`OpenAIClient`), `config` (what users set), `errors`, `models` (what
users get back), and `testing` (a simulated server).

Private rooms, from the top floor down; imports go down, and folders are entered by their `__init__`:
    _cli         the commands
    _batches     prompts answered by the Batch API
    _online      prompts answered online: one, or many by a pool of workers
    _sdk         `AsyncOpenAI`, and calls of the SDK; _report: pages, progress, tables
    _account     admits and settles every attempt; _cache: answers in a file
    _limits      when a request may go; _cost: what it costs; _stats: what happened
    _wire        requests and answers as JSON, and what an answer means
    _tokens      how many tokens a request has; _validation: refuses bad input
    _runtime     threads, event loops, files; _format: numbers as text; _log: the log
"""

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
