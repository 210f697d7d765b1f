"""What all commands share: their options, what they say, and how they end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import re
import signal
import sys
from pathlib import Path  # typer reads the annotations
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TypeVar

import openai
import pydantic
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer import Argument, Option

from openai_eval_client import _interrupts
from openai_eval_client._format import count, printable, printable_json, usd
from openai_eval_client._report import bar_is_open, write_above
from openai_eval_client._wire import Kind, code_of, forget_key, read_failure, status_of
from openai_eval_client.client import OpenAIClient
from openai_eval_client.config import BatchConfig, OpenAIConfig, RateLimitConfig
from openai_eval_client.errors import BatchError, BudgetExceededError, ValidationError, sdk_httpx

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Container, Iterable, Iterator, Mapping

T = TypeVar("T")

# --- options ----------------------------------------------------------------------------------------------

_LIMITS, _BATCH = RateLimitConfig(), BatchConfig()
DEFAULT_RPM, DEFAULT_TPM = _LIMITS.requests_per_minute or 0, _LIMITS.tokens_per_minute or 0
DEFAULT_CONCURRENT = _LIMITS.max_concurrent
DEFAULT_WINDOW, DEFAULT_INTERVAL = _BATCH.completion_window, _BATCH.polling_interval
DEFAULT_MODEL = OpenAIConfig.model_fields["default_model"].default

Api = Literal["chat", "responses"]
Form = Literal["jsonl", "csv", "tsv"]

Input = Annotated[
    str,
    Argument(
        metavar="INPUT",
        help="A file of JSON lines, CSV or TSV; - is standard input. A line of JSON is a text, or an object "
        "with prompt or messages, whose other keys are copied to the output.",
    ),
]
PromptColumn = Annotated[
    str | None, Option(metavar="NAME", help="The key or column of the prompt. (default: prompt or messages)")
]
FormOption = Annotated[
    Form | None, Option("--format", help="The input's format. (default: as the file's name ends, else jsonl)")
]
Limit = Annotated[int | None, Option(min=1, metavar="N", help="Only the first N rows. (default: all)")]
Model = Annotated[str | None, Option(help=f"The model to ask. (default: {DEFAULT_MODEL})")]
System = Annotated[str | None, Option(metavar="TEXT", help="A system prompt for all rows. (default: none)")]
Schema = Annotated[
    Path | None,
    Option(metavar="FILE", help="The JSON schema that answers must fit: structured outputs. (default: none)"),
]
Temperature = Annotated[float | None, Option(min=0, help="Sampling temperature. (default: the API's)")]
MaxTokens = Annotated[
    int | None, Option(min=1, metavar="N", help="Output tokens of an answer at most. (default: the API's)")
]
ApiOption = Annotated[Api, Option("--api", help="Chat completions, or the Responses API.")]
Params = Annotated[
    list[str] | None,
    Option(
        "--param",
        metavar="KEY=JSON",
        help="Any other parameter of the API, such as seed=7; may be repeated. (default: none)",
    ),
]
Rpm = Annotated[int, Option(min=0, metavar="N", help="Requests per minute; 0: as many as the server states.")]
Tpm = Annotated[int, Option(min=0, metavar="N", help="Tokens per minute; 0: as many as the server states.")]
MaxConcurrent = Annotated[int, Option(min=1, metavar="N", help="Requests in flight at most.")]
BaseUrl = Annotated[
    str | None,
    Option(metavar="URL", help="The API's address, up to /v1. (default: OPENAI_BASE_URL, or OpenAI's)"),
]
KeyFile = Annotated[
    Path | None,
    Option("--api-key-file", metavar="FILE", help="A file with the API key. (default: OPENAI_API_KEY)"),
]
OutputFile = Annotated[
    str, Option("--output", "-o", metavar="FILE", help="Where to write rows; - is standard output.")
]
Cache = Annotated[
    Path | None,
    Option(metavar="FILE", help="Keep answers and batches in this file, and use its own. (default: none)"),
]
Window = Annotated[str, Option(metavar="TIME", help="The time limit of a batch, such as 24h or 7d.")]
OnUnclear = Annotated[
    Literal["raise", "retry"],
    Option(
        help="If it is unknown whether a batch was created, or an answer paid for: raise gives it up, retry "
        "submits it again, perhaps paid twice."
    ),
]
Interval = Annotated[float, Option(metavar="SECONDS", help="Time between two looks at a batch.")]
AsJson = Annotated[bool, Option("--json", help="Print JSON instead of text.")]


def api_config(
    *, base_url: str | None = None, key_file: Path | None = None, needs_key: bool = True, **fields: Any
) -> OpenAIConfig:
    """Return where the API is, and with which key it is asked."""
    given = {"base_url": base_url, **fields}
    if key_file is not None:
        given["api_key"] = key_file.expanduser().read_text("utf-8").strip()
    elif not needs_key and not os.environ.get("OPENAI_API_KEY"):
        given["api_key"] = "none"
    return OpenAIConfig(**{name: value for name, value in given.items() if value is not None})


def rate_limit(rpm: int, tpm: int, max_concurrent: int = DEFAULT_CONCURRENT) -> RateLimitConfig:
    """Return the limits; 0 stands for what the server states."""
    return RateLimitConfig(
        requests_per_minute=rpm or None, tokens_per_minute=tpm or None, max_concurrent=max_concurrent
    )


def split_pairs(option: str, texts: Iterable[str], form: str) -> dict[str, str]:
    """Return the keys and values of an option that is repeated, such as KEY=VALUE."""
    pairs: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key or key in pairs:
            why = f"{key} was given before" if key in pairs else f"not {form}"
            raise ValidationError(f"{option} {text!r}: {why}", field=option.removeprefix("--"))
        pairs[key] = value
    return pairs


def request_params(pairs: Iterable[str], schema: Path | None, api: Api, **named: Any) -> dict[str, Any]:
    """Return what the client is asked with every row: --param, --schema, and the options for the rest."""
    texts = split_pairs("--param", pairs, "KEY=JSON")
    params: dict[str, Any] = {key: _value(key, text) for key, text in texts.items()}
    if schema is not None:
        params["response_format"] = _response_format(schema, api)
    named["api"] = api
    twice = sorted(params.keys() & {*named, "max_cost", "model", "temperature", "timeout"})
    if twice:
        raise ValidationError(f"--param {twice[0]}: there is an option for it", field="param")
    return {**params, **{name: value for name, value in named.items() if value is not None}}


def number_of(name: str, text: str | None) -> float | None:
    """Return a whole number as int, any other as float."""
    if text is None:
        return None
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        option = name.replace("_", "-")
        raise ValidationError(f"--{option} {text!r}: must be a number", field=name) from None


def _value(key: str, text: str) -> Any:
    """Return the JSON value, or the text itself if it does not look like JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        if text[:1] in {"{", "[", '"'}:
            raise ValidationError(f"--param {f'{key}={text}'!r}: not JSON: {error}", field="param") from None
        return text


def _response_format(path: Path, api: Api) -> dict[str, Any]:
    """Return the response_format for a schema: strict, unless the file itself says otherwise."""
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
    return {"type": "json_schema", **(schema if api == "responses" else {"json_schema": schema})}


# --- messages ---------------------------------------------------------------------------------------------


def say(message: str, *, style: str | None = None) -> None:
    """Write a line to standard error: standard output is for results alone."""
    text = Text(printable(message), style=style or "")  # nothing in it is markup
    if bar_is_open():
        write_above(text.plain)
    else:
        Console(stderr=True).print(text, soft_wrap=True)


def show(text: str) -> None:
    """Write a result to standard output."""
    typer.echo(printable(text))


def show_json(text: str, *, file: IO[str] | None = None) -> None:
    """Write a result in JSON to standard output, or to a file."""
    typer.echo(printable_json(text), file=file)


def fail(code: int, message: str) -> NoReturn:
    """Say what is wrong, and end with an exit code."""
    say(message, style="red")
    sys.exit(code)


def cost_text(cost: Any, unpriced: int) -> str:
    """Return what answers cost, some of which may have no known price."""
    if unpriced and not cost:
        return "cost unknown"
    return f"{usd(float(cost))} USD" + (f" and {count(unpriced)} unpriced" if unpriced else "")


def print_fields(fields: Mapping[str, str]) -> None:
    """Write names and values to standard output as a table, without those whose value is empty."""
    print_table(["", ""], [field for field in fields.items() if field[1]], show_header=False)


def print_table(
    columns: Iterable[str],
    rows: Iterable[Iterable[str]],
    *,
    right: Container[str] = (),  # the columns that are aligned to the right
    show_header: bool = True,
) -> None:
    """Write a table to standard output."""
    table = Table(box=box.SIMPLE, show_header=show_header)
    for name in columns:
        table.add_column(printable(name), justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console = Console()
    # Without a terminal, the table is as wide as need be: a job's id stays on one line.
    (console if console.is_terminal else Console(width=1000)).print(table)


class _LogLines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage(), style="yellow" if record.levelno >= logging.WARNING else "dim")


def show_log(*, verbose: bool = False) -> None:
    """Show the library's warnings on standard error; if `verbose`, its waits and retries as well."""
    logger = logging.getLogger("openai_eval_client")
    logger.handlers[:] = [_LogLines()]
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    logger.propagate = False


# --- what a failure means ---------------------------------------------------------------------------------

SOME_FAILED, BAD_INPUT, BUDGET, REFUSED, INTERRUPTED = 1, 2, 3, 4, _interrupts.INTERRUPTED

_REFUSALS = {Kind.REFUSED_KEY, Kind.REFUSED_MODEL, Kind.NOT_FOUND, Kind.NOT_AN_API, Kind.OUT_OF_QUOTA}
_BY_JOB_CODE = {  # of a BatchError about a whole job; any other code: none of its requests was run
    **dict.fromkeys(("validating", "in_progress", "finalizing", "cancelling"), SOME_FAILED),
    "unsupported_endpoint": BAD_INPUT,
}
_CHECK_URL = "check --base-url or OPENAI_BASE_URL: it goes up to /v1"
_TO_CHECK = {
    Kind.OUT_OF_QUOTA: "check the account's credit",
    Kind.REFUSED_KEY: "check OPENAI_API_KEY or --api-key-file, and whether that key may use --model",
    Kind.REFUSED_MODEL: "check --model",
    Kind.NOT_FOUND: _CHECK_URL,
    Kind.NOT_AN_API: _CHECK_URL,
    Kind.UNREACHABLE: f"{_CHECK_URL}, and whether its server runs",
}


def is_refusal(error: BaseException) -> bool:
    """Return whether every other request would fail the same way: key, permission, model or credit."""
    return read_failure(error).kind in _REFUSALS


def exit_code_of(error: Exception) -> int:
    """Return the exit code for an error that ends the work."""
    if isinstance(error, ValidationError) or not isinstance(error, openai.OpenAIError):
        return BAD_INPUT
    if isinstance(error, BatchError):
        return _BY_JOB_CODE.get(error.code or "", REFUSED)
    if isinstance(error, BudgetExceededError):
        return BUDGET
    failure = read_failure(error)
    refused = failure.kind in _REFUSALS | {Kind.UNREACHABLE} or isinstance(error, openai.BadRequestError)
    return REFUSED if refused or failure.wait else SOME_FAILED


def message_of(error: openai.OpenAIError) -> str:
    """Return an error's message, and the job that was cancelled because of it."""
    job = getattr(error, "job_id", None)
    return f"{error}\nwhat had been created was cancelled: {job}" if job else str(error)


def explain(error: Exception) -> str:
    """Return the kind of an error and what it means; unlike the error's message, this quotes no prompt."""
    kind = type(error).__name__, status_of(error), code_of(error)
    return f"{' '.join(str(part) for part in kind if part)}: {read_failure(error).meaning}"


def what_to_check(error: Exception | None, *, answered: bool) -> str:
    """Return what to change if the same command would fail the same way; "" if it need not."""
    if error is None:
        return ""
    if isinstance(error, BudgetExceededError):
        return "" if answered else "nothing fits: raise --max-cost, or lower --max-tokens"
    if isinstance(error, openai.BadRequestError):
        return "check --model and the parameters"
    kind = read_failure(error).kind
    if kind is Kind.NOT_FOUND and "model" in str(error).lower():
        kind = Kind.REFUSED_MODEL
    return _TO_CHECK.get(kind, "")


@contextlib.contextmanager
def exit_codes(*, interrupted: str = "interrupted") -> Iterator[None]:
    """End the program with a sentence and an exit code if an error says that the work cannot go on."""
    with _raising():
        try:
            yield
        except pydantic.ValidationError as error:  # of a config: it names field and value, but not the key
            text = "; ".join(problem["msg"] for problem in error.errors())
            known = "pass api_key=... or set OPENAI_API_KEY"
            fail(BAD_INPUT, text.replace(known, "set OPENAI_API_KEY, or give --api-key-file"))
        except openai.OpenAIError as error:
            fail(exit_code_of(error), message_of(forget_key(error)))
        except UnicodeDecodeError as error:
            fail(BAD_INPUT, f"a file is not UTF-8: {error.reason}")
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of our output has left
                raise
            fail(BAD_INPUT, f"{error.filename or 'a file'}: {error.strerror or error}")
        except KeyboardInterrupt:
            _interrupts.handle(_interrupts.end)
            fail(INTERRUPTED, interrupted)


# --- what a signal does -----------------------------------------------------------------------------------


@contextlib.contextmanager
def _raising() -> Iterator[None]:
    """Have the first signal raise KeyboardInterrupt, so that what is open is closed, and the next end all."""

    def on_first(*_: object) -> None:
        _interrupts.handle(_interrupts.end)
        raise KeyboardInterrupt

    before = _interrupts.handle(on_first)
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


GRACE = 5.0  # seconds that requests in flight have to finish


@contextlib.contextmanager
def interruptible(*, at_once: bool = False, last_words: str = "") -> Iterator[asyncio.Event]:
    """Handle the signals that come while a task is inside, and yield an event that the first one sets."""
    # `GRACE` seconds later the task is cancelled, and leaves the block without an error; a second signal ends
    # the process with `last_words`. With `at_once`, the first signal cancels the task at once, and a second
    # one raises KeyboardInterrupt.
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    cancel: Callable[[], object] = loop.stop if task is None else task.cancel
    stop, seen = asyncio.Event(), False

    def on_first() -> None:
        stop.set()
        cleanup.callback(loop.call_later(0 if at_once else GRACE, cancel).cancel)
        if not at_once:
            again = "interrupt again to end at once"
            say(f"interrupted: requests in flight may finish, for {GRACE:g} s; {again}")

    def on_signal(*_: object) -> None:
        nonlocal seen
        if not seen:
            seen = True
            loop.call_soon_threadsafe(on_first)
        elif at_once:
            cleanup.close()
            raise KeyboardInterrupt
        else:
            below = "\n\n" if bar_is_open() else ""
            with contextlib.suppress(OSError):  # not by `say`: the signal may have come in a print
                os.write(sys.stderr.fileno(), f"{below}{last_words}\n".encode())
            os._exit(INTERRUPTED)

    with contextlib.ExitStack() as cleanup:
        for number, before in _interrupts.handle(on_signal):
            cleanup.callback(signal.signal, number, before)
        try:
            yield stop
        except asyncio.CancelledError:
            if not stop.is_set():  # not by a signal
                raise


def open_client(config: OpenAIConfig, **options: Any) -> OpenAIClient:
    """Return a client; what the environment makes impossible is bad input."""
    try:
        return OpenAIClient(config, **options)
    except (openai.OpenAIError, pydantic.ValidationError):
        raise
    except (ImportError, ValueError, sdk_httpx().InvalidURL) as error:
        raise ValidationError(str(error)) from None


def with_client(config: OpenAIConfig, work: Callable[[OpenAIClient], Awaitable[T]], **options: Any) -> T:
    """Do work with a client, which is closed afterwards; a signal cancels it at once, whatever task runs."""
    # Before Python 3.11, `asyncio.run` leaves it to chance which task gets the `KeyboardInterrupt`.

    async def working() -> T:
        with interruptible(at_once=True):
            async with open_client(config, **options) as client:
                return await work(client)
        raise KeyboardInterrupt  # a signal has cancelled it

    return asyncio.run(working())
