"""Token counts: against tiktoken itself, the cookbook's and the vision guide's figures, and offline."""

import asyncio
import base64
import json
import logging
import socket
import struct
import subprocess
import sys
import threading
import zlib

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from openai_eval_client._tokens import counter as counter_module
from openai_eval_client._tokens.counter import TokenCounter, image_tokens, put
from openai_eval_client._wire import Parameters, Usage, read_answer, usage_of

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_current_weather",
        "description": "Get the current weather in a given location",
        "parameters": {
            "type": "object",
            "properties": {
                "location": {"type": "string", "description": "The city and state, e.g. San Francisco, CA"},
                "unit": {
                    "type": "string",
                    "description": "The unit of temperature to return",
                    "enum": ["celsius", "fahrenheit"],
                },
            },
            "required": ["location"],
        },
    },
}
WEATHER_MESSAGES = [
    {
        "role": "system",
        "content": "You are a helpful assistant that can answer to questions about the weather.",
    },
    {"role": "user", "content": "What's the weather like in San Francisco?"},
]
JARGON = [
    ("system", None, "You are a helpful, pattern-following assistant that translates corporate jargon into plain English."),  # noqa: E501
    ("system", "example_user", "New synergies will help drive top-line growth."),
    ("system", "example_assistant", "Things working well together will increase revenue."),
    ("system", "example_user", "Let's circle back when we have more bandwidth to touch base on opportunities for increased leverage."),  # noqa: E501
    ("system", "example_assistant", "Let's talk later when we're less busy about how to do better."),
    ("user", None, "This late pivot means we don't have time to boil the ocean for the client deliverable."),
]  # fmt: skip


def chat(*contents, model="gpt-4o", **more):
    return {
        "model": model,
        "messages": [{"role": "user", "content": content} for content in contents],
        **more,
    }


def direct(text, encoding="o200k_base"):
    return len(tiktoken.get_encoding(encoding).encode_ordinary(text))


def png(width, height, metadata=0):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    image = b"\x89PNG\r\n\x1a\n" + header + chunk(b"tEXt", b"x" * metadata) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(image).decode()


def jpeg(width, height, metadata):
    segments = b"".join(b"\xff\xe1" + struct.pack(">H", 60_002) + b"x" * 60_000 for _ in range(metadata))
    frame = (
        b"\xff\xc0" + struct.pack(">HBHHB", 17, 8, height, width, 3) + b"\x01\x22\x00\x02\x11\x01\x03\x11\x01"
    )
    return "data:image/jpeg;base64," + base64.b64encode(b"\xff\xd8" + segments + frame + b"\xff\xd9").decode()


@pytest.fixture
def counter():
    return TokenCounter(load_timeout=60)


@pytest.mark.parametrize(("model", "expected"), [("gpt-3.5-turbo", 129), ("gpt-4", 129), ("gpt-4o", 124)])
async def test_messages_cost_what_the_cookbook_shows_the_server_to_report(counter, model, expected):
    messages = [
        {"role": role, "content": text, **({"name": name} if name else {})} for role, name, text in JARGON
    ]
    assert await counter.count_input({"model": model, "messages": messages}) == expected


@pytest.mark.parametrize(
    ("model", "expected"), [("gpt-3.5-turbo", 105), ("gpt-4", 105), ("gpt-4o", 101), ("gpt-4o-mini", 101)]
)
@pytest.mark.parametrize("key", ["tools", "functions"])
async def test_functions_cost_what_the_cookbook_shows_the_server_to_report(counter, model, expected, key):
    body = {"model": model, "messages": WEATHER_MESSAGES}
    body[key] = [WEATHER if key == "tools" else WEATHER["function"]]
    assert await counter.count_input(body) == expected


async def test_a_function_of_the_responses_api_costs_the_same(counter):
    flat = {"type": "function", **WEATHER["function"], "strict": True}
    body = {"model": "gpt-4o", "input": WEATHER_MESSAGES, "tools": [flat]}
    assert await counter.count_input(body) == 101


async def test_nested_parameters_cost_something_too(counter):
    flat = {"type": "object", "properties": {"place": {"type": "object"}}}
    inner = {"type": "object", "properties": {"city": {"type": "string"}}}
    nested = {"type": "object", "properties": {"place": inner}, "$defs": {"A": inner}}
    counts = [
        await counter.count_input(
            chat("x", tools=[{"type": "function", "function": {"name": "f", "parameters": p}}])
        )
        for p in (flat, nested)
    ]
    assert counts[1] > counts[0] + 5


@pytest.mark.parametrize(
    ("model", "encoding"),
    [
        ("gpt-4o-mini", "o200k_base"),
        ("gpt-3.5-turbo", "cl100k_base"),
        ("openai/gpt-4-turbo", "cl100k_base"),
        ("ft:gpt-3.5-turbo:org::id", "cl100k_base"),
        ("llama-3.3-70b-versatile", "o200k_base"),
    ],
)
@pytest.mark.parametrize(
    "text", ["", "Hello", "<|endoftext|> is text", "naïve 中文 🙂", "def f(x):\n    return x", " \n" * 99]
)
async def test_a_text_is_counted_by_the_vocabulary_of_its_model(counter, model, encoding, text):
    assert await counter.count_text(text, model) == direct(text, encoding)
    assert await counter.count_input(chat(text, model=model)) == direct(text, encoding) + 7


async def test_a_lone_surrogate_is_counted_as_its_replacement(counter):
    assert await counter.count_text("a\ud800b", "gpt-4o") == direct("a\ufffdb")


async def test_what_follows_the_text_in_a_conversation_is_counted(counter):
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city":"Bonn"}'},
    }
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": "no"},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    texts = ["assistant", "weather", '{"city":"Bonn"}', "no", "tool", "sunny"]
    expected = sum(map(direct, texts)) + 2 * 3 + 3
    assert await counter.count_input({"model": "gpt-4o", "messages": messages}) == expected


async def test_a_json_schema_counts_as_its_text(counter):
    schema = {"name": "Answer", "schema": {"type": "object", "properties": {"a": {"type": "string"}}}}
    text = json.dumps(schema, separators=(",", ":"))
    body = chat("x", response_format={"type": "json_schema", "json_schema": schema})
    assert await counter.count_input(body) == 8 + direct(text)
    responses = {"model": "gpt-4o", "input": "x", "text": {"format": {"type": "json_schema", **schema}}}
    assert await counter.count_input(responses) > 1 + direct(text)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"input": "two words"}, 2),
        ({"input": ["two words", "three words more"]}, 5),
        ({"input": [1, 2, 3]}, 3),
        ({"input": [[1, 2], [3]]}, 3),
        ({"prompt": "two words", "suffix": None}, 2),
        ({"instructions": "two words", "input": "two words"}, 4),
        ({"input": [{"role": "user", "content": [{"type": "input_text", "text": "two words"}]}]}, 9),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}", "call_id": "c"}]}, 8),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]}, 7 + 765),
        ({"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "f"}}]}]}, 2007),
        (
            {
                "input": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "input_file", "file_data": "data:text/plain;base64," + "A" * 1600}
                        ],
                    }
                ]
            },
            7 + 300,
        ),
        (
            {
                "input": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "input_file", "file_data": "data:application/pdf;base64," + "A" * 1600}
                        ],
                    }
                ]
            },
            7 + 30,
        ),
        ({"tools": [{"type": "web_search_preview", "search_context_size": "low"}]}, 1),
        ({"messages": [None, "x", 5]}, 1),
        ({"messages": {"role": "user"}, "tools": "x", "response_format": 5, "text": 1, "input": 7}, 1),
        ({}, 0),
    ],
)
async def test_every_endpoint_is_understood(counter, body, expected):
    assert await counter.count_input({"model": "gpt-4o", **body}) == expected


async def test_a_model_that_is_no_name_is_counted_all_the_same(counter):
    assert await counter.count_input({"model": None, "input": "two words"}) == 2


async def test_base64_is_not_text(counter):
    part = {"type": "output_audio", "data": "data:audio/wav;base64," + "A" * 10_000}
    assert await counter.count_input(chat([part])) == 7
    assert await counter.count_input(chat("data:x;base64,AAAA")) > 10


@pytest.mark.parametrize(("kind", "seconds"), [("wav", 4), ("mp3", 12)])
async def test_audio_counts_by_its_bytes(counter, kind, seconds):
    data = "A" * (4 * 48_000 * 4 // 3)
    audio = {"type": "input_audio", "input_audio": {"data": data, "format": kind}}
    assert await counter.count_input(chat([audio])) == 7 + 10 * seconds


@pytest.mark.parametrize(
    ("model", "size", "detail", "expected"),
    [
        ("gpt-4o", (1024, 1024), "high", 765),
        ("gpt-4o", (2048, 4096), None, 1105),
        ("gpt-4o", (4096, 8192), "low", 85),
        ("gpt-4.1-2025-04-14", (1800, 2400), "auto", 765),
        ("gpt-4.5-preview", (512, 512), "high", 255),
        ("gpt-4o-mini", (1024, 1024), "high", 2833 + 4 * 5667),
        ("gpt-4o-mini", (1024, 1024), "low", 2833),
        ("o1", (512, 512), "high", 225),
        ("o3", (1024, 1024), "high", 75 + 4 * 150),
        ("gpt-5", (1024, 1024), "high", 70 + 4 * 140),
        ("gpt-5", (1024, 1024), "low", 70),
        ("openai/gpt-4.1-mini", (1024, 1024), "high", 1659),
        ("gpt-4.1-mini", (1800, 2400), "high", 2353),
        ("gpt-4.1-nano", (1800, 2400), "high", 3572),
        ("o4-mini", (1024, 1024), "high", 1762),
        ("gpt-5-mini-2025-08-07", (32, 32), "high", 2),
        ("gpt-5-nano", (1024, 1024), "high", 2520),
        ("gpt-4.1-mini", (1, 100_000), "high", 2489),
        ("gpt-4o", (1, 100_000), "high", 765),
        ("unheard-of", (1024, 1024), "high", 765),
    ],
)
def test_an_image_costs_what_the_vision_guide_says(model, size, detail, expected):
    assert image_tokens(model, size, detail) == expected


@given(st.sampled_from(["gpt-4o", "o4-mini"]), st.integers(1, 20_000), st.integers(1, 20_000))
def test_an_image_of_any_size_stays_within_the_caps(model, width, height):
    tokens = image_tokens(model, (width, height))
    assert 1 <= tokens <= (85 + 170 * 8 if model == "gpt-4o" else 1536 * 1.72 + 1)
    assert tokens == image_tokens(model, (height, width))


@pytest.mark.parametrize(
    "url",
    [
        "https://x.test/a.png",
        "data:",
        "data:image/png;base64,",
        "data:image/png;base64,????",
        png(0, 5),
        None,
        5,
        png(9, 9)[:50],
        "data:image/svg+xml;base64," + base64.b64encode(b"<svg><").decode(),
    ],
)
async def test_an_image_of_unknown_size_has_the_default_one(counter, url):
    part = {"type": "image_url", "image_url": {"url": url}}
    assert await counter.count_input(chat([part])) == 7 + 765


@pytest.mark.parametrize(
    "url", [png(512, 400), png(512, 400, metadata=200_000), jpeg(512, 400, 1), jpeg(512, 400, 9)]
)
async def test_the_size_of_an_image_is_read_from_its_data_url(counter, url):
    part = {"type": "image_url", "image_url": {"url": url, "detail": "high"}}
    assert await counter.count_input(chat([part])) == 7 + 255
    part = {"type": "input_image", "image_url": url, "detail": "low"}
    assert await counter.count_input(chat([part])) == 7 + 85


async def test_an_unknown_model_is_logged_once(counter, caplog):
    caplog.set_level(logging.INFO, "openai_eval_client")
    for _ in range(3):
        await counter.count_text("x", "logged-once")
        await TokenCounter().count_text("x", "logged-once")
    assert [record.getMessage() for record in caplog.records] == [
        "tiktoken does not know model 'logged-once': counting with o200k_base"
    ]


async def test_a_known_model_is_never_corrected(counter):
    counted = await counter.count_input(chat("two words"))
    counter.observe("gpt-4o", counted, counted * 3)
    assert await counter.count_input(chat("two words")) == counted


async def test_an_unknown_model_learns_from_its_answers(counter):
    text = "twenty words or so " * 50
    body = chat(text, model="learner")
    counted = await counter.count_input(body)
    for _ in range(60):
        counter.observe("learner", counted, 7 + 2 * direct(text))
    assert await counter.count_input(body) == pytest.approx(7 + 2 * direct(text), rel=0.01)
    assert await counter.count_input(chat(text, model="other")) == counted


@pytest.mark.parametrize(
    ("known", "counts"),
    [
        (None, (9, 2, 0)),
        ({"prompt_tokens": 1200, "completion_tokens": None}, (1200, 2, 0)),
        ({"prompt_tokens": None, "completion_tokens": 500, "reasoning_tokens": 480}, (9, 500, 480)),
        ({"prompt_tokens": 100, "completion_tokens": "x", "total_tokens": 2150}, (100, 2050, 0)),
    ],
)
async def test_what_a_server_did_count_is_in_the_estimate(counter, known, counts):
    """Its input in place of ours, its output where that is more than the text comes to."""
    message = {"role": "assistant", "content": "hello there"}
    body = {"model": "gpt-4o", "choices": [{"index": 0, "message": message}], "usage": known}
    parameters = Parameters(api="chat", model="gpt-4o", timeout=1, body={})
    response = read_answer(
        body, parameters, usage=usage_of(body), temperature=None, request_id=None, latency=0
    )
    estimate = await counter.estimate_usage(response, 9, "flex")
    assert estimate == Usage(
        *counts[:2], reasoning_tokens=counts[2], model="gpt-4o", service_tier="flex", estimated=True
    )
    assert response.usage.total_tokens == sum(counts[:2])
    assert response.usage.estimated


async def test_a_count_of_nothing_corrects_nothing(counter):
    """No input has no tokens: it could not be read."""
    body = {"model": "acme/unknown", "prompt": "a word " * 100}
    counted = await counter.count_input(body)
    counter.observe("acme/unknown", counted, 0)
    assert await counter.count_input(body) == counted


async def test_answers_that_come_late_do_not_correct_twice(counter):
    """Many requests are counted before the first is answered: the ratio settles, and does not run away."""
    body = chat("some words to count " * 20, model="late")
    given = [await counter.count_input(body) for _ in range(200)]
    for counted in given:
        counter.observe("late", counted, 7 + (given[0] - 7) * 3 // 2)
    assert await counter.count_input(body) == pytest.approx(7 + (given[0] - 7) * 1.5, rel=0.02)


@given(st.lists(st.integers(0, 10**9), max_size=60))
@settings(max_examples=50, deadline=None)
def test_whatever_is_observed_the_ratio_keeps_its_bounds(actuals):
    async def run():
        counter = TokenCounter(load_timeout=60)
        first = await counter.count_input(chat("word " * 100, model="bounded"))
        for actual in actuals:
            counter.observe(
                "bounded", await counter.count_input(chat("word " * 100, model="bounded")), actual
            )
        last = await counter.count_input(chat("word " * 100, model="bounded"))
        assert 7 + (first - 7) // 4 <= last <= 7 + (first - 7) * 4 + 1  # counts are rounded

    asyncio.run(run())


@pytest.mark.parametrize("observation", [("never-counted", 5, 9), ("gpt-4o", 1, 9)])
def test_an_answer_to_what_was_never_counted_is_ignored(counter, observation):
    counter.observe(*observation)


async def test_short_texts_are_counted_at_once_and_long_ones_are_not(counter):
    assert await counter.count_input(chat("x")) == 8
    assert counter.count_input_now(chat("x")) == 8
    assert counter.count_input_now(chat("x" * 30_000)) is None
    assert counter.count_input_now(chat("x", model="not-yet-looked-up")) is None


@pytest.mark.parametrize(
    "text", ["a" * 1_000_000, " " * 1_000_000, "some words " * 90_000], ids=["a", " ", "prose"]
)
async def test_a_huge_text_does_not_hold_up_the_loop(counter, text):
    """A million spaces at once would overflow tiktoken's stack; slices do not, and the heart beats on."""
    beats = 0

    async def beat():
        nonlocal beats
        while True:
            await asyncio.sleep(0)
            beats += 1

    await counter.count_text("x", "gpt-4o")
    heart = asyncio.create_task(beat())
    tokens = await counter.count_input(chat(text))
    heart.cancel()
    assert beats > 20
    assert tokens > 5_000


async def test_a_text_beyond_any_answer_is_counted_in_samples(counter):
    """So many slices are encoded, whatever its length; a budget reserves a token for each of its bytes."""
    text = "some words, and more. " * 500_000
    await counter.count_text("x", "gpt-4o")
    vocabulary = counter_module._VOCABULARIES.find("gpt-4o").vocabulary
    with pytest.MonkeyPatch.context() as patch:
        encoded = []
        encode = vocabulary._encode
        patch.setattr(vocabulary, "_encode", lambda piece: encoded.append(len(piece)) or encode(piece))
        tokens = await counter.count_text(text, "gpt-4o")
        assert sum(encoded) == 1_000_000
        assert 0.98 < tokens / (6 * 500_000) < 1.02
        assert counter.most_input_now(chat(text)) >= len(text)
        assert sum(encoded) == 1_000_000


@pytest.mark.parametrize("unit", ["some words, and more. ", "中文字典", "-=", "a", "x  \n\n", "12345 "])
async def test_slices_of_a_long_text_add_next_to_nothing(counter, unit):
    text = unit * (260_000 // len(unit))
    sliced = await counter.count_text(text, "gpt-4o")
    assert 0 <= sliced - direct(text) <= 4 * 26


@given(st.text(min_size=64, max_size=600))
@settings(deadline=None)
def test_a_text_seen_again_costs_the_same(text):
    async def run():
        counter = TokenCounter(load_timeout=60)
        return [await counter.count_text(text[:] + "", "gpt-4o") for _ in range(2)]

    assert asyncio.run(run()) == [direct(text)] * 2


def test_several_loops_and_threads_share_one_counter(counter):
    bodies = [chat(f"prompt {index} " * 40, model=f"shared-{index % 3}") for index in range(200)]
    expected = [7 + direct(body["messages"][0]["content"]) for body in bodies]
    results = []

    async def count_all():
        return await asyncio.gather(*map(counter.count_input, bodies))

    threads = [threading.Thread(target=lambda: results.append(asyncio.run(count_all()))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 4


async def test_without_a_vocabulary_four_bytes_are_a_token(empty_vocabularies, caplog):
    counter = TokenCounter()
    counts = await asyncio.gather(*(counter.count_text("12345678", "gpt-4o") for _ in range(20)))
    assert counts == [2] * 20
    assert await counter.count_text("中文字典", "gpt-4o") == 3
    assert await counter.count_text("\ud800", "gpt-4o") == 1
    assert counter.count_input_now(chat("12345678" * 10_000)) == 20_000 + 3 + 1 + 3
    warnings = [record.getMessage() for record in caplog.records]
    assert warnings == ["no token vocabulary o200k_base (ProxyError): token counts are estimates"]
    assert list(empty_vocabularies.iterdir()) == []


@pytest.mark.usefixtures("empty_vocabularies")
async def test_without_a_vocabulary_answers_correct_the_estimate_of_any_model():
    counter = TokenCounter()
    body = chat("12345678" * 50)
    for _ in range(60):
        counter.observe("gpt-4o", await counter.count_input(body), 7 + 150)
    assert await counter.count_input(body) == pytest.approx(157, abs=2)


async def test_a_download_that_hangs_is_waited_for_once(empty_vocabularies, monkeypatch, caplog):
    """The proxy takes the connection and never answers; when it hangs up, the thread ends."""
    assert empty_vocabularies.exists()
    with socket.create_server(("127.0.0.1", 0)) as server:
        for proxy in ("HTTPS_PROXY", "https_proxy"):
            monkeypatch.setenv(proxy, f"http://127.0.0.1:{server.getsockname()[1]}")
        counter = TokenCounter(load_timeout=0.05)
        assert counter.count_input_now(chat("12345678")) is None
        assert await asyncio.gather(*(counter.count_input(chat("12345678")) for _ in range(5))) == [9] * 5
        assert counter.count_input_now(chat("12345678")) == 9
    for thread in threading.enumerate():
        if thread.name.startswith("tiktoken-"):
            await asyncio.to_thread(thread.join)
    assert [record.getMessage() for record in caplog.records] == [
        "no token vocabulary o200k_base (it takes too long): token counts are estimates"
    ]


@pytest.mark.usefixtures("empty_vocabularies")
async def test_a_vocabulary_that_arrives_late_is_used_from_then_on(vocabularies, monkeypatch):
    arrived = threading.Event()
    loading = tiktoken.get_encoding

    def late(name):
        arrived.wait()
        return loading(name)

    monkeypatch.setattr(tiktoken, "get_encoding", late)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(vocabularies))
    counter = TokenCounter(load_timeout=0.01)
    text = "an estimate is not a count"
    assert await counter.count_text(text, "gpt-4o") == 7
    arrived.set()
    for thread in threading.enumerate():
        if thread.name.startswith("tiktoken-"):
            await asyncio.to_thread(thread.join)
    assert await counter.count_text(text, "gpt-4o") == direct(text)


async def test_a_cancelled_waiter_leaves_the_vocabulary_to_the_others(
    empty_vocabularies, vocabularies, monkeypatch
):
    assert empty_vocabularies.exists()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(vocabularies))
    counter = TokenCounter(load_timeout=60)
    waiters = [asyncio.create_task(counter.count_text("two words", "gpt-4o")) for _ in range(2)]
    await asyncio.sleep(0)
    waiters[0].cancel()
    assert await waiters[1] == 2
    assert waiters[0].cancelled()


def test_old_models_never_asked_again_are_forgotten():
    bounded = {}
    for key in range(10):
        put(bounded, key, key, 3)
    assert bounded == {7: 7, 8: 8, 9: 9}


def test_importing_the_modules_imports_nothing_heavy():
    program = (
        "import sys; from openai_eval_client import _cost, _tokens;"
        "print(sorted({'tiktoken', 'genai_prices', 'imagesize', 'requests'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
