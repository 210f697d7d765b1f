"""Calls to the simulated Files and Batches endpoints: downloads, faults, and what carries no limits."""

import asyncio
import json
import socket
from http.client import IncompleteRead
from urllib.parse import urlsplit

import openai
import pytest
from simulated_batches import GOOD, LONG, MULTIPART, form, request, several, submit, upload
from simulated_calls import client

from openai_eval_client.testing import SimulatedServer
from openai_eval_client.testing._options import ENDPOINTS, endpoint_events


@pytest.fixture
def server():
    with SimulatedServer(batch_seconds=0.02) as running:
        yield running


def test_wrong_methods_are_405(server):
    """An unknown method on a path of files or batches is a 405."""
    assert request(server, "/files", "PUT")[0] == 405
    assert request(server, "/batches/x/cancel", "DELETE")[0] == 405
    assert request(server, "/files/x/content", "POST")[0] == 405


@pytest.fixture
def numbers(server):
    """A server with a file of three pieces, and that file's path."""
    content = b"".join(b"%09d\n" % number for number in range(80_000))
    _, _, raw = request(server, "/files", "POST", form(content), content_type=MULTIPART)
    return server, f"/files/{json.loads(raw)['id']}/content", content


@pytest.mark.parametrize(
    ("wanted", "first", "end"),
    [
        ("bytes=0-", 0, 800_000),
        ("bytes=10-", 10, 800_000),
        ("bytes=799999-", 799_999, 800_000),
        ("bytes=10-19", 10, 20),
        ("bytes=-5", 799_995, 800_000),
        ("bytes=x", 0, 800_000),
    ],
)
def test_the_rest_of_a_file(numbers, wanted, first, end):
    """A range returns its bytes; one that cannot be read returns the whole file."""
    server, path, content = numbers
    status, headers, raw = request(server, path, range=wanted)
    assert raw == content[first:end]
    whole = len(raw) == len(content)
    assert status == (200 if whole else 206)
    assert headers.get("content-range") == (None if whole else f"bytes {first}-{end - 1}/800000")
    assert headers["accept-ranges"] == "bytes"


def test_nothing_is_left_of_a_file(numbers):
    """A range beyond the end is a 416 with the size."""
    server, path, _ = numbers
    status, headers, _ = request(server, path, range="bytes=800000-")
    assert (status, headers["content-range"]) == (416, "bytes */800000")


def test_ranges_can_be_ignored():
    """Without `ranges` the whole file is sent."""
    with SimulatedServer(ranges=False) as server:
        _, _, raw = request(server, "/files", "POST", form(b"0123456789"), content_type=MULTIPART)
        status, headers, raw = request(server, f"/files/{json.loads(raw)['id']}/content", range="bytes=5-")
        assert (status, raw) == (200, b"0123456789")
        assert "accept-ranges" not in headers


def test_a_download_breaks_off_and_is_resumed():
    """All bytes are announced, half of them come; a range fetches the others."""
    with SimulatedServer(endpoint_script={"content": ["truncate", "truncate"]}) as server:
        content = b"%d" * 500_000
        _, _, raw = request(server, "/files", "POST", form(content), content_type=MULTIPART)
        path, got = f"/files/{json.loads(raw)['id']}/content", b""
        for _ in range(2):
            with pytest.raises(IncompleteRead) as caught:
                request(server, path, **({"range": f"bytes={len(got)}-"} if got else {}))
            got += caught.value.partial
        assert len(got) == 750_000
        assert got + request(server, path, range=f"bytes={len(got)}-")[2] == content
        assert [call.fault for call in server.calls][1:] == ["truncate", "truncate", None]
        assert server.in_flight == 0


async def test_a_client_may_leave_a_download(server, caplog):
    """A download that is given up is neither in flight nor logged."""
    _, _, raw = request(server, "/files", "POST", form(bytes(20_000_000)), content_type=MULTIPART)
    url, path = urlsplit(server.base_url), f"/v1/files/{json.loads(raw)['id']}/content"
    with socket.create_connection((url.hostname, url.port)) as leaving:
        leaving.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nauthorization: Bearer k\r\n\r\n".encode())
        assert leaving.recv(100).startswith(b"HTTP/1.1 200")
    while server.connections or server.in_flight:
        await asyncio.sleep(0)
    assert server.counts == {"200": 2}
    assert caplog.records == []


async def called(sdk, name, file, batch):
    """One call of the endpoint of this name."""
    calls = {
        "upload": lambda: upload(sdk, several(1)),
        "create": lambda: sdk.batches.create(input_file_id=file.id, **GOOD),
        "list": sdk.batches.list,
        "list_files": sdk.files.list,
        "retrieve_file": lambda: sdk.files.retrieve(file.id),
        "content": lambda: sdk.files.content(file.id),
        "delete": lambda: sdk.files.delete(file.id),
        "retrieve": lambda: sdk.batches.retrieve(batch.id),
        "cancel": lambda: sdk.batches.cancel(batch.id),
    }
    return await calls[name]()


def effects(server, batch_id):
    """What calls can change: files, batches, and whether the first is cancelled."""
    files = json.loads(request(server, "/files")[2])["data"]
    batches = {batch["id"]: batch for batch in server.batches}
    return len(files), len(batches), batches[batch_id]["cancelling_at"] is not None


CHANGED = {"upload": (2, 1, False), "create": (1, 2, False), "cancel": (1, 1, True), "delete": (0, 1, False)}


@pytest.mark.parametrize("name", [name for name in ENDPOINTS if not name.endswith("_response")])
async def test_faults_of_every_endpoint(name):
    """Each is what it says, once, and with or without the effect of the call."""
    for fault in endpoint_events(name):
        script = {name: [*(["ok"] if name in ("upload", "create") else []), fault]}
        faulty = SimulatedServer(batch_seconds=LONG, endpoint_script=script)
        async with faulty as server, client(server) as sdk:
            file = await upload(sdk, several(1))
            batch = await sdk.batches.create(input_file_id=file.id, **GOOD)
            with pytest.raises(openai.OpenAIError) as caught:
                await called(sdk.with_options(timeout=0.2 if "hang" in fault else 30), name, file, batch)
            unchanged = (1, 1, False)
            kept = effects(server, batch.id) if name != "list_files" else unchanged
            assert kept == (CHANGED.get(name, unchanged) if fault.endswith("_after") else unchanged)
            if name != "delete":
                await called(sdk, name, file, batch)
        check_fault(fault, caught.value)
        assert [call.fault for call in server.calls if call.fault] == [fault]


def check_fault(fault, error):
    kind = fault.removesuffix("_after")
    if kind.isdigit():
        assert error.status_code == int(kind)
    elif kind == "hang":
        assert isinstance(error, openai.APITimeoutError)
    else:
        assert isinstance(error, openai.APIConnectionError)


async def test_a_retried_creation_creates_two_batches():
    """What a client must guard against: the answer was lost, the batch was not."""
    script = {"create": ["drop_after"]}
    async with SimulatedServer(endpoint_script=script) as server, client(server, max_retries=1) as sdk:
        await submit(sdk, several(1), metadata={"intent": "one"})
        assert [batch["metadata"] for batch in server.batches] == [{"intent": "one"}] * 2


async def test_faults_of_endpoints_are_drawn_at_random():
    """Faults come about as often as they should, and only for their endpoint."""
    faults = {"retrieve": {"500": 0.3, "503": 0.2}}
    async with (
        SimulatedServer(endpoint_faults=faults, unavailable_retry_after=7) as server,
        client(server) as sdk,
    ):
        batch = await submit(sdk, several(1))
        for _ in range(200):
            status, headers, _ = request(server, f"/batches/{batch.id}")
            assert headers.get("retry-after") == ("7" if status == 503 else None)
    assert 40 < server.counts["500"] < 80
    assert 25 < server.counts["503"] < 60
    assert {call.path.split("/")[2] for call in server.calls if call.fault} == {"batches"}


def test_calls_of_files_and_batches_carry_no_limits():
    """Files and batches are not rate limited."""
    with SimulatedServer(rpm=1, tpm=10) as server:
        for _ in range(3):
            status, headers, _ = request(server, "/batches")
            assert status == 200
            assert headers["x-request-id"].startswith("req_")
            assert not [name for name in headers if name.startswith("x-ratelimit")]
