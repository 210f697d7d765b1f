"""What all batches of one pass of requests have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from openai_eval_client._batch_funds import Funds
    from openai_eval_client._batch_results import Outcome


@dataclass(frozen=True, slots=True)
class Plan:
    """What all batches of a round have in common.

    Attributes:
        endpoint: Such as "/v1/chat/completions".
        window: The completion window.
        polling_interval: Seconds between two looks.
        schema: The pydantic class the answers are to fit, where there is one.
        save: Called whenever the intent has changed, before and after each step that costs.
        keep: Called with the outcomes of each batch, before they are handed on.
        tell: Called with the number of requests that are done.
        funds: Pays for them.
    """

    endpoint: str
    window: str
    polling_interval: float
    schema: Any
    save: Callable[[], Awaitable[None]]
    keep: Callable[[dict[int, Outcome]], Awaitable[None]]
    tell: Callable[[int], Awaitable[None]]
    funds: Funds
