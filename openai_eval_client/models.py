"""What the user gets back: typed answers, token counts, costs, jobs and statistics."""

from __future__ import annotations

import functools
import json
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator
from pydantic_core import PydanticCustomError

from openai_eval_client import _notebook
from openai_eval_client._record import Record
from openai_eval_client.costs import CostLedger
from openai_eval_client.errors import BatchError

__all__ = ["BatchJob", "BatchJobStatus", "BatchRequest", "ClientStats", "ModelResponse", "TokenUsage"]


class _Model(Record):
    """A model whose JSON reads back as it was, infinite log probabilities included."""

    model_config = ConfigDict(ser_json_inf_nan="constants", protected_namespaces=())

    @classmethod
    def _of(cls, values: dict[str, Any], private: dict[str, Any] | None = None) -> Any:
        """Make one of values that are known to be right, in a fifth of the time, as unpickling does.

        Args:
            values: Of every field, or the model is not whole.
            private: Of every private attribute.
        """
        made = cls.__new__(cls)
        state = {"__dict__": values, "__pydantic_fields_set__": _names(cls)}
        made.__setstate__({**state, "__pydantic_extra__": None, "__pydantic_private__": private})
        return made


@functools.cache
def _names(cls: type[_Model]) -> set[str]:
    """Return the names of all fields: one set for all instances of which all fields are set."""
    return set(cls.model_fields)


class TokenUsage(_Model):
    """Tokens of one answer, and their price.

    Attributes:
        prompt_tokens: Input tokens, cached ones included.
        completion_tokens: Output tokens, reasoning included.
        total_tokens: Both.
        estimated_cost: USD by the published price list; None where the model's price is not known.
        cached_tokens: The part of the input that the provider had cached and bills lower.
        reasoning_tokens: The part of the output spent on reasoning.
        estimated: True where the server sent no usage and the counts are ours.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    estimated_cost: float | None = None
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    estimated: bool = False


class ModelResponse(_Model):  # noqa: PLW1641  # mutable, as every pydantic model
    """One answer.

    Attributes:
        content: The text, "" where the model gave none (a tool call, a refusal).
        usage: Tokens and cost.
        model: The model that answered, as the server names it.
        request_id: The x-request-id header, else the id in the body.
        latency_ms: Milliseconds of the attempt that succeeded, without waiting and retries.
        temperature: What was sent, else the API's default of 1.0.
        finish_reason: "stop", "length", "tool_calls", "content_filter", or what the server says.
        cached: True where it came from the local cache.
        choices: All texts, for n > 1.
        tool_calls: The calls the model asks for, as the API words them.
        refusal: The model's refusal, where it refused.
        logprobs: Log probabilities of the first choice, where they were asked for.
    """

    content: str
    usage: TokenUsage
    model: str
    request_id: str
    latency_ms: float
    temperature: float
    finish_reason: str
    cached: bool = False
    choices: list[str] = Field(default_factory=list)
    tool_calls: list[dict[str, Any]] = Field(default_factory=list)
    refusal: str | None = None
    logprobs: dict[str, Any] | None = None

    _parsed: Any = PrivateAttr(default=None)
    _body: Any = PrivateAttr(default=None)
    _custom_id: str | None = PrivateAttr(default=None)

    @property
    def parsed(self) -> Any:
        """The object of the class given as `response_format`; None where the answer does not fit it."""
        return self._parsed

    @property
    def raw(self) -> Any:
        """The SDK's own object (ChatCompletion or Response); None after a JSON round trip."""
        body = self._decoded()
        if body is None:
            return None
        from openai import types  # heavy, and seldom asked for

        kind: Any = types.chat.ChatCompletion if "choices" in body else types.responses.Response
        return kind.construct(**body)

    @property
    def custom_id(self) -> str | None:
        """What the caller named the request of a batch; None for all others, and after a JSON round trip."""
        return (self.__pydantic_private__ or {}).get("_custom_id")

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as `Record.to_dict` does, and `parsed` where there is one."""
        plain = super().to_dict()
        if isinstance(self._parsed, BaseModel):
            plain["parsed"] = self._parsed.model_dump(mode="json")
        return plain

    def _repr_html_(self) -> str:
        return _notebook.answer(self)

    def _decoded(self) -> Any:
        """Return the body of the answer, as it came or from the line of a batch or of the cache."""
        if not isinstance(self._body, bytes):
            return self._body
        value = json.loads(self._body)
        return value if "choices" in value or "output" in value else value["response"]["body"]

    def __eq__(self, other: object) -> bool:  # mutable, as every pydantic model
        if not isinstance(other, ModelResponse):
            return NotImplemented
        return self.__dict__ == other.__dict__


class BatchRequest(_Model):
    """One request of a Batch job; parameters beyond those named go to the API as they are.

    Attributes:
        prompt: The text, or a list of chat messages.
        messages: The chat messages, instead of `prompt`.
        model: The model; the client's default when None.
        temperature: Sampling temperature; not sent when None.
        max_tokens: Output tokens at most; not sent when None.
        custom_id: The caller's name of this request.
    """

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    prompt: str | list[dict[str, Any]] | None = None
    messages: list[dict[str, Any]] | None = None
    model: str | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    custom_id: str | None = None

    if TYPE_CHECKING:  # type checkers do not see that other parameters are allowed

        def __init__(
            self,
            *,
            prompt: str | list[dict[str, Any]] | None = None,
            messages: list[dict[str, Any]] | None = None,
            model: str | None = None,
            temperature: float | None = None,
            max_tokens: int | None = None,
            custom_id: str | None = None,
            **params: Any,
        ) -> None: ...

    @field_validator("prompt", mode="wrap")
    @classmethod
    def _text_or_messages(cls, value: Any, handler: Any) -> Any:
        try:
            return handler(value)
        except pydantic.ValidationError:
            raise PydanticCustomError("prompt", "must be a text, or a list of chat messages") from None

    @model_validator(mode="after")
    def _one_input(self) -> BatchRequest:
        if self.prompt is None and self.messages is None:
            known = set(type(self).model_fields)
            extra = ", ".join(sorted(set(self.model_extra or ()) - known)[:5])
            raise PydanticCustomError(
                "no_input", f"give prompt or messages{f', besides {extra}' if extra else ''}"
            )
        if self.prompt is not None and self.messages is not None:
            raise PydanticCustomError("two_inputs", "give either prompt or messages, not both")
        return self


class BatchJob(_Model):
    """A submitted Batch job; `job_id` alone finds it again."""

    job_id: str
    status: str
    created_at: datetime
    request_count: int


class BatchJobStatus(_Model):
    """How far a Batch job is. Counts are sums over its batches; the `line` of an error counts from 1."""

    job_id: str
    status: Literal[
        "validating", "in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled"
    ]
    created_at: datetime
    completed_at: datetime | None = None
    request_count: int
    completed_count: int = 0
    failed_count: int = 0
    errors: list[BatchError] = Field(default_factory=list)

    def _repr_html_(self) -> str:
        return _notebook.job(self)

    @property
    def has_ended(self) -> bool:
        """Whether nothing will change any more: its results can be retrieved."""
        return self.status in {"completed", "failed", "expired", "cancelled"}


class ClientStats(_Model):
    """What a client has done so far.

    Attributes:
        requests: Prompts answered or failed for good, and the calls made through the drop-in client so far.
        failures: Those that failed for good. Of the drop-in client's calls only those refused with a 4xx that
            the SDK does not retry: where its retries end, it alone knows.
        attempts: HTTP requests sent, by whatever road; also those that run no model (files, batches), and are
            not among `requests` and `retries`.
        retries: Attempts after a prompt's or a call's first.
        rate_limited: Answers with status 429.
        reserved_tokens: Tokens reserved for all attempts, which is what a server charges that counts
            `max_tokens` up front.
        rate_limited_by: Those by the limit they named, "requests", "tokens" or "unknown".
        wait_seconds: Seconds requests spent waiting for their admission, summed.
        wait_seconds_by: Those by what was waited for: "requests", "tokens", "concurrency" or "pause".
        retry_seconds: Seconds waited between the attempts of one prompt, summed; the SDK alone knows those of
            the drop-in client's calls.
        server_seconds: Seconds that attempts took, from their admission to their end, summed.
        utilisation: By model, the used share of what its limits on "requests" and "tokens" admitted since the
            first request, a full bucket included; above 1 where a limit was only learnt on the way.
        output_length: By model, "mean" and "spread" (standard deviation) of its latest answers, in tokens.
        prompt_tokens: Input tokens as the server counted them.
        completion_tokens: Output tokens likewise.
        cost: USD of all priced answers, by whatever road, and what makes it up; a number in itself.
        unpriced: Answers whose model has no known price, not in `cost`.
        budget: Of `OpenAIConfig.max_cost`, in USD: the "limit", what is "spent" of it, and what is "reserved"
            for what is in flight; empty without one.
        cache_hits: Prompts answered from the cache; of the rest, only `requests` and `cost` know of them.
        cache_writes: Answers kept in the cache.
        latency_p50: Median seconds of a successful attempt; None before the first.
        latency_p95: 95th percentile of the same.
        latency_p99: 99th percentile of the same.
    """

    requests: int = 0
    failures: int = 0
    attempts: int = 0
    retries: int = 0
    rate_limited: int = 0
    reserved_tokens: int = 0
    rate_limited_by: dict[str, int] = Field(default_factory=dict)
    wait_seconds: float = 0.0
    wait_seconds_by: dict[str, float] = Field(default_factory=dict)
    retry_seconds: float = 0.0
    server_seconds: float = 0.0
    utilisation: dict[str, dict[str, float]] = Field(default_factory=dict)
    output_length: dict[str, dict[str, float]] = Field(default_factory=dict)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: CostLedger = Field(default_factory=CostLedger)
    unpriced: int = 0
    budget: dict[str, Decimal] = Field(default_factory=dict)
    cache_hits: int = 0
    cache_writes: int = 0
    latency_p50: float | None = None
    latency_p95: float | None = None
    latency_p99: float | None = None

    def _repr_html_(self) -> str:
        return _notebook.stats(self)
