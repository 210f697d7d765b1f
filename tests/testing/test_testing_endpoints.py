"""The endpoints that generate, through the official SDK and as raw bodies of the API's shape."""

import base64
import json
import struct

import pytest
from openai.types import Completion, CreateEmbeddingResponse
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response
from pydantic import BaseModel, Field
from simulated_calls import CHAT, client, error_of, events_of, send

from openai_eval_client.testing import SimulatedServer
from openai_eval_client.testing._endpoints.schemas import minimal


@pytest.fixture
def server():
    with SimulatedServer() as running:
        yield running


def test_a_chat_completion_has_the_apis_shape(server):
    """A chat completion has the fields of the API and no others."""
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
    """The SDK reads the answers; equal requests get equal choices under different ids."""
    async with client(server) as sdk:
        first = await sdk.chat.completions.create(**CHAT, n=2)
        second = await sdk.chat.completions.create(**CHAT, n=2)
    assert [choice.index for choice in first.choices] == [0, 1]
    assert first.usage.completion_tokens == 6
    assert first.choices == second.choices
    assert first.id != second.id


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
async def test_a_maximum_cuts_the_answer(server, name):
    """Either name of the maximum cuts the answer, which then ends with "length"."""
    async with client(server) as sdk:
        completion = await sdk.chat.completions.create(**CHAT, **{name: 2})
    assert completion.choices[0].message.content == "echo: hello "
    assert completion.choices[0].finish_reason == "length"
    assert completion.usage.completion_tokens == 2


async def test_content_parts_and_earlier_turns_are_read(server):
    """All messages count as tokens; the last one of the user is answered."""
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
    """A surrogate without its pair comes back as it was sent."""
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
    """A structured output is valid, even for a recursive schema."""
    async with client(server) as sdk:
        completion = await sdk.chat.completions.parse(**CHAT, response_format=Tree)
    assert completion.choices[0].message.parsed.left is None
    assert completion.choices[0].message.parsed.leaf.count == 10


async def test_a_json_object_is_answered_with_an_object(server):
    """Without a schema, a JSON object is empty."""
    async with client(server) as sdk:
        completion = await sdk.chat.completions.create(**CHAT, response_format={"type": "json_object"})
    assert json.loads(completion.choices[0].message.content) == {}


def test_other_schemas():
    """Instances follow const, allOf, nullable types, formats, bounds and prefixItems."""
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
    """A schema that never ends or refers to nothing is refused."""
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
    """A tool that must be called is called, with valid arguments."""
    async with client(server) as sdk:
        completion = await sdk.chat.completions.create(**CHAT, tools=TOOLS, tool_choice=choice)
    ChatCompletion.model_validate(completion.model_dump(), strict=True)
    (call,) = completion.choices[0].message.tool_calls
    assert call.function.name == name
    assert Leaf.model_validate_json(call.function.arguments)
    assert completion.choices[0].message.content is None
    assert completion.choices[0].finish_reason == reason


async def test_a_tool_left_to_the_model_is_not_called(server):
    """Without `tool_choice` the answer is text."""
    async with client(server) as sdk:
        completion = await sdk.chat.completions.create(**CHAT, tools=TOOLS)
    assert completion.choices[0].message.tool_calls is None


async def test_logprobs_come_when_asked_for(server):
    """Log probabilities cover the whole text."""
    async with client(server) as sdk:
        completion = await sdk.chat.completions.create(**CHAT, logprobs=True)
    tokens = completion.choices[0].logprobs.content
    assert "".join(token.token for token in tokens) == completion.choices[0].message.content


@pytest.mark.parametrize("with_usage", [False, True])
def test_a_chat_stream_has_the_apis_shape(server, with_usage):
    """Chunks are of the API's shape, and their usage comes last if asked for."""
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
    """The arguments of a streamed call add up."""
    async with client(server) as sdk:
        manager = sdk.chat.completions.stream(**CHAT, tools=TOOLS, tool_choice="required")
        async with manager as stream:
            completion = await stream.get_final_completion()
    assert Leaf.model_validate_json(completion.choices[0].message.tool_calls[0].function.arguments)


@pytest.mark.parametrize("given", ["hello there", [{"role": "user", "content": "hello there"}]])
def test_a_response_has_the_apis_shape(server, given):
    """A response has the fields of the API and echoes what was set."""
    body = {"model": "m", "input": given, "instructions": "be brief", "max_output_tokens": 100}
    _, _, raw = send(server, body, "/responses")
    response = Response.model_validate_json(raw, strict=True)
    assert response.output_text == "echo: hello there"
    assert (response.status, response.max_output_tokens) == ("completed", 100)
    assert response.instructions == "be brief"
    assert response.usage.input_tokens == (2 + 3 + 3) + (2 + 3)
    assert response.usage.output_tokens == 3


async def test_the_sdk_streams_a_response(server):
    """A streamed response starts, adds up to its text, and ends with its usage."""
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
    """Responses are cut, follow a schema, and call a function, streamed or not."""
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
    """Texts, token lists and several of either are answered each in turn."""
    _, _, raw = send(server, {"model": "m", "prompt": prompt}, "/completions")
    completion = Completion.model_validate_json(raw, strict=True)
    assert [choice.text for choice in completion.choices] == texts
    assert completion.usage.prompt_tokens == tokens


async def test_the_sdk_streams_a_completion(server):
    """A streamed completion adds up to its text and ends with its usage."""
    async with client(server) as sdk:
        stream = await sdk.completions.create(
            model="m", prompt="hello there", stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == "echo: hello there"
    assert chunks[-1].usage.completion_tokens == 3


@pytest.mark.parametrize("given", ["hello", ["hello", "hello"], [1, 2, 3], [[1], [2, 3]]])
async def test_embeddings_are_unit_vectors_in_either_encoding(server, given):
    """Base64 and float hold the same vectors, of length 1."""
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
    """A vector has as many dimensions as the request asks for."""
    body = {"model": "m", "input": "x", "encoding_format": "base64", "dimensions": 8}
    _, _, raw = send(server, body, "/embeddings")
    assert len(struct.unpack("<8f", base64.b64decode(json.loads(raw)["data"][0]["embedding"]))) == 8


def test_the_answer_and_its_tokens_can_be_given():
    """`answer`, `output_tokens` and `count_tokens` replace what is made up."""
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
    """An exception in `answer` is a 500 that names it."""
    with SimulatedServer(answer=lambda body: body["gone"]) as server:
        status, _, raw = send(server)
    assert status == 500
    assert error_of(raw)["message"] == "answer() raised KeyError('gone')"
