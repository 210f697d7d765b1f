"""Many prompts online: answered by a crew, collected in input order."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, TypeVar

from openai_eval_client._callbacks import report
from openai_eval_client._checks import check_count
from openai_eval_client._crew import Crew
from openai_eval_client._requests import check_prompt
from openai_eval_client._retry import is_doom
from openai_eval_client._tickets import Lane
from openai_eval_client.errors import PartialFailureError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from openai_eval_client._callbacks import Progress
    from openai_eval_client._progress import Display
    from openai_eval_client._requests import Parameters
    from openai_eval_client._spending import Purse
    from openai_eval_client.config import RateLimitConfig
    from openai_eval_client.models import ModelResponse

E = TypeVar("E", bound=BaseException)

_READ_AHEAD = 32  # prompts beyond those in flight: ready when one is done; more would only take memory


def crew(
    call: Callable[..., Awaitable[ModelResponse]],
    parameters: Parameters,
    limits: RateLimitConfig,
    max_concurrent: int | None,
    purse: Purse | None,
) -> Crew:
    """Return the crew that answers prompts.

    Args:
        call: Answers one.
        parameters: What all of them share.
        limits: The client's limits.
        max_concurrent: Requests in flight at once; None: what the limits say.
        purse: What they are paid from besides the client's purse.

    Returns:
        The crew, for one run.

    Raises:
        ValidationError: `max_concurrent` is no count.
    """
    if max_concurrent is not None:
        check_count(max_concurrent, "max_concurrent")
    lane = Lane(max_concurrent) if max_concurrent else None

    def answer(index: int, prompt: Any, *, sending: Any) -> Awaitable[ModelResponse]:
        check_prompt(prompt, index)
        return call(prompt, parameters, lane=lane, purse=purse, sending=sending)

    def dooms(error: Exception, answered: bool) -> bool:
        return is_doom(error, limits.max_wait, answered=answered)

    in_flight = max_concurrent or limits.max_concurrent
    width = in_flight + min(in_flight, _READ_AHEAD)
    return Crew(answer, slots=in_flight, width=width, is_doom=dooms)


async def collect(
    crew: Crew,
    prompts: Sequence[Any],
    *,
    progress: Progress | None,
    return_exceptions: bool,
    display: Display | None = None,
) -> list[Any]:
    """Answer all prompts and return the responses in input order.

    Args:
        crew: Answers them.
        prompts: The prompts.
        progress: Called with the finished fraction after each.
        display: Shows how far it is; None: nothing does.
        return_exceptions: Put a failed prompt's exception in its place, instead of raising at the end.

    Returns:
        One entry per prompt.

    Raises:
        PartialFailureError: Some failed, and `return_exceptions` is False.
        openai.APIError: An error that dooms all prompts alike; `.responses` holds what was answered.
        asyncio.CancelledError: The run was cancelled; it too has `.responses`.
    """
    outcomes: list[Any] = [None] * len(prompts)
    if not prompts:
        await report(progress, 1.0)
    try:
        async with contextlib.aclosing(crew.run(prompts)) as stream:
            done = 0
            async for index, outcome in stream:
                outcomes[index] = outcome
                done += 1
                if display is not None:
                    display.count(outcome)
                if crew.error is None:
                    await report(progress, done / len(prompts))
    except (Exception, asyncio.CancelledError) as error:
        for index, outcome in crew.unclaimed():
            outcomes[index] = outcome
        attach(error, answered(outcomes))
        raise
    return handed_out(outcomes, return_exceptions=return_exceptions)


def handed_out(outcomes: list[Any], *, return_exceptions: bool) -> list[Any]:
    """Return the outcomes of all requests, in input order.

    Raises:
        PartialFailureError: Some are exceptions, which `return_exceptions` does not allow.
    """
    failures = {index: error for index, error in enumerate(outcomes) if isinstance(error, Exception)}
    if failures and not return_exceptions:
        raise PartialFailureError(answered(outcomes), failures)
    return outcomes


def answered(outcomes: Sequence[ModelResponse | Exception | None]) -> list[ModelResponse | None]:
    """Return the responses among outcomes, None in the place of all others."""
    return [None if isinstance(outcome, Exception) else outcome for outcome in outcomes]


def attach(error: E, responses: Sequence[ModelResponse | None]) -> E:
    """Give an error the answers there were before it, as `.responses`."""
    error.__dict__["responses"] = list(responses)
    return error
