"""POST /completions."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from .._errors import wrong_type
from .answers import Answer, Ask, Count, Json, model_of, number, required, words
from .chat import usage
from .sse import DONE, event

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def read(body: Json, count: Count) -> Ask:
    """Understand a request."""
    model = model_of(body)
    prompts, tokens = inputs(required(body, "prompt"), "prompt", count)
    return Ask(
        model=model,
        body=body,
        prompts=prompts,
        prompt_tokens=tokens,
        cap=number(body, "max_tokens"),
        n=number(body, "n") or 1,
        stream=bool(body.get("stream")),
    )


def inputs(value: Any, name: str, count: Count) -> tuple[list[str], int]:
    """A string, several, a token list or several, as texts and their tokens; tokens show as their numbers."""
    several = value if isinstance(value, list) and value and not isinstance(value[0], int) else [value]
    texts, tokens = [], 0
    for item in several:
        if isinstance(item, str):
            tokens += count(item)
        elif item and isinstance(item, list) and all(isinstance(token, int) for token in item):
            tokens += len(item)
        else:
            raise wrong_type(name, "a string, a list of tokens, or a list of either")
        texts.append(item if isinstance(item, str) else " ".join(map(str, item)))
    return texts, tokens


def write(ask: Ask, author: Callable[[str], Answer], ident: str) -> Json:
    """The whole completion: `n` choices for each prompt."""
    answers = [answer for answer in map(author, ask.prompts) for _ in range(ask.n)]
    return {
        "id": f"cmpl-{ident}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": ask.model,
        "choices": [_choice(index, answer) for index, answer in enumerate(answers)],
        "usage": usage(ask.prompt_tokens, sum(answer.tokens for answer in answers)),
        "system_fingerprint": "fp_simulated",
    }


def _choice(index: int, answer: Answer) -> Json:
    return {
        "text": answer.text,
        "index": index,
        "logprobs": None,
        "finish_reason": "length" if answer.cut else "stop",
    }


def stream(ask: Ask, body: Json) -> list[bytes]:
    """The completion as server-sent events."""
    with_usage = bool((ask.body.get("stream_options") or {}).get("include_usage"))
    head = {name: body[name] for name in ("id", "object", "created", "model", "system_fingerprint")}
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
    for piece in words(choice["text"]):
        yield {**choice, "text": piece, "finish_reason": None}
    yield {**choice, "text": ""}
