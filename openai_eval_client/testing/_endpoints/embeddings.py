"""POST /embeddings."""

from __future__ import annotations

import base64
import math
import struct
from functools import partial
from random import Random
from typing import TYPE_CHECKING

from . import checks
from .answers import Ask, Count, Generation, Json, model_of, number, required, texts_read

if TYPE_CHECKING:
    from .._options import Options

DIMENSIONS = {"text-embedding-3-large": 3072}
DEFAULT_DIMENSIONS = 1536


def _read(body: Json, count: Count) -> Ask:
    model = model_of(body)
    texts, tokens = texts_read(required(body, "input"), "input", count)
    return Ask(model=model, body=body, prompts=texts, prompt_tokens=tokens, cap=0)  # it generates no tokens


def _write(ask: Ask, _options: Options, _ident: str) -> Json:
    size = number(ask.body, "dimensions") or DIMENSIONS.get(ask.model, DEFAULT_DIMENSIONS)
    encode = _packed if ask.body.get("encoding_format") == "base64" else list
    data = [
        {"object": "embedding", "index": index, "embedding": encode(_vector(text, size))}
        for index, text in enumerate(ask.prompts)
    ]
    usage = {"prompt_tokens": ask.prompt_tokens, "total_tokens": ask.prompt_tokens}
    return {"object": "list", "data": data, "model": ask.model, "usage": usage}


def _vector(text: str, size: int) -> list[float]:
    """Return a unit vector, always the same for the same text."""
    generator = Random(text.encode("utf-8", "surrogatepass"))
    raw = [generator.random() - 0.5 for _ in range(size)]
    length = math.hypot(*raw)
    return [value / length for value in raw]


def _packed(values: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()


EMBEDDINGS = Generation(check=partial(checks.check, known=checks.EMBEDDINGS), read=_read, write=_write)
