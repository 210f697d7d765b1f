"""From the result files of a batch to one typed outcome for every request, whatever the files leave out."""

from __future__ import annotations

import json
import logging
import re
from array import array
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

import openai

from openai_eval_client._answers import is_answer, read_answer
from openai_eval_client._batch_meta import index_in
from openai_eval_client._batch_status import EXPIRED, MISSING
from openai_eval_client._requests import Parameters
from openai_eval_client._retry import is_transient
from openai_eval_client._wire import usage_of
from openai_eval_client.errors import BatchError, QuotaError, sdk_httpx
from openai_eval_client.models import ModelResponse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from openai_eval_client._wire import Usage

    Outcome = ModelResponse | Exception

logger = logging.getLogger("openai_eval_client")

_OK, _BAD_REQUEST, _SERVER_ERROR = 200, 400, 500
_BY_STATUS: dict[int, type[openai.APIStatusError]] = {
    400: openai.BadRequestError,
    401: openai.AuthenticationError,
    403: openai.PermissionDeniedError,
    404: openai.NotFoundError,
    409: openai.ConflictError,
    422: openai.UnprocessableEntityError,
    429: openai.RateLimitError,
}
_NAME = re.compile(rb'"custom_id"\s*:\s*("(?:[^"\\]|\\.)*")')  # in a line that is cut short
_UNREADABLE, _NO_ANSWER = "unreadable_result", "no_answer"
_TRANSIENT = frozenset({EXPIRED, MISSING, _UNREADABLE, _NO_ANSWER})


@dataclass(slots=True)
class Manifest:
    """What a batch was asked, as far as it is known.

    Attributes:
        indexes: The index of each line's request, in the order of the lines.
        by_name: The index of each custom_id; None where it ends with the index.
        temperatures: What each request asked, where they differ.
        temperature: What all of them asked; None: nothing.
        empty: The numbers of the empty lines between them, rising.
    """

    indexes: Any  # a sequence of int
    by_name: dict[str, int] | None = None
    temperatures: dict[int, float | None] | None = None
    temperature: float | None = None
    empty: Sequence[int] = ()

    def index_at(self, line: int) -> int | None:
        """Return whose request a line of the input file is, counted from 1; None where it is nobody's."""
        position = line - 1 - bisect_left(self.empty, line)
        known = 0 <= position < len(self.indexes) and line not in self.empty
        return int(self.indexes[position]) if known else None

    def index_of(self, custom_id: str | None) -> int | None:
        """Return whose result a line is; None where nobody's here."""
        if custom_id is None:
            return None
        return index_in(custom_id) if self.by_name is None else self.by_name.get(custom_id)

    def temperature_of(self, index: int) -> float | None:
        """Return what a request asked."""
        return self.temperature if self.temperatures is None else self.temperatures.get(index)


@dataclass(slots=True)
class Settlement:
    """The outcomes of one batch, and what was odd about its files.

    Attributes:
        outcomes: One for each index.
        oddities: How often each thing happened that should not.
        lines: How many lines the files have.
        unplaced: The errors of requests without a result of which even the index is not known.
    """

    outcomes: dict[int, Outcome] = field(default_factory=dict)
    oddities: Counter[str] = field(default_factory=Counter)
    lines: int = 0
    unplaced: list[BatchError] = field(default_factory=list)

    @property
    def answered(self) -> int:
        """How many requests have a response."""
        return sum(isinstance(outcome, ModelResponse) for outcome in self.outcomes.values())

    def counts(self) -> tuple[int, int, int, int]:
        """Return how many requests were answered and how many failed, and the answers' tokens in and out."""
        usages = [each.usage for each in self.outcomes.values() if isinstance(each, ModelResponse)]
        tokens = [sum(u.prompt_tokens for u in usages), sum(u.completion_tokens for u in usages)]
        return len(usages), len(self.outcomes) - len(usages), tokens[0], tokens[1]


def read_manifest(lines: Iterable[bytes], *, numbered: bool, start: int) -> Manifest:
    """Read what a batch was asked from its input file.

    Args:
        lines: The file's lines.
        numbered: Whether each custom_id ends with the request's index.
        start: The index of the first line where it does not.

    Returns:
        The manifest.
    """
    indexes, by_name, temperatures = array("L"), dict[str, int](), dict[int, float | None]()
    empty = array("L")
    for number, raw in enumerate(lines, start=1):
        if raw.isspace():
            empty.append(number)
            continue
        line = _parsed(raw) or {}
        name, body = str(line.get("custom_id")), line.get("body")
        known = index_in(name) if numbered else None
        index = start + len(indexes) if known is None else known
        indexes.append(index)
        by_name[name] = index
        temperatures[index] = body.get("temperature") if isinstance(body, dict) else None
    return Manifest(indexes, by_name, temperatures, empty=empty)


def guess_manifest(files: Iterable[IO[bytes]], *, numbered: bool, start: int, count: int) -> Manifest:
    """Make up the manifest of a batch whose input file is gone, from its results.

    Args:
        files: Its result files.
        numbered: Whether each custom_id ends with the request's index.
        start: The index of the first request where it does not: the order is then that of the results.
        count: How many requests it has.

    Returns:
        The manifest; where the custom_ids are numbered, without the requests that have no result.
    """
    names: dict[str, int] = {}
    for file in files:
        for raw in file:
            name = _name_of(_parsed(raw), raw)
            index = None if name is None else index_in(name) if numbered else start + len(names)
            if name is not None and index is not None:
                names.setdefault(name, index)
        file.seek(0)
    indexes = sorted(set(names.values())) if numbered else range(start, start + max(count, len(names)))
    return Manifest(indexes, names)


def read_bodies(lines: Iterable[bytes], wanted: Mapping[int, int]) -> dict[int, Any]:
    """Return the bodies of some requests of an input file.

    Args:
        lines: The file's lines.
        wanted: The index of each, by its position among all requests.

    Returns:
        The bodies, by index.
    """
    present = (raw for raw in lines if not raw.isspace())
    found = {wanted[position]: _parsed(raw) for position, raw in enumerate(present) if position in wanted}
    return {
        index: line["body"] for index, line in found.items() if line and isinstance(line.get("body"), dict)
    }


class Reader:
    """Reads result lines into responses and errors.

    Args:
        api: "chat" or "responses".
        schema: The pydantic class the answers are to fit, where there is one.
        price: Prices an answer by its model and usage.
    """

    def __init__(self, api: str, schema: Any, price: Callable[[str, Usage], float | None]) -> None:
        self._parameters = Parameters(api=api, model="", timeout=0.0, body={}, schema=schema)
        self._price = price

    def read(self, files: Iterable[Iterable[bytes]], manifest: Manifest) -> Settlement:
        """Read the lines of a batch's output and error files.

        An answer counts more than an error, and the first of two answers more than the second. Every oddity
        is counted: none loses another request's result.
        """
        settlement = Settlement()
        expected = frozenset(manifest.indexes) if manifest.by_name is None else None
        for file in files:
            for raw in file:
                if not raw.isspace():
                    settlement.lines += 1
                    self._take(raw, manifest, expected, settlement)
        return settlement

    def _take(
        self, raw: bytes, manifest: Manifest, expected: frozenset[int] | None, settlement: Settlement
    ) -> None:
        line = _parsed(raw)
        if line is None:
            settlement.oddities["unreadable lines"] += 1
        index = manifest.index_of(_name_of(line, raw))
        if index is None or (expected is not None and index not in expected):
            settlement.oddities["lines of no request of this job"] += line is not None
            return
        outcome = self._outcome(line, raw, index, manifest.temperature_of(index))
        before = settlement.outcomes.get(index)
        if before is not None:
            settlement.oddities["second lines of one request"] += 1
            if isinstance(before, ModelResponse) or not isinstance(outcome, ModelResponse):
                return
        settlement.outcomes[index] = outcome

    def _outcome(
        self, line: dict[str, Any] | None, raw: bytes, index: int, temperature: float | None
    ) -> Outcome:
        if line is None:
            return BatchError("its result is cut short", code=_UNREADABLE, line=index + 1)
        response = line.get("response")
        if not isinstance(response, dict):
            return _line_error(line.get("error"), index)
        status, body = response.get("status_code", _OK), response.get("body")
        if status == _OK and isinstance(body, dict) and is_answer(body, self._parameters.api):
            return self._answer(body, raw, temperature, response.get("request_id"))
        if isinstance(status, int) and status >= _BAD_REQUEST:
            return _status_error(status, body, response.get("request_id"))
        if line.get("error"):
            return _line_error(line["error"], index)
        return BatchError(f"status {status} and no answer", code=_NO_ANSWER, line=index + 1)

    def _answer(
        self, body: dict[str, Any], raw: bytes, temperature: float | None, request_id: Any
    ) -> ModelResponse:
        name = request_id if isinstance(request_id, str) else None
        usage = usage_of(body)
        response = read_answer(
            body, self._parameters, usage=usage, temperature=temperature, request_id=name, latency=0.0
        )
        response._body = raw  # noqa: SLF001  # a tenth of the parsed body's memory
        if usage is not None:
            response.usage.estimated_cost = self._price(response.model, usage)
        return response


def is_curable(error: Exception) -> bool:
    """Return whether the same request may succeed in another batch."""
    if isinstance(error, BatchError):
        return error.code in _TRANSIENT
    return is_transient(error)


def _parsed(raw: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) else None


def _name_of(line: dict[str, Any] | None, raw: bytes) -> str | None:
    if line is None:
        found = _NAME.search(raw)
        line = _parsed(b'{"custom_id":%b}' % found[1]) or {} if found else {}
    name = line.get("custom_id")
    return name if isinstance(name, str) else None


def _line_error(error: Any, index: int) -> BatchError:
    """Return the error of a request that the API never ran."""
    given = error if isinstance(error, dict) else {}
    code, message, param = given.get("code"), given.get("message"), given.get("param")
    return BatchError(
        str(message) if message else "no response and no error",
        code=str(code) if code else _NO_ANSWER,
        line=index + 1,
        param=param if isinstance(param, str) else None,
    )


def _status_error(status: int, body: Any, request_id: Any) -> openai.APIStatusError:
    """Return the SDK's own error for a line that was refused."""
    details = body.get("error", body) if isinstance(body, dict) else body
    message = details.get("message") if isinstance(details, dict) else None
    codes = {details.get("code"), details.get("type")} if isinstance(details, dict) else set()
    kind: Any = _BY_STATUS.get(status)
    if kind is None:
        kind = openai.InternalServerError if status >= _SERVER_ERROR else openai.APIStatusError
    if status == 429 and "insufficient_quota" in codes:  # noqa: PLR2004
        kind = QuotaError
    headers = {"x-request-id": request_id} if isinstance(request_id, str) else {}
    request = sdk_httpx().Request("POST", "https://batch.invalid/")
    answer = sdk_httpx().Response(status, headers=headers, json=body, request=request)
    error: openai.APIStatusError = kind(message or f"status {status}", response=answer, body=details)
    return error
