"""POST /embeddings."""

from __future__ import annotations

import base64
import math
import struct
from random import Random
from typing import TYPE_CHECKING

from .answers import Answer, Ask, Count, Json, model_of, number, required
from .completions import inputs

if TYPE_CHECKING:
    from collections.abc import Callable

DIMENSIONS = {"text-embedding-3-large": 3072}
DEFAULT_DIMENSIONS = 1536


def read(body: Json, count: Count) -> Ask:
    """Understand a request; it generates nothing, so its cap is 0."""
    model = model_of(body)
    texts, tokens = inputs(required(body, "input"), "input", count)
    return Ask(model=model, body=body, prompts=texts, prompt_tokens=tokens, cap=0)


def write(ask: Ask, _author: Callable[[str], Answer], _ident: str) -> Json:
    """A unit vector for each input."""
    size = number(ask.body, "dimensions") or DIMENSIONS.get(ask.model, DEFAULT_DIMENSIONS)
    encode = _packed if ask.body.get("encoding_format") == "base64" else list
    data = [
        {"object": "embedding", "index": index, "embedding": encode(vector(text, size))}
        for index, text in enumerate(ask.prompts)
    ]
    usage = {"prompt_tokens": ask.prompt_tokens, "total_tokens": ask.prompt_tokens}
    return {"object": "list", "data": data, "model": ask.model, "usage": usage}


def vector(text: str, size: int) -> list[float]:
    """A unit vector that is always the same for the same text."""
    generator = Random(text.encode("utf-8", "surrogatepass"))
    raw = [generator.random() - 0.5 for _ in range(size)]
    length = math.hypot(*raw)
    return [value / length for value in raw]


def _packed(values: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()
