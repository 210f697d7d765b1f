"""What one attempt may meet: a deadline, a model that refuses a parameter, an error that shows the key."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

from openai_eval_client.errors import sdk_httpx

if sys.version_info >= (3, 11):
    from asyncio import timeout as deadline
else:
    from async_timeout import timeout as deadline

if TYPE_CHECKING:
    import openai

__all__ = ["Refusals", "deadline", "forget_key"]

logger = logging.getLogger("openai_eval_client")

# What a model may refuse, and what takes its place: learnt from its 400, never guessed from its name.
_SUBSTITUTES: dict[str, str | None] = {"max_tokens": "max_completion_tokens", "temperature": None}
_SHORTEST_KEY = 6  # characters; shorter ones are placeholders, and stand in ordinary words
_REFUSALS = frozenset({"unsupported_parameter", "unsupported_value"})


class Refusals:
    """Remembers which parameters each model refuses."""

    def __init__(self) -> None:
        self._of_model: dict[str, set[str]] = {}

    def adapted(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the body without what its model is known to refuse."""
        refused = self._of_model.get(body["model"])
        if not refused:
            return body
        adapted = {name: value for name, value in body.items() if name not in refused}
        for name in refused & body.keys():
            substitute = _SUBSTITUTES[name]
            if substitute is not None:
                adapted.setdefault(substitute, body[name])
        return adapted

    def learn(self, error: openai.BadRequestError, sent: dict[str, Any]) -> bool:
        """Remember a parameter that the model refuses; False where sending again would not help."""
        name, model = error.param, sent["model"]
        if error.code not in _REFUSALS or name not in _SUBSTITUTES or name not in sent:
            return False
        known = self._of_model.setdefault(model, set())
        if name not in known:
            instead = _SUBSTITUTES[name] or "without it"
            logger.info("%s refuses %s: sending %s from now on", model, name, instead)
            known.add(name)
        return True


def forget_key(error: openai.APIError, key: str) -> None:
    """Take the key out of an error: out of its request's headers, and out of a message that echoes it."""
    for name in ("authorization", "api-key"):
        error.request.headers.pop(name, None)
    if len(key) >= _SHORTEST_KEY and key in f"{error.message}{error.body}{error.args}":
        error.message = error.message.replace(key, "[key]")
        error.args = (error.message,)
        error.body = None
        response = getattr(error, "response", None)
        if response is not None:
            error.__dict__["response"] = sdk_httpx().Response(response.status_code, request=error.request)
