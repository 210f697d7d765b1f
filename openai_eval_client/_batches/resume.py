"""What the cache remembers of a call's batches and answers, so that a killed run goes on with them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import hashlib
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from openai_eval_client.models import ModelResponse

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from openai_eval_client._batches.results import Outcome
    from openai_eval_client._cache import Cache, Occurrence
    from openai_eval_client._wire import Parameters


_RECORDED = ("name", "since", "refused", "most_lines", "made", "spans")


@dataclass(kw_only=True)
class JobRecord:
    """A job, recorded before each call that costs, so that a killed run goes on with the same batches."""

    endpoint: str  # such as "/v1/chat/completions"
    window: str  # the completion window, such as "24h"
    metadata: dict[str, str] = field(default_factory=dict)  # the caller's own
    indexes: Sequence[int]  # of its requests, rising
    most_lines: int  # of an input file
    refused: list[str] = field(default_factory=list)  # parameters that the model is known to refuse
    name: str = field(default_factory=lambda: uuid.uuid4().hex)  # in the metadata of each of its batches
    since: float = field(default_factory=time.time)  # seconds since the epoch: no batch of it is older
    made: dict[str, str] = field(default_factory=dict)  # the id of the batch of each file, by the file's key
    spans: list[tuple[int, int]] = field(default_factory=list)  # first line and count of each file
    unclear: set[str] = field(default_factory=set)  # keys of files whose batch may have been created unseen
    recovered: bool = False  # whether an earlier program may have created batches that are not in `made`

    @property
    def total(self) -> int:
        """How many requests it has."""
        return len(self.indexes)

    def to_dict(self) -> dict[str, Any]:
        """Return it as it is recorded."""
        return {"indexes": self._spans, **{name: getattr(self, name) for name in _RECORDED}}

    def recover(self, saved: Mapping[str, Any]) -> JobRecord:
        """Return it as an earlier program recorded it."""
        known = {name: saved[name] for name in _RECORDED}
        indexes = [index for first, count in saved["indexes"] for index in range(first, first + count)]
        return dataclasses.replace(self, **known, indexes=indexes, recovered=True)

    @functools.cached_property
    def _spans(self) -> list[tuple[int, int]]:
        """The indexes as spans of consecutive ones: first and count of each."""
        found: list[tuple[int, int]] = []
        for index in self.indexes:
            if found and index == sum(found[-1]):
                found[-1] = (found[-1][0], found[-1][1] + 1)
            else:
                found.append((index, 1))
        return found


class Journal:
    """The jobs of one call as the cache remembers them; without a cache, none."""

    def __init__(self, cache: Cache | None, name: str) -> None:
        self._store = None if cache is None else cache.journal
        self._name = name

    def exclusive(self) -> contextlib.AbstractAsyncContextManager[Any]:
        """Wait until no other process works under this name, and keep others waiting."""
        return contextlib.nullcontext() if self._store is None else self._store.exclusive(self._name)

    async def load(self) -> list[dict[str, Any]]:
        """Return the records of the jobs."""
        found = await self._store.journal_get(self._name) if self._store else None
        return found["jobs"] if found else []

    async def save(self, jobs: Iterable[JobRecord]) -> None:
        """Record the jobs; they are on disk when the call returns."""
        if self._store is not None:
            await self._store.journal_put(self._name, {"jobs": [job.to_dict() for job in jobs]})

    async def forget(self) -> None:
        """Forget the records."""
        if self._store is not None:
            await self._store.journal_delete(self._name)


_AT_ONCE = 100  # answers looked up or kept at a time


class CachedAnswers:
    """The cached answers to the prompts of one call; without a cache, none."""

    def __init__(self, cache: Cache | None, parameters: Parameters) -> None:
        self.name = ""  # tells these prompts and parameters from all others
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
        """Find the answers there are."""
        if self._cache is None:
            return
        for first in range(0, len(self._samples), _AT_ONCE):
            some = await self._cache.kept(self._samples[first : first + _AT_ONCE], self._parameters)
            self.found.update({first + n: response for n, response in some.items()})

    async def keep(self, outcomes: Mapping[int, Outcome]) -> None:
        """Keep the new answers among outcomes, by the index of their prompt."""
        cache, items = self._cache, list(outcomes.items())
        if cache is None:
            return
        for first in range(0, len(items), _AT_ONCE):
            some = items[first : first + _AT_ONCE]
            answers = [(n, each) for n, each in some if isinstance(each, ModelResponse)]
            await asyncio.gather(*(cache.keep(self._samples[n].key, answer) for n, answer in answers))

    def give_back(self, responses: Sequence[ModelResponse | None]) -> None:
        """Say which prompts have no answer: a later call may ask for them again."""
        for sample, response in zip(self._samples, responses, strict=False):
            if self._cache is not None and response is None:
                self._cache.give_back(sample, self._parameters)

    def _taken(self, cache: Cache, prompts: Sequence[Any]) -> list[Occurrence]:
        return [cache.take(self._parameters.with_prompt(prompt), self._parameters) for prompt in prompts]
