"""The simulated server, over real sockets and through the official SDK; its buckets on a clock we drive."""

import asyncio
import base64
import gc
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, IncompleteRead, RemoteDisconnected
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import Completion, CreateEmbeddingResponse
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response
from pydantic import BaseModel, Field

import openai_eval_client.testing as testing_package
from openai_eval_client.testing import Call, SimulatedServer
from openai_eval_client.testing._endpoints.schemas import minimal
from openai_eval_client.testing._faults import FAULTS, ApiError, Faults, Latency, masked
from openai_eval_client.testing._limits import Bucket, Limits, duration
from openai_eval_client.testing._options import Options

ROOT = Path(testing_package.__file__).parents[2]
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello there"}]}
COMPLETIONS = "/chat/completions"


def client(server, **options):
    return openai.AsyncOpenAI(base_url=server.base_url, api_key="sk-test", **{"max_retries": 0, **options})


def send(server, body=CHAT, path=COMPLETIONS, *, method="POST", key="sk-test", headers=None, timeout=30):
    """One raw request on a connection of its own: status, headers, body."""
    url = urlsplit(server.base_url)
    raw = body if isinstance(body, bytes | type(None)) else json.dumps(body)
    connection = HTTPConnection(url.netloc, timeout=timeout)
    try:
        sent = {"authorization": f"Bearer {key}", "content-type": "application/json", **(headers or {})}
        connection.request(method, url.path + path, raw, sent)
        response = connection.getresponse()
        shown = {name.lower(): value for name, value in response.getheaders()}
        return response.status, shown, response.read()
    finally:
        connection.close()


def error_of(raw):
    return json.loads(raw)["error"]


def events_of(raw):
    lines = [line for line in raw.decode().split("\n") if line.startswith("data: ")]
    return [line.removeprefix("data: ") for line in lines]


async def until(condition):
    while not condition():
        await asyncio.sleep(0)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def server():
    with SimulatedServer() as running:
        yield running


# --- bodies


def test_a_chat_completion_has_the_apis_shape(server):
    status, headers, raw = send(server)
    completion = ChatCompletion.model_validate_json(raw, strict=True)
    assert status == 200
    assert headers["content-type"] == "application/json"
    assert completion.choices[0].message.content == "echo: hello there"
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage.prompt_tokens == len("hello there") // 4 + 3 + 3
    assert completion.usage.completion_tokens == 3
    assert completion.usage.total_tokens == 5 + 3 + 3
    assert not completion.model_extra
    assert not completion.choices[0].message.model_extra


async def test_the_sdk_chats(server):
    async with client(server) as sdk:
        first = await sdk.chat.completions.create(**CHAT, n=2)
        second = await sdk.chat.completions.create(**CHAT, n=2)
    assert [choice.index for choice in first.choices] == [0, 1]
    assert first.usage.completion_tokens == 6
    assert first.choices == second.choices
    assert first.id != second.id


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
async def test_a_maximum_cuts_the_answer(server, name):
    async with client(server) as sdk:
        completion = await sdk.chat.completions.create(**CHAT, **{name: 2})
    assert completion.choices[0].message.content == "echo: hello "
    assert completion.choices[0].finish_reason == "length"
    assert completion.usage.completion_tokens == 2


async def test_content_parts_and_earlier_turns_are_read(server):
    messages = [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": None},
        {"role": "user", "content": [{"type": "text", "text": "sec"}, {"type": "text", "text": "ond"}]},
        {"role": "system", "content": "last"},
    ]
    async with client(server) as sdk:
        completion = await sdk.chat.completions.create(model="m", messages=messages)
    assert completion.choices[0].message.content == "echo: second"
    assert completion.usage.prompt_tokens == (1 + 1 + 1 + 1) + 4 * 3 + 3


def test_a_lone_surrogate_passes(server):
    _, _, raw = send(server, {"model": "m", "messages": [{"role": "user", "content": "\ud800"}]})
    assert json.loads(raw)["choices"][0]["message"]["content"] == "echo: \ud800"


class Leaf(BaseModel):
    name: str = Field(min_length=3)
    kind: str = Field(json_schema_extra={"enum": ["a", "b"]})
    weight: float = Field(gt=1.5, lt=2)
    count: int = Field(ge=7, multiple_of=5)
    below: int = Field(lt=-2)
    tags: list[str] = Field(min_length=2)
    note: str | None
    either: int | str


class Tree(BaseModel):
    leaf: Leaf
    left: "Tree | None"
    others: list["Tree"]


async def test_a_json_schema_is_answered_with_an_instance(server):
    async with client(server) as sdk:
        completion = await sdk.chat.completions.parse(**CHAT, response_format=Tree)
    assert completion.choices[0].message.parsed.left is None
    assert completion.choices[0].message.parsed.leaf.count == 10


async def test_a_json_object_is_answered_with_an_object(server):
    async with client(server) as sdk:
        completion = await sdk.chat.completions.create(**CHAT, response_format={"type": "json_object"})
    assert json.loads(completion.choices[0].message.content) == {}


def test_other_schemas():
    schema = {
        "type": "object",
        "required": ["a", "b", "c", "d", "e", "f"],
        "properties": {
            "a": {"const": 5},
            "b": {"allOf": [{"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"]}]},
            "c": {"type": ["string", "null"]},
            "d": {"type": "string", "format": "date"},
            "e": {"type": "number", "exclusiveMinimum": 4},
            "f": {"type": "array", "prefixItems": [{"type": "integer"}]},
        },
    }
    expected = {"a": 5, "b": {"x": False}, "c": None, "d": "2000-01-01", "e": 5, "f": [0]}
    assert minimal(schema) == expected


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"x": {"$ref": "#"}}, "required": ["x"]},
        {"allOf": [{"$ref": "#"}]},
        {"$ref": "#/$defs/gone"},
    ],
)
def test_an_impossible_schema_is_a_400(server, schema):
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    status, _, raw = send(server, {**CHAT, "response_format": wanted})
    assert (status, error_of(raw)["code"]) == (400, "invalid_json_schema")


STRICT = {**Leaf.model_json_schema(), "additionalProperties": False}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": STRICT, "strict": True}}
    for name in ("f", "g")
]


@pytest.mark.parametrize(
    ("choice", "name", "reason"),
    [("required", "f", "tool_calls"), ({"type": "function", "function": {"name": "g"}}, "g", "stop")],
)
async def test_a_forced_tool_is_called(server, choice, name, reason):
    async with client(server) as sdk:
        completion = await sdk.chat.completions.create(**CHAT, tools=TOOLS, tool_choice=choice)
    ChatCompletion.model_validate(completion.model_dump(), strict=True)
    (call,) = completion.choices[0].message.tool_calls
    assert call.function.name == name
    assert Leaf.model_validate_json(call.function.arguments)
    assert completion.choices[0].message.content is None
    assert completion.choices[0].finish_reason == reason


async def test_a_tool_left_to_the_model_is_not_called(server):
    async with client(server) as sdk:
        completion = await sdk.chat.completions.create(**CHAT, tools=TOOLS)
    assert completion.choices[0].message.tool_calls is None


async def test_logprobs_come_when_asked_for(server):
    async with client(server) as sdk:
        completion = await sdk.chat.completions.create(**CHAT, logprobs=True)
    tokens = completion.choices[0].logprobs.content
    assert "".join(token.token for token in tokens) == completion.choices[0].message.content


@pytest.mark.parametrize("with_usage", [False, True])
def test_a_chat_stream_has_the_apis_shape(server, with_usage):
    body = {**CHAT, "stream": True, "n": 2, "stream_options": {"include_usage": with_usage}}
    status, headers, raw = send(server, body)
    *data, done = events_of(raw)
    chunks = [ChatCompletionChunk.model_validate_json(chunk, strict=True) for chunk in data]
    assert (status, done) == (200, "[DONE]")
    assert headers["content-type"].startswith("text/event-stream")
    if with_usage:
        assert all("usage" in json.loads(chunk) for chunk in data)
        *chunks, last = chunks
        assert last.choices == []
        assert last.usage.completion_tokens == 6
    assert all(chunk.usage is None for chunk in chunks)
    for index in (0, 1):
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert "".join(choice.delta.content or "" for choice in mine) == "echo: hello there"
        assert [choice.finish_reason for choice in mine] == [None] * (len(mine) - 1) + ["stop"]


async def test_the_sdk_assembles_a_streamed_tool_call(server):
    async with client(server) as sdk:
        manager = sdk.chat.completions.stream(**CHAT, tools=TOOLS, tool_choice="required")
        async with manager as stream:
            completion = await stream.get_final_completion()
    assert Leaf.model_validate_json(completion.choices[0].message.tool_calls[0].function.arguments)


@pytest.mark.parametrize("given", ["hello there", [{"role": "user", "content": "hello there"}]])
def test_a_response_has_the_apis_shape(server, given):
    body = {"model": "m", "input": given, "instructions": "be brief", "max_output_tokens": 100}
    _, _, raw = send(server, body, "/responses")
    response = Response.model_validate_json(raw, strict=True)
    assert response.output_text == "echo: hello there"
    assert (response.status, response.max_output_tokens) == ("completed", 100)
    assert response.instructions == "be brief"
    assert response.usage.input_tokens == (2 + 3 + 3) + (2 + 3)
    assert response.usage.output_tokens == 3


async def test_the_sdk_streams_a_response(server):
    kinds, text = [], ""
    async with client(server) as sdk:
        async for event in await sdk.responses.create(model="m", input="hello there", stream=True):
            kinds.append(event.type)
            text += event.delta if event.type == "response.output_text.delta" else ""
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    assert event.response.usage.output_tokens == 3
    assert text == event.response.output_text == "echo: hello there"


async def test_a_response_can_be_incomplete_structured_or_a_call(server):
    tool = {"type": "function", "name": "f", "parameters": Leaf.model_json_schema(), "strict": False}
    async with client(server) as sdk:
        cut = await sdk.responses.create(model="m", input="hello there", max_output_tokens=1)
        parsed = await sdk.responses.parse(model="m", input="hello", text_format=Tree)
        called = await sdk.responses.create(model="m", input="x", tools=[tool], tool_choice="required")
        streamed = [
            event
            async for event in await sdk.responses.create(
                model="m", input="x", tools=[tool], tool_choice={"type": "function", "name": "f"}, stream=True
            )
        ]
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert isinstance(parsed.output_parsed, Tree)
    assert Leaf.model_validate_json(called.output[0].arguments)
    assert streamed[-1].response.output[0].arguments == called.output[0].arguments


@pytest.mark.parametrize(
    ("prompt", "texts", "tokens"),
    [
        ("hello", ["echo: hello"], 1),
        (["a", "b"], ["echo: a", "echo: b"], 2),
        ([1, 2], ["echo: 1 2"], 2),
        ([[1, 2], [3]], ["echo: 1 2", "echo: 3"], 3),
    ],
)
def test_a_completion_has_the_apis_shape(server, prompt, texts, tokens):
    _, _, raw = send(server, {"model": "m", "prompt": prompt}, "/completions")
    completion = Completion.model_validate_json(raw, strict=True)
    assert [choice.text for choice in completion.choices] == texts
    assert completion.usage.prompt_tokens == tokens


async def test_the_sdk_streams_a_completion(server):
    async with client(server) as sdk:
        stream = await sdk.completions.create(
            model="m", prompt="hello there", stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == "echo: hello there"
    assert chunks[-1].usage.completion_tokens == 3


@pytest.mark.parametrize("given", ["hello", ["hello", "hello"], [1, 2, 3], [[1], [2, 3]]])
async def test_embeddings_are_unit_vectors_in_either_encoding(server, given):
    async with client(server) as sdk:
        packed = await sdk.embeddings.create(model="text-embedding-3-small", input=given)
    body = {"model": "text-embedding-3-small", "input": given}
    _, _, raw = send(server, {**body, "encoding_format": "float"}, "/embeddings")
    plain = CreateEmbeddingResponse.model_validate_json(raw, strict=True)
    assert len(plain.data[0].embedding) == 1536
    assert sum(value**2 for value in plain.data[0].embedding) == pytest.approx(1)
    for one, other in zip(packed.data, plain.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-6)


def test_embeddings_take_dimensions(server):
    body = {"model": "m", "input": "x", "encoding_format": "base64", "dimensions": 8}
    _, _, raw = send(server, body, "/embeddings")
    assert len(struct.unpack("<8f", base64.b64decode(json.loads(raw)["data"][0]["embedding"]))) == 8


async def test_models_are_listed_and_looked_up():
    with SimulatedServer(models={"b", "a/x"}) as server:
        async with client(server) as sdk:
            assert [model.id async for model in sdk.models.list()] == ["a/x", "b"]
            assert (await sdk.models.retrieve("b")).id == "b"
            with pytest.raises(openai.NotFoundError) as caught:
                await sdk.chat.completions.create(**CHAT)
    assert caught.value.code == "model_not_found"
    assert "`m` does not exist" in caught.value.message


def test_the_answer_and_its_tokens_can_be_given():
    with SimulatedServer(
        answer=lambda body: body["model"].upper(), output_tokens=50, count_tokens=len
    ) as server:
        completion = json.loads(send(server)[2])
        cut = json.loads(send(server, {**CHAT, "max_tokens": 10})[2])
    assert completion["choices"][0]["message"]["content"] == "M"
    assert completion["usage"]["completion_tokens"] == 50
    assert completion["usage"]["prompt_tokens"] == len("hello there") + 3 + 3
    assert (cut["usage"]["completion_tokens"], cut["choices"][0]["finish_reason"]) == (10, "length")


def test_a_failing_answer_says_so():
    with SimulatedServer(answer=lambda body: body["gone"]) as server:
        status, _, raw = send(server)
    assert status == 500
    assert error_of(raw)["message"] == "answer() raised KeyError('gone')"


# --- refusals


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        (b"{", None, None),
        (b"[]", None, None),
        ({"messages": []}, "model", "missing_required_parameter"),
        ({"model": 3, "messages": []}, "model", "invalid_type"),
        ({"model": "m"}, "messages", "missing_required_parameter"),
        ({"model": "m", "messages": "x"}, "messages", "invalid_type"),
        ({**CHAT, "max_tokens": "x"}, "max_tokens", "invalid_type"),
    ],
)
def test_a_body_that_cannot_be_understood_is_a_400(server, body, param, code):
    status, _, raw = send(server, body)
    assert (status, error_of(raw)["param"], error_of(raw)["code"]) == (400, param, code)
    assert error_of(raw)["type"] == "invalid_request_error"


def test_unknown_paths_and_methods(server):
    status, _, raw = send(server, path="/nowhere")
    assert status == 404
    assert error_of(raw)["message"] == "Invalid URL (POST /v1/nowhere)"
    assert send(server, path="/assistants", method="GET", body=None)[0] == 404
    assert send(server, method="GET", body=None)[0] == 405


def test_keys_are_checked():
    with SimulatedServer(api_key="sk-the-right-one") as server:
        assert send(server, key="sk-the-right-one")[0] == 200
        status, _, raw = send(server, key="sk-a-wrong-key-6789")
        assert (status, error_of(raw)["code"]) == (401, "invalid_api_key")
        assert "Incorrect API key provided: sk-a-wro*******6789." in error_of(raw)["message"]
        assert send(server, headers={"authorization": "Basic x"})[0] == 401
        assert error_of(send(server, key="")[2])["message"].startswith("You didn't provide an API key.")
    with SimulatedServer() as server:
        assert send(server, key="")[0] == 401
        assert send(server, key="anything")[0] == 200


@given(st.text(min_size=1))
def test_a_masked_key_keeps_its_length_and_hides_something(key):
    assert len(masked(key)) == len(key)
    assert len(key) <= 2 or "*" in masked(key)


# --- limits


def test_a_refused_request_is_told_what_and_how_long():
    with SimulatedServer(tpm=600, window=60) as server:
        assert send(server, {**CHAT, "max_tokens": 592 - 1})[0] == 200
        status, headers, raw = send(server, {**CHAT, "max_tokens": 292})
        assert status == 429
        error = error_of(raw)
        assert (error["type"], error["param"], error["code"]) == ("tokens", None, "rate_limit_exceeded")
        head = "Rate limit reached for m in organization org-sim on tokens per min (TPM): Limit 600, Used "
        assert error["message"].startswith(head)
        assert "Requested 300. Please try again in " in error["message"]
        wait = int(headers["retry-after-ms"])
        assert 28_000 < wait <= 30_000
        assert int(headers["retry-after"]) == -(-wait // 1000)
        assert [call.charged_tokens for call in server.calls] == [599, 0]


def test_requests_are_limited_too_and_models_apart():
    with SimulatedServer(rpm=2) as server:
        assert [send(server)[0] for _ in range(3)] == [200, 200, 429]
        assert error_of(send(server)[2])["type"] == "requests"
        assert "requests per min (RPM): Limit 2, Used 2, Requested 1." in error_of(send(server)[2])["message"]
        assert send(server, {**CHAT, "model": "other"})[0] == 200


def test_a_request_no_bucket_can_hold_is_too_large():
    with SimulatedServer(tpm=1200, window=5) as server:
        status, headers, raw = send(server, {**CHAT, "max_tokens": 200})
    assert status == 429
    assert error_of(raw)["message"] == (
        "Request too large for m in organization org-sim on tokens per min (TPM): Limit 1200, Requested 208. "
        "The input or output tokens must be reduced in order to run successfully."
    )
    assert "retry-after" not in headers


def test_headers_show_the_buckets():
    with SimulatedServer(rpm=60, tpm=6000) as server:
        for body in (CHAT, {**CHAT, "stream": True}):
            server.reset()
            _, headers, _ = send(server, body)
            assert headers["x-ratelimit-limit-requests"] == "60"
            assert headers["x-ratelimit-remaining-requests"] == "59"
            assert headers["x-ratelimit-limit-tokens"] == "6000"
            assert 6000 - 24 <= int(headers["x-ratelimit-remaining-tokens"]) < 6000
            assert headers["x-ratelimit-reset-tokens"].endswith("ms")
            assert headers["x-request-id"].startswith("req_")
            assert headers["openai-processing-ms"].isdigit()
        ids = {send(server)[1]["x-request-id"] for _ in range(3)}
        assert len(ids) == 3


def test_headers_come_with_errors_of_a_known_model():
    with SimulatedServer(rpm=60, script=["500"]) as server:
        assert "x-ratelimit-remaining-requests" in send(server)[1]
        assert "x-ratelimit-remaining-tokens" not in send(server)[1]
        assert "x-ratelimit-limit-requests" not in send(server, path="/nowhere")[1]


def test_headers_can_be_switched_off():
    with SimulatedServer(rpm=1, headers=False, retry_after=False) as server:
        for status in (200, 429):
            got, headers, _ = send(server)
            assert got == status
            assert not [name for name in headers if "ratelimit" in name or "retry" in name]
            assert "x-request-id" in headers


@pytest.mark.parametrize(("stamp", "seen"), [("admission", {"1", "0"}), ("answer", {"0"})])
async def test_headers_are_stamped_at_admission_or_answer(stamp, seen):
    """Two requests in flight together: at the answer both budgets are gone, at admission one is left."""
    with SimulatedServer(rpm=2, stamp=stamp, latency=0.5, latency_sigma=0) as server:
        answers = await asyncio.gather(*(asyncio.to_thread(send, server) for _ in range(2)))
    assert {headers["x-ratelimit-remaining-requests"] for _, headers, _ in answers} == seen


@pytest.mark.parametrize(("charge", "charged"), [("upfront", 8 + 100), ("actual", 8 + 3)])
def test_the_charge_is_what_was_asked_or_what_was_used(charge, charged):
    with SimulatedServer(tpm=1, window=60 * 1000, charge=charge) as server:
        _, headers, _ = send(server, {**CHAT, "max_tokens": 100})
        assert server.calls[0].charged_tokens == charged
        assert int(headers["x-ratelimit-remaining-tokens"]) == 1000 - charged


def test_without_a_maximum_the_default_output_is_charged():
    with SimulatedServer(default_output=40) as server:
        send(server, {**CHAT, "n": 2})
        send(server, {"model": "m", "input": "hello there"}, "/embeddings")
        assert [call.charged_tokens for call in server.calls] == [8 + 2 * 40, 2]


def test_quota_runs_out():
    with SimulatedServer(quota_exhausted_after=1, script=["500"]) as server:
        assert [send(server)[0] for _ in range(3)] == [500, 200, 429]
        error = error_of(send(server)[2])
        assert (error["type"], error["code"]) == ("insufficient_quota", "insufficient_quota")


def test_limits_change_while_running():
    with SimulatedServer(rpm=1) as server:
        assert [send(server)[0] for _ in range(2)] == [200, 429]
        server.set_limits(rpm=None, tpm=6000)
        status, headers, _ = send(server)
        assert (status, server.rpm, server.tpm) == (200, None, 6000)
        assert "x-ratelimit-limit-requests" not in headers
        assert headers["x-ratelimit-limit-tokens"] == "6000"
        server.set_limits(tpm=1)
        assert send(server)[0] == 429
        with pytest.raises(ValueError, match="rpm must be positive"):
            server.set_limits(rpm=0)


def test_reset_forgets_and_refills():
    with SimulatedServer(rpm=1) as server:
        assert [send(server)[0] for _ in range(2)] == [200, 429]
        server.reset()
        assert (server.calls, server.counts, server.max_in_flight) == ([], {}, 0)
        assert send(server)[0] == 200
        assert server.calls[0].index == 2


def test_limits_can_be_changed_from_within_an_answer():
    def answer(_):
        server.set_limits(rpm=5)
        return "done"

    with SimulatedServer(answer=answer) as server:
        assert send(server)[0] == 200
        assert server.rpm == 5


def test_a_bucket_keeps_its_proportion_when_resized():
    clock = Clock()
    bucket = Bucket(60, 60, clock=clock)
    bucket.take(45)
    bucket.resize(600)
    assert (bucket.level, bucket.capacity) == (150, 600)
    clock.now = 1
    assert bucket.level == 160
    assert bucket.wait(200) == pytest.approx(4)
    assert bucket.wait(601) == float("inf")


@given(
    limit=st.floats(1, 1e6),
    window=st.floats(1, 120),
    steps=st.lists(st.tuples(st.floats(0, 30), st.floats(0, 1)), min_size=1, max_size=40),
)
def test_no_span_admits_more_than_a_bucket_and_its_refill(limit, window, steps):
    clock = Clock()
    bucket = Bucket(limit, window, clock=clock)
    taken = []
    for pause, share in steps:
        clock.now += pause
        cost = share * bucket.capacity
        if not bucket.wait(cost):
            bucket.take(cost)
            taken.append((clock.now, cost))
    for start in range(len(taken)):
        span = taken[-1][0] - taken[start][0]
        spent = sum(cost for _, cost in taken[start:])
        assert spent <= bucket.capacity + span * limit / 60 + 1e-3


def refused_for(limits, cost):
    """Seconds to wait, as the refusal says; 0 for an admission."""
    try:
        limits.admit("m", cost)
    except ApiError as error:
        return int(error.headers["retry-after-ms"]) / 1000
    return 0


@given(limit=st.floats(1, 1e6), cost=st.integers(1, 1000))
def test_whoever_waits_as_told_is_admitted(limit, cost):
    clock = Clock()
    limits = Limits(Options(tpm=limit, window=60 * 1000), clock=clock)
    for _ in range(20):
        if wait := refused_for(limits, cost):
            clock.now += wait
            limits.admit("m", cost)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"), (0.0165, "17ms"), (1, "1s"), (8.64, "8.64s"), (62.5, "1m2.5s"), (360, "6m0s"),
        (0.9999, "1s"), (7200.5, "2h0m0.5s"),
    ],
)  # fmt: skip
def test_durations_are_written_as_the_api_does(seconds, text):
    assert duration(seconds) == text


# --- faults


@pytest.mark.parametrize(
    ("fault", "status", "error"),
    [
        ("500", 500, openai.InternalServerError),
        ("503", 503, openai.InternalServerError),
        ("408", 408, openai.APIStatusError),
        ("409", 409, openai.ConflictError),
        ("429", 429, openai.RateLimitError),
    ],
)
async def test_status_faults_reach_the_sdk(fault, status, error):
    with SimulatedServer(script=[fault], rpm=100) as server:
        async with client(server) as sdk:
            with pytest.raises(error) as caught:
                await sdk.chat.completions.create(**CHAT)
            assert (await sdk.chat.completions.create(**CHAT)).choices
        assert caught.value.status_code == status
        assert server.counts == {fault: 1, "200": 1}
        assert [call.fault for call in server.calls] == [fault, None]
        assert not server.calls[0].served
        spurious = fault == "429"
        assert ("x-ratelimit-limit-requests" in caught.value.response.headers) is not spurious
        assert server.calls[0].charged_tokens == (0 if spurious else 8 + 16)


def test_503_can_announce_a_wait():
    with SimulatedServer(script=["503", "503"], unavailable_retry_after=0.5) as server:
        assert send(server)[1]["retry-after"] == "0.5"


async def test_the_sdk_retries_what_fails():
    with SimulatedServer(script=["500", "drop", "ok"]) as server:
        async with client(server, max_retries=2) as sdk:
            completion = await sdk.chat.completions.create(**CHAT)
        assert completion.choices[0].message.content == "echo: hello there"
        assert [call.status for call in server.calls] == [500, 0, 200]
        assert server.counts == {"500": 1, "drop": 1, "200": 1}
        assert server.calls[1].completion_tokens == 0


def test_drop_closes_without_an_answer():
    with SimulatedServer(script=["drop"], charge="actual", tpm=1000) as server:
        with pytest.raises((RemoteDisconnected, ConnectionResetError)):
            send(server)
        assert server.calls[0].charged_tokens == 0
        assert (server.in_flight, server.max_in_flight) == (0, 1)


async def test_hang_lasts_until_the_client_leaves():
    with SimulatedServer(script=["hang"]) as server:
        async with client(server) as sdk:
            with pytest.raises(openai.APITimeoutError):
                await sdk.chat.completions.create(**CHAT, timeout=0.4)
        await until(lambda: not server.in_flight)
        assert server.counts == {"hang": 1}
        assert server.calls[0].status == 0


async def test_hang_lasts_until_the_server_stops():
    server = SimulatedServer(script=["hang"]).start()
    waiting = asyncio.create_task(asyncio.to_thread(send, server))
    await until(lambda: server.counts)
    assert (server.in_flight, server.connections) == (1, 1)
    server.stop()
    with pytest.raises((RemoteDisconnected, ConnectionResetError)):
        await waiting


async def test_a_client_that_leaves_early_is_a_disconnect():
    with SimulatedServer(latency=1000) as server:
        async with client(server) as sdk:
            with pytest.raises(openai.APITimeoutError):
                await sdk.chat.completions.create(**CHAT, timeout=0.4)
        await until(lambda: not server.in_flight)
        assert server.counts == {"disconnect": 1}
        assert (server.calls[0].status, server.calls[0].fault) == (0, None)


@pytest.mark.parametrize("stream", [False, True])
def test_truncate_ends_in_the_middle_of_the_body(stream):
    with SimulatedServer(script=["truncate"]) as server:
        with pytest.raises((IncompleteRead, ConnectionResetError)) as caught:
            send(server, {**CHAT, "stream": stream})
        if isinstance(caught.value, IncompleteRead):
            assert caught.value.partial
        assert server.counts == {"200": 1, "truncate": 1}
        assert server.calls[0].served


@pytest.mark.parametrize("stream", [False, True])
def test_garbage_is_a_200_of_html(stream):
    with SimulatedServer(script=["garbage"]) as server:
        status, headers, raw = send(server, {**CHAT, "stream": stream})
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert raw.startswith(b"<html>")


def test_cut_json_is_well_framed_and_ends_early():
    with SimulatedServer(script=["cut_json"] * 2) as server:
        _, headers, raw = send(server)
        _, _, streamed = send(server, {**CHAT, "stream": True})
    assert int(headers["content-length"]) == len(raw)
    with pytest.raises(ValueError, match=r"Unterminated|Expecting"):
        json.loads(raw)
    assert "[DONE]" not in events_of(streamed)


def test_slow_drip_arrives_whole():
    with SimulatedServer(script=["slow_drip"]) as server:
        status, _, raw = send(server)
        assert (status, server.counts) == (200, {"200": 1, "slow_drip": 1})
    assert ChatCompletion.model_validate_json(raw).choices


def test_malformed_headers_come_with_a_good_answer():
    with SimulatedServer(script=["malformed_headers"], rpm=100) as server:
        status, headers, raw = send(server)
    assert (status, headers["x-ratelimit-limit-requests"]) == (200, "many")
    assert headers["retry-after"] == "the day after tomorrow"
    assert ChatCompletion.model_validate_json(raw).choices


@pytest.mark.parametrize(
    ("path", "body"), [(COMPLETIONS, CHAT), ("/responses", {"model": "m", "input": "x"})]
)
def test_usage_can_be_null_or_missing(path, body):
    with SimulatedServer(script=["null_usage", "no_usage"] * 2) as server:
        null, missing = json.loads(send(server, body, path)[2]), json.loads(send(server, body, path)[2])
        streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
        for _ in range(2):
            assert '"total_tokens"' not in send(server, streamed, path)[2].decode()
        assert all(call.completion_tokens for call in server.calls)
    assert null["usage"] is None
    assert "usage" not in missing


def test_faults_are_drawn_only_for_admitted_generations():
    with SimulatedServer(faults={"500": 1.0}, rpm=1) as server:
        assert send(server, None, "/models", method="GET")[0] == 200
        assert [send(server)[0] for _ in range(2)] == [500, 429]
        assert [call.fault for call in server.calls] == [None, "500", None]


def test_faults_and_latencies_repeat_with_the_seed():
    faults = {"500": 0.2, "drop": 0.3}

    def drawn(seed):
        source, latency = Faults(faults, (), seed), Latency(0.5, 0.25, seed)
        return [(source.draw(), latency.draw()) for _ in range(2000)]

    assert drawn(7) == drawn(7) != drawn(8)
    names = [name for name, _ in drawn(7)]
    assert names.count("500") == pytest.approx(400, abs=80)
    assert names.count("drop") == pytest.approx(600, abs=90)
    assert sum(latency for _, latency in drawn(7)) / 2000 == pytest.approx(0.5, rel=0.05)
    assert Latency(0.5, 0, 7).draw() == 0.5
    assert Latency(0, 1, 7).draw() == 0


@pytest.mark.parametrize("fault", FAULTS)
def test_no_fault_leaves_anything_behind(fault):
    """Every fault on both kinds of body, then a healthy answer from a server that is still well."""
    with SimulatedServer(script=[fault, fault]) as server:
        for stream in (False, True):
            with suppress(OSError, HTTPException):
                send(server, {**CHAT, "stream": stream}, timeout=0.4)
        assert send(server)[0] == 200
        assert server.counts[fault] == 2


# --- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"faults": {"529": 0.1}}, "529"),
        ({"faults": {"500": 1.5}}, "500=1.5"),
        ({"faults": {"500": float("nan")}}, "500=nan"),
        ({"faults": {"500": 0.6, "drop": 0.6}}, "500, drop sum to more than 1"),
        ({"script": ["ok", "oops"]}, "'oops'"),
        ({"rpm": 0}, "rpm must be positive"),
        ({"window": -1}, "window must be positive"),
        ({"latency": -1}, "latency must not be negative"),
        ({"charge": "later"}, "charge must be one of upfront, actual"),
        ({"stamp": "never"}, "stamp must be one of"),
        ({"models": "gpt-4o"}, "models must be"),
        ({"process": True, "answer": str}, "answer: not with process=True"),
        ({"process": True, "count_tokens": len}, "count_tokens: not with process=True"),
        ({"cpu": 0}, "only with process=True"),
    ],
)
def test_options_that_make_no_sense_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SimulatedServer(**options)


def test_options_are_keyword_only_and_the_key_is_not_shown():
    with pytest.raises(TypeError):
        SimulatedServer(0)
    assert "sk-secret" not in repr(SimulatedServer(api_key="sk-secret"))


# --- life


def test_calls_tell_what_came(server):
    send(server, headers={"X-Custom": "yes"})
    send(server, path="/nowhere", body=None)
    first, second = server.calls
    assert (first.index, first.method, first.path) == (0, "POST", "/v1/chat/completions")
    assert (first.model, first.status, first.fault) == ("m", 200, None)
    assert (first.prompt_tokens, first.completion_tokens, first.charged_tokens) == (8, 3, 24)
    assert first.body == CHAT
    assert first.headers["x-custom"] == "yes"
    assert "authorization" not in first.headers
    assert (second.status, second.model, second.body) == (404, None, None)
    assert 0 <= first.at <= second.at


def test_only_the_newest_calls_are_kept():
    with SimulatedServer(record=2) as server:
        for _ in range(3):
            send(server)
        assert [call.index for call in server.calls] == [1, 2]
        assert server.counts == {"200": 3}


async def test_concurrency_is_counted():
    with SimulatedServer(latency=0.5, latency_sigma=0) as server:
        async with client(server) as sdk:
            await asyncio.gather(*(sdk.chat.completions.create(**CHAT) for _ in range(5)))
            assert server.max_in_flight == 5
            assert server.connections == 5
        assert server.in_flight == 0


def test_start_and_stop_can_be_repeated():
    server = SimulatedServer()
    with pytest.raises(RuntimeError, match="not running"):
        _ = server.base_url
    assert server.start() is server
    url = server.base_url
    assert server.start().base_url == url
    send(server)
    server.stop()
    server.stop()
    assert server.counts == {"200": 1}
    assert (len(server.calls), server.connections) == (1, 0)
    with server:
        assert server.counts == {}


async def test_async_with():
    async with SimulatedServer() as server, client(server) as sdk:
        assert (await sdk.chat.completions.create(**CHAT)).choices


@pytest.mark.parametrize("process", [False, True])
def test_a_taken_port_is_an_error_at_start(server, process):
    with pytest.raises(OSError, match=r"in use|could not bind"):
        SimulatedServer(port=urlsplit(server.base_url).port, process=process).start()


def test_stop_leaves_no_thread_and_no_socket():
    before = set(threading.enumerate())
    with SimulatedServer() as server:
        url = urlsplit(server.base_url)
        idle = socket.create_connection((url.hostname, url.port), timeout=30)
        send(server)
    with idle:
        assert idle.recv(1) == b""
    assert set(threading.enumerate()) == before
    del server
    gc.collect()  # what is unclosed warns here, and warnings are errors


# --- process mode


def test_process_mode_does_it_all():
    options = {"rpm": 2, "models": {"m"}, "script": ["500"], "api_key": "sk-test", "cpu": 0}
    with SimulatedServer(process=True, **options) as server:
        assert [send(server)[0] for _ in range(3)] == [500, 200, 429]
        assert send(server, key="sk-other")[0] == 401
        assert server.counts == {"500": 1, "200": 1, "429": 1, "401": 1}
        assert all(isinstance(call, Call) for call in server.calls)
        assert server.calls[0].body == CHAT
        assert (server.in_flight, server.max_in_flight, server.connections) == (0, 1, 0)
        server.set_limits(rpm=None)
        assert [send(server)[0] for _ in range(3)] == [200] * 3
        server.reset()
        assert (server.calls, server.counts) == ([], {})
        send(server)
    assert server.counts == {"200": 1}
    assert len(server.calls) == 1


def run_python(*arguments):
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
    )


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_parent_leaves_no_orphan():
    script = (
        "from openai_eval_client.testing import SimulatedServer\n"
        "print(SimulatedServer(process=True).start().base_url, flush=True)\n"
        "input()\n"
    )
    with run_python("-c", script) as parent:
        url = urlsplit(parent.stdout.readline())
        with socket.create_connection((url.hostname, url.port), timeout=30) as idle:
            parent.kill()
            assert idle.recv(1) == b""  # the child closed it, because it ended


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_told_to_end(end):
    flags = [
        "--rpm",
        "5",
        "--fault",
        "500=0.5",
        "--fault",
        "drop=0.1",
        "--script",
        "ok,500",
        "--models",
        "m,x",
        "--batch-seconds",
        "1",
        "--enqueued-tokens",
        "1000",
    ]
    with run_python("-m", testing_package.__name__, *flags) as process:
        server = SimpleNamespace(base_url=process.stdout.readline().strip())
        status, headers, _ = send(server)
        assert (status, headers["x-ratelimit-limit-requests"]) == (200, "5")
        process.send_signal(end)
        assert process.wait(30) == 0


@pytest.mark.parametrize("fault", ["529=1", "500", "500=often"])
def test_the_command_refuses_nonsense(fault):
    with run_python("-m", testing_package.__name__, "--fault", fault) as process:
        assert process.wait(60) == 2


@settings(max_examples=20)
@given(st.binary(max_size=200))
def test_any_bytes_get_an_api_error(fuzzed_server, raw):
    status, _, answer = send(fuzzed_server, raw)
    assert status == 400
    assert error_of(answer)["message"]


@pytest.fixture(scope="module")
def fuzzed_server():
    with SimulatedServer() as running:
        yield running
