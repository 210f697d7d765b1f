"""What all commands share: options, exit codes, messages."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import sys
from enum import Enum
from pathlib import Path  # typer reads the annotations
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import openai
import pydantic
import typer
from rich.console import Console

from openai_eval_client._report import bar_is_open, write_above
from openai_eval_client._wire import Kind, read_failure
from openai_eval_client.config import OpenAIConfig, RateLimitConfig
from openai_eval_client.errors import BatchError, BudgetExceededError, QuotaError, ValidationError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


SOME_FAILED, BAD_INPUT, BUDGET, REFUSED, INTERRUPTED = 1, 2, 3, 4, 130

_NO_KEY = "set OPENAI_API_KEY, or give --api-key-file"

_REFUSALS = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError, QuotaError)
# What the code of a BatchError about a whole job comes to; any other: not one of its requests was run.
_OF_JOB = {
    **dict.fromkeys(("validating", "in_progress", "finalizing", "cancelling"), SOME_FAILED),
    "unsupported_endpoint": BAD_INPUT,
}


class Handler(logging.Handler):
    """Shows what the library logs as lines of standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, without where it comes from."""
        say(record.getMessage(), style="yellow" if record.levelno >= logging.WARNING else "dim")


def show_log(*, verbose: bool = False) -> None:
    """Show warnings of the library, and its account of waits and retries where that is wanted."""
    logger = logging.getLogger("openai_eval_client")
    logger.handlers[:] = [Handler()]
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    logger.propagate = False


def say(message: str, *, style: str | None = None) -> None:
    """Write a line to standard error, as it is: standard output is for results alone."""
    if bar_is_open():
        write_above(message)
        return
    Console(stderr=True).print(message, style=style, markup=False, highlight=False, soft_wrap=True)


def fail(code: int, message: str) -> NoReturn:
    """Say what is wrong, and end with a code."""
    say(message, style="red")
    sys.exit(code)


def is_refusal(error: object) -> bool:
    """Return whether every other request would meet the same: key, permission, model or credit."""
    return isinstance(error, _REFUSALS)


@contextlib.contextmanager
def exit_codes(*, interrupted: str = "interrupted") -> Iterator[None]:
    """End the program with a sentence and an exit code where an error says that the work cannot go on."""
    try:
        yield
    except pydantic.ValidationError as error:  # of a config: it names field and value, but not the key
        said = "; ".join(problem["msg"] for problem in error.errors())
        fail(BAD_INPUT, said.replace("pass api_key=... or set OPENAI_API_KEY", _NO_KEY))
    except ValidationError as error:
        fail(BAD_INPUT, str(error))
    except openai.OpenAIError as error:
        fail(code_of(error), sentence(error))
    except UnicodeDecodeError as error:
        fail(BAD_INPUT, f"a file is not UTF-8: {error.reason}")
    except OSError as error:
        if error.errno == errno.EPIPE:  # the reader of our output has left
            raise
        fail(BAD_INPUT, f"{error.filename or 'a file'}: {error.strerror or error}")
    except KeyboardInterrupt:
        fail(INTERRUPTED, interrupted)


def account(
    *,
    base_url: str | None = None,
    key_file: Path | None = None,
    needs_key: bool = True,
    **fields: Any,
) -> OpenAIConfig:
    """Return where the API is, and with which key."""
    given = {"base_url": base_url, **fields}
    if key_file is not None:
        given["api_key"] = key_file.expanduser().read_text("utf-8").strip()
    elif not needs_key and not os.environ.get("OPENAI_API_KEY"):
        given["api_key"] = "none"
    return OpenAIConfig(**{name: value for name, value in given.items() if value is not None})


def code_of(error: openai.OpenAIError) -> int:
    """Return the exit code of an error that ends the work."""
    if isinstance(error, BatchError):
        return _OF_JOB.get(error.code or "", REFUSED)
    if isinstance(error, BudgetExceededError):
        return BUDGET
    if isinstance(error, ValidationError):
        return BAD_INPUT
    refused = (
        is_refusal(error)
        or isinstance(error, openai.BadRequestError)
        or read_failure(error).kind is Kind.UNREACHABLE
    )
    return REFUSED if refused or read_failure(error).wait else SOME_FAILED


def sentence(error: openai.OpenAIError) -> str:
    """Return what an error says, and where it leaves a job."""
    made = getattr(error, "job_id", None)
    return f"{error}\nwhat had been created was cancelled: {made}" if made else str(error)


_LIMITS = RateLimitConfig()
_DEFAULT_MODEL = OpenAIConfig.model_fields["default_model"].default


class Api(str, Enum):
    """The endpoints that a request may be for."""

    chat = "chat"
    responses = "responses"


class Form(str, Enum):
    """The forms of an input."""

    jsonl = "jsonl"
    csv = "csv"
    tsv = "tsv"


Input = Annotated[
    str,
    typer.Argument(
        metavar="INPUT",
        help="JSON lines or CSV, - for standard input. A line is a text, or an object with prompt or "
        "messages; its other keys are carried to the output.",
    ),
]
PromptColumn = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="The key or column of the prompt. (default: prompt)"),
]
FormOption = Annotated[
    Form | None,
    typer.Option("--format", help="Of the input; by default as its name ends, else jsonl."),
]
Limit = Annotated[int | None, typer.Option(min=1, metavar="N", help="The first N rows only.")]
Model = Annotated[str | None, typer.Option(help=f"The model to ask. (default: {_DEFAULT_MODEL})")]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="A system prompt for all rows.")]
Schema = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="A JSON schema that the answers are to fit (structured outputs)."),
]
Temperature = Annotated[float | None, typer.Option(min=0, help="Not sent unless given.")]
MaxTokens = Annotated[int | None, typer.Option(min=1, metavar="N", help="Output tokens at most, of a row.")]
ApiOption = Annotated[Api, typer.Option("--api", help="Chat completions, or the Responses API.")]
Params = Annotated[
    list[str] | None,
    typer.Option(
        "--param",
        metavar="KEY=JSON",
        help="Any other parameter of the API, such as seed=7 or stop='[\"END\"]'; repeatable.",
    ),
]
Rpm = Annotated[
    int,
    typer.Option(min=0, metavar="N", help="Requests per minute; 0: as the server says (see limits)."),
]
Tpm = Annotated[
    int,
    typer.Option(min=0, metavar="N", help="Tokens per minute; 0: as the server says (see limits)."),
]
MaxConcurrent = Annotated[int, typer.Option(min=1, metavar="N", help="Requests in flight at once.")]
BaseUrl = Annotated[
    str | None,
    typer.Option(metavar="URL", help="The API's address, up to /v1. (default: OPENAI_BASE_URL)"),
]
KeyFile = Annotated[
    Path | None,
    typer.Option("--api-key-file", metavar="FILE", help="A file with the key. (default: OPENAI_API_KEY)"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Say it as a JSON object.")]

DEFAULT_RPM, DEFAULT_TPM = _LIMITS.requests_per_minute or 0, _LIMITS.tokens_per_minute or 0
DEFAULT_CONCURRENT = _LIMITS.max_concurrent


def limits(rpm: int, tpm: int, max_concurrent: int) -> RateLimitConfig:
    """Return the limits; 0 stands for what the server says."""
    return RateLimitConfig(
        requests_per_minute=rpm or None,
        tokens_per_minute=tpm or None,
        max_concurrent=max_concurrent,
    )


def chat_params(pairs: Sequence[str], schema: Path | None, api: Api) -> dict[str, Any]:
    """Return the parameters that --param and --schema name."""
    params: dict[str, Any] = {}
    for text in pairs:
        key, equals, value = text.partition("=")
        if not equals or not key or key in params:
            why = "given before" if key in params else "not KEY=JSON"
            raise ValidationError(f"--param {text!r}: {why}", field="param")
        params[key] = _value(text, value)
    if schema is not None:
        params["response_format"] = _format(schema, api)
    return params


def _value(text: str, value: str) -> Any:
    """Return the JSON value, or the text itself where it does not look like JSON."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        if value[:1] in {"{", "[", '"'}:
            raise ValidationError(f"--param {text!r}: not JSON: {error}", field="param") from None
        return value


def _format(path: Path, api: Api) -> dict[str, Any]:
    """Return the response_format of a schema: strict, unless the file says itself how it is to be taken."""
    try:
        schema = json.loads(path.expanduser().read_text("utf-8"))
    except ValueError as error:
        raise ValidationError(f"{path}: not JSON: {error}", field="schema") from None
    if not isinstance(schema, dict):
        raise ValidationError(f"{path}: must be a JSON object", field="schema")
    if isinstance(schema.get("json_schema"), dict):
        schema = schema["json_schema"]
    if not isinstance(schema.get("schema"), dict):
        name = re.sub(r"[^a-zA-Z0-9_-]+", "_", str(schema.get("title") or path.stem))[:64]
        schema = {"name": name, "schema": schema, "strict": True}
    if api is Api.responses:
        return {"type": "json_schema", **schema}
    return {"type": "json_schema", "json_schema": schema}
