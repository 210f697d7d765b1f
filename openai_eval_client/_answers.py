"""From the body of an answer to a `ModelResponse`, whatever a compatible server leaves out."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pydantic

from openai_eval_client._pricing import PricedUsage
from openai_eval_client._wire import usage_counts
from openai_eval_client.models import ModelResponse, TokenUsage

if TYPE_CHECKING:
    from collections.abc import Mapping

    from openai_eval_client._requests import Parameters

logger = logging.getLogger("openai_eval_client")

DEFAULT_TEMPERATURE = 1.0  # https://platform.openai.com/docs/api-reference/chat/create


def is_answer(body: object, api: str) -> bool:
    """Return whether a body is an answer at all, and not the garbage of something in between."""
    wanted = "choices" if api == "chat" else "output"
    return isinstance(body, dict) and isinstance(body.get(wanted), list)


def read_answer(
    body: Mapping[str, Any],
    parameters: Parameters,
    *,
    temperature: float | None,
    request_id: str | None,
    latency: float,
) -> ModelResponse:
    """Build the response to one prompt; its usage is zero where the server sent none.

    Args:
        body: What the server sent, checked by `is_answer`.
        parameters: What was asked.
        temperature: What was sent; None: the API's default applied.
        request_id: The x-request-id header.
        latency: Seconds of the attempt.

    Returns:
        The response, not priced yet.
    """
    fields = _chat_fields(body) if parameters.api == "chat" else _responses_fields(body)
    response = ModelResponse(
        usage=_read_usage(body.get("usage")),
        model=str(body.get("model") or parameters.model),
        request_id=request_id or str(body.get("id") or ""),
        latency_ms=latency * 1000,
        temperature=DEFAULT_TEMPERATURE if temperature is None else temperature,
        **fields,
    )
    response._body = body  # noqa: SLF001  # private extras, outside the JSON round trip
    response._parsed = _parse(response, parameters.schema)  # noqa: SLF001
    return response


def priced_usage(usage: TokenUsage) -> PricedUsage:
    """Return what the price depends on."""
    return PricedUsage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
    )


def _chat_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    choices = [choice for choice in body["choices"] if isinstance(choice, dict)]
    messages = [choice.get("message") or {} for choice in choices]
    first: Mapping[str, Any] = messages[0] if messages else {}
    return {
        "content": _text(first.get("content")),
        "choices": [_text(message.get("content")) for message in messages],
        "finish_reason": _text(choices[0].get("finish_reason") if choices else None),
        "tool_calls": [call for call in first.get("tool_calls") or [] if isinstance(call, dict)],
        "refusal": _text(first.get("refusal")) or None,
        "logprobs": (choices[0].get("logprobs") if choices else None) or None,
    }


def _responses_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    items = [item for item in body["output"] if isinstance(item, dict)]
    parts = [part for item in items if item.get("type") == "message" for part in item.get("content") or []]
    calls = [item for item in items if str(item.get("type", "")).endswith("_call")]
    text = "".join(_text(part.get("text")) for part in parts if part.get("type") == "output_text")
    refusals = [_text(part.get("refusal")) for part in parts if part.get("type") == "refusal"]
    logprobs = [entry for part in parts for entry in part.get("logprobs") or []]
    return {
        "content": text,
        "choices": [text],
        "finish_reason": _finish_reason(body, calls=bool(calls)),
        "tool_calls": calls,
        "refusal": refusals[0] if refusals else None,
        "logprobs": {"content": logprobs} if logprobs else None,
    }


def _finish_reason(body: Mapping[str, Any], *, calls: bool) -> str:
    """Return the Responses API's status in the words of chat completions."""
    if body.get("status") == "incomplete":
        reason = _text((body.get("incomplete_details") or {}).get("reason"))
        return "length" if reason == "max_output_tokens" else reason
    if body.get("status") not in {None, "completed"}:
        return str(body["status"])
    return "tool_calls" if calls else "stop"


def _read_usage(usage: Any) -> TokenUsage:
    counts = usage_counts(usage)
    if counts is None:
        return TokenUsage(prompt_tokens=0, completion_tokens=0, total_tokens=0, estimated=True)
    given = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
    made = usage.get("completion_tokens_details") or usage.get("output_tokens_details") or {}
    return TokenUsage(
        prompt_tokens=counts[0],
        completion_tokens=counts[1],
        total_tokens=_whole(usage.get("total_tokens")) or sum(counts),
        cached_tokens=_whole(given.get("cached_tokens")),
        reasoning_tokens=_whole(made.get("reasoning_tokens")),
    )


def _parse(response: ModelResponse, schema: type[pydantic.BaseModel] | None) -> Any:
    if schema is None or response.refusal is not None or not response.content:
        return None
    try:
        return schema.model_validate_json(response.content)
    except pydantic.ValidationError as error:
        count, name = error.error_count(), schema.__name__
        logger.warning(
            "answer %s does not fit %s (%d errors): parsed is None", response.request_id, name, count
        )
        return None


def _text(value: object) -> str:
    """Return a text that is valid Unicode: half a surrogate pair, as a cut emoji leaves it, is U+FFFD."""
    if not isinstance(value, str):
        return ""
    return value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _whole(value: object) -> int:
    return value if isinstance(value, int) else 0
