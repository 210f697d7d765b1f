"""The answers kept from earlier runs of one call by the Batch API, and where its own are kept."""

from __future__ import annotations

import asyncio
import hashlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from openai_eval_client._cache import Cache
    from openai_eval_client._keys import Sample
    from openai_eval_client._requests import Parameters
    from openai_eval_client.models import ModelResponse

_AT_ONCE = 100  # answers looked up or kept at a time


class Kept:
    """What is kept of the answers to the prompts of one call; without a cache, nothing.

    Attributes:
        name: The same for the same call in another run; "" without a cache.
        found: The answers kept before, by the index of their prompt.
    """

    def __init__(self, cache: Cache | None, parameters: Parameters) -> None:
        self.name = ""
        self.found: dict[int, ModelResponse] = {}
        self._cache = cache
        self._parameters = parameters
        self._samples: list[Sample] = []

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

    def _taken(self, cache: Cache, prompts: Sequence[Any]) -> list[Sample]:
        return [cache.take(self._parameters.with_prompt(prompt), self._parameters) for prompt in prompts]
