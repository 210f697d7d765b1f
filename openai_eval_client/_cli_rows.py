"""JSON lines: requests read from an input, outcomes written to an output that is whole or not there."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, NoReturn

import pydantic

from openai_eval_client._checks import not_json, shown
from openai_eval_client.errors import ValidationError
from openai_eval_client.models import BatchRequest, ModelResponse

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_BOM = b"\xef\xbb\xbf"
_OTHER = re.compile(r"that of requests\[(\d+)\]")
_OWN = re.compile(r"\Arequests\[\d+\][.:]? ?")
# The names under which a line may say itself what an option is the default of.
_NAMES = {
    "temperature": {"temperature"},
    "max_tokens": {"max_tokens", "max_completion_tokens", "max_output_tokens"},
    "system": {"system", "instructions"},
}
_SYSTEM_ROLES = frozenset({"system", "developer"})


def read_requests(
    lines: Iterable[bytes], defaults: Mapping[str, Any]
) -> tuple[list[BatchRequest], list[int]]:
    """Read one request from each line that is not blank.

    Args:
        lines: Each a JSON text, or an object with "prompt" or "messages" and any parameter of the API.
        defaults: "temperature", "max_tokens" and "system" for the lines that say nothing of it.

    Returns:
        The requests, and the number of each one's line, counted from 1.

    Raises:
        ValidationError: Names the line, and the key and value in it.
    """
    requests: list[BatchRequest] = []
    numbers: list[int] = []
    for number, line in enumerate(lines, start=1):
        text = line.removeprefix(_BOM) if number == 1 else line
        if text.strip():
            requests.append(_request(_row(text, number), defaults, number))
            numbers.append(number)
    if not requests:
        raise ValidationError("the input is empty: give a request a line", field="requests")
    return requests, numbers


def by_lines(error: ValidationError, numbers: Sequence[int]) -> str:
    """Return an error's message with the lines of the input in place of the indexes of the requests."""
    message = str(error)
    if error.index is None:
        return message
    own = f"line {numbers[error.index]}: {_OWN.sub('', message)}"
    return _OTHER.sub(lambda found: f"that of line {numbers[int(found[1])]}", own)


def row_of(index: int, outcome: ModelResponse | Exception) -> bytes:
    """Return the line of one outcome."""
    head: dict[str, Any] = {"index": index}
    name = getattr(outcome, "custom_id", None)
    if name is not None:
        head["custom_id"] = name
    if isinstance(outcome, ModelResponse):
        start = json.dumps(head, separators=(",", ":"))[:-1]
        return f'{start},"response":{outcome.model_dump_json()}}}\n'.encode()
    return json.dumps({**head, "error": error_of(outcome)}, separators=(",", ":")).encode() + b"\n"


def error_of(error: Exception) -> dict[str, Any]:
    """Return how an error stands in a row."""
    return {
        "type": type(error).__name__,
        "message": getattr(error, "message", str(error)),
        "code": getattr(error, "code", None),
    }


def _row(line: bytes, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        _refuse(number, f"not UTF-8: {error.reason} at byte {error.start}")
    except (ValueError, RecursionError) as error:
        _refuse(number, not_json(line.decode().strip(), error))
    if isinstance(row, str):
        return {"prompt": row}
    if not isinstance(row, dict):
        _refuse(number, f'{shown(row)}: must be a text, or an object with "prompt" or "messages"')
    return {key: value for key, value in row.items() if value is not None}


def _request(row: dict[str, Any], defaults: Mapping[str, Any], number: int) -> BatchRequest:
    added = {name: value for name, value in defaults.items() if not _NAMES[name] & row.keys()}
    if _has_system_message(row):
        added.pop("system", None)
    try:
        return BatchRequest.model_validate({**added, **row}, strict=True)
    except pydantic.ValidationError as error:
        problem = error.errors(include_url=False)[0]
        why = problem["msg"].removeprefix("Value error, ")
        _refuse(number, f"{problem['loc'][0]}={shown(problem['input'])}: {why}" if problem["loc"] else why)


def _has_system_message(row: Mapping[str, Any]) -> bool:
    messages = row.get("messages", row.get("prompt"))
    return isinstance(messages, list) and any(
        isinstance(message, dict) and message.get("role") in _SYSTEM_ROLES for message in messages
    )


def _refuse(number: int, why: str) -> NoReturn:
    raise ValidationError(f"line {number}: {why}", field="requests")
