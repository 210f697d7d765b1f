"""Run thousands of prompts against the OpenAI API: paced within its limits, retried, priced, in order.

Public, beside the names below: `client` (`OpenAIClient`), `config` (what users set), `errors`, `models` (what
users get back), and `testing` (a simulated server).

Private rooms, floor by floor. Imports go down the floors; a folder is entered by its `__init__`.
    _cli                      the commands
    _batches                  prompts answered by the Batch API
    _online                   prompts answered online: one, or many by a pool of workers
    _sdk, _report             `AsyncOpenAI` and calls of the SDK; a run as page, progress and tables
    _account, _cache          admits and settles every attempt; answers kept in a file
    _limits, _cost, _stats    when a request may go; what it costs; what happened
    _tokens                   how many tokens a request has
    _wire                     requests and answers as JSON, and what an answer means
    _validation               refuses bad input
    _runtime, _log, _format   threads, event loops and files; the log; numbers as text
    _interrupts               what a signal does to a command outside its work
"""

# ruff: isort: off
from openai_eval_client import _interrupts

if _interrupts.is_command():  # the imports below take a second, in which Ctrl-C may come
    _interrupts.handle(_interrupts.end)
# ruff: isort: on

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
    ResponseTooLargeError,
    TimeoutError,
    TooManyFailuresError,
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
    "ResponseTooLargeError",
    "TimeoutError",
    "TokenUsage",
    "TooManyFailuresError",
    "ValidationError",
    "to_pandas",
]
