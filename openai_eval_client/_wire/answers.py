"""What an answer says, whatever a compatible server gets wrong: its text, calls, refusal, logprobs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from openai_eval_client._log import warn
from openai_eval_client._wire.usage import Usage, clean, dict_in, dicts_in, text_in
from openai_eval_client.models import ModelResponse, TokenUsage

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic import BaseModel

    from openai_eval_client._wire.requests import Parameters

# Items of a response that wait for the caller; the API runs its hosted tools itself.
_CALLS = frozenset({"function_call", "custom_tool_call", "computer_call", "local_shell_call"})
_DEFAULT_TEMPERATURE = 1.0  # https://platform.openai.com/docs/api-reference/chat/create


def read_answer(
    body: Mapping[str, Any],
    parameters: Parameters,
    *,
    usage: Usage | None,
    cost: float | None = None,
    kept: bytes | None = None,
    temperature: float | None,
    request_id: str | None,
    latency: float,
) -> ModelResponse:
    """Build the response to one prompt; a field that a server gets wrong reads as missing."""
    values = _chat_fields(body) if parameters.api == "chat" else _responses_fields(body)
    values |= {
        "usage": _token_usage(usage, cost),
        "model": text_in(body.get("model")) or parameters.model,
        "request_id": request_id or text_in(body.get("id")),
        "latency_ms": latency * 1000,
        "temperature": _DEFAULT_TEMPERATURE if temperature is None else float(temperature),
        "cached": False,
    }
    response: ModelResponse = ModelResponse._of(values, {"_parsed": None, "_body": kept or body})  # noqa: SLF001
    if parameters.schema is not None:
        response._parsed = _parsed(response, parameters.schema)  # noqa: SLF001
    return response


def _chat_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    choices = dicts_in(body["choices"])
    first = choices[0] if choices else {}
    message = dict_in(first.get("message"))
    content = _content(message)
    calls, logprobs = message.get("tool_calls"), first.get("logprobs")
    return {
        "content": content,
        "choices": [content if each is first else _content(dict_in(each.get("message"))) for each in choices],
        "finish_reason": text_in(first.get("finish_reason")),
        "tool_calls": clean(dicts_in(calls)) if calls else [],
        "refusal": text_in(message.get("refusal")) or None,
        "logprobs": clean(dict_in(logprobs)) or None if logprobs else None,
    }


def _content(message: Mapping[str, Any]) -> str:
    """Return the text of a message; some servers send it in parts, among others that are no text."""
    content = message.get("content")
    if not isinstance(content, list):
        return text_in(content)
    return "".join(text_in(part.get("text")) for part in dicts_in(content) if part.get("type") == "text")


def _responses_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    items = dicts_in(body["output"])
    parts = [
        part for item in items if item.get("type") == "message" for part in dicts_in(item.get("content"))
    ]
    calls = [item for item in items if text_in(item.get("type")) in _CALLS]
    text = "".join(text_in(part.get("text")) for part in parts if part.get("type") == "output_text")
    refusals = [text_in(part.get("refusal")) for part in parts if part.get("type") == "refusal"]
    logprobs = [entry for part in parts for entry in dicts_in(part.get("logprobs"))]
    return {
        "content": text,
        "choices": [text],
        "finish_reason": _finish_reason(body, calls=bool(calls)),
        "tool_calls": clean(calls),
        "refusal": refusals[0] if refusals else None,
        "logprobs": {"content": clean(logprobs)} if logprobs else None,
    }


def _finish_reason(body: Mapping[str, Any], *, calls: bool) -> str:
    """Return the Responses API's status in the words of chat completions."""
    status = text_in(body.get("status")) or "completed"
    if status == "incomplete":
        reason = text_in(dict_in(body.get("incomplete_details")).get("reason"))
        return "length" if reason == "max_output_tokens" else reason
    if status != "completed":
        return status
    return "tool_calls" if calls else "stop"


def _token_usage(usage: Usage | None, cost: float | None) -> TokenUsage:
    counts = usage or Usage(0, 0, estimated=True)
    fields = {
        "prompt_tokens": counts.prompt_tokens,
        "completion_tokens": counts.completion_tokens,
        "total_tokens": counts.prompt_tokens + counts.completion_tokens,
        "estimated_cost": cost,
        "cached_tokens": counts.cached_tokens,
        "reasoning_tokens": counts.reasoning_tokens,
        "estimated": counts.estimated,
    }
    return TokenUsage._of(fields)  # type: ignore[no-any-return]  # noqa: SLF001


def _parsed(response: ModelResponse, schema: type[BaseModel]) -> BaseModel | None:
    if response.refusal is not None or not response.content:
        return None
    try:
        return schema.model_validate_json(response.content)
    except Exception as error:  # noqa: BLE001  # a validator may raise anything; the answer is paid for
        kind, name = type(error).__name__, schema.__name__
        about = {"model": response.model, "request_id": response.request_id, "error_type": kind}
        text = "answer %s does not fit %s (%s): parsed is None"
        warn(text, response.request_id, name, kind, event="not_parsed", **about)
        return None
