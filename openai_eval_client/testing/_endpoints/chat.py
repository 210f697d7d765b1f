"""POST /chat/completions and POST /completions."""

from __future__ import annotations

import json
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from . import checks
from .answers import (
    Answer,
    Ask,
    Count,
    Generation,
    Json,
    Tool,
    compose,
    messages_read,
    model_of,
    number,
    required,
    texts_read,
    words,
)
from .checks import check, check_chat

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .._options import Options

DETAILS = ("reasoning_tokens", "audio_tokens", "accepted_prediction_tokens", "rejected_prediction_tokens")
_encode = json.JSONEncoder(separators=(",", ":")).encode


def dumps(value: Any) -> bytes:
    """Return compact JSON in ASCII, which carries even a lone surrogate."""
    return _encode(value).encode()


def event(data: Json, *, named: bool = False) -> bytes:
    """Return one server-sent event; `named` adds an `event:` line with the data's type."""
    head = f"event: {data['type']}\n".encode() if named else b""
    return head + b"data: " + dumps(data) + b"\n\n"


def _read_chat(body: Json, count: Count) -> Ask:
    model = model_of(body)
    last, tokens = messages_read(required(body, "messages"), "messages", count)
    tools = [tool["function"] for tool in body.get("tools") or () if "function" in tool]
    return Ask(
        model=model,
        body=body,
        prompts=[last],
        prompt_tokens=tokens,
        cap=number(body, "max_completion_tokens", "max_tokens"),
        n=number(body, "n") or 1,
        schema=schema_of(body.get("response_format")),
        tool=forced(body.get("tool_choice"), tools),
    )


def schema_of(wanted: Any) -> Json | None:
    """Return the schema that a chat `response_format` or a Responses `text.format` asks for."""
    if not isinstance(wanted, dict) or wanted.get("type") not in ("json_schema", "json_object"):
        return None
    holder = wanted.get("json_schema") or wanted
    return holder.get("schema") or {"type": "object"}


def forced(choice: Any, functions: list[Json]) -> Tool | None:
    """Return the function a `tool_choice` forces: the first for "required", else the one it names."""
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


def _write_chat(ask: Ask, options: Options, ident: str) -> Json:
    answer = compose(ask, ask.prompts[0], options)
    return {
        "id": f"chatcmpl-{ident}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": ask.model,
        "choices": [_chat_choice(ask, answer, index, ident) for index in range(ask.n)],
        "usage": _usage(ask, answer.tokens * ask.n, options),
        "service_tier": service_tier(ask.body),
        "system_fingerprint": "fp_simulated",
    }


def _usage(ask: Ask, completion: int, options: Options) -> Json:
    cached = min(ask.prompt_tokens, options.cached_tokens)
    return {
        "prompt_tokens": ask.prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": ask.prompt_tokens + completion,
        "prompt_tokens_details": {"cached_tokens": cached, "audio_tokens": 0},
        "completion_tokens_details": dict.fromkeys(DETAILS, 0),
    }


def service_tier(body: Json) -> str:
    """Return the tier in which the request is answered."""
    asked = body.get("service_tier")
    return asked if asked in ("flex", "priority", "scale", "fast") else "default"


def _chat_choice(ask: Ask, answer: Answer, index: int, ident: str) -> Json:
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
        for piece in words(answer.text)
    ]
    return {"content": content, "refusal": None}


def _stream(ask: Ask, body: Json, cut: Callable[[Json], Iterator[Json]]) -> list[bytes]:
    """Return a completion as events, each choice cut into chunks; its usage last, if asked for."""
    with_usage = bool((ask.body.get("stream_options") or {}).get("include_usage"))
    head = {name: value for name, value in body.items() if name not in ("choices", "usage")}
    head["object"] = head["object"].replace("chat.completion", "chat.completion.chunk")
    empty = {"usage": None} if with_usage else {}
    frames = [
        event({**head, "choices": [chunk], **empty}) for choice in body["choices"] for chunk in cut(choice)
    ]
    if with_usage and "usage" in body:
        frames.append(event({**head, "choices": [], "usage": body["usage"]}))
    return [*frames, b"data: [DONE]\n\n"]


def _chat_chunks(choice: Json) -> Iterator[Json]:
    index = choice["index"]
    for delta, logprobs in _deltas(choice):
        yield {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
    yield {"index": index, "delta": {}, "logprobs": None, "finish_reason": choice["finish_reason"]}


def _deltas(choice: Json) -> Iterator[tuple[Json, Json | None]]:
    message = choice["message"]
    if calls := message.get("tool_calls"):
        function = calls[0]["function"]
        start = {**calls[0], "index": 0, "function": {"name": function["name"], "arguments": ""}}
        yield {"role": "assistant", "content": None, "tool_calls": [start]}, None
        for piece in words(function["arguments"]):
            yield {"tool_calls": [{"index": 0, "function": {"arguments": piece}}]}, None
        return
    yield {"role": "assistant", "content": "", "refusal": None}, None
    logprobs = (choice["logprobs"] or {}).get("content")
    for place, piece in enumerate(words(message["content"])):
        yield {"content": piece}, logprobs and {"content": [logprobs[place]], "refusal": None}


CHAT = Generation(
    check=check_chat, read=_read_chat, write=_write_chat, stream=partial(_stream, cut=_chat_chunks)
)


def _read_completion(body: Json, count: Count) -> Ask:
    model = model_of(body)
    prompts, tokens = texts_read(required(body, "prompt"), "prompt", count)
    cap, n = number(body, "max_tokens"), number(body, "n") or 1
    return Ask(model=model, body=body, prompts=prompts, prompt_tokens=tokens, cap=cap, n=n)


def _write_completion(ask: Ask, options: Options, ident: str) -> Json:
    answers = [answer for prompt in ask.prompts for answer in [compose(ask, prompt, options)] * ask.n]
    return {
        "id": f"cmpl-{ident}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": ask.model,
        "choices": [_completion_choice(index, answer) for index, answer in enumerate(answers)],
        "usage": _usage(ask, sum(answer.tokens for answer in answers), options),
        "system_fingerprint": "fp_simulated",
    }


def _completion_choice(index: int, answer: Answer) -> Json:
    reason = "length" if answer.cut else "stop"
    return {"text": answer.text, "index": index, "logprobs": None, "finish_reason": reason}


def _completion_chunks(choice: Json) -> Iterator[Json]:
    for piece in words(choice["text"]):
        yield {**choice, "text": piece, "finish_reason": None}
    yield {**choice, "text": ""}


COMPLETIONS = Generation(
    check=partial(check, known=checks.COMPLETIONS),
    read=_read_completion,
    write=_write_completion,
    stream=partial(_stream, cut=_completion_chunks),
)
