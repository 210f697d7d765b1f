"""What came in, and what became of it."""

from __future__ import annotations

import json
import threading
from collections import Counter, deque
from dataclasses import dataclass, fields, replace
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One HTTP attempt on an API path, refused ones included.

    Attributes:
        index: Order of arrival, from 0; goes on counting after a reset.
        at: Arrival, in seconds since the server started.
        method: HTTP method.
        path: Path, /v1 included.
        model: The model asked for, None where the request named none.
        status: HTTP status; 0 when nothing was answered: dropped, hung, or the client left first.
        fault: The fault that befell it, if any.
        prompt_tokens: Tokens of the prompt, 0 where none was read.
        completion_tokens: Tokens generated, 0 where no answer was produced.
        charged_tokens: Tokens taken from the model's tokens-per-minute budget.
        body: The JSON request, None where there was none.
        headers: Request headers in lower case, without authorization.
    """

    index: int
    at: float
    method: str
    path: str
    model: str | None
    status: int
    fault: str | None
    prompt_tokens: int
    completion_tokens: int
    charged_tokens: int
    body: dict[str, Any] | None
    headers: dict[str, str]

    @property
    def served(self) -> bool:
        """An answer was produced, and would be billed, whether or not it arrived whole."""
        return self.status == 200  # noqa: PLR2004

    def as_json(self) -> dict[str, Any]:
        """Return the fields by name, not copied."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


class Recorder:
    """Calls and counters. Written by the server's loop, read from any thread."""

    def __init__(self, keep: int) -> None:
        self._lock = threading.Lock()
        self._calls: deque[tuple[Call, bytes | None]] = deque(maxlen=keep)
        self._counts: Counter[str] = Counter()
        self._arrived = 0
        self.generations = 0
        self.in_flight = 0
        self.max_in_flight = 0

    def arrive(self) -> int:
        """Count a request in and give it its index."""
        index, self._arrived = self._arrived, self._arrived + 1
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        return index

    def leave(self) -> None:
        """Count a request out."""
        self.in_flight -= 1

    def note(self, call: Call, raw: bytes | None) -> None:
        """Keep what became of a request, its JSON body unparsed: kept objects slow the garbage collector."""
        keys = {str(call.status) if call.status else call.fault or "disconnect", call.fault}
        with self._lock:
            self._calls.append((call, raw))
            self._counts.update(key for key in keys if key)

    def reset(self) -> None:
        """Forget everything but the requests now in flight."""
        with self._lock:
            self._calls.clear()
            self._counts.clear()
        self.generations = 0
        self.max_in_flight = self.in_flight

    def calls(self) -> list[Call]:
        """The calls kept, in order of arrival."""
        with self._lock:
            kept = list(self._calls)
        kept.sort(key=lambda pair: pair[0].index)
        return [call if raw is None else replace(call, body=json.loads(raw)) for call, raw in kept]

    def state(self) -> dict[str, Any]:
        """The counters."""
        with self._lock:
            counts = dict(self._counts)
        return {"counts": counts, "in_flight": self.in_flight, "max_in_flight": self.max_in_flight}
