"""Every fault of a generation, as the SDK and as a raw client meet it."""

import asyncio
import json
from contextlib import suppress
from http.client import HTTPException, IncompleteRead, RemoteDisconnected

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion
from simulated_calls import CHAT, COMPLETIONS, client, events_of, send, until

from openai_eval_client.testing import SimulatedServer
from openai_eval_client.testing._faults import FAULTS, Faults, Latency, masked


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
    """A fault named after a status is that error for the SDK, and only once."""
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
    """`unavailable_retry_after` is the retry-after of a 503."""
    with SimulatedServer(script=["503", "503"], unavailable_retry_after=0.5) as server:
        assert send(server)[1]["retry-after"] == "0.5"


async def test_the_sdk_retries_what_fails():
    """The SDK's own retries get past a 500 and a dropped connection."""
    with SimulatedServer(script=["500", "drop", "ok"]) as server:
        async with client(server, max_retries=2) as sdk:
            completion = await sdk.chat.completions.create(**CHAT)
        assert completion.choices[0].message.content == "echo: hello there"
        assert [call.status for call in server.calls] == [500, 0, 200]
        assert server.counts == {"500": 1, "drop": 1, "200": 1}
        assert server.calls[1].completion_tokens == 0


def test_drop_closes_without_an_answer():
    """A dropped connection costs nothing and is no longer in flight."""
    with SimulatedServer(script=["drop"], charge="actual", tpm=1000) as server:
        with pytest.raises((RemoteDisconnected, ConnectionResetError)):
            send(server)
        assert server.calls[0].charged_tokens == 0
        assert (server.in_flight, server.max_in_flight) == (0, 1)


async def test_hang_lasts_until_the_client_leaves():
    """A request that hangs is in flight until its client leaves."""
    with SimulatedServer(script=["hang"]) as server:
        async with client(server) as sdk:
            with pytest.raises(openai.APITimeoutError):
                await sdk.chat.completions.create(**CHAT, timeout=0.4)
        await until(lambda: not server.in_flight)
        assert server.counts == {"hang": 1}
        assert server.calls[0].status == 0


async def test_hang_lasts_until_the_server_stops():
    """Stopping the server closes a connection that hangs."""
    server = SimulatedServer(script=["hang"]).start()
    waiting = asyncio.create_task(asyncio.to_thread(send, server))
    await until(lambda: server.counts)
    assert (server.in_flight, server.connections) == (1, 1)
    server.stop()
    with pytest.raises((RemoteDisconnected, ConnectionResetError)):
        await waiting


async def test_a_client_that_leaves_early_is_a_disconnect():
    """A client that gives up before the answer is no fault."""
    with SimulatedServer(latency=1000) as server:
        async with client(server) as sdk:
            with pytest.raises(openai.APITimeoutError):
                await sdk.chat.completions.create(**CHAT, timeout=0.4)
        await until(lambda: not server.in_flight)
        assert server.counts == {"disconnect": 1}
        assert (server.calls[0].status, server.calls[0].fault) == (0, None)


@pytest.mark.parametrize("stream", [False, True])
def test_truncate_ends_in_the_middle_of_the_body(stream):
    """A truncated body is shorter than announced, and counts as served."""
    with SimulatedServer(script=["truncate"]) as server:
        with pytest.raises((IncompleteRead, ConnectionResetError)) as caught:
            send(server, {**CHAT, "stream": stream})
        if isinstance(caught.value, IncompleteRead):
            assert caught.value.partial
        assert server.counts == {"200": 1, "truncate": 1}
        assert server.calls[0].served


@pytest.mark.parametrize("stream", [False, True])
def test_garbage_is_a_200_of_html(stream):
    """Garbage is a page of HTML, even if a stream was asked for."""
    with SimulatedServer(script=["garbage"]) as server:
        status, headers, raw = send(server, {**CHAT, "stream": stream})
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert raw.startswith(b"<html>")


def test_cut_json_is_well_framed_and_ends_early():
    """The length is right, but the JSON ends in the middle."""
    with SimulatedServer(script=["cut_json"] * 2) as server:
        _, headers, raw = send(server)
        _, _, streamed = send(server, {**CHAT, "stream": True})
    assert int(headers["content-length"]) == len(raw)
    with pytest.raises(ValueError, match=r"Unterminated|Expecting"):
        json.loads(raw)
    assert "[DONE]" not in events_of(streamed)


def test_slow_drip_arrives_whole():
    """A body that comes byte by byte is complete."""
    with SimulatedServer(script=["slow_drip"]) as server:
        status, _, raw = send(server)
        assert (status, server.counts) == (200, {"200": 1, "slow_drip": 1})
    assert ChatCompletion.model_validate_json(raw).choices


def test_malformed_headers_come_with_a_good_answer():
    """The headers make no sense, the body does."""
    with SimulatedServer(script=["malformed_headers"], rpm=100) as server:
        status, headers, raw = send(server)
    assert (status, headers["x-ratelimit-limit-requests"]) == (200, "many")
    assert headers["retry-after"] == "the day after tomorrow"
    assert ChatCompletion.model_validate_json(raw).choices


@pytest.mark.parametrize(
    ("path", "body"), [(COMPLETIONS, CHAT), ("/responses", {"model": "m", "input": "x"})]
)
def test_usage_can_be_null_or_missing(path, body):
    """Usage is null or missing, streamed or not; the tokens are counted all the same."""
    with SimulatedServer(script=["null_usage", "no_usage"] * 2) as server:
        null, missing = json.loads(send(server, body, path)[2]), json.loads(send(server, body, path)[2])
        streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
        for _ in range(2):
            assert '"total_tokens"' not in send(server, streamed, path)[2].decode()
        assert all(call.completion_tokens for call in server.calls)
    assert null["usage"] is None
    assert "usage" not in missing


def test_faults_and_latencies_repeat_with_the_seed():
    """The same seed draws the same faults and latencies, as often as they should be."""
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
                send(server, {**CHAT, "stream": stream, "service_tier": "flex"}, timeout=0.4)
        assert send(server)[0] == 200
        assert server.counts[fault] == 2


@given(st.text(min_size=1))
def test_a_masked_key_keeps_its_length_and_hides_something(key):
    """No key longer than two characters is shown whole."""
    assert len(masked(key)) == len(key)
    assert len(key) <= 2 or "*" in masked(key)
