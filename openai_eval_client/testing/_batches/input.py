"""Reads a batch's input file as the API validates it."""

from __future__ import annotations

import asyncio
import io
import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from .._endpoints.answers import Ask, Count, Json
from .._errors import ApiError, server_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from .._routes import Generation

MOST_LINES = 50_000
SLICE = 0.005
REQUIRED = ("custom_id", "method", "url", "body")
NAMES = {
    "/v1/chat/completions": ("Chat Completions", "messages"),
    "/v1/completions": ("Completions", "prompt"),
    "/v1/embeddings": ("Embeddings", "input"),
    "/v1/responses": ("Responses", "input"),
}


@dataclass(slots=True)
class Task:
    """One line: its id, and the request understood or the error that answers it."""

    custom_id: str
    ask: Ask | ApiError


@dataclass(slots=True)
class BatchInput:
    """A file read.

    Attributes:
        tasks: Its lines, without the blank ones.
        errors: What is wrong, as the Batch object shows it; where there is any, nothing is run.
        model: The model of all lines; None where there is none.
        tokens: Prompt tokens of all lines.
    """

    tasks: list[Task] = field(default_factory=list)
    errors: list[Json] = field(default_factory=list)
    model: str | None = None
    tokens: int = 0


@dataclass(slots=True)
class Reader:
    """Reads the lines of one file.

    Attributes:
        url: The batch's endpoint.
        endpoint: What answers there.
        count: Counts tokens.
        know: Raises ApiError for a model that does not exist.
    """

    url: str
    endpoint: Generation
    count: Count
    know: Callable[[str], None]
    read: BatchInput = field(default_factory=BatchInput)
    seen: set[str] = field(default_factory=set)

    async def all(self, content: bytes) -> BatchInput:
        """Read a file, a few milliseconds at a time."""
        await in_slices(self._steps(content))
        if not self.read.tasks and not self.read.errors:
            message = "The batch input file is empty. Please ensure that it contains at least one request."
            self.read.errors.append(error("empty_file", message))
        return self.read

    def _steps(self, content: bytes) -> Iterator[None]:
        lines = ((number, line) for number, line in enumerate(io.BytesIO(content), start=1) if line.strip())
        for many, (number, line) in enumerate(lines, start=1):
            if many > MOST_LINES:
                message = f"The batch input file contains more than {MOST_LINES:,} requests."
                self.read.errors[:] = [error("too_many_tasks", message)]
                return
            self._line(number, line)
            yield

    def _line(self, number: int, line: bytes) -> None:
        try:
            request = _parsed(line)
        except (ValueError, RecursionError):
            message = "This line is not parseable as valid JSON."
            self.read.errors.append(error("invalid_json_line", message, line=number))
            return
        wrong = [error(*what, line=number) for what in self._wrong(request)]
        self.read.errors.extend(wrong)
        if not wrong and not self.read.errors:
            self._keep(request)

    def _keep(self, request: Json) -> None:
        ask = self._understood(request["body"])
        self.read.tasks.append(Task(request["custom_id"], ask))
        self.read.tokens += ask.prompt_tokens if isinstance(ask, Ask) else 0

    def _understood(self, body: Json) -> Ask | ApiError:
        try:
            return self.endpoint.read(body, self.count)
        except ApiError as refusal:
            return refusal
        except Exception as problem:  # noqa: BLE001 - a body that trips the simulation is a 500 online, too
            return server_error(f"The server had an error while reading the request: {problem!r}")

    def _wrong(self, request: Json) -> Iterator[tuple[str, str, str]]:
        """Code, message and parameter of everything wrong with a line."""
        if missing := [name for name in REQUIRED if request.get(name) is None]:
            for name in missing:
                yield "missing_required_parameter", f"Missing required parameter: '{name}'.", name
            return
        custom_id, body = request["custom_id"], request["body"]
        if not isinstance(custom_id, str):
            yield "invalid_type", "Invalid type for 'custom_id': expected a string.", "custom_id"
        elif custom_id in self.seen:
            message = "The custom_id of this request is that of another request in this batch's input file."
            yield "duplicate_custom_id", message, "custom_id"
        else:
            self.seen.add(custom_id)
        if request["method"] != "POST":
            yield "invalid_method", "The method of a request in a batch must be POST.", "method"
        if request["url"] != self.url:
            message = "The URL provided for this request does not match the batch endpoint."
            yield "invalid_url", message, "url"
        if not isinstance(body, dict):
            yield "invalid_type", "Invalid type for 'body': expected an object.", "body"
            return
        yield from self._wrong_body(body)

    def _wrong_body(self, body: Json) -> Iterator[tuple[str, str, str]]:
        title, prompt = NAMES[self.url]
        if body.get(prompt) is None:
            yield "invalid_request", f"{prompt.title()} parameter is required.", f"body.{prompt}"
        if body.get("stream"):
            message = f"{title}: Streaming is not supported in the Batch API."
            yield "streaming_unsupported", message, "body.stream"
        model = body.get("model")
        if not isinstance(model, str):
            yield "invalid_request", "Model parameter is required.", "body.model"
            return
        try:
            self.know(model)
        except ApiError:
            message = f"The provided model '{model}' is not supported by the Batch API."
            yield "model_not_found", message, "body.model"
            return
        self.read.model = self.read.model or model
        if model != self.read.model:
            message = (
                "The provided model does not match that of the other requests in this batch. "
                "All requests of a batch must use the same model."
            )
            yield "mismatched_model", message, "body.model"


def _parsed(line: bytes) -> Json:
    request = DECODER.decode(line.decode())
    if not isinstance(request, dict):
        raise ValueError("not an object")  # noqa: TRY004
    return request


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")


DECODER = json.JSONDecoder(parse_constant=_no_number)


def error(code: str, message: str, param: str | None = None, *, line: int | None = None) -> Json:
    """One of a batch's errors, as `errors.data` lists it."""
    return {"code": code, "message": message, "param": param, "line": line}


async def in_slices(steps: Iterable[Any]) -> None:
    """Take steps for a few milliseconds at a time: the loop answers others in between."""
    due = time.monotonic() + SLICE
    for _ in steps:
        if time.monotonic() >= due:
            await asyncio.sleep(0)
            due = time.monotonic() + SLICE
