"""What the user gets back: answers, jobs, statistics, estimates and the bill."""

from __future__ import annotations

import functools
import json
import operator
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator
from pydantic_core import PydanticCustomError

from openai_eval_client._format import as_html, bounds_text, count, duration, plain, usd
from openai_eval_client.errors import BatchError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "BatchJob",
    "BatchJobStatus",
    "BatchRequest",
    "ClientStats",
    "CostEstimate",
    "CostLedger",
    "ModelCost",
    "ModelResponse",
    "TokenUsage",
]


class Record(BaseModel):
    """A model that programs pass on; its JSON reads back as it was, but for infinite numbers: null there."""

    model_config = ConfigDict(protected_namespaces=())

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that every JSON parser, data frame and database takes.

        `model_dump()` keeps Python's types, and `model_dump(mode="json")` makes a string of a `Decimal`. Here
        money is a float in USD, a time is an ISO 8601 string, and a number that JSON does not have (infinite
        or not a number) is None.
        """
        return {name: plain(value) for name, value in self.model_dump().items()}

    @classmethod
    def _of(cls, values: dict[str, Any], private: dict[str, Any] | None = None) -> Any:
        """Make one of values known to be right: all fields, all private attributes; a fifth of the time."""
        made = cls.__new__(cls)  # and its state, as unpickling does
        state = {"__dict__": values, "__pydantic_fields_set__": _field_names(cls)}
        made.__setstate__({**state, "__pydantic_extra__": None, "__pydantic_private__": private})
        return made


class _Shown(Record):
    """A record that a notebook shows as HTML."""

    def _repr_html_(self) -> str:
        return as_html(self)


@functools.cache
def _field_names(cls: type[Record]) -> set[str]:
    return set(cls.model_fields)  # one set for all instances


_NOTHING = Decimal(0)
_ARITHMETIC = operator.add, operator.sub, operator.mul, operator.truediv


class ModelCost(Record):
    """What one model cost by one channel and in one service tier.

    Attributes:
        model: The model as the server names it, else as the request did.
        channel: "online", or "batch" for the Batch API.
        service_tier: The tier that answered; "default" for batches, and where the server names none.
        calls: Answers that were billed.
        input_tokens: Their input, cached tokens included.
        cached_tokens: The part of the input that the provider had cached.
        output_tokens: Their output, reasoning included.
        reasoning_tokens: The part of the output spent on reasoning.
        unpriced: Calls whose price is not known.
        cost: USD of the other calls by the published price list; None where no call has a known price.
    """

    model: str
    channel: Literal["online", "batch"]
    service_tier: str
    calls: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    reasoning_tokens: int
    unpriced: int
    cost: Decimal | None


def _on_total(compute: Callable[[Any, Any], Any], *, swapped: bool = False) -> Any:
    """Return an operator on a ledger's total; the result is a Decimal only where one goes in."""

    def method(self: CostLedger, other: object) -> Any:
        own, value = _operands(self, other)
        result = compute(value, own) if swapped else compute(own, value)
        return float(result) if isinstance(other, CostLedger) and isinstance(result, Decimal) else result

    return method


def _operands(ledger: CostLedger, other: Any) -> tuple[Any, Any]:
    """Return two amounts that go together: Decimal and float do not."""
    if isinstance(other, CostLedger):
        return ledger.total, other.total
    return (ledger.total if isinstance(other, Decimal) else float(ledger.total)), other


class CostLedger(_Shown):  # noqa: PLW1641  # mutable, as every pydantic model
    """Everything that was billed so far, and what could not be priced.

    It is its total wherever a number is wanted: `float(cost)`, `f"{cost:.2f}"`, `cost < 5`,
    `cost - before`. Two ledgers are equal when all their fields are.

    Attributes:
        total: USD of all calls whose price is known, by the published price list.
        rows: The parts of `total`, one for each model, channel and service tier.
        unpriced: Calls whose price is not known, not in `total`.
        retried: Attempts that were billed without bringing an answer, in `rows` and `total`.
        unaccounted: Attempts that the provider may have billed without saying so, not in `total`: they timed
            out, were cut off or cancelled, or the answer came without usage, as most streams do by default.
        unaccounted_cost: USD for these if each used all the tokens reserved for it; without a maximum, that
            is the mean length of an answer.
        saved_by_cache: USD that the answers taken from the local cache would have cost.
    """

    total: Decimal = _NOTHING
    rows: list[ModelCost] = Field(default_factory=list)
    unpriced: int = 0
    retried: int = 0
    unaccounted: int = 0
    unaccounted_cost: Decimal = _NOTHING
    saved_by_cache: Decimal = _NOTHING

    @property
    def by_model(self) -> dict[str, Decimal | None]:
        """USD by model, all channels and tiers together; None where no call of it has a known price."""
        costs: dict[str, Decimal | None] = {}
        for row in self.rows:
            before = costs.get(row.model)
            costs[row.model] = before if row.cost is None else row.cost + (before or _NOTHING)
        return costs

    def __float__(self) -> float:
        return float(self.total)

    def __bool__(self) -> bool:
        return bool(self.total)

    def __str__(self) -> str:
        return f"{self.total.normalize():f}"

    def __format__(self, spec: str) -> str:
        return format(float(self), spec) if spec else str(self)

    def __round__(self, digits: int | None = None) -> Any:
        return round(float(self), digits)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, CostLedger):
            return self.__dict__ == other.__dict__
        own, value = _operands(self, other)
        return bool(own == value)

    __lt__, __le__, __gt__, __ge__ = map(_on_total, (operator.lt, operator.le, operator.gt, operator.ge))
    __add__, __sub__, __mul__, __truediv__ = map(_on_total, _ARITHMETIC)
    __radd__, __rsub__, __rmul__, __rtruediv__ = (_on_total(each, swapped=True) for each in _ARITHMETIC)


class CostEstimate(_Shown):
    """What prompts will need, between two bounds; `print` shows it in three lines.

    Every prompt counts as one request that is sent, none as answered from the local cache, and all input at
    the ordinary price of text. A run may cost less than `cost_low` where the provider had input cached, and
    more than `cost_high` where attempts without an answer were billed (see `CostLedger.retried`). Tokens are
    estimates for a model without a known vocabulary. What the provider adds to the input (a previous
    response, a search, the results of its own tools) is not counted.

    Attributes:
        model: The model that would be asked.
        requests: How many prompts there are.
        prompt_tokens: Input: sum of the tokens of each request.
        completion_tokens_low: Output at least: 0.
        completion_tokens_expected: requests x the mean length of the model's latest answers through this
            client; None before the first.
        completion_tokens_high: Output at most: requests x `max_tokens` (or the API's other names for it) x
            `n`; None where none is given.
        cost_low: USD online: sum of the price of each request's input, and of `completion_tokens_low`.
        cost_expected: The same with `completion_tokens_expected`.
        cost_high: The same with `completion_tokens_high`.
        batch_cost_low: USD by the Batch API, as `cost_low`; None where the provider has no such price.
        batch_cost_expected: USD by the Batch API, as `cost_expected`.
        batch_cost_high: USD by the Batch API, as `cost_high`.
        unpriced: Requests whose price online is not known: none or all of them.
        minutes: From the first request to the last at the configured limits: the larger of
            (requests - burst) / `requests_per_minute` and (reserved tokens - burst) / `tokens_per_minute`.
            The burst is what a full bucket admits at once. A request reserves its input and, for its output,
            `max_tokens` x `n`, else the mean length, else 256. Shorter answers return the rest, so it may
            take less; latency and `max_concurrent` may make it longer. None where no limit is configured.
    """

    model: str
    requests: int
    prompt_tokens: int
    completion_tokens_low: int = 0
    completion_tokens_expected: int | None = None
    completion_tokens_high: int | None = None
    cost_low: float | None = None
    cost_expected: float | None = None
    cost_high: float | None = None
    batch_cost_low: float | None = None
    batch_cost_expected: float | None = None
    batch_cost_high: float | None = None
    unpriced: int = 0
    minutes: float | None = None

    def __str__(self) -> str:
        output = bounds_text(
            self.completion_tokens_low, self.completion_tokens_expected, self.completion_tokens_high, count
        )
        online = bounds_text(self.cost_low, self.cost_expected, self.cost_high, usd)
        batch = bounds_text(self.batch_cost_low, self.batch_cost_expected, self.batch_cost_high, usd)
        time = "no limit is configured" if self.minutes is None else duration(60 * self.minutes)
        return (
            f"{self.requests:,} requests to {self.model}: {self.prompt_tokens:,} tokens in, {output} out\n"
            f"USD: {online} online, {batch} by batch\n"
            f"Time at the configured limits: {time}"
        )


class TokenUsage(Record):
    """Tokens of one answer, and their price.

    Attributes:
        prompt_tokens: Input tokens, cached ones included.
        completion_tokens: Output tokens, reasoning included.
        total_tokens: Input and output tokens.
        estimated_cost: USD by the published price list; None where the model's price is not known.
        cached_tokens: The part of the input that the provider had cached and bills lower.
        reasoning_tokens: The part of the output spent on reasoning.
        estimated: True where the server sent no usage, or counts that cannot be read: the rest is ours.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    estimated_cost: float | None = None
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    estimated: bool = False


class ModelResponse(_Shown):  # noqa: PLW1641  # mutable, as every pydantic model
    """One answer.

    Attributes:
        content: The text; "" where the model gave none (a tool call, a refusal).
        usage: Tokens and cost.
        model: The model that answered, as the server names it.
        request_id: The x-request-id header, else the id in the body.
        latency_ms: Milliseconds of the attempt that succeeded, without waiting and retries.
        temperature: The sampling temperature that was sent, else the API's default of 1.0.
        finish_reason: "stop", "length", "tool_calls", "content_filter", or what the server says.
        cached: True where it came from the local cache.
        choices: All texts, for n > 1.
        tool_calls: The calls the model asks for, as the API sends them; an old `function_call` too.
        refusal: The text with which the model refused; None where it did not.
        logprobs: Log probabilities of the first choice, where the request asked for them.
        reasoning: The model's reasoning, or the summary of it, where the server shows it.
        audio: The spoken answer as the API sends it, with its `transcript`; None where there is none.
        annotations: What the text refers to, such as the pages that a search found.
        fits_schema: Whether it fits the class given as `response_format`; False also where a JSON schema was
            given, which is not checked, and the text is no JSON. None where nothing can be said.
        unsent_parameters: What was asked for and not sent, because the model refuses it: "temperature".
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
    reasoning: str | None = None
    audio: dict[str, Any] | None = None
    annotations: list[dict[str, Any]] = Field(default_factory=list)
    fits_schema: bool | None = None
    unsent_parameters: tuple[str, ...] = ()  # a tuple: the garbage collector does not walk over an empty one

    _parsed: Any = PrivateAttr(default=None)
    _body: Any = PrivateAttr(default=None)
    _custom_id: str | None = PrivateAttr(default=None)

    @property
    def parsed(self) -> Any:
        """The object of the class given as `response_format`; None where the answer does not fit it."""
        return self._parsed

    @property
    def raw(self) -> Any:
        """All that the server sent, as the SDK's own object (ChatCompletion or Response); None after JSON."""
        body = self._decoded()
        if body is None:
            return None
        from openai import types  # heavy, and seldom asked for

        kind: Any = types.chat.ChatCompletion if "choices" in body else types.responses.Response
        return kind.construct(**body)

    @property
    def custom_id(self) -> str | None:
        """The caller's name of a batch request; None for all other requests, and after a JSON round trip."""
        return (self.__pydantic_private__ or {}).get("_custom_id")

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as `Record.to_dict` does, and `parsed` where there is one."""
        data = super().to_dict()
        if isinstance(self._parsed, BaseModel):
            data["parsed"] = plain(self._parsed.model_dump(mode="json"))
        return data

    def _decoded(self) -> Any:
        """Return the body of the answer: as it came, or from a line of a batch or of the cache."""
        if not isinstance(self._body, bytes):
            return self._body
        value = json.loads(self._body)
        return value if "choices" in value or "output" in value else value["response"]["body"]

    def __eq__(self, other: object) -> bool:  # mutable, as every pydantic model
        if not isinstance(other, ModelResponse):
            return NotImplemented
        return self.__dict__ == other.__dict__


class BatchRequest(Record):
    """One request of a Batch job; all further parameters go to the API as they are.

    Attributes:
        prompt: The text, or a list of chat messages.
        messages: The chat messages, instead of `prompt`.
        model: The model; None: the client's default.
        temperature: Sampling temperature; None: not sent.
        max_tokens: Output tokens at most; None: not sent.
        custom_id: The caller's name of this request.
    """

    model_config = ConfigDict(extra="allow")

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
            extra = ", ".join(sorted(self.model_extra or ())[:5])
            besides = f", besides {extra}" if extra else ""
            raise PydanticCustomError("no_input", f"give prompt or messages{besides}")
        if self.prompt is not None and self.messages is not None:
            raise PydanticCustomError("two_inputs", "give either prompt or messages, not both")
        return self


class BatchJob(Record):
    """A submitted Batch job; `job_id` alone finds it again. Some servers do not say when it was created."""

    job_id: str
    status: str
    created_at: datetime | None
    request_count: int


class BatchJobStatus(_Shown):
    """How far a Batch job is; counts are sums over its batches, and an error's `line` counts from 1."""

    job_id: str
    status: Literal[
        "validating", "in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled"
    ]
    created_at: datetime | None  # None where the server does not say
    completed_at: datetime | None = None
    request_count: int
    completed_count: int = 0
    failed_count: int = 0
    errors: list[BatchError] = Field(default_factory=list)

    @property
    def has_ended(self) -> bool:
        """Whether nothing will change any more: its results can be retrieved."""
        return self.status in {"completed", "failed", "expired", "cancelled"}


class ClientStats(_Shown):
    """What a client has done so far.

    Attributes:
        requests: Prompts answered or failed for good, and the calls made through the drop-in client so far.
        failures: Prompts and calls that failed for good. Of the drop-in client's calls only those that ended
            with a 4xx that the SDK does not retry: only the SDK knows when its retries end.
        attempts: HTTP requests sent, including those that run no model (files, batches), which are not
            counted in `requests` and `retries`.
        retries: Attempts after the first one of a prompt or call.
        rate_limited: Answers with status 429.
        reserved_tokens: Tokens reserved for all attempts: what a server counts that charges `max_tokens` up
            front.
        rate_limited_by: Answers with status 429 by the limit they named: "requests", "tokens" or "unknown".
        wait_seconds: Seconds that requests waited to be admitted, summed.
        wait_seconds_by: The same by cause: "requests", "tokens", "concurrency" or "pause".
        retry_seconds: Seconds waited between the attempts of one prompt, summed; without the drop-in client's
            calls, whose waits only the SDK knows.
        server_seconds: Seconds that attempts took, from their admission to their end, summed.
        utilisation: By model, the used share of what its limits on "requests" and "tokens" admitted since the
            first request, a full bucket included; above 1 where a limit was learnt only later.
        output_length: By model, "mean" and "spread" (standard deviation) of its latest answers, in tokens.
        prompt_tokens: Input tokens as the server counted them.
        completion_tokens: Output tokens as the server counted them.
        cost: USD of all priced answers, and its parts; usable as a number.
        unpriced: Answers whose model has no known price, not in `cost`.
        finish_reasons: How many answers ended for each reason, those from the cache included.
        schema_misses: Answers of which `ModelResponse.fits_schema` is False.
        unsent_parameters: By parameter, the answers to requests that went without it, because the model
            refuses it.
        budget: For `OpenAIConfig.max_cost`, in USD: the "limit", what is "spent" of it, and what is
            "reserved" for requests in flight; empty without one.
        cache_hits: Prompts answered from the cache; besides this, only `requests` and `cost` include them.
        cache_writes: Answers stored in the cache.
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
    finish_reasons: dict[str, int] = Field(default_factory=dict)
    schema_misses: int = 0
    unsent_parameters: dict[str, int] = Field(default_factory=dict)
    budget: dict[str, Decimal] = Field(default_factory=dict)
    cache_hits: int = 0
    cache_writes: int = 0
    latency_p50: float | None = None
    latency_p95: float | None = None
    latency_p99: float | None = None
