"""Every body that is sent has the form of OpenAI's specification, as the SDK's own types state it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from openai.types.chat import completion_create_params
from openai.types.responses import response_create_params
from pydantic import BaseModel, TypeAdapter

from openai_eval_client import BatchRequest, OpenAIClient, OpenAIConfig, ValidationError
from openai_eval_client._wire import check_parameters, check_prompt
from openai_eval_client._wire.requests import _known_names

FUNCTION = {"name": "weather", "description": "Look.", "parameters": {"type": "object"}, "strict": True}
TOOL = {"type": "function", "function": FUNCTION}
GRAMMAR = {"definition": "start: /a/", "syntax": "lark"}
CUSTOM = {
    "type": "custom",
    "custom": {"name": "code", "description": "Run.", "format": {"type": "grammar", "grammar": GRAMMAR}},
}
CHOICE = {"type": "function", "function": {"name": "weather"}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
CUSTOM_CALL = {"id": "call_2", "type": "custom", "custom": {"name": "code", "input": "a"}}
IMAGE = {"url": "data:image/png;base64,AAAA", "detail": "low"}
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "This?"},
            {"type": "image_url", "image_url": IMAGE},
            {"type": "file", "file": {"file_id": "file-1"}},
        ],
    },
    {"role": "assistant", "content": "I look.", "tool_calls": [CALL, CUSTOM_CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "12"}]},
    {"role": "tool", "tool_call_id": "call_2", "content": "a"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "13"},
    {"role": "assistant", "content": [{"type": "text", "text": "It is "}, {"type": "text", "text": "12."}]},
    {"role": "assistant", "content": None, "refusal": "No."},
    {"role": "user", "content": "Why?"},
]
ITEMS = [
    {"role": "system", "content": "Be brief."},
    {"role": "developer", "content": [{"type": "input_text", "text": "Be kind."}]},
    {
        "role": "user",
        "content": [
            {"type": "input_text", "text": "This?"},
            {"type": "input_image", "image_url": IMAGE["url"], "detail": "low"},
            {"type": "input_file", "file_id": "file-1"},
        ],
    },
    {"role": "assistant", "content": "I look."},
    {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": "{}"},
    {"type": "custom_tool_call", "call_id": "call_2", "name": "code", "input": "a"},
    {"type": "function_call_output", "call_id": "call_1", "output": [{"type": "input_text", "text": "12"}]},
    {"type": "custom_tool_call_output", "call_id": "call_2", "output": "a"},
    {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "call_1", "output": "13"},
    {"role": "assistant", "content": "It is 12."},
    {"role": "assistant", "content": "No."},
    {"role": "user", "content": "Why?"},
]


class City(BaseModel):
    """What an answer is to fit."""

    name: str


BOTH = {
    "metadata": {"a": "b"},
    "parallel_tool_calls": True,
    "prompt_cache_key": "k",
    "prompt_cache_retention": "24h",
    "response_format": City,
    "safety_identifier": "s",
    "service_tier": "flex",
    "store": True,
    "temperature": 0.5,
    "tool_choice": CHOICE,
    "tools": [TOOL],
    "top_logprobs": 2,
    "top_p": 0.5,
    "user": "u",
}
OF_API = {
    "chat": {
        "audio": {"voice": "alloy", "format": "wav"},
        "frequency_penalty": 0.5,
        "function_call": "auto",
        "functions": [{"name": "f"}],
        "logit_bias": {"5": 1},
        "logprobs": True,
        "max_completion_tokens": 5,
        "max_tokens": 5,
        "modalities": ["text"],
        "n": 2,
        "prediction": {"type": "content", "content": "x"},
        "presence_penalty": 0.1,
        "reasoning_effort": "low",
        "seed": 3,
        "stop": ["a"],
        "verbosity": "low",
        "web_search_options": {"search_context_size": "low"},
    },
    "responses": {
        "background": True,
        "context_management": [{"type": "compaction", "compact_threshold": 1000}],
        "conversation": "conv_1",
        "include": ["reasoning.encrypted_content"],
        "instructions": "Be brief.",
        "max_output_tokens": 20,
        "max_tokens": 20,
        "max_tool_calls": 3,
        "previous_response_id": "resp_1",
        "extra_body": {"prompt": {"id": "pmpt_1"}},
        "reasoning": {"effort": "low"},
        "system": "Be brief.",
        "text": {"verbosity": "low"},
        "truncation": "auto",
    },
}
OURS = {"max_tokens", "system"}
ALLOWED = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [CHOICE]}}
COMBINED = [
    {"tools": [TOOL, CUSTOM, {"type": "function", "function": {"name": "now"}}]},
    {"tool_choice": {"type": "custom", "custom": {"name": "code"}}},
    {"tool_choice": ALLOWED},
    {"tool_choice": "required"},
    {"response_format": {"type": "json_object"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}},
]
CASES = [
    (api, params)
    for api, own in OF_API.items()
    for params in [*({name: value} for name, value in (BOTH | own).items()), *COMBINED]
    if params.keys() <= _known_names(api) | OURS
]
TYPES = {
    "chat": TypeAdapter(completion_create_params.CompletionCreateParamsNonStreaming),
    "responses": TypeAdapter(response_create_params.ResponseCreateParamsNonStreaming),
}


def body_of(api: str, prompt: object, **params: object) -> dict:
    ours = {"model": "m", "timeout": 1, "temperature": None, "max_tokens": None, "system": None}
    ours |= {name: params.pop(name) for name in ours.keys() & params.keys()}
    return check_parameters(api=api, params=params, **ours).with_prompt(prompt)


def read(value: object) -> object:
    """Return a value whole: pydantic checks the items of an iterable when they are asked for."""
    if isinstance(value, dict):
        return {key: read(item) for key, item in value.items()}
    return [read(item) for item in value] if isinstance(value, (list, Iterator)) else value


def check_type(api: str, body: dict) -> None:
    """Nothing is missing, nothing is of another type, and nothing is there that the type does not know."""
    assert read(TYPES[api].validate_python(body)) == body


@pytest.mark.parametrize(
    ("api", "params"), CASES, ids=lambda value: value if isinstance(value, str) else "-".join(value)
)
def test_every_parameter_is_sent_as_the_specification_has_it(api, params) -> None:
    """Those in the form of Chat Completions are turned into the other's."""
    check_type(api, body_of(api, "hello", **params))


@pytest.mark.parametrize("api", ["chat", "responses"])
def test_every_turn_is_sent_as_the_specification_has_it(api) -> None:
    """Texts, pictures, files, calls of tools and what came of them."""
    body = body_of(api, TURNS, tools=[TOOL, CUSTOM])
    check_type(api, body)
    assert body["messages" if api == "chat" else "input"] == (TURNS if api == "chat" else ITEMS)


def test_the_type_refuses_what_has_another_form() -> None:
    """Else the tests above would say nothing."""
    for wrong in ({"tools": [TOOL]}, {"tool_choice": CHOICE}, {"input": TURNS}):
        with pytest.raises((ValueError, AssertionError)):
            check_type("responses", {"model": "m", "input": "hello", **wrong})


def test_tools_keep_what_they_mean() -> None:
    """A function is strict by default in the Responses API alone, and may lack its parameters there never."""
    tools = [TOOL, {"type": "function", "function": {"name": "now", "strict": None}}, CUSTOM]
    formed = body_of("responses", "hello", tools=tools, tool_choice=ALLOWED)
    assert formed["tools"] == [
        {"type": "function", **FUNCTION},
        {
            "type": "function",
            "name": "now",
            "strict": False,
            "parameters": {"type": "object", "properties": {}},
        },
        {"type": "custom", "name": "code", "description": "Run.", "format": {"type": "grammar", **GRAMMAR}},
    ]
    name = {"type": "function", "name": "weather"}
    assert formed["tool_choice"] == {"type": "allowed_tools", "mode": "auto", "tools": [name]}


def test_what_has_the_form_of_the_responses_api_stays() -> None:
    """Its own items, parts, tools and formats."""
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "a"}], "type": "message"},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "1"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "a", "annotations": []}]},
        {"role": "assistant", "content": "b", "phase": "commentary"},
    ]
    params = {
        "tools": [{"type": "web_search"}, {"type": "function", **FUNCTION}],
        "tool_choice": {"type": "function", "name": "weather"},
        "text": {"format": {"type": "json_object"}},
    }
    assert body_of("responses", items, **params) == {"model": "m", "input": items, **params}


USER = {"role": "user", "content": "hello"}


@pytest.mark.parametrize(
    ("message", "name"),
    [
        ({**USER, "name": "bob"}, "name"),
        ({"role": "assistant", "content": None, "audio": {"id": "a"}}, "audio"),
        ({"role": "assistant", "content": None, "function_call": {"name": "f"}}, "function_call"),
        ({"role": "function", "name": "f", "content": "1"}, "name"),
        ({"role": "function", "content": "1"}, "role function"),
        ({"role": "tool", "content": "1"}, "tool_call_id"),
        ({"role": "assistant", "tool_calls": [{"id": "c", "type": "function"}]}, r"tool_calls\[0\]"),
        ({"role": "assistant", "tool_calls": [{**CALL, "id": 5}]}, r"tool_calls\[0\]"),
        ({"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f"}}]}, "name and arguments"),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, r"content\[0\]"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "with a url"),
        ({"role": "user", "content": [{"type": "file", "file": "x"}]}, r"content\[0\].*must be an object"),
    ],
)
def test_what_has_no_form_there_is_refused_by_name(message, name) -> None:
    """With the position of the prompt, and of the message in it."""
    with pytest.raises(ValidationError, match=rf"^prompts\[7\]\[1\].*{name}") as raised:
        check_prompt([USER, message], 7, api="responses")
    assert (raised.value.field, raised.value.index) == ("prompt", 7)
    check_prompt([USER, message], 7)


@pytest.mark.parametrize("tool", [{"type": "function", "function": 5}, {"type": "custom", "custom": {}}])
def test_a_tool_without_a_name_is_refused(tool) -> None:
    """Before anything is sent."""
    with pytest.raises(ValidationError, match=r"tools\[1\].*must have name") as raised:
        body_of("responses", "hello", tools=[TOOL, tool])
    assert raised.value.field == "tools"


async def test_every_way_to_send_refuses_it_before_anything_is_sent() -> None:
    """One prompt, many, an estimate, a batch job."""
    config = OpenAIConfig(api_key="k", base_url="http://127.0.0.1:9/v1", max_retries=0)
    wrong = [{**USER, "name": "bob"}]
    async with OpenAIClient(config) as client:
        calls = [
            client.generate_response(wrong, api="responses"),
            client.batch_generate([wrong], api="responses"),
            client.estimate([wrong], api="responses"),
            client.submit_batch_job([BatchRequest(messages=wrong)], api="responses"),
        ]
        for call in calls:
            with pytest.raises(ValidationError, match=r"\.name='bob': the Responses API has no such thing"):
                await call
        outcomes = [outcome async for outcome in client.as_completed([wrong], api="responses")]
        assert [type(outcome) for _, outcome in outcomes] == [ValidationError]
        assert client.stats.attempts == 0
