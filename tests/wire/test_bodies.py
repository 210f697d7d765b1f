"""What comes with a 200: an answer, or the error that it is."""

import json

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openai_eval_client._wire.bodies import fault_in, read_body, read_outcome
from openai_eval_client._wire.failures import Kind, outcome_of, read_failure
from openai_eval_client.errors import QuotaError, sdk_httpx

CHAT = {
    "id": "c",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "yes"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
}
TEXT = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "yes"}]}
RESPONSE = {"id": "r", "object": "response", "status": "completed", "error": None, "output": [TEXT]}


def reply(body, content_type="application/json"):
    """A 200 with such a body."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = sdk_httpx().Request("POST", "http://127.0.0.1/v1/chat/completions")
    return sdk_httpx().Response(200, content=content, headers={"content-type": content_type}, request=request)


def error_in(body, api="chat", **options):
    """The error that such a body is."""
    with pytest.raises(openai.APIError) as caught:
        read_body(reply(body, **options), api)
    return caught.value


def choice(message=None, **fields):
    return CHAT | {"choices": [{"index": 0, "message": message, "finish_reason": "stop", **fields}]}


@pytest.mark.parametrize(
    "message",
    [
        {"content": "yes"},
        {"content": ""},
        {"content": [{"type": "text", "text": "yes"}]},
        {"content": None, "refusal": "no"},
        {"content": None, "reasoning_content": "hm"},
        {"content": None, "tool_calls": [{"id": "t"}]},
        {"content": None, "function_call": {"name": "f"}},
        {"content": None, "audio": {"id": "a"}},
        {"content": None, "images": [{"image_url": {}}]},
        {"content": None, "reasoning_details": [{"text": "hm"}]},
    ],
)
def test_a_message_with_something_is_an_answer(message):
    """Even an empty text: the model may say nothing."""
    assert fault_in(choice(message), "chat") is None


@pytest.mark.parametrize("reason", ["length", "content_filter"])
def test_an_answer_that_was_cut_off_may_be_empty(reason):
    """All tokens may have gone into reasoning."""
    assert fault_in(choice({"content": None}, finish_reason=reason), "chat") is None


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        ({"choices": []}, None, Kind.UNREADABLE),
        (CHAT | {"choices": []}, None, Kind.UNREADABLE),
        (CHAT | {"choices": [None]}, None, Kind.UNREADABLE),
        (CHAT | {"choices": [{}]}, None, Kind.UNREADABLE),
        (CHAT | {"choices": {}}, None, Kind.UNREADABLE),
        (choice({"content": None}), None, Kind.UNREADABLE),
        (choice({"content": 5}), None, Kind.UNREADABLE),
        (choice({"content": []}), None, Kind.UNREADABLE),
        (choice({"content": "half"}, finish_reason="error"), None, Kind.UNREADABLE),
        (choice({"content": ""}, error={"code": 502, "message": "Up"}), 502, Kind.SERVER_ERROR),
        (choice({"content": "half"}, error={"code": "429", "message": "Up"}), 429, Kind.RATE_LIMITED),
        (CHAT | {"error": {"message": "m", "code": "server_error"}}, 500, Kind.SERVER_ERROR),
        (CHAT | {"error": {"message": "m", "type": "overloaded_error"}}, 529, Kind.OVERLOADED),
        (CHAT | {"error": {"message": "m", "code": "insufficient_quota"}}, 429, Kind.OUT_OF_QUOTA),
        (CHAT | {"error": "it broke"}, None, Kind.UNREADABLE),
        ({"object": "error", "message": "m", "code": 400}, 400, Kind.REFUSED_INPUT),
        ([], None, Kind.UNREADABLE),
        (None, None, Kind.UNREADABLE),
    ],
)
def test_a_chat_body_that_is_no_answer(body, status, kind):
    """It is the error of the status that it names."""
    error = error_in(body)
    assert read_failure(error).kind is kind
    assert (error.status_code if isinstance(error, openai.APIStatusError) else None) == status
    assert isinstance(error, QuotaError) is (kind is Kind.OUT_OF_QUOTA)


def failed(code=None, **fields):
    return {"status": "failed", "output": [], "error": {"code": code, "message": "words"}, **fields}


@pytest.mark.parametrize(
    ("body", "status", "retry"),
    [
        (failed("server_error"), 500, True),
        (failed("rate_limit_exceeded"), 429, True),
        (failed("invalid_prompt"), 400, False),
        (failed("image_too_large"), 400, False),
        (failed("vector_store_timeout"), 504, True),
        (failed("news"), None, True),
        (failed("invalid_response_error"), None, True),
        (failed(error=None), None, True),
        ({"status": "cancelled", "output": []}, None, True),
        ({"status": "queued", "output": []}, None, False),
        ({"status": "completed", "output": []}, None, True),
        ({"status": "completed", "output": [{}]}, None, True),
        ({"status": "completed", "output": [TEXT | {"content": [{"type": "output_text"}]}]}, None, True),
        ({"status": ["completed"], "output": [TEXT]}, None, True),
        (RESPONSE | {"error": {"code": "server_error", "message": "m"}}, 500, True),
    ],
)
def test_a_response_that_is_no_answer(body, status, retry):
    """Failed, cancelled, still queued, or without anything in it."""
    error = error_in(body, "responses")
    assert (error.status_code if isinstance(error, openai.APIStatusError) else None) == status
    assert read_failure(error).retry is retry


@pytest.mark.parametrize(
    "body",
    [
        RESPONSE,
        {"output": [TEXT]},
        RESPONSE | {"output": [{"type": "function_call", "name": "f"}]},
        {"status": "incomplete", "output": [], "incomplete_details": {"reason": "max_output_tokens"}},
    ],
)
def test_a_response_that_is_an_answer(body):
    """Complete, or cut off."""
    assert read_body(reply(body), "responses") == (body, reply(body).content)


def test_the_servers_words_are_in_the_error():
    """Wherever they stand."""
    assert "words" in str(error_in(failed("server_error"), "responses"))
    assert "it broke" in str(error_in(CHAT | {"error": "it broke"}))
    assert str(error_in(choice({"content": ""}, error={"code": 502, "message": "Up"}))) == "Up"


def test_what_an_error_used_is_known():
    """A 200 that holds an error may have been billed."""
    assert outcome_of(error_in(CHAT | {"error": {"code": 502}})).usage.completion_tokens == 4
    assert outcome_of(error_in(CHAT | {"choices": []})).usage.prompt_tokens == 3


@pytest.mark.parametrize("kind", ["text/html; charset=utf-8", "application/json"])
def test_a_page_is_no_answer_of_an_api(kind):
    """It says what to check, and is not asked for again."""
    error = error_in(b"<!DOCTYPE html><title>Log in</title>", content_type=kind)
    failure = read_failure(error)
    assert (failure.kind, failure.retry, failure.is_shared) == (Kind.NOT_AN_API, False, True)
    assert "check base_url" in str(error)


def test_json_named_as_a_page_is_read():
    """Some servers name every body text/html."""
    assert read_body(reply(CHAT, "text/html"), "chat")[0] == CHAT


def events(*bodies, done=True):
    lines = [b"data: " + json.dumps(body).encode() for body in bodies]
    return b"\n\n".join([*lines, b"data: [DONE]"] if done else lines) + b"\n\n"


def chunk(content=None, reason=None, **fields):
    delta = {} if content is None else {"role": "assistant", "content": content}
    choices = [{"index": 0, "delta": delta, "finish_reason": reason}]
    return {**CHAT, "object": "chat.completion.chunk", "choices": choices, "usage": None, **fields}


@pytest.mark.parametrize(
    ("body", "api", "answer"),
    [
        (json.dumps(CHAT).encode() + b"\n\ndata: [DONE]\n\n", "chat", CHAT),
        (events(CHAT), "chat", CHAT),
        (events(CHAT, done=False), "chat", CHAT),
        (b"event: response.completed\n" + events(RESPONSE | {"type": "x"}, done=False), "responses", None),
        (events({"type": "response.created"}, {"type": "response.completed", "response": RESPONSE}),
         "responses", RESPONSE),
    ],
)  # fmt: skip
def test_one_whole_answer_in_a_stream_is_read(body, api, answer):
    """What follows it does not matter."""
    found, kept = read_body(reply(body, "text/event-stream"), api)
    assert answer is None or found == answer
    assert json.loads(kept) == found


def test_the_chunks_of_a_stream_make_one_answer():
    """Though none was asked for."""
    body = events(chunk("ye"), chunk("s"), chunk(reason="stop"), chunk(choices=[], usage=CHAT["usage"]))
    answer, _ = read_body(reply(body, "text/event-stream"), "chat")
    assert answer["choices"][0]["message"]["content"] == "yes"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 4


def test_a_stream_that_ends_by_length_keeps_its_text():
    """Its last chunk is no answer of its own."""
    body = events(chunk("half a text"), chunk(reason="length"))
    answer, _ = read_body(reply(body, "text/event-stream"), "chat")
    assert answer["choices"][0]["message"]["content"] == "half a text"


@pytest.mark.parametrize(
    ("body", "api"),
    [
        (events(chunk("half"), {"error": {"code": 429, "message": "retry in 3s"}}), "chat"),
        (events({"type": "response.failed", "response": failed("rate_limit_exceeded")}), "responses"),
    ],
)
def test_an_error_in_a_stream_is_that_error(body, api):
    """It is tried again as it says."""
    failure = read_failure(error_in(body, api, content_type="text/event-stream"))
    assert (failure.kind, failure.retry) == (Kind.RATE_LIMITED, True)


@pytest.mark.parametrize(
    "body",
    [
        events(chunk("ye"), chunk("s")),
        events(chunk("ye"), chunk(reason="stop"), done=False),
        events({"choices": 5}, chunk(reason="stop")),
        events(CHAT, CHAT),
        b"data: [DONE]\n\n",
    ],
)
def test_a_stream_that_is_not_whole_is_no_answer_and_not_bought_again(body):
    """The same request brings the same bytes, and was billed."""
    failure = read_failure(error_in(body, content_type="text/event-stream"))
    assert (failure.kind, failure.retry, failure.billed) == (Kind.UNREADABLE, False, True)


def test_an_answer_that_is_cut_short_is_asked_for_again():
    """As a connection that breaks."""
    failure = read_failure(error_in(json.dumps(CHAT).encode()[:-9]))
    assert (failure.kind, failure.retry) == (Kind.UNREADABLE, True)


def test_an_answer_for_another_reader_counts_as_what_it_is():
    """The drop-in client's caller reads it; limiter and ledger see the error in it."""
    content = json.dumps(CHAT | {"error": {"code": 429, "message": "retry in 3s"}}).encode()
    outcome = read_outcome(200, {}, content, "chat")
    assert (outcome.status, outcome.failure.kind, outcome.failure.wait) == (429, Kind.RATE_LIMITED, 3.0)
    assert outcome.usage.completion_tokens == 4
    assert read_outcome(200, {}, json.dumps(CHAT).encode(), "chat").failure is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.parametrize("api", ["chat", "responses"])
@given(body=JSON)
def test_any_json_is_an_answer_or_an_error_of_the_sdk(api, body):
    """Never anything else."""
    try:
        answer, _ = read_body(reply(json.dumps(body).encode()), api)
    except openai.APIError as error:
        assert read_failure(error).kind
    else:
        assert answer == body
