"""What the cache remembers of batches, so that a killed run goes on with them."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from openai_eval_client._batches.files import InputFile
    from openai_eval_client._cache import Cache, Occurrence
    from openai_eval_client._wire import Parameters
    from openai_eval_client.models import ModelResponse


class Store(Protocol):
    """Where records are kept; each is on disk when the call returns."""

    async def journal_get(self, key: str) -> dict[str, Any] | None:
        """Return a record."""

    async def journal_put(self, key: str, value: dict[str, Any]) -> None:
        """Keep a record."""

    async def journal_delete(self, key: str) -> None:
        """Forget a record."""

    def exclusive(self, name: str) -> contextlib.AbstractAsyncContextManager[Any]:
        """Wait until nobody else holds this name, in any process, and hold it."""


@dataclass(slots=True)
class JobRecord:
    """A job written down before the first call on the network, so that nothing is done twice."""

    # stands in the metadata of every batch made of it
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    # when it was first wished for, in seconds since the epoch
    since: float = field(default_factory=time.time)
    made: dict[str, str] = field(default_factory=dict)  # the id of the batch of each part, by the part's key
    # the count of each part by its first line, where parts were cut
    spans: list[tuple[int, int]] = field(default_factory=list)
    # the keys of the parts whose batch may have been created without our knowing
    unclear: set[str] = field(default_factory=set)
    recovered: bool = False  # whether an earlier program may have created batches that are not in `made`

    def note(self, parts: Iterable[InputFile]) -> None:
        """Remember how the parts are cut now."""
        spans = dict(self.spans)
        spans.update((part.first, part.count) for part in parts)
        self.spans = sorted(spans.items())

    def to_dict(self) -> dict[str, Any]:
        """Return it as it is recorded."""
        return {"name": self.name, "since": self.since, "made": dict(self.made), "spans": self.spans}

    @classmethod
    def recover(cls, record: dict[str, Any]) -> JobRecord:
        """Return one that an earlier program recorded."""
        spans = [(first, count) for first, count in record["spans"]]
        return cls(record["name"], record["since"], dict(record["made"]), spans, recovered=True)


class Journal:
    """The records under one name; without a store, nothing is kept and nothing found."""

    def __init__(self, store: Store | None, name: str) -> None:
        self._store = store
        self._name = name

    def exclusive(self) -> contextlib.AbstractAsyncContextManager[Any]:
        """Wait until no other process works under this name, and keep others waiting."""
        return contextlib.nullcontext() if self._store is None else self._store.exclusive(self._name)

    async def load(self) -> dict[str, Any]:
        """Return the record; an empty one where there is none."""
        return (await self._store.journal_get(self._name) if self._store else None) or {}

    async def save(self, record: dict[str, Any]) -> None:
        """Keep a record."""
        if self._store is not None:
            await self._store.journal_put(self._name, record)

    async def forget(self) -> None:
        """Forget the record."""
        if self._store is not None:
            await self._store.journal_delete(self._name)


def runs(indexes: Sequence[int]) -> list[tuple[int, int]]:
    """Return rising numbers as runs of consecutive ones: first and count of each."""
    found: list[tuple[int, int]] = []
    for index in indexes:
        if found and index == sum(found[-1]):
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((index, 1))
    return found


def unrolled(found: Iterable[Sequence[int]]) -> list[int]:
    """Return the numbers that `runs` was given."""
    return [index for first, count in found for index in range(first, first + count)]


_AT_ONCE = 100  # answers looked up or kept at a time


class CachedAnswers:
    """What is kept of the answers to the prompts of one call; without a cache, nothing."""

    def __init__(self, cache: Cache | None, parameters: Parameters) -> None:
        self.name = ""
        self.found: dict[int, ModelResponse] = {}
        self._cache = cache
        self._parameters = parameters
        self._samples: list[Occurrence] = []

    async def take(self, prompts: Sequence[Any]) -> None:
        """Say which prompts are asked."""
        if self._cache is not None:
            self._samples = await asyncio.to_thread(self._taken, self._cache, prompts)
            self.name = hashlib.sha256(b"".join(sample.key for sample in self._samples)).hexdigest()

    async def look_up(self) -> None:
        """Find what is kept of the answers."""
        cache = self._cache
        if cache is None:
            return
        for first in range(0, len(self._samples), _AT_ONCE):
            some = await cache.kept(self._samples[first : first + _AT_ONCE], self._parameters)
            self.found.update({first + n: response for n, response in some.items()})

    async def keep(self, responses: Mapping[int, ModelResponse]) -> None:
        """Keep new answers, by the index of their prompt."""
        cache, items = self._cache, list(responses.items())
        if cache is None:
            return
        for first in range(0, len(items), _AT_ONCE):
            some = items[first : first + _AT_ONCE]
            await asyncio.gather(*(cache.keep(self._samples[n].key, response) for n, response in some))

    def give_back(self, answered: Collection[int]) -> None:
        """Say which prompts were answered: a later call may ask for the others again."""
        for index, sample in enumerate(self._samples):
            if self._cache is not None and index not in answered:
                self._cache.give_back(sample, self._parameters)

    def _taken(self, cache: Cache, prompts: Sequence[Any]) -> list[Occurrence]:
        return [cache.take(self._parameters.with_prompt(prompt), self._parameters) for prompt in prompts]
