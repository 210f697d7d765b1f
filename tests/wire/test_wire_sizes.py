"""What servers send takes time in proportion to its length, whatever it is made of."""

from __future__ import annotations

import contextlib
import itertools
import time
from typing import TYPE_CHECKING, Any

import openai
import pytest

from openai_eval_client._wire import read_body, read_usage, refused
from openai_eval_client._wire.bodies import read_outcome
from openai_eval_client._wire.failures import read_refusal
from openai_eval_client._wire.headers import stated_wait
from openai_eval_client._wire.refusals import words_of
from openai_eval_client.errors import sdk_httpx

if TYPE_CHECKING:
    from collections.abc import Callable

SIZES = (10_000, 100_000, 1_000_000)
STEEPEST = 50  # times the CPU for ten times the length: linear is 10, quadratic 100
LEAST = 0.004  # seconds, below which a clock says little

BODIES = [
    b'"usage":{', b'"usage":{"prompt_tokens":', b'\\"usage":{', b'"usage":     ', b'data: {"usage":{\n',
    b'"service_tier" : "', b"[", b"\\", b":\n", b'"error" ', b"<a", b"{} ", b"1",
]  # fmt: skip
TEXTS = ["1m", "1.", "1", "again ", "1 minute, ", " ", "per day ", "model ", "insufficient ", "a_quota", "<"]


def reply(content: bytes) -> Any:
    httpx = sdk_httpx()
    return httpx.Response(200, content=content, request=httpx.Request("POST", "http://a"))


def refusal(text: str, field: str) -> Any:
    named = {"details": [{"retryDelay": text, "text": text}], "metadata": {"headers": {"retry-after": text}}}
    headers = {"retry-after": text, "x-should-retry": text}
    return read_refusal(
        429, headers if field == "details" else {}, words_of({"error": {field: text, **named}})
    )


def is_linear(function: Callable[[Any], object], make: Callable[[int], Any]) -> bool:
    """Whether ten times the length takes no more than so many times the CPU, at one try of three at least."""

    def seconds(size: int) -> float:
        value = make(size)
        began = time.thread_time()
        with contextlib.suppress(openai.OpenAIError):
            function(value)
        return max(time.thread_time() - began, LEAST)

    def is_steep() -> bool:
        times = map(seconds, SIZES)
        return any(later > STEEPEST * earlier for earlier, later in itertools.pairwise(times))

    return not all(is_steep() for _ in range(3))


@pytest.mark.parametrize(
    "read",
    [
        read_usage,
        lambda content: read_outcome(200, {}, content, "chat"),
        lambda content: read_body(reply(content), "chat"),
        lambda content: refused(503, {}, content),
    ],
    ids=["usage", "outcome", "chat", "refusal"],
)
def test_a_body_is_read_in_time_that_grows_with_its_length(read: Callable[[bytes], object]) -> None:
    """Of any unit that is repeated; nothing but the errors of the SDK is raised."""
    steep = [unit for unit in BODIES if not is_linear(read, lambda size, u=unit: u * (size // len(u)))]
    assert steep == []


@pytest.mark.parametrize("field", ["message", "code", "type", "details"])
def test_a_refusal_is_read_in_time_that_grows_with_its_length(field: str) -> None:
    """Its waits in words and headers, its code and its message."""
    made = {unit: lambda size, u=unit: "retry in " + u * (size // len(u)) for unit in TEXTS}
    steep = [unit for unit in TEXTS if not is_linear(lambda text: refusal(text, field), made[unit])]
    assert steep == []


@pytest.mark.parametrize("digits", [4300, 4301, 100_000])
def test_a_number_of_any_length_is_read(digits: int) -> None:
    """As a wait, a count, a status or a code."""
    number = b"1" * digits
    for body in (
        b'{"error":{"code":%s,"message":%s}}',
        b'{"retry_after":%s,"detail":%s}',
        b'{"usage":%s,"x":%s}',
    ):
        content = body % (number, number)
        refused(429, {}, content)
        read_usage(content)
    counted = b'{"usage":{"prompt_tokens":%s,"completion_tokens":%s}}' % (number, number)
    assert read_usage(counted) is None
    wait = stated_wait({"retry-after": number.decode()}, f"retry in {number.decode()}s")
    assert wait is None or wait <= 1e9
