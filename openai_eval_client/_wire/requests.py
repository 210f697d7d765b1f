"""Requests: the endpoints of the API, one row each; a body from a prompt, checked before it is sent."""

from __future__ import annotations

import difflib
import functools
import inspect
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import openai
from pydantic import BaseModel

from openai_eval_client._validation import (
    check_count,
    check_headers,
    check_json,
    check_mapping,
    check_number,
    check_switch,
    check_text,
    reject_input,
)
from openai_eval_client._wire.chat_form import input_items, responses_body, responses_format
from openai_eval_client._wire.usage import MOST_TOKENS, token_count

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from decimal import Decimal


class Endpoint(NamedTuple):
    """What is known of a POST to one endpoint."""

    end: str  # of its path
    inputs: tuple[str, ...] = ()  # what in the body is input
    output_caps: tuple[str, ...] | None = None  # what bounds the output; (): there is none; None: not known
    api: str | None = None  # its name for our own methods
    batchable: bool = False  # our batch jobs take it
    metered: bool = True  # runs a model, and so counts against RPM and TPM
    billed: bool = True  # may cost money

    @property
    def free(self) -> bool:
        """Whether it runs a model for nothing."""
        return self.metered and not self.billed


def _other(*ends: str, billed: bool = False) -> list[Endpoint]:
    """Return endpoints that run no model themselves; the billed ones make the provider work all the same."""
    return [Endpoint(f"/{end}", metered=False, billed=billed) for end in ends]


# https://platform.openai.com/docs/api-reference; a path that is not here runs a model, and may cost money.
_CHAT_CAPS = ("max_completion_tokens", "max_tokens")
ENDPOINTS = (
    Endpoint("/chat/completions", ("messages",), _CHAT_CAPS, "chat", batchable=True),
    Endpoint("/responses", ("input", "instructions"), ("max_output_tokens",), "responses", batchable=True),
    Endpoint("/completions", ("prompt",), ("max_tokens",)),
    Endpoint("/embeddings", ("input",), ()),
    Endpoint("/moderations", ("input",), (), billed=False),
    *_other("batches", "containers", "jobs", "runs", "search", "sessions", billed=True),
    *_other("submit_tool_outputs", "vector_stores", billed=True),
    *_other("admin_api_keys", "assistants", "cancel", "complete", "content", "conversations", "evals"),
    *_other("files", "input_tokens", "items", "messages", "parts", "threads", "uploads"),
)
_UNKNOWN = Endpoint("")
_NOT_POSTED = Endpoint("", metered=False, billed=False)
_CAPS = tuple(dict.fromkeys(cap for row in ENDPOINTS for cap in row.output_caps or ()))  # of any endpoint
PATHS = {row.api: row.end for row in ENDPOINTS if row.api is not None}
BATCH_PATHS = {row.api: f"/v1{row.end}" for row in ENDPOINTS if row.api is not None and row.batchable}
INPUT_KEYS = tuple(dict.fromkeys(key for row in ENDPOINTS for key in row.inputs))


@functools.lru_cache(maxsize=256)
def endpoint_of(path: str, method: str = "POST") -> Endpoint:
    """Return the row of a path, whatever stands before its end."""
    if method != "POST":
        return _NOT_POSTED
    return next((row for row in ENDPOINTS if path.endswith(row.end)), _UNKNOWN)


@functools.lru_cache(maxsize=256)
def route_of(method: str, path: str) -> str:
    """Return the name of an endpoint: its method and path, with stars in the place of ids."""
    return f"{method} {'/'.join(part if _IS_WORD(part) else '*' for part in path.split('/'))}"


_IS_WORD = re.compile("[a-z_]*|v[0-9]").fullmatch


class Demand(NamedTuple):
    """What one request asks of the limits."""

    model: str | None  # None: it runs no model, and only the concurrency limit applies
    input_tokens: int = 0
    max_output: int | None = None  # output tokens at most; None: what this model's answers usually take
    retry: bool | None = None  # whether it repeats a failed attempt; None: our own call, counted elsewhere
    free: bool = False  # whether its endpoint costs nothing
    most_cost: Decimal | None = None  # USD that it can cost at most; None: there is no budget
    route: str = ""  # of a request that runs no model: those to other endpoints do not wait for it


def max_output(body: Mapping[str, Any], path: str = "") -> int | None:
    """Return the output tokens a request may use at most, all choices together; None: no bound."""
    names = endpoint_of(path).output_caps
    if names == ():
        return 0
    caps = [cap for name in names or _CAPS if (cap := token_count(body.get(name))) is not None]
    choices = token_count(body.get("n")) or 1
    return min(caps[0] * choices, MOST_TOKENS) if caps else None


# --- a body from a prompt and its parameters ---------------------------------------------------------------

_KEYWORDS = {  # of our own methods
    "api", "max_concurrent", "max_cost", "max_failures", "max_tokens", "model", "progress",
    "progress_callback", "return_exceptions", "stop_event", "system", "temperature", "timeout",
    "use_batch_api",
}  # fmt: skip
_OURS = {"self", "messages", "input", "model", "stream_options", "timeout"}


@dataclass(frozen=True, slots=True)
class Parameters:
    """What all prompts of one call share, checked."""

    api: str  # "chat" or "responses"
    model: str  # the model asked
    timeout: float  # seconds for one attempt
    body: dict[str, Any]  # the body, all but the prompt
    system: str | None = None  # the system prompt, where there is one
    schema: type[BaseModel] | None = None  # the pydantic class the answer is to fit
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)  # extra HTTP headers: keys, maybe
    query: Mapping[str, object] = field(default_factory=dict, repr=False)  # extra query parameters

    def with_prompt(self, prompt: str | Sequence[Any]) -> dict[str, Any]:
        """Return the whole body for one prompt, which must have passed `check_prompt`."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _plain(prompt)
        if self.api == "responses":
            return {**self.body, "input": prompt if isinstance(prompt, str) else input_items(messages)}
        if self.system is not None:
            messages = [{"role": "system", "content": self.system}, *messages]
        return {**self.body, "messages": messages}


def check_parameters(
    *,
    model: str,
    timeout: float,
    temperature: float | None,
    max_tokens: int | None,
    system: str | None,
    api: str,
    params: Mapping[str, Any],
) -> Parameters:
    """Check the parameters of a call."""
    if not isinstance(api, str) or api not in PATHS:
        reject_input("api", api, "must be 'chat' or 'responses'")
    check_text(model, "model")
    check_number(timeout, "timeout", above=0)
    if temperature is not None:
        check_number(temperature, "temperature", least=0)
    if max_tokens is not None:
        check_count(max_tokens, "max_tokens")
    if system is not None:
        check_text(system, "system")
    fields = {name: value for name, value in params.items() if value is not None}
    _check_names(fields, api)
    extra: dict[str, Any] = {name: fields.pop(f"extra_{name}", {}) for name in ("body", "headers", "query")}
    check_mapping(extra["body"], "extra_body")
    check_headers(extra["headers"], "extra_headers")
    check_mapping(extra["query"], "extra_query")
    schema = _take_schema(fields, api)
    ours = {
        "model": model,
        "temperature": temperature,
        "max_tokens" if api == "chat" else "max_output_tokens": max_tokens,
        "instructions": system if api == "responses" else None,
    }
    body = {**{name: value for name, value in ours.items() if value is not None}, **fields, **extra["body"]}
    if body.get("stream") is not None:
        reject_input("stream", body["stream"], "not here; stream with client.openai.chat.completions.create")
    check_text(body["model"], "model")
    if body.get("temperature") is not None:
        check_number(body["temperature"], "temperature", least=0)
    if "background" in body:
        check_switch(body["background"], "background")
    check_json(body)
    if api == "responses":
        body = responses_body(body)
    headers, query = extra["headers"], extra["query"]
    return Parameters(api, body["model"], float(timeout), body, system, schema, headers, query)


def check_prompt(prompt: object, index: int | None = None, *, api: str = "chat") -> None:
    """Reject a prompt that the API would not take."""
    name = "prompt" if index is None else f"prompts[{index}]"
    if isinstance(prompt, str):
        check_text(prompt, name, field="prompt", index=index)
    elif isinstance(prompt, list | tuple):
        _check_messages(prompt, name, index, api)
    else:
        why = f"must be a str or a list of messages, not {type(prompt).__name__}"
        reject_input(name, prompt, why, field="prompt", index=index)


def list_prompts(prompts: Iterable[Any], api: str) -> list[Any]:
    """Return prompts as a list, every one of them checked."""
    check_iterable(prompts, "__iter__")
    listed = list(prompts)
    for index, prompt in enumerate(listed):
        check_prompt(prompt, index, api=api)
    return listed


def check_iterable(prompts: object, *methods: str) -> None:
    """Reject what cannot be iterated by one of these methods, and a text or dict, which are no prompts."""
    if isinstance(prompts, str | bytes | dict) or not any(hasattr(prompts, name) for name in methods):
        reject_input("prompts", prompts, f"must be a list of prompts, not {type(prompts).__name__}")


def _check_messages(messages: Sequence[Any], name: str, index: int | None, api: str) -> None:
    if not messages:
        reject_input(name, messages, "must hold at least one message", field="prompt", index=index)
    try:
        plain = _plain(messages)
    except RecursionError:
        reject_input(name, messages, "not valid JSON: nested too deeply", field="prompt", index=index)
    for position, message in enumerate(plain):
        if not isinstance(message, dict) or not isinstance(message.get("role", message.get("type")), str):
            why = "must be a message with a role"
            reject_input(f"{name}[{position}]", message, why, field="prompt", index=index)
    check_json({name: plain}, field="prompt", index=index)
    if api == "responses":
        input_items(plain, name, index)


def _check_names(fields: Mapping[str, Any], api: str) -> None:
    known = _known_names(api)
    for name in [name for name in fields if name not in known]:
        if name in _KEYWORDS:
            reject_input(name, fields[name], "not a parameter here")
        alike = difflib.get_close_matches(name, known | _KEYWORDS, n=1)
        hint = f"did you mean {alike[0]}? " if alike else ""
        why = f"not a parameter; {hint}What only your server knows goes into extra_body={{{name!r}: ...}}"
        reject_input(name, fields[name], why)
    if "n" in fields:
        check_count(fields["n"], "n")


@functools.cache
def _known_names(api: str) -> frozenset[str]:
    """Return the parameters that the installed SDK knows."""
    from openai.resources.chat import AsyncCompletions  # heavy: only when a call is made
    from openai.resources.responses import AsyncResponses

    resource: Any = AsyncCompletions if api == "chat" else AsyncResponses
    return frozenset(inspect.signature(resource.create).parameters) - _OURS | {"response_format"}


def _take_schema(fields: dict[str, Any], api: str) -> type[BaseModel] | None:
    """Replace a pydantic class given as response_format by its JSON schema, and return the class."""
    wanted = fields.pop("response_format", None)
    if wanted is None:
        return None
    schema = wanted if isinstance(wanted, type) and issubclass(wanted, BaseModel) else None
    if schema is not None:
        strict = openai.pydantic_function_tool(schema)["function"]["parameters"]
        form = {"name": schema.__name__, "schema": strict, "strict": True}
        wanted = {"type": "json_schema", "json_schema": form}
    if api == "chat":
        fields["response_format"] = wanted
    else:
        check_mapping(fields.get("text", {}), "text")
        fields["text"] = {**fields.get("text", {}), "format": responses_format(wanted)}
    return schema


def _plain(value: Any) -> Any:
    """Return messages as plain JSON: the SDK's own message objects are taken too."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_unset=True)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
