"""What a worker has to tell the others: it travels with the next question."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openai_eval_client._headers import Quota
    from openai_eval_client._view import Place


class News:
    """Collects what happened since the worker spoke last; in the words of `_shared.lua`.

    Attributes:
        urgent: Whether the others should know at once.
    """

    def __init__(self) -> None:
        self.urgent = False
        self._sums: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._heard: dict[int, dict[str, float]] = {}
        self._back: list[tuple[float, float, float]] = []
        self._refused: list[dict[str, Any]] = []
        self._pause_until = 0.0

    def __bool__(self) -> bool:
        return bool(self._sums or self._back or self._heard or self._refused or self._pause_until)

    @property
    def spent(self) -> tuple[float, float]:
        """What was spent while the worker was alone: requests and tokens."""
        requests, tokens = self._sums["spent"]
        return requests, tokens

    def add(self, what: str, requests: float, tokens: float) -> None:
        """Sum up what was spent, credited, owed or served."""
        sums = self._sums[what]
        sums[0] += requests
        sums[1] += tokens

    def give_back(self, place: Place, tokens: float) -> None:
        """Pass on that what was reserved at a place is not needed."""
        self._back.append((*place, tokens))

    def hear(  # noqa: PLR0917  # as they come from the headers
        self, line: int, quota: Quota, rate: float, size: float, place: float, sent_at: float
    ) -> None:
        """Pass on what the headers say, where no fresher request has been answered.

        Args:
            line: The dimension, from 0.
            quota: What they say.
            rate: The refill, in units a second.
            size: The size of the server's bucket, in units.
            place: What had been reserved up to the request that was answered, itself included.
            sent_at: Clock time at which that was sent.
        """
        known = self._heard.get(line)
        if known is None or known["age"] <= sent_at:
            word = {"line": line + 1, "rate": rate, "size": size, "left": quota.remaining, "place": place}
            self._heard[line] = {**word, "age": sent_at}

    def refuse(self, line: int, amount: float, wait: float, place: float, *, spoke: bool) -> None:
        """Pass on a refusal, as `Belief.refused` takes it; `place` as `hear` does."""
        word = {"line": line + 1, "amount": amount, "wait": wait, "spoke": spoke, "place": place}
        self._refused.append(word)
        self.urgent = True

    def pause(self, until: float) -> None:
        """Pass on that the server wants nobody to go until that clock time."""
        self._pause_until = max(self._pause_until, until)
        self.urgent = True

    def told(self, now: float) -> dict[str, Any]:
        """Return all of it; times become ages in seconds."""
        told: dict[str, Any] = dict(self._sums)
        if self._heard:
            told["heard"] = [{**word, "age": max(now - word["age"], 0.0)} for word in self._heard.values()]
        if self._back:
            told["back"] = self._back
        if self._refused:
            told["refused"] = self._refused
        if self._pause_until > now:
            told["pause"] = self._pause_until - now
        return told
