"""Requests and answers as JSON: which requests are metered, what they may use, what they used."""

import json

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openai_eval_client import AsyncOpenAI
from openai_eval_client._wire import usage as usage_module
from openai_eval_client._wire.requests import endpoint_of, max_output
from openai_eval_client._wire.usage import (
    _COUNTS,
    _LARGEST_USAGE,
    _TAIL,
    _TRIES,
    Tail,
    Usage,
    read_json,
    read_usage,
    usage_of,
)
from openai_eval_client.errors import sdk_httpx
from openai_eval_client.testing import SimulatedServer


@pytest.mark.parametrize(
    ("method", "path", "metered"),
    [
        ("POST", "/v1/chat/completions", True),
        ("POST", "/v1/responses", True),
        ("POST", "/v1/completions", True),
        ("POST", "/v1/embeddings", True),
        ("POST", "/v1/moderations", True),
        ("POST", "/v1/images/generations", True),
        ("POST", "/v1/images/edits", True),
        ("POST", "/v1/audio/transcriptions", True),
        ("POST", "/v1/audio/speech", True),
        ("POST", "/chat/completions", True),
        ("POST", "/openai/deployments/gpt-4o/chat/completions", True),
        ("POST", "/api/v1/chat/completions", True),
        ("GET", "/v1/models", False),
        ("GET", "/v1/models/gpt-4o", False),
        ("DELETE", "/v1/models/ft:gpt-4o", False),
        ("GET", "/v1/chat/completions", False),
        ("GET", "/v1/responses/resp_1", False),
        ("DELETE", "/v1/responses/resp_1", False),
        ("POST", "/v1/responses/resp_1/cancel", False),
        ("POST", "/v1/batches", False),
        ("POST", "/v1/batches/batch_1/cancel", False),
        ("POST", "/v1/files", False),
        ("GET", "/v1/files/file_1/content", False),
        ("POST", "/v1/uploads/upload_1/parts", False),
        ("POST", "/v1/fine_tuning/jobs", False),
        ("POST", "/v1/vector_stores/vs_1/search", False),
        ("POST", "/v1/assistants", False),
        ("POST", "/v1/threads/thread_1/runs", False),
        ("POST", "/v1/conversations", False),
        ("POST", "/v1/containers", False),
        ("POST", "/v1/evals", False),
        ("POST", "/v1/organization/admin_api_keys", False),
    ],
)
def test_what_runs_a_model_is_metered(method, path, metered):
    """Only requests that run a model count against its requests and tokens per minute."""
    assert endpoint_of(path, method).metered is metered


@pytest.mark.parametrize("prefix", ["files", "admin", "organization", "threads"])
def test_a_gateway_may_have_any_address(prefix):
    """A prefix before the API's own path does not matter."""
    assert endpoint_of(f"/{prefix}/v1/chat/completions", "POST").metered


@pytest.mark.parametrize("call", ["responses", "batches", "uploads"])
async def test_a_request_without_a_body_passes(call):
    """Some POSTs of the API, such as a cancellation, have none."""
    httpx = sdk_httpx()
    transport = httpx.MockTransport(lambda request: httpx.Response(200, json={"id": request.url.path}))
    http = httpx.AsyncClient(transport=transport)
    async with AsyncOpenAI(api_key="sk-test", base_url="http://test/v1", http_client=http) as client:
        cancelled = await getattr(client, call).cancel("the_id")
    assert cancelled.id == f"/v1/{call}/the_id/cancel"


@pytest.mark.parametrize(
    ("body", "path", "tokens"),
    [
        ({}, "", None),
        ({"max_tokens": 5}, "/v1/chat/completions", 5),
        ({"max_completion_tokens": 6}, "/v1/chat/completions", 6),
        ({"max_output_tokens": 7}, "/v1/responses", 7),
        ({"max_tokens": 5, "n": 3}, "/v1/chat/completions", 15),
        ({"max_tokens": 5, "n": None}, "/v1/chat/completions", 5),
        ({"max_tokens": 5, "n": "3"}, "/v1/chat/completions", 5),
        ({"n": 3}, "/v1/chat/completions", None),
        ({"max_tokens": None}, "", None),
        ({"max_tokens": "5"}, "", None),
        ({"max_tokens": None, "max_completion_tokens": 6}, "", 6),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "", 6),
        ({"max_tokens": 5}, "/v1/embeddings", 0),
        ({}, "/v1/embeddings", 0),
        ({}, "/v1/moderations", 0),
        ({"max_tokens": 0}, "", 0),
    ],
)
def test_the_most_output_a_request_may_use(body, path, tokens):
    """It is for all choices together, under any of the names; None if there is no bound."""
    assert max_output(body, path) == tokens


@given(st.integers(), st.none() | st.integers() | st.booleans())
def test_no_request_reserves_less_than_zero(limit, choices):
    """A negative bound is for the API to refuse; it gives no credit."""
    assert (max_output({"max_tokens": limit, "n": choices}) or 0) >= 0


def in_all(used):
    """Return input, output, and whether the counts are not all the server's."""
    return used and (used.prompt_tokens, used.completion_tokens, used.estimated)


@pytest.mark.parametrize(
    ("usage", "counts"),
    [
        ({"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}, (3, 4, False)),
        ({"input_tokens": 3, "output_tokens": 4}, (3, 4, False)),
        ({"prompt_tokens": 3, "total_tokens": 3}, (3, 0, False)),
        ({"prompt_tokens": 3, "total_tokens": 7}, (3, 4, False)),
        ({"prompt_tokens": 0, "completion_tokens": 0}, (0, 0, False)),
        ({"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": None}, (3, 4, False)),
        ({"prompt_tokens": 3, "completion_tokens": 4, "prompt_tokens_details": None}, (3, 4, False)),
        ({"prompt_tokens": 3, "completion_tokens": 4, "input_tokens": None}, (3, 4, False)),
        ({"prompt_tokens": 0, "completion_tokens": 0, "input_tokens": 3, "output_tokens": 4}, (3, 4, False)),
        ({"prompt_tokens": 1200.0, "completion_tokens": 22.5}, (1200, 23, False)),
        ({"prompt_tokens": "3", "completion_tokens": " 4.0 ", "total_tokens": "9"}, (3, 6, True)),
        # Counts that cannot be read: what can be counts at least.
        ({"prompt_tokens": 3}, (3, 0, True)),
        ({"prompt_tokens": 3, "completion_tokens": None}, (3, 0, True)),
        ({"prompt_tokens": 3, "completion_tokens": None, "total_tokens": 7}, (3, 4, True)),
        ({"prompt_tokens": 3, "completion_tokens": "many"}, (3, 0, True)),
        ({"prompt_tokens": 3, "completion_tokens": -4}, (3, 0, True)),
        ({"prompt_tokens": 3, "completion_tokens": True}, (3, 0, True)),
        ({"prompt_tokens": 3, "completion_tokens": [4]}, (3, 0, True)),
        ({"prompt_tokens": 3, "completion_tokens": float("nan")}, (3, 0, True)),
        ({"prompt_tokens": 3, "completion_tokens": float("inf")}, (3, 0, True)),
        ({"prompt_tokens": 3, "completion_tokens": 10**15}, (3, 0, True)),
        ({"prompt_tokens": 3, "completion_tokens": 10**5000}, (3, 0, True)),
        ({"prompt_tokens": 3, "completion_tokens": "9" * 5000}, (3, 0, True)),
        ({"prompt_tokens": None, "completion_tokens": 4}, (0, 4, True)),
        ({"prompt_tokens": -3, "completion_tokens": 4, "total_tokens": 7}, (3, 4, True)),
        ({"prompt_tokens": 3, "completion_tokens": 4, "cached_tokens": "some"}, (3, 4, True)),
        ({"total_tokens": 7}, (7, 0, True)),
        ({"total_tokens": -7}, None),
        ({"prompt_tokens": None, "completion_tokens": "many"}, None),
        ({}, None),
        (None, None),
        ("usage", None),
        ([3, 4], None),
        (7, None),
    ],
)
def test_usage_of_any_endpoint(usage, counts):
    """It is read of chat, completions, responses and embeddings; None if there are no counts."""
    used = usage_of({"usage": usage})
    assert in_all(used) == counts
    assert used is None or used.partial is used.estimated


def test_embeddings_have_no_output():
    """Nor a total always: nothing is missing."""
    body = {"object": "list", "data": [], "usage": {"prompt_tokens": 3}}
    assert usage_of(body) == Usage(3, 0)


# What servers send, shortened, and what it is: https://docs.x.ai/docs/guides/reasoning,
# https://ai.google.dev/gemini-api/docs/openai, https://docs.perplexity.ai, https://api-docs.deepseek.com,
# https://platform.kimi.ai/docs/api/chat, https://openrouter.ai/docs/use-cases/usage-accounting,
# https://docs.anthropic.com/en/docs/build-with-claude/prompt-caching, https://docs.litellm.ai
SERVERS = {
    "OpenAI: reasoning within the output": (
        {"prompt_tokens": 75, "completion_tokens": 1186, "total_tokens": 1261,
         "completion_tokens_details": {"reasoning_tokens": 1024, "accepted_prediction_tokens": 0}},
        Usage(75, 1186, reasoning_tokens=1024),
    ),
    "xAI: reasoning beside the output": (
        {"prompt_tokens": 10120, "completion_tokens": 1499, "total_tokens": 14428,
         "completion_tokens_details": {"reasoning_tokens": 2809}},
        Usage(10120, 4308, reasoning_tokens=2809),
    ),
    "xAI: nothing but reasoning": (
        {"prompt_tokens": 21, "completion_tokens": 0, "total_tokens": 81,
         "completion_tokens_details": {"reasoning_tokens": 60}},
        Usage(21, 60, reasoning_tokens=60),
    ),
    "Gemini: thoughts in the total alone": (
        {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 2150}, Usage(100, 2050)
    ),
    "a gateway whose total leaves the reasoning out": (
        {"prompt_tokens": 32, "completion_tokens": 9, "total_tokens": 41,
         "completion_tokens_details": {"reasoning_tokens": 94}},
        Usage(32, 103, reasoning_tokens=94),
    ),
    "Perplexity: reasoning at the top": (
        {"prompt_tokens": 33, "completion_tokens": 7163, "total_tokens": 7196, "citation_tokens": 20016,
         "num_search_queries": 18, "reasoning_tokens": 73997, "cost": {"total_cost": 0.81}},
        Usage(33, 81160, reasoning_tokens=73997),
    ),
    "DeepSeek": (
        {"prompt_tokens": 100, "prompt_cache_hit_tokens": 80, "prompt_cache_miss_tokens": 20,
         "completion_tokens": 50, "total_tokens": 150},
        Usage(100, 50, 80),
    ),
    "Moonshot": (
        {"prompt_tokens": 19, "completion_tokens": 13, "total_tokens": 32, "cached_tokens": 12},
        Usage(19, 13, 12),
    ),
    "Mistral": (
        {"prompt_tokens": 19, "completion_tokens": 13, "total_tokens": 32, "num_cached_tokens": 12},
        Usage(19, 13, 12),
    ),
    "OpenRouter": (
        {"prompt_tokens": 194, "completion_tokens": 2, "total_tokens": 196, "cost": 0.95,
         "cost_details": {"upstream_inference_cost": 19},
         "prompt_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 100, "audio_tokens": 0}},
        Usage(194, 2, 0, 100),
    ),
    "LiteLLM: twice the same": (
        {"prompt_tokens": 100, "completion_tokens": 5, "total_tokens": 105, "cache_read_input_tokens": 60,
         "cache_creation_input_tokens": 30,
         "prompt_tokens_details": {"cached_tokens": 60, "cache_creation_tokens": 30, "text_tokens": None}},
        Usage(100, 5, 60, 30),
    ),
    "DashScope": (
        {"prompt_tokens": 100, "completion_tokens": 5, "total_tokens": 105,
         "prompt_tokens_details": {"cached_tokens": 0, "cache_creation_input_tokens": 90,
                                   "cache_creation": {"ephemeral_5m_input_tokens": 90}}},
        Usage(100, 5, 0, 90),
    ),
    "Anthropic: the cache beside the input": (
        {"input_tokens": 7, "output_tokens": 5, "cache_read_input_tokens": 2000,
         "cache_creation_input_tokens": 300,
         "cache_creation": {"ephemeral_5m_input_tokens": 100, "ephemeral_1h_input_tokens": 200}},
        Usage(2307, 5, 2000, 300, long_write_tokens=200),
    ),
    "Anthropic: less cache than input": (
        {"input_tokens": 70, "output_tokens": 5, "cache_read_input_tokens": 20}, Usage(90, 5, 20)
    ),
    "Anthropic's names, in a total that holds them": (
        {"input_tokens": 70, "output_tokens": 5, "total_tokens": 75, "cache_read_input_tokens": 20},
        Usage(70, 5, 20),
    ),
    "a total with the cache beside the input": (
        {"input_tokens": 5233, "output_tokens": 2643, "total_tokens": 62660,
         "input_tokens_details": {"cached_tokens": 54784}},
        Usage(60017, 2643, 54784),
    ),
    "the same, with less cache than input": (
        {"input_tokens": 5233, "output_tokens": 2643, "total_tokens": 11876,
         "input_tokens_details": {"cached_tokens": 4000}},
        Usage(9233, 2643, 4000),
    ),
    "more sound than there is": (
        {"prompt_tokens": 10, "completion_tokens": 5, "prompt_tokens_details": {"audio_tokens": 12},
         "completion_tokens_details": {"audio_tokens": 6}},
        Usage(10, 5, audio_input_tokens=10, audio_output_tokens=5),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("usage", "used"), SERVERS.values(), ids=SERVERS)
def test_totals_and_parts_of_many_servers(usage, used):
    """What a total has beyond input and output is output; the cache has many names, in the input or not."""
    assert usage_of({"usage": usage}) == used


NUMBERS = st.integers() | st.floats() | st.integers(0, 5000).map(str) | st.integers(0, 5000)
ANYTHING = st.none() | st.booleans() | NUMBERS | st.text(max_size=9)
NAMES = st.sampled_from(
    [*_COUNTS, "audio_tokens", "ephemeral_5m_input_tokens", "ephemeral_1h_input_tokens", "cost"]
)
ANY_USAGE = st.dictionaries(NAMES, ANYTHING | st.dictionaries(NAMES, ANYTHING, max_size=5), max_size=9)


@given(ANY_USAGE | st.recursive(ANYTHING, lambda inner: st.lists(inner) | st.dictionaries(NAMES, inner)))
def test_any_usage_has_counts_that_fit_together(usage):
    """None is negative, no part is larger than its whole, and nothing the server counted is left out."""
    used = usage_of({"usage": usage, "model": "gpt-4o"})
    if used is None:
        return
    cached, written = used.cached_tokens, used.cache_write_tokens
    assert min(count for count in used if type(count) is int) >= 0
    assert cached + written <= used.prompt_tokens >= used.audio_input_tokens
    assert used.long_write_tokens <= written
    assert max(used.audio_output_tokens, used.reasoning_tokens) <= used.completion_tokens
    stated = {name: value for name, value in usage.items() if type(value) is int and 0 <= value <= 10**9}
    assert used.prompt_tokens >= max(stated.get("prompt_tokens", 0), stated.get("input_tokens", 0))
    assert used.completion_tokens >= max(stated.get("completion_tokens", 0), stated.get("output_tokens", 0))
    assert used.prompt_tokens + used.completion_tokens >= stated.get("total_tokens", 0)


def counts_in(tail):
    """Return input and output tokens."""
    used = read_usage(tail)
    return used and (used.prompt_tokens, used.completion_tokens)


USAGE = {"prompt_tokens": 11, "completion_tokens": 22, "total_tokens": 33}


def chunks(*events):
    return (
        b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + b"data: [DONE]\n\n"
    )


@pytest.mark.parametrize(
    ("tail", "counts"),
    [
        (b"", None),
        (b"{}", None),
        (json.dumps({"choices": [], "usage": USAGE}).encode(), (11, 22)),
        (json.dumps({"choices": [], "usage": USAGE}, separators=(",", ":")).encode(), (11, 22)),
        (json.dumps({"choices": [], "usage": USAGE}, indent=4).encode(), (11, 22)),
        (json.dumps({"usage": USAGE, "service_tier": "default", "metadata": {"a": "b"}}).encode(), (11, 22)),
        (json.dumps({"usage": None}).encode(), None),
        (json.dumps({"usage": {}}).encode(), None),
        (json.dumps({"usage": "none"}).encode(), None),
        (json.dumps({"usage": {**USAGE, "prompt_tokens_details": {"cached_tokens": 5}}}).encode(), (11, 22)),
        (json.dumps({"usage": {"input_tokens": 11, "output_tokens": 22}}).encode(), (11, 22)),
        (chunks({"choices": [], "usage": None}, {"choices": [], "usage": USAGE}), (11, 22)),
        (chunks({"choices": [], "usage": USAGE}, {"choices": [], "usage": None}), (11, 22)),
        (chunks({"choices": [], "usage": None}, {"choices": [], "usage": None}), None),
        (chunks({"usage": {**USAGE, "prompt_tokens": 1}}, {"usage": USAGE}), (11, 22)),
        (chunks({"type": "response.completed", "response": {"usage": USAGE}}), (11, 22)),
        (json.dumps({"content": '"usage": {"prompt_tokens": 1}'}).encode(), None),
        (json.dumps({"content": '\\"usage": {"prompt_tokens": 1}'}).encode(), None),
        (json.dumps({"usage": USAGE, "content": '{"usage": {"prompt_tokens": 1}}'}).encode(), (11, 22)),
        (json.dumps({"usage": USAGE, "content": json.dumps({"usage": USAGE | {"n": 1}})}).encode(), (11, 22)),
        (json.dumps({"content": "\N{SNOWMAN}", "usage": USAGE}, ensure_ascii=False).encode(), (11, 22)),
        (b'"usage": {"prompt_tokens": 11, "completion_to', None),
        (b'"usage": {', None),
        (b'"usage"', None),
        (b'"usage": {"prompt_tokens": 1, "completion_tokens": 2}} {"usage": {"prompt_tokens"', (1, 2)),
        (b'tokens": 1}} "usage" : {"prompt_tokens": 11, "completion_tokens": 22}', (11, 22)),
        (b'\xff\xfe "usage": {"prompt_tokens": 11, "completion_tokens": 22} \xff', (11, 22)),
        (b"<html>502 Bad Gateway</html>", None),
    ],
)
def test_usage_at_the_end_of_a_body_or_stream(tail, counts):
    """The last complete one counts, wherever it is; one inside a text does not."""
    assert counts_in(tail) == counts


TEXTS = st.text(alphabet='"\\usage: {}1,') | st.just(json.dumps({"usage": USAGE})) | st.text()


@given(
    st.recursive(
        TEXTS | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner), max_leaves=5
    )
)
def test_no_text_is_mistaken_for_usage(content):
    """Whatever the answer's text is, the usage after it is read."""
    body = json.dumps({"content": content, "usage": USAGE}).encode()
    assert counts_in(body) == (11, 22)


@given(st.text(), st.integers(0, 10**9), st.integers(0, 10**9))
def test_an_answer_cut_short_has_its_usage_or_none(content, inputs, outputs):
    """The connection may break at any byte."""
    usage = {"prompt_tokens": inputs, "completion_tokens": outputs}
    body = json.dumps({"content": content, "usage": usage}).encode()
    for end in range(len(body)):
        assert counts_in(body[:end]) in {None, (inputs, outputs)}


@given(st.binary())
def test_garbage_has_no_usage(garbage):
    """Any bytes can be read without an exception."""
    assert counts_in(garbage) is None


def fed(data, cuts):
    tail, start = Tail(), 0
    for end in [*sorted(cuts), len(data)]:
        tail.feed(data[start:end])
        start = end
    return tail


@given(st.data(), st.integers(0, 200), st.integers(0, 3))
def test_how_a_stream_is_cut_does_not_matter(data, padding, later):
    """Any chunking of the same bytes gives the same usage."""
    empty = {"choices": [], "usage": None}
    stream = chunks(*[{"x": "y" * padding}] * 3, {"choices": [], "usage": USAGE}, *[empty] * later)
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=12))
    assert counts_in(fed(stream, cuts).read()) == (11, 22)


@given(st.integers(0, 12), st.lists(st.integers(0, 300_000), max_size=8))
def test_a_long_stream_ends_with_its_usage(length, cuts):
    """The answer before it may have any length; memory is bounded."""
    stream = chunks({"text": "\N{SNOWMAN} " * 2_000 * length}, {"usage": USAGE})
    tail = fed(stream, [cut for cut in cuts if cut < len(stream)])
    assert counts_in(tail.read()) == (11, 22)
    assert len(tail._data) <= 2 * _TAIL


def test_usage_out_of_reach_is_unknown():
    """Only the end of a stream is kept, however it is cut into chunks."""
    stream = chunks({"usage": USAGE}, {"text": "x" * _TAIL})
    assert counts_in(fed(stream, []).read()) is None
    assert counts_in(fed(stream, range(0, len(stream), 100)).read()) is None


CHAT_USAGE = {
    "prompt_tokens": 11,
    "completion_tokens": 22,
    "prompt_tokens_details": {"cached_tokens": 5, "audio_tokens": 1},
    "completion_tokens_details": {"reasoning_tokens": 6, "audio_tokens": 2},
}
RESPONSE_USAGE = {
    "input_tokens": 11,
    "output_tokens": 22,
    "input_tokens_details": {"cached_tokens": 5, "cache_write_tokens": 3},
    "output_tokens_details": {"reasoning_tokens": 6},
}
CHAT = {"model": "gpt-4o-2024-08-06", "choices": [], "usage": CHAT_USAGE, "service_tier": "flex"}
RESPONSE = {"model": "gpt-5", "output": [], "service_tier": "priority", "tools": [], "usage": RESPONSE_USAGE}
OF_CHAT = Usage(11, 22, 5, 0, 1, 2, 6, "gpt-4o-2024-08-06", "flex")
OF_RESPONSE = Usage(11, 22, 5, 3, 0, 0, 6, "gpt-5", "priority")


@pytest.mark.parametrize(
    ("tail", "used"),
    [
        (json.dumps(CHAT).encode(), OF_CHAT),
        (json.dumps(CHAT, indent=2).encode() + b"\n", OF_CHAT),
        (chunks({**CHAT, "usage": None}, CHAT), OF_CHAT),
        (chunks(CHAT, {"id": "a later one of none"}), OF_CHAT),
        (json.dumps(RESPONSE).encode(), OF_RESPONSE),
        (chunks({"type": "response.completed", "response": RESPONSE}), OF_RESPONSE),
        (b"data:" + json.dumps(CHAT).encode() + b"\r\n\r\ndata: [DONE]\r\n\r\n", OF_CHAT),
        (
            json.dumps({**CHAT, "model": None, "service_tier": 5}).encode(),
            OF_CHAT._replace(model=None, service_tier=None),
        ),
    ],
)
def test_model_and_tier_are_read_with_the_usage(tail, used):
    """They are read from bodies and streams of both APIs, with all kinds of tokens."""
    assert read_usage(tail) == used


@pytest.mark.parametrize("size", [0, 100, 2 * _TAIL])
def test_a_long_answer_names_no_model(size):
    """Its head is not read, and the model of a tool is not mistaken for its own."""
    item = {"type": "message", "content": [{"text": "x" * (2 * _TAIL)}]}
    tools = [{"type": "image_generation", "model": "gpt-image-1", "description": "y" * size}]
    long = {**RESPONSE, "output": [item], "tools": tools}
    stream = fed(chunks({"type": "response.completed", "response": long}), range(0, 9 * _TAIL, 1000)).read()
    tier = "priority" if size < _TAIL else None
    assert read_usage(stream) == OF_RESPONSE._replace(model=None, service_tier=tier)
    assert read_usage(json.dumps(long).encode()) == OF_RESPONSE._replace(model=None)
    chat = {**CHAT, "choices": [{"message": {"content": "x" * (2 * _TAIL)}}]}
    assert read_usage(json.dumps(chat).encode()) == OF_CHAT._replace(model=None)


def test_large_embeddings_name_their_model():
    """The name is right before the usage."""
    usage = {"prompt_tokens": 9, "total_tokens": 9}
    body = {"data": ["x" * (2 * _TAIL)], "model": "text-embedding-3-small", "usage": usage}
    for indent in (None, 2):
        used = read_usage(json.dumps(body, indent=indent).encode())
        assert used == Usage(9, 0, model="text-embedding-3-small")


def test_the_details_of_transcriptions_are_read():
    """The API names them `input_token_details`, in the singular."""
    usage = {
        "type": "tokens",
        "input_tokens": 14,
        "output_tokens": 45,
        "input_token_details": {"audio_tokens": 13},
    }
    assert usage_of({"text": "hello", "usage": usage}) == Usage(14, 45, audio_input_tokens=13)


@pytest.mark.parametrize(
    "repeated",
    [b'"usage":{', b'"usage":{},', b'data: {"usage":{}}\n\n', b'"model":"x","usage":{"a":1},', b'"usage"  '],
)
@pytest.mark.parametrize("start", [b"", b"data: {"])
def test_reading_takes_no_more_than_a_few_looks_at_any_body(repeated, start, monkeypatch):
    """A megabyte of the word is as quick as a page of it: each line is decoded once, and few objects."""
    looked = []

    def counted(name, data_of):
        read = getattr(usage_module, name)
        monkeypatch.setattr(usage_module, name, lambda *a: looked.append(data_of(*a)) or read(*a))

    counted("read_object", len)
    counted("_read_cut", lambda *_: _LARGEST_USAGE)
    tail = start + repeated * (1_000_000 // len(repeated))
    assert read_usage(tail) is None
    assert len(looked) <= 2 * _TRIES
    assert sum(looked) <= 2 * len(tail) + _TRIES * _LARGEST_USAGE
    assert counts_in(tail + b'\n{"x": 1, "usage": {"prompt_tokens": 1, "completion_tokens": 2}') == (1, 2)


def test_a_number_of_any_length_is_no_count():
    """It hides neither the answer nor the other counts: Python refuses to make an int of it."""
    body = b'{"usage": {"prompt_tokens": 3, "completion_tokens": 1%s}, "choices": [1]}' % (b"0" * 20_000)
    assert read_json(body)["choices"] == [1]
    assert in_all(read_usage(body)) == (3, 0, True)
    assert in_all(read_usage(b"data" + body)) is None


def test_an_empty_stream_has_an_empty_tail():
    """Without chunks there are no bytes."""
    assert Tail().read() == b""


@pytest.mark.parametrize("api", ["chat", "responses", "completions"])
@pytest.mark.parametrize("streamed", [False, True])
async def test_real_answers_report_their_usage(api, streamed):
    """For every endpoint, streamed or not, the drop-in client counts the same tokens as the server."""
    with SimulatedServer() as server:
        async with AsyncOpenAI(api_key="sk-test", base_url=server.base_url) as client:
            calls = {
                "chat": (client.chat.completions, {"messages": [{"role": "user", "content": "hello there"}]}),
                "responses": (client.responses, {"input": "hello there"}),
                "completions": (client.completions, {"prompt": "hello there"}),
            }
            resource, options = calls[api]
            if streamed and api != "responses":
                options["stream_options"] = {"include_usage": True}
            answer = await resource.create(model="m", stream=streamed, **options)
            if streamed:
                async for _ in answer:
                    pass
            stats = client.stats
    call = server.calls[0]
    assert (stats.prompt_tokens, stats.completion_tokens) == (call.prompt_tokens, call.completion_tokens)
    assert stats.completion_tokens > 0


async def test_an_answer_that_is_not_json_is_passed_on():
    """The SDK deals with it, not the limiter."""
    with SimulatedServer(script=["garbage"]) as server:
        async with (
            AsyncOpenAI(api_key="sk-test", base_url=server.base_url, max_retries=0) as client,
            openai.AsyncOpenAI(api_key="sk-test", base_url=server.base_url, max_retries=0) as plain,
        ):
            messages = [{"role": "user", "content": "hello"}]
            governed = await client.chat.completions.with_raw_response.create(model="m", messages=messages)
            assert governed.http_response.text.startswith("<")
            assert (await plain.chat.completions.create(model="m", messages=messages)).usage is not None


@pytest.mark.parametrize(
    ("body", "estimated"),
    [
        ({"choices": [], "usage": {"prompt_tokens": 9, "total_tokens": 9}}, True),
        ({"output": [], "usage": {"input_tokens": 9, "total_tokens": 9}}, True),
        ({"choices": [], "usage": {"prompt_tokens": 9, "total_tokens": 12}}, False),
        ({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 0, "total_tokens": 9}}, False),
        ({"data": [], "usage": {"prompt_tokens": 9, "total_tokens": 9}}, False),
        *[
            (
                {
                    "choices": [],
                    "usage": {"prompt_tokens": 9, "completion_tokens": unread, "total_tokens": 9},
                },
                True,
            )
            for unread in (None, "many", -1, [5], {}, True, 1e30, "1" * 4301)
        ],
    ],
)
def test_an_output_that_is_not_counted_is_not_free(body, estimated):
    """Where an answer has one: embeddings have none."""
    assert usage_of(body).estimated is estimated
