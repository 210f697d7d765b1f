"""When a run ends early: by what would meet every prompt, and by too many failures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from openai_eval_client._validation import reject_input
from openai_eval_client._wire import Kind, read_failure
from openai_eval_client.errors import TooManyFailuresError

if TYPE_CHECKING:
    from openai_eval_client._wire import Failure

_FEW = 3  # different prompts that fail alike, before anything was answered
_MANY = 20  # in a row, once something was
_SAMPLE = 20  # outcomes from which on a share of failures is judged


def check_max_failures(value: object) -> None:
    """Reject what is neither a number of failures nor a share."""
    if value is None or (type(value) is int and value >= 0) or (type(value) is float and 0 <= value < 1):
        return
    reject_input("max_failures", value, "must be a whole number of prompts, or a share of them below 1.0")


def too_many_failures(
    most: float | None, failed: int, done: int, total: int | None, error: Exception
) -> TooManyFailuresError | None:
    """Return the error for more failures than `most` allows, caused by the latest; None for fewer."""
    if most is None:
        return None
    sample = _SAMPLE if total is None else min(_SAMPLE, total)
    if failed <= (most * max(done, sample) if isinstance(most, float) else most):
        return None
    ended = TooManyFailuresError(failed, done, most)
    ended.__cause__ = error
    return ended


class StopRule:
    """Decides whether a failure ends the run, from what became of the prompts before it.

    A failure of the account or the model may still be this prompt's own: a run ends by it when different
    prompts met such a failure with no answer in between, and what was in flight then was not answered either.
    """

    def __init__(
        self, max_wait: float = float("inf"), *, max_failures: float | None = None, total: int | None = None
    ) -> None:
        self._max_wait = max_wait
        self._max_failures = max_failures
        self._total = total
        self._answered = False  # by the server, not from the cache
        self._done = self._failed = 0
        self._alike: list[Any] = []  # the different prompts that failed so, in a row
        self._in_a_row = 0  # equal ones as well
        self._suspect: Exception | None = None  # the latest failure that may be everyone's
        self._others = 0  # failures of other kinds

    def answered(self, *, cached: bool = False) -> None:
        """Take in an answer; one from the cache says nothing of the server."""
        self._done += 1
        if not cached:
            self._answered = True
            self._alike.clear()
            self._in_a_row = 0
            self._suspect = None

    def failed(self, error: Exception, item: object) -> Exception | None:
        """Take in a failure; return the error that the run ends with, where it ends at once."""
        self._done += 1
        self._failed += 1
        failure = read_failure(error)
        if failure.ends_run(self._max_wait):
            return error
        if self._is_suspect(failure):
            self._suspect = error
            self._in_a_row += 1
            if len(self._alike) < _MANY and item not in self._alike:
                self._alike.append(item)
        else:
            self._others += 1
        return too_many_failures(self._max_failures, self._failed, self._done, self._total, error)

    @property
    def suspect(self) -> Exception | None:
        """The error that ends the run, unless what is in flight now is answered; None: it goes on."""
        different = len(self._alike)
        if self._answered:
            return self._suspect if different >= _MANY else None
        return self._suspect if different >= _FEW or self._in_a_row >= _MANY else None

    @property
    def last(self) -> Exception | None:
        """The error of a run that is over, in which each prompt met such a failure; None for any other."""
        return self._suspect if self._done == self._failed and not self._others else None

    def _is_suspect(self, failure: Failure) -> bool:
        """Return whether every other prompt may meet it; no connection after an answer is a passing fault."""
        return failure.is_shared and not (failure.kind is Kind.UNREACHABLE and self._answered)
