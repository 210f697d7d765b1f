"""What all commands share: what is said on standard error, and which exit code an error becomes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import sys
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import openai
import pydantic
from rich.console import Console

from openai_eval_client.client import OpenAIClient
from openai_eval_client.errors import BatchError, QuotaError, ValidationError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from openai_eval_client.config import OpenAIConfig

SOME_FAILED, BAD_INPUT, REFUSED, INTERRUPTED = 1, 2, 4, 130

T = TypeVar("T")

_REFUSALS = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError, QuotaError)
# What the code of a BatchError about a whole job comes to; any other: not one of its requests was run.
_OF_JOB = {
    **dict.fromkeys(("validating", "in_progress", "finalizing", "cancelling"), SOME_FAILED),
    "unsupported_endpoint": BAD_INPUT,
}


def say(message: str, *, style: str | None = None) -> None:
    """Write a line to standard error, as it is: standard output is for results alone."""
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
        fail(BAD_INPUT, "; ".join(problem["msg"] for problem in error.errors()))
    except ValidationError as error:
        fail(BAD_INPUT, str(error))
    except openai.OpenAIError as error:
        fail(_code_of(error), _sentence(error))
    except OSError as error:
        if error.errno == errno.EPIPE:  # the reader of our output has left
            raise
        fail(BAD_INPUT, f"{error.filename or 'a file'}: {error.strerror or error}")
    except KeyboardInterrupt:
        fail(INTERRUPTED, interrupted)


def run(config: OpenAIConfig, work: Callable[[OpenAIClient], Awaitable[T]], **options: Any) -> T:
    """Do something with a client, which is closed afterwards."""

    async def working() -> T:
        async with OpenAIClient(config, **options) as client:
            return await work(client)

    return asyncio.run(working())


def _code_of(error: openai.OpenAIError) -> int:
    if isinstance(error, BatchError):
        return _OF_JOB.get(error.code or "", REFUSED)
    return REFUSED if is_refusal(error) or isinstance(error, openai.BadRequestError) else SOME_FAILED


def _sentence(error: openai.OpenAIError) -> str:
    made = getattr(error, "job_id", None)
    return f"{error}\nwhat had been created was cancelled: {made}" if made else str(error)
