"""Responses made in the background, through the official SDK and on a clock."""

import json

import openai
import pytest
from openai.types.responses import Response
from simulated_calls import Clock, client, error_of, send

from openai_eval_client.testing import SimulatedServer
from openai_eval_client.testing._background import StoredResponses
from openai_eval_client.testing._options import Options

ASKED = {"model": "m", "input": "hello there", "background": True}
FINAL = {"id": "resp_1", "object": "response", "status": "completed", "output": [5], "usage": {}}


async def test_a_response_is_queued_then_in_progress_then_completed():
    """Its output and usage come with its end, and so does its place on the bill."""
    async with SimulatedServer(background_polls=2) as server, client(server) as sdk:
        created = await sdk.responses.create(**ASKED)
        assert (created.status, created.background, created.output, created.usage) == (
            "queued",
            True,
            [],
            None,
        )
        for _ in range(2):
            assert not any(call.served for call in server.calls)
            assert server.calls[0].completion_tokens == 0
            shown = await sdk.responses.retrieve(created.id)
            assert (shown.status, shown.output, shown.usage) == ("in_progress", [], None)
        ended = await sdk.responses.retrieve(created.id)
        Response.model_validate(ended.model_dump(), strict=True)
        assert (ended.id, ended.status, ended.output_text) == (created.id, "completed", "echo: hello there")
        assert ended.usage.output_tokens == 3
        assert await sdk.responses.retrieve(created.id) == ended
        assert [call.served for call in server.calls] == [True, False, False, False, False]
        assert server.calls[0].prompt_tokens == ended.usage.input_tokens
        assert server.calls[0].completion_tokens == ended.usage.output_tokens


async def test_a_cancelled_response_is_not_billed():
    """Cancelling twice is cancelling once; what has ended stays as it is."""
    async with SimulatedServer(background_polls=0, background_seconds=1000) as server, client(server) as sdk:
        running = await sdk.responses.create(**ASKED)
        for _ in range(2):
            cancelled = await sdk.responses.cancel(running.id)
            assert (cancelled.status, cancelled.output, cancelled.usage) == ("cancelled", [], None)
        assert (await sdk.responses.retrieve(running.id)).status == "cancelled"
        assert not any(call.served for call in server.calls)
    async with SimulatedServer(background_polls=0) as server, client(server) as sdk:
        ended = await sdk.responses.create(**ASKED)
        assert (await sdk.responses.cancel(ended.id)).status == "completed"
        assert server.calls[0].served


async def test_a_deleted_or_unknown_response_is_a_404():
    """Nothing is left of a deleted response; one that was made at once is not kept."""
    async with SimulatedServer() as server, client(server) as sdk:
        created = await sdk.responses.create(**ASKED)
        assert json.loads(send(server, None, f"/responses/{created.id}", method="DELETE")[2])["deleted"]
        for call in (sdk.responses.retrieve, sdk.responses.cancel, sdk.responses.delete):
            with pytest.raises(openai.NotFoundError, match=f"Response with id '{created.id}' not found."):
                await call(created.id)
        at_once = await sdk.responses.create(model="m", input="hello")
        with pytest.raises(openai.NotFoundError):
            await sdk.responses.retrieve(at_once.id)


def test_the_header_says_when_to_poll_again():
    """It comes while the response is under way, and only if asked for."""
    with SimulatedServer(background_poll_after=0.25) as server:
        _, headers, raw = send(server, ASKED, "/responses")
        path, told = f"/responses/{json.loads(raw)['id']}", [headers]
        told += [send(server, None, path, method="GET")[1] for _ in range(2)]
        assert [headers.get("openai-poll-after-ms") for headers in told] == ["250", "250", None]
        assert "openai-poll-after-ms" not in send(server, {**ASKED, "background": False}, "/responses")[1]


def test_its_time_passes_by_the_clock():
    """Its seconds are those given, else its latency; a poll before counts for nothing more."""
    clock = Clock()
    for options, seconds in ((Options(background_polls=1), 5), (Options(background_seconds=20), 20)):
        stored = StoredResponses(options, clock=clock)
        stored.keep(FINAL, 5, streamed=False)
        for _ in range(3):
            assert stored.get("resp_1").poll()["status"] == "in_progress"
        clock.now += seconds - 0.1
        assert stored.get("resp_1").poll()["status"] == "in_progress"
        clock.now += 0.2
        assert stored.get("resp_1").poll() == FINAL


def test_a_response_is_created_at_once_and_its_faults_come_as_ever():
    """Its latency is not waited for, and a creation that failed keeps nothing."""
    with SimulatedServer(latency=1000, latency_sigma=0, script=["429", "ok"]) as server:
        status, _, raw = send(server, ASKED, "/responses")
        assert (status, error_of(raw)["code"]) == (429, "rate_limit_exceeded")
        assert json.loads(send(server, ASKED, "/responses")[2])["status"] == "queued"


def test_polls_can_fail():
    """The endpoints of stored responses take the events of the others."""
    script = {"retrieve_response": ["500"], "cancel_response": ["503"], "delete_response": ["500_after"]}
    with SimulatedServer(endpoint_script=script) as server:
        path = f"/responses/{json.loads(send(server, ASKED, '/responses')[2])['id']}"
        assert send(server, None, path, method="GET")[0] == 500
        assert send(server, None, path + "/cancel")[0] == 503
        assert json.loads(send(server, None, path, method="GET")[2])["status"] == "in_progress"
        assert send(server, None, path, method="DELETE")[0] == 500
        assert send(server, None, path, method="GET")[0] == 404


@pytest.mark.parametrize("process", [False, True])
async def test_a_streamed_response_has_ended(process):
    """A stream in the background ends like any other; the bill is the same from a process."""
    async with SimulatedServer(process=process) as server, client(server) as sdk:
        events = [event async for event in await sdk.responses.create(**ASKED, stream=True)]
        assert (await sdk.responses.retrieve(events[-1].response.id)).output_text == "echo: hello there"
        assert (await sdk.responses.create(**ASKED)).status == "queued"
        assert [(call.served, call.completion_tokens) for call in server.calls] == [
            (True, 3),
            (False, 0),
            (False, 0),
        ]
