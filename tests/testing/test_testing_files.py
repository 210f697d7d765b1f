"""Simulated files: uploaded, listed, deleted, and unknown for a while."""

import asyncio
import json
import socket
from collections import Counter
from contextlib import suppress
from http.client import HTTPConnection
from urllib.parse import urlsplit

import openai
import pytest
from simulated_batches import GOOD, LONG, MULTIPART, finished, form, request, several, upload
from simulated_calls import Clock, client, error_of

from openai_eval_client.testing import SimulatedServer
from openai_eval_client.testing._batches import files as files_module
from openai_eval_client.testing._batches.files import Files, Form
from openai_eval_client.testing._faults import ApiError


@pytest.fixture
def server():
    with SimulatedServer(batch_seconds=0.02) as running:
        yield running


async def test_files_are_listed_found_and_deleted(server):
    """Files are listed by purpose and order; a deleted one is a 404."""
    async with client(server) as sdk:
        first = await upload(sdk, b"1")
        second = await upload(sdk, b"2", purpose="user_data")
        assert [file.id async for file in sdk.files.list()] == [second.id, first.id]
        assert [file.id async for file in sdk.files.list(order="asc")] == [first.id, second.id]
        assert [file.id async for file in sdk.files.list(purpose="batch")] == [first.id]
        assert (await sdk.files.retrieve(second.id)).purpose == "user_data"
        assert (await sdk.files.content(first.id)).content == b"1"
        assert (await sdk.files.delete(first.id)).deleted
        for gone in (sdk.files.retrieve, sdk.files.content, sdk.files.delete):
            with pytest.raises(openai.NotFoundError, match=f"No such File object: {first.id}"):
                await gone(first.id)
        assert [file.id async for file in sdk.files.list()] == [second.id]
        for unknown in (sdk.batches.retrieve, sdk.batches.cancel):
            with pytest.raises(openai.NotFoundError, match="No batch found with id 'batch_gone'"):
                await unknown("batch_gone")


@pytest.mark.parametrize(
    ("body", "kind", "param"),
    [
        (form(b"x", name=b"other"), MULTIPART, "file"),
        (form(b"x", purpose=b"unheard-of"), MULTIPART, "purpose"),
        (b"--B\r\ncontent-disposition: form-data; name=file\r\n\r\nx\r\n--B--\r\n", MULTIPART, "purpose"),
        (form(b"x")[:-20], MULTIPART, None),
        (b"no form", MULTIPART, None),
        (b"", MULTIPART, None),
        (b"{}", "application/json", None),
        (form(b"x"), "multipart/form-data", None),
        (
            b"--B\r\ncontent-type: multipart/mixed; boundary=C\r\n\r\n--C\r\n\r\nx\r\n--C--\r\n\r\n--B--\r\n",
            MULTIPART,
            None,
        ),
    ],
)
def test_an_upload_that_cannot_be_taken_is_a_400(server, body, kind, param):
    """A form that is broken or lacks something is refused, and nothing is kept."""
    status, _, raw = request(server, "/files", "POST", body, content_type=kind)
    assert (status, error_of(raw)["param"]) == (400, param)
    assert json.loads(request(server, "/files")[2])["data"] == []


def test_any_bytes_and_any_name_come_back(server):
    """A download is what was uploaded, byte for byte."""
    content = bytes(range(256)) * 5000 + b"\r\n--\r\n-B\r\r\n--"
    _, _, raw = request(server, "/files", "POST", form(content), content_type=MULTIPART)
    file = json.loads(raw)
    assert (file["bytes"], file["expires_at"]) == (len(content), file["created_at"] + 30 * 86_400)
    status, headers, raw = request(server, f"/files/{file['id']}/content")
    assert (status, raw) == (200, content)
    assert headers["content-type"] == "application/octet-stream"


def test_a_file_is_200_mb_at_most_and_the_connection_goes_on(server, monkeypatch):
    """After a 413 the same connection takes the next upload."""
    assert files_module.MOST_BYTES == 200 * 1024 * 1024
    monkeypatch.setattr(files_module, "MOST_BYTES", 3_000_000)
    connection = HTTPConnection(urlsplit(server.base_url).netloc, timeout=30)
    headers = {"authorization": "Bearer k", "content-type": MULTIPART}
    for size, expected in [(3_000_001, 413), (3_000_000, 200)]:
        connection.request("POST", "/v1/files", form(b"x" * size), headers)
        response = connection.getresponse()
        assert (response.status, bool(response.read())) == (expected, True)
    connection.close()
    assert server.calls[0].status == 413


async def test_an_upload_says_how_long_it_is_kept(server):
    """Uploads and the files of a batch show when they expire."""
    async with client(server) as sdk:
        after = {"anchor": "created_at", "seconds": 3600}
        file = await sdk.files.create(
            file=b"x",
            purpose="batch",
            extra_body={"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"},
        )
        assert file.expires_at == file.created_at + 3600
        batch = await finished(sdk, several(1), extra_body={"output_expires_after": after})
        written = await sdk.files.retrieve(batch.output_file_id)
    assert written.expires_at == written.created_at + 3600


def test_uploads_need_a_key():
    """Uploads and listings are refused without the key."""
    with SimulatedServer(api_key="sk-right") as server:
        assert request(server, "/files", "POST", form(b"x"), content_type=MULTIPART)[0] == 401
        assert request(server, "/files")[0] == 401


async def test_an_upload_left_halfway_leaves_nothing(server):
    """A client that leaves during an upload is a disconnect, and no file is kept."""
    url = urlsplit(server.base_url)
    head = f"POST /v1/files HTTP/1.1\r\nHost: x\r\nauthorization: Bearer k\r\ncontent-type: {MULTIPART}\r\n"
    with socket.create_connection((url.hostname, url.port)) as raw:
        raw.sendall(head.encode() + b"content-length: 1000000\r\n\r\n" + form(b"x" * 1000)[:-10])
        while not server.in_flight:
            await asyncio.sleep(0)
    while server.in_flight:
        await asyncio.sleep(0)
    assert server.counts == {"disconnect": 1}
    assert json.loads(request(server, "/files")[2])["data"] == []


def test_a_file_cannot_be_found_before_its_time():
    """An upload is found after the lag, the file of a batch at once."""
    clock = Clock()
    files = Files(5.0, clock=clock)
    file = files.upload(Form({"purpose": "batch"}, "x", b"x"))
    written = files.write(b"y", "y")
    clock.now = 4.9
    with pytest.raises(ApiError, match="No such File object"):
        files.get(file.ident)
    assert [shown["id"] for shown in files.list({})["data"]] == [written.ident]
    clock.now = 5.0
    assert files.get(file.ident) is file
    assert len(files.list({})["data"]) == 2


async def test_a_file_just_uploaded_is_unknown():
    """During the lag neither files nor batches know the file."""
    async with SimulatedServer(file_lag=LONG) as server, client(server) as sdk:
        file = await upload(sdk, several(1))
        with pytest.raises(openai.NotFoundError):
            await sdk.files.retrieve(file.id)
        with pytest.raises(openai.BadRequestError, match=f"No such File object: {file.id}"):
            await sdk.batches.create(input_file_id=file.id, **GOOD)
    async with SimulatedServer(file_lag=0.5) as server, client(server) as sdk:
        file = await upload(sdk, several(1))
        created = None
        while created is None:
            with suppress(openai.BadRequestError):
                created = await sdk.batches.create(input_file_id=file.id, **GOOD)
    assert Counter(call.status for call in server.calls)[400] >= 1
