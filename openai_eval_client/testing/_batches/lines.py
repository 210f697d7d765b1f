"""The lines of a batch's output and error files."""

from __future__ import annotations

import io
import uuid
from typing import TYPE_CHECKING, Any

from .._catalog import spoil
from .._endpoints import dumps
from .._exchange import HTML
from .._faults import ApiError, fault_error, server_error

if TYPE_CHECKING:
    from .._endpoints import Ask, Generation
    from .._options import Options
    from .input import Task

Json = dict[str, Any]
UNANSWERED = {  # outcome: code and message of the line's error
    "expired": ("batch_expired", "This request could not be executed before the completion window expired."),
    "cancelled": ("batch_cancelled", "This request was not executed because the batch was cancelled."),
    "timeout": ("request_timeout", "The request to the model timed out."),
}
ERRORS = ("400", "429", "500")


class Lines:
    """The files that a batch writes, line after line."""

    def __init__(self, endpoint: Generation, options: Options) -> None:
        self._endpoint, self._options = endpoint, options
        self.output, self.failures = io.BytesIO(), io.BytesIO()
        self.completed = self.failed = 0
        self._input_tokens = self._cached_tokens = self._output_tokens = 0

    def run(self, task: Task, outcome: str) -> None:
        """Answer one request, or fail it, as its outcome says."""
        if outcome in UNANSWERED:
            self.failed += 1
            self.leave(task, outcome)
        elif outcome in ERRORS:
            self._fail(task, _error(outcome))
        elif outcome == "status_0":
            self.failed += 1
            self.failures.write(_line(task.custom_id, _response(0, None)))
        elif isinstance(task.ask, ApiError):
            self._fail(task, task.ask)
        else:
            self._complete(task, task.ask, outcome)

    def leave(self, task: Task, reason: str) -> None:
        code, message = UNANSWERED[reason]
        self.failures.write(_line(task.custom_id, None, {"code": code, "message": message}))

    def usage(self) -> Json:
        """Return the tokens as a Batch object shows them."""
        return {
            "input_tokens": self._input_tokens,
            "input_tokens_details": {"cached_tokens": self._cached_tokens},
            "output_tokens": self._output_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self._input_tokens + self._output_tokens,
        }

    def _fail(self, task: Task, error: ApiError) -> None:
        self.failed += 1
        self.failures.write(_line(task.custom_id, _response(error.status, error.body)))

    def _complete(self, task: Task, ask: Ask, outcome: str) -> None:
        try:
            body = self._endpoint.write(ask, self._options, uuid.uuid4().hex)
        except ApiError as error:
            self._fail(task, error)
            return
        except Exception as problem:  # noqa: BLE001 - online, too, it would be a 500
            self._fail(task, server_error(f"The server had an error while answering: {problem!r}"))
            return
        self.completed += 1
        usage = body["usage"]
        details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
        self._input_tokens += ask.prompt_tokens
        self._cached_tokens += details.get("cached_tokens", 0)
        self._output_tokens += usage["total_tokens"] - ask.prompt_tokens
        self._write(task, body, outcome)

    def _write(self, task: Task, body: Json, outcome: str) -> None:
        status = "200" if outcome == "status_text" else 200
        line = _line(task.custom_id, _response(status, _spoiled(body, outcome)))
        if outcome == "truncated":
            line = line[: len(line) // 2] + b"\n"
        if outcome != "missing":
            self.output.write(line)
        if outcome == "duplicate":
            self.output.write(line)
        if outcome == "duplicate_error":
            self.failures.write(_line(task.custom_id, _response(500, _error("500").body)))
        if outcome == "unknown_id":
            self.output.write(_line(f"unknown-{uuid.uuid4().hex}", _response(200, body)))


def _error(outcome: str) -> ApiError:
    if outcome == "400":
        return ApiError(400, "This request was refused, as the simulation was told.", code="invalid_value")
    return fault_error(outcome)


def _spoiled(body: Json, outcome: str) -> Any:
    if outcome == "null_body":
        return None
    if outcome == "body_text":
        return dumps(body).decode()
    return HTML.decode() if outcome == "garbage" else spoil(body, outcome)


def _response(status: int | str, body: Any) -> Json:
    return {"status_code": status, "request_id": uuid.uuid4().hex, "body": body}


def _line(custom_id: str, response: Json | None, error: Json | None = None) -> bytes:
    ident = f"batch_req_{uuid.uuid4().hex}"
    return dumps({"id": ident, "custom_id": custom_id, "response": response, "error": error}) + b"\n"
