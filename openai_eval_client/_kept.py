"""What a cache file holds, summed up: read only, while others may write it."""

from __future__ import annotations

import zlib
from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from openai_eval_client._database import Database
from openai_eval_client._stats import Histogram
from openai_eval_client._store import is_intact, unpacked
from openai_eval_client._wire import Usage, read_json, token_count, usage_of

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Mapping
    from pathlib import Path

_MODELS = 200  # that are told apart
_REASONS = 12
_LONGEST = 200  # characters of a name
_ROWS = "SELECT key, created, value, checksum FROM answers"


@dataclass(slots=True)
class KeptModel:
    """What is kept of one model.

    Attributes:
        answers: How many answers.
        prompt_tokens: Their input.
        completion_tokens: Their output.
        cost: USD of those that have a price.
        unpriced: Those that have none.
    """

    answers: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    unpriced: int = 0


@dataclass(slots=True)
class Kept:
    """What a cache file holds.

    Attributes:
        name: The file, as it was given.
        times: When each answer was kept, in seconds since 1970.
        tokens: What each came to.
        models: What is kept of each model.
        reasons: How often answers ended for which reason.
        latency: How long they took, but for those without a latency of their own (batches).
        unreadable: Entries that are damaged.
        journal: Entries of batch jobs that are not settled.
    """

    name: str
    times: array[float] = field(default_factory=lambda: array("d"))
    tokens: array[float] = field(default_factory=lambda: array("d"))
    models: dict[str, KeptModel] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)
    latency: Histogram = field(default_factory=Histogram)
    unreadable: int = 0
    journal: int = 0

    def add(self, created: float, kept: Mapping[str, Any]) -> None:
        """Add an answer as it is kept.

        Raises:
            LookupError: It is no answer.
            TypeError: Likewise.
            ValueError: Likewise.
        """
        body = kept["response"]["body"]
        used = usage_of(body) or _estimated(kept["usage"])
        cost, latency = kept["cost"], float(kept["latency_ms"]) / 1000
        model = self._of(body.get("model"))
        model.answers += 1
        model.prompt_tokens += used.prompt_tokens
        model.completion_tokens += used.completion_tokens
        model.cost += 0.0 if cost is None else float(cost)
        model.unpriced += cost is None
        self.reasons[self._known(_reason(body), self.reasons, _REASONS)] += 1
        self.times.append(created)
        self.tokens.append(used.prompt_tokens + used.completion_tokens)
        if latency > 0:
            self.latency.add(latency)

    def _of(self, name: object) -> KeptModel:
        return self.models.setdefault(self._known(name, self.models, _MODELS), KeptModel())

    @staticmethod
    def _known(name: object, among: Mapping[str, Any], most: int) -> str:
        text = name[:_LONGEST] if isinstance(name, str) and name else "not said"
        return text if text in among or len(among) < most else "others"


def read_kept(path: str | Path) -> Kept:
    """Sum up what a cache file holds.

    Args:
        path: The file.

    Returns:
        Its sums, as of one moment.

    Raises:
        ValidationError: There is no such file, or it is no cache of ours that can be read.
    """
    database = Database(path, read_only=True)

    def read(connection: sqlite3.Connection) -> Kept:
        kept = Kept(database.name)
        connection.execute("BEGIN")
        for row in connection.execute(_ROWS):
            _take(kept, *row)
        (kept.journal,) = connection.execute("SELECT count(*) FROM journal").fetchone()
        return kept

    return database.look(read)


def _take(kept: Kept, key: bytes, created: float, value: bytes, checksum: bytes) -> None:
    try:
        if not is_intact(key, (created, value, checksum)):
            raise ValueError("wrong checksum")  # noqa: TRY301  # counted as all others are
        kept.add(created, read_json(unpacked(value)))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, zlib.error):
        kept.unreadable += 1


def _estimated(usage: Mapping[str, Any]) -> Usage:
    given, made = (token_count(usage[name]) or 0 for name in ("prompt_tokens", "completion_tokens"))
    return Usage(given, made, estimated=True)


def _reason(body: Mapping[str, Any]) -> object:
    """Return why an answer ended, in the API's words: of a chat completion, or of the Responses API."""
    choices = body.get("choices")
    if isinstance(choices, list):
        return choices[0].get("finish_reason") if choices else None
    details = body.get("incomplete_details")
    return details.get("reason") if isinstance(details, dict) else body.get("status")
