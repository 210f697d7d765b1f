"""What the user sets: where the API is, what its limits are, how jobs are batched, where answers are kept.

Configs are frozen. A wrong or unknown field raises `pydantic.ValidationError`, a ValueError that names field
and value but shows no secret.
"""

from __future__ import annotations

import contextlib
import os
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import SplitResult, urlsplit

import pydantic
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from typing_extensions import Self

__all__ = ["BatchConfig", "CacheConfig", "OpenAIConfig", "RateLimitConfig"]

LARGEST_RESPONSE = 64 * 1024 * 1024  # bytes of an answer, decoded
_HIDDEN = "[hidden]"
_SECRET = frozenset({"api_key", "redis_url"})
# Errors whose input may be anything, also the key in the wrong place.
_INPUT_HIDDEN = frozenset(
    {"extra_forbidden", "frozen_instance", "json_invalid", "model_attributes_type", "model_type", "userinfo"}
)
_NOT_IN_HEADERS = "holds white space or characters that no HTTP header may carry"

Count = Annotated[int, Field(strict=True, gt=0)]
Seconds = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]


class _Config(BaseModel):
    """A frozen model that rejects unknown fields, and whose errors name the field and its value."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, validate_default=True)

    @model_validator(mode="wrap")
    @classmethod
    def _name_field_and_value(cls, data: Any, handler: Any) -> Any:
        with _named_in_errors(cls.__name__):
            return handler(data)

    @classmethod
    def model_validate_json(cls, *args: Any, **options: Any) -> Self:
        """Read a config from JSON; an error does not show it.

        Args:
            *args: What pydantic's own takes, the JSON first.
            **options: Likewise.

        Returns:
            The config.
        """
        with _named_in_errors(cls.__name__):
            return super().model_validate_json(*args, **options)

    def __setattr__(self, name: str, value: object) -> None:
        with _named_in_errors(type(self).__name__):
            super().__setattr__(name, value)

    def __iter__(self) -> Generator[tuple[str, Any], None, None]:  # noqa: PYI058  # as its base has it
        return ((name, value) for name, value in super().__iter__() if name not in _SECRET)


@contextlib.contextmanager
def _named_in_errors(title: str) -> Iterator[None]:
    """Name field and value in each of pydantic's errors, but no value that may be a secret."""
    try:
        yield
    except pydantic.ValidationError as error:
        details = [_detail(problem) for problem in error.errors(include_url=False)]
        raise pydantic.ValidationError.from_exception_data(title, details, hide_input=True) from None


def _detail(problem: Any) -> InitErrorDetails:
    field, kind, given = ".".join(map(str, problem["loc"])), problem["type"], problem["input"]
    secret = field in _SECRET or kind in _INPUT_HIDDEN
    shown = without_password(given) if field == "redis_url" else given
    value = "" if secret and field != "redis_url" else f"={shown!r}"
    error = PydanticCustomError(kind, f"{field}{value}: {problem['msg'].removeprefix('Value error, ')}")
    return InitErrorDetails(type=error, loc=problem["loc"], input=_HIDDEN if secret else given)


class OpenAIConfig(_Config):
    """Where the API is and how one request behaves.

    Args:
        api_key: The secret key; OPENAI_API_KEY by default. In no repr, dump, log or error; a pickled config
            keeps it, since worker processes need it.
        organization_id: The organisation billed; OPENAI_ORG_ID by default, or none.
        base_url: The API's address up to and including /v1; OPENAI_BASE_URL by default, or that of OpenAI.
        default_model: The model asked when a call names none; "gpt-3.5-turbo" by default.
        timeout: Seconds that one attempt may take, waiting for the rate limit not counted; 30 by default.
        max_retries: Attempts after the first; 3 by default, 0 for none.
        max_cost: USD that the client may spend in all; None, the default: any amount. See `batch_generate`.
        background_timeout: Seconds that a response in the background (`background=True` with the Responses
            API) may take from when it is submitted, before it is cancelled; 3600 by default.
        flex_fallback: Seconds for which a request of `service_tier="flex"` that is refused for lack of
            capacity is sent again, before it is sent in the standard tier; None, the default: never.
        max_response_bytes: Bytes, decoded, that an answer may have that is not streamed, before it is
            `ResponseTooLargeError`; 64 MiB by default. A file that is downloaded may have any number, and a
            client given as `http_client` has bounds of its own.
    """

    api_key: Annotated[str, Field(strict=True)] = Field(
        default_factory=lambda: os.environ.get("OPENAI_API_KEY", ""), repr=False, exclude=True
    )
    organization_id: str | None = Field(default_factory=lambda: os.environ.get("OPENAI_ORG_ID"))
    base_url: str = Field(default_factory=lambda: os.getenv("OPENAI_BASE_URL") or "https://api.openai.com/v1")
    default_model: Annotated[str, Field(pattern=r"\S")] = "gpt-3.5-turbo"
    timeout: Seconds = 30.0
    max_retries: Annotated[int, Field(strict=True, ge=0)] = 3
    max_cost: NotNegative | None = None
    background_timeout: Seconds = 3600.0
    flex_fallback: NotNegative | None = None
    max_response_bytes: Count = LARGEST_RESPONSE

    @field_validator("api_key", mode="before")
    @classmethod
    def _usable_key(cls, key: object) -> object:
        if key is None or (isinstance(key, str) and not key.strip()):
            raise ValueError("missing: pass api_key=... or set OPENAI_API_KEY")
        if isinstance(key, str) and not _fits_header(key):
            raise ValueError(_NOT_IN_HEADERS)
        return key

    @field_validator("max_cost", mode="before")
    @classmethod
    def _as_float(cls, amount: object) -> object:
        return float(amount) if isinstance(amount, Decimal) else amount

    @field_validator("organization_id", mode="after")
    @classmethod
    def _usable_organization(cls, name: str | None) -> str | None:
        if name is not None and not _fits_header(name):
            raise ValueError(_NOT_IN_HEADERS)
        return name or None

    @field_validator("base_url", mode="after")
    @classmethod
    def _absolute_url(cls, url: str) -> str:
        if "@" in url.partition("//")[2].partition("/")[0]:
            raise PydanticCustomError("userinfo", "must not carry a user name or password")
        parts = _parts(url)
        if parts is None or parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError("must be an absolute URL that starts with http:// or https://")
        return url


def _fits_header(text: str) -> bool:
    return all("!" <= char <= "~" for char in text)


def _parts(url: str) -> SplitResult | None:
    """Return the parts of a URL; None where it is not one."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises where it is no port
    except ValueError:
        return None
    return None if any(map(str.isspace, url)) else parts


class RateLimitConfig(_Config):
    """The limits of one key, as shown on the provider's limits page; they hold per model.

    Each model has two token buckets, one of requests and one of tokens. Each holds `burst_seconds` worth of
    quota, starts full and refills continuously. So at most `quota x burst_seconds / 60` can be spent at once,
    and in any 60 seconds at most that plus one minute's quota. The burst exists because the server keeps such
    a bucket too, and a client that left it unused would be a minute slower for nothing. Where a server counts
    over shorter windows, set `burst_seconds` to their length.

    Args:
        requests_per_minute: RPM, 500 by default; None: learn it from the server.
        tokens_per_minute: TPM, input and output together, 90,000 by default; None: learn it from the server.
        max_concurrent: Requests in flight at once, per model; 10 by default.
        adaptive_throttling: Go slower where the server's headers and 429s say so; True by default.
        burst_seconds: Size of the buckets, in seconds of quota; 60 by default. A tenth of it, but at most the
            quota of 0.25 s, is left unused: requests travel at different speeds, and some arrive early.
        max_wait: The longest pause, in seconds, that the server may ask for; beyond it `RateLimitError`. 600
            by default.
        redis_url: A Redis or Valkey through which all processes and machines that name it share these limits:
            "redis://...", "rediss://..." (TLS) or "unix://..."; None, the default: this client has them to
            itself. Not in repr or dump, as it may hold a password. Needs the extra `redis`.
        namespace: The first part of the keys' names there, the same for all that share limits;
            "openai-eval-client" by default.
    """

    requests_per_minute: Count | None = 500
    tokens_per_minute: Count | None = 90_000
    max_concurrent: Count = 10
    adaptive_throttling: bool = True
    burst_seconds: Seconds = 60.0
    max_wait: Seconds = 600.0
    redis_url: Annotated[str, Field(strict=True)] | None = Field(default=None, repr=False, exclude=True)
    namespace: Annotated[str, Field(strict=True, pattern=r"^[^\s{}]+$")] = "openai-eval-client"

    @field_validator("redis_url", mode="after")
    @classmethod
    def _known_scheme(cls, url: str | None) -> str | None:
        parts = None if url is None else _parts(url)
        is_tcp = parts is not None and parts.scheme in {"redis", "rediss"} and parts.hostname
        is_socket = parts is not None and parts.scheme == "unix" and parts.path
        if url is not None and not is_tcp and not is_socket:
            raise ValueError("must be a URL that starts with redis://, rediss:// or unix://")
        return url


def without_password(url: object) -> object:
    """Return a URL as it may be shown: without user, password and query."""
    if not isinstance(url, str):
        return _HIDDEN
    scheme, marks, rest = url.partition("://") if "://" in url else ("", "", url)
    base, mark, query = rest.partition("?")
    before, at, place = base.rpartition("@")
    shown = f"***@{place}" if before or at else base
    hidden = "***" if "@" in query + scheme else f"{shown}{mark and '?***'}"
    return hidden if "@" in scheme else f"{scheme}{marks}{hidden}"


class BatchConfig(_Config):
    """How the Batch API is used.

    Args:
        auto_batch_threshold: With `use_batch_api=True`, fewer prompts than this run online; 100 by default.
        polling_interval: Seconds between two requests for the status of a running job; 60 by default.
        completion_window: The time that the provider may take, in hours or days; "24h" by default.
        max_batch_size: Requests in one input file at most; 50,000, the API's own limit, by default.
    """

    auto_batch_threshold: Count = 100
    polling_interval: Seconds = 60.0
    completion_window: Annotated[str, Field(pattern=r"^[1-9]\d*[hd]$")] = "24h"
    max_batch_size: Annotated[int, Field(strict=True, gt=0, le=50_000)] = 50_000


class CacheConfig(_Config):
    """Where answers are kept, and what may be done with them.

    Args:
        path: The file, an SQLite database; made, readable by its owner alone, where there is none.
        ttl: Seconds for which an answer may be used again; None, the default: for ever.
        read: Answer from the file; True by default. False: ask again, and keep the new answers in place of
            the old.
        write: Keep new answers; True by default. False: the file is only read, and must exist.
        store_incomplete: Keep also answers that were cut short, by their length or by a content filter; True
            by default.
    """

    path: str | Path
    ttl: Seconds | None = None
    read: bool = True
    write: bool = True
    store_incomplete: bool = True

    @field_validator("path", mode="after")
    @classmethod
    def _usable_path(cls, path: str | Path) -> str | Path:
        text = str(path)
        if not text.strip() or "\0" in text:
            raise ValueError("must be the path of a file")
        if text == ":memory:":
            raise ValueError("must be a file: what is in memory is gone with the process")
        return path
