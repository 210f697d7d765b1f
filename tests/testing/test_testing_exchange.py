"""What is recorded of each call, and how calls in flight are counted."""

import asyncio

import pytest
from simulated_calls import CHAT, client, send

from openai_eval_client.testing import SimulatedServer


@pytest.fixture
def server():
    with SimulatedServer() as running:
        yield running


def test_calls_tell_what_came(server):
    """A call holds what was asked, what came of it, and no key."""
    send(server, headers={"X-Custom": "yes"})
    send(server, path="/nowhere", body=None)
    first, second = server.calls
    assert (first.index, first.method, first.path) == (0, "POST", "/v1/chat/completions")
    assert (first.model, first.status, first.fault) == ("m", 200, None)
    assert (first.prompt_tokens, first.completion_tokens, first.charged_tokens) == (8, 3, 24)
    assert first.body == CHAT
    assert first.headers["x-custom"] == "yes"
    assert "authorization" not in first.headers
    assert (second.status, second.model, second.body) == (404, None, None)
    assert 0 <= first.at <= second.at


def test_only_the_newest_calls_are_kept():
    """Older calls are dropped, but still counted."""
    with SimulatedServer(record=2) as server:
        for _ in range(3):
            send(server)
        assert [call.index for call in server.calls] == [1, 2]
        assert server.counts == {"200": 3}


async def test_concurrency_is_counted():
    """Requests in flight and connections are counted as they come and go."""
    with SimulatedServer(latency=0.5, latency_sigma=0) as server:
        async with client(server) as sdk:
            await asyncio.gather(*(sdk.chat.completions.create(**CHAT) for _ in range(5)))
            assert server.max_in_flight == 5
            assert server.connections == 5
        assert server.in_flight == 0
