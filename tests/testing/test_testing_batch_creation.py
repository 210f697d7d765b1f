"""What decides whether a simulated batch is created, and how batches are listed."""

import asyncio
import json
from collections import Counter

import openai
import pytest
from simulated_batches import (
    GOOD,
    LONG,
    asking,
    finished,
    in_virtual_time,
    jsonl,
    reached,
    request,
    several,
    submit,
    upload,
)
from simulated_calls import client, error_of

from openai_eval_client.testing import SimulatedServer
from openai_eval_client.testing._faults import ApiError
from openai_eval_client.testing._options import TERMINAL, Options


@pytest.fixture
def server():
    with SimulatedServer(batch_seconds=0.02) as running:
        yield running


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
    """The error names the parameter, and no batch is created."""
    async with client(server) as sdk:
        file = await upload(sdk, several(1))
        status, _, raw = request(server, "/batches", "POST", {"input_file_id": file.id, **GOOD, **change})
    assert (status, error_of(raw)["param"], error_of(raw)["code"]) == (400, param, code)
    assert server.batches == []


def test_a_creation_that_is_no_json_is_a_400(server):
    """A body that is not a JSON object is refused and not recorded."""
    assert request(server, "/batches", "POST", b"{")[0] == 400
    assert request(server, "/batches", "POST", b"[]")[0] == 400
    assert [call.body for call in server.calls] == [None, None]


async def test_the_most_metadata_the_api_takes(server):
    """16 pairs with keys of 64 and values of 512 characters are accepted."""
    metadata = {f"{number:064}": "v" * 512 for number in range(16)}
    async with client(server) as sdk:
        batch = await finished(sdk, several(1), metadata=metadata)
    assert batch.metadata == metadata == server.calls[1].body["metadata"]


async def test_a_file_of_another_purpose_is_refused(server):
    """Only a file uploaded for batches can be the input."""
    async with client(server) as sdk:
        file = await upload(sdk, several(1), purpose="user_data")
        with pytest.raises(openai.BadRequestError, match="purpose"):
            await sdk.batches.create(input_file_id=file.id, **GOOD)


async def test_other_windows_can_be_allowed():
    """The window decides when the batch expires."""
    async with SimulatedServer(completion_windows={"24h", "7d"}) as server, client(server) as sdk:
        batch = await submit(sdk, several(1), completion_window="7d")
    assert batch.expires_at == batch.created_at + 7 * 86_400


async def test_an_unknown_file_may_show_later():
    """As it does at OpenAI: the batch is created, then fails."""
    async with SimulatedServer(batch_seconds=0, unknown_file="later") as server, client(server) as sdk:
        batch = await sdk.batches.create(input_file_id="file-unknown", **GOOD)
        batch = await reached(sdk, batch, *TERMINAL)
    assert batch.status == "failed"
    assert [(error.code, error.param) for error in batch.errors.data] == [("invalid_request", "file_id")]


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
    """A batch above the limit fails after its validation."""
    plans = [{"status": "in_progress", "seconds": 0.02}]
    options = {"batch_seconds": 0.02, "batch_plans": plans, "enqueued_tokens": 2 * TOKENS}
    async with SimulatedServer(**options) as server, client(server) as sdk:
        first = await reached(sdk, await submit(sdk, several(2)), "in_progress")
        second = await finished(sdk, several(1))
        await reached(sdk, await sdk.batches.cancel(first.id), "cancelled")
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
    """Batches created together are counted one after the other."""

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


async def test_batches_are_listed_page_by_page(server):
    """Batches are listed newest first, in pages that follow each other."""
    async with client(server) as sdk:
        created = [(await submit(sdk, several(1))).id for _ in range(5)]
        pages = [page async for page in (await sdk.batches.list(limit=2)).iter_pages()]
        listed = [batch.id async for batch in sdk.batches.list(limit=2)]
    assert listed == created[::-1]
    assert [len(page.data) for page in pages] == [2, 2, 1]
    _, _, raw = request(server, f"/batches?limit=2&after={created[4]}")
    page = json.loads(raw)
    assert (page["object"], page["first_id"], page["last_id"]) == ("list", created[3], created[2])
    assert page["has_more"] is True
    empty = json.loads(request(server, f"/batches?after={created[0]}")[2])
    assert (empty["data"], empty["first_id"], empty["has_more"]) == ([], None, False)


@pytest.mark.parametrize(
    ("query", "param"),
    [("limit=0", "limit"), ("limit=101", "limit"), ("limit=x", "limit"), ("after=batch_gone", "after")],
)
def test_a_page_that_cannot_be_is_a_400(server, query, param):
    """A limit out of range or an unknown `after` is refused by name."""
    status, _, raw = request(server, f"/batches?{query}")
    assert (status, error_of(raw)["param"]) == (400, param)
