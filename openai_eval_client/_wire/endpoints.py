"""The endpoints of the API, one row each, and what a request asks of the limits."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

from openai_eval_client._wire.answers import MOST_TOKENS, token_count

if TYPE_CHECKING:
    from collections.abc import Mapping
    from decimal import Decimal


class Endpoint(NamedTuple):
    """What is known of a POST to one endpoint."""

    end: str  # of its path
    inputs: tuple[str, ...] = ()  # what in the body is input
    output_caps: tuple[str, ...] | None = None  # what bounds the output; (): there is none; None: not known
    metered: bool = True  # runs a model, and so counts against RPM and TPM
    billed: bool = True  # may cost money
    api: str | None = None  # its name for our own methods
    batchable: bool = False  # our batch jobs take it

    @property
    def free(self) -> bool:
        """Whether it runs a model for nothing."""
        return self.metered and not self.billed


def _other(*ends: str, billed: bool = False) -> list[Endpoint]:
    """Return endpoints that run no model themselves; the billed ones make the provider work all the same."""
    return [Endpoint(f"/{end}", metered=False, billed=billed) for end in ends]


# https://platform.openai.com/docs/api-reference; a path that is not here runs a model, and may cost money.
ENDPOINTS = (
    Endpoint(
        "/chat/completions",
        inputs=("messages",),
        output_caps=("max_completion_tokens", "max_tokens"),
        api="chat",
        batchable=True,
    ),
    Endpoint(
        "/responses",
        inputs=("input", "instructions"),
        output_caps=("max_output_tokens",),
        api="responses",
        batchable=True,
    ),
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


class Demand(NamedTuple):
    """What one request asks of the limits."""

    model: str | None  # None: it runs no model, and only the concurrency limit applies
    input_tokens: int = 0
    max_output: int | None = None  # output tokens at most; None: what this model's answers usually take
    retry: bool | None = None  # whether it repeats a failed attempt; None: our own call, counted elsewhere
    free: bool = False  # whether its endpoint costs nothing
    most_cost: Decimal | None = None  # USD that it can cost at most; None: there is no budget


def max_output(body: Mapping[str, Any], path: str = "") -> int | None:
    """Return the output tokens a request may use at most, all choices together; None: no bound."""
    names = endpoint_of(path).output_caps
    if names == ():
        return 0
    caps = [cap for name in names or _CAPS if (cap := token_count(body.get(name))) is not None]
    choices = token_count(body.get("n")) or 1
    return min(caps[0] * choices, MOST_TOKENS) if caps else None
