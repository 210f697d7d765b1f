"""Servers that are more or less compatible with OpenAI's: what they leave out, add, and do differently."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json

import openai
import pytest
from raw_server import listening, whole

from openai_eval_client import AsyncOpenAI, OpenAIClient, OpenAIConfig, QuotaError, RateLimitConfig
from openai_eval_client.testing import SimulatedServer

KEY = "sk-compatible-secret"
MODEL = "meta-llama/Llama-3.1-8B-Instruct"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}


def connect(url: str, max_retries: int = 2, **config) -> OpenAIClient:
    return OpenAIClient(OpenAIConfig(api_key=KEY, base_url=url, max_retries=max_retries, **config))


def reply(body: object, status: str = "200 OK") -> bytes:
    return whole(json.dumps(body).encode(), status=status)


def chat(message: object, **fields) -> dict:
    return {"choices": [{"message": message}], **fields}


async def answered(*replies: bytes, **params):
    """Return the answer, and how many requests it took."""
    async with listening(*replies) as (url, seen), connect(url) as client:
        return await client.generate_response("hello", model=MODEL, **params), len(seen)


async def failed(answer: bytes, *, attempts: int, **params) -> openai.APIError:
    """Return the error that is raised if a server always answers so, after this many attempts."""
    async with listening(*[answer] * 3) as (url, seen), connect(url) as client:
        with pytest.raises(openai.APIError) as raised:
            await client.generate_response("hello", model=MODEL, **params)
        assert len(seen) == attempts
        assert client.stats.attempts == attempts
    assert KEY not in f"{raised.value} {raised.value.body}"
    return raised.value


# --- what they leave out and add --------------------------------------------------------------------------


async def test_without_headers_and_limits_nothing_waits():
    """On a server that states no limits nothing is slowed down; an unknown model has no price."""
    with SimulatedServer(headers=False) as server:
        config = OpenAIConfig(api_key=KEY, base_url=server.base_url, default_model=MODEL)
        limits = RateLimitConfig(requests_per_minute=None, tokens_per_minute=None)
        async with OpenAIClient(config, rate_limit=limits) as client:
            answers = await client.batch_generate([f"{n}" for n in range(50)])
            assert client.stats.wait_seconds_by.get("requests", 0) == 0
            assert client.stats.wait_seconds_by.get("tokens", 0) == 0
            assert client.stats.unpriced == 50
    assert [answer.content for answer in answers] == [f"echo: {n}" for n in range(50)]
    assert {answer.usage.estimated_cost for answer in answers} == {None}
    assert not any(answer.usage.estimated for answer in answers)


OLLAMA = {
    "id": "chatcmpl-123",
    "object": "chat.completion",
    "created": 1728222524,
    "model": "llama3.2",
    "system_fingerprint": "fp_ollama",
    "choices": [
        {"index": 0, "message": {"role": "assistant", "content": "Hi!"}, "finish_reason": "stop"},
    ],
    "usage": {"prompt_tokens": 26, "completion_tokens": 3, "total_tokens": 29},
}
LLAMA_CPP = {
    "choices": [
        {
            "finish_reason": "stop",
            "index": 0,
            "message": {"role": "assistant", "reasoning_content": "A greeting.", "content": "Hi!"},
        }
    ],
    "created": 1757141666,
    "model": "gpt-3.5-turbo",
    "system_fingerprint": "b6400-c4df49a42",
    "object": "chat.completion",
    "usage": {"completion_tokens": 3, "prompt_tokens": 26, "total_tokens": 29},
    "id": "chatcmpl-abc",
    "timings": {"prompt_n": 26, "prompt_ms": 9.1, "predicted_n": 3, "predicted_per_second": 86.2},
}
VLLM = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": MODEL,
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hi!", "reasoning_content": None, "tool_calls": []},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ],
    "usage": {
        "prompt_tokens": 26,
        "total_tokens": 29,
        "completion_tokens": 3,
        "prompt_tokens_details": None,
    },
    "prompt_logprobs": None,
    "kv_transfer_params": None,
}


@pytest.mark.parametrize("body", [OLLAMA, LLAMA_CPP, VLLM], ids=["Ollama", "llama.cpp", "vLLM"])
async def test_answers_of_local_servers_are_read(body):
    """Fields that they add do no harm, and their token counts are used."""
    answer, _ = await answered(reply(body))
    assert (answer.content, answer.finish_reason, answer.model) == ("Hi!", "stop", body["model"])
    assert (answer.usage.total_tokens, answer.usage.estimated, answer.tool_calls) == (29, False, [])
    assert answer.request_id == body["id"]


@pytest.mark.parametrize(
    ("message", "content"),
    [
        ({"content": "yes"}, "yes"),
        ({"content": [{"type": "text", "text": "ye"}, {"type": "text", "text": "s"}]}, "yes"),
        ({"content": [{"type": "thinking", "thinking": []}, {"type": "text", "text": "yes"}]}, "yes"),
        ({"content": [{"type": "image_url"}, {"type": "text", "text": None}, "text", None]}, ""),
        ({"content": None, "refusal": "no"}, ""),
    ],
)
async def test_text_may_come_in_parts(message, content):
    """Its parts are joined; a missing id, model or finish_reason is empty, and counts as text are ignored."""
    answer, _ = await answered(reply(chat(message, usage={"prompt_tokens": "7", "completion_tokens": "9"})))
    assert (answer.content, answer.choices) == (content, [content])
    assert (answer.model, answer.finish_reason, answer.request_id) == (MODEL, "", "")
    assert answer.usage.estimated is True
    assert answer.usage.prompt_tokens > 0


async def test_every_choice_may_come_in_parts():
    """The texts of all choices are joined, not only the first one's."""
    parts = [{"message": {"content": [{"type": "text", "text": text}]}} for text in ("one", "two")]
    answer, _ = await answered(reply({"choices": parts}), n=2)
    assert answer.choices == ["one", "two"]


# --- errors in a 200 --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "kind", "attempts"),
    [
        ({"message": "Provider returned error", "code": 502}, openai.InternalServerError, 3),
        ({"message": "rate limited", "code": "429"}, openai.RateLimitError, 3),
        (
            {"message": "rate limited", "type": "requests", "code": "rate_limit_exceeded"},
            openai.RateLimitError,
            3,
        ),
        ({"message": "no credit", "type": "insufficient_quota"}, QuotaError, 1),
        ({"message": "no credit", "code": 402}, QuotaError, 1),
        ({"message": "wrong key", "code": 401}, openai.AuthenticationError, 1),
        ({"message": "bad", "type": "invalid_request_error", "code": None}, openai.BadRequestError, 1),
        ({"message": "what?", "code": 99999}, openai.APIResponseValidationError, 3),
        ({"message": "what?", "code": 200}, openai.APIResponseValidationError, 3),
        ({"message": "what?", "code": ["x"]}, openai.APIResponseValidationError, 3),
        ("boom", openai.APIResponseValidationError, 3),
    ],
)
async def test_an_error_in_a_200_is_an_error(error, kind, attempts, no_pauses):
    """It is the error of the status that it names, and retried as that status is."""
    raised = await failed(reply({"error": error}), attempts=attempts)
    assert type(raised) is kind
    assert (error if isinstance(error, str) else error["message"]) in str(raised)


@pytest.mark.parametrize("rest", [{"choices": []}, {"choices": None}, {"id": "x", "usage": None}])
async def test_an_error_beside_empty_choices_is_an_error(rest, no_pauses):
    """It is not taken for an empty answer."""
    raised = await failed(reply({"error": {"message": "bad", "code": 400}, **rest}), attempts=1)
    assert type(raised) is openai.BadRequestError


async def test_an_error_without_an_envelope_is_an_error(no_pauses):
    """vLLM puts the fields of an error at the top level."""
    raised = await failed(
        reply({"object": "error", "message": "too long", "type": "BadRequestError", "code": 400}), attempts=1
    )
    assert type(raised) is openai.BadRequestError
    assert "too long" in str(raised)
    raised = await failed(reply({"error": "no such model", "code": 404}), attempts=1)
    assert type(raised) is openai.NotFoundError
    assert "no such model" in str(raised)


async def test_the_attempt_after_an_error_in_a_200_counts(no_pauses):
    """An answer whose error is null is an answer."""
    wrong = reply({"error": {"message": "upstream", "code": 503}})
    answer, attempts = await answered(wrong, reply({"error": None, **OLLAMA}))
    assert (answer.content, attempts) == ("Hi!", 2)


async def test_a_refusal_in_a_200_pauses_the_model(no_pauses):
    """It is counted as a 429."""
    wrong = reply({"error": {"message": "rate limited", "code": 429}})
    async with listening(wrong, reply(OLLAMA)) as (url, _), connect(url) as client:
        await client.generate_response("hello", model=MODEL)
        assert client.stats.rate_limited == 1


async def test_the_key_in_an_error_in_a_200_is_not_shown(no_pauses):
    """It is taken out wherever the server puts it."""
    for error in ({"message": f"key {KEY} is wrong", "code": 401}, f"key {KEY} is wrong"):
        async with listening(*[reply({"error": error})] * 3) as (url, _), connect(url) as client:
            with pytest.raises(openai.APIError) as raised:
                await client.generate_response("hello", model=MODEL)
        assert KEY not in f"{raised.value!r} {raised.value} {raised.value.body}"
        if isinstance(raised.value, openai.APIStatusError):
            assert KEY not in raised.value.response.text


# --- error bodies -----------------------------------------------------------------------------------------

TOO_LONG = (
    "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens "
    "(1000 in the messages, 4000 in the completion). Please reduce the length of the messages or completion."
)


@pytest.mark.parametrize(
    ("status", "body", "kind", "attempts"),
    [
        ("502 Bad Gateway", b"<html><h1>502 Bad Gateway</h1></html>", openai.InternalServerError, 3),
        ("422 X", b'{"detail": [{"loc": ["body"], "msg": "required"}]}', openai.UnprocessableEntityError, 1),
        ("404 X", b'{"detail": "Not Found"}', openai.NotFoundError, 1),
        ("400 X", b'{"message": "no"}', openai.BadRequestError, 1),
        ("400 X", b'{"error": "no"}', openai.BadRequestError, 1),
        ("400 X", b'["no"]', openai.BadRequestError, 1),
        ("400 X", b"", openai.BadRequestError, 1),
        ("429 X", b"rate limited", openai.RateLimitError, 3),
        ("429 X", b'{"error": {"message": null, "code": {"a": 1}, "type": ["x"]}}', openai.RateLimitError, 3),
        ("400 X", b'{"error": {"code": ["x"], "param": {"a": 1}}}', openai.BadRequestError, 1),
        (
            "400 X",
            b'{"error": {"code": "unsupported_value", "param": ["temperature"]}}',
            openai.BadRequestError,
            1,
        ),
        (
            "400 X",
            json.dumps(
                {
                    "object": "error",
                    "message": TOO_LONG,
                    "type": "BadRequestError",
                    "param": None,
                    "code": 400,
                }
            ).encode(),
            openai.BadRequestError,
            1,
        ),
        (
            "404 X",
            b'{"error": {"message": "model \\"x\\" not found, try pulling it first", "type": "api_error"}}',
            openai.NotFoundError,
            1,
        ),
        (
            "503 X",
            b'{"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}}',
            openai.InternalServerError,
            3,
        ),
    ],
    ids=lambda value: value[:30].decode() if isinstance(value, bytes) else None,
)
async def test_any_error_body_gives_the_error_of_its_status(status, body, kind, attempts, no_pauses):
    """The body may be anything, in JSON or not; it is kept as the error's body."""
    raised = await failed(whole(body, status=status), attempts=attempts, temperature=0.5)
    assert type(raised) is kind
    assert raised.status_code == int(status[:3])
    with contextlib.suppress(ValueError):
        sent = json.loads(body)
        assert raised.body == (sent.get("error", sent) if isinstance(sent, dict) else sent)


# --- streams on the drop-in client ------------------------------------------------------------------------


def chunk(text: str, **fields) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    return b"data: " + json.dumps({"id": "1", "choices": [choice], **fields}).encode() + b"\n\n"


def events(*parts: bytes) -> bytes:
    head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
    return head.encode() + b"".join(parts)


DONE = b"data: [DONE]\n\n"
STREAMS = {
    "no end and no usage": (events(chunk("one "), chunk("two")), None),
    "null usage": (events(chunk("one ", usage=None), chunk("two", usage=None), DONE), None),
    "keep-alive comments": (
        events(
            b": OPENROUTER PROCESSING\n\n", chunk("one "), b":\n\n", b": ping\r\n\r\n", chunk("two"), DONE
        ),
        None,
    ),
    "usage in the last of the choices": (
        events(chunk("one "), chunk("two", usage={"prompt_tokens": 7, "completion_tokens": 2}), DONE),
        (7, 2),
    ),
    "no spaces, no final blank line": (
        events(chunk("one ").replace(b"data: ", b"data:"), chunk("two"), b"data:[DONE]"),
        None,
    ),
}


@pytest.mark.parametrize(("stream", "usage"), STREAMS.values(), ids=STREAMS)
@pytest.mark.parametrize("via", ["drop-in", "OpenAIClient.openai"])
async def test_streams_are_passed_on_and_settled(via, stream, usage):
    """All text arrives, the slot is freed, and tokens are the server's count or none."""
    async with listening(stream, hang_up=True) as (url, _), contextlib.AsyncExitStack() as stack:
        if via == "drop-in":
            owner = sdk = await stack.enter_async_context(AsyncOpenAI(api_key=KEY, base_url=url))
        else:
            owner = await stack.enter_async_context(connect(url))
            sdk = owner.openai
        chunks = [event async for event in await sdk.chat.completions.create(**CHAT, stream=True)]
        assert "".join(event.choices[0].delta.content for event in chunks) == "one two"
        assert owner.stats.attempts == 1
        assert (owner.stats.prompt_tokens, owner.stats.completion_tokens) == (usage or (0, 0))
        assert (
            sum(
                concurrency.in_flight
                for queue in owner._account.limiter._queues.values()
                for concurrency in queue._concurrency_limits
            )
            == 0
        )


async def test_an_error_in_a_stream_is_the_sdks(no_pauses):
    """It leaves no slot taken, whether or not the SDK closes the stream."""

    async def read(sdk) -> None:
        with pytest.raises(openai.APIError, match="upstream"):
            [event async for event in await sdk.chat.completions.create(**CHAT, stream=True)]

    wrong = events(chunk("one "), b'data: {"error": {"message": "upstream", "code": 502}}\n\n')
    async with listening(wrong, hang_up=True) as (url, _), AsyncOpenAI(api_key=KEY, base_url=url) as sdk:
        await read(sdk)
        while not sdk.stats.attempts:
            gc.collect()  # an old SDK leaves closing the stream to the garbage collector
            await asyncio.sleep(0.01)
        assert sdk.stats.attempts == 1


# --- addresses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["/v1", "/v1/", "/api/proxy/openai", "/api/proxy/openai/", "", "/"])
@pytest.mark.parametrize("via", ["OpenAIClient", "OpenAIClient.openai", "drop-in"])
async def test_any_base_url_leads_to_the_endpoint(base, via):
    """It may have a prefix, and a slash at its end."""
    async with listening(reply(OLLAMA)) as (url, seen):
        address = url.removesuffix("/v1") + base
        async with connect(address) as client, AsyncOpenAI(api_key=KEY, base_url=address) as sdk:
            if via == "OpenAIClient":
                await client.generate_response("hello", model=MODEL)
            else:
                chosen = sdk if via == "drop-in" else client.openai
                await chosen.chat.completions.create(**CHAT)
            counted = sdk.stats if via == "drop-in" else client.stats
            assert counted.prompt_tokens == 26  # so the path was recognised as one that runs a model
    expected = f"POST {base.rstrip('/')}/chat/completions HTTP/1.1"
    assert seen[0].partition(b"\r\n")[0].decode() == expected


async def test_azures_query_is_sent():
    """It comes from `default_query` of the drop-in, or `extra_query` of a prompt."""
    version = {"api-version": "2024-10-21"}
    prefix = "/openai/deployments/mine"
    async with listening(reply(OLLAMA)) as (url, one), listening(reply(OLLAMA)) as (other, two):
        options = {"base_url": url.removesuffix("/v1") + prefix, "default_query": version}
        async with AsyncOpenAI(api_key=KEY, default_headers={"api-key": KEY}, **options) as sdk:
            await sdk.with_options(timeout=5).chat.completions.create(**CHAT)
            assert sdk.stats.prompt_tokens == 26
        async with connect(other.removesuffix("/v1") + prefix) as client:
            await client.generate_response("hello", model=MODEL, extra_query=version)
    line = f"POST {prefix}/chat/completions?api-version=2024-10-21 HTTP/1.1".encode()
    assert [seen[0].partition(b"\r\n")[0] for seen in (one, two)] == [line, line]


async def test_an_error_among_good_answers_fails_its_own_prompt_alone():
    """The other prompts are answered."""
    replies = [reply(OLLAMA), reply({"error": {"message": "bad", "code": 400}}), reply(OLLAMA)]
    async with listening(*replies) as (url, _), connect(url, default_model=MODEL) as client:
        outcomes = await client.batch_generate(["a", "b", "c"], max_concurrent=1, return_exceptions=True)
    assert [type(outcome).__name__ for outcome in outcomes] == [
        "ModelResponse",
        "BadRequestError",
        "ModelResponse",
    ]
