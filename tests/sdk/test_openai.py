"""The drop-in client behaves as the SDK's does, and every attempt is paced."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import inspect
import json
import subprocess
import sys
import threading
import time

import openai
import pytest
from pydantic import BaseModel
from raw_server import ANSWER

from openai_eval_client import (
    AsyncOpenAI,
    OpenAIClient,
    OpenAIConfig,
    RateLimitConfig,
    RequestTooLargeError,
    ValidationError,
)
from openai_eval_client.errors import sdk_httpx
from openai_eval_client.testing import SimulatedServer

HELLO = [{"role": "user", "content": "hello"}]
CHAT = {"model": "gpt-4o-mini", "messages": HELLO}


@pytest.fixture
def server():
    with SimulatedServer() as running:
        yield running


def connect(server: SimulatedServer, **options: object) -> AsyncOpenAI:
    return AsyncOpenAI(**{"api_key": "sk-test", "base_url": server.base_url, **options})


def granted(client: AsyncOpenAI) -> int:
    """Return how many attempts were admitted, settled or not."""
    return client.stats.attempts + in_flight(client)


def eventually(holds, seconds: float = 10) -> bool:
    """Wait for another thread to make a condition true, and return whether it is."""
    ends = time.monotonic() + seconds
    while not holds() and time.monotonic() < ends:
        threading.Event().wait(0.01)
    return holds()


def in_flight(client: AsyncOpenAI) -> int:
    return sum(
        concurrency.in_flight
        for queue in client._account.limiter._queues.values()
        for concurrency in queue._concurrency_limits
    )


async def test_it_answers_as_the_sdk_does(server) -> None:
    """The same call on both clients gives the same object."""
    async with connect(server) as ours, openai.AsyncOpenAI(api_key="k", base_url=server.base_url) as theirs:
        mine, raw = await ours.chat.completions.create(**CHAT), await theirs.chat.completions.create(**CHAT)
    assert type(mine) is type(raw)
    assert mine.choices == raw.choices
    assert isinstance(ours, openai.AsyncOpenAI)


class Answer(BaseModel):
    """The schema of an answer."""

    text: str


async def plain(client) -> None:
    assert (await client.chat.completions.create(**CHAT)).choices[0].message.content == "echo: hello"


async def parsed(client) -> None:
    completion = await client.chat.completions.parse(**CHAT, response_format=Answer)
    assert isinstance(completion.choices[0].message.parsed, Answer)


async def iterated(client) -> None:
    stream = await client.chat.completions.create(**CHAT, stream=True)
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "echo: hello"


async def stream_helper(client) -> None:
    async with client.chat.completions.stream(**CHAT) as stream:
        assert (await stream.get_final_completion()).choices[0].message.content == "echo: hello"


async def raw_response(client) -> None:
    raw = await client.chat.completions.with_raw_response.create(**CHAT)
    assert raw.headers["x-request-id"]
    assert raw.parse().choices[0].message.content == "echo: hello"


async def streamed_response(client) -> None:
    async with client.chat.completions.with_streaming_response.create(**CHAT) as response:
        assert json.loads(await response.read())["usage"]["total_tokens"]


async def with_options(client) -> None:
    await plain(client.with_options(timeout=5, max_retries=0))


async def copied(client) -> None:
    await plain(client.copy(default_headers={"x-a": "b"}).with_options(timeout=5))


async def embedded(client) -> None:
    answer = await client.embeddings.create(model="text-embedding-3-small", input=["a", "b"])
    assert len(answer.data) == 2


async def responded(client) -> None:
    assert (await client.responses.create(model="gpt-4o-mini", input="hello")).output_text == "echo: hello"


async def response_stream(client) -> None:
    stream = await client.responses.create(model="gpt-4o-mini", input="hello", stream=True)
    assert [event.type async for event in stream][-1] == "response.completed"


async def completed(client) -> None:
    assert (await client.completions.create(model="gpt-3.5-turbo-instruct", prompt="hello")).choices[0].text


async def listed(client) -> None:
    assert [model.id async for model in client.models.list()] == []


async def posted(client) -> None:
    assert await client.post("/chat/completions", body=CHAT, cast_to=object)


ROADS = [
    plain,
    parsed,
    iterated,
    stream_helper,
    raw_response,
    streamed_response,
    with_options,
    copied,
    embedded,
    responded,
    response_stream,
    completed,
    listed,
    posted,
]


@pytest.mark.parametrize("road", ROADS, ids=lambda road: road.__name__)
async def test_every_kind_of_call_passes_the_limiter_once(server, road) -> None:
    """An HTTP request of any resource has one permit, and its slot is free afterwards."""
    async with connect(server) as client:
        await road(client)
        assert client.stats.attempts == len(server.calls) == 1
        assert in_flight(client) == 0


@pytest.mark.parametrize(
    "road", [plain, iterated, response_stream, responded], ids=lambda road: road.__name__
)
async def test_usage_settles_what_was_reserved(server, road) -> None:
    """Plain answers, and streams that end with usage, are settled by the server's own counts."""
    async with connect(server) as client:
        if road is iterated:
            stream = await client.chat.completions.create(
                **CHAT, stream=True, stream_options={"include_usage": True}
            )
            assert [chunk async for chunk in stream][-1].usage.total_tokens
        else:
            await road(client)
        (call,) = server.calls
        assert client.stats.prompt_tokens == call.prompt_tokens
        assert client.stats.completion_tokens == call.completion_tokens


async def test_a_stream_holds_its_slot_until_it_is_closed(server) -> None:
    """With one slot, a second request waits until the first stream is closed, read to its end or not."""
    async with connect(server, rate_limit=RateLimitConfig(max_concurrent=1)) as client:
        stream = await client.chat.completions.create(**CHAT, stream=True)
        await anext(stream)
        second = asyncio.create_task(client.chat.completions.create(**CHAT))
        await asyncio.sleep(0.05)  # time enough for it to arrive, if it were sent
        assert len(server.calls) == 1
        await stream.close()
        await second
        assert in_flight(client) == 0


async def test_a_stream_that_is_dropped_unread_gives_its_slot_back(server) -> None:
    """A stream that is never closed does not keep its slot for ever."""
    async with connect(server, rate_limit=RateLimitConfig(max_concurrent=1)) as client:
        stream = await client.chat.completions.create(**CHAT, stream=True)
        response = stream.response
        await response.aclose()
        del stream, response
        gc.collect()
        await plain(client)
        assert in_flight(client) == 0


async def test_the_sdks_own_retries_are_paced_too() -> None:
    """Each of the SDK's attempts has a permit of its own."""
    with SimulatedServer(script=["500", "drop", "ok"]) as server:
        async with connect(server, max_retries=2) as client:
            await plain(client)
            assert client.stats.attempts == len(server.calls) == 3
            assert in_flight(client) == 0


@pytest.mark.parametrize("fault", ["500", "drop", "truncate", "garbage", "408"])
async def test_a_failed_attempt_frees_its_slot(fault) -> None:
    """After any failure no slot stays taken; the error is the SDK's own."""
    with SimulatedServer(script=[fault]) as server:
        async with connect(server, max_retries=0) as client:
            with contextlib.suppress(openai.APIError, ValueError):
                await client.chat.completions.create(**CHAT)
            assert in_flight(client) == 0
            assert client.stats.attempts == 1


async def test_a_cancelled_call_frees_its_slot() -> None:
    """The call is cancelled while the server hangs."""
    with SimulatedServer(script=["hang"]) as server:
        async with connect(server) as client:
            call = asyncio.create_task(client.chat.completions.create(**CHAT))
            while not server.calls and not server.in_flight:
                await asyncio.sleep(0.01)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert in_flight(client) == 0


@pytest.mark.parametrize("name", ["__init__", "copy", "with_options"])
def test_signatures_are_the_sdks_and_rate_limit(name) -> None:
    """Programs that look at them, as the SDK's own tests do, find all that they know."""
    ours, theirs = (inspect.signature(getattr(kind, name)) for kind in (AsyncOpenAI, openai.AsyncOpenAI))
    parameters = dict(ours.parameters)
    assert parameters.pop("rate_limit").kind is inspect.Parameter.KEYWORD_ONLY
    assert list(parameters.items()) == list(theirs.parameters.items())


async def test_a_copy_may_have_limits_of_its_own(server) -> None:
    """They are spent apart from its original's; the connections are the same."""
    async with connect(server, rate_limit=RateLimitConfig(requests_per_minute=1)) as client:
        await plain(client)
        other = client.with_options(rate_limit=RateLimitConfig(requests_per_minute=2), timeout=9)
        await asyncio.wait_for(asyncio.gather(plain(other), plain(other.copy(max_retries=0))), 10)
        assert (client.stats.attempts, other.stats.attempts, other.timeout) == (1, 2, 9)
        with pytest.raises(ValidationError, match="rate_limit: must be of class"):
            client.copy(rate_limit=5)


@pytest.mark.parametrize(
    "options", [{}, {"timeout": 5}, {"api_key": "sk-other"}, {"rate_limit": RateLimitConfig()}], ids=str
)
async def test_copies_send_through_the_same_http_client(server, options) -> None:
    """As in the SDK, what is done to the one's is done to the other's."""
    async with connect(server) as client:
        assert client.copy(**options)._client is client._client


async def test_a_function_that_returns_the_key_is_one_account(server) -> None:
    """The key that it returned last does not make a copy another account."""
    keys = iter(["sk-1", "sk-2", "sk-3"])

    async def key() -> str:
        return next(keys)

    async with connect(server, api_key=key) as client:
        await plain(client)
        assert client.with_options(timeout=5)._account is client._account
        assert client.with_options(api_key="sk-1")._account is not client._account


async def test_copies_share_the_limits(server) -> None:
    """`with_options` and `copy` spend the same requests per minute."""
    async with connect(server, rate_limit=RateLimitConfig(requests_per_minute=3)) as client:
        for _ in range(3):
            await plain(client.with_options(timeout=9).copy(max_retries=1))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(plain(client), 0.2)


async def test_a_copy_with_another_http_client_shares_the_limits(server) -> None:
    """Limits belong to the account, not to the connection."""
    async with connect(server) as client, openai.DefaultAsyncHttpxClient() as other:
        await plain(client.with_options(http_client=other))
        assert client.stats.attempts == 1


async def test_a_copy_for_another_account_has_limits_of_its_own(server) -> None:
    """For another key or organisation the same limits hold, with nothing spent."""
    async with connect(server, rate_limit=RateLimitConfig(requests_per_minute=1)) as client:
        await plain(client)
        other = client.with_options(api_key="sk-other")
        await plain(other)
        assert (client.stats.attempts, other.stats.attempts) == (1, 1)
        assert other._account.config == client._account.config


def family(name: str):
    return pytest.importorskip(name)


@pytest.mark.parametrize("name", ["httpx", "httpx2"])
async def test_an_http_client_of_the_users_own_is_paced(server, name) -> None:
    """A client of either family keeps its mock transport and hooks."""
    if name == "httpx2" and sdk_httpx().__name__ == "httpx":
        pytest.skip("this SDK knows httpx alone")
    module = family(name)
    seen = []

    async def hook(request) -> None:
        seen.append(request.url.path)

    def reply(request):
        usage = {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11}
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "hi"}}
        return module.Response(200, json={"id": "x", "choices": [choice], "usage": usage, "model": "m"})

    mock = module.AsyncClient(transport=module.MockTransport(reply), event_hooks={"request": [hook]})
    async with connect(server, http_client=mock) as client:
        answer = await client.chat.completions.create(**CHAT)
        assert answer.choices[0].message.content == "hi"
        assert client.stats.completion_tokens == 6
    assert seen == ["/v1/chat/completions"]
    assert mock.is_closed
    assert server.calls == []


async def test_the_sdks_aiohttp_client_is_paced(server) -> None:
    """`DefaultAioHttpClient()` works as in the SDK, streams included."""
    async with connect(server, http_client=openai.DefaultAioHttpClient()) as client:
        for road in (plain, iterated, raw_response, response_stream):
            await road(client)
        assert client.stats.attempts == 4
        assert in_flight(client) == 0


# --- what is done to the HTTP client afterwards -------------------------------------------------------------


def request_hook(client, called) -> None:
    client.event_hooks["request"].append(called)


def response_hooks(client, called) -> None:
    client.event_hooks = {"response": [called]}


def another_transport(client, called) -> None:
    client._transport = Recording(client._transport, called)


def mounted(client, called) -> None:
    client._mounts = {url_pattern()("all://"): Recording(client._transport, called)}


def wrapped_transport(client, called) -> None:
    client._transport.handle_async_request = Recording(client._transport, called).handle_async_request


def wrapped_send(client, called) -> None:
    send = client.send

    async def instrumented(request, **options):
        await called(request)
        return await send(request, **options)

    client.send = instrumented


def url_pattern():
    return importlib.import_module(f"{sdk_httpx().__name__}._utils").URLPattern


class Recording(sdk_httpx().AsyncBaseTransport):
    """A transport that says what it sends, as an instrumentor's does."""

    def __init__(self, inner, called) -> None:
        self.send, self.called, self.is_open = inner.handle_async_request, called, True

    async def aclose(self) -> None:
        self.is_open = False

    async def handle_async_request(self, request):
        await self.called(request)
        return await self.send(request)


CHANGES = [request_hook, response_hooks, another_transport, mounted, wrapped_transport, wrapped_send]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("kind", ["drop-in", "OpenAIClient.openai"])
async def test_what_is_done_to_the_http_client_afterwards_works(server, kind, change) -> None:
    """Each attempt goes that way once, is paced, and so are those of copies, also for another account."""
    seen = []

    async def called(message) -> None:
        seen.append(message)

    config = OpenAIConfig(api_key="sk-test", base_url=server.base_url)
    owner = connect(server) if kind == "drop-in" else OpenAIClient(config)
    async with owner:
        client = owner if kind == "drop-in" else owner.openai
        await plain(client)
        change(client._client, called)
        await plain(client)
        await iterated(client.with_options(timeout=9))
        other = client.with_options(api_key="sk-other")
        await plain(other)
        assert len(seen) == 3
        assert (client.stats.attempts, other.stats.attempts, in_flight(client)) == (3, 1, 0)


async def test_a_transport_put_in_its_place_is_closed_with_the_client(server) -> None:
    """As one that the client was made with."""
    async with connect(server) as client:
        another_transport(client._client, None)
        transport = client._client._transport
    assert not transport.is_open


async def test_headers_set_on_the_http_client_are_sent(server) -> None:
    """Those of the drop-in of an `OpenAIClient` too, which builds its requests itself."""
    seen = []
    config = OpenAIConfig(api_key="sk-test", base_url=server.base_url)

    async def hook(request) -> None:
        seen.append(request.headers["x-team"])

    async with OpenAIClient(config) as client:
        client.openai.http_client.headers["x-team"] = "evals"
        client.openai.http_client.event_hooks["request"].append(hook)
        await client.generate_response("hello", model="gpt-4o-mini")
    assert seen == ["evals"]


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
async def test_a_client_whose_send_was_patched_is_paced(server, late) -> None:
    """The patch of an instance is called once for each attempt, whether before or after it is handed over."""
    http, calls = openai.DefaultAsyncHttpxClient(), []
    send = http.send

    async def patched(request, **options):
        calls.append(request.url.path)
        return await send(request, **options)

    if not late:
        http.send = patched
    async with connect(server, http_client=http) as client:
        http.send = patched
        await plain(client)
        await iterated(client)
        assert (client.stats.attempts, len(calls)) == (2, 2)


async def test_another_http_client_put_in_its_place_is_paced(server) -> None:
    """`client._client = ...` goes on within the same limits."""
    async with connect(server) as client:
        await client._client.aclose()
        client._client = openai.DefaultAsyncHttpxClient()
        await plain(client)
        assert client.stats.attempts == 1


@pytest.mark.parametrize("options", [{}, {"api_key": "sk-other"}], ids=str)
async def test_the_http_client_paces_whatever_it_is_given_to(server, options) -> None:
    """The SDK's own client on `http_client` spends the same limits, and is counted."""
    async with connect(server, rate_limit=RateLimitConfig(requests_per_minute=1)) as client:
        ours = client.with_options(**options)
        theirs = openai.AsyncOpenAI(
            api_key="sk-test", base_url=server.base_url, http_client=ours.http_client, max_retries=0
        )
        await plain(theirs)
        assert (ours.stats.attempts, client.stats.attempts) == (1, 0 if options else 1)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(plain(ours), 0.2)


async def test_a_patched_transport_is_seen_by_the_evaluation_client(monkeypatch) -> None:
    """A mock that patches the SDK's transport in a test answers, and nothing reaches the network."""
    httpx = sdk_httpx()

    async def mocked(transport, request):
        return httpx.Response(200, json=json.loads(ANSWER), request=request)

    monkeypatch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", mocked)
    config = OpenAIConfig(api_key="sk-test", base_url="http://api.invalid/v1", max_retries=0)
    async with OpenAIClient(config) as client, AsyncOpenAI(api_key="k", base_url=config.base_url) as sdk:
        assert (await client.generate_response("hello")).content == "yes"
        await plain_yes(sdk)


async def test_a_mock_that_cannot_see_the_requests_is_named(server, monkeypatch, caplog) -> None:
    """Where the SDK is built on httpx2, what mocks httpx does not keep requests from the network."""
    httpx = pytest.importorskip("httpx")
    if sdk_httpx() is httpx:
        pytest.skip("this SDK is built on httpx")

    async def mocked(transport, request):
        return httpx.Response(200, json=json.loads(ANSWER), request=request)

    monkeypatch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", mocked)
    async with connect(server) as client, connect(server, http_client=httpx.AsyncClient()) as seen:
        await plain_yes(seen)
        assert caplog.records == []
        await plain(client)
    assert [record.event for record in caplog.records if hasattr(record, "event")] == ["not_mocked"]


async def test_a_mock_transport_serves_the_evaluation_client() -> None:
    """`http_client=` with a transport of a mock is all that any client sends through."""
    httpx = sdk_httpx()
    mock = httpx.MockTransport(lambda _: httpx.Response(200, json=json.loads(ANSWER)))
    config = OpenAIConfig(api_key="sk-test", base_url="http://api.invalid/v1", max_retries=0)
    async with OpenAIClient(config, http_client=httpx.AsyncClient(transport=mock)) as client:
        assert (await client.generate_response("hello")).content == "yes"
        await plain_yes(client.openai)


async def plain_yes(client) -> None:
    assert (await client.chat.completions.create(**CHAT)).choices[0].message.content == "yes"


# --- the rest of its life -----------------------------------------------------------------------------------


def test_a_synchronous_http_client_is_refused_by_the_sdk() -> None:
    """The error is the SDK's own TypeError."""
    with sdk_httpx().Client() as client, pytest.raises(TypeError, match="Invalid `http_client`"):
        AsyncOpenAI(api_key="k", http_client=client)


def test_one_client_works_across_event_loops(server) -> None:
    """One client can be used in three `asyncio.run`, one after the other."""
    client = connect(server)

    async def use() -> None:
        await asyncio.gather(*[plain(client) for _ in range(5)])
        await iterated(client)

    for _ in range(3):
        asyncio.run(use())
    assert client.stats.attempts == 18
    assert eventually(lambda: server.connections == 0)


def test_a_closed_client_cannot_be_used(server) -> None:
    """It raises the SDK's own error, which differs by version, and `is_closed()` is true."""

    async def use() -> None:
        client = connect(server)
        await plain(client)
        assert not client.is_closed()
        await client.close()
        assert client.is_closed()
        await client.with_options(max_retries=0).models.list()

    with pytest.raises((RuntimeError, openai.APIConnectionError)) as raised:
        asyncio.run(use())
    assert "closed" in f"{raised.value} {raised.value.__cause__}"


async def test_limits_are_learnt_from_the_headers() -> None:
    """Without rate_limit the first answer's headers set the pace, and nothing is refused after it."""
    with SimulatedServer(rpm=600, tpm=None, window=1, latency=0.02) as server:
        async with connect(server, max_retries=0) as client:
            await plain(client)
            await asyncio.gather(*[plain(client) for _ in range(30)])
        assert server.counts["429"] == 0


async def test_without_limits_anywhere_nothing_waits(server) -> None:
    """Without rate_limit and headers no request is held back."""
    async with connect(server) as client:
        await asyncio.gather(*[plain(client) for _ in range(200)])
        assert client.stats.wait_seconds_by == {}


def test_the_constructor_takes_what_the_sdks_takes() -> None:
    """Every keyword of the installed SDK's constructor is passed on."""
    ours = AsyncOpenAI(
        api_key="k", organization="o", project="p", max_retries=7, timeout=3, default_headers={"a": "b"}
    )
    assert (ours.organization, ours.project, ours.max_retries, ours.timeout) == ("o", "p", 7, 3)
    assert ours.default_headers["a"] == "b"
    with pytest.raises(TypeError, match="nonsense"):
        AsyncOpenAI(api_key="k", nonsense=1)
    parameters = inspect.signature(openai.AsyncOpenAI.__init__).parameters
    given = {name: None for name in parameters if name not in {"self", "http_client"} and name[0] != "_"}
    given |= {"api_key": "k", "max_retries": 1, "timeout": 1.0}
    assert AsyncOpenAI(**given).api_key == "k"


async def test_environment_proxies_go_on_working(server, monkeypatch) -> None:
    """The default transport reads HTTP_PROXY as the SDK's does, so requests arrive at the proxy."""
    proxy = SimulatedServer().start()
    try:
        address = proxy.base_url.removesuffix("/v1")
        monkeypatch.setenv("HTTP_PROXY", address)
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        async with AsyncOpenAI(api_key="k", base_url="http://api.invalid/v1", max_retries=0) as client:
            try:
                await client.models.list()
            except openai.APIStatusError as error:
                assert error.status_code in {400, 404}
        assert proxy.calls or proxy.counts
    finally:
        proxy.stop()


def test_the_key_is_in_no_repr() -> None:
    """Neither the client's repr nor its HTTP client's shows it."""
    client = AsyncOpenAI(api_key="sk-very-secret")
    assert "very-secret" not in f"{client!r}{client._client!r}{client._account!r}"


def test_it_is_imported_from_the_package() -> None:
    """`from openai_eval_client import AsyncOpenAI` is all that users change."""
    assert importlib.import_module("openai_eval_client").AsyncOpenAI is AsyncOpenAI


async def test_an_answer_that_a_mock_has_already_read_frees_its_slot() -> None:
    """`Response(content=...)` is never closed, so it settles at once, usage included."""
    module = sdk_httpx()
    usage = {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11}
    lines = [
        {"id": "x", "choices": [], "usage": usage, "model": "m", "object": "chat.completion.chunk"},
        None,
    ]
    body = "".join(f"data: {json.dumps(line) if line else '[DONE]'}\n\n" for line in lines)

    class Recorded(module.Response):
        """A response class of a user's own."""

    def reply(request):
        return Recorded(200, content=body.encode(), headers={"content-type": "text/event-stream"})

    http = module.AsyncClient(transport=module.MockTransport(reply))
    limits = RateLimitConfig(max_concurrent=1)
    async with AsyncOpenAI(api_key="k", http_client=http, rate_limit=limits) as client:
        streams = [await client.chat.completions.create(**CHAT, stream=True) for _ in range(3)]
        for stream in streams:
            assert [chunk.usage.total_tokens async for chunk in stream] == [11]
        assert client.stats.completion_tokens == 18


async def test_our_own_errors_reach_the_caller_unchanged(server) -> None:
    """No version of the SDK wraps them in an error of its own."""
    limits = RateLimitConfig(tokens_per_minute=100, max_wait=1)
    async with connect(server, rate_limit=limits) as client:
        with pytest.raises(RequestTooLargeError, match="gpt-4o-mini"):
            await client.chat.completions.create(**CHAT, max_tokens=5000)
    assert server.calls == []


async def test_naming_the_same_account_again_keeps_its_limits(server) -> None:
    """`with_options` with the same key and server means the same account."""
    async with connect(server) as client:
        same = client.with_options(api_key="sk-test", base_url=server.base_url)
        assert same._account is client._account
        assert client.with_options(organization="org-other")._account is not client._account


def test_rate_limit_must_be_a_rate_limit_config() -> None:
    """A number or a dict is refused by name."""
    for wrong in (5, {"requests_per_minute": 5}):
        with pytest.raises(ValidationError, match="rate_limit: must be of class RateLimitConfig"):
            AsyncOpenAI(api_key="k", rate_limit=wrong)


async def test_the_servers_counts_correct_our_estimates(server, empty_vocabularies) -> None:
    """Without a vocabulary the drop-in corrects its estimates by the server's usage."""
    async with connect(server) as client:
        long = [{"role": "user", "content": "a" * 400}]
        for _ in range(30):
            await client.chat.completions.create(model="gpt-4o-mini", messages=long)
        body = {"model": "gpt-4o-mini", "messages": long}
        counted = await client._counter.count_input(body)
        assert counted == pytest.approx(server.calls[-1].prompt_tokens, rel=0.1)


def test_closing_does_not_wait_for_another_threads_loop(server) -> None:
    """A client used in two threads closes at once, even if the other loop is blocked."""
    client = connect(server)
    used, leave = threading.Event(), threading.Event()

    def elsewhere() -> None:
        async def use() -> None:
            await plain(client)
            used.set()
            leave.wait(30)  # the loop is blocked

        asyncio.run(use())

    thread = threading.Thread(target=elsewhere)
    thread.start()
    assert used.wait(30)

    async def close() -> None:
        await plain(client)
        await asyncio.wait_for(client.close(), 10)

    asyncio.run(close())
    leave.set()
    thread.join(30)
    assert eventually(lambda: server.connections == 0)


OFF_THE_LOOP = {
    "drop-in": lambda _, sdk: sdk.models.list()._get_page(),
    "drop-in's http_client": lambda _, sdk: sdk.http_client.get("http://localhost"),
    "generate_response": lambda client, _: client.generate_response("hello"),
    "batch_generate": lambda client, _: client.batch_generate(["hello"]),
    "as_completed": lambda client, _: anext(client.as_completed(["hello"])),
    "estimate": lambda client, _: client.estimate(["hello"]),
    "submit_batch_job": lambda client, _: client.submit_batch_job([{"prompt": "hello"}]),
    "get_batch_status": lambda client, _: client.get_batch_status("batch_1"),
    "async with": lambda client, _: client.__aenter__(),
}


@pytest.mark.parametrize("call", OFF_THE_LOOP.values(), ids=OFF_THE_LOOP)
def test_without_an_event_loop_of_asyncio_the_error_says_so(call) -> None:
    """As under trio, which runs coroutines itself."""
    client = OpenAIClient(OpenAIConfig(api_key="k", base_url="http://localhost/v1"))
    sdk = AsyncOpenAI(api_key="k", base_url="http://localhost/v1", max_retries=0)
    step = call(client, sdk).__await__()
    with pytest.raises(RuntimeError, match="runs on asyncio, and no event loop of asyncio runs here"):
        next(step)


LIVES = """
import asyncio, logging, sys
from openai_eval_client import AsyncOpenAI, OpenAIClient, OpenAIConfig
logging.disable()
url, folder = sys.argv[1:]
config = OpenAIConfig(api_key="k", base_url=url, default_model="m")
makes = [
    lambda: AsyncOpenAI(api_key="k", base_url=url),
    lambda: OpenAIClient(config),
    lambda: cached.append(OpenAIClient(config, cache=f"{folder}/cache.db")) or cached[-1],
]
cached = []
def used(make):
    client = make()
    asyncio.run(ask(client))
    return client
async def ask(client):
    await getattr(client, "openai", client).models.list()
    if client in cached:
        await client.generate_response("hello")
def by_hand(client):
    try:
        client.close().send(None)
    except StopIteration:
        return
    raise AssertionError("it waits")
kept = []
for make in makes:
    kept.append(used(make))
    used(make)
    make()
    asyncio.run(used(make).close())
    by_hand(used(make))
"""


@pytest.mark.usefixtures("few_certificates")
def test_no_way_to_end_leaves_a_warning(server, tmp_path) -> None:
    """Closed after its loop, without any, or never; dropped, or kept until the interpreter exits."""
    command = [sys.executable, "-W", "always", "-c", LIVES, server.base_url, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
