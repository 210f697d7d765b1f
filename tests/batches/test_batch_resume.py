"""What was begun is never given up, forgotten or created again because a look at it failed."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING, Any

import openai
import pytest
from batches import SOON, connect

from openai_eval_client import BatchRequest
from openai_eval_client._batches.objects import JOB_KEY, LINES_KEY
from openai_eval_client.testing import SimulatedServer

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("few_certificates", "no_pauses")

EIGHT = [f"p{n}" for n in range(8)]
REQUESTS = [BatchRequest(prompt=prompt) for prompt in EIGHT]


def places(server: SimulatedServer) -> Counter[tuple[str, str]]:
    """Return how many batches there are of each place of each job."""
    return Counter((batch["metadata"][JOB_KEY], batch["metadata"][LINES_KEY]) for batch in server.batches)


async def interrupted(client: Any, server: SimulatedServer, batches: int) -> None:
    """Start a run and cancel it once it has created so many batches."""
    task = asyncio.create_task(client.batch_generate(EIGHT, use_batch_api=True))
    while len(server.batches) < batches:
        await asyncio.sleep(SOON)
    await asyncio.sleep(10 * SOON)  # the last one's id is recorded
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_resume_that_fails_forgets_nothing(tmp_path: Path) -> None:
    """A rerun with a wrong key ends with that error and the ids; the next goes on with the same batches."""
    cache = tmp_path / "runs.sqlite"
    with SimulatedServer(batch_seconds=0.5, api_key="right") as server:
        async with connect(server, cache=cache, api_key="right", batch={"max_batch_size": 4}) as client:
            await interrupted(client, server, 2)
        async with connect(server, cache=cache, api_key="wrong", batch={"max_batch_size": 4}) as client:
            with pytest.raises(openai.AuthenticationError) as caught:
                await client.batch_generate(EIGHT, use_batch_api=True)
            assert set(caught.value.job_id.split("+")) == {batch["id"] for batch in server.batches}
        async with connect(server, cache=cache, api_key="right", batch={"max_batch_size": 4}) as client:
            responses = await client.batch_generate(EIGHT, use_batch_api=True)
        assert [response.content for response in responses] == [f"echo: {prompt}" for prompt in EIGHT]
        assert set(places(server).values()) == {1}
        assert len(server.batches) == 2


async def test_a_rerun_with_smaller_batches_goes_on_with_those_there_are(tmp_path: Path) -> None:
    """What is recorded was cut as it was cut."""
    cache = tmp_path / "runs.sqlite"
    with SimulatedServer(batch_seconds=0.3) as server:
        async with connect(server, cache=cache, batch={"max_batch_size": 8}) as client:
            await interrupted(client, server, 1)
        async with connect(server, cache=cache, batch={"max_batch_size": 3}) as client:
            responses = await client.batch_generate(EIGHT, use_batch_api=True)
        assert [response.content for response in responses] == [f"echo: {prompt}" for prompt in EIGHT]
        assert len(server.batches) == 1


async def test_a_creation_that_may_have_taken_place_is_looked_for(tmp_path: Path) -> None:
    """The only attempt is done and answered with a 500: the batch is found at the next look."""
    with SimulatedServer(batch_seconds=0.1, endpoint_script={"create": ["500_after"]}) as server:
        async with connect(server, max_retries=0, batch={"max_batch_size": 4}) as client:
            responses = await client.batch_generate(EIGHT, use_batch_api=True)
        assert [response.content for response in responses] == [f"echo: {prompt}" for prompt in EIGHT]
        assert set(places(server).values()) == {1}
        assert len(server.batches) == 2


async def test_a_rerun_of_a_submit_leaves_its_batches_alone(tmp_path: Path) -> None:
    """One look fails: nothing is cancelled or forgotten, and the next rerun has the same job."""
    cache = tmp_path / "runs.sqlite"
    script = {"retrieve": ["ok", "500"]}
    with SimulatedServer(batch_seconds=5, endpoint_script=script) as server:
        async with connect(server, cache=cache, max_retries=0, batch={"max_batch_size": 3}) as client:
            job = await client.submit_batch_job(REQUESTS)
        async with connect(server, cache=cache, max_retries=0, batch={"max_batch_size": 3}) as client:
            with pytest.raises(openai.InternalServerError) as caught:
                await client.submit_batch_job(REQUESTS)
            assert set(caught.value.job_id.split("+")) == set(job.job_id.split("+"))
        async with connect(server, cache=cache, max_retries=0, batch={"max_batch_size": 3}) as client:
            again = await client.submit_batch_job(REQUESTS)
        assert again.job_id == job.job_id
        assert {batch["status"] for batch in server.batches} <= {"validating", "in_progress"}


async def test_a_submit_that_failed_is_not_counted(tmp_path: Path) -> None:
    """The second try of a program is found again by the first try of its rerun."""
    cache = tmp_path / "runs.sqlite"
    with SimulatedServer(batch_seconds=5, endpoint_script={"upload": ["500"]}) as server:
        async with connect(server, cache=cache, max_retries=0) as client:
            with pytest.raises(openai.InternalServerError):
                await client.submit_batch_job(REQUESTS)
            job = await client.submit_batch_job(REQUESTS)
        async with connect(server, cache=cache, max_retries=0) as client:
            assert (await client.submit_batch_job(REQUESTS)).job_id == job.job_id
        assert len(server.batches) == 1


async def test_a_bill_is_booked_whole_or_not_at_all() -> None:
    """Settling fails half way and is repeated: the bill has every answer once."""
    plans = [{"lines": ["no_usage"] * 4}]
    script = {"content": ["ok", "503", "503"]}
    with SimulatedServer(batch_seconds=0.05, batch_plans=plans, endpoint_script=script) as server:
        async with connect(server, max_retries=1) as client:
            responses = await client.batch_generate(EIGHT, use_batch_api=True)
            total = sum(response.usage.estimated_cost for response in responses)
            assert float(client.stats.cost) == pytest.approx(total)
            assert client.stats.requests == 8


async def test_a_rerun_that_is_killed_early_forgets_no_later_job(tmp_path: Path) -> None:
    """While it waits for the first job of the run before, the second job stays recorded."""
    cache = tmp_path / "runs.sqlite"
    plans = [{"status": "expired", "done": 0.5}, {"seconds": 1.0}]
    with SimulatedServer(batch_seconds=0.02, batch_plans=plans) as server:
        async with connect(server, cache=cache) as client:
            await interrupted(client, server, 2)
        seen = len(server.calls)
        async with connect(server, cache=cache, batch={"polling_interval": 60}) as client:
            task = asyncio.create_task(client.batch_generate(EIGHT, use_batch_api=True))
            while len(server.calls) == seen:  # it looks at the first job's batch, and then waits a minute
                await asyncio.sleep(SOON)
            await asyncio.sleep(10 * SOON)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        async with connect(server, cache=cache) as client:
            responses = await client.batch_generate(EIGHT, use_batch_api=True)
        assert [response.content for response in responses] == [f"echo: {prompt}" for prompt in EIGHT]
        assert len(server.batches) == 2
