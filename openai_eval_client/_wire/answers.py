"""From the body of an answer to a `ModelResponse`, whatever a compatible server leaves out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from openai_eval_client._format import valid_text
from openai_eval_client._log import warn
from openai_eval_client._wire.endpoints import PATHS
from openai_eval_client._wire.failures import not_an_answer
from openai_eval_client._wire.usage import read_json, token_count
from openai_eval_client.models import ModelResponse, TokenUsage

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic import BaseModel

    from openai_eval_client._tokens import TokenCounter
    from openai_eval_client._wire.requests import Parameters
    from openai_eval_client._wire.usage import Usage


# Items of a response that wait for the caller; the API runs its hosted tools itself.
_CALLS = frozenset({"function_call", "custom_tool_call", "computer_call", "local_shell_call"})
DEFAULT_TEMPERATURE = 1.0  # https://platform.openai.com/docs/api-reference/chat/create


def is_answer(body: object, api: str) -> bool:
    """Return whether a body is an answer at all, and not the garbage of something in between."""
    wanted = "choices" if api == "chat" else "output"
    return isinstance(body, dict) and isinstance(body.get(wanted), list)


def read_body(reply: Any, api: str) -> dict[str, Any]:
    """Return the JSON body of a 200.

    Raises:
        openai.APIResponseValidationError: It is cut short, or no answer at all; worth another attempt.
        openai.APIStatusError: It is an error that names a status.
    """
    try:
        body = read_json(reply.content)
    except (ValueError, RecursionError):
        body = None
    if not is_answer(body, api) or (api == "chat" and body.get("error") and not body["choices"]):
        raise not_an_answer(reply, body, PATHS[api])
    decoded: dict[str, Any] = body
    return decoded


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
        "usage": _token_usage(body, usage, cost),
        "model": _text(body.get("model")) or parameters.model,
        "request_id": request_id or _text(body.get("id")),
        "latency_ms": latency * 1000,
        "temperature": DEFAULT_TEMPERATURE if temperature is None else float(temperature),
        "cached": False,
    }
    response: ModelResponse = ModelResponse._of(values, {"_parsed": None, "_body": kept or body})  # noqa: SLF001
    if parameters.schema is not None:
        response._parsed = _parse(response, parameters.schema)  # noqa: SLF001
    return response


async def estimate_usage(response: ModelResponse, input_tokens: int, counter: TokenCounter) -> None:
    """Fill in the usage that the server left out."""
    usage, texts = response.usage, "\n".join(response.choices)
    usage.prompt_tokens = input_tokens
    usage.completion_tokens = await counter.count_text(texts, response.model) if texts else 0
    usage.total_tokens = usage.prompt_tokens + usage.completion_tokens


def _chat_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    choices = _dicts(body["choices"])
    first = choices[0] if choices else {}
    message = _dict(first.get("message"))
    content = _content(message)
    calls, logprobs = message.get("tool_calls"), first.get("logprobs")
    return {
        "content": content,
        "choices": [content if each is first else _content(_dict(each.get("message"))) for each in choices],
        "finish_reason": _text(first.get("finish_reason")),
        "tool_calls": _clean(_dicts(calls)) if calls else [],
        "refusal": _text(message.get("refusal")) or None,
        "logprobs": _clean(_dict(logprobs)) or None if logprobs else None,
    }


def _content(message: Mapping[str, Any]) -> str:
    """Return the text of a message; some servers send it in parts, among others that are no text."""
    content = message.get("content")
    if not isinstance(content, list):
        return _text(content)
    return "".join(_text(part.get("text")) for part in _dicts(content) if part.get("type") == "text")


def _responses_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    items = _dicts(body["output"])
    parts = [part for item in items if item.get("type") == "message" for part in _dicts(item.get("content"))]
    calls = [item for item in items if _text(item.get("type")) in _CALLS]
    text = "".join(_text(part.get("text")) for part in parts if part.get("type") == "output_text")
    refusals = [_text(part.get("refusal")) for part in parts if part.get("type") == "refusal"]
    logprobs = [entry for part in parts for entry in _dicts(part.get("logprobs"))]
    return {
        "content": text,
        "choices": [text],
        "finish_reason": _finish_reason(body, calls=bool(calls)),
        "tool_calls": _clean(calls),
        "refusal": refusals[0] if refusals else None,
        "logprobs": {"content": _clean(logprobs)} if logprobs else None,
    }


def _finish_reason(body: Mapping[str, Any], *, calls: bool) -> str:
    """Return the Responses API's status in the words of chat completions."""
    status = _text(body.get("status")) or "completed"
    if status == "incomplete":
        reason = _text(_dict(body.get("incomplete_details")).get("reason"))
        return "length" if reason == "max_output_tokens" else reason
    if status != "completed":
        return status
    return "tool_calls" if calls else "stop"


def _token_usage(body: Mapping[str, Any], usage: Usage | None, cost: float | None) -> TokenUsage:
    given, made = (0, 0) if usage is None else (usage.prompt_tokens, usage.completion_tokens)
    total = None if usage is None else token_count(body["usage"].get("total_tokens"))
    return TokenUsage._of(  # type: ignore[no-any-return]  # noqa: SLF001
        {
            "prompt_tokens": given,
            "completion_tokens": made,
            "total_tokens": total or given + made,
            "estimated_cost": cost,
            "cached_tokens": 0 if usage is None else usage.cached_tokens,
            "reasoning_tokens": 0 if usage is None else usage.reasoning_tokens,
            "estimated": usage is None,
        }
    )


def _parse(response: ModelResponse, schema: type[BaseModel] | None) -> Any:
    if schema is None or response.refusal is not None or not response.content:
        return None
    try:
        return schema.model_validate_json(response.content)
    except Exception as error:  # noqa: BLE001  # a validator may raise anything; the answer is paid for
        kind, name = type(error).__name__, schema.__name__
        about = {"model": response.model, "request_id": response.request_id, "error_type": kind}
        text = "answer %s does not fit %s (%s): parsed is None"
        warn(text, response.request_id, name, kind, event="not_parsed", **about)
        return None


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _dicts(value: object) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _text(value: object) -> str:
    return valid_text(value) if isinstance(value, str) else ""


def _clean(value: Any) -> Any:
    """Make every text within valid Unicode."""
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, list):
        return [_clean(item) for item in value]
    if isinstance(value, dict):
        return {_text(key): _clean(item) for key, item in value.items()}
    return value
