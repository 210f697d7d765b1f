"""POST /responses."""

from __future__ import annotations

import time
from itertools import count as counting
from typing import TYPE_CHECKING, Any

from .answers import (
    PER_MESSAGE,
    Answer,
    Ask,
    Count,
    Generation,
    Json,
    compose,
    messages_read,
    model_of,
    number,
    required,
    words,
)
from .chat import event, forced, schema_of, service_tier
from .checks import check_response

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .._options import Options

ECHOED: Json = {  # what the request may set, and its default
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "reasoning": {"effort": None, "summary": None},
    "store": True,
    "temperature": 1.0,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "top_p": 1.0,
    "truncation": "disabled",
    "user": None,
}


def _read(body: Json, count: Count) -> Ask:
    """Understand a request: a string is one user message, `instructions` one more message."""
    model = model_of(body)
    given = required(body, "input")
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    last, tokens = messages_read(items, "input", count)
    if instructions := body.get("instructions"):
        tokens += count(str(instructions)) + PER_MESSAGE
    tools = [tool for tool in body.get("tools") or () if tool.get("type") == "function"]
    return Ask(
        model=model,
        body=body,
        prompts=[last],
        prompt_tokens=tokens,
        cap=number(body, "max_output_tokens"),
        schema=schema_of((body.get("text") or {}).get("format")),
        tool=forced(body.get("tool_choice"), tools),
    )


def _write(ask: Ask, options: Options, ident: str) -> Json:
    answer = compose(ask, ask.prompts[0], options)
    status = "incomplete" if answer.cut else "completed"
    given = {name: ask.body[name] for name in ECHOED if ask.body.get(name) is not None}
    return {
        "id": f"resp_{ident}",
        "object": "response",
        "created_at": int(time.time()),
        "status": status,
        "background": bool(ask.body.get("background")),
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if answer.cut else None,
        "model": ask.model,
        "output": [_item(ask, answer, ident, status)],
        "service_tier": service_tier(ask.body),
        **ECHOED,
        **given,
        "usage": _usage(ask, answer.tokens, options),
    }


def _item(ask: Ask, answer: Answer, ident: str, status: str) -> Json:
    if ask.tool:
        call = {"call_id": f"call_{ident}", "name": ask.tool.name, "arguments": answer.text}
        return {"id": f"fc_{ident}", "type": "function_call", "status": status, **call}
    message = {"role": "assistant", "content": [_part(answer.text)]}
    return {"id": f"msg_{ident}", "type": "message", "status": status, **message}


def _part(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(ask: Ask, completion: int, options: Options) -> Json:
    cached = min(ask.prompt_tokens, options.cached_tokens)
    return {
        "input_tokens": ask.prompt_tokens,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": completion,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": ask.prompt_tokens + completion,
    }


def _stream(_ask: Ask, body: Json) -> list[bytes]:
    """Return the response as numbered events."""
    numbers = counting()
    return [event({**data, "sequence_number": next(numbers)}, named=True) for data in _events(body)]


def _events(body: Json) -> Iterator[Json]:
    begun = {**body, "status": "in_progress", "incomplete_details": None, "output": [], "usage": None}
    yield {"type": "response.created", "response": begun}
    yield {"type": "response.in_progress", "response": begun}
    for item in body["output"]:  # one, or none if it failed
        empty: Json = {"content": []} if item["type"] == "message" else {"arguments": ""}
        started = {**item, "status": "in_progress", **empty}
        yield {"type": "response.output_item.added", "output_index": 0, "item": started}
        yield from _text_events(item) if item["type"] == "message" else _call_events(item)
        yield {"type": "response.output_item.done", "output_index": 0, "item": item}
    yield {"type": f"response.{body['status']}", "response": body}


def _text_events(item: Json) -> Iterator[Json]:
    where: dict[str, Any] = {"item_id": item["id"], "output_index": 0, "content_index": 0}
    part = item["content"][0]
    yield {"type": "response.content_part.added", **where, "part": _part("")}
    for piece in words(part["text"]):
        yield {"type": "response.output_text.delta", **where, "delta": piece, "logprobs": []}
    yield {"type": "response.output_text.done", **where, "text": part["text"], "logprobs": []}
    yield {"type": "response.content_part.done", **where, "part": part}


def _call_events(item: Json) -> Iterator[Json]:
    where: dict[str, Any] = {"item_id": item["id"], "output_index": 0}
    kind = "response.function_call_arguments"
    for piece in words(item["arguments"]):
        yield {"type": f"{kind}.delta", **where, "delta": piece}
    yield {"type": f"{kind}.done", **where, "name": item["name"], "arguments": item["arguments"]}


RESPONSES = Generation(check=check_response, read=_read, write=_write, stream=_stream)
