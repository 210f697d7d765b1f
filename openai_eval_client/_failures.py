"""What went wrong, by kind: never by message, for that may quote a prompt or a key."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import openai

_MOST = 60  # kinds that are told apart
_WORD = re.compile(r"[a-z]+(?:_[a-z]+)*")
_CODE = re.compile(r'"code"\s*:\s*"([a-z_]{1,48})"')
_LONGEST = 48
_LONGEST_BODY = 16_384
_OTHER = "other"
_SERVER_ERROR = 500
_BY_STATUS: dict[int, type[openai.APIStatusError]] = {
    400: openai.BadRequestError,
    401: openai.AuthenticationError,
    403: openai.PermissionDeniedError,
    404: openai.NotFoundError,
    409: openai.ConflictError,
    422: openai.UnprocessableEntityError,
    429: openai.RateLimitError,
}


@dataclass(slots=True)
class Failure:
    """One kind of failure of one model.

    Attributes:
        model: The model that was asked.
        kind: The class of the error.
        status: The HTTP status; None where no answer came, or nothing was sent.
        code: The API's word for it; "" where it has none.
        attempts: How many attempts ended so.
        prompts: How many prompts failed for good with it.
        first: When it was first seen, in seconds since 1970.
        last: When it was last seen.
    """

    model: str
    kind: str
    status: int | None
    code: str
    attempts: int = 0
    prompts: int = 0
    first: float = 0.0
    last: float = 0.0


class Failures:
    """Counts them, in bounded memory; whoever calls it holds a lock."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, str, int | None, str], Failure] = {}

    def raised(self, model: str, error: Exception, *, for_good: bool) -> None:
        """Count an error that an attempt, or a prompt for good, ended with."""
        row = self._row(model, type(error).__name__, status_of(error), code_of(error))
        row.attempts += isinstance(error, openai.APIError)  # of the others, nothing was sent
        row.prompts += for_good

    def refused(self, model: str, status: int | None, body: str, *, for_good: bool) -> None:
        """Count an attempt whose error the SDK will make: of what came back, or where nothing did."""
        kind = "APIConnectionError" if status is None else class_of(status).__name__
        found = _CODE.search(body[:_LONGEST_BODY])
        row = self._row(model, kind, status, found[1] if found else "")
        row.attempts += 1
        row.prompts += for_good

    def rows(self) -> list[Failure]:
        """Return the kinds there were, the most frequent first."""
        return sorted(self._rows.values(), key=lambda row: (-row.prompts, -row.attempts, row.model))

    def _row(self, model: str, kind: str, status: int | None, code: str) -> Failure:
        now = time.time()
        key = model, kind, status, code
        if key not in self._rows and len(self._rows) >= _MOST:
            key = _OTHER, _OTHER, None, ""
        row = self._rows.get(key) or self._rows.setdefault(key, Failure(*key, first=now))
        row.last = now
        return row


def class_of(status: int) -> type[openai.APIStatusError]:
    """Return the class of the error that the SDK makes of a status."""
    other = openai.InternalServerError if status >= _SERVER_ERROR else openai.APIStatusError
    return _BY_STATUS.get(status, other)


def status_of(error: object) -> int | None:
    """Return the HTTP status of an error; None where no answer came."""
    status = getattr(error, "status_code", None)
    return status if isinstance(status, int) else None


def code_of(error: object) -> str:
    """Return the API's word for an error; "" for anything that is no such word, as a key would be."""
    code = getattr(error, "code", None)
    return code if isinstance(code, str) and len(code) <= _LONGEST and _WORD.fullmatch(code) else ""
