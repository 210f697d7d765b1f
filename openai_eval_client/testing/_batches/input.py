"""A batch's input file, read and validated as the API does."""

from __future__ import annotations

import asyncio
import io
import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from .._endpoints import CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES
from .._faults import ApiError, server_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .._endpoints import Ask, Count

Json = dict[str, Any]
MOST_LINES = 50_000
SLICE = 0.005  # seconds of work until other tasks get a turn
REQUIRED = ("custom_id", "method", "url", "body")
URLS = {  # of a batch's lines: what answers there, its name in messages, and the parameter of its prompt
    "/v1/chat/completions": (CHAT, "Chat Completions", "messages"),
    "/v1/completions": (COMPLETIONS, "Completions", "prompt"),
    "/v1/embeddings": (EMBEDDINGS, "Embeddings", "input"),
    "/v1/responses": (RESPONSES, "Responses", "input"),
}


@dataclass(slots=True)
class Task:
    """One line: its id, and the request understood or the error that answers it."""

    custom_id: str
    ask: Ask | ApiError


@dataclass(slots=True)
class BatchInput:
    tasks: list[Task] = field(default_factory=list)
    errors: list[Json] = field(default_factory=list)  # as the Batch object shows them; if any, nothing is run
    model: str | None = None  # of all lines
    tokens: int = 0  # of all prompts


class Turns:
    """Lets other tasks run after every few milliseconds of work."""

    def __init__(self) -> None:
        self._due = time.monotonic() + SLICE

    async def give(self) -> None:
        """Let other tasks run, if it is time."""
        if time.monotonic() >= self._due:
            await asyncio.sleep(0)
            self._due = time.monotonic() + SLICE


@dataclass(slots=True)
class Reader:
    url: str
    count: Count
    check_model: Callable[[str], None]  # raises ApiError for a model that does not exist
    lenient: bool = False
    read: BatchInput = field(default_factory=BatchInput)
    seen: set[str] = field(default_factory=set)

    async def all(self, content: bytes) -> BatchInput:
        turns, many = Turns(), 0
        for number, line in enumerate(io.BytesIO(content), start=1):
            if not line.strip():
                continue
            many += 1
            if many > MOST_LINES:
                message = f"The batch input file contains more than {MOST_LINES:,} requests."
                self.read.errors[:] = [batch_error("too_many_tasks", message)]
                break
            self._line(number, line)
            await turns.give()
        if not many:
            message = "The batch input file is empty. Please ensure that it contains at least one request."
            self.read.errors.append(batch_error("empty_file", message))
        return self.read

    def _line(self, number: int, line: bytes) -> None:
        try:
            request = _parsed(line)
        except (ValueError, RecursionError):
            message = "This line is not parseable as valid JSON."
            self.read.errors.append(batch_error("invalid_json_line", message, line=number))
            return
        wrong = [batch_error(*what, line=number) for what in self._wrong(request)]
        self.read.errors.extend(wrong)
        if not self.read.errors:
            self._keep(request)

    def _keep(self, request: Json) -> None:
        ask: Ask | ApiError
        try:
            ask = URLS[self.url][0].understand(request["body"], self.count, lenient=self.lenient)
            self.read.tokens += ask.prompt_tokens
        except ApiError as refusal:
            ask = refusal
        except Exception as problem:  # noqa: BLE001 - online, too, it would be a 500
            ask = server_error(f"The server had an error while reading the request: {problem!r}")
        self.read.tasks.append(Task(request["custom_id"], ask))

    def _wrong(self, request: Json) -> Iterator[tuple[str, str, str]]:
        """Yield code, message and parameter of everything wrong with a line."""
        if missing := [name for name in REQUIRED if request.get(name) is None]:
            for name in missing:
                yield "missing_required_parameter", f"Missing required parameter: '{name}'.", name
            return
        yield from self._wrong_id(request["custom_id"])
        if request["method"] != "POST":
            yield "invalid_method", "The method of a request in a batch must be POST.", "method"
        if request["url"] != self.url:
            yield "invalid_url", "The URL provided for this request does not match the batch endpoint.", "url"
        if isinstance(request["body"], dict):
            yield from self._wrong_body(request["body"])
        else:
            yield "invalid_type", "Invalid type for 'body': expected an object.", "body"

    def _wrong_id(self, custom_id: Any) -> Iterator[tuple[str, str, str]]:
        if not isinstance(custom_id, str):
            yield "invalid_type", "Invalid type for 'custom_id': expected a string.", "custom_id"
        elif custom_id in self.seen:
            message = "The custom_id of this request is that of another request in this batch's input file."
            yield "duplicate_custom_id", message, "custom_id"
        else:
            self.seen.add(custom_id)

    def _wrong_body(self, body: Json) -> Iterator[tuple[str, str, str]]:
        _, title, prompt = URLS[self.url]
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
            self.check_model(model)
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


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def batch_error(code: str, message: str, param: str | None = None, *, line: int | None = None) -> Json:
    """Return one error as a batch's `errors.data` lists it."""
    return {"code": code, "message": message, "param": param, "line": line}
