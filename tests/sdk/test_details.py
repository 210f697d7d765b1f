"""What the transport owes to users of the SDK beside the answers: uploads, cookies, files, streams."""

from __future__ import annotations

import asyncio
import sys
import types

import openai
import pytest
from raw_server import ANSWER, listening, whole

from openai_eval_client import AsyncOpenAI, OpenAIClient, OpenAIConfig, _interrupts
from openai_eval_client.errors import sdk_httpx

HELLO = [{"role": "user", "content": "hello"}]
httpx = sdk_httpx()


def client_at(url: str, **options: object) -> OpenAIClient:
    config = OpenAIConfig(api_key="sk-secret-1234567890", base_url=url, default_model="m", **options)
    return OpenAIClient(config)


async def test_an_upload_that_nobody_takes_ends_in_time() -> None:
    """As with httpx: the timeout counts for each piece of the body."""

    async def never_read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.pause_reading()
        await held.wait()
        writer.close()

    held = asyncio.Event()
    server = await asyncio.start_server(never_read, "127.0.0.1", 0, limit=1024)
    async with client_at(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1") as client:
        sdk = client.openai.with_options(timeout=0.3, max_retries=0)
        with pytest.raises(openai.APITimeoutError):
            await asyncio.wait_for(sdk.files.create(file=b"x" * 30_000_000, purpose="batch"), 20)
    held.set()
    server.close()


async def test_a_large_body_arrives_whole() -> None:
    """In pieces, with its length in the header."""
    async with listening(whole(), whole()) as (url, seen), client_at(url) as client:
        await client.generate_response("long " * 100_000)
        assert b"long " * 100_000 in seen[0]
        assert b"transfer-encoding" not in seen[0].lower()


async def test_cookies_are_kept_and_sent_as_the_sdk_does() -> None:
    """A balancer that tells its clients apart by a cookie finds them again."""
    replies = whole(ANSWER, "set-cookie: lb=node7; Path=/"), whole(), whole()
    async with listening(*replies) as (url, seen), client_at(url) as client:
        for _ in range(2):
            await client.generate_response("hello")
        await client.openai.chat.completions.create(model="m", messages=HELLO)
    assert [b"lb=node7" in request for request in seen] == [False, True, True]


async def test_a_file_behind_a_redirect_may_have_any_size() -> None:
    """The limit is for answers; a gateway may hand files out at another address."""
    moved = whole(b"", "location: /blob", status="302 Found")
    async with (
        listening(moved, whole(b"x" * 5000)) as (url, _),
        client_at(url, max_response_bytes=1000) as client,
    ):
        assert len((await client.openai.files.content("file-1")).content) == 5000


@pytest.mark.parametrize("location", ["http://[::1", "https://a b:x/", "http://x:99999999/"])
async def test_a_location_that_is_no_url_is_an_error_of_the_connection(location: str) -> None:
    """Not one of a library below, and no sign of answers that aiohttp cannot read."""
    wrong = whole(b"", f"location: {location}", status="302 Found")
    async with listening(wrong, whole()) as (url, _), client_at(url, max_retries=0) as client:
        with pytest.raises(openai.APIConnectionError):
            await client.generate_response("hello")
        assert (await client.generate_response("hello")).content == "yes"


async def test_credentials_stay_here_also_by_a_send_that_was_patched() -> None:
    """An instrumentor wraps `send` on the caller's own client."""
    plain, calls = httpx.AsyncClient(follow_redirects=True), []
    theirs = plain.send

    async def send(request: object, **options: object) -> object:
        calls.append(request)
        return await theirs(request, **options)

    plain.send = send
    async with listening(whole()) as (other, there):
        away = whole(b"", f"location: {other}/chat/completions", status="307 Temporary Redirect")
        async with listening(away) as (url, _):
            client = AsyncOpenAI(base_url=url, api_key="sk-secret-1234567890", http_client=plain)
            headers = {"api-key": "azure-1234567890"}
            await client.chat.completions.create(model="m", messages=HELLO, extra_headers=headers)
            await client.close()
    assert len(calls) == 2
    assert b"azure-1234567890" not in there[0]
    assert b"sk-secret" not in there[0]


async def test_a_stream_that_is_handed_on_is_settled_by_who_reads_it() -> None:
    """The task that opened it fails before anyone reads."""
    events = [
        b'{"choices": [{"index": 0, "delta": {"content": "yes"}}]}',
        b'{"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10}}',
        b"[DONE]",
    ]
    body = b"".join(b"data: " + event + b"\n\n" for event in events)
    streamed = whole(body).replace(b"application/json", b"text/event-stream")
    handed: asyncio.Queue = asyncio.Queue()
    async with listening(streamed) as (url, _), AsyncOpenAI(base_url=url, api_key="sk-1234567890") as client:

        async def produce() -> None:
            handed.put_nowait(
                await client.chat.completions.create(model="gpt-4o-mini", messages=HELLO, stream=True)
            )
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await asyncio.create_task(produce())
        await asyncio.sleep(0.01)
        stream = handed.get_nowait()
        assert len([chunk async for chunk in stream]) == 2
        assert client.stats.prompt_tokens == 9
        assert client.stats.cost.unaccounted == 0


HARNESS = """
async def ask(client, shared, prompt):
    try:
        await shared
    except ValueError:
        return await client.generate_response(prompt)
"""


async def test_an_error_of_one_prompt_leaves_the_callers_other_coroutines_alone() -> None:
    """They handle one exception together; their frames are in its traceback, suspended."""
    harness = types.ModuleType("harness")
    exec(compile(HARNESS, "/x/site-packages/harness.py", "exec"), vars(harness))  # noqa: S102
    shared = asyncio.get_running_loop().create_future()
    shared.set_exception(ValueError("a check before"))
    refused = whole(b'{"error": {"message": "no", "code": "invalid_prompt"}}', status="400 Bad Request")

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
        bad = b"bad" in await reader.readexactly(int(length.partition(b":")[2]))
        await asyncio.sleep(0 if bad else 0.3)
        writer.write(refused if bad else whole())
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with client_at(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1") as client:
        asked = [harness.ask(client, shared, prompt) for prompt in ("good 1", "bad", "good 2")]
        first, second, third = await asyncio.gather(*asked, return_exceptions=True)
    server.close()
    assert (first.content, third.content) == ("yes", "yes")
    assert isinstance(second, openai.BadRequestError)


@pytest.mark.parametrize(
    ("words", "ours"),
    [
        (["python", "-m", "openai_eval_client", "run"], True),
        (["python", "-X", "dev", "-Im", "openai_eval_client.testing"], True),
        (["python", "-m", "pk", "--client", "openai_eval_client.OpenAIClient"], False),
        (["python", "-m", "pk", "-m", "openai_eval_client"], False),
    ],
)
def test_only_our_own_commands_end_at_once(
    monkeypatch: pytest.MonkeyPatch, words: list[str], ours: bool
) -> None:
    """A program that names the package in its arguments handles its signals itself."""
    monkeypatch.setattr(sys, "argv", ["-m", *words[-1:]])
    monkeypatch.setattr(sys, "orig_argv", words)
    assert _interrupts.is_command() == ours
