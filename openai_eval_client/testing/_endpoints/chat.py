"""POST /chat/completions."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from .answers import Answer, Ask, Count, Json, Tool, messages_read, model_of, number, required
from .sse import DONE, event

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NO_DETAILS = {
    "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
    "completion_tokens_details": {
        "reasoning_tokens": 0,
        "audio_tokens": 0,
        "accepted_prediction_tokens": 0,
        "rejected_prediction_tokens": 0,
    },
}


def read(body: Json, count: Count) -> Ask:
    """Understand a request."""
    model = model_of(body)
    last, tokens = messages_read(required(body, "messages"), "messages", count)
    return Ask(
        model=model,
        body=body,
        prompts=[last],
        prompt_tokens=tokens,
        cap=number(body, "max_completion_tokens", "max_tokens"),
        n=number(body, "n") or 1,
        stream=bool(body.get("stream")),
        schema=schema_of(body.get("response_format")),
        tool=_forced_tool(body),
    )


def schema_of(wanted: Any) -> Json | None:
    """The schema a chat `response_format` or a Responses `text.format` asks for."""
    if not isinstance(wanted, dict) or wanted.get("type") not in ("json_schema", "json_object"):
        return None
    holder = wanted.get("json_schema") or wanted
    return holder.get("schema") or {"type": "object"}


def forced(choice: Any, functions: list[Json]) -> Tool | None:
    """The function a `tool_choice` forces: the first for "required", else the one it names."""
    name = None
    if isinstance(choice, dict):
        name = (choice.get("function") or choice).get("name")
    elif choice != "required":
        return None
    for function in functions:
        if name in (None, function.get("name")):
            parameters = function.get("parameters") or {"type": "object"}
            return Tool(name=str(function.get("name")), parameters=parameters, named=name is not None)
    return None


def _forced_tool(body: Json) -> Tool | None:
    tools = [tool["function"] for tool in body.get("tools") or () if "function" in tool]
    return forced(body.get("tool_choice"), tools)


def write(ask: Ask, author: Callable[[str], Answer], ident: str) -> Json:
    """The whole completion."""
    answer = author(ask.prompts[0])
    return {
        "id": f"chatcmpl-{ident}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": ask.model,
        "choices": [_choice(ask, answer, index, ident) for index in range(ask.n)],
        "usage": usage(ask.prompt_tokens, answer.tokens * ask.n),
        "service_tier": service_tier(ask.body),
        "system_fingerprint": "fp_simulated",
    }


def usage(prompt: int, completion: int) -> Json:
    """Usage as chat and completions report it."""
    total = prompt + completion
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": total, **NO_DETAILS}


def service_tier(body: Json) -> str:
    """The tier the request is answered in."""
    asked = body.get("service_tier")
    return asked if asked in ("flex", "priority", "scale") else "default"


def _choice(ask: Ask, answer: Answer, index: int, ident: str) -> Json:
    message: Json = {"role": "assistant", "content": answer.text, "refusal": None, "annotations": []}
    reason = "length" if answer.cut else "stop"
    if ask.tool:
        function = {"name": ask.tool.name, "arguments": answer.text}
        message["content"] = None
        message["tool_calls"] = [{"id": f"call_{ident}_{index}", "type": "function", "function": function}]
        # a function named by the request ends with "stop", one the model chose with "tool_calls"
        reason = "length" if answer.cut else "stop" if ask.tool.named else "tool_calls"
    return {"index": index, "message": message, "logprobs": _logprobs(ask, answer), "finish_reason": reason}


def _logprobs(ask: Ask, answer: Answer) -> Json | None:
    if not ask.body.get("logprobs") or ask.tool:
        return None
    content = [
        {"token": piece, "logprob": -0.1, "bytes": list(piece.encode("utf-8", "replace")), "top_logprobs": []}
        for piece in answer.pieces
    ]
    return {"content": content, "refusal": None}


def stream(ask: Ask, body: Json) -> list[bytes]:
    """The completion as server-sent events."""
    with_usage = bool((ask.body.get("stream_options") or {}).get("include_usage"))
    kept = ("id", "created", "model", "service_tier", "system_fingerprint")
    head = {"object": "chat.completion.chunk", **{name: body[name] for name in kept}}
    empty = {"usage": None} if with_usage else {}
    frames = [
        event({**head, "choices": [chunk], **empty})
        for choice in body["choices"]
        for chunk in _chunks(choice)
    ]
    if with_usage and "usage" in body:
        frames.append(event({**head, "choices": [], "usage": body["usage"]}))
    return [*frames, DONE]


def _chunks(choice: Json) -> Iterator[Json]:
    for delta, logprobs in _deltas(choice):
        yield {"index": choice["index"], "delta": delta, "logprobs": logprobs, "finish_reason": None}
    end = {"index": choice["index"], "delta": {}, "logprobs": None}
    yield {**end, "finish_reason": choice["finish_reason"]}


def _deltas(choice: Json) -> Iterator[tuple[Json, Json | None]]:
    message = choice["message"]
    if calls := message.get("tool_calls"):
        function = calls[0]["function"]
        start = {**calls[0], "index": 0, "function": {"name": function["name"], "arguments": ""}}
        yield {"role": "assistant", "content": None, "tool_calls": [start]}, None
        for piece in Answer(function["arguments"], 0, cut=False).pieces:
            yield {"tool_calls": [{"index": 0, "function": {"arguments": piece}}]}, None
        return
    yield {"role": "assistant", "content": "", "refusal": None}, None
    logprobs = (choice["logprobs"] or {}).get("content")
    for number_, piece in enumerate(Answer(message["content"], 0, cut=False).pieces):
        yield {"content": piece}, logprobs and {"content": [logprobs[number_]], "refusal": None}
