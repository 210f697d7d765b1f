"""Outcomes as rows: for a data frame, a file, a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from openai_eval_client.errors import PartialFailureError
from openai_eval_client.models import ModelResponse

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import pandas as pd

    Outcome = ModelResponse | BaseException | None

_COLUMNS = {  # and what each is in pandas, where some rows have none
    "index": "int64",
    "content": "object",
    "finish_reason": "object",
    "model": "object",
    "prompt_tokens": "Int64",
    "completion_tokens": "Int64",
    "total_tokens": "Int64",
    "cached_tokens": "Int64",
    "reasoning_tokens": "Int64",
    "cost": "Float64",
    "latency_ms": "Float64",
    "temperature": "Float64",
    "cached": "boolean",
    "request_id": "object",
    "refusal": "object",
    "error": "object",
    "error_type": "object",
}


def to_pandas(
    responses: Iterable[Outcome | tuple[int, Outcome]] | PartialFailureError,
    *,
    parsed: bool = False,
) -> pd.DataFrame:
    """Return answers as a data frame, a row for each prompt.

    Args:
        responses: What `batch_generate` returned, exceptions and None included; pairs of index and outcome as
            `as_completed` yields them; or the `PartialFailureError` of a run.
        parsed: Add a column `parsed_NAME` for each field of the parsed objects.

    Returns:
        The columns index, content, finish_reason, model, prompt_tokens, completion_tokens, total_tokens,
        cached_tokens, reasoning_tokens, cost (USD), latency_ms, temperature, cached, request_id, refusal,
        error (its message) and error_type (its class). What is not known is missing (`pandas.NA`, None).

    Raises:
        ModuleNotFoundError: There is no pandas; the message says what to install.
        TypeError: Something else is among the responses.
    """
    try:
        import pandas as pd
    except ModuleNotFoundError as error:
        if error.name != "pandas":
            raise
        message = "to_pandas needs pandas: pip install 'openai-eval-client[pandas]'"
        raise ModuleNotFoundError(message, name="pandas") from None
    listed = list(rows(responses, parsed=parsed))
    more = dict.fromkeys(name for row in listed for name in row if name not in _COLUMNS)
    frame = pd.DataFrame(listed, columns=[*_COLUMNS, *more])
    return frame.astype(_COLUMNS)


def rows(
    responses: Iterable[Outcome | tuple[int, Outcome]] | PartialFailureError,
    *,
    parsed: bool = False,
) -> Iterator[dict[str, Any]]:
    """Yield a row for each prompt, as plain data."""
    if isinstance(responses, PartialFailureError):
        failures = responses.failures
        responses = [failures.get(index, answer) for index, answer in enumerate(responses.responses)]
    for position, item in enumerate(responses):
        index, outcome = item if isinstance(item, tuple) else (position, item)
        yield {"index": index, **_cells(outcome, parsed=parsed)}


def _cells(outcome: object, *, parsed: bool) -> dict[str, Any]:
    if isinstance(outcome, ModelResponse):
        return {**_answer(outcome), **(_parsed(outcome) if parsed else {})}
    if isinstance(outcome, BaseException):
        return {"error": str(outcome), "error_type": type(outcome).__name__}
    if outcome is not None:
        message = f"responses: must be ModelResponses, exceptions or None, not {type(outcome).__name__}"
        raise TypeError(message)
    return {}


def _answer(response: ModelResponse) -> dict[str, Any]:
    fields = (
        "content",
        "finish_reason",
        "model",
        "latency_ms",
        "temperature",
        "cached",
        "request_id",
        "refusal",
    )
    counts = ("prompt_tokens", "completion_tokens", "total_tokens", "cached_tokens", "reasoning_tokens")
    usage = response.usage
    return {
        **{name: getattr(response, name) for name in fields},
        **{name: getattr(usage, name) for name in counts},
        "cost": usage.estimated_cost,
    }


def _parsed(response: ModelResponse) -> dict[str, Any]:
    """Return the fields of the parsed object, as far as there is one."""
    made = response.parsed
    return (
        {f"parsed_{name}": value for name, value in made.model_dump().items()}
        if isinstance(made, BaseModel)
        else {}
    )
