"""Simulated batches: as they complete, as plans want them to end, cancelled, refused, and in virtual time."""

import asyncio
import json

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import Batch, Completion, CreateEmbeddingResponse, FileObject
from openai.types.chat import ChatCompletion
from openai.types.responses import Response
from pydantic import BaseModel
from simulated_batches import (
    CHAT_URL,
    asking,
    finished,
    in_virtual_time,
    jsonl,
    reached,
    read_lines,
    several,
    submit,
    upload,
)
from simulated_calls import client

from openai_eval_client.testing import SimulatedServer
from openai_eval_client.testing._catalog import SPOILERS
from openai_eval_client.testing._options import OUTCOMES, STATUSES, TERMINAL, Options


@pytest.fixture
def server():
    with SimulatedServer(batch_seconds=0.02) as running:
        yield running


async def test_a_batch_completes(server):
    """Every object has the API's shape, every line its answer, in another order than the input."""
    async with client(server) as sdk:
        file = await upload(sdk, several(20))
        assert FileObject.model_validate(file.model_dump(), strict=True).bytes == len(several(20))
        created = await sdk.batches.create(
            input_file_id=file.id, endpoint=CHAT_URL, completion_window="24h", metadata={"intent": "i"}
        )
        assert (created.status, created.request_counts.total) == ("validating", 0)
        assert created.expires_at == created.created_at + 86_400
        batch = await reached(sdk, created, "completed")
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
        (CHAT_URL, ChatCompletion),
        ("/v1/responses", Response),
        ("/v1/completions", Completion),
        ("/v1/embeddings", CreateEmbeddingResponse),
    ],
)
async def test_each_endpoint_answers_in_its_own_way(server, url, kind):
    """Each endpoint's lines hold its own kind of answer."""
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
    """The same seed writes the lines in the same order."""
    orders = []
    for seed in (1, 1, 2):
        async with SimulatedServer(batch_seconds=0, seed=seed) as server, client(server) as sdk:
            batch = await finished(sdk, several(10))
            orders.append([line["custom_id"] for line in await read_lines(sdk, batch.output_file_id)])
    assert orders[0] == orders[1] != orders[2]


async def test_a_line_the_endpoint_refuses_fails_alone():
    """Refusals are written with the API's error, and so is what trips the simulation itself."""
    content = jsonl(asking(0), asking(1, messages="hello"), asking(2, tools=[1]), asking(3, n="two"))
    async with SimulatedServer(batch_seconds=0.02, lenient=True) as server, client(server) as sdk:
        batch = await finished(sdk, content)
        failed = {line["custom_id"]: line for line in await read_lines(sdk, batch.error_file_id)}
    assert batch.request_counts.model_dump() == {"total": 4, "completed": 1, "failed": 3}
    statuses = {name: line["response"]["status_code"] for name, line in failed.items()}
    assert statuses == {"r1": 400, "r2": 500, "r3": 400}
    assert failed["r1"]["error"] is None
    assert failed["r1"]["response"]["body"]["error"]["param"] == "messages"


async def test_an_answer_function_that_raises_fails_its_line():
    """An exception in `answer` is a 500 in the error file."""
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
    "garbage": (1, 0, 1, 0),
    **dict.fromkeys(("status_text", "body_text", *SPOILERS), (1, 0, 1, 0)),
}


def test_every_outcome_is_in_the_table():
    """The table covers all outcomes."""
    assert set(WRITTEN) == set(OUTCOMES)


@pytest.mark.parametrize("outcome", OUTCOMES)
async def test_what_an_outcome_writes(outcome):
    """Each outcome writes the lines, and counts as, the table says."""
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
    """A plan can leave out, empty or lose either file; the other is whole."""
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
    """A plan's counts and errors are shown in place of the true ones."""
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
    """Outcomes come about as often as they should, and repeat with the seed."""
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
    """A batch stays at the status of its plan until it is cancelled."""
    plan = {"status": status, "done": 0.5, "seconds": 0.02}
    async with SimulatedServer(batch_plans=[plan]) as server, client(server) as sdk:
        batch = await reached(sdk, await submit(sdk, several(4)), status)
        while batch.request_counts.completed < 2 and status != "validating":
            batch = await sdk.batches.retrieve(batch.id)
        marker = await finished(sdk, several(4))  # takes ten times as long
        assert (await sdk.batches.retrieve(batch.id)).status == status
        cancelling = await sdk.batches.cancel(batch.id)
        assert (cancelling.status, marker.status) == ("cancelling", "completed")
        if status == "cancelling":
            return
        batch = await reached(sdk, batch, "cancelled")
        output = await read_lines(sdk, batch.output_file_id)
        failures = await read_lines(sdk, batch.error_file_id)
    done = 0 if status == "validating" else 2
    assert [len(output), len(failures)] == [done, done]
    assert batch.request_counts.total == 2 * done
    assert {line["error"]["code"] for line in failures} <= {"batch_cancelled"}


async def test_a_batch_under_way_is_cancelled():
    """Nothing is lost: what was answered by then is in the output file, the rest in the error file."""
    async with SimulatedServer(batch_seconds=3) as server, client(server) as sdk:
        batch = await submit(sdk, several(200))
        while batch.request_counts.completed < 10:
            batch = await sdk.batches.retrieve(batch.id)
        cancelling = await sdk.batches.cancel(batch.id)
        again = await sdk.batches.cancel(batch.id)
        batch = await reached(sdk, batch, "cancelled")
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
    """Cancelling a batch that has ended is a 409."""
    async with (
        SimulatedServer(batch_seconds=0, batch_plans=[{"status": status}]) as server,
        client(server) as sdk,
    ):
        batch = await finished(sdk, several(1))
        with pytest.raises(openai.ConflictError, match=f"a batch with status '{status}'"):
            await sdk.batches.cancel(batch.id)


async def test_a_batch_cancelled_at_once_has_no_files():
    """A batch cancelled before it ran has no lines and no files."""
    async with SimulatedServer(batch_plans=[{"seconds": 5}]) as server, client(server) as sdk:
        batch = await submit(sdk, several(2))
        await sdk.batches.cancel(batch.id)
        batch = await reached(sdk, batch, "cancelled")
    assert (batch.output_file_id, batch.error_file_id, batch.in_progress_at) == (None, None, None)
    assert batch.request_counts.total == 0


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
