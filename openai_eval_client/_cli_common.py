"""What all commands share: what is said on standard error, and which exit code an error becomes."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
from typing import TYPE_CHECKING, Any, NoReturn

import openai
import pydantic
from rich.console import Console

from openai_eval_client import _bar
from openai_eval_client._retry import asked_wait, was_never_sent
from openai_eval_client.config import OpenAIConfig
from openai_eval_client.errors import BatchError, BudgetExceededError, QuotaError, ValidationError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

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
    if _bar.is_open():
        _bar.write_above(message)
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
    """End the program with a sentence and an exit code where an error says that the work cannot go on.

    Args:
        interrupted: The sentence after Ctrl-C.
    """
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
    *, base_url: str | None = None, key_file: Path | None = None, needs_key: bool = True, **fields: Any
) -> OpenAIConfig:
    """Return where the API is, and with which key.

    Args:
        base_url: The address; None: from the environment.
        key_file: A file with the key; None: from the environment.
        needs_key: Whether anything will be sent.
        **fields: Other fields of the config; None values are the defaults.

    Raises:
        OSError: The file cannot be read.
        pydantic.ValidationError: A field is wrong.
    """
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
    refused = is_refusal(error) or isinstance(error, openai.BadRequestError) or was_never_sent(error)
    return REFUSED if refused or asked_wait(error) else SOME_FAILED


def sentence(error: openai.OpenAIError) -> str:
    """Return what an error says, and where it leaves a job."""
    made = getattr(error, "job_id", None)
    return f"{error}\nwhat had been created was cancelled: {made}" if made else str(error)
