"""What a request asks for and what an answer used, read from the JSON on the wire."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

# The last part of the path of a POST that runs no model, and so counts against no RPM or TPM.
_UNMETERED = frozenset(
    {
        "admin_api_keys", "assistants", "batches", "cancel", "complete", "containers", "content",
        "conversations", "evals", "files", "input_tokens", "items", "jobs", "messages", "parts", "runs",
        "search", "sessions", "submit_tool_outputs", "threads", "uploads", "vector_stores",
    }
)  # fmt: skip
_BAD_REQUEST, _TOO_MANY_REQUESTS, _SERVER_ERROR = 400, 429, 500
FOR_GOOD = ("insufficient_quota", "Request too large")  # 429s that waiting does not cure
_NO_OUTPUT = ("/embeddings", "/moderations")
_OUTPUT_CAPS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
_MOST = 10**12  # tokens: more than any limit; larger numbers would not fit a float
_TAIL = 32_768  # bytes; usage stands at the end of an answer, before at most 16 KB of metadata
_USAGE = re.compile(rb'(?<!\\)"usage"\s*:\s*(?=\{)')


@dataclass(frozen=True, slots=True)
class Demand:
    """What one request asks of the limits.

    Attributes:
        model: Whose budgets it spends; None: only the concurrency bound applies.
        input_tokens: Of its input.
        max_output: Output tokens it may use at most; None: what this model's answers usually take.
    """

    model: str | None
    input_tokens: int = 0
    max_output: int | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one attempt.

    Attributes:
        status: The HTTP status; None where no answer came.
        headers: Of the answer.
        usage: Input and output tokens as the server counted them; None where it did not say.
        message: Of the error, where it is one.
        sent: False where no connection came about, so that nothing was spent.
    """

    status: int | None = None
    headers: Mapping[str, str] | None = None
    usage: tuple[int, int] | None = None
    message: str = ""
    sent: bool = True

    @property
    def ok(self) -> bool:
        """Whether it was answered."""
        return self.status is not None and self.status < _BAD_REQUEST

    @property
    def is_refusal(self) -> bool:
        """Whether the request was refused (4xx) without being worked on."""
        return self.status is not None and _BAD_REQUEST <= self.status < _SERVER_ERROR

    @property
    def is_congestion(self) -> bool:
        """Whether it was refused because there is no room now: not for good, as an empty account is."""
        return self.status == _TOO_MANY_REQUESTS and not any(reason in self.message for reason in FOR_GOOD)


def is_metered(method: str, path: str) -> bool:
    """Return whether a request runs a model, and so spends requests and tokens per minute."""
    return method == "POST" and path.rpartition("/")[2] not in _UNMETERED


def max_output(body: Mapping[str, Any], path: str = "") -> int | None:
    """Return the output tokens a request may use at most, all choices together; None: no bound."""
    if path.endswith(_NO_OUTPUT):
        return 0
    caps = [cap for name in _OUTPUT_CAPS if (cap := token_count(body.get(name))) is not None]
    choices = token_count(body.get("n")) or 1
    return min(caps[0] * choices, _MOST) if caps else None


def usage_counts(usage: object) -> tuple[int, int] | None:
    """Return input and output tokens of a `usage` object of any endpoint; None where it holds none."""
    if not isinstance(usage, dict):
        return None
    given = usage.get("prompt_tokens", usage.get("input_tokens"))
    made = usage.get("completion_tokens", usage.get("output_tokens"))
    counted = token_count(given)
    return None if counted is None else (counted, token_count(made) or 0)


def token_count(value: object) -> int | None:
    """Return a plausible number of tokens, None for anything else."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        return None
    return min(value, _MOST)


def read_usage(tail: bytes) -> tuple[int, int] | None:
    """Return input and output tokens from the last `usage` object in the end of a body or stream."""
    for match in reversed(list(_USAGE.finditer(tail))):
        try:
            usage, _ = json.JSONDecoder().raw_decode(tail[match.end() :].decode(errors="replace"))
        except (ValueError, RecursionError):
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
