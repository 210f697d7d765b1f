"""The most that a request can cost, told before it is sent; and what it came to."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Mapping
from decimal import Decimal
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from openai_eval_client._cost.pricing import exact
from openai_eval_client._log import warn
from openai_eval_client._wire import is_free, token_count
from openai_eval_client.errors import ValidationError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from openai_eval_client._cost.ledger import Ledger
    from openai_eval_client._tokens import TokenCounter
    from openai_eval_client._wire import Demand, Outcome


_NOTHING = Decimal(0)
_CAPS = {  # what bounds the output, by the end of the path; the first that fits
    "/chat/completions": ("max_completion_tokens", "max_tokens"),
    "/completions": ("max_tokens",),
    "/responses": ("max_output_tokens",),
    "/embeddings": (),
}
_CHOICES = ("n", "best_of")
# Parameters that make input which cannot be seen from here.
_UNSEEN = ("conversation", "previous_response_id", "web_search_options")
_OWN_TOOLS = frozenset({"function", "custom"})  # which the caller runs; all others the provider does
_FILES = frozenset({"file", "input_file"})


class _Size(NamedTuple):
    """What a request may use at most: input and output tokens, and whether there may be sound in either."""

    tokens: int
    output: int
    heard: bool
    spoken: bool


class CostBounds:
    """Says what requests can cost, and what they did."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._surprises: deque[tuple[str, Decimal, Decimal]] = deque()
        self._surprised: set[str] = set()

    async def most(self, body: Mapping[str, Any], path: str, counter: TokenCounter) -> Decimal:
        """Return the most that one attempt can cost, in USD."""
        # That is all its input at the dearest price that input of this model can have, and all the output
        # that it allows: at the ordinary price or that of the service tier asked for, whichever is higher.
        if is_free(path):
            return _NOTHING
        output = most_output(body, path)
        await self._ledger.pricer_for(None).ready()
        return self._priced(body, await counter.most_input(body), output, batch=False)

    async def ready(self) -> None:
        """Load the price list, for `most_by_batch`."""
        await self._ledger.pricer_for(None).ready()

    def most_by_batch(self, body: Mapping[str, Any], path: str, counter: TokenCounter) -> Decimal:
        """Return the same for one line of a batch; takes as long as counting does: for a thread."""
        output = most_output(body, path)
        return self._priced(body, counter.most_input_now(body), output, batch=True)

    def actual(self, demand: Demand, outcome: Outcome) -> Decimal:
        """Return what an attempt came to, in USD; the most it can cost where nothing says so."""
        # Nothing, where no connection came about or it was refused with an error status.
        most, usage = demand.most_cost or _NOTHING, outcome.counted
        refused = outcome.status is not None and not outcome.ok
        if usage is None:
            return _NOTHING if refused or not outcome.sent else most
        pricer, model = self._ledger.pricer_for(None), usage.model or str(demand.model)
        rates = pricer.rates(model, batch=False, service_tier=usage.service_tier, at=time.time())
        with exact():
            cost = None if rates is None else rates.price(usage)
        if cost is None:
            return most
        if cost > most and model not in self._surprised:
            self._surprised.add(model)
            self._surprises.append((model, cost, most))
        return cost

    def _priced(self, body: Mapping[str, Any], tokens: int, output: int, *, batch: bool) -> Decimal:
        model, tier = body.get("model"), body.get("service_tier")
        if not isinstance(model, str):
            _reject(f"what model={model!r} costs is not known")
        parts = list(_parts(chain(_listed(body.get("messages")), _listed(body.get("input")))))
        _check_seen(parts)
        tokens += sum(
            len(hidden) for part in parts if isinstance(hidden := part.get("encrypted_content"), str)
        )
        heard = any(part.get("type") == "input_audio" for part in parts)
        size = _Size(tokens, output, heard, "audio" in (body.get("modalities") or ()))
        tiers = {None, tier if isinstance(tier, str) and not batch else None}
        with exact():
            return max(self._most(model, each, size, batch=batch) for each in tiers)

    def _most(self, model: str, tier: str | None, size: _Size, *, batch: bool) -> Decimal:
        pricer = self._ledger.pricer_for(None)
        rates = pricer.rates(model, batch=batch, service_tier=tier, at=time.time())
        most = (
            None
            if rates is None
            else rates.most(size.tokens, size.output, heard=size.heard, spoken=size.spoken)
        )
        if most is None:
            kind = "batch price" if batch else f"price in service tier {tier!r}" if tier else "price"
            _reject(f"the {kind} of model={model!r} is not known, so what is spent could not be held to it")
        return most

    def say_surprises(self) -> None:
        """Log what was noticed where nothing could be logged: a log handler has a lock of its own."""
        text = "an answer of %s cost %s USD, more than the %s reserved for it: max_cost may be overspent"
        with contextlib.suppress(IndexError):  # there are none, or none any more: another thread logs too
            while True:
                model, cost, most = self._surprises.popleft()
                warn(text, model, cost, most, event="overspent", model=model, cost=float(cost))


def most_output(body: Mapping[str, Any], path: str) -> int:
    """Return the tokens that all answers to a request can have together."""
    names = next((names for end, names in _CAPS.items() if path.endswith(end)), None)
    if names is None:
        _reject(f"what a request to {path} costs is not known beforehand")
    _check_parameters(body)
    if not names:
        return 0
    caps = [token_count(body[name]) for name in names if body.get(name) is not None]
    bounds = [cap for cap in caps if cap is not None]
    if not caps or len(bounds) < len(caps):
        _reject("needs max_tokens (or max_completion_tokens, max_output_tokens), a whole number")
    predicted = len(str(body["prediction"]).encode()) if body.get("prediction") else 0
    return (max(bounds) + predicted) * _choices(body) * _prompts(body.get("prompt"))


def _choices(body: Mapping[str, Any]) -> int:
    """Return how many answers each prompt gets."""
    given = [body[name] for name in _CHOICES if body.get(name) is not None]
    counts = [count for value in given if (count := token_count(value))]
    if len(counts) < len(given):
        _reject(f"needs n (and best_of) to be whole numbers, not {given}")
    return max(counts, default=1)


def _prompts(prompt: object) -> int:
    """Return how many prompts a request to the completions endpoint has."""
    several = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
    return len(prompt) if several and isinstance(prompt, list) else 1


def _check_parameters(body: Mapping[str, Any]) -> None:
    unseen = [name for name in _UNSEEN if body.get(name) is not None]
    unseen += ["prompt"] if isinstance(body.get("prompt"), Mapping) else []
    if unseen:
        _reject(f"what {unseen[0]} adds to the input is not known beforehand")
    for tool in _listed(body.get("tools")):
        kind = tool.get("type", "function") if isinstance(tool, Mapping) else None
        if kind not in _OWN_TOOLS:
            _reject(f"what a tool of type {kind!r} costs is not known beforehand")


def _check_seen(parts: list[Mapping[str, Any]]) -> None:
    """Refuse input that is elsewhere."""
    for part in parts:
        kind = part.get("type")
        file = part.get("file", part)
        named = kind in _FILES and not isinstance(
            file.get("file_data") if isinstance(file, Mapping) else 0,
            str,
        )
        if named or kind == "item_reference":
            _reject(f"how large a {kind} is that is only named is not known beforehand", field="prompt")


def _parts(values: Iterator[Any]) -> Iterator[Mapping[str, Any]]:
    """Yield every object in messages or input items, those within others too."""
    for value in values:
        if isinstance(value, Mapping):
            yield value
            yield from _parts(iter(value.values()))
        elif isinstance(value, list | tuple):
            yield from _parts(iter(value))


def _listed(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else ()


def _reject(why: str, *, field: str = "max_cost") -> NoReturn:
    raise ValidationError(f"max_cost: {why}", field=field)
