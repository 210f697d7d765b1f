"""Which requests are the same, and which of several same ones one is."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from openai_eval_client._cache.cache import Occurrence, Occurrences, is_sampled, normalised, request_digest
from openai_eval_client._wire.requests import check_parameters

URL = "https://api.openai.com/v1"


def parameters(api: str = "chat", **given):
    named = {"model": "m", "timeout": 5.0, "temperature": None, "max_tokens": None, "system": None}
    named |= {name: given.pop(name) for name in list(given) if name in named}
    return check_parameters(**named, api=api, params=given)


def digest(prompt="hello", url: str = URL, version: int = 2, **given):
    asked = parameters(**given)
    return request_digest(normalised(url), asked, asked.with_prompt(prompt), version)


class Label(BaseModel):
    label: str


class Score(BaseModel):
    score: int


# --- the same request -------------------------------------------------------------------------------------

DIFFERENT = [
    {"prompt": "hello "},
    {"prompt": [{"role": "system", "content": "hello"}]},
    {"model": "n"},
    {"temperature": 0.5},
    {"temperature": 0},
    {"max_tokens": 5},
    {"max_completion_tokens": 5},
    {"system": "Be brief."},
    {"api": "responses"},
    {"seed": 1},
    {"n": 2},
    {"stop": ["x"]},
    {"logprobs": True},
    {"reasoning_effort": "low"},
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": 1}}}]},
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": 2}}}]},
    {"response_format": Label},
    {"response_format": Score},
    {"extra_body": {"top_k": 5}},
    {"extra_body": {"top_k": 5, "tags": {"metadata": "x"}}},
    {"extra_body": {"cache_salt": "x"}},
    {"extra_query": {"api-version": "1"}},
    {"extra_headers": {"openai-beta": "x"}},
    {"extra_headers": {"x-api-key-of": "x"}},
    {"url": "https://api.openai.com/v2"},
    {"url": "http://api.openai.com/v1"},
    {"url": "https://api.openai.com:8443/v1"},
]


def test_everything_that_can_change_the_answer_makes_another_request() -> None:
    """No two of them, and none of them and the plain request, have one key."""
    digests = [digest(), *(digest(**options) for options in DIFFERENT)]
    assert len(set(digests)) == len(DIFFERENT) + 1


@pytest.mark.parametrize(
    "options",
    [
        {"prompt": [{"role": "user", "content": "hello"}]},
        {"prompt": [{"content": "hello", "role": "user"}]},
        {"timeout": 99.0},
        {"seed": None},
        {"url": "https://api.openai.com/v1/"},
        {"url": "HTTPS://API.OpenAI.com:443/v1"},
        {"extra_headers": {"Authorization": "Bearer x", "X-Request-ID": "7", "traceparent": "00-1"}},
        {"extra_headers": {"X-Api-Key": "x", "HTTP-Referer": "x", "X-Title": "x", "User-Agent": "x"}},
        {"extra_headers": {"X-Stainless-Retry-Count": "1", "X-B3-TraceId": "x", "baggage": "x=y"}},
        {"extra_query": {"api-key": "x"}},
        {"metadata": {"run": "2026-10-01"}},
        {"user": "someone"},
        {"safety_identifier": "someone"},
        {"prompt_cache_key": "x"},
        {"extra_body": {"prompt_cache_retention": "24h"}},
        {"extra_body": {"prompt_cache_options": {"ttl": "1h"}}},
        {"store": True},
        {"service_tier": "flex"},
        {"extra_body": {"stream_options": {"include_usage": True}}},
        {"extra_body": {"background": True}},
    ],
    ids=str,
)
def test_what_cannot_change_the_answer_does_not(options) -> None:
    """Other ways to write it, the timeout, account and name of the request, how it is billed and kept."""
    assert digest(**options) == digest()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "e4a9ba76bcddfba48d2d652cd8f56d9ae495c8c7b0352d2e8912cf7aa1986867"),
        (
            {
                "metadata": {"run": "1"},
                "extra_headers": {"X-A": "b", "User-Agent": "x"},
                "extra_query": {"api-key": "k"},
                "temperature": 1,
                "service_tier": "flex",
            },
            "9f4122d769d7932f34dee0fb10144560e328877a4c20b63c80568da226ba7bbf",
        ),
        (
            {"prompt": "é", "api": "responses", "max_tokens": 5, "extra_body": {"a": {1: 2, "b": 1.0}}},
            "2e2e8050692855f2cf7fd99ff8b8d854879e84da6193f9ba02c26f4e1b4bed50",
        ),
    ],
)
def test_version_1_of_the_key_stays_as_it_was(options, expected) -> None:
    """Files that hold such keys are still read."""
    assert digest(version=1, **options).hex() == expected
    assert digest(**options).hex() != expected


def test_the_key_of_a_sample_stays_as_it_was() -> None:
    """Of both versions."""
    key = Occurrence(digest(version=1), 3, sampled=True).key
    assert key.hex() == "fc02f19209385e5d001365ec40e8a1ae07c6cc1e2cd77108bbaa09476ef80329"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"temperature": 1}, {"extra_body": {"temperature": 1.0}}),
        ({"extra_headers": {"OpenAI-Beta": "x"}}, {"extra_headers": {"openai-beta": "x"}}),
        ({"max_tokens": 5, "seed": 1}, {"seed": 1, "max_tokens": 5}),
        (
            {"tools": [{"type": "x", "y": {"a": 1, "b": 2}}]},
            {"tools": [{"y": {"b": 2, "a": 1}, "type": "x"}]},
        ),
        ({"extra_body": {"bias": {1: 2, "b": 3}}}, {"extra_body": {"bias": {"b": 3, 1: 2}}}),
    ],
    ids=str,
)
def test_two_ways_to_write_one_request(one, other) -> None:
    """Order, spelling and the type of a number do not count."""
    assert digest(**one) == digest(**other)


def test_a_query_of_any_objects_has_a_key() -> None:
    """extra_query takes what the HTTP library takes."""
    assert digest(extra_query={"at": b"x"}) != digest(extra_query={"at": b"y"})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(body=st.dictionaries(st.text(), JSON, max_size=4))
def test_the_key_depends_on_the_meaning_of_the_body_alone(body) -> None:
    """Written as JSON and read again, in another order, it is the same request."""
    asked = parameters()
    again = dict(reversed(json.loads(json.dumps(body)).items()))
    assert request_digest(URL, asked, body) == request_digest(URL, asked, again)


@given(one=st.dictionaries(st.text(), JSON, max_size=3), other=st.dictionaries(st.text(), JSON, max_size=3))
def test_other_bodies_have_other_keys(one, other) -> None:
    """Unless they are equal; True is not 1."""
    asked = parameters()
    same = request_digest(URL, asked, one) == request_digest(URL, asked, other)
    assert same <= (one == other)


def test_query_headers_and_body_are_not_confused() -> None:
    """The same name and value in another place is another request."""
    asked = parameters()
    places = [
        replace(asked, query={"x": "1"}),
        replace(asked, headers={"x": "1"}),
        replace(asked, body={**asked.body, "x": "1"}),
    ]
    assert len({request_digest(URL, place, place.with_prompt("hello")) for place in places}) == 3


def test_each_sample_has_a_key_of_its_own() -> None:
    """Of 32 bytes."""
    keys = {Occurrence(digest(prompt), number, sampled=True).key for prompt in "ab" for number in range(20)}
    assert len(keys) == 40
    assert {len(key) for key in keys} == {32}


@pytest.mark.parametrize(
    ("body", "sampled"),
    [
        ({}, True),
        ({"temperature": 0.7}, True),
        ({"temperature": 0}, False),
        ({"temperature": 0.0}, False),
        ({"seed": 0}, False),
        ({"temperature": 1, "seed": 3}, False),
        ({"temperature": None, "seed": None}, True),
    ],
)
def test_what_is_sampled(body, sampled) -> None:
    """At temperature 0 and with a seed there is one answer."""
    assert is_sampled(body) is sampled


# --- samples ----------------------------------------------------------------------------------------------

A, B, C = (bytes([n]) * 32 for n in (1, 2, 3))


def test_samples_are_numbered_in_the_order_asked_for() -> None:
    """Each request from 0."""
    samples, call = Occurrences(), object()
    assert [samples.take(name, call) for name in (A, B, A, A, C, B)] == [0, 0, 1, 2, 0, 1]


def test_a_failed_sample_is_asked_for_again_by_another_call() -> None:
    """The lowest first; within its own call the numbers follow the order of the prompts alone."""
    samples, first, second = Occurrences(), object(), object()
    assert [samples.take(A, first) for _ in range(3)] == [0, 1, 2]
    samples.give_back(A, 1, first)
    samples.give_back(A, 0, first)
    assert samples.take(A, first) == 3
    assert [samples.take(A, second) for _ in range(3)] == [0, 1, 4]


@given(
    st.lists(
        st.tuples(st.sampled_from([A, B]), st.sampled_from("xyz"), st.booleans()), min_size=1, max_size=40
    )
)
def test_no_sample_is_asked_for_twice_unless_it_failed(steps) -> None:
    """Whatever the order of calls and failures: what was answered is not given out again, none is skipped."""
    samples, answered, given_out = Occurrences(), set(), {A: set(), B: set()}
    for name, call, fails in steps:
        number = samples.take(name, call)
        assert (name, number) not in answered
        given_out[name].add(number)
        if fails:
            samples.give_back(name, number, call)
        else:
            answered.add((name, number))
    for numbers in given_out.values():
        assert numbers == set(range(len(numbers)))


def test_two_hundred_thousand_requests_take_little_memory() -> None:
    """A few megabytes, and none is forgotten."""
    names = [Occurrence(A, number, sampled=True).key for number in range(200_000)]
    samples, call = Occurrences(), object()
    tracemalloc.start()
    try:
        assert {samples.take(name, call) for name in names} == {0}
        grown, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert grown < 5_000_000
    assert {samples.take(name, call) for name in names[::1000]} == {1}
