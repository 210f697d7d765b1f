"""The simulated server's Files and Batches endpoints, through the official SDK, raw HTTP and virtual time."""

import asyncio
import json
import socket
from collections import Counter
from contextlib import suppress
from http.client import HTTPConnection, IncompleteRead
from urllib.parse import urlsplit

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import Batch, CreateEmbeddingResponse, FileObject
from openai.types.chat import ChatCompletion
from openai.types.completion import Completion
from openai.types.responses import Response
from pydantic import BaseModel
from virtual import VirtualLoop

from openai_eval_client.testing import SimulatedServer
from openai_eval_client.testing._batches import files as files_module
from openai_eval_client.testing._batches import input as input_module
from openai_eval_client.testing._batches.batches import Batches
from openai_eval_client.testing._batches.files import Files, Form
from openai_eval_client.testing._endpoints import quarter_bytes
from openai_eval_client.testing._faults import ApiError
from openai_eval_client.testing._options import (
    ENDPOINTS,
    OUTCOMES,
    STATUSES,
    TERMINAL,
    Options,
    as_json,
    endpoint_events,
)

CHAT = "/v1/chat/completions"
BODIES = {
    CHAT: {"model": "m", "messages": [{"role": "user", "content": "hello there"}]},
    "/v1/responses": {"model": "m", "input": "hello there"},
    "/v1/completions": {"model": "m", "prompt": "hello there"},
    "/v1/embeddings": {"model": "m", "input": "hello there"},
}
LONG = 1000.0  # seconds, for what is not to end within a test


def asking(number, url=CHAT, **more):
    return {"custom_id": f"r{number}", "method": "POST", "url": url, "body": {**BODIES[url], **more}}


def jsonl(*requests):
    """Requests as a file; what is bytes already goes in as it is."""
    lines = [request if isinstance(request, bytes) else json.dumps(request).encode() for request in requests]
    return b"".join(line + b"\n" for line in lines)


def several(many, url=CHAT):
    return jsonl(*[asking(number, url) for number in range(many)])


def client(server, **options):
    return openai.AsyncOpenAI(base_url=server.base_url, api_key="sk-test", **{"max_retries": 0, **options})


async def upload(sdk, content, purpose="batch"):
    return await sdk.files.create(file=("input.jsonl", content), purpose=purpose)


async def submit(sdk, content, url=CHAT, **more):
    file = await upload(sdk, content)
    options = {"completion_window": "24h", **more}
    return await sdk.batches.create(input_file_id=file.id, endpoint=url, **options)


async def until(sdk, batch, *statuses):
    """The batch, once it has one of these statuses."""
    while batch.status not in statuses:
        await asyncio.sleep(0.002)
        batch = await sdk.batches.retrieve(batch.id)
    return batch


async def finished(sdk, content, url=CHAT, **more):
    return await until(sdk, await submit(sdk, content, url, **more), *TERMINAL)


async def read_lines(sdk, ident):
    """The lines of a file, parsed; none where there is no file."""
    if not ident:
        return []
    return [json.loads(line) for line in (await sdk.files.content(ident)).content.splitlines()]


def send(server, path, method="GET", body=None, **headers):
    """One raw request on a connection of its own: status, headers, body."""
    url = urlsplit(server.base_url)
    raw = body if isinstance(body, bytes | type(None)) else json.dumps(body)
    connection = HTTPConnection(url.netloc, timeout=30)
    try:
        sent = {
            "authorization": "Bearer sk-test",
            **{name.replace("_", "-"): headers[name] for name in headers},
        }
        connection.request(method, url.path + path, raw, sent)
        response = connection.getresponse()
        shown = {name.lower(): value for name, value in response.getheaders()}
        return response.status, shown, response.read()
    finally:
        connection.close()


def error_of(raw):
    return json.loads(raw)["error"]


@pytest.fixture
def server():
    with SimulatedServer(batch_seconds=0.02) as running:
        yield running


# --- a batch that completes


async def test_a_batch_completes(server):
    """Every object has the API's shape, every line its answer, in another order than the input."""
    async with client(server) as sdk:
        file = await upload(sdk, several(20))
        assert FileObject.model_validate(file.model_dump(), strict=True).bytes == len(several(20))
        created = await sdk.batches.create(
            input_file_id=file.id, endpoint=CHAT, completion_window="24h", metadata={"intent": "i"}
        )
        assert (created.status, created.request_counts.total) == ("validating", 0)
        assert created.expires_at == created.created_at + 86_400
        batch = await until(sdk, created, "completed")
        lines = await read_lines(sdk, batch.output_file_id)
        written = await sdk.files.retrieve(batch.output_file_id)
    Batch.model_validate(batch.model_dump(), strict=True)
    assert not batch.model_extra
    assert (batch.input_file_id, batch.metadata, batch.model) == (file.id, {"intent": "i"}, "m")
    assert batch.request_counts.model_dump() == {"total": 20, "completed": 20, "failed": 0}
    assert (batch.error_file_id, batch.errors) == (None, None)
    assert batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
    assert (batch.failed_at, batch.expired_at, batch.cancelling_at) == (None, None, None)
    assert (written.purpose, written.filename) == ("batch_output", f"{batch.id}_output.jsonl")
    ids = [line["custom_id"] for line in lines]
    assert sorted(ids) == sorted(f"r{number}" for number in range(20)) != ids
    assert {frozenset(line) for line in lines} == {frozenset(("id", "custom_id", "response", "error"))}
    assert (
        len({line["id"] for line in lines}) == len({line["response"]["request_id"] for line in lines}) == 20
    )
    completion = ChatCompletion.model_validate_json(json.dumps(lines[0]["response"]["body"]), strict=True)
    assert completion.choices[0].message.content == "echo: hello there"
    assert (lines[0]["response"]["status_code"], lines[0]["error"]) == (200, None)
    assert batch.usage.total_tokens == 20 * completion.usage.total_tokens


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        (CHAT, ChatCompletion),
        ("/v1/responses", Response),
        ("/v1/completions", Completion),
        ("/v1/embeddings", CreateEmbeddingResponse),
    ],
)
async def test_each_endpoint_answers_in_its_own_way(server, url, kind):
    async with client(server) as sdk:
        batch = await finished(sdk, several(2, url), url)
        lines = await read_lines(sdk, batch.output_file_id)
    assert batch.endpoint == url
    for line in lines:
        assert kind.model_validate_json(json.dumps(line["response"]["body"]), strict=True)


class Leaf(BaseModel):
    name: str


async def test_lines_are_answered_as_they_are_online():
    """By `answer`, with `output_tokens`, to a schema, cut at the maximum; but not charged to any limit."""
    schema = {"name": "leaf", "schema": {**Leaf.model_json_schema(), "additionalProperties": False}}
    content = jsonl(
        asking(0, max_tokens=1),
        asking(1, n=2),
        asking(2, response_format={"type": "json_schema", "json_schema": schema}),
    )
    async with (
        SimulatedServer(batch_seconds=0, rpm=1, tpm=1, output_tokens=7, cached_tokens=2) as server,
        client(server) as sdk,
    ):
        batch = await finished(sdk, content)
        bodies = {
            line["custom_id"]: line["response"]["body"]
            for line in await read_lines(sdk, batch.output_file_id)
        }
    assert bodies["r0"]["choices"][0]["finish_reason"] == "length"
    assert [choice["index"] for choice in bodies["r1"]["choices"]] == [0, 1]
    assert bodies["r1"]["usage"]["completion_tokens"] == 14
    assert bodies["r1"]["usage"]["prompt_tokens_details"]["cached_tokens"] == 2
    assert batch.usage.input_tokens_details.cached_tokens == 6
    assert Leaf.model_validate_json(bodies["r2"]["choices"][0]["message"]["content"])
    saying = SimulatedServer(batch_seconds=0, answer=lambda body: body["seed"] * "x")
    async with saying as server, client(server) as sdk:
        batch = await finished(sdk, jsonl(asking(0, seed=3)))
        (line,) = await read_lines(sdk, batch.output_file_id)
    assert line["response"]["body"]["choices"][0]["message"]["content"] == "xxx"


async def test_the_order_of_the_lines_is_the_seeds():
    orders = []
    for seed in (1, 1, 2):
        async with SimulatedServer(batch_seconds=0, seed=seed) as server, client(server) as sdk:
            batch = await finished(sdk, several(10))
            orders.append([line["custom_id"] for line in await read_lines(sdk, batch.output_file_id)])
    assert orders[0] == orders[1] != orders[2]


async def test_a_line_the_endpoint_refuses_fails_alone(server):
    """Refusals are written with the API's error, and so is what trips the simulation itself."""
    content = jsonl(asking(0), asking(1, messages="hello"), asking(2, tools=[1]), asking(3, n="two"))
    async with client(server) as sdk:
        batch = await finished(sdk, content)
        failed = {line["custom_id"]: line for line in await read_lines(sdk, batch.error_file_id)}
    assert batch.request_counts.model_dump() == {"total": 4, "completed": 1, "failed": 3}
    statuses = {name: line["response"]["status_code"] for name, line in failed.items()}
    assert statuses == {"r1": 400, "r2": 500, "r3": 400}
    assert failed["r1"]["error"] is None
    assert failed["r1"]["response"]["body"]["error"]["param"] == "messages"


async def test_an_answer_function_that_raises_fails_its_line():
    async with (
        SimulatedServer(batch_seconds=0, answer=lambda body: body["nothing"]) as server,
        client(server) as sdk,
    ):
        batch = await finished(sdk, several(1))
        (line,) = await read_lines(sdk, batch.error_file_id)
    assert line["response"]["status_code"] == 500
    assert "KeyError" in line["response"]["body"]["error"]["message"]


async def test_others_are_served_while_many_lines_are_answered():
    """Work is done in slices: a batch too large for its time is seen on its way."""
    async with SimulatedServer(batch_seconds=0) as server, client(server) as sdk:
        batch = await submit(sdk, several(10_000))
        seen = []
        while batch.status not in TERMINAL:
            batch = await sdk.batches.retrieve(batch.id)
            seen.append(batch.request_counts.completed)
        lines = await read_lines(sdk, batch.output_file_id)
    assert seen == sorted(seen)
    assert any(0 < count < 10_000 for count in seen)
    assert len({line["custom_id"] for line in lines}) == 10_000


# --- scripted ends


WRITTEN = {  # outcome: lines in the output file, in the error file, completed, failed
    "ok": (1, 0, 1, 0),
    "400": (0, 1, 0, 1),
    "429": (0, 1, 0, 1),
    "500": (0, 1, 0, 1),
    "expired": (0, 1, 0, 1),
    "cancelled": (0, 1, 0, 1),
    "missing": (0, 0, 1, 0),
    "duplicate": (2, 0, 1, 0),
    "duplicate_error": (1, 1, 1, 0),
    "unknown_id": (2, 0, 1, 0),
    "timeout": (0, 1, 0, 1),
    "status_0": (0, 1, 0, 1),
    "truncated": (1, 0, 1, 0),
    "null_body": (1, 0, 1, 0),
    "no_usage": (1, 0, 1, 0),
    "garbage": (1, 0, 1, 0),
}


def test_every_outcome_is_in_the_table():
    assert set(WRITTEN) == set(OUTCOMES)


@pytest.mark.parametrize("outcome", OUTCOMES)
async def test_what_an_outcome_writes(outcome):
    plans = [{"lines": [outcome]}]
    async with SimulatedServer(batch_seconds=0, batch_plans=plans) as server, client(server) as sdk:
        batch = await finished(sdk, several(1))
        raw = [
            (await sdk.files.content(ident)).content.splitlines() if ident else []
            for ident in (batch.output_file_id, batch.error_file_id)
        ]
    counts = batch.request_counts
    assert (*map(len, raw), counts.completed, counts.failed) == WRITTEN[outcome]
    if outcome == "truncated":
        with pytest.raises(ValueError, match=r"Unterminated string|Expecting"):
            json.loads(raw[0][0])
        return
    output, failures = ([json.loads(line) for line in lines] for lines in raw)
    check_lines(outcome, output, failures)


def check_lines(outcome, output, failures):
    """What is particular about an outcome."""
    ids = {line["custom_id"] for line in (*output, *failures)}
    assert ids - {"r0"} == ({output[1]["custom_id"]} if outcome == "unknown_id" else set())
    if outcome in ("400", "429", "500"):
        assert failures[0]["response"]["status_code"] == int(outcome)
        assert set(failures[0]["response"]["body"]["error"]) == {"message", "type", "param", "code"}
    if outcome in ("expired", "cancelled", "timeout"):
        code = {"timeout": "request_timeout"}.get(outcome, f"batch_{outcome}")
        assert (failures[0]["response"], failures[0]["error"]["code"]) == (None, code)
    if outcome == "status_0":
        assert (failures[0]["response"]["status_code"], failures[0]["response"]["body"]) == (0, None)
    if outcome == "duplicate":
        assert output[0] == output[1]
    if outcome == "null_body":
        assert output[0]["response"]["body"] is None
    if outcome == "no_usage":
        assert "usage" not in output[0]["response"]["body"]
    if outcome == "garbage":
        assert "<html>" in output[0]["response"]["body"]


@pytest.mark.parametrize(
    ("plan", "counts", "codes"),
    [
        ({"status": "expired"}, (2, 0), ["batch_expired"] * 2),
        ({"status": "cancelled"}, (2, 0), ["batch_cancelled"] * 2),
        ({"status": "expired", "done": 1}, (4, 0), []),
        ({"status": "expired", "done": 0}, (0, 0), ["batch_expired"] * 4),
        ({"status": "expired", "lines": ["ok", "expired"]}, (3, 1), ["batch_expired"]),
        ({"status": "completed", "done": 0.25}, (1, 0), ["batch_expired"] * 3),
        ({"status": "failed", "done": 0.5}, (2, 0), ["batch_expired"] * 2),
        ({"status": "failed", "lines": ["timeout"]}, (3, 1), ["request_timeout"]),
        ({"status": "failed"}, (0, 0), []),
    ],
)
async def test_where_a_batch_ends(plan, counts, codes):
    """What was done is in the output file, what was not in the error file, uncounted."""
    async with SimulatedServer(batch_seconds=0.02, batch_plans=[plan]) as server, client(server) as sdk:
        batch = await finished(sdk, several(4))
        output = await read_lines(sdk, batch.output_file_id)
        failures = await read_lines(sdk, batch.error_file_id)
        after = await finished(sdk, several(1))
    assert batch.status == plan["status"]
    assert getattr(batch, f"{batch.status}_at")
    assert (batch.request_counts.completed, batch.request_counts.failed) == counts
    assert [line["error"]["code"] for line in failures] == codes
    assert len(output) == counts[0]
    assert bool(batch.output_file_id) == bool(output)
    assert bool(batch.error_file_id) == bool(failures)
    assert bool(batch.cancelling_at) == (batch.status == "cancelled")
    assert after.status == "completed"


@pytest.mark.parametrize("name", ["output_file", "error_file"])
@pytest.mark.parametrize("told", [True, False, "", "empty", "gone"])
async def test_files_that_are_not_what_they_should_be(name, told):
    plan = {"lines": ["ok", "400"], name: told}
    async with SimulatedServer(batch_seconds=0, batch_plans=[plan]) as server, client(server) as sdk:
        batch = await finished(sdk, several(2))
        ident = getattr(batch, f"{name}_id")
        other = batch.output_file_id if name == "error_file" else batch.error_file_id
        assert len(await read_lines(sdk, other)) == 1
        if told in (False, ""):
            assert ident == (None if told is False else "")
        elif told == "gone":
            with pytest.raises(openai.NotFoundError):
                await sdk.files.content(ident)
        else:
            assert len((await sdk.files.content(ident)).content.splitlines()) == (told is True)


async def test_a_batch_may_show_what_is_not_true():
    error = {"code": "token_limit_exceeded", "message": "m", "param": None, "line": None}
    plans = [
        {"counts": {"completed": 9}},
        {"errors": [error]},
        {"errors": [error], "status": "completed"},
        {"input_gone": True},
    ]
    async with SimulatedServer(batch_seconds=0, batch_plans=plans) as server, client(server) as sdk:
        batches = [await finished(sdk, several(2)) for _ in plans]
        with pytest.raises(openai.NotFoundError):
            await sdk.files.retrieve(batches[3].input_file_id)
        await sdk.files.retrieve(batches[2].input_file_id)
    assert batches[0].request_counts.model_dump() == {"total": 2, "completed": 9, "failed": 0}
    assert [batch.status for batch in batches] == ["completed", "failed", "completed", "completed"]
    assert batches[1].errors.data[0].model_dump() == batches[2].errors.data[0].model_dump() == error
    assert (batches[1].output_file_id, batches[3].errors) == (None, None)


async def test_outcomes_are_drawn_at_random():
    faults = {"400": 0.3, "missing": 0.2}
    runs = []
    for _ in range(2):
        async with (
            SimulatedServer(batch_seconds=0, batch_faults=faults, seed=3) as server,
            client(server) as sdk,
        ):
            batch = await finished(sdk, several(400))
            output = await read_lines(sdk, batch.output_file_id)
            runs.append((batch.request_counts.failed, len(output)))
    assert runs[0] == runs[1]
    failed, written = runs[0]
    assert 80 < failed < 160
    assert 150 < written < 250


@pytest.mark.parametrize("status", [status for status in STATUSES if status not in TERMINAL])
async def test_a_batch_may_stay_for_ever_and_be_cancelled(status):
    plan = {"status": status, "done": 0.5, "seconds": 0.02}
    async with SimulatedServer(batch_plans=[plan]) as server, client(server) as sdk:
        batch = await until(sdk, await submit(sdk, several(4)), status)
        while batch.request_counts.completed < 2 and status != "validating":
            batch = await sdk.batches.retrieve(batch.id)
        marker = await finished(sdk, several(4))  # takes ten times as long
        assert (await sdk.batches.retrieve(batch.id)).status == status
        cancelling = await sdk.batches.cancel(batch.id)
        assert (cancelling.status, marker.status) == ("cancelling", "completed")
        if status == "cancelling":
            return
        batch = await until(sdk, batch, "cancelled")
        output = await read_lines(sdk, batch.output_file_id)
        failures = await read_lines(sdk, batch.error_file_id)
    done = 0 if status == "validating" else 2
    assert [len(output), len(failures)] == [done, done]
    assert batch.request_counts.total == 2 * done
    assert {line["error"]["code"] for line in failures} <= {"batch_cancelled"}


# --- cancelling


async def test_a_batch_under_way_is_cancelled():
    """Nothing is lost: what was answered by then is in the output file, the rest in the error file."""
    async with SimulatedServer(batch_seconds=3) as server, client(server) as sdk:
        batch = await submit(sdk, several(200))
        while batch.request_counts.completed < 10:
            batch = await sdk.batches.retrieve(batch.id)
        cancelling = await sdk.batches.cancel(batch.id)
        again = await sdk.batches.cancel(batch.id)
        batch = await until(sdk, batch, "cancelled")
        output = await read_lines(sdk, batch.output_file_id)
        failures = await read_lines(sdk, batch.error_file_id)
        assert (await sdk.batches.cancel(batch.id)).status == "cancelled"
    assert cancelling.status == again.status == "cancelling"
    assert batch.cancelling_at <= batch.cancelled_at
    assert batch.request_counts.completed == cancelling.request_counts.completed == len(output) < 200
    assert len(output) + len(failures) == 200
    assert {line["error"]["code"] for line in failures} == {"batch_cancelled"}
    assert len({line["custom_id"] for line in (*output, *failures)}) == 200


@pytest.mark.parametrize("status", ["completed", "failed", "expired"])
async def test_a_batch_that_is_over_is_not_cancelled(status):
    async with (
        SimulatedServer(batch_seconds=0, batch_plans=[{"status": status}]) as server,
        client(server) as sdk,
    ):
        batch = await finished(sdk, several(1))
        with pytest.raises(openai.ConflictError, match=f"a batch with status '{status}'"):
            await sdk.batches.cancel(batch.id)


async def test_a_batch_cancelled_at_once_has_no_files():
    async with SimulatedServer(batch_plans=[{"seconds": 5}]) as server, client(server) as sdk:
        batch = await submit(sdk, several(2))
        await sdk.batches.cancel(batch.id)
        batch = await until(sdk, batch, "cancelled")
    assert (batch.output_file_id, batch.error_file_id, batch.in_progress_at) == (None, None, None)
    assert batch.request_counts.total == 0


# --- what the input file must be


OTHER = {**asking(1)["body"], "model": "other"}


@pytest.mark.parametrize(
    ("content", "errors"),
    [
        (b"", [("empty_file", None, None)]),
        (b"\n \n", [("empty_file", None, None)]),
        (jsonl(asking(0), b"{broken"), [("invalid_json_line", None, 2)]),
        (jsonl(b"[1]", b"\xff", b'{"a": NaN}'), [("invalid_json_line", None, line) for line in (1, 2, 3)]),
        (jsonl(b"[" * 100_000), [("invalid_json_line", None, 1)]),
        (jsonl(asking(0), asking(1), asking(0)), [("duplicate_custom_id", "custom_id", 3)]),
        (jsonl(asking(0), {**asking(1), "body": OTHER}), [("mismatched_model", "body.model", 2)]),
        (jsonl({**asking(0), "method": "GET"}), [("invalid_method", "method", 1)]),
        (jsonl({**asking(0), "url": "/v1/responses"}), [("invalid_url", "url", 1)]),
        (jsonl(asking(0), asking(1, model="gone")), [("model_not_found", "body.model", 2)]),
        (jsonl({**asking(0), "custom_id": 5}), [("invalid_type", "custom_id", 1)]),
        (jsonl({**asking(0), "body": []}), [("invalid_type", "body", 1)]),
        (jsonl(asking(0, stream=True)), [("streaming_unsupported", "body.stream", 1)]),
        (jsonl(asking(0, messages=None)), [("invalid_request", "body.messages", 1)]),
        (jsonl(asking(0, model=None)), [("invalid_request", "body.model", 1)]),
        (
            jsonl({}),
            [("missing_required_parameter", name, 1) for name in ("custom_id", "method", "url", "body")],
        ),
    ],
)
async def test_a_file_is_validated_line_by_line(content, errors):
    async with SimulatedServer(batch_seconds=0, models=["m", "other"]) as server, client(server) as sdk:
        batch = await finished(sdk, content)
    assert batch.status == "failed"
    assert [(error.code, error.param, error.line) for error in batch.errors.data] == errors
    assert all(error.message for error in batch.errors.data)
    assert batch.failed_at
    assert (batch.request_counts.total, batch.output_file_id, batch.error_file_id) == (0, None, None)


async def test_a_file_has_50_000_lines_at_most(server, monkeypatch):
    assert input_module.MOST_LINES == 50_000
    monkeypatch.setattr(input_module, "MOST_LINES", 3)
    async with client(server) as sdk:
        assert (await finished(sdk, several(3))).status == "completed"
        batch = await finished(sdk, several(4))
    assert [error.code for error in batch.errors.data] == ["too_many_tasks"]


async def test_blank_lines_and_a_last_line_without_its_end_are_read(server):
    async with client(server) as sdk:
        batch = await finished(sdk, b"\n" + several(2) + b"\r\n" + json.dumps(asking(5)).encode())
    assert batch.request_counts.completed == 3


GOOD = {"endpoint": CHAT, "completion_window": "24h"}


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"input_file_id": "file-unknown"}, "input_file_id", None),
        ({"input_file_id": ["x"]}, "input_file_id", None),
        ({"input_file_id": None}, "input_file_id", "missing_required_parameter"),
        ({"endpoint": None}, "endpoint", "missing_required_parameter"),
        ({"endpoint": "/v1/images"}, "endpoint", "invalid_value"),
        ({"endpoint": []}, "endpoint", "invalid_type"),
        ({"completion_window": "48h"}, "completion_window", "invalid_value"),
        ({"metadata": {str(n): "v" for n in range(17)}}, "metadata", "object_above_max_properties"),
        ({"metadata": {"k" * 65: "v"}}, "metadata", "string_above_max_length"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k", "string_above_max_length"),
        ({"metadata": {"k": 5}}, "metadata.k", "invalid_type"),
        ({"metadata": ["k"]}, "metadata", "invalid_type"),
        ({"output_expires_after": {"seconds": "1"}}, "output_expires_after.seconds", "invalid_type"),
    ],
)
async def test_what_is_refused_at_creation(server, change, param, code):
    async with client(server) as sdk:
        file = await upload(sdk, several(1))
        status, _, raw = send(server, "/batches", "POST", {"input_file_id": file.id, **GOOD, **change})
    assert (status, error_of(raw)["param"], error_of(raw)["code"]) == (400, param, code)
    assert server.batches == []


def test_a_creation_that_is_no_json_is_a_400(server):
    assert send(server, "/batches", "POST", b"{")[0] == 400
    assert send(server, "/batches", "POST", b"[]")[0] == 400
    assert [call.body for call in server.calls] == [None, None]


async def test_the_most_metadata_the_api_takes(server):
    metadata = {f"{number:064}": "v" * 512 for number in range(16)}
    async with client(server) as sdk:
        batch = await finished(sdk, several(1), metadata=metadata)
    assert batch.metadata == metadata == server.calls[1].body["metadata"]


async def test_a_file_of_another_purpose_is_refused(server):
    async with client(server) as sdk:
        file = await upload(sdk, several(1), purpose="user_data")
        with pytest.raises(openai.BadRequestError, match="purpose"):
            await sdk.batches.create(input_file_id=file.id, **GOOD)


async def test_other_windows_can_be_allowed():
    async with SimulatedServer(completion_windows={"24h", "7d"}) as server, client(server) as sdk:
        batch = await submit(sdk, several(1), completion_window="7d")
    assert batch.expires_at == batch.created_at + 7 * 86_400


async def test_an_unknown_file_may_show_later():
    """As it does at OpenAI: the batch is created, then fails."""
    async with SimulatedServer(batch_seconds=0, unknown_file="later") as server, client(server) as sdk:
        batch = await sdk.batches.create(input_file_id="file-unknown", **GOOD)
        batch = await until(sdk, batch, *TERMINAL)
    assert batch.status == "failed"
    assert [(error.code, error.param) for error in batch.errors.data] == [("invalid_request", "file_id")]


# --- enqueued tokens


TOKENS = 8  # of one line of several()


async def test_too_many_enqueued_tokens_are_refused_at_once():
    """The limit is the model's, and holds until a batch is over."""
    options = {"enqueued_tokens": 2 * TOKENS, "enqueued_refusal": "create"}
    async with SimulatedServer(batch_plans=[{"seconds": LONG}], **options) as server, client(server) as sdk:
        first = await submit(sdk, several(2))
        with pytest.raises(openai.RateLimitError) as caught:
            await submit(sdk, several(1))
        other = await submit(sdk, jsonl(asking(0, model="other")))
        await sdk.batches.cancel(first.id)
        with pytest.raises(openai.RateLimitError):
            await submit(sdk, several(1))
        invalid = await submit(sdk, b"{")
        assert len(server.batches) == 3
    assert caught.value.code == "token_limit_exceeded"
    assert "Enqueued token limit reached for m in organization org-simulated. Limit: 16 " in str(caught.value)
    assert (other.status, invalid.status) == ("validating", "validating")


async def test_too_many_enqueued_tokens_let_a_batch_fail():
    plans = [{"status": "in_progress", "seconds": 0.02}]
    options = {"batch_seconds": 0.02, "batch_plans": plans, "enqueued_tokens": 2 * TOKENS}
    async with SimulatedServer(**options) as server, client(server) as sdk:
        first = await until(sdk, await submit(sdk, several(2)), "in_progress")
        second = await finished(sdk, several(1))
        await until(sdk, await sdk.batches.cancel(first.id), "cancelled")
        third = await finished(sdk, several(2))
        fourth = await finished(sdk, several(3))
    assert (second.status, third.status, fourth.status) == ("failed", "completed", "failed")
    (error,) = second.errors.data
    assert (error.code, error.line) == ("token_limit_exceeded", None)
    assert error.message == (
        "Enqueued token limit reached for m in organization org-simulated. Limit: 16 enqueued tokens. "
        "Please try again once some in_progress batches have been completed."
    )


@pytest.mark.parametrize("refusal", ["create", "later"])
def test_of_many_batches_at_once_as_many_are_admitted_as_fit(refusal):
    async def scenario(batches, body):
        creations = [batches.create(body) for _ in range(5)]
        created = await asyncio.gather(*creations, return_exceptions=True)
        await asyncio.sleep(200)
        return created, Counter(shown["status"] for shown in batches.as_json())

    options = Options(enqueued_tokens=6 * TOKENS, enqueued_refusal=refusal, batch_seconds=100)
    (created, ended), _ = in_virtual_time(scenario, options, several(2))
    refused = [error.status for error in created if isinstance(error, ApiError)]
    assert ended["completed"] == 3
    assert (refused, ended["failed"]) == (([429] * 2, 0) if refusal == "create" else ([], 2))


# --- lists


async def test_batches_are_listed_page_by_page(server):
    async with client(server) as sdk:
        created = [(await submit(sdk, several(1))).id for _ in range(5)]
        pages = [page async for page in (await sdk.batches.list(limit=2)).iter_pages()]
        listed = [batch.id async for batch in sdk.batches.list(limit=2)]
    assert listed == created[::-1]
    assert [len(page.data) for page in pages] == [2, 2, 1]
    _, _, raw = send(server, f"/batches?limit=2&after={created[4]}")
    page = json.loads(raw)
    assert (page["object"], page["first_id"], page["last_id"]) == ("list", created[3], created[2])
    assert page["has_more"] is True
    empty = json.loads(send(server, f"/batches?after={created[0]}")[2])
    assert (empty["data"], empty["first_id"], empty["has_more"]) == ([], None, False)


@pytest.mark.parametrize(
    ("query", "param"),
    [("limit=0", "limit"), ("limit=101", "limit"), ("limit=x", "limit"), ("after=batch_gone", "after")],
)
def test_a_page_that_cannot_be_is_a_400(server, query, param):
    status, _, raw = send(server, f"/batches?{query}")
    assert (status, error_of(raw)["param"]) == (400, param)


async def test_files_are_listed_found_and_deleted(server):
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


def test_wrong_methods_are_405(server):
    assert send(server, "/files", "PUT")[0] == 405
    assert send(server, "/batches/x/cancel", "DELETE")[0] == 405
    assert send(server, "/files/x/content", "POST")[0] == 405


# --- uploads


def form(content, *, purpose=b"batch", name=b"file", boundary=b"B"):
    head = b"--%b\r\ncontent-disposition: form-data; name=" % boundary
    return (
        head + b'"purpose"\r\n\r\n' + purpose + b"\r\n"
        + head + b'"' + name + b'"; filename="a \xc3\xa9\\"b.jsonl"\r\n\r\n' + content + b"\r\n"
        + b"--%b--\r\n" % boundary
    )  # fmt: skip


MULTIPART = "multipart/form-data; boundary=B"


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
    status, _, raw = send(server, "/files", "POST", body, content_type=kind)
    assert (status, error_of(raw)["param"]) == (400, param)
    assert json.loads(send(server, "/files")[2])["data"] == []


def test_any_bytes_and_any_name_come_back(server):
    content = bytes(range(256)) * 5000 + b"\r\n--\r\n-B\r\r\n--"
    _, _, raw = send(server, "/files", "POST", form(content), content_type=MULTIPART)
    file = json.loads(raw)
    assert (file["bytes"], file["expires_at"]) == (len(content), file["created_at"] + 30 * 86_400)
    status, headers, raw = send(server, f"/files/{file['id']}/content")
    assert (status, raw) == (200, content)
    assert headers["content-type"] == "application/octet-stream"


def test_a_file_is_200_mb_at_most_and_the_connection_goes_on(server, monkeypatch):
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
    with SimulatedServer(api_key="sk-right") as server:
        assert send(server, "/files", "POST", form(b"x"), content_type=MULTIPART)[0] == 401
        assert send(server, "/files")[0] == 401


async def test_an_upload_left_halfway_leaves_nothing(server):
    url = urlsplit(server.base_url)
    head = f"POST /v1/files HTTP/1.1\r\nHost: x\r\nauthorization: Bearer k\r\ncontent-type: {MULTIPART}\r\n"
    with socket.create_connection((url.hostname, url.port)) as raw:
        raw.sendall(head.encode() + b"content-length: 1000000\r\n\r\n" + form(b"x" * 1000)[:-10])
        while not server.in_flight:
            await asyncio.sleep(0)
    while server.in_flight:
        await asyncio.sleep(0)
    assert server.counts == {"disconnect": 1}
    assert json.loads(send(server, "/files")[2])["data"] == []


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_a_file_cannot_be_found_before_its_time():
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


# --- downloads


@pytest.fixture
def numbers(server):
    """A server with a file of three pieces, and that file's path."""
    content = b"".join(b"%09d\n" % number for number in range(80_000))
    _, _, raw = send(server, "/files", "POST", form(content), content_type=MULTIPART)
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
    server, path, content = numbers
    status, headers, raw = send(server, path, range=wanted)
    assert raw == content[first:end]
    whole = len(raw) == len(content)
    assert status == (200 if whole else 206)
    assert headers.get("content-range") == (None if whole else f"bytes {first}-{end - 1}/800000")
    assert headers["accept-ranges"] == "bytes"


def test_nothing_is_left_of_a_file(numbers):
    server, path, _ = numbers
    status, headers, _ = send(server, path, range="bytes=800000-")
    assert (status, headers["content-range"]) == (416, "bytes */800000")


def test_ranges_can_be_ignored():
    with SimulatedServer(ranges=False) as server:
        _, _, raw = send(server, "/files", "POST", form(b"0123456789"), content_type=MULTIPART)
        status, headers, raw = send(server, f"/files/{json.loads(raw)['id']}/content", range="bytes=5-")
        assert (status, raw) == (200, b"0123456789")
        assert "accept-ranges" not in headers


def test_a_download_breaks_off_and_is_resumed():
    """All bytes are announced, half of them come; a range fetches the others."""
    with SimulatedServer(endpoint_script={"content": ["truncate", "truncate"]}) as server:
        content = b"%d" * 500_000
        _, _, raw = send(server, "/files", "POST", form(content), content_type=MULTIPART)
        path, got = f"/files/{json.loads(raw)['id']}/content", b""
        for _ in range(2):
            with pytest.raises(IncompleteRead) as caught:
                send(server, path, **({"range": f"bytes={len(got)}-"} if got else {}))
            got += caught.value.partial
        assert len(got) == 750_000
        assert got + send(server, path, range=f"bytes={len(got)}-")[2] == content
        assert [call.fault for call in server.calls][1:] == ["truncate", "truncate", None]
        assert server.in_flight == 0


async def test_a_client_may_leave_a_download(server, caplog):
    _, _, raw = send(server, "/files", "POST", form(bytes(20_000_000)), content_type=MULTIPART)
    url, path = urlsplit(server.base_url), f"/v1/files/{json.loads(raw)['id']}/content"
    with socket.create_connection((url.hostname, url.port)) as leaving:
        leaving.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nauthorization: Bearer k\r\n\r\n".encode())
        assert leaving.recv(100).startswith(b"HTTP/1.1 200")
    while server.connections or server.in_flight:
        await asyncio.sleep(0)
    assert server.counts == {"200": 2}
    assert caplog.records == []


# --- faults of endpoints


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
    files = json.loads(send(server, "/files")[2])["data"]
    batches = {batch["id"]: batch for batch in server.batches}
    return len(files), len(batches), batches[batch_id]["cancelling_at"] is not None


CHANGED = {"upload": (2, 1, False), "create": (1, 2, False), "cancel": (1, 1, True), "delete": (0, 1, False)}


@pytest.mark.parametrize("name", ENDPOINTS)
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
    faults = {"retrieve": {"500": 0.3, "503": 0.2}}
    async with (
        SimulatedServer(endpoint_faults=faults, unavailable_retry_after=7) as server,
        client(server) as sdk,
    ):
        batch = await submit(sdk, several(1))
        for _ in range(200):
            status, headers, _ = send(server, f"/batches/{batch.id}")
            assert headers.get("retry-after") == ("7" if status == 503 else None)
    assert 40 < server.counts["500"] < 80
    assert 25 < server.counts["503"] < 60
    assert {call.path.split("/")[2] for call in server.calls if call.fault} == {"batches"}


# --- what the server tells


@pytest.mark.parametrize("process", [False, True])
async def test_batches_can_be_looked_at_while_running_and_after(process):
    options = {"batch_seconds": 0.02, "batch_plans": [{"status": "expired", "lines": ("ok", "expired")}]}
    async with SimulatedServer(process=process, completion_windows={"24h"}, **options) as server:
        assert server.batches == []
        async with client(server) as sdk:
            first = await finished(sdk, several(2), metadata={"intent": "a"})
            second = await finished(sdk, several(2), metadata={"intent": "b"})
        running = await asyncio.to_thread(lambda: server.batches)
        await asyncio.to_thread(server.reset)
        assert await asyncio.to_thread(lambda: server.batches) == running
        assert await asyncio.to_thread(lambda: len(json.loads(send(server, "/files")[2])["data"])) == 5
    assert server.batches == running
    assert [batch["id"] for batch in running] == [first.id, second.id]
    assert [batch["status"] for batch in running] == ["expired", "completed"]
    assert running[0]["request_counts"] == {"total": 2, "completed": 1, "failed": 1}
    assert Batch.model_validate(running[0]) == first


async def test_what_is_looked_at_is_a_copy(server):
    async with client(server) as sdk:
        await submit(sdk, several(1), metadata={"intent": "a"})
    server.batches[0]["metadata"].clear()
    assert server.batches[0]["metadata"] == {"intent": "a"}


async def test_batches_can_be_looked_at_from_within_an_answer():
    seen = []

    def answer(_body):
        seen.append(server.batches[0]["status"])
        return "yes"

    async with SimulatedServer(batch_seconds=0, answer=answer) as server, client(server) as sdk:
        await finished(sdk, several(2))
    assert seen == ["in_progress", "in_progress"]


async def test_a_server_stops_under_batches():
    async with SimulatedServer(batch_seconds=LONG) as server, client(server) as sdk:
        batch = await submit(sdk, several(3000))
        await sdk.batches.cancel((await submit(sdk, several(1))).id)
    assert [shown["status"] for shown in server.batches] == ["validating", "cancelling"]
    assert server.batches[0]["id"] == batch.id


def test_calls_of_files_and_batches_carry_no_limits():
    with SimulatedServer(rpm=1, tpm=10) as server:
        for _ in range(3):
            status, headers, _ = send(server, "/batches")
            assert status == 200
            assert headers["x-request-id"].startswith("req_")
            assert not [name for name in headers if name.startswith("x-ratelimit")]


# --- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_seconds": -1}, "batch_seconds"),
        ({"file_lag": -1}, "file_lag"),
        ({"enqueued_tokens": -1}, "enqueued_tokens"),
        ({"enqueued_refusal": "never"}, "enqueued_refusal"),
        ({"unknown_file": "never"}, "unknown_file"),
        ({"completion_windows": "24h"}, "completion_windows"),
        ({"completion_windows": ["a day"]}, "completion_windows: 'a day'"),
        ({"completion_windows": [24]}, "completion_windows: 24"),
        ({"batch_plans": {"status": "failed"}}, "batch_plans"),
        ({"batch_plans": ["failed"]}, r"batch_plans\[0\]"),
        ({"batch_plans": [{}, {"state": "failed"}]}, r"batch_plans\[1\]: 'state'"),
        ({"batch_plans": [{"status": "done"}]}, r"batch_plans\[0\]: status"),
        ({"batch_plans": [{"seconds": -1}]}, r"batch_plans\[0\]: seconds"),
        ({"batch_plans": [{"seconds": None}]}, r"batch_plans\[0\]: seconds"),
        ({"batch_plans": [{"done": 1.5}]}, r"batch_plans\[0\]: done"),
        ({"batch_plans": [{"done": True}]}, r"batch_plans\[0\]: done"),
        ({"batch_plans": [{"lines": "ok"}]}, r"batch_plans\[0\]: lines"),
        ({"batch_plans": [{"lines": ["fine"]}]}, r"batch_plans\[0\]: lines"),
        ({"batch_plans": [{"output_file": "lost"}]}, r"batch_plans\[0\]: output_file"),
        ({"batch_plans": [{"error_file": None}]}, r"batch_plans\[0\]: error_file"),
        ({"batch_plans": iter([{}])}, "batch_plans"),
        ({"batch_plans": [{"counts": {"done": 1}}]}, r"batch_plans\[0\]: counts"),
        ({"batch_plans": [{"counts": {"total": "1"}}]}, r"batch_plans\[0\]: counts"),
        ({"batch_plans": [{"errors": ["bad"]}]}, r"batch_plans\[0\]: errors"),
        ({"batch_plans": [{"input_gone": 1}]}, r"batch_plans\[0\]: input_gone"),
        ({"batch_faults": {"ok": 0.5}}, "batch_faults"),
        ({"batch_faults": {"400": 0.6, "500": 0.6}}, "batch_faults: the probabilities of 400, 500"),
        ({"endpoint_script": {"nowhere": ["ok"]}}, "endpoint_script: 'nowhere'"),
        ({"endpoint_script": {"create": "500"}}, "endpoint_script: create"),
        ({"endpoint_script": {"create": ["truncate"]}}, "endpoint_script: create"),
        ({"endpoint_faults": {"nowhere": {}}}, "endpoint_faults: 'nowhere'"),
        ({"endpoint_faults": {"list": {"500": 2}}}, "endpoint_faults: list: 500=2"),
    ],
)
def test_options_that_make_no_sense_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SimulatedServer(**options)


def test_options_pass_through_json():
    options = Options(
        models={"m"},
        script=("ok", "500"),
        batch_plans=({"lines": ("ok", "400"), "counts": {"total": 3}}, {"errors": ({"code": "c"},)}),
        batch_faults={"400": 0.5},
        completion_windows={"7d"},
        endpoint_script={"create": ("ok", "drop_after")},
        endpoint_faults={"list": {"500": 0.5}},
    )
    passed = json.loads(json.dumps(as_json(options)))
    assert as_json(Options(**passed)) == passed


# --- virtual time


def in_virtual_time(scenario, options, content):
    """Run `scenario(batches, file)` on a loop that does not sleep."""
    loop = VirtualLoop()

    async def run():
        files = Files()
        batches = Batches(options, files, quarter_bytes, lambda _: None)
        file = files.upload(Form({"purpose": "batch"}, "input.jsonl", content))
        result = await scenario(batches, {"input_file_id": file.ident, **GOOD})
        lines = {
            name: [json.loads(line) for line in files.get(shown[f"{name}_file_id"]).content.splitlines()]
            for shown in batches.as_json()
            for name in ("output", "error")
            if shown[f"{name}_file_id"]
        }
        return result, lines

    try:
        return loop.run_until_complete(run())
    finally:
        loop.close()


def test_a_batch_keeps_its_time():
    """A tenth validating, eight tenths in progress, in even steps, a tenth finalizing."""

    async def scenario(batches, body):
        ident = (await batches.create(body))["id"]
        seen = []
        for _ in range(20):
            await asyncio.sleep(5)
            shown = batches.get(ident).as_json()
            seen.append((shown["status"], shown["request_counts"]["completed"]))
        return seen

    seen, _ = in_virtual_time(scenario, Options(batch_seconds=100 - 0.001), several(10))
    assert [status for status, _ in seen] == [
        "validating", *["in_progress"] * 16, *["finalizing"] * 2, "completed"
    ]  # fmt: skip
    counts = [count for _, count in seen]
    assert counts[1:18] == [0, 0, 1, 1, 2, 3, 3, 4, 5, 5, 6, 6, 7, 8, 8, 9, 10]


@settings(max_examples=150, deadline=None)
@given(
    lines=st.none()
    | st.lists(st.sampled_from([name for name in OUTCOMES if name != "truncated"]), max_size=12),
    status=st.sampled_from(TERMINAL),
    done=st.none() | st.floats(0, 1),
    many=st.integers(1, 10),
    seed=st.integers(0, 100),
)
def test_no_line_is_lost(lines, status, done, many, seed):
    """Counts, files and what was left add up, whatever the plan; only "missing" is in no file."""
    plan = {"status": status}
    plan |= {} if lines is None else {"lines": lines}
    plan |= {} if done is None else {"done": done}
    answered = []
    options = Options(
        batch_plans=[plan], batch_seconds=100, seed=seed, answer=lambda body: answered.append(body) or "yes"
    )

    async def scenario(batches, body):
        ident = (await batches.create(body))["id"]
        await asyncio.sleep(101)
        return batches.get(ident).as_json()

    shown, files = in_virtual_time(scenario, options, several(many))
    output, failures = files.get("output", []), files.get("error", [])
    counts = shown["request_counts"]
    assert shown["status"] == status
    if status == "failed" and lines is None and done is None:
        assert (counts["total"], files) == (0, {})
        return
    outcomes = [*(lines or []), *["ok"] * many][:many]
    sent = {f"r{number}" for number in range(many)}
    found = {line["custom_id"] for line in (*output, *failures)}
    missing = {f"r{number}" for number, outcome in enumerate(outcomes) if outcome == "missing"}
    left = many - counts["completed"] - counts["failed"]
    assert counts["total"] == many
    assert sent - found <= missing
    assert len(answered) == counts["completed"]
    if done == 1:
        written = [WRITTEN[outcome] for outcome in outcomes]
        sums = [sum(column) for column in zip(*written, strict=True)]
        assert [len(output), len(failures), counts["completed"], counts["failed"]] == sums
    elif done is not None:
        assert left == many - round(done * many)
    unrun = [
        line for line in failures if (line["error"] or {}).get("code") in ("batch_expired", "batch_cancelled")
    ]
    assert len(unrun) >= left


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
BODY = st.fixed_dictionaries(
    {},
    optional={
        "model": st.just("m") | VALUES,
        "messages": VALUES | st.lists(st.fixed_dictionaries({"role": VALUES, "content": VALUES}), max_size=2),
        "max_tokens": VALUES,
        "n": st.integers(-2, 3) | st.text(max_size=2),
        "tools": VALUES,
        "tool_choice": VALUES,
        "response_format": VALUES,
        "logprobs": VALUES,
    },
)
LINE = st.fixed_dictionaries(
    {},
    optional={
        "custom_id": st.text(max_size=3),
        "method": st.just("POST"),
        "url": st.just(CHAT),
        "body": BODY,
    },
)
WHOLE = st.builds(lambda body: asking(0, **body), BODY)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=10) | LINE | VALUES | WHOLE, max_size=4))
def test_any_file_comes_to_an_end(lines):
    """Whatever is in it: the batch fails and says why, or every line is answered."""

    async def scenario(batches, body):
        ident = (await batches.create(body))["id"]
        await asyncio.sleep(101)
        return batches.get(ident).as_json()

    shown, _ = in_virtual_time(scenario, Options(batch_seconds=100), jsonl(*lines))
    counts = shown["request_counts"]
    if shown["status"] == "failed":
        assert shown["errors"]["data"]
        assert not any(error["code"] == "server_error" for error in shown["errors"]["data"])
    else:
        assert shown["status"] == "completed"
        assert counts["completed"] + counts["failed"] == counts["total"] > 0
