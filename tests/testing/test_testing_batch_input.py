"""The input file of a simulated batch: validated line by line, and never the end of the server."""

import asyncio
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_batches import CHAT_URL, asking, finished, in_virtual_time, jsonl, several
from simulated_calls import client

from openai_eval_client.testing import SimulatedServer
from openai_eval_client.testing._batches import input as input_module
from openai_eval_client.testing._options import Options


@pytest.fixture
def server():
    with SimulatedServer(batch_seconds=0.02) as running:
        yield running


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
    """Every error has a code, a parameter and the number of its line."""
    async with SimulatedServer(batch_seconds=0, models=["m", "other"]) as server, client(server) as sdk:
        batch = await finished(sdk, content)
    assert batch.status == "failed"
    assert [(error.code, error.param, error.line) for error in batch.errors.data] == errors
    assert all(error.message for error in batch.errors.data)
    assert batch.failed_at
    assert (batch.request_counts.total, batch.output_file_id, batch.error_file_id) == (0, None, None)


async def test_a_file_has_50_000_lines_at_most(server, monkeypatch):
    """A file with one line more than allowed fails its batch."""
    assert input_module.MOST_LINES == 50_000
    monkeypatch.setattr(input_module, "MOST_LINES", 3)
    async with client(server) as sdk:
        assert (await finished(sdk, several(3))).status == "completed"
        batch = await finished(sdk, several(4))
    assert [error.code for error in batch.errors.data] == ["too_many_tasks"]


async def test_blank_lines_and_a_last_line_without_its_end_are_read(server):
    """Blank lines are skipped, and the last line needs no newline."""
    async with client(server) as sdk:
        batch = await finished(sdk, b"\n" + several(2) + b"\r\n" + json.dumps(asking(5)).encode())
    assert batch.request_counts.completed == 3


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
        "url": st.just(CHAT_URL),
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
