"""Outcomes as rows: for a file, a data frame, a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from openai_eval_client.errors import PartialFailureError
from openai_eval_client.models import ModelResponse

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import pandas as pd

    Outcome = ModelResponse | BaseException | None

_COLUMNS = {  # in their order, with types that allow for rows without a value
    "index": "int64",
    **dict.fromkeys(("content", "finish_reason", "model"), "object"),
    **dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), "Int64"),
    **dict.fromkeys(("cached_tokens", "reasoning_tokens"), "Int64"),
    **dict.fromkeys(("cost", "latency_ms", "temperature"), "Float64"),
    "cached": "boolean",
    **dict.fromkeys(("request_id", "refusal", "reasoning", "tool_calls", "annotations"), "object"),
    "fits_schema": "boolean",
    "unsent_parameters": "object",
    **dict.fromkeys(("error", "error_type"), "object"),
}


def row_of(outcome: object) -> dict[str, Any]:
    """Return the `response` of an outcome, or its `error` as plain data, or neither for None."""
    if isinstance(outcome, ModelResponse):
        return {"response": outcome}
    if isinstance(outcome, BaseException):
        message, code = getattr(outcome, "message", str(outcome)), getattr(outcome, "code", None)
        return {"error": {"type": type(outcome).__name__, "message": message, "code": code}}
    if outcome is not None:
        message = f"responses: must be ModelResponses, exceptions or None, not {type(outcome).__name__}"
        raise TypeError(message)
    return {}


def outcomes_of(error: PartialFailureError) -> list[Outcome]:
    """Return a response or an exception for each prompt of a run that failed in part."""
    return [error.failures.get(index, response) for index, response in enumerate(error.responses)]


def to_pandas(
    responses: Iterable[Outcome | tuple[int, Outcome]] | PartialFailureError, *, parsed: bool = False
) -> pd.DataFrame:
    """Return answers as a data frame, a row for each prompt.

    Args:
        responses: What `batch_generate` returned, exceptions and None included; pairs of index and outcome as
            `as_completed` yields them; or the `PartialFailureError` of a run.
        parsed: Add a column `parsed_NAME` for each field of the parsed objects.

    Returns:
        The columns index, content, finish_reason, model, prompt_tokens, completion_tokens, total_tokens,
        cached_tokens, reasoning_tokens, cost (USD), latency_ms, temperature, cached, request_id, refusal,
        reasoning, tool_calls, annotations, fits_schema, unsent_parameters, error (its message) and
        error_type (its class). What is not known is missing (`pandas.NA`, None).

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
    responses: Iterable[Outcome | tuple[int, Outcome]] | PartialFailureError, *, parsed: bool = False
) -> Iterator[dict[str, Any]]:
    """Yield the cells of each prompt's row, those that are known."""
    if isinstance(responses, PartialFailureError):
        responses = outcomes_of(responses)
    for position, item in enumerate(responses):
        index, outcome = item if isinstance(item, tuple) else (position, item)
        yield {"index": index, **_cells(row_of(outcome), parsed=parsed)}


def _cells(row: dict[str, Any], *, parsed: bool) -> dict[str, Any]:
    if "error" in row:
        return {"error": row["error"]["message"], "error_type": row["error"]["type"]}
    if not row:
        return {}
    response: ModelResponse = row["response"]
    known = {**dict(response), **dict(response.usage), "cost": response.usage.estimated_cost}
    cells = {name: known[name] for name in _COLUMNS if name in known}
    if parsed and isinstance(response.parsed, BaseModel):
        cells |= {f"parsed_{name}": value for name, value in response.parsed.model_dump().items()}
    return cells
