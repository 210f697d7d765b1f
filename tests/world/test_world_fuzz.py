"""Any JSON in place of an answer: a typed response or a typed error, never a wrong bill, never nothing."""

from __future__ import annotations

import json
import math
from decimal import Decimal

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from wire_rows import FOREVER, connect
from wire_server import Reply, chat, response, serving

from openai_eval_client import ModelResponse
from openai_eval_client._wire import Parameters, read_answer, read_body, usage_of
from openai_eval_client.errors import sdk_httpx

LEFT_OUT = object()
NUMBERS = st.integers() | st.floats() | st.sampled_from([0, -1, 10**18, 10**40, 1e308, math.nan, -math.inf])
TEXTS = st.text(max_size=8) | st.sampled_from(
    ["", "stop", "error", "failed", "completed", "\ud800", "0", "x"]
)
SCALARS = st.none() | st.booleans() | NUMBERS | TEXTS
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
USAGES = st.dictionaries(
    st.sampled_from(
        [
            "prompt_tokens",
            "completion_tokens",
            "total_tokens",
            "input_tokens",
            "output_tokens",
            "cached_tokens",
            "prompt_cache_hit_tokens",
            "prompt_tokens_details",
            "completion_tokens_details",
            "output_tokens_details",
        ]
    ),
    NUMBERS
    | VALUES
    | st.dictionaries(st.sampled_from(["cached_tokens", "reasoning_tokens", "audio_tokens"]), NUMBERS),
)
ERRORS = st.dictionaries(st.sampled_from(["code", "type", "message", "status", "param"]), VALUES)


def paths(body, before=()):
    """Yield the way to every value in a body."""
    items = body.items() if isinstance(body, dict) else enumerate(body) if isinstance(body, list) else ()
    for key, value in items:
        yield (*before, key)
        yield from paths(value, (*before, key))


def replaced(body, path, value):
    """Return a body with another value in one place, or without it."""
    if not path:
        return value
    key, *rest = path
    if isinstance(body, dict):
        changed = {**body, key: replaced(body[key], rest, value)}
        return {name: each for name, each in changed.items() if each is not LEFT_OUT}
    changed = [replaced(each, rest, value) if place == key else each for place, each in enumerate(body)]
    return [each for each in changed if each is not LEFT_OUT]


FULL = {
    "chat": {
        **chat(),
        "error": None,
        "service_tier": "default",
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "message": {
                    "role": "assistant",
                    "content": "yes",
                    "refusal": None,
                    "tool_calls": None,
                    "reasoning_content": None,
                },
                "logprobs": {"content": [{"token": "yes", "logprob": -0.1, "top_logprobs": []}]},
            }
        ],
    },
    "responses": {**response(), "incomplete_details": None, "service_tier": "default", "reasoning": None},
}


@st.composite
def bodies(draw, api):
    """An answer with up to three values that are another or missing; or any JSON at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(VALUES)
    body = FULL[api]
    for _ in range(draw(st.integers(1, 3))):
        if not isinstance(body, dict):
            break
        path = draw(st.sampled_from([(name,) for name in (*body, "usage", "error")] + list(paths(body))))
        kinds = {"usage": USAGES, "error": ERRORS}.get(path[0] if len(path) == 1 else "", VALUES)
        value = draw(st.just(LEFT_OUT) | kinds | VALUES)
        if len(path) == 1:
            body = {name: each for name, each in {**body, path[0]: value}.items() if each is not LEFT_OUT}
        else:
            body = replaced(body, path, value)
    return body


SAYS = {"content", "refusal", "tool_calls", "function_call", "reasoning", "reasoning_content", "audio"}


def says_anything(body, api):
    """Whether a body has any field that could hold what the model said, empty or not."""
    if api == "chat":
        choices = [each for each in body["choices"] if isinstance(each, dict)]
        messages = [each.get("message") for each in choices]
        return any(isinstance(each, dict) and SAYS & each.keys() for each in messages)
    items = [item for item in body["output"] if isinstance(item, dict)]
    return any("content" in item or item.get("type") not in {None, "", "message"} for item in items)


def check_answer(answer, body, api):
    """Check that an answer is typed, that it is not made of nothing, and that its usage is possible."""
    assert isinstance(answer, ModelResponse)
    plain = ModelResponse.model_validate(answer.model_dump())
    assert plain.content == answer.content
    assert ModelResponse.model_validate_json(answer.model_dump_json()).choices == answer.choices
    json.dumps(answer.to_dict(), allow_nan=False)
    answer.content.encode()
    usage = answer.usage
    assert 0 <= usage.cached_tokens <= max(usage.prompt_tokens, usage.cached_tokens)
    assert usage.prompt_tokens >= 0 <= usage.completion_tokens
    assert usage.total_tokens >= 0 <= usage.reasoning_tokens
    is_nothing = not (answer.content or answer.tool_calls or answer.refusal)
    if is_nothing and answer.finish_reason == "stop":
        assert says_anything(body, api), f"an answer of nothing: {body!r}"


def parameters(api):
    return Parameters(api=api, model="gpt-4o-mini", timeout=30.0, body={"model": "gpt-4o-mini"})


def reply_of(content, kind="application/json"):
    request = sdk_httpx().Request("POST", "http://127.0.0.1/v1/chat/completions")
    return sdk_httpx().Response(200, headers={"content-type": kind}, content=content, request=request)


def read(content, api):
    """Return what the readers make of the bytes of a 200."""
    try:
        body, kept = read_body(reply_of(content), api)
    except openai.APIError as error:
        str(error).encode("utf-8", "surrogatepass")
        return error, None
    usage = usage_of(body)
    answer = read_answer(
        body, parameters(api), usage=usage, temperature=None, request_id=None, latency=0.1, kept=kept
    )
    return answer, body


quick = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
slow = settings(deadline=None, max_examples=30, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("api", ["chat", "responses"])
@quick
@given(data=st.data())
def test_any_json_is_an_answer_or_an_error(api, data):
    """In any field any value, fields missing, nested, huge, not a number."""
    body = data.draw(bodies(api))
    outcome, read_as = read(json.dumps(body).encode(), api)
    if not isinstance(outcome, openai.APIError):
        check_answer(outcome, read_as, api)


@pytest.mark.parametrize("api", ["chat", "responses"])
@quick
@given(data=st.data())
def test_any_bytes_are_an_answer_or_an_error(api, data):
    """Answers cut anywhere, with bytes changed, followed or preceded by others."""
    whole = json.dumps(FULL[api]).encode()
    start = data.draw(st.just(0) | st.integers(0, 40))
    end = data.draw(st.just(len(whole)) | st.integers(0, len(whole)))
    before, after = (data.draw(st.binary(max_size=6) | st.sampled_from(NOISE)) for _ in range(2))
    outcome, body = read(before + whole[start:end] + after, api)
    if not isinstance(outcome, openai.APIError):
        check_answer(outcome, body, api)


NOISE = [b"", b"data: ", b"\n\ndata: [DONE]\n\n", b"\n\n", b"<html>", b"\xef\xbb\xbf", b"{", b"}", b"null"]


@pytest.mark.parametrize("depth", [10, 1000, 100_000])
@pytest.mark.parametrize("field", ["usage", "choices", "model", "error", "more"])
def test_deep_json_is_an_answer_or_an_error(field, depth):
    """However deep: neither the stack nor the memory ends."""
    body = json.dumps({**chat(), field: "HERE"}).replace('"HERE"', "[" * depth + "]" * depth)
    outcome, read_as = read(body.encode(), "chat")
    if not isinstance(outcome, openai.APIError):
        check_answer(outcome, read_as, "chat")


@quick
@given(usage=USAGES | VALUES)
def test_no_usage_makes_a_negative_bill(usage):
    """What is read are whole numbers of tokens, none below nought, parts no larger than the whole."""
    read_as = usage_of({**chat(), "usage": json.loads(json.dumps(usage))})
    if read_as is None:
        return
    counts = [count for count in read_as if isinstance(count, int) and not isinstance(count, bool)]
    assert all(type(count) is int and 0 <= count <= 10**12 for count in counts)
    assert len(counts) >= 2


@pytest.mark.parametrize("api", ["chat", "responses"])
@pytest.mark.usefixtures("no_pauses", "few_certificates")
async def test_any_json_through_a_socket(api):
    """The bill is never negative and counts each answer once; no bare exception, nothing stays in flight."""
    examples = []

    @slow
    @given(body=bodies(api))
    def collect(body):
        examples.append(json.dumps(body).encode())

    collect()
    script = {f"<{number}>": (Reply(content),) for number, content in enumerate(examples)}
    async with serving(script) as server, connect(server) as client:
        for number, content in enumerate(examples):
            before, calls = client.stats, server.calls
            try:
                outcome = await client.generate_response(f"<{number}>", api=api)
            except openai.OpenAIError as error:
                outcome = error
            after, calls = client.stats, server.calls - calls
            assert 1 <= calls <= FOREVER, content
            assert after.attempts - before.attempts == calls
            added = after.cost.total - before.cost.total
            assert added >= 0, content
            billed = sum(row.calls for row in after.cost.rows) - sum(row.calls for row in before.cost.rows)
            assert billed <= calls, content
            if isinstance(outcome, ModelResponse):
                assert billed == after.cost.retried - before.cost.retried + 1, content
                check_answer(outcome, json.loads(content), api)
                cost = outcome.usage.estimated_cost
                assert calls > 1 or cost is None or Decimal(repr(cost)) == pytest.approx(added), content
        assert not any(queue.concurrency.in_flight for queue in client._account.limiter._queues.values())
