"""How a command ends: what it says, its exit code, what a failure means, what a signal does."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import sys
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import openai
import pydantic
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from openai_eval_client._format import count, usd
from openai_eval_client._report import bar_is_open, write_above
from openai_eval_client._wire import Kind, code_of, meaning_of, read_failure, status_of
from openai_eval_client.client import OpenAIClient
from openai_eval_client.errors import BatchError, BudgetExceededError, ValidationError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Container, Iterable, Iterator, Mapping

    from openai_eval_client.config import OpenAIConfig

T = TypeVar("T")

# --- messages ---------------------------------------------------------------------------------------------


def say(message: str, *, style: str | None = None) -> None:
    """Write a line to standard error, as it is: standard output is for results alone."""
    if bar_is_open():
        write_above(message)
        return
    Console(stderr=True).print(message, style=style, markup=False, highlight=False, soft_wrap=True)


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
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
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

SOME_FAILED, BAD_INPUT, BUDGET, REFUSED, INTERRUPTED = 1, 2, 3, 4, 130

_REFUSALS = {Kind.REFUSED_KEY, Kind.REFUSED_MODEL, Kind.NOT_FOUND, Kind.OUT_OF_QUOTA}
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
    means = meaning_of(*kind).partition("; sent again")[0].replace("the exception", "its row")
    return f"{' '.join(str(part) for part in kind if part)}: {means}"


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
    try:
        yield
    except pydantic.ValidationError as error:  # of a config: it names field and value, but not the key
        text = "; ".join(problem["msg"] for problem in error.errors())
        known = "pass api_key=... or set OPENAI_API_KEY"
        fail(BAD_INPUT, text.replace(known, "set OPENAI_API_KEY, or give --api-key-file"))
    except openai.OpenAIError as error:
        fail(exit_code_of(error), message_of(error))
    except UnicodeDecodeError as error:
        fail(BAD_INPUT, f"a file is not UTF-8: {error.reason}")
    except OSError as error:
        if error.errno == errno.EPIPE:  # the reader of our output has left
            raise
        fail(BAD_INPUT, f"{error.filename or 'a file'}: {error.strerror or error}")
    except KeyboardInterrupt:
        fail(INTERRUPTED, interrupted)


# --- what a signal does -----------------------------------------------------------------------------------

GRACE = 5.0  # seconds that requests in flight have to finish
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_NOT_OURS = (signal.SIG_IGN, None)  # as a shell has it for what runs in the background; not from Python


@contextlib.contextmanager
def interruptible(*, at_once: bool = False, last_words: str = "") -> Iterator[asyncio.Event]:
    """Handle the signals that come while a task is inside, and yield an event that the first one sets.

    `GRACE` seconds later the task is cancelled, and leaves the block without an error; a second signal ends
    the process with `last_words`. With `at_once`, the first signal cancels the task at once, and a second one
    raises KeyboardInterrupt.
    """
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
        for number in _SIGNALS:
            if signal.getsignal(number) not in _NOT_OURS:
                cleanup.callback(signal.signal, number, signal.signal(number, on_signal))
        try:
            yield stop
        except asyncio.CancelledError:
            if not stop.is_set():  # not by a signal
                raise


def with_client(config: OpenAIConfig, work: Callable[[OpenAIClient], Awaitable[T]], **options: Any) -> T:
    """Do work with a client, which is closed afterwards; a signal cancels it at once, whatever task runs."""
    # Before Python 3.11, `asyncio.run` leaves it to chance which task gets the `KeyboardInterrupt`.

    async def working() -> T:
        with interruptible(at_once=True):
            async with OpenAIClient(config, **options) as client:
                return await work(client)
        raise KeyboardInterrupt  # a signal has cancelled it

    return asyncio.run(working())
