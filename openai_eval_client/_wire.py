"""What a request asks for and what an answer used, read from the JSON on the wire."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

# Resources that run no model themselves: their requests count against no RPM or TPM.
_UNMETERED = frozenset(
    {
        "admin", "assistants", "batches", "containers", "conversations", "evals", "files", "fine_tuning",
        "organization", "realtime", "threads", "uploads", "vector_stores", "webhooks",
    }
)  # fmt: skip
_NO_OUTPUT = ("/embeddings", "/moderations")
_OUTPUT_CAPS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
_TAIL = 32_768  # bytes; usage stands at the end of an answer, before at most 16 KB of metadata
_USAGE = re.compile(rb'(?<!\\)"usage"\s*:\s*(?=\{)')


def is_metered(method: str, path: str) -> bool:
    """Return whether a request runs a model, and so spends requests and tokens per minute."""
    return method == "POST" and _UNMETERED.isdisjoint(path.split("/"))


def max_output(body: Mapping[str, Any], path: str = "") -> int | None:
    """Return the output tokens a request may use at most, all choices together; None: no bound."""
    if path.endswith(_NO_OUTPUT):
        return 0
    caps = [body[name] for name in _OUTPUT_CAPS if isinstance(body.get(name), int)]
    choices = body.get("n")
    return caps[0] * (choices if isinstance(choices, int) else 1) if caps else None


def usage_counts(usage: object) -> tuple[int, int] | None:
    """Return input and output tokens of a `usage` object of any endpoint; None where it holds none."""
    if not isinstance(usage, dict):
        return None
    given = usage.get("prompt_tokens", usage.get("input_tokens"))
    made = usage.get("completion_tokens", usage.get("output_tokens"))
    if not isinstance(given, int):
        return None
    return given, made if isinstance(made, int) else 0


def read_usage(tail: bytes) -> tuple[int, int] | None:
    """Return input and output tokens from the last `usage` object in the end of a body or stream."""
    for match in reversed(list(_USAGE.finditer(tail))):
        try:
            usage, _ = json.JSONDecoder().raw_decode(tail[match.end() :].decode(errors="replace"))
        except ValueError:
            continue
        counts = usage_counts(usage)
        if counts is not None:
            return counts
    return None


class Tail:
    """Remembers the end of a stream, in bounded memory."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, chunk: bytes) -> None:
        """Take in the next bytes."""
        self._data += chunk
        if len(self._data) > 2 * _TAIL:
            del self._data[:-_TAIL]

    def read(self) -> bytes:
        """Return the last bytes."""
        return bytes(self._data[-_TAIL:])
