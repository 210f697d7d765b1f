"""What the server's own counts teach about estimates of tokens."""

from __future__ import annotations

import threading
from typing import TypeVar

_K = TypeVar("_K")
_V = TypeVar("_V")

_MODELS = 1024


class Corrections:
    """The ratio of real to counted text tokens per model, from the answers to what was counted."""

    _WEIGHT = 0.2
    _LOWEST, _HIGHEST = 0.25, 4.0
    _UNANSWERED = 4096

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ratios: dict[tuple[str, bool], float] = {}
        self._given: dict[tuple[str, int], tuple[tuple[str, bool], int, int]] = {}

    def apply(self, key: tuple[str, bool], fixed: int, tokens: int) -> int:
        """Corrects a count, and remembers what it was made of: by the time of its answer the ratio moved."""
        with self._lock:
            counted = fixed + round(tokens * self._ratios.get(key, 1.0))
            put(self._given, (key[0], counted), (key, fixed, tokens), self._UNANSWERED)
        return counted

    def observe(self, model: str, counted: int, actual: int) -> None:
        """Moves the ratio towards what this answer shows."""
        with self._lock:
            key, fixed, tokens = self._given.get((model, counted), (None, 0, 0))
            if key is None or not tokens:
                return
            seen = min(self._HIGHEST, max(self._LOWEST, (actual - fixed) / tokens))
            ratio = self._ratios.get(key, 1.0)
            put(self._ratios, key, ratio + self._WEIGHT * (seen - ratio), _MODELS)


def put(bounded: dict[_K, _V], key: _K, value: _V, most: int) -> None:
    """Stores a value, and forgets the oldest one when there are too many."""
    if key not in bounded and len(bounded) >= most:
        del bounded[next(iter(bounded))]
    bounded[key] = value
