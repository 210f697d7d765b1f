"""The simulated server as users hold it: started, stopped, and looked at."""

import asyncio
import gc
import json
import socket
import threading
from urllib.parse import urlsplit

import pytest
from openai.types import Batch
from simulated_batches import LONG, finished, request, several, submit
from simulated_calls import CHAT, client, send

from openai_eval_client.testing import SimulatedServer


def test_start_and_stop_can_be_repeated():
    """A second start or stop changes nothing; a new start begins at zero."""
    server = SimulatedServer()
    with pytest.raises(RuntimeError, match="not running"):
        _ = server.base_url
    assert server.start() is server
    url = server.base_url
    assert server.start().base_url == url
    send(server)
    server.stop()
    server.stop()
    assert server.counts == {"200": 1}
    assert (len(server.calls), server.connections) == (1, 0)
    with server:
        assert server.counts == {}


async def test_async_with():
    """The server starts and stops without blocking an event loop."""
    async with SimulatedServer() as server, client(server) as sdk:
        assert (await sdk.chat.completions.create(**CHAT)).choices


def test_stop_leaves_no_thread_and_no_socket():
    """Idle connections are closed, and the thread has ended."""
    before = set(threading.enumerate())
    with SimulatedServer() as server:
        url = urlsplit(server.base_url)
        idle = socket.create_connection((url.hostname, url.port), timeout=30)
        send(server)
    with idle:
        assert idle.recv(1) == b""
    assert set(threading.enumerate()) == before
    del server
    gc.collect()  # what is unclosed warns here, and warnings are errors


@pytest.mark.parametrize("process", [False, True])
async def test_batches_can_be_looked_at_while_running_and_after(process):
    """`batches` is the same in a thread, in a process, after a reset and after the end."""
    options = {"batch_seconds": 0.02, "batch_plans": [{"status": "expired", "lines": ("ok", "expired")}]}
    async with SimulatedServer(process=process, completion_windows={"24h"}, **options) as server:
        assert server.batches == []
        async with client(server) as sdk:
            first = await finished(sdk, several(2), metadata={"intent": "a"})
            second = await finished(sdk, several(2), metadata={"intent": "b"})
        running = await asyncio.to_thread(lambda: server.batches)
        await asyncio.to_thread(server.reset)
        assert await asyncio.to_thread(lambda: server.batches) == running
        assert await asyncio.to_thread(lambda: len(json.loads(request(server, "/files")[2])["data"])) == 5
    assert server.batches == running
    assert [batch["id"] for batch in running] == [first.id, second.id]
    assert [batch["status"] for batch in running] == ["expired", "completed"]
    assert running[0]["request_counts"] == {"total": 2, "completed": 1, "failed": 1}
    assert Batch.model_validate(running[0]) == first


async def test_what_is_looked_at_is_a_copy():
    """Changing what `batches` returns does not change the server."""
    async with SimulatedServer(batch_seconds=0.02) as server, client(server) as sdk:
        await submit(sdk, several(1), metadata={"intent": "a"})
        server.batches[0]["metadata"].clear()
        assert server.batches[0]["metadata"] == {"intent": "a"}


async def test_batches_can_be_looked_at_from_within_an_answer():
    """The server's own thread may read `batches`."""
    seen = []

    def answer(_body):
        seen.append(server.batches[0]["status"])
        return "yes"

    async with SimulatedServer(batch_seconds=0, answer=answer) as server, client(server) as sdk:
        await finished(sdk, several(2))
    assert seen == ["in_progress", "in_progress"]


async def test_a_server_stops_under_batches():
    """A stopped server shows its batches as they were."""
    async with SimulatedServer(batch_seconds=LONG) as server, client(server) as sdk:
        batch = await submit(sdk, several(3000))
        await sdk.batches.cancel((await submit(sdk, several(1))).id)
    assert [shown["status"] for shown in server.batches] == ["validating", "cancelling"]
    assert server.batches[0]["id"] == batch.id
