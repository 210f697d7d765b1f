"""The errors this package raises.

Where the SDK has an error for what happened, that error or a subclass of it is raised, so an `except` clause
written for calls of the SDK goes on working::

    openai.OpenAIError
    ├── openai.APIError                          APIError
    │   ├── openai.APIConnectionError            connection refused, dropped, or cut short
    │   │   ├── ResponseTooLargeError            an answer of more bytes than max_response_bytes
    │   │   └── openai.APITimeoutError
    │   │       └── TimeoutError                 also builtins.TimeoutError
    │   └── openai.RateLimitError                RateLimitError
    │       └── QuotaError                       credit or spending limit used up: waiting does not help
    ├── ValidationError                          also ValueError: the input is wrong
    ├── RequestTooLargeError                     more tokens than the limit can admit
    ├── BudgetExceededError                      could have cost more than is left
    ├── BatchError                               a Batch job, or one line of it
    ├── PartialFailureError                      some prompts of several
    └── TooManyFailuresError                     more than max_failures allows

All of them, the SDK's own included, can be pickled; the API key is left out.
"""

from __future__ import annotations

import builtins
import copyreg
import math
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import openai
from openai import APIError, RateLimitError
from pydantic_core import core_schema

from openai_eval_client._format import valid_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from openai_eval_client.models import ModelResponse

__all__ = [
    "APIError",
    "BatchError",
    "BudgetExceededError",
    "PartialFailureError",
    "QuotaError",
    "RateLimitError",
    "RequestTooLargeError",
    "ResponseTooLargeError",
    "TimeoutError",
    "TooManyFailuresError",
    "ValidationError",
]


class TimeoutError(openai.APITimeoutError, builtins.TimeoutError):
    """One attempt took longer than its `timeout`, and so did every retry of it."""

    def __init__(self, message: str, *, request: Any) -> None:
        openai.APIConnectionError.__init__(self, message=message, request=request)


class ResponseTooLargeError(openai.APIConnectionError):
    """An answer has more bytes, decoded, than `max_response_bytes` allows; it is not asked for again.

    Args:
        limit: The limit, in bytes.
        request: The request that was answered.
    """

    def __init__(self, limit: int, *, request: Any) -> None:
        super().__init__(message=f"the answer is larger than max_response_bytes={limit}", request=request)
        self.limit = limit


class QuotaError(openai.RateLimitError):
    """The account's credit or spending limit is used up, or it is suspended: waiting does not help.

    Whatever the server's status and words for it (429 `insufficient_quota`, `billing_not_active`, 402, ...).

    Also raised where a batch would have too many tokens enqueued (`token_limit_exceeded`): until other
    batches have ended.
    """


class _OwnError(openai.OpenAIError):
    """An error that is not the SDK's; it pickles with its fields and notes, whatever `__init__` takes."""

    def __reduce__(self) -> tuple[Any, ...]:
        return copyreg.__newobj__, (type(self), *self.args), vars(self)  # type: ignore[attr-defined]  # not in its stub


class ValidationError(_OwnError, ValueError):
    """The input is wrong; nothing was sent.

    Args:
        message: What is wrong, naming the field and the value.
        field: The parameter at fault.
        index: The position of what is wrong in the list of prompts or requests, from 0; None outside of one.
    """

    def __init__(self, message: str, *, field: str | None = None, index: int | None = None) -> None:
        super().__init__(message)
        self.field = field
        self.index = index


class RequestTooLargeError(_OwnError):
    """The request needs more tokens than the limit can admit, ever or within `max_wait`.

    Args:
        model: The model asked.
        tokens: The tokens that the request needs.
        limit: The model's limit, in tokens per minute.
    """

    def __init__(self, model: str, *, tokens: int, limit: int) -> None:
        what = f"a request of {tokens:,} tokens is too large for the limit of {limit:,} per minute"
        super().__init__(f"{model}: {what}")
        self.model = model
        self.tokens = tokens
        self.limit = limit


class BudgetExceededError(_OwnError):
    """The next request could have cost more than what is left of the budget; it was not sent.

    Args:
        message: What the request could have cost, and what is left.
        responses: The answers before the budget was reached, in input order; None where there is none.
    """

    def __init__(self, message: str, *, responses: Sequence[ModelResponse | None] = ()) -> None:
        super().__init__(message)
        self.responses = list(responses)


class BatchError(_OwnError):
    """What went wrong with a Batch job, or with one line of it.

    Raised, and also found in `BatchJobStatus.errors`.

    Args:
        message: The reason, as the API words it.
        code: The API's code, for instance `token_limit_exceeded`.
        line: The request at fault, counted from 1 in the caller's list; None where it is none.
        param: The parameter at fault; None where it is none.
    """

    def __init__(
        self, message: str = "", *, code: str | None = None, line: int | None = None, param: str | None = None
    ) -> None:
        self.message = valid_text(message)
        super().__init__(self.message)
        self.code = code
        self.line = line
        self.param = param

    @property
    def index(self) -> int | None:
        """The request at fault, counted from 0; None where it is none."""
        return None if self.line is None else self.line - 1

    def to_dict(self) -> dict[str, Any]:
        """Return the four fields by name, as in JSON."""
        return {"code": self.code, "message": self.message, "line": self.line, "param": self.param}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BatchError) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(tuple(self.to_dict().values()))

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in self.to_dict().items() if value is not None)
        return f"BatchError({fields})"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> core_schema.CoreSchema:
        """Let pydantic read an instance or its dict, and write its dict."""
        text, number = core_schema.str_schema(), core_schema.int_schema()
        optional = {"code": text, "line": number, "param": text}
        fields = {
            name: core_schema.typed_dict_field(core_schema.nullable_schema(kind), required=False)
            for name, kind in optional.items()
        }
        fields["message"] = core_schema.typed_dict_field(text)
        from_dict = core_schema.no_info_after_validator_function(
            lambda values: cls(**values), core_schema.typed_dict_schema(fields)
        )
        return core_schema.union_schema(
            [core_schema.is_instance_schema(cls), from_dict],
            mode="left_to_right",
            serialization=core_schema.plain_serializer_function_ser_schema(cls.to_dict),
        )


class PartialFailureError(_OwnError):
    """Some prompts failed; the answers to the others are here, and paid for.

    Args:
        responses: The answers in input order; None for each prompt that failed.
        failures: The exception of each failed prompt, by its index.
    """

    def __init__(self, responses: Sequence[ModelResponse | None], failures: Mapping[int, Exception]) -> None:
        self.responses = list(responses)
        self.failures = dict(failures)
        kinds = Counter(type(error).__name__ for error in failures.values())
        listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        share, first = f"{len(failures)} of {len(self.responses)}", min(failures)
        super().__init__(f"{share} prompts failed ({listed}); first, prompt {first}: {failures[first]}")


class TooManyFailuresError(_OwnError):
    """More prompts failed than `max_failures` allows; the run ended early. Its cause is the latest failure.

    Args:
        failed: The prompts that failed.
        done: The prompts that were answered or failed.
        max_failures: What was allowed: a number of prompts, or a share of those done as a float.
        responses: The answers before that, in input order; None where there is none.
    """

    def __init__(
        self, failed: int, done: int, max_failures: float, *, responses: Sequence[ModelResponse | None] = ()
    ) -> None:
        super().__init__(f"{failed} of {done} prompts failed, more than max_failures={max_failures!r} allows")
        self.failed = failed
        self.done = done
        self.max_failures = max_failures
        self.responses = list(responses)


# --- the SDK's errors: made to pickle, without the request that holds the key ---------------------------

_KEPT_STATE = ("responses", "job_id", "limit", "__notes__")
_KEPT_HEADERS = ("content-type", "retry-after", "retry-after-ms", "x-request-id", "x-should-retry")


def sdk_httpx() -> Any:
    """Return the HTTP library of the installed SDK: httpx (openai 2) or httpx2 (openai 3)."""
    base = openai.DefaultAsyncHttpxClient.__mro__[1]
    return sys.modules[base.__module__.partition(".")[0]]


def rate_limited(message: str, seconds: float) -> RateLimitError:
    """Return a RateLimitError for a pause that is known without asking the server again."""
    request = sdk_httpx().Request("POST", "https://client.invalid/")
    headers = {"retry-after-ms": f"{math.ceil(seconds * 1000)}"}
    body = {"message": message, "code": "rate_limit_exceeded"}
    response = sdk_httpx().Response(429, headers=headers, request=request)
    return RateLimitError(message, response=response, body=body)


def _reduce_sdk_error(error: APIError) -> tuple[Any, ...]:
    response = getattr(error, "response", None)
    headers = [] if response is None else list(response.headers.items())
    kept = [(k, v) for k, v in headers if k in _KEPT_HEADERS or k.startswith("x-ratelimit-")]
    status = None if response is None else response.status_code
    request = (error.request.method, str(error.request.url).partition("?")[0])
    args = (type(error), error.message, error.body, status, kept, request)
    return _restore_sdk_error, args, {key: vars(error)[key] for key in _KEPT_STATE if key in vars(error)}


def _restore_sdk_error(  # noqa: PLR0917  # what pickle hands back
    cls: type[Any], message: str, body: object, status: int | None, headers: Any, request: tuple[str, str]
) -> Any:
    error: Any = cls.__new__(cls, message)
    rebuilt = sdk_httpx().Request(*request)
    APIError.__init__(error, message, rebuilt, body=body)
    if status is not None:
        response = sdk_httpx().Response(status, headers=headers, request=rebuilt)
        request_id = response.headers.get("x-request-id")
        error.__dict__.update(status_code=status, response=response, request_id=request_id)
    return error


def _and_subclasses(cls: type[APIError]) -> Iterator[type[APIError]]:
    yield cls
    for subclass in cls.__subclasses__():
        yield from _and_subclasses(subclass)


for _cls in _and_subclasses(APIError):
    copyreg.pickle(_cls, _reduce_sdk_error)
del _cls
