"""What the simulated API refuses in a request, in OpenAI's words, and what it takes."""

import json

import pytest
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_create_params
from simulated_batches import asking, finished, jsonl
from simulated_calls import CHAT, client, error_of, send

from openai_eval_client.testing import SimulatedServer
from openai_eval_client.testing._endpoints import checks

RESPONSE = {"model": "m", "input": "hello"}
SCHEMA = {"type": "object", "properties": {}, "additionalProperties": False}
FUNCTION = {"name": "f", "parameters": SCHEMA}
PATHS = {"/chat/completions": CHAT, "/responses": RESPONSE, "/embeddings": RESPONSE}
EMPTY = "empty array. Expected an array with minimum length 1, but got an empty array instead."


@pytest.fixture(scope="module")
def server():
    with SimulatedServer() as running:
        yield running


def refusal(path, words, body):
    message, param, code = (*words, None, None)[:3]
    return path, body, {"message": message, "type": "invalid_request_error", "param": param, "code": code}


def chat(*words, **body):
    return refusal("/chat/completions", words, body)


def response(*words, **body):
    return refusal("/responses", words, body)


def embedding(*words, **body):
    return refusal("/embeddings", words, body)


def said(role):
    return [{"role": "user", "content": "a"}, {"role": role, "content": "b"}]


REFUSED = [
    chat("Unrecognized request argument supplied: top_k", top_k=5),
    chat("Unrecognized request arguments supplied: top_k, mood", top_k=5, mood="good"),
    chat(
        "Invalid 'temperature': decimal above maximum value. Expected a value <= 2, but got 2.5 instead.",
        "temperature",
        "decimal_above_max_value",
        temperature=2.5,
    ),
    chat(
        "Invalid 'temperature': decimal below minimum value. Expected a value >= 0, but got -1 instead.",
        "temperature",
        "decimal_below_min_value",
        temperature=-1,
    ),
    chat(
        "Invalid type for 'temperature': expected a decimal, but got a string instead.",
        "temperature",
        "invalid_type",
        temperature="hot",
    ),
    chat(
        "Invalid 'top_p': decimal above maximum value. Expected a value <= 1, but got 1.5 instead.",
        "top_p",
        "decimal_above_max_value",
        top_p=1.5,
    ),
    chat(
        "Invalid 'n': integer below minimum value. Expected a value >= 1, but got 0 instead.",
        "n",
        "integer_below_min_value",
        n=0,
    ),
    chat(
        "Invalid 'n': integer above maximum value. Expected a value <= 128, but got 129 instead.",
        "n",
        "integer_above_max_value",
        n=129,
    ),
    chat(
        "Invalid type for 'n': expected an integer, but got a boolean instead.", "n", "invalid_type", n=True
    ),
    chat(
        "Invalid 'max_tokens': integer below minimum value. Expected a value >= 1, but got 0 instead.",
        "max_tokens",
        "integer_below_min_value",
        max_tokens=0,
    ),
    chat(
        "Setting 'max_tokens' and 'max_completion_tokens' at the same time is not supported.",
        "max_tokens",
        "invalid_parameter_combination",
        max_tokens=5,
        max_completion_tokens=5,
    ),
    chat(
        "Invalid type for 'stream': expected a boolean, but got a string instead.",
        "stream",
        "invalid_type",
        stream="yes",
    ),
    chat(
        "Invalid type for 'metadata': expected an object, but got an array instead.",
        "metadata",
        "invalid_type",
        metadata=[],
    ),
    chat(
        "Invalid 'stop': array too long. Expected an array with maximum length 4, but got an array with "
        "length 5 instead.",
        "stop",
        "array_above_max_length",
        stop=list("abcde"),
    ),
    chat(
        "Invalid value: 'dear'. Supported values are: 'auto', 'default', 'flex', 'scale', 'priority', and "
        "'fast'.",
        "service_tier",
        "invalid_value",
        service_tier="dear",
    ),
    chat(f"Invalid 'messages': {EMPTY}", "messages", "empty_array", messages=[]),
    chat(
        "Invalid value: 'poet'. Supported values are: 'system', 'assistant', 'user', 'function', 'tool', and "
        "'developer'.",
        "messages[1].role",
        "invalid_value",
        messages=said("poet"),
    ),
    chat(
        "Missing required parameter: 'messages[0].role'.",
        "messages[0].role",
        "missing_required_parameter",
        messages=[{"content": "hello"}],
    ),
    chat(
        "Invalid type for 'messages[0]': expected an object, but got a string instead.",
        "messages[0]",
        "invalid_type",
        messages=["hello"],
    ),
    chat(
        "Invalid type for 'messages': expected an array, but got a string instead.",
        "messages",
        "invalid_type",
        messages="hello",
    ),
    chat(f"Invalid 'tools': {EMPTY}", "tools", "empty_array", tools=[]),
    chat(
        "Missing required parameter: 'tools[0].type'.",
        "tools[0].type",
        "missing_required_parameter",
        tools=[{"function": FUNCTION}],
    ),
    chat(
        "Invalid value: 'search'. Supported values are: 'function' and 'custom'.",
        "tools[0].type",
        "invalid_value",
        tools=[{"type": "search"}],
    ),
    chat(
        "Missing required parameter: 'tools[0].function'.",
        "tools[0].function",
        "missing_required_parameter",
        tools=[{"type": "function"}],
    ),
    chat(
        "Missing required parameter: 'tools[0].function.name'.",
        "tools[0].function.name",
        "missing_required_parameter",
        tools=[{"type": "function", "function": {}}],
    ),
    chat(
        "Invalid 'tools[0].function.name': string does not match pattern. Expected a string that matches the "
        "pattern '^[a-zA-Z0-9_-]+$'.",
        "tools[0].function.name",
        "invalid_value",
        tools=[{"type": "function", "function": {"name": "a b"}}],
    ),
    chat(
        "Missing required parameter: 'response_format.type'.",
        "response_format.type",
        "missing_required_parameter",
        response_format={},
    ),
    chat(
        "Invalid value: 'xml'. Supported values are: 'json_object', 'json_schema', and 'text'.",
        "response_format.type",
        "invalid_value",
        response_format={"type": "xml"},
    ),
    chat(
        "Missing required parameter: 'response_format.json_schema'.",
        "response_format.json_schema",
        "missing_required_parameter",
        response_format={"type": "json_schema"},
    ),
    chat(
        "Missing required parameter: 'response_format.json_schema.name'.",
        "response_format.json_schema.name",
        "missing_required_parameter",
        response_format={"type": "json_schema", "json_schema": {"schema": SCHEMA}},
    ),
    response("Unknown parameter: 'top_k'.", "top_k", "unknown_parameter", top_k=5),
    response("Unknown parameter: 'max_tokens'.", "max_tokens", "unknown_parameter", max_tokens=5),
    response(
        "Invalid 'max_output_tokens': integer below minimum value. Expected a value >= 1, but got 0 instead.",
        "max_output_tokens",
        "integer_below_min_value",
        max_output_tokens=0,
    ),
    response(
        "Invalid value: 'tool'. Supported values are: 'assistant', 'system', 'developer', and 'user'.",
        "input[1].role",
        "invalid_value",
        input=said("tool"),
    ),
    response(
        "Missing required parameter: 'tools[0].name'.",
        "tools[0].name",
        "missing_required_parameter",
        tools=[{"type": "function", "parameters": SCHEMA}],
    ),
    response(
        "Missing required parameter: 'text.format.name'.",
        "text.format.name",
        "missing_required_parameter",
        text={"format": {"type": "json_schema", "schema": SCHEMA}},
    ),
    response(
        "Missing required parameter: 'text.format.schema'.",
        "text.format.schema",
        "missing_required_parameter",
        text={"format": {"type": "json_schema", "name": "n"}},
    ),
    response("Background mode requires 'store' to be true.", "background", background=True, store=False),
    embedding("Unrecognized request argument supplied: temperature", temperature=1),
    embedding(
        "Invalid value: 'hex'. Supported values are: 'float' and 'base64'.",
        "encoding_format",
        "invalid_value",
        encoding_format="hex",
    ),
]


@pytest.mark.parametrize(("path", "body", "words"), REFUSED)
def test_a_request_is_refused_in_the_apis_words(server, path, body, words):
    """Type, code, parameter and message are the API's."""
    status, _, raw = send(server, {**PATHS[path], **body}, path)
    assert (status, error_of(raw)) == (400, words)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (
            "/chat/completions",
            {"temperature": 2, "top_p": 0, "n": 2, "stop": None, "tools": None, "seed": -1},
        ),
        ("/chat/completions", {"messages": said("developer"), "stop": list("abcd"), "logit_bias": {}}),
        ("/chat/completions", {"tools": [{"type": "custom", "custom": {"name": "x"}}], "max_tokens": 1}),
        ("/responses", {"input": [{"type": "function_call_output", "call_id": "c", "output": "5"}]}),
        ("/responses", {"tools": [{"type": "web_search"}], "store": False, "reasoning": {"effort": "low"}}),
        ("/embeddings", {"dimensions": 8, "user": "me"}),
    ],
)
def test_what_the_api_takes_is_answered(server, path, body):
    """Bounds belong to what is allowed; null is as good as nothing."""
    assert send(server, {**PATHS[path], **body}, path)[0] == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (
            "/chat/completions",
            {"top_k": 5, "temperature": 5, "messages": said("poet"), "service_tier": "dear"},
        ),
        ("/responses", {"top_k": 5, "top_p": 5}),
        ("/embeddings", {"truncate_prompt_tokens": 5}),
    ],
)
def test_a_lenient_server_takes_more(path, body):
    """As compatible servers do."""
    with SimulatedServer(lenient=True) as server:
        assert send(server, {**PATHS[path], **body}, path)[0] == 200


async def test_lines_of_a_batch_are_refused_alike():
    """A line that is wrong fails with the same words; a lenient server answers it."""
    lines = jsonl({**asking(0), "body": {**CHAT, "top_k": 5}}, {**asking(1), "body": CHAT})
    for lenient, failed in ((False, 1), (True, 0)):
        async with SimulatedServer(batch_seconds=0, lenient=lenient) as server, client(server) as sdk:
            batch = await finished(sdk, lines)
            assert (batch.request_counts.completed, batch.request_counts.failed) == (2 - failed, failed)
            if failed:
                content = (await sdk.files.content(batch.error_file_id)).content
                assert "top_k" in json.loads(content)["response"]["body"]["error"]["message"]


@pytest.mark.parametrize(
    ("known", "params"),
    [
        (checks.CHAT, chat_params.CompletionCreateParamsStreaming),
        (checks.RESPONSES, response_create_params.ResponseCreateParamsStreaming),
        (checks.COMPLETIONS, completion_create_params.CompletionCreateParamsStreaming),
        (checks.EMBEDDINGS, embedding_create_params.EmbeddingCreateParams),
    ],
)
def test_every_parameter_of_the_sdk_is_known(known, params):
    """What the SDK can send is no unknown parameter."""
    assert params.__required_keys__ | params.__optional_keys__ <= known
