"""The methods of the evaluation client for any number of prompts, in bounded memory."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sized
from typing import TYPE_CHECKING, Any

from openai_eval_client import _estimate, _runner
from openai_eval_client._callbacks import Guarded
from openai_eval_client._checks import check_callback, check_event, check_switch
from openai_eval_client._figures import Reading
from openai_eval_client._requests import PATHS, check_iterable, check_parameters

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Sequence
    from decimal import Decimal

    from openai_eval_client._caller import Caller
    from openai_eval_client._crew import Crew
    from openai_eval_client._governor import Governor
    from openai_eval_client._progress import Display
    from openai_eval_client._requests import Parameters
    from openai_eval_client._spending import Purse
    from openai_eval_client._tokens import TokenCounter
    from openai_eval_client.config import OpenAIConfig
    from openai_eval_client.costs import CostEstimate
    from openai_eval_client.models import ModelResponse

    Prompt = str | Sequence[Any]


class StreamMethods:
    """Prompts from any iterable: answered as they come, or counted before they are sent."""

    _call: Caller
    _counter: TokenCounter
    _config: OpenAIConfig
    _governor: Governor
    _http: Any

    def as_completed(
        self,
        prompts: Iterable[Prompt] | AsyncIterable[Prompt],
        *,
        model: str | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        timeout: float | None = None,
        system: str | None = None,
        api: str = "chat",
        max_concurrent: int | None = None,
        max_cost: float | Decimal | None = None,
        progress: bool = False,
        stop_event: asyncio.Event | None = None,
        **chat_params: Any,
    ) -> AsyncGenerator[tuple[int, ModelResponse | Exception], None]:
        """Answer prompts and yield each outcome as it comes, in bounded memory however many there are.

        At most twice `max_concurrent` prompts are taken and not yet consumed, so a slow consumer slows their
        source down. Ending the loop early (`break`, `aclose`, cancellation) ends what is in flight.

        Args:
            prompts: Texts, or lists of chat messages, from an iterable or async iterable. They are taken on
                the event loop, so one that blocks holds it up. An async generator is closed in the end. The
                context variables that requests see are those of the first `anext`.
            model: The model; None: the config's default.
            temperature: Sampling temperature; not sent when None.
            max_tokens: Output tokens at most; not sent when None.
            timeout: Seconds for one attempt; None: the config's.
            system: A system prompt for all of them.
            api: "chat" for chat completions, "responses" for the Responses API.
            max_concurrent: Requests in flight at once, for this call; None: the rate limit's.
            max_cost: USD that this call may cost; None: any amount. Every attempt reserves the most it can
                cost, and none is sent for which too little is left. Needs `max_tokens`.
            progress: Show how far it is, as for `batch_generate`.
            stop_event: Once it is set, nothing more is sent: what is in flight is yielded, and the iterator
                ends. Prompts that were taken and not sent have no outcome.
            **chat_params: Any other parameter of the API, as for `generate_response`.

        Yields:
            The prompt's position, from 0, and its response or the exception it failed with: a ValidationError
            for a prompt that is wrong.

        Raises:
            ValidationError: A parameter is wrong; raised by the call itself.
            APIError: An error that all prompts would meet, as for `batch_generate`; raised after what was in
                flight has been yielded. An exception of `prompts` itself is raised after all it gave.
            BudgetExceededError: The next request could cost more than what is left of `max_cost`; likewise.
        """
        parameters = self._parameters(model, temperature, max_tokens, timeout, system, api, chat_params)
        purse = self._purse_for(max_cost, parameters)
        crew = _runner.crew(self._call, parameters, self._governor.config, max_concurrent, purse)
        check_iterable(prompts, "__iter__", "__aiter__")
        check_switch(progress, "progress")
        check_event(stop_event, "stop_event")
        if not progress and stop_event is None:
            return crew.run(prompts)
        total = len(prompts) if isinstance(prompts, Sized) else None
        display = self._display(total, parameters.model, crew) if progress else None
        return _watched(crew, prompts, display, stop_event)

    async def estimate(
        self,
        prompts: Iterable[Prompt] | AsyncIterable[Prompt],
        *,
        model: str | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        system: str | None = None,
        api: str = "chat",
        progress_callback: Callable[[float], Any] | None = None,
        **chat_params: Any,
    ) -> CostEstimate:
        """Estimate what prompts would need before any is sent: tokens, dollars, minutes. Sends nothing.

        Args:
            prompts: Texts, or lists of chat messages, from an iterable or async iterable. They are taken on
                the event loop, a few at a time, and counted in a thread.
            model: The model; None: the config's default.
            temperature: Sampling temperature; needs nothing.
            max_tokens: Output tokens at most; without it, no upper bound is known.
            system: A system prompt for all of them.
            api: "chat" for chat completions, "responses" for the Responses API.
            progress_callback: Called, or awaited, with the counted fraction now and then where the number of
                prompts is known, and with 1.0 at the end; what it raises is logged.
            **chat_params: Any other parameter of the API, as for `generate_response`.

        Returns:
            The estimate.

        Raises:
            ValidationError: A parameter or a prompt is wrong; `index` says which prompt.
        """
        parameters = self._parameters(model, temperature, max_tokens, None, system, api, chat_params)
        check_iterable(prompts, "__iter__", "__aiter__")
        if progress_callback is not None:
            check_callback(progress_callback, "progress_callback")
            progress_callback = Guarded(progress_callback)
        return await _estimate.estimate(
            prompts, parameters, counter=self._counter, governor=self._governor, progress=progress_callback
        )

    def _parameters(  # noqa: PLR0917  # in the order of the methods that call it
        self,
        model: str | None,
        temperature: float | None,
        max_tokens: int | None,
        timeout: float | None,
        system: str | None,
        api: str,
        params: dict[str, Any],
    ) -> Parameters:
        if self._http.is_closed:
            raise RuntimeError("this client was closed")
        return check_parameters(
            model=self._config.default_model if model is None else model,
            timeout=self._config.timeout if timeout is None else timeout,
            temperature=temperature,
            max_tokens=max_tokens,
            system=system,
            api=api,
            params=params,
        )

    def _display(self, total: int | None, model: str, crew: Crew | None) -> Display:
        """Return what shows how far a call is; where no crew is at work, limits play no part."""
        from openai_eval_client._progress import Display  # seldom wanted

        def probe() -> Reading:
            troubles = self._governor.recorder.troubles
            if crew is None:
                return Reading(None, None, *troubles)
            return Reading(self._governor.gauge(model), crew.in_flight, *troubles)

        return Display(total, probe)

    def _purse_for(self, max_cost: float | Decimal | None, parameters: Parameters) -> Purse | None:
        """Return what a call is paid from besides the client's purse, if its cost has a bound."""
        return self._governor.payments.purse_for(max_cost, parameters.body, PATHS[parameters.api])


async def _watched(
    crew: Crew, prompts: Any, display: Display | None, stop_event: asyncio.Event | None
) -> AsyncGenerator[tuple[int, Any], None]:
    """Yield a crew's outcomes, shown as they come, until somebody wants no more of them."""
    with contextlib.ExitStack() as around:
        if display is not None:
            around.enter_context(display)
        if stop_event is not None:
            waiter = asyncio.ensure_future(stop_event.wait())
            waiter.add_done_callback(lambda waited: None if waited.cancelled() else crew.stop())
            around.callback(waiter.cancel)
        async with contextlib.aclosing(crew.run(prompts)) as outcomes:
            async for index, outcome in outcomes:
                if display is not None:
                    display.count(outcome)
                yield index, outcome
