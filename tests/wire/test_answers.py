"""From the body of an answer to a `ModelResponse`, whatever a compatible server leaves out or gets wrong."""

import copy
import json
import logging
import urllib.request
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from openai_eval_client import ModelResponse, OpenAIClient, OpenAIConfig, RateLimitConfig
from openai_eval_client._cost.ledger import Pricer
from openai_eval_client._wire.answers import read_answer
from openai_eval_client._wire.requests import check_parameters
from openai_eval_client._wire.usage import Usage, usage_of
from openai_eval_client.testing import SimulatedServer

PATHS = {"chat": "/chat/completions", "responses": "/responses"}


class City(BaseModel):
    name: str
    people: int


def asked(api="chat", **params):
    unnamed = dict.fromkeys(("temperature", "max_tokens", "system"))
    return check_parameters(model="asked", timeout=30, api=api, params=params, **unnamed)


def read(body, api="chat", *, request_id="req_1", temperature=None, **params):
    parameters = asked(api, **params)
    usage = usage_of(body)
    return read_answer(
        body, parameters, usage=usage, temperature=temperature, request_id=request_id, latency=0.25
    )


def chat(message=None, **fields):
    message = {"role": "assistant", "content": "yes"} if message is None else message
    choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
    usage = {"prompt_tokens": 11, "completion_tokens": 22, "total_tokens": 33}
    return {"id": "chatcmpl-1", "model": "served", "choices": [choice], "usage": usage, **fields}


def response(*parts, **fields):
    message = {"type": "message", "role": "assistant", "status": "completed", "content": list(parts)}
    usage = {"input_tokens": 11, "output_tokens": 22, "total_tokens": 33}
    whole = {"id": "resp_1", "model": "served", "status": "completed", "output": [message], "usage": usage}
    return {**whole, **fields}


def text(content, **fields):
    return {"type": "output_text", "text": content, "annotations": [], **fields}


def served(api, **body):
    """Return what the simulated server sends to such a request."""
    with SimulatedServer() as server:
        request = urllib.request.Request(  # noqa: S310
            server.base_url + PATHS[api],
            json.dumps({"model": "gpt-4o", **body}).encode(),
            {"authorization": "Bearer sk-test", "content-type": "application/json"},
        )
        with urllib.request.urlopen(request) as reply:  # noqa: S310
            return json.load(reply)


HELLO = {"messages": [{"role": "user", "content": "hello there"}]}
CALL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}


# --- real shapes ------------------------------------------------------------------------------------------


def test_a_chat_answer_is_read_completely():
    """Every field of a response is filled from what the API sends."""
    body = served("chat", **HELLO)
    answer = read(body)
    assert answer.content == "echo: hello there"
    assert answer.choices == ["echo: hello there"]
    assert answer.model == "gpt-4o"
    assert answer.request_id == "req_1"
    assert answer.latency_ms == 250.0
    assert answer.temperature == 1.0
    assert answer.finish_reason == "stop"
    assert answer.cached is False
    assert (answer.tool_calls, answer.refusal, answer.logprobs) == ([], None, None)
    assert answer.usage.prompt_tokens == body["usage"]["prompt_tokens"]
    assert answer.usage.completion_tokens == 3
    assert answer.usage.total_tokens == body["usage"]["total_tokens"]
    assert answer.usage.estimated is False
    assert answer.raw.id == body["id"]
    assert answer.raw.choices[0].message.content == "echo: hello there"


def test_a_responses_answer_gives_the_same():
    """Answers of the two APIs differ only in names."""
    one, other = read(served("chat", **HELLO)), read(served("responses", input="hello there"), "responses")
    assert other.usage.completion_tokens == one.usage.completion_tokens == 3
    same = {"usage", "logprobs"}
    assert other.model_dump(exclude=same) == one.model_dump(exclude=same)
    assert other.raw.output_text == "echo: hello there"


def test_several_choices_are_all_there():
    """With n > 1 the first one is the content."""
    answer = read(served("chat", n=3, **HELLO))
    assert answer.choices == ["echo: hello there"] * 3
    assert answer.content == answer.choices[0]
    assert answer.usage.completion_tokens == 9


def test_a_tool_call_has_no_content():
    """The content is "", and the call is as the API sends it."""
    answer = read(served("chat", tools=[CALL], tool_choice="required", **HELLO))
    assert answer.content == ""
    assert answer.choices == [""]
    assert answer.finish_reason == "tool_calls"
    assert answer.tool_calls[0]["function"]["name"] == "find"


def test_a_tool_call_of_the_responses_api():
    """The call is the item of the output; the finish reason is that of chat completions."""
    tool = {"type": "function", **CALL["function"]}
    answer = read(served("responses", input="hello", tools=[tool], tool_choice="required"), "responses")
    assert answer.content == ""
    assert answer.finish_reason == "tool_calls"
    assert answer.tool_calls[0]["type"] == "function_call"
    assert answer.tool_calls[0]["name"] == "find"


@pytest.mark.parametrize(
    ("api", "body"),
    [("chat", {"max_tokens": 1, **HELLO}), ("responses", {"input": "hello there", "max_output_tokens": 1})],
)
def test_a_cut_answer_ends_with_length(api, body):
    """Each API has its own name for the limit."""
    answer = read(served(api, **body), api)
    assert answer.finish_reason == "length"
    assert answer.content == "echo: "


def test_logprobs_are_the_first_choices():
    """They are as the API sends them."""
    answer = read(served("chat", logprobs=True, **HELLO))
    assert [entry["token"] for entry in answer.logprobs["content"]] == ["echo: ", "hello ", "there"]


# --- what may be missing ------------------------------------------------------------------------------------

BARE = {
    "no choices": chat(choices=[]),
    "an empty choice": chat(choices=[{}]),
    "a null choice": chat(choices=[None]),
    "no message": chat(choices=[{"message": None}]),
    "an empty message": chat({}),
    "null content": chat({"role": "assistant", "content": None}),
    "only what is checked": {"choices": [{"message": {"content": None}}]},
}


@pytest.mark.parametrize("body", BARE.values(), ids=BARE)
def test_what_is_missing_is_empty(body):
    """Without content or finish reason both are ""."""
    answer = read(body)
    assert answer.content == ""
    assert (answer.tool_calls, answer.refusal, answer.logprobs, answer.parsed) == ([], None, None, None)
    assert isinstance(answer.finish_reason, str)
    assert ModelResponse.model_validate_json(answer.model_dump_json()) == answer


BARE_RESPONSES = {
    "no output": response(output=[]),
    "a null item": response(output=[None]),
    "an empty item": response(output=[{}]),
    "a message without content": response(output=[{"type": "message"}]),
    "null content": response(output=[{"type": "message", "content": None}]),
    "only reasoning": response(output=[{"type": "reasoning", "summary": []}]),
    "only what is checked": {"output": []},
}


@pytest.mark.parametrize("body", BARE_RESPONSES.values(), ids=BARE_RESPONSES)
def test_what_is_missing_in_a_response_is_empty(body):
    """Without content or status both are ""."""
    answer = read(body, "responses")
    assert answer.content == ""
    assert answer.finish_reason == "stop"
    assert ModelResponse.model_validate_json(answer.model_dump_json()) == answer


def test_model_and_request_id_have_fallbacks():
    """They are the model that was asked, and the id of the body."""
    nameless = read(chat(model=None), request_id=None, temperature=0.5)
    assert nameless.model == "asked"
    assert nameless.request_id == "chatcmpl-1"
    assert nameless.temperature == 0.5
    assert read(chat(id=None), request_id="").request_id == ""


def test_a_refusal_is_not_content():
    """In both APIs it has a field of its own."""
    refused = read(chat({"role": "assistant", "content": None, "refusal": "No."}))
    assert (refused.content, refused.refusal) == ("", "No.")
    refused = read(response({"type": "refusal", "refusal": "No."}), "responses")
    assert (refused.content, refused.refusal) == ("", "No.")


def test_parts_of_a_response_are_joined():
    """The texts of several messages are one content, and their log probabilities one list."""
    body = response(text("one ", logprobs=[{"token": "one "}]), text("two", logprobs=[{"token": "two"}]))
    body["output"] = [{"type": "reasoning"}, *body["output"], *copy.deepcopy(body["output"])]
    answer = read(body, "responses")
    assert answer.content == "one twoone two"
    assert answer.choices == ["one twoone two"]
    assert [entry["token"] for entry in answer.logprobs["content"]] == ["one ", "two"] * 2


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "stop"),
        ({"status": None}, "stop"),
        ({"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}, "length"),
        ({"status": "incomplete", "incomplete_details": {"reason": "content_filter"}}, "content_filter"),
        ({"status": "incomplete", "incomplete_details": None}, ""),
        ({"status": "failed", "error": {"code": "server_error", "message": "m"}}, "failed"),
        ({"status": "cancelled"}, "cancelled"),
        ({"output": [{"type": "function_call", "name": "f"}]}, "tool_calls"),
        ({"output": [{"type": "custom_tool_call", "name": "f"}]}, "tool_calls"),
        (
            {"output": [{"type": "web_search_call"}, *response(text("found"))["output"]]},
            "stop",
        ),  # it ran already
    ],
)
def test_the_finish_reasons_of_a_response(fields, reason):
    """They are those of chat completions, if there is one with the same meaning."""
    assert read(response(text("yes"), **fields), "responses").finish_reason == reason


# --- what models say besides the text ---------------------------------------------------------------------

THOUGHT = {
    "reasoning_content": {"reasoning_content": "I think."},
    "reasoning": {"reasoning": "I think.", "reasoning_details": [{"text": "other"}]},
    "an empty name before": {"reasoning_content": "", "reasoning": "I think."},
    "details": {"reasoning_details": [{"type": "reasoning.text", "text": "I think."}]},
    "a summary, and what is encrypted": {
        "reasoning": None,
        "reasoning_details": [
            {"type": "reasoning.summary", "summary": "I think."},
            {"type": "reasoning.encrypted", "data": "gAAAA"},
        ],
    },
    "a part of the content": {
        "content": [{"type": "thinking", "thinking": "I think."}, {"type": "text", "text": "yes"}]
    },
    "a part of parts": {
        "content": [
            {"type": "thinking", "thinking": [{"type": "text", "text": "I think."}]},
            {"type": "text", "text": "yes"},
        ]
    },
}


@pytest.mark.parametrize("message", THOUGHT.values(), ids=THOUGHT)
def test_the_reasoning_of_a_chat_answer(message):
    """It is found under whatever name a server has for it, and is no part of the content."""
    answer = read(chat({"role": "assistant", "content": "yes", **message}))
    assert (answer.content, answer.reasoning) == ("yes", "I think.")


@pytest.mark.parametrize(
    ("item", "reasoning"),
    [
        ({"summary": [{"type": "summary_text", "text": "One."}, {"type": "summary_text", "text": "Two."}]},
         "One.\n\nTwo."),
        ({"summary": [], "content": [{"type": "reasoning_text", "text": "All of it."}]}, "All of it."),
        ({"summary": [{"text": "Short."}], "content": [{"text": "All of it."}]}, "All of it."),
        ({"summary": [], "encrypted_content": "gAAAA"}, None),
    ],
)  # fmt: skip
def test_the_reasoning_of_a_response(item, reasoning):
    """It is the whole text where there is one, else the summary."""
    body = response(text("yes"))
    body["output"] = [{"type": "reasoning", **item}, *body["output"]]
    answer = read(body, "responses")
    assert (answer.content, answer.reasoning) == ("yes", reasoning)


def test_sound_and_references():
    """A spoken answer has its transcript beside it, a searched one its sources; both can be written."""
    audio = {"id": "audio_1", "data": "UklGRg==", "expires_at": 1_700_000_000, "transcript": "yes"}
    cited = [{"type": "url_citation", "url_citation": {"url": "https://example.org", "title": "\ud83d"}}]
    answer = read(chat({"content": None, "audio": audio, "annotations": cited}))
    assert answer.audio == audio
    assert answer.annotations[0]["url_citation"] == {"url": "https://example.org", "title": "\ufffd"}
    assert ModelResponse.model_validate_json(answer.model_dump_json()) == answer
    spoken = {"type": "output_audio", "data": "UklGRg==", "transcript": "yes"}
    answer = read(response(text("yes", annotations=cited[:1]), spoken), "responses")
    assert answer.audio == spoken
    assert [each["type"] for each in answer.annotations] == ["url_citation"]


def test_the_call_of_an_old_server():
    """`function_call` reads like one of `tool_calls`, which counts where a server sends both."""
    call = {"name": "find", "arguments": "{}"}
    shaped = [{"id": "", "type": "function", "function": call}]
    assert read(chat({"content": None, "function_call": call})).tool_calls == shaped
    both = chat({"content": None, "function_call": call, "tool_calls": [{"id": "call_1", "function": call}]})
    assert [each["id"] for each in read(both).tool_calls] == ["call_1"]
    assert read(chat({"content": "yes", "function_call": None})).tool_calls == []


def test_raw_has_what_no_field_has():
    """Fields that the SDK does not know are attributes too."""
    answer = read(chat({"content": "yes", "reasoning": "I think."}, provider="p"))
    assert (answer.raw.provider, answer.raw.choices[0].message.reasoning) == ("p", "I think.")


# --- usage ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "usage",
    [None, {}, [], "many", 7, {"prompt_tokens": None}, {"prompt_tokens": "eleven"}, {"total_tokens": -1}],
)
def test_missing_usage_is_marked(usage):
    """The caller then puts an estimate in its place."""
    read_usage = read(chat(usage=usage)).usage
    assert read_usage.estimated is True
    assert (read_usage.prompt_tokens, read_usage.completion_tokens, read_usage.total_tokens) == (0, 0, 0)


@pytest.mark.parametrize(
    ("usage", "counts"),
    [
        ({"prompt_tokens": 11, "completion_tokens": 22, "total_tokens": 33}, (11, 22, 33, 0, 0)),
        ({"prompt_tokens": 11, "completion_tokens": 22}, (11, 22, 33, 0, 0)),
        ({"prompt_tokens": 11, "completion_tokens": 22, "total_tokens": None}, (11, 22, 33, 0, 0)),
        ({"prompt_tokens": 11.0, "completion_tokens": 22.0, "total_tokens": 40}, (11, 29, 40, 0, 0)),
        (
            {
                "prompt_tokens": 11,
                "completion_tokens": 22,
                "prompt_tokens_details": {"cached_tokens": 5},
                "completion_tokens_details": {"reasoning_tokens": 6},
            },
            (11, 22, 33, 5, 6),
        ),
        (
            {
                "input_tokens": 11,
                "output_tokens": 22,
                "input_tokens_details": {"cached_tokens": 5},
                "output_tokens_details": {"reasoning_tokens": 6},
            },
            (11, 22, 33, 5, 6),
        ),
        (
            {"prompt_tokens": 11, "completion_tokens": 22, "prompt_tokens_details": {"cached_tokens": None}},
            (11, 22, 33, 0, 0),
        ),
        (
            {"prompt_tokens": 11, "completion_tokens": 22, "completion_tokens_details": None},
            (11, 22, 33, 0, 0),
        ),
    ],
)
def test_usage_is_read(usage, counts):
    """There are input, output, total, cached and reasoning tokens."""
    counted = read(chat(usage=usage)).usage
    names = ("prompt_tokens", "completion_tokens", "total_tokens", "cached_tokens", "reasoning_tokens")
    assert tuple(getattr(counted, name) for name in names) == counts
    assert counted.estimated is False


def test_the_price_depends_on_input_output_and_cached_tokens():
    """Cached input costs less."""
    usage = Usage(10, 20)
    cached = Usage(10, 20, cached_tokens=10)
    pricer = Pricer()
    assert pricer.cost("gpt-4o", usage) > pricer.cost("gpt-4o", cached) > Decimal(0)


@pytest.mark.parametrize("fault", ["null_usage", "no_usage"])
async def test_a_server_without_usage_gets_an_estimate(fault):
    """The counts are ours, and marked as estimated."""
    with SimulatedServer(script=[fault]) as server:
        config = OpenAIConfig(api_key="sk-test", base_url=server.base_url, default_model="gpt-4o")
        async with OpenAIClient(config, rate_limit=RateLimitConfig(tokens_per_minute=None)) as client:
            answer = await client.generate_response("hello there")
    assert answer.usage.estimated is True
    assert answer.usage.prompt_tokens > 0
    assert answer.usage.completion_tokens > 0
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.estimated_cost > 0


# --- structured output --------------------------------------------------------------------------------------


def parsing(content, **message):
    body = chat({"role": "assistant", "content": content, **message})
    return read(body, response_format=City)


def test_an_answer_that_fits_is_parsed():
    """The object is an instance of the given class."""
    assert parsing('{"name": "Paris", "people": 2}').parsed == City(name="Paris", people=2)


def test_an_answer_of_the_responses_api_is_parsed():
    """The object is an instance of the given class."""
    answer = read(response(text('{"name": "Paris", "people": 2}')), "responses", response_format=City)
    assert answer.parsed == City(name="Paris", people=2)


@pytest.mark.parametrize(
    "content", ["Paris", "{", '{"name": "Paris"}', '{"name": "Paris", "people": "many"}', "[]"]
)
def test_an_answer_that_does_not_fit_is_not_parsed_and_logged(caplog, content):
    """The content is kept; the log has the request id, not the content."""
    with caplog.at_level(logging.WARNING):
        answer = parsing(content)
    assert answer.parsed is None
    assert answer.content == content
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "req_1" in caplog.text
    assert "City" in caplog.text
    assert "Paris" not in caplog.text


@pytest.mark.parametrize("message", [{"content": None}, {"content": ""}, {"content": None, "refusal": "No."}])
def test_an_answer_without_content_is_not_parsed(caplog, message):
    """A refusal or a tool call is not logged as an answer that does not fit."""
    assert parsing(**message).parsed is None
    assert caplog.records == []


def test_without_a_class_nothing_is_parsed():
    """A JSON schema gives text."""
    body = chat({"content": '{"name": "Paris", "people": 2}'})
    assert read(body, response_format={"type": "json_object"}).parsed is None


@pytest.mark.parametrize(
    ("message", "fits"),
    [
        ({"content": '{"name": "Paris", "people": 2}'}, True),
        ({"content": '{"name": "Paris"}'}, False),
        ({"content": "Paris"}, False),
        ({"content": ""}, False),
        ({"content": None, "refusal": "No."}, False),
        ({"content": None, "tool_calls": [CALL]}, None),
    ],
)
def test_an_answer_says_whether_it_fits(message, fits):
    """A refusal and an empty answer do not; of a call for a tool nothing can be said."""
    assert read(chat(message), response_format=City).fits_schema is fits
    assert read(chat(message)).fits_schema is None


@pytest.mark.parametrize(
    ("content", "fits"), [("[1]", None), ("{}", None), ("Paris", False), ("", False), ('{"a": "cut', False)]
)
def test_without_a_class_the_text_may_still_be_no_json(caplog, content, fits):
    """Whether it fits a JSON schema is not checked, and what is no JSON is not logged."""
    for wanted in ({"type": "json_object"}, {"type": "json_schema", "json_schema": {}}):
        assert read(chat({"content": content}), response_format=wanted).fits_schema is fits
        found = read(response(text(content)), "responses", text={"format": wanted})
        assert (found.fits_schema, found.parsed) == (fits, None)
    assert caplog.records == []
    for unclear in ("json_object", {"type": []}, {"type": "text"}):
        assert read(chat({"content": content}), extra_body={"response_format": unclear}).fits_schema is None


@pytest.mark.parametrize(
    ("asked_", "sent", "unsent"),
    [
        (0.2, None, ("temperature",)),
        (0.2, 1.0, ("temperature",)),
        (0.2, 0.2, ()),
        (0, 0.0, ()),
        (None, None, ()),
    ],
)
def test_a_temperature_that_was_not_sent_is_named(asked_, sent, unsent):
    """A model may refuse it; the cache keeps the API's default then."""
    body = {} if asked_ is None else {"extra_body": {"temperature": asked_}}
    assert read(chat(), temperature=sent, **body).unsent_parameters == unsent


PARIS = '{"name": "Paris", "people": 2}'


@pytest.mark.parametrize(
    ("texts", "fits"),
    [
        (["Let me see.", PARIS], True),
        ([PARIS, "That was it."], True),
        ([PARIS.replace("Paris", "Rome"), PARIS], True),
        ([PARIS[:10], PARIS[10:]], True),
        (["Let me see.", "Paris"], False),
    ],
)
def test_of_several_messages_the_last_that_fits_is_parsed(caplog, texts, fits):
    """A response may have comments before and after it, or be in pieces."""
    body = response()
    message = body["output"][0]
    body["output"] = [{"type": "reasoning"}, *({**message, "content": [text(each)]} for each in texts)]
    answer = read(body, "responses", response_format=City)
    assert answer.parsed == (City(name="Paris", people=2) if fits else None)
    assert answer.content == "".join(texts)
    assert len(caplog.records) == (not fits)


async def test_the_client_sends_the_schema_and_parses_the_answer():
    """This works with both APIs."""
    with SimulatedServer() as server:
        config = OpenAIConfig(api_key="sk-test", base_url=server.base_url)
        async with OpenAIClient(config) as client:
            for api in PATHS:
                answer = await client.generate_response("Where?", api=api, response_format=City)
                assert isinstance(answer.parsed, City)


# --- invalid text and wrong types ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "shown"),
    [
        ("\ud83d", "\ufffd"),
        ("cut \ud83d", "cut \ufffd"),
        ("\udc00 and on", "\ufffd and on"),
        ("\ud83d\ude00", "\U0001f600"),
        ("na\u00efve \u2603 \U0001f600", "na\u00efve \u2603 \U0001f600"),
        ("nul \x00", "nul \x00"),
    ],
)
def test_half_an_emoji_is_replaced(sent, shown):
    """An answer may be cut inside a surrogate pair; it can still be written as JSON."""
    for answer in (
        read(chat({"content": sent})),
        read(response(text(sent)), "responses"),
        read(chat(choices=[{"message": {"content": sent}}] * 2)),
    ):
        assert answer.content == shown
        assert set(answer.choices) == {shown}
        assert ModelResponse.model_validate_json(answer.model_dump_json()) == answer
    assert read(chat({"refusal": sent})).refusal == shown


HALF = "\ud83d"
HALVES = {
    "tool call": ("chat", chat({"tool_calls": [{"function": {"name": "f", "arguments": HALF}}]})),
    "logprobs": ("chat", chat(choices=[{"message": {}, "logprobs": {"content": [{"token": HALF}]}}])),
    "model": ("chat", chat(model=HALF)),
    "id": ("chat", chat(id=HALF)),
    "finish reason": ("chat", chat(choices=[{"message": {}, "finish_reason": HALF}])),
    "call of a response": ("responses", response(output=[{"type": "function_call", "arguments": HALF}])),
    "logprobs of a response": ("responses", response(text("a", logprobs=[{"token": HALF}]))),
    "status of a response": ("responses", response(status=HALF)),
    "refusal of a response": ("responses", response({"type": "refusal", "refusal": HALF})),
}


@pytest.mark.parametrize(("api", "body"), HALVES.values(), ids=HALVES)
def test_half_an_emoji_anywhere_can_be_written_as_json(api, body):
    """The tokens of `logprobs` often end inside a character."""
    answer = read(body, api, request_id=None)
    assert ModelResponse.model_validate_json(answer.model_dump_json()) == answer


DEEP: list = []
for _ in range(500):
    DEEP = [DEEP]
ODD = {
    "message a text": ("chat", chat(choices=[{"message": "yes"}])),
    "message a list": ("chat", chat(choices=[{"message": ["yes"]}])),
    "content a number": ("chat", chat({"content": 5})),
    "tool calls a number": ("chat", chat({"content": "yes", "tool_calls": 5})),
    "tool calls an object": ("chat", chat({"content": "yes", "tool_calls": {"name": "f"}})),
    "logprobs a list": ("chat", chat(choices=[{"message": {"content": "yes"}, "logprobs": [0.5]}])),
    "logprobs a text": ("chat", chat(choices=[{"message": {"content": "yes"}, "logprobs": "none"}])),
    "usage details a text": ("chat", chat(usage={"prompt_tokens": 1, "prompt_tokens_details": "none"})),
    "usage details a list": ("chat", chat(usage={"prompt_tokens": 1, "completion_tokens_details": [1]})),
    "finish reason a number": ("chat", chat(choices=[{"message": {}, "finish_reason": 5}])),
    "model a number": ("chat", chat(model=5)),
    "content of a response a text": ("responses", response(output=[{"type": "message", "content": "yes"}])),
    "content of a response a number": ("responses", response(output=[{"type": "message", "content": 5}])),
    "part of a response a text": ("responses", response("yes")),
    "part of a response null": ("responses", response(None)),
    "logprobs of a response a number": ("responses", response(text("yes", logprobs=5))),
    "incomplete details a text": ("responses", response(status="incomplete", incomplete_details="cut")),
    "status a number": ("responses", response(status=5)),
    "reasoning a number": (
        "chat",
        chat({"content": "yes", "reasoning": 5, "reasoning_details": [5, {"text": 5}]}),
    ),
    "a deep reasoning": ("chat", chat({"content": "yes", "reasoning": DEEP})),
    "audio a text, annotations an object": ("chat", chat({"audio": "x", "annotations": {"a": 1}})),
    "function call a text": ("chat", chat({"function_call": "find"})),
    "a part of no type that can be": (
        "chat",
        chat({"content": [{"type": {}, "text": "a"}, {"type": "thinking"}]}),
    ),
    "reasoning of a response a text": ("responses", response(output=[{"type": "reasoning", "summary": "s"}])),
}


@pytest.mark.parametrize(("api", "body"), ODD.values(), ids=ODD)
def test_odd_types_are_read_as_missing(api, body):
    """A field of the wrong type is lost, but not the answer."""
    answer = read(body, api)
    assert answer.request_id == "req_1"
    assert ModelResponse.model_validate_json(answer.model_dump_json()) == answer


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def places(value, path=()):
    """Yield the path of every value in a body."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from places(item, (*path, key))


def with_odd(body, path, odd):
    changed = copy.deepcopy(body)
    holder = changed
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = odd
    return changed


FULL = {
    "chat": chat(
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "yes"}, {"type": "thinking", "thinking": [{"text": "t"}]}],
            "tool_calls": [CALL],
            "refusal": None,
            "reasoning": "t",
            "reasoning_details": [{"type": "reasoning.text", "text": "t"}],
            "audio": {"transcript": "t"},
            "annotations": [{"type": "url_citation"}],
        },
        usage={
            "prompt_tokens": 1,
            "completion_tokens": 2,
            "total_tokens": 3,
            "prompt_tokens_details": {"cached_tokens": 1},
            "completion_tokens_details": {"reasoning_tokens": 1},
        },
    ),
    "responses": response(
        text("yes", logprobs=[{"token": "yes", "logprob": -0.1}]),
        {"type": "output_audio", "transcript": "yes"},
        incomplete_details={"reason": "x"},
    ),
}
ENTRY = {"chat": "choices", "responses": "output"}


@pytest.mark.parametrize("api", PATHS)
@given(data=st.data())
def test_anything_in_place_of_anything_is_read(api, data):
    """With any JSON in place of any value an answer is read, and the response can be written."""
    path = data.draw(st.sampled_from([p for p in places(FULL[api]) if p and p != (ENTRY[api],)]))
    body = with_odd(FULL[api], path, data.draw(JSON))
    answer = read(body, api)
    assert ModelResponse.model_validate_json(answer.model_dump_json()) == answer
