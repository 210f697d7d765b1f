"""Bad input, one row each: refused with its name and value before anything is sent, or answered."""

import asyncio
import contextlib
import logging
import math
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from typing import Any

import openai
import pydantic
import pytest
from openai.types.chat import ChatCompletionMessage

from openai_eval_client import (
    OpenAIClient,
    OpenAIConfig,
    PartialFailureError,
    RateLimitConfig,
    ValidationError,
)
from openai_eval_client.testing import SimulatedServer

KEY = "sk-never-to-be-seen-0123456789"
NAN, INF = math.nan, math.inf
HALF = "\ud83d"  # of a surrogate pair
NUL = "nul \x00 byte"
HUGE = 10**400  # an int that no float holds
HELLO = {"role": "user", "content": "hello"}


def nested(depth):
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def circular():
    value: list[Any] = []
    value.append(value)
    return value


def failing():
    yield "hello"
    raise OSError("the file ended")


class City(pydantic.BaseModel):
    name: str


@dataclass
class Row:
    """One call, and what must come of it."""

    name: str  # what is odd about it
    options: dict[str, Any] = field(default_factory=dict)  # with `prompts`, it is a `batch_generate`
    prompt: Any = "hello"
    says: tuple[str, ...] = ()  # what the error's message must hold; empty: the call must be answered
    field: str | None = None  # the rejected parameter, as the error has it
    index: int | None = None  # the rejected prompt, as the error has it
    kind: type[Exception] = ValidationError

    async def call(self, client):
        if "prompts" in self.options:
            return await client.batch_generate(**self.options)
        return await client.generate_response(self.prompt, **self.options)


def bad_prompt(name, prompt, *says, **options):
    return Row(f"prompt {name}", options, prompt, ("prompt", *says), "prompt")


def bad_option(name, value, *says, shown=None, **others):
    """A parameter refused by name and value."""
    where = f"{name}={value!r}"[:70] if shown is None else f"{name}{shown}"
    return Row(f"{name} {value!r:.40}", {name: value, **others}, says=(where, *says), field=name)


def bad_prompts(name, prompts, *says, index=None):
    where = "prompts" if index is None else f"prompts[{index}]"
    row_field = "prompts" if index is None else "prompt"
    return Row(f"prompts {name}", {"prompts": prompts}, says=(where, *says), field=row_field, index=index)


REFUSED = [
    bad_prompt("empty", "", "''", "empty"),
    bad_prompt("blank", " \n\t", r"' \n\t'", "blank"),
    bad_prompt("blank in Unicode", "\u3000\u2003", "blank"),
    bad_prompt("None", None, "None", "NoneType"),
    bad_prompt("bytes", b"hello", "b'hello'", "bytes"),
    bad_prompt("int", 5, "5", "int"),
    bad_prompt("bool", True, "True", "bool"),
    bad_prompt("NaN", NAN, "nan", "float"),
    bad_prompt("dict", HELLO, "dict"),
    bad_prompt("set", {"hello"}, "{'hello'}", "set"),
    bad_prompt("object", object(), "object"),
    bad_prompt("generator", (message for message in [HELLO]), "generator"),
    bad_prompt("lone surrogate", f"cut {HALF}", r"'\ud83d'", "position 4"),
    bad_prompt("reversed pair", "\udc00\ud83d", r"'\udc00'"),
    bad_prompt("messages empty", [], "[]", "at least one"),
    bad_prompt("messages tuple empty", (), "at least one"),
    bad_prompt("message a str", ["hello"], "[0]", "'hello'", "role"),
    bad_prompt("message None", [HELLO, None], "[1]", "None", "role"),
    bad_prompt("message a list", [[HELLO]], "[0]", "role"),
    bad_prompt("message without role", [{"content": "hello"}], "[0]", "role"),
    bad_prompt("message with role None", [{"role": None, "content": "hello"}], "[0]", "role"),
    bad_prompt("message with role 5", [{"role": 5, "content": "hello"}], "[0]", "role"),
    bad_prompt("message empty", [{}], "[0]", "{}", "role"),
    bad_prompt("message with half an emoji", [{"role": "user", "content": HALF}], "surrogate"),
    bad_prompt("message with half an emoji as key", [{"role": "user", HALF: "hello"}], "surrogate"),
    bad_prompt("message with bytes", [{"role": "user", "content": b"hello"}], "b'hello'", "JSON"),
    bad_prompt("message with an object", [{"role": "user", "content": object()}], "object", "JSON"),
    bad_prompt("message with NaN", [{"role": "user", "content": NAN}], "nan", "JSON"),
    bad_prompt("message with a set", [{"role": "user", "content": {1}}], "{1}", "JSON"),
    bad_prompt("message circular", [{"role": "user", "content": circular()}], "JSON"),
    bad_prompt("message too deep", [{"role": "user", "content": nested(100_000)}], "JSON"),
    bad_prompt("of the Responses API", [], "at least one", api="responses"),
    bad_prompt("half an emoji for the Responses API", HALF, "surrogate", api="responses"),
    *[bad_option("temperature", value, "number") for value in (-0.1, -1, NAN, INF, -INF, "0.5", True)],
    bad_option("temperature", HUGE, shown="=1000", model="m"),
    bad_option("temperature", Decimal("0.5")),
    bad_option("temperature", Fraction(1, 2)),
    bad_option("temperature", 1j),
    *[bad_option("max_tokens", value, "1 or more") for value in (0, -1, 1.5, 1.0, True, "5", NAN, INF, [5])],
    *[bad_option("temperature", value, "number") for value in ([1], b"1", {}, City)],
    *[bad_option("timeout", value, "greater than 0") for value in (0, -1, 0.5j, NAN, INF, -INF, "5", True)],
    bad_option("timeout", HUGE, shown="=1000"),
    *[bad_option("n", value, "1 or more") for value in (0, -1, 1.5, True, "2", NAN)],
    bad_option("model", "", "empty"),
    bad_option("model", " ", "blank"),
    *[bad_option("model", value, "str") for value in (5, True, b"gpt-4o", ["gpt-4o"])],
    bad_option("model", HALF, shown=": lone surrogate"),
    bad_option("system", "", "empty"),
    bad_option("system", " ", "blank"),
    *[bad_option("system", value, "str") for value in (5, b"x", [HELLO], HELLO)],
    bad_option("system", HALF, shown=": lone surrogate"),
    *[bad_option("api", value, "'chat'", "'responses'") for value in ("", "Chat", "completions", None, 5)],
    bad_option("api", ["chat"], "'chat'"),
    bad_option("stop", HALF, shown=": holds a lone surrogate"),
    bad_option("stop", [HALF], shown=": holds a lone surrogate"),
    bad_option("stop", {"a"}, "JSON"),
    bad_option("stop", b"a", "JSON"),
    Row("user an object", {"user": object()}, says=("user=<object", "JSON"), field="user"),
    bad_option("logit_bias", {"50256": NAN}, "JSON"),
    bad_option("logit_bias", {"50256": INF}, "JSON"),
    bad_option("logit_bias", {(1, 2): 5}, "JSON"),
    bad_option("seed", NAN, "JSON"),
    bad_option("metadata", circular(), "JSON"),
    Row("metadata too deep", {"metadata": nested(100_000)}, says=("metadata", "JSON"), field="metadata"),
    bad_option("tools", [City], "JSON", shown="=["),
    bad_option("response_format", int, "JSON"),
    bad_option("response_format", City(name="Paris"), "JSON"),
    bad_option("stream", True, "client.openai"),
    bad_option("temprature", 0.5, "extra_body"),
    bad_option("messages", [HELLO], "not a parameter"),
    bad_option("max_concurrent", 5, "not a parameter"),  # of a single prompt
    bad_option("max_output_tokens", 5, "extra_body"),  # of the other API
    bad_option("n", 2, "extra_body", api="responses"),
    *[bad_option("extra_body", value) for value in ("text", 5, [1], b"x", True)],
    Row("extra_body with NaN", {"extra_body": {"top_k": NAN}}, says=("top_k=nan", "JSON"), field="top_k"),
    Row("several models", {"extra_body": {"model": ["a"]}}, says=("model=['a']",), field="model"),
    Row("extra_body with a set", {"extra_body": {"top_k": {1}}}, says=("top_k={1}", "JSON"), field="top_k"),
    *[bad_option("extra_headers", value) for value in ("text", 5, ["a"], {"x-a": 5})],
    bad_option("extra_headers", {"x-a": "two\r\nlines"}, shown=""),
    bad_option("extra_headers", {"x-a": "\N{SNOWMAN}"}, shown=""),
    *[bad_option("extra_query", value) for value in ("text", 5, ["a"])],
    bad_option("text", "plain", api="responses", response_format=City),
    bad_prompts("a str", "hello", "str"),
    bad_prompts("bytes", b"hello", "bytes"),
    bad_prompts("None", None, "NoneType"),
    bad_prompts("an int", 5, "int"),
    bad_prompts("a function", len, "builtin_function_or_method"),
    bad_prompts("one chat", [HELLO, HELLO], "dict", index=0),
    bad_prompts("one None", ["hello", None, "bye"], "None", index=1),
    bad_prompts("one blank", ["hello", "bye", "  "], "'  '", index=2),
    bad_prompts("one empty", ["", "hello"], "''", index=0),
    bad_prompts("one bytes", ["hello"] * 7 + [b"x"], "b'x'", index=7),
    bad_prompts("one with half an emoji", ["hello", HALF], "surrogate", index=1),
    bad_prompts("one empty list", ["hello", []], "at least one", index=1),
    bad_prompts("one chat without role", ["hello", [{"content": "x"}]], "[0]", "role", index=1),
    bad_prompts("a generator with one bad", (p for p in ["hello", 5]), "5", "int", index=1),
    *[
        Row(f"max_concurrent {value!r}", {"prompts": ["hello"], "max_concurrent": value}, says=(
            f"max_concurrent={value!r}", "1 or more"), field="max_concurrent")
        for value in (0, -1, 2.5, True, "5", NAN, INF, [5])
    ],
    *[
        Row(f"progress_callback {value!r}", {"prompts": ["hello"], "progress_callback": value}, says=(
            f"progress_callback={value!r}",), field="progress_callback")
        for value in (5, "print", [print])
    ],
    Row("temperature of many", {"prompts": ["hello"], "temperature": "hot"}, says=("temperature='hot'",),
        field="temperature"),
    Row("unknown parameter of many", {"prompts": ["hello"], "max_token": 5},
        says=("max_token=5", "extra_body"), field="max_token"),
    Row("no prompts, bad temperature", {"prompts": [], "temperature": NAN}, says=("temperature=nan",),
        field="temperature"),
    Row("a generator that fails", {"prompts": failing()}, says=("the file ended",), kind=OSError),
]  # fmt: skip

ANSWERED = [
    Row("one letter", prompt="x"),
    Row("NUL bytes", prompt=NUL),
    Row("NUL bytes in system", {"system": NUL}),
    Row("control characters", prompt="\x01\x1b[31m\x7f\u2028"),
    Row("whole emoji", prompt="\U0001f600"),
    Row("not a character", prompt="\uffff\ufdd0"),
    Row("special tokens", prompt="<|endoftext|><|im_start|>"),
    Row("quotes and braces", prompt='{"usage": {"prompt_tokens": 5}} %s {x}'),
    Row("10 MB of one word", prompt="word " * 2_000_000),
    Row("1 MB without a space", prompt="x" * 1_000_000),
    Row("1 MB of spaces and a word", prompt=" " * 1_000_000 + "x"),
    Row("messages", prompt=[HELLO]),
    Row("messages in a tuple", prompt=(HELLO, HELLO)),
    Row("message with empty content", prompt=[{"role": "user", "content": ""}]),
    Row("message without content", prompt=[{"role": "user"}]),
    Row("message with content None", prompt=[{"role": "assistant", "content": None}, HELLO]),
    Row("message with parts", prompt=[{"role": "user", "content": [{"type": "text", "text": "hello"}]}]),
    Row("message with an unknown role", prompt=[{"role": "poet", "content": "hello"}]),
    Row("message with an unknown key", prompt=[{**HELLO, "mood": "good"}]),
    Row("message of the SDK", prompt=[ChatCompletionMessage(role="assistant", content="a"), HELLO]),
    Row("messages of the Responses API", {"api": "responses"}, [HELLO]),
    Row("system of the Responses API", {"api": "responses", "system": "be brief", "max_tokens": 5}),
    Row("temperature 0", {"temperature": 0}),
    Row("temperature 5, which the API judges", {"temperature": 5}),
    Row("max_tokens 1", {"max_tokens": 1}),
    Row("a long timeout", {"timeout": 1e9}),
    Row("an unknown model", {"model": "no such model \N{SNOWMAN}"}),
    Row("everything None", dict.fromkeys([
        "model", "temperature", "max_tokens", "timeout", "system", "stop", "seed", "n", "extra_body",
        "extra_headers", "extra_query", "response_format",
    ])),
    Row("extra_body", {"extra_body": {"top_k": 5, "usage": {"include": True}}}),
    Row("extra_body None inside", {"extra_body": {"top_k": None}}),
    Row("extra_headers", {"extra_headers": {"x-a": "b"}}),
    Row("extra_query", {"extra_query": {"a": "b", "c": 5}}),
    Row("odd values, which the API judges", {"seed": -1, "stop": [], "logit_bias": {}, "user": ""}),
    Row("no prompts", {"prompts": []}),
    Row("a tuple of prompts", {"prompts": ("hello", "bye")}),
    Row("a generator of prompts", {"prompts": (prompt for prompt in ["hello", "bye"])}),
    Row("prompts and chats", {"prompts": ["hello", [HELLO]]}),
    Row("the same prompt twice", {"prompts": ["hello", "hello"]}),
    Row("max_concurrent 1", {"prompts": ["hello"] * 3, "max_concurrent": 1}),
    Row("max_concurrent above the number of prompts", {"prompts": ["hello"], "max_concurrent": 1000}),
    Row("max_concurrent None", {"prompts": ["hello"], "max_concurrent": None}),
    Row("progress_callback None", {"prompts": ["hello"], "progress_callback": None}),
]  # fmt: skip


@pytest.fixture(scope="module")
def running():
    with SimulatedServer(lenient=True) as server:
        yield server


@pytest.fixture
def server(running):
    running.reset()
    return running


@pytest.fixture
async def client(server):
    config = OpenAIConfig(api_key=KEY, base_url=server.base_url, default_model="gpt-4o", max_retries=0)
    limits = RateLimitConfig(requests_per_minute=None, tokens_per_minute=None)
    async with OpenAIClient(config, rate_limit=limits) as made:
        yield made


def test_no_two_rows_have_one_name():
    """A failing row can be found."""
    names = [row.name for row in [*REFUSED, *ANSWERED]]
    assert len(names) >= 60
    assert [name for name in names if names.count(name) > 1] == []


@pytest.mark.parametrize("row", REFUSED, ids=[row.name for row in REFUSED])
async def test_it_is_refused_before_anything_is_sent(client, server, row):
    """With an error of its own class that names parameter, value and position."""
    with pytest.raises(row.kind) as caught:
        await row.call(client)
    error = caught.value
    assert [part for part in row.says if part not in str(error)] == []
    assert len(str(error)) < 400
    if row.kind is ValidationError:
        assert isinstance(error, ValueError)
        assert (error.field, error.index) == (row.field, row.index)
    assert KEY not in str(error)
    assert server.calls == []
    assert client.stats.attempts == 0


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # aiohttp, of the 10 MB
@pytest.mark.parametrize("row", ANSWERED, ids=[row.name for row in ANSWERED])
async def test_it_is_answered(client, server, row):
    """What the API may judge is sent as it is, once."""
    answer = await row.call(client)
    answers = answer if isinstance(answer, list) else [answer]
    assert all(one.request_id for one in answers)
    assert [call.status for call in server.calls] == [200] * len(answers)


async def test_what_is_sent_is_what_was_given(client, server):
    """Neither escaped nor cut nor completed."""
    await client.generate_response(
        NUL, system="be brief", temperature=5, stop=["\U0001f600"], extra_body={"top_k": 5}
    )
    (call,) = server.calls
    assert call.body == {
        "model": "gpt-4o",
        "temperature": 5,
        "stop": ["\U0001f600"],
        "top_k": 5,
        "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": NUL}],
    }


async def test_what_the_api_refuses_is_its_own_error(client, server):
    """A value of the right type that only the API can judge."""
    with pytest.raises(openai.BadRequestError, match="n"):
        await client.generate_response("hello", extra_body={"n": "two"})
    assert [call.status for call in server.calls] == [400]


@pytest.mark.parametrize("awaited", [False, True])
async def test_a_callback_that_raises_is_logged(client, server, caplog, awaited):
    """The run goes on, and the log names once how far it was."""

    def fail(_):
        raise RuntimeError("the display is gone")

    async def fail_later(fraction):
        fail(fraction)

    with caplog.at_level(logging.ERROR):
        answers = await client.batch_generate(["a", "b"], progress_callback=fail_later if awaited else fail)
    assert [answer.content for answer in answers] == ["echo: a", "echo: b"]
    assert [record.getMessage() for record in caplog.records] == [
        "progress_callback raised at 0.500; the run goes on, and this is logged once",
    ]
    assert "the display is gone" in caplog.text
    assert len(server.calls) == 2


async def test_a_bad_prompt_among_good_ones_stops_all_of_them(client, server):
    """Nothing is paid for before everything was looked at."""
    prompts = [f"prompt {number}" for number in range(500)]
    prompts[321] = ""
    with pytest.raises(ValidationError, match=r"prompts\[321\]=''") as caught:
        await client.batch_generate(prompts)
    assert caught.value.index == 321
    assert server.calls == []


async def test_a_client_goes_on_after_bad_input(client, server):
    """A refusal leaves nothing behind."""
    for _ in range(20):
        with contextlib.suppress(ValidationError):
            await client.generate_response("")
    assert (await client.generate_response("hello")).content == "echo: hello"
    assert client.stats.requests == 1
    assert len(server.calls) == 1


@pytest.mark.parametrize("limit", [None, 90_000])
@pytest.mark.parametrize(
    "options",
    [{"max_tokens": 10**9}, {"max_tokens": HUGE}, {"extra_body": {"max_tokens": HUGE}}],
    ids=["large", "huge", "huge in extra_body"],
)
async def test_a_number_beyond_all_bounds_does_not_stop_the_client(server, options, limit):
    """Refused or answered, by us or by the API, it ends; and so does the next call."""
    config = OpenAIConfig(api_key=KEY, base_url=server.base_url, max_retries=0)
    limits = RateLimitConfig(requests_per_minute=limit, tokens_per_minute=limit)
    async with OpenAIClient(config, rate_limit=limits) as client:
        with contextlib.suppress(openai.OpenAIError):
            await asyncio.wait_for(client.generate_response("hello", **options), 3)
        answer = await asyncio.wait_for(client.generate_response("hello"), 3)
    assert answer.content == "echo: hello"


async def test_return_exceptions_does_not_hide_bad_input(client, server):
    """It is for prompts that failed, not for calls that are wrong."""
    with pytest.raises(ValidationError, match=r"prompts\[1\]"):
        await client.batch_generate(["hello", None], return_exceptions=True)
    assert server.calls == []


async def test_a_prompt_that_only_the_api_refuses_fails_alone(server):
    """The others are answered and handed over with the error."""
    config = OpenAIConfig(api_key=KEY, base_url=server.base_url, default_model="gpt-4o", max_retries=0)
    async with OpenAIClient(config) as client:
        with pytest.raises(PartialFailureError) as caught:
            await client.batch_generate(["hello", "bye"], extra_body={"n": "two"})
    assert {type(error) for error in caught.value.failures.values()} == {openai.BadRequestError}


# --- what a client is made of ------------------------------------------------------------------------------

MADE_WRONG = {
    "rpm 0": (lambda: RateLimitConfig(requests_per_minute=0), "requests_per_minute=0"),
    "rpm negative": (lambda: RateLimitConfig(requests_per_minute=-5), "requests_per_minute=-5"),
    "tpm 0": (lambda: RateLimitConfig(tokens_per_minute=0), "tokens_per_minute=0"),
    "burst 0": (lambda: RateLimitConfig(burst_seconds=0), "burst_seconds=0"),
    "max_concurrent 0": (lambda: RateLimitConfig(max_concurrent=0), "max_concurrent=0"),
    "base_url without scheme": (lambda: OpenAIConfig(api_key=KEY, base_url="localhost/v1"), "base_url"),
    "base_url with a password": (
        lambda: OpenAIConfig(api_key=KEY, base_url="http://u:p@host/v1"),
        "base_url",
    ),
    "no key": (OpenAIConfig, "OPENAI_API_KEY"),
    "no config and no key": (OpenAIClient, "OPENAI_API_KEY"),
    "config a key": (lambda: OpenAIClient(KEY), "config"),
    "config a dict": (lambda: OpenAIClient({"api_key": KEY}), "config"),
    "config a RateLimitConfig": (lambda: OpenAIClient(RateLimitConfig()), "config"),
    "rate_limit a dict": (
        lambda: OpenAIClient(OpenAIConfig(api_key=KEY), rate_limit={"requests_per_minute": 5}),
        "rate_limit",
    ),
    "rate_limit a number": (lambda: OpenAIClient(OpenAIConfig(api_key=KEY), rate_limit=500), "rate_limit"),
    "batch a dict": (lambda: OpenAIClient(OpenAIConfig(api_key=KEY), batch={"max_batch_size": 5}), "batch"),
}


@pytest.mark.parametrize(("make", "says"), MADE_WRONG.values(), ids=MADE_WRONG)
def test_a_client_is_not_made_of_the_wrong_parts(monkeypatch, make, says):
    """A ValueError names the part at once, and never the key."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises((ValueError, TypeError)) as caught:
        make()
    assert says in str(caught.value)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("organization", ["org\nx", "org \N{SNOWMAN}"])
async def test_an_organization_that_no_header_may_carry_is_refused(server, organization):
    """As a key of that kind is, and not by an error of the HTTP library."""
    with pytest.raises(pydantic.ValidationError, match="organization_id"):
        OpenAIConfig(api_key=KEY, base_url=server.base_url, organization_id=organization)


async def test_a_wrong_key_is_the_apis_own_error():
    """401, each once, and the run stops after a few."""
    with SimulatedServer(api_key="sk-right") as server:
        config = OpenAIConfig(api_key=KEY, base_url=server.base_url)
        async with OpenAIClient(config) as client:
            with pytest.raises(openai.AuthenticationError) as caught:
                await client.batch_generate([f"hello {n}" for n in range(100)], max_concurrent=2)
    assert caught.value.responses == [None] * 100
    assert len(server.calls) <= 3 + 2
    assert KEY not in str(caught.value)


async def test_a_server_that_is_not_there_is_a_connection_error():
    """Not a timeout: nothing of ours ran out."""
    config = OpenAIConfig(api_key=KEY, base_url="http://127.0.0.1:9/v1", max_retries=0)
    async with OpenAIClient(config) as client:
        with pytest.raises(openai.APIConnectionError) as caught:
            await client.generate_response("hello")
    assert not isinstance(caught.value, openai.APITimeoutError)
