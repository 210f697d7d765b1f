"""Responses made in the background: asked for until they are done, cancelled when the caller is."""

from __future__ import annotations

import asyncio
import contextlib
import re
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import openai

from openai_eval_client._log import inform
from openai_eval_client._sdk import call_sdk
from openai_eval_client._wire import PATHS, fault_in, of_error, read_failure, read_object, text_in
from openai_eval_client.errors import TimeoutError, sdk_httpx

if TYPE_CHECKING:
    from openai_eval_client._cache import Keeper
    from openai_eval_client._wire import Parameters

_PENDING = frozenset({"queued", "in_progress"})
_ID = re.compile(r"[^\x00-\x20\x7f]{1,1000}")
_POLL_AFTER = "openai-poll-after-ms"  # a header of the server's answers
_FIRST_DELAY, _LONGEST_DELAY = 0.5, 10.0  # seconds between two looks, where the server names none
_GROWTH = 1.5
_LONGEST_STATED = 60.0  # seconds
_CANCELLING = 5.0  # seconds for the request that cancels


class BackgroundResponses:
    """Waits for the responses of one client that are made in the background."""

    # https://platform.openai.com/docs/guides/background
    def __init__(self, sdk: openai.AsyncOpenAI, longest: float) -> None:
        self._sdk = sdk
        self._longest = longest  # seconds that one is waited for
        self._url = str(sdk.base_url).rstrip("/") + PATHS["responses"]
        self._reply_class = sdk_httpx().Response

    async def submitted_before(self, keep: Keeper, parameters: Parameters) -> Any:
        """Return the reply about the response that an earlier run submitted; None where there is none."""
        name = await keep.saved_id()
        if name is None or not _ID.fullmatch(name):
            return None
        try:
            reply = await self._ask("GET", name, parameters)
        except openai.NotFoundError:
            await keep.forget()
            return None
        inform("response %s was submitted before: waiting for it", name, event="background_resumed")
        return reply

    async def finished(self, reply: Any, parameters: Parameters, keep: Keeper | None) -> Any:
        """Return the reply with the response as it is in the end.

        Raises:
            TimeoutError: It took too long, and was cancelled.
            openai.APIError: It cannot be asked for any more.
        """
        name = pending(reply)
        if name is not None and keep is not None:
            await keep.save_id(name)
        try:
            last = reply if name is None else await self._wait(name, reply, parameters)
        except (asyncio.CancelledError, TimeoutError):
            if name is not None:
                await self._cancel(name, parameters, keep)
            raise
        if (
            keep is not None
            and keep.is_saved
            and fault_in(read_object(last.content), "responses") is not None
        ):
            await keep.forget()  # another attempt asks anew
        return last

    async def _cancel(self, name: str, parameters: Parameters, keep: Keeper | None) -> None:
        with contextlib.suppress(Exception):  # the caller's end comes first
            await asyncio.wait_for(self._ask("POST", name, parameters, "/cancel"), _CANCELLING)
            if keep is not None:
                await keep.forget()

    async def _wait(self, name: str, reply: Any, parameters: Parameters) -> Any:
        """Look at a response until it is done."""
        loop = asyncio.get_running_loop()
        until, delay = loop.time() + self._longest, _FIRST_DELAY
        while pending(reply) is not None:
            await asyncio.sleep(min(_stated_delay(reply) or delay, max(until - loop.time(), 0.0)))
            if loop.time() >= until:
                message = f"response {name} was not done within {self._longest:g} s"
                raise TimeoutError(message, request=reply.request)
            delay = min(delay * _GROWTH, _LONGEST_DELAY)
            reply = await self._look(name, parameters) or reply
        return reply

    async def _look(self, name: str, parameters: Parameters) -> Any:
        """Return the reply about a response; None where another look may tell more."""
        try:
            reply = await self._ask("GET", name, parameters)
            return reply if text_in(read_object(reply.content).get("status")) else None
        except openai.APIError as error:
            failure = read_failure(error)
            if not failure.retry:  # it goes on, and is billed
                message = f"response {name} cannot be asked for: {error.message}"
                raise openai.APIError(message, error.request, body=error.body) from None
            text, about = "response %s could not be looked at (%s): later again", of_error(error)
            inform(text, name, about["error_type"], event="background_not_read", **about)
            await asyncio.sleep(min(failure.wait or 0.0, _LONGEST_STATED))
            return None

    async def _ask(self, method: str, name: str, parameters: Parameters, end: str = "") -> Any:
        url = f"{self._url}/{quote(name, safe='')}{end}"
        options: Any = {"headers": parameters.headers, "params": parameters.query}
        options |= {"timeout": None, "max_retries": 0}
        send = self._sdk.get if method == "GET" else self._sdk.post
        call: Any = send(url, cast_to=self._reply_class, options=options)
        return await call_sdk(call, seconds=parameters.timeout, url=url)


def pending(reply: Any) -> str | None:
    """Return the id of a response that is still to be made; None for any other reply."""
    content: bytes = reply.content
    if b'"queued"' not in content and b'"in_progress"' not in content:
        return None
    body = read_object(content)
    name, status = body.get("id"), body.get("status")
    if not isinstance(name, str) or not _ID.fullmatch(name):
        return None
    return name if isinstance(status, str) and status in _PENDING else None


def _stated_delay(reply: Any) -> float | None:
    """Return the seconds after which the server wants to be asked again; None where it does not say."""
    text = reply.headers.get(_POLL_AFTER, "")
    return min(int(text) / 1000, _LONGEST_STATED) if text.isdecimal() and len(text) < 9 else None  # noqa: PLR2004
