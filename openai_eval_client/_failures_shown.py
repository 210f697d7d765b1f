"""The table of failures, with what each kind means."""

from __future__ import annotations

from typing import TYPE_CHECKING

from openai_eval_client._html import Markup, clock, count, escape, name, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from openai_eval_client._failures import Failure

_SERVER_ERROR = 500
_BY_CODE = {
    "insufficient_quota": "the account's credit is used up: waiting does not help",
    "context_length_exceeded": "the prompt and max_tokens do not fit the model",
    "content_policy_violation": "the provider refuses the content",
    "model_not_found": "no such model, or not for this key",
    "invalid_api_key": "the key is wrong or was withdrawn",
}
_BY_STATUS = {
    400: "the server refuses the request itself",
    401: "the key is wrong or was withdrawn",
    403: "this key may not do that",
    404: "no such model or address",
    408: "the server gave up waiting; sent again",
    409: "in the way of another request; sent again",
    413: "the request is too large for the server",
    422: "the server refuses the request itself",
    429: "the server's limit was reached; sent again when it said",
}
_BY_KIND = {
    "TimeoutError": "no answer within timeout; sent again",
    "APIConnectionError": "the connection failed, or the answer was cut short; sent again",
    "APIResponseValidationError": "what came was no answer; sent again",
    "BudgetExceededError": "max_cost left too little; not sent",
    "RequestTooLargeError": "more tokens than the limit can ever admit; not sent",
    "ValidationError": "the input is wrong; not sent",
}


def failures_table(failures: Sequence[Failure]) -> Markup:
    """Return what went wrong, by kind."""
    head = ("model", "error", "what it means", "attempts", "prompts lost", "first", "last")
    return table(head, [_row(each) for each in failures], texts=3)


def _row(of: Failure) -> tuple[object, ...]:
    said = " ".join(str(part) for part in (of.kind, of.status, of.code) if part)
    means = Markup(f'<span class="wide">{escape(meaning(of))}</span>')
    times = (Markup(escape(clock(at)).replace(" ", "<br>")) for at in (of.first, of.last))
    return (
        name(of.model),
        Markup(f'<span class="wide">{name(said)}</span>'),
        means,
        count(of.attempts),
        count(of.prompts),
        *times,
    )


def meaning(of: Failure) -> str:
    """Return what a kind of failure means."""
    if of.code in _BY_CODE:
        return _BY_CODE[of.code]
    if of.status is not None and of.status >= _SERVER_ERROR:
        return "the server failed; sent again"
    return _BY_STATUS.get(of.status or 0) or _BY_KIND.get(of.kind) or "see the exception"
