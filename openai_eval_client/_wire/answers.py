"""What an answer says, whatever a compatible server gets wrong: text, reasoning, calls, refusal and so on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from openai_eval_client._log import warn
from openai_eval_client._wire.usage import (
    Usage,
    clean,
    dict_in,
    dicts_in,
    read_json,
    text_in,
)
from openai_eval_client.models import ModelResponse, TokenUsage

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic import BaseModel

    from openai_eval_client._wire.requests import Parameters

# Items of a response that wait for the caller; the API runs its hosted tools itself.
_CALLS = frozenset({"function_call", "custom_tool_call", "computer_call", "local_shell_call"})
# Where compatible servers put the reasoning of a message, and under which names its parts hold the text.
REASONING = ("reasoning_content", "reasoning", "reasoning_details", "thinking")
_THINKING, _NAMES = ("thinking", "reasoning"), ("text", "content", "summary", "thinking")
_JSON_FORMATS = ("json_schema", "json_object")
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
    asked = parameters.body.get("temperature")
    values |= {
        "usage": _token_usage(usage, cost),
        "model": text_in(body.get("model")) or parameters.model,
        "request_id": request_id or text_in(body.get("id")),
        "latency_ms": latency * 1000,
        "temperature": _DEFAULT_TEMPERATURE if temperature is None else float(temperature),
        "cached": False,
        "fits_schema": None,
        "unsent_parameters": () if asked is None or asked == temperature else ("temperature",),
    }
    response: ModelResponse = ModelResponse._of(values, {"_parsed": None, "_body": kept or body})  # noqa: SLF001
    if parameters.schema is not None or _wants_json(parameters):
        messages = [] if parameters.api == "chat" else _messages(body)
        _check_schema(response, parameters.schema, messages)
    return response


def _chat_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    choices = dicts_in(body["choices"])
    first = choices[0] if choices else {}
    message = dict_in(first.get("message"))
    content = _content(message)
    calls, logprobs = message.get("tool_calls"), first.get("logprobs")
    audio, annotations = message.get("audio"), message.get("annotations")
    return {
        "content": content,
        "choices": [content if each is first else _content(dict_in(each.get("message"))) for each in choices],
        "finish_reason": text_in(first.get("finish_reason")),
        "tool_calls": clean(dicts_in(calls)) if calls else _old_call(message),
        "refusal": text_in(message.get("refusal")) or None,
        "logprobs": clean(dict_in(logprobs)) or None if logprobs else None,
        "reasoning": _reasoning(message),
        "audio": clean(dict_in(audio)) or None if audio else None,
        "annotations": clean(dicts_in(annotations)) if annotations else [],
    }


def _content(message: Mapping[str, Any]) -> str:
    """Return the text of a message; some servers send it in parts, among others that are no text."""
    content = message.get("content")
    if not isinstance(content, list):
        return text_in(content)
    return "".join(_texts(dicts_in(content), "text"))


def _old_call(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the call of a server that has only `function_call`, in the shape of `tool_calls`."""
    call = dict_in(message.get("function_call"))
    return [{"id": "", "type": "function", "function": clean(call)}] if call else []


def _reasoning(message: Mapping[str, Any]) -> str | None:
    """Return the reasoning of a message, from the first place where there is one."""
    places = [message[name] for name in REASONING if message.get(name)]
    if isinstance(content := message.get("content"), list):
        places.append([part for part in dicts_in(content) if part.get("type") in _THINKING])
    return next(filter(None, map(_thought, places)), None)


def _thought(value: object, levels: int = 4) -> str:
    """Return a text, or that of parts which hold it under one of several names."""
    if isinstance(value, list) and levels:
        return "\n\n".join(filter(None, (_thought(part, levels - 1) for part in value)))
    if isinstance(value, dict) and levels:
        texts = (_thought(value.get(name), levels - 1) for name in _NAMES)
        return next(filter(None, texts), "")
    return text_in(value)


def _responses_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    items = dicts_in(body["output"])
    parts = [
        part for item in items if item.get("type") == "message" for part in dicts_in(item.get("content"))
    ]
    calls = [item for item in items if text_in(item.get("type")) in _CALLS]
    text = "".join(_messages(body))
    refusals = [text_in(part.get("refusal")) for part in parts if part.get("type") == "refusal"]
    thoughts = [item for item in items if item.get("type") == "reasoning"]
    return {
        "content": text,
        "choices": [text],
        "finish_reason": _finish_reason(body, calls=bool(calls)),
        "tool_calls": clean(calls),
        "refusal": refusals[0] if refusals else None,
        "logprobs": {"content": logprobs} if (logprobs := _all_of(parts, "logprobs")) else None,
        "reasoning": _thought(thoughts) or None,
        "audio": next((clean(part) for part in parts if part.get("type") == "output_audio"), None),
        "annotations": _all_of(parts, "annotations"),
    }


def _all_of(parts: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Return the objects in the lists that parts have by one name."""
    return [clean(each) for part in parts for each in dicts_in(part.get(name))]


def _messages(body: Mapping[str, Any]) -> list[str]:
    """Return the text of each message of a response."""
    messages = [item for item in dicts_in(body["output"]) if item.get("type") == "message"]
    return ["".join(_texts(dicts_in(message.get("content")), "output_text")) for message in messages]


def _texts(parts: list[dict[str, Any]], kind: str) -> list[str]:
    return [text_in(part.get("text")) for part in parts if part.get("type") == kind]


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


def _wants_json(parameters: Parameters) -> bool:
    """Return whether the answer has to be JSON."""
    body, name = parameters.body, "response_format"
    if parameters.api == "responses":
        body, name = dict_in(body.get("text")), "format"
    return bool(wanted := body.get(name)) and dict_in(wanted).get("type") in _JSON_FORMATS


def _check_schema(response: ModelResponse, schema: type[BaseModel] | None, messages: list[str]) -> None:
    """Look for the object in the last message that fits, and then in the whole text."""
    if response.tool_calls and not response.content:
        return
    response.fits_schema = False
    texts = [*reversed(messages), response.content] if response.refusal is None else []
    failures = []
    for text in dict.fromkeys(filter(None, texts)):
        found = _validated(text, schema)
        if not isinstance(found, Exception):
            response._parsed, response.fits_schema = found, None if schema is None else True  # noqa: SLF001
            return
        failures.append(found)
    if failures and schema is not None:
        kind, name = type(failures[-1]).__name__, schema.__name__
        about = {"model": response.model, "request_id": response.request_id, "error_type": kind}
        text = "answer %s does not fit %s (%s): parsed is None"
        warn(text, response.request_id, name, kind, event="not_parsed", **about)


def _validated(text: str, schema: type[BaseModel] | None) -> BaseModel | Exception | None:
    """Return the object in a text, or why there is none; None for JSON without a class to fit."""
    try:
        if schema is not None:
            return schema.model_validate_json(text)
        read_json(text.encode())
    except Exception as error:  # noqa: BLE001  # a validator may raise anything; the answer is paid for
        return error
    return None
