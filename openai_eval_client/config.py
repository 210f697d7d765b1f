"""What the user sets: where the API is, what its limits are, how jobs are batched."""

from __future__ import annotations

import os
from typing import Annotated, Any
from urllib.parse import urlsplit

import pydantic
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

__all__ = ["BatchConfig", "OpenAIConfig", "RateLimitConfig"]

_HIDDEN = "[hidden]"

Count = Annotated[int, Field(strict=True, gt=0)]
Seconds = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]


class _Config(BaseModel):
    """A frozen model that refuses unknown fields and names field and value of what is wrong."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, validate_default=True)

    @model_validator(mode="wrap")
    @classmethod
    def _name_field_and_value(cls, data: Any, handler: Any) -> Any:
        try:
            return handler(data)
        except pydantic.ValidationError as error:
            details = [_detail(problem) for problem in error.errors(include_url=False)]
            raise pydantic.ValidationError.from_exception_data(
                cls.__name__, details, hide_input=True
            ) from None


def _detail(problem: Any) -> InitErrorDetails:
    """Return one pydantic error reworded to name its value, the key and unknown fields' values left out."""
    field = ".".join(str(part) for part in problem["loc"])
    secret = field == "api_key" or problem["type"] in {
        "extra_forbidden",
        "model_type",
        "model_attributes_type",
    }
    value = _HIDDEN if secret else problem["input"]
    message = problem["msg"].removeprefix("Value error, ")
    text = f"{field}: {message}" if secret else f"{field}={value!r}: {message}"
    return InitErrorDetails(
        type=PydanticCustomError(problem["type"], text),
        loc=problem["loc"],
        input=value,
    )


class OpenAIConfig(_Config):
    """Where the API is and how one request behaves.

    Args:
        api_key: The secret key; from OPENAI_API_KEY when not given. In no repr, dump, log or error; a pickled
            config keeps it, since worker processes need it.
        organization_id: The organisation billed; from OPENAI_ORG_ID when not given.
        base_url: The API's address up to and including /v1; from OPENAI_BASE_URL when not given.
        default_model: The model asked when a call names none.
        timeout: Seconds one attempt may take, waiting for the rate limit not counted.
        max_retries: Attempts after the first, 0 for none.
    """

    api_key: str = Field(
        default_factory=lambda: os.environ.get("OPENAI_API_KEY", ""), repr=False, exclude=True
    )
    organization_id: str | None = Field(default_factory=lambda: os.environ.get("OPENAI_ORG_ID"))
    base_url: str = Field(
        default_factory=lambda: os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
    )
    default_model: Annotated[str, Field(min_length=1)] = "gpt-3.5-turbo"
    timeout: Seconds = 30.0
    max_retries: Annotated[int, Field(strict=True, ge=0)] = 3

    @field_validator("api_key", mode="before")
    @classmethod
    def _usable_key(cls, key: object) -> object:
        if key is None or (isinstance(key, str) and not key.strip()):
            raise ValueError("missing: pass api_key=... or set OPENAI_API_KEY")
        if isinstance(key, str) and not all("!" <= char <= "~" for char in key):
            raise ValueError("holds white space or characters that no HTTP header may carry")
        return key

    @field_validator("base_url", mode="after")
    @classmethod
    def _absolute_url(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError("must be an absolute URL that starts with http:// or https://")
        if parts.username or parts.password:
            raise ValueError("must not carry a user name or password")
        return url


class RateLimitConfig(_Config):
    """The limits of one key, as shown on the provider's limits page; they hold per model.

    Two budgets are kept for each model, requests and tokens, each a token bucket of `burst_seconds` worth of
    quota that starts full and refills continuously. So at most `quota x burst_seconds / 60` can be spent at
    once, and in any 60 seconds at most that plus one minute's quota: the burst exists because the server
    keeps such a bucket too, and a client that left it unused would be a minute slower for nothing. Where a
    server counts over shorter windows, set `burst_seconds` to their length.

    Args:
        requests_per_minute: RPM; None: learn it from the server's headers, unlimited where there are none.
        tokens_per_minute: TPM, input and output together; None likewise.
        max_concurrent: Requests in flight at once, per model.
        adaptive_throttling: Let the server's rate-limit headers lower the limits above.
        burst_seconds: Size of the buckets, in seconds of quota.
        max_wait: The longest pause, in seconds, that the server may ask for; beyond it the call fails.
    """

    requests_per_minute: Count | None = 500
    tokens_per_minute: Count | None = 90_000
    max_concurrent: Count = 10
    adaptive_throttling: bool = True
    burst_seconds: Seconds = 60.0
    max_wait: Seconds = 600.0


class BatchConfig(_Config):
    """How the Batch API is used.

    Args:
        auto_batch_threshold: With `use_batch_api=True`, fewer prompts than this run online.
        polling_interval: Seconds between two looks at a running job.
        completion_window: What the provider may take, "24h" or "7d".
        max_batch_size: Requests in one input file at most; the API's own limit is 50,000.
    """

    auto_batch_threshold: Count = 100
    polling_interval: Seconds = 60.0
    completion_window: Annotated[str, Field(pattern=r"^[1-9]\d*[hd]$")] = "24h"
    max_batch_size: Annotated[int, Field(strict=True, gt=0, le=50_000)] = 50_000
