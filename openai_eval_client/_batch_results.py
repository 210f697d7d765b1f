"""From the result files of a batch to one typed outcome for every request, whatever the files leave out."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from openai_eval_client._answers import is_answer, read_answer
from openai_eval_client._attempt import status_error
from openai_eval_client._batch_lines import number
from openai_eval_client._batch_manifest import name_of, parsed
from openai_eval_client._batch_status import EXPIRED, MISSING
from openai_eval_client._checks import is_header_text
from openai_eval_client._requests import Parameters
from openai_eval_client._retry import is_transient
from openai_eval_client._wire import usage_of
from openai_eval_client.errors import BatchError, sdk_httpx
from openai_eval_client.models import ModelResponse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import openai

    from openai_eval_client._batch_manifest import Manifest
    from openai_eval_client._wire import Usage

    Outcome = ModelResponse | Exception

_OK, _BAD_REQUEST = 200, 400
UNREADABLE, NO_ANSWER = "unreadable_result", "no_answer"
_TIMED_OUT = "request_timeout"  # https://platform.openai.com/docs/api-reference/batch/request-output
_TRANSIENT = frozenset({EXPIRED, MISSING, _TIMED_OUT, UNREADABLE, NO_ANSWER})


@dataclass(slots=True)
class Settlement:
    """The outcomes of one batch, and what was odd about its files.

    Attributes:
        outcomes: One for each index.
        oddities: How often each thing happened that should not.
        lines: How many lines the files have.
        unplaced: The errors of requests without a result of which even the index is not known.
        names: The custom_id that the caller gave a request, by its index, where one is known.
    """

    outcomes: dict[int, Outcome] = field(default_factory=dict)
    oddities: Counter[str] = field(default_factory=Counter)
    lines: int = 0
    unplaced: list[BatchError] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)

    @property
    def answered(self) -> int:
        """How many requests have a response."""
        return sum(isinstance(outcome, ModelResponse) for outcome in self.outcomes.values())

    def counts(self) -> tuple[int, int, int, int]:
        """Return how many requests were answered and how many failed, and the answers' tokens in and out."""
        usages = [each.usage for each in self.outcomes.values() if isinstance(each, ModelResponse)]
        tokens = [sum(u.prompt_tokens for u in usages), sum(u.completion_tokens for u in usages)]
        return len(usages), len(self.outcomes) - len(usages), tokens[0], tokens[1]


class Reader:
    """Reads result lines into responses and errors.

    Args:
        api: "chat" or "responses".
        schema: The pydantic class the answers are to fit, where there is one.
        price: Prices an answer by its model and usage.
        model: The model asked for, which counts where an answer names none.
    """

    def __init__(
        self, api: str, schema: Any, price: Callable[[str, Usage], float | None], *, model: str = ""
    ) -> None:
        self._parameters = Parameters(api=api, model=model, timeout=0.0, body={}, schema=schema)
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
        line = parsed(raw)
        if line is None:
            settlement.oddities["unreadable lines"] += 1
        name = name_of(line, raw)
        index = manifest.index_of(name)
        if index is None or (expected is not None and index not in expected):
            settlement.oddities["lines of no request of this job"] += line is not None
            return
        if name is not None and manifest.by_name is None and name != number(index):
            settlement.names[index] = name.removesuffix(f"#{index}")
        before = settlement.outcomes.get(index)
        settlement.oddities["second lines of one request"] += before is not None
        if isinstance(before, ModelResponse):  # not read: it would be priced twice
            return
        outcome = self._outcome(line, raw, index, manifest.temperature_of(index))
        if before is None or isinstance(outcome, ModelResponse):
            settlement.outcomes[index] = outcome

    def _outcome(
        self, line: dict[str, Any] | None, raw: bytes, index: int, temperature: float | None
    ) -> Outcome:
        if line is None:
            return BatchError("its result is cut short", code=UNREADABLE, line=index + 1)
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
        return BatchError(f"status {status} and no answer", code=NO_ANSWER, line=index + 1)

    def _answer(
        self, body: dict[str, Any], raw: bytes, temperature: float | None, request_id: Any
    ) -> ModelResponse:
        usage = usage_of(body)
        return read_answer(
            body,
            self._parameters,
            usage=usage,
            cost=None if usage is None else self._price(usage.model or self._parameters.model, usage),
            kept=raw,  # a tenth of the parsed body's memory
            temperature=temperature,
            request_id=request_id if isinstance(request_id, str) else None,
            latency=0.0,
        )


def name_outcomes(settlement: Settlement, manifest: Manifest) -> None:
    """Give each outcome the custom_id that the caller gave its request."""
    named = manifest.by_name or {}
    settlement.names.update({index: name for name, index in named.items() if name != number(index)})
    for index, name in settlement.names.items():
        outcome: Any = settlement.outcomes.get(index)
        if isinstance(outcome, ModelResponse):
            outcome._custom_id = name  # noqa: SLF001  # read by users, set here alone
        elif outcome is not None:
            outcome.custom_id = name


def is_curable(error: Exception) -> bool:
    """Return whether the same request may succeed in another batch."""
    if isinstance(error, BatchError):
        return error.code in _TRANSIENT
    return is_transient(error)


def _line_error(error: Any, index: int) -> BatchError:
    """Return the error of a request that the API never ran."""
    given = error if isinstance(error, dict) else {}
    code, message, param = given.get("code"), given.get("message"), given.get("param")
    return BatchError(
        str(message) if message else "no response and no error",
        code=str(code) if code else NO_ANSWER,
        line=index + 1,
        param=param if isinstance(param, str) else None,
    )


def _status_error(status: int, body: Any, request_id: Any) -> openai.APIStatusError:
    """Return the SDK's own error for a line that was refused."""
    headers = {"content-type": "application/json"}
    if isinstance(request_id, str) and is_header_text(request_id):
        headers["x-request-id"] = request_id
    request = sdk_httpx().Request("POST", "https://batch.invalid/")
    content = json.dumps(body).encode()  # half a surrogate pair stays escaped
    answer = sdk_httpx().Response(status, headers=headers, content=content, request=request)
    return status_error(status, body, answer)
