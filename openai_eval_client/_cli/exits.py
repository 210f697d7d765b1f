"""How a command ends: what it says, its exit code, what a failure means, what a signal does."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import openai
import pydantic
from rich.console import Console

from openai_eval_client._format import count, usd
from openai_eval_client._report import bar_is_open, write_above
from openai_eval_client._wire import Kind, code_of, meaning_of, read_failure, status_of
from openai_eval_client.client import OpenAIClient
from openai_eval_client.errors import BatchError, BudgetExceededError, QuotaError, ValidationError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterator

    from typing_extensions import Self

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

ErrorKind = tuple[str, int | None, str]  # of an error: its class, HTTP status and code

_REFUSALS = {Kind.REFUSED_KEY, Kind.REFUSED_MODEL, Kind.NOT_FOUND, Kind.OUT_OF_QUOTA}
_BY_JOB_CODE = {  # of a BatchError about a whole job; any other code: none of its requests was run
    **dict.fromkeys(("validating", "in_progress", "finalizing", "cancelling"), SOME_FAILED),
    "unsupported_endpoint": BAD_INPUT,
}
_CHECK_URL = "check --base-url or OPENAI_BASE_URL: it goes up to /v1"
_TO_CHECK: dict[type[Exception], str] = {
    openai.AuthenticationError: "check OPENAI_API_KEY or --api-key-file",
    openai.PermissionDeniedError: "check what the key may do, and --model",
    openai.NotFoundError: "check --model",
    openai.BadRequestError: "check --model and the parameters",
    QuotaError: "check the account's credit",
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


def kind_of(error: Exception) -> ErrorKind:
    """Return the kind of error that a row failed with; unlike its message, it quotes no prompt."""
    return type(error).__name__, status_of(error), code_of(error)


def explain(kind: ErrorKind) -> str:
    """Return a kind of error and what it means."""
    name = " ".join(str(part) for part in kind if part)
    means = meaning_of(*kind).partition("; sent again")[0].replace("the exception", "its row")
    return f"{name}: {means}"


def what_to_check(error: Exception | None, *, answered: bool) -> str:
    """Return what to change if the same command would fail the same way; "" if it need not."""
    if isinstance(error, BudgetExceededError) and not answered:
        return "nothing fits: raise --max-cost, or lower --max-tokens"
    if isinstance(error, openai.NotFoundError) and "model" not in str(error).lower():
        return _CHECK_URL
    if error is not None and read_failure(error).kind is Kind.UNREACHABLE:
        return f"{_CHECK_URL}, and whether its server runs"
    return next((advice for kind, advice in _TO_CHECK.items() if isinstance(error, kind)), "")


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


class Interrupts:
    """Handles the signals while it is entered, inside a running event loop.

    The first one sets `event`, and cancels the task after `GRACE` seconds; a second one ends the process with
    `last_words`. With `at_once`, the first one cancels the task, and a second one raises KeyboardInterrupt.
    """

    def __init__(self, *, at_once: bool = False, last_words: str = "") -> None:
        self.event = asyncio.Event()
        self._at_once = at_once
        self._last_words = last_words
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._timer: asyncio.TimerHandle | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._seen = False

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            handled = [number for number in _SIGNALS if signal.getsignal(number) not in _NOT_OURS]
            self._before = {number: signal.signal(number, self._on_signal) for number in handled}
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: object) -> None:  # noqa: ARG002  # what the system hands over
        if self._seen:
            self._end()
        self._seen = True
        self._loop.call_soon_threadsafe(self._stop)

    def _end(self) -> NoReturn:
        if self._at_once:
            self._restore()
            raise KeyboardInterrupt
        below = "\n\n" if bar_is_open() else ""
        with contextlib.suppress(OSError):  # not by `say`: the signal may have come in the middle of a print
            os.write(sys.stderr.fileno(), f"{below}{self._last_words}\n".encode())
        os._exit(INTERRUPTED)

    def _stop(self) -> None:
        cancel: Callable[[], object] = self._task.cancel if self._task is not None else self._loop.stop
        self.event.set()
        if self._at_once:
            cancel()
            return
        self._timer = self._loop.call_later(GRACE, cancel)
        say(f"interrupted: requests in flight may finish, for {GRACE:g} s; interrupt again to end at once")


def complete(work: Coroutine[Any, Any, T]) -> T:
    """Run work to its end; a signal cancels it at once, whatever task is running."""
    # Before Python 3.11, `asyncio.run` leaves it to chance which task gets the `KeyboardInterrupt`.

    async def working() -> T:
        with Interrupts(at_once=True) as signals:
            try:
                return await work
            except asyncio.CancelledError:
                if not signals.event.is_set():
                    raise
                raise KeyboardInterrupt from None

    return asyncio.run(working())


def with_client(config: OpenAIConfig, work: Callable[[OpenAIClient], Awaitable[T]], **options: Any) -> T:
    """Do work with a client, which is closed afterwards; a signal ends it, as in `complete`."""

    async def working() -> T:
        async with OpenAIClient(config, **options) as client:
            return await work(client)

    return complete(working())
