"""Batch jobs end to end: submitted in batches, all or none; looked at; cancelled; listed."""

from __future__ import annotations

import asyncio
import functools
import gc
import json
import pickle
from datetime import datetime, timezone
from typing import Any

import openai
import pytest
from batches import (
    MODEL,
    OTHER_MODEL,
    SOON,
    Spoiling,
    asked,
    by_hand,
    cancelled,
    connect,
    creations,
    ended,
    line,
    steps,
)

from openai_eval_client import (
    BatchError,
    BatchJobStatus,
    BatchRequest,
    OpenAIClient,
    OpenAIConfig,
    PartialFailureError,
    QuotaError,
)
from openai_eval_client._batches import files as _files
from openai_eval_client._batches.objects import JOB_KEY, read_job_metadata
from openai_eval_client.testing import SimulatedServer

pytestmark = pytest.mark.usefixtures("few_certificates", "no_pauses")


async def lines_sent(client: OpenAIClient, server: SimulatedServer) -> list[list[dict[str, Any]]]:
    """Return the lines of each batch's input file."""
    contents = [await client.openai.files.content(batch["input_file_id"]) for batch in server.batches]
    return [[json.loads(text) for text in content.text.splitlines()] for content in contents]


# --- submitted -------------------------------------------------------------------------------------------


async def test_a_job_is_a_batch() -> None:
    """Its id, status, time and count; and the server got the window and the metadata."""
    with SimulatedServer(batch_seconds=0.01) as server:
        async with connect(server) as client:
            before = datetime.now(tz=timezone.utc).timestamp()
            job = await client.submit_batch_job(asked(3), metadata={"run": "7", "empty": ""})
            (batch,) = server.batches
            assert job.job_id == batch["id"]
            assert (job.status, job.request_count) == ("validating", 3)
            assert abs(job.created_at.timestamp() - before) < 5
            assert job.created_at.tzinfo is timezone.utc
            assert (batch["completion_window"], batch["endpoint"]) == ("24h", "/v1/chat/completions")
            assert {name: batch["metadata"][name] for name in ("run", "empty")} == {"run": "7", "empty": ""}
            assert len(batch["metadata"]) == 4
            ((first, *_),) = await lines_sent(client, server)
    assert first == {
        "custom_id": "request-0",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": MODEL, "messages": [{"role": "user", "content": "p0"}]},
    }


async def test_as_many_metadata_as_are_allowed() -> None:
    """14 pairs of the greatest length, beside our two."""
    metadata = {f"{n:02}".ljust(64, "k"): "v" * 512 for n in range(14)}
    with SimulatedServer(batch_seconds=0.01) as server:
        async with connect(server) as client:
            await client.submit_batch_job(asked(1), metadata=metadata)
        assert {**server.batches[0]["metadata"], **metadata} == server.batches[0]["metadata"]


@pytest.mark.parametrize(
    ("models", "size", "indexes"),
    [
        ([MODEL], 3, [[0, 1, 2], [3, 4, 5], [6]]),
        ([MODEL], 7, [[0, 1, 2, 3, 4, 5, 6]]),
        ([MODEL, OTHER_MODEL], 50_000, [[0, 2, 4, 6], [1, 3, 5]]),
        ([MODEL, OTHER_MODEL], 2, [[0, 2], [4, 6], [1, 3], [5]]),
        (["a", "b", "c"], 1, [[0], [3], [6], [1], [4], [2], [5]]),
    ],
)
async def test_a_job_is_cut_by_model_and_size(models: list[str], size: int, indexes: list[list[int]]) -> None:
    """One batch each, one id for all, and the results in input order."""
    requests = [BatchRequest(prompt=f"p{n}", model=models[n % len(models)]) for n in range(7)]
    with SimulatedServer(batch_seconds=0.01) as server:
        async with connect(server, batch={"max_batch_size": size}) as client:
            job = await client.submit_batch_job(requests)
            sent = await lines_sent(client, server)
            status = await ended(client, job.job_id)
            responses = await client.retrieve_batch_results(job.job_id)
        places = [read_job_metadata(batch["metadata"]) for batch in server.batches]
        assert job.job_id == "+".join(batch["id"] for batch in server.batches)
    assert [[int(each["custom_id"].split("-")[1]) for each in lines] for lines in sent] == indexes
    assert [response.content for response in responses] == [f"echo: p{n}" for n in range(7)]
    assert (job.request_count, status.request_count, status.completed_count) == (7, 7, 7)
    assert len({place.job for place in places}) == 1
    assert [place.first for place in places] == [sum(map(len, indexes[:n])) for n in range(len(indexes))]
    assert {place.total for place in places} == {7}


async def test_a_job_is_cut_by_bytes(monkeypatch) -> None:
    """A file holds no more than it may."""
    monkeypatch.setattr(_files.write_files, "__kwdefaults__", {"most_bytes": 400})
    with SimulatedServer(batch_seconds=0.01) as server:
        async with connect(server) as client:
            job = await client.submit_batch_job(asked(7))
            files = [await client.openai.files.retrieve(batch["input_file_id"]) for batch in server.batches]
            await ended(client, job.job_id)
            responses = await client.retrieve_batch_results(job.job_id)
    assert len(files) > 1
    assert all(file.bytes <= 400 for file in files)
    assert [response.content for response in responses] == [f"echo: p{n}" for n in range(7)]


# --- all or none -----------------------------------------------------------------------------------------

FAILURES = {
    "refused": (["ok", "ok", "500", "500"], openai.InternalServerError),
    "dropped": (["ok", "ok", "drop", "drop"], openai.APIConnectionError),
    "unclear": (["ok", "ok", "500_after"], openai.InternalServerError),
}


@pytest.mark.parametrize("case", FAILURES)
async def test_a_job_that_is_not_created_whole_is_cancelled(case: str, caplog) -> None:
    """Every batch there is of it, also one that came about unseen; the error names them, pickled too."""
    script, kind = FAILURES[case]
    retries = 0 if case == "unclear" else 1
    with SimulatedServer(batch_seconds=30, endpoint_script={"create": script}) as server:
        async with connect(server, max_retries=retries, batch={"max_batch_size": 1}) as client:
            with pytest.raises(kind) as caught:
                await client.submit_batch_job(asked(4))
            status = await client.get_batch_status(caught.value.job_id)
        batches = server.batches
    assert len(batches) == (3 if case == "unclear" else 2)
    assert {batch["status"] for batch in batches} <= {"cancelling", "cancelled"}
    assert caught.value.job_id == "+".join(batch["id"] for batch in batches)
    assert status.request_count == len(batches)
    assert pickle.loads(pickle.dumps(caught.value)).job_id == caught.value.job_id  # noqa: S301
    assert [record for record in caplog.records if caught.value.job_id in record.getMessage()]


async def test_an_upload_that_fails_cancels_what_there_is() -> None:
    with SimulatedServer(batch_seconds=30, endpoint_script={"upload": ["ok", "500", "500"]}) as server:
        async with connect(server, max_retries=1, batch={"max_batch_size": 1}) as client:
            with pytest.raises(openai.InternalServerError) as caught:
                await client.submit_batch_job(asked(3))
        (batch,) = server.batches
    assert batch["status"] in {"cancelling", "cancelled"}
    assert caught.value.job_id == batch["id"]


async def test_nothing_created_names_nothing() -> None:
    with SimulatedServer(endpoint_faults={"create": {"500": 1.0}}) as server:
        async with connect(server, max_retries=1) as client:
            with pytest.raises(BatchError, match="not known whether the batch") as caught:
                await client.submit_batch_job(asked(1))
        assert server.batches == []
    assert not hasattr(caught.value, "job_id")


async def test_tokens_beyond_the_enqueued_limit_are_a_quota_error() -> None:
    """The first batches fit, the next does not: those made are cancelled, none is left to be paid."""
    with SimulatedServer(batch_seconds=30, enqueued_tokens=30, enqueued_refusal="create") as server:
        async with connect(server, batch={"max_batch_size": 2}) as client:
            with pytest.raises(QuotaError, match="Enqueued token limit") as caught:
                await client.submit_batch_job(asked(9))
        assert caught.value.code == "token_limit_exceeded"
        assert len(server.batches) == 2
        assert {batch["status"] for batch in server.batches} <= {"cancelling", "cancelled"}
        assert len(creations(server)) == 3


async def test_tokens_beyond_the_limit_said_later_are_in_the_status() -> None:
    """As the API says it: the batch has failed, and why; its requests have that error."""
    requests = [BatchRequest(prompt="x", model=model) for model in (MODEL, OTHER_MODEL, MODEL, MODEL)]
    with SimulatedServer(batch_seconds=0.01, enqueued_tokens=15, enqueued_refusal="later") as server:
        async with connect(server) as client:
            job = await client.submit_batch_job(requests)  # 21 tokens for one model, 7 for the other
            status = await ended(client, job.job_id)
            with pytest.raises(PartialFailureError) as caught:
                await client.retrieve_batch_results(job.job_id)
    assert [error.code for error in status.errors] == ["token_limit_exceeded"]
    assert (status.status, status.completed_count, status.failed_count) == ("completed", 1, 3)
    assert list(caught.value.failures) == [0, 2, 3]
    assert {error.code for error in caught.value.failures.values()} == {"token_limit_exceeded"}


async def test_a_cancelled_submission_names_what_it_made() -> None:
    """Those batches go on; whether to cancel them is for the caller to decide."""
    script = {"create": ["ok", "ok", "hang"]}
    with SimulatedServer(batch_seconds=30, endpoint_script=script) as server:
        async with connect(server, batch={"max_batch_size": 1}) as client:

            async def third() -> None:
                while len(creations(server)) < 2 or server.in_flight == 0:
                    await asyncio.sleep(SOON)

            error = await cancelled(client.submit_batch_job(asked(3)), third)
        assert isinstance(error, asyncio.CancelledError)
        assert error.job_id == "+".join(batch["id"] for batch in server.batches)
        assert len(server.batches) == 2


async def test_a_submission_may_be_cancelled_anywhere() -> None:
    """After any number of steps: no file stays open, and all but the last batch are named."""
    with SimulatedServer(batch_seconds=0.01) as server:
        async with connect(server, batch={"max_batch_size": 2}) as client:
            for many in range(1, 200, 7):
                before = {batch["id"] for batch in server.batches}
                result = await cancelled(client.submit_batch_job(asked(7)), functools.partial(steps, many))
                named = set(getattr(result, "job_id", "").split("+")) - {""}
                made = {batch["id"] for batch in server.batches} - before
                assert named <= made
                assert len(made - named) <= 1
    gc.collect()  # a file left open would warn


# --- looked at -------------------------------------------------------------------------------------------


async def test_a_status_adds_up_its_batches() -> None:
    """Counts, times, and the least advanced state while any batch runs."""
    plans = [{"lines": ["ok", "400"]}, {"status": "expired", "lines": ["ok", "expired"]}, {"seconds": 0.3}]
    with SimulatedServer(batch_seconds=0.01, batch_plans=plans) as server:
        async with connect(server, batch={"max_batch_size": 2}) as client:
            job = await client.submit_batch_job(asked(5))
            seen = []
            while (status := await client.get_batch_status(job.job_id)).completed_at is None:
                seen.append((status.status, status.completed_count, status.request_count))
                await asyncio.sleep(SOON)
    assert {state for state, _, _ in seen} <= {"validating", "in_progress", "finalizing"}
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert {total for _, _, total in seen} == {5}
    assert (status.status, status.completed_count, status.failed_count) == ("completed", 3, 2)
    assert status.completed_at.tzinfo is timezone.utc
    assert status.completed_at >= status.created_at
    assert BatchJobStatus.model_validate_json(status.model_dump_json()) == status


async def test_a_state_that_is_not_known_yet_counts_as_running() -> None:
    """The API may get new ones; the job is not taken for ended, nor does anything break."""

    def future(response: Any) -> Any:
        return spoilt(response, status="paused_for_review")

    with SimulatedServer(batch_seconds=0.01) as server:
        spoiling = Spoiling("GET", "", [None, future, future, future])
        async with connect(server, http_client=spoiling.client) as client:
            job = await client.submit_batch_job(asked(2))
            assert (await client.get_batch_status(job.job_id)).status == "in_progress"
            with pytest.raises(BatchError) as caught:
                await client.retrieve_batch_results(job.job_id)
            assert caught.value.code == "in_progress"
            assert (await client.cancel_batch_job(job.job_id)).request_count == 2


def spoilt(response: Any, **fields: Any) -> Any:
    body = {**response.json(), **fields}
    return type(response)(200, json=body)


async def test_errors_are_named_by_the_callers_requests() -> None:
    """Lines of the input files become positions in the list, whatever the order of the batches."""
    plans = [
        {
            "errors": [
                {"code": "a", "message": "one", "param": "body.x", "line": 2},
                {"code": "b", "message": "two"},
            ]
        },
        {
            "errors": [
                {"code": "c", "message": "three", "line": 1},
                {"code": "d", "message": "four", "line": 99},
            ]
        },
    ]
    requests = [BatchRequest(prompt="x", model=(MODEL, OTHER_MODEL)[n % 2]) for n in range(6)]
    with SimulatedServer(batch_seconds=0.01, batch_plans=plans) as server:
        async with connect(server) as client:
            job = await client.submit_batch_job(requests)
            status = await ended(client, job.job_id)
            with pytest.raises(BatchError, match="one") as caught:
                await client.retrieve_batch_results(job.job_id)
    assert [(error.code, error.index, error.line, error.param) for error in status.errors] == [
        ("a", 2, 3, "body.x"),
        ("b", None, None, None),
        ("c", 1, 2, None),
        ("d", None, None, None),
    ]
    assert (status.status, status.failed_count) == ("failed", 6)
    assert caught.value.code == "a"


async def test_errors_of_a_batch_are_those_of_its_requests() -> None:
    """The request that a line names has that line's error, the others of the batch the first one."""
    errors = [{"code": "a", "message": "one", "line": 2}, {"code": "b", "message": "two", "line": 3}]
    with SimulatedServer(batch_seconds=0.01, batch_plans=[{}, {"errors": errors}]) as server:
        async with connect(server, batch={"max_batch_size": 4}) as client:
            job = await client.submit_batch_job(asked(8, custom_id=None))
            await ended(client, job.job_id)
            outcomes = await client.retrieve_batch_results(job.job_id, return_exceptions=True)
    assert [getattr(outcome, "code", "ok") for outcome in outcomes] == ["ok"] * 4 + ["a", "a", "b", "a"]
    assert [outcome.index for outcome in outcomes[4:]] == [4, 5, 6, 7]


async def test_errors_of_a_file_with_empty_lines() -> None:
    """The line is that of the file, the position that of the request."""
    lines = [line("a", "p0"), None, line("b", "p1"), {**line("c", "p2"), "method": "GET"}]
    with SimulatedServer(batch_seconds=0.01) as server:
        async with connect(server) as client:
            batch_id = await by_hand(client, lines)
            status = await ended(client, batch_id)
    assert [(error.code, error.line) for error in status.errors] == [("invalid_method", 3)]


async def test_an_unknown_job_is_not_found() -> None:
    with SimulatedServer() as server:
        async with connect(server) as client:
            for call in (client.get_batch_status, client.retrieve_batch_results, client.cancel_batch_job):
                with pytest.raises(openai.NotFoundError):
                    await call("batch_unknown")
        assert len(server.calls) == 3


# --- cancelled -------------------------------------------------------------------------------------------


async def test_a_job_is_cancelled_and_keeps_what_it_has() -> None:
    """Batches that have ended stay as they are."""
    plans = [{}, {"seconds": 30}]
    with SimulatedServer(batch_seconds=0.01, batch_plans=plans) as server:
        async with connect(server, batch={"max_batch_size": 2}) as client:
            job = await client.submit_batch_job(asked(4))
            await ended(client, job.job_id.partition("+")[0])
            status = await client.cancel_batch_job(job.job_id)
            assert status.status == "cancelling"
            cancels = [call for call in server.calls if call.path.endswith("/cancel")]
            assert [call.status for call in cancels] == [200]
    assert status.completed_count == 2


async def test_a_job_that_is_cancelled_in_the_middle_hands_out_what_was_answered() -> None:
    with SimulatedServer(batch_seconds=0.5) as server:
        async with connect(server) as client:
            job = await client.submit_batch_job(asked(20))
            while (await client.get_batch_status(job.job_id)).completed_count < 5:
                await asyncio.sleep(SOON)
            await client.cancel_batch_job(job.job_id)
            status = await ended(client, job.job_id)
            outcomes = await client.retrieve_batch_results(job.job_id, return_exceptions=True)
    answered = {n: o for n, o in enumerate(outcomes) if not isinstance(o, Exception)}
    assert status.status == "cancelled"
    assert 5 <= len(answered) == status.completed_count < 20
    assert all(response.content == f"echo: p{n}" for n, response in answered.items())
    assert {o.code for o in outcomes if isinstance(o, Exception)} == {"batch_cancelled"}


async def test_a_job_that_has_ended_is_not_cancelled() -> None:
    """Not even where it ends between the look and the cancellation."""
    with SimulatedServer(batch_seconds=0.01) as server:
        spoiling = Spoiling("GET", "", [])
        async with connect(server, http_client=spoiling.client) as client:
            job = await client.submit_batch_job(asked(2))
            await ended(client, job.job_id)
            assert (await client.cancel_batch_job(job.job_id)).status == "completed"
            spoiling.spoil_next(lambda response: spoilt(response, status="in_progress"))
            assert (await client.cancel_batch_job(job.job_id)).status == "completed"
        assert [call.status for call in server.calls if call.path.endswith("/cancel")] == [409]


# --- listed ----------------------------------------------------------------------------------------------


async def listed(client: OpenAIClient) -> list[BatchJobStatus]:
    return [job async for job in client.list_batch_jobs()]


async def test_jobs_are_listed_the_newest_first() -> None:
    """Several batches are one job; those of other programs are none."""
    with SimulatedServer(batch_seconds=0.01) as server:
        async with connect(server, batch={"max_batch_size": 2}) as client:
            jobs = []
            for count in (1, 5, 3):
                jobs.append((await client.submit_batch_job(asked(count))).job_id)
                await by_hand(client, [line("a", "p")], metadata={"mine": "x"})
                await by_hand(client, [line("a", "p")], metadata={JOB_KEY: "x"})
            found = await listed(client)
            for job_id in jobs:
                await ended(client, job_id)
            assert len(server.batches) == 6 + 6
            last = await listed(client)
    assert [job.job_id for job in found] == [job.job_id for job in last] == jobs[::-1]
    assert [job.request_count for job in found] == [3, 5, 1]
    assert {job.status for job in last} == {"completed"}


async def test_a_long_list_is_read_page_by_page() -> None:
    """And no further than the caller goes."""
    with SimulatedServer(batch_seconds=0.01) as server:
        async with connect(server) as client:
            oldest = await client.submit_batch_job(asked(1))
            file = await client.openai.files.create(file=("x.jsonl", b"{}"), purpose="batch")
            others = {"endpoint": "/v1/embeddings", "completion_window": "24h", "input_file_id": file.id}
            for _ in range(110):
                await client.openai.batches.create(**others)
            newest = await client.submit_batch_job(asked(1))
            server.reset()
            assert [job.job_id for job in await listed(client)] == [newest.job_id, oldest.job_id]
            assert len(server.calls) == 2
            server.reset()
            async for job in client.list_batch_jobs():
                assert job.job_id == newest.job_id
                break
            assert len(server.calls) == 1


async def test_a_file_that_was_submitted_again_is_listed_once() -> None:
    """The newer batch of the same place counts, whole or cut."""
    with SimulatedServer(batch_seconds=0.01, enqueued_tokens=60, enqueued_refusal="later") as server:
        async with connect(server) as client:
            await client.batch_generate([f"p{n}" for n in range(20)], use_batch_api=True)
            refused = [batch for batch in server.batches if batch["status"] == "failed"]
            (job,) = await listed(client)
            responses = await client.retrieve_batch_results(job.job_id)
    assert refused
    assert job.request_count == job.completed_count == 20
    assert [response.content for response in responses] == [f"echo: p{n}" for n in range(20)]
    assert not {batch["id"] for batch in refused} & set(job.job_id.split("+"))


async def test_a_job_of_which_batches_are_missing_is_listed_last() -> None:
    """One that was not created whole, say: until all are seen, it may still be whole."""
    script = {"create": ["ok", "ok", "ok", "500", "500"]}
    with SimulatedServer(batch_seconds=0.01, endpoint_script=script) as server:
        async with connect(server, max_retries=1, batch={"max_batch_size": 1}) as client:
            whole = await client.submit_batch_job(asked(1))
            with pytest.raises(openai.InternalServerError) as caught:
                await client.submit_batch_job(asked(3))
            assert [job.job_id for job in await listed(client)] == [whole.job_id, caught.value.job_id]


# --- one client, many hands --------------------------------------------------------------------------------


def test_one_client_on_several_loops() -> None:
    """Submitted on one, settled on another."""
    with SimulatedServer(batch_seconds=0.01) as server:
        client = connect(server)
        job = asyncio.run(client.submit_batch_job(asked(2)))

        async def settle() -> list[str]:
            await ended(client, job.job_id)
            return [response.content for response in await client.retrieve_batch_results(job.job_id)]

        assert asyncio.run(settle()) == ["echo: p0", "echo: p1"]
        asyncio.run(client.close())


async def test_many_jobs_at_once_do_not_mix() -> None:
    """From several threads, each with a loop of its own, on one client."""
    with SimulatedServer(batch_seconds=0.05) as server:
        async with connect(server, batch={"max_batch_size": 3}) as client:

            async def one(name: str) -> list[str]:
                job = await client.submit_batch_job([BatchRequest(prompt=f"{name}{n}") for n in range(7)])
                await ended(client, job.job_id)
                return [response.content for response in await client.retrieve_batch_results(job.job_id)]

            found = await asyncio.gather(*(asyncio.to_thread(asyncio.run, one(name)) for name in "abcd"))
        assert len(server.batches) == 12
    assert found == [[f"echo: {name}{n}" for n in range(7)] for name in "abcd"]


async def test_a_job_in_a_pickled_config() -> None:
    """A worker that gets the config and the id goes on."""
    with SimulatedServer(batch_seconds=0.01) as server:
        async with connect(server) as client:
            job = await client.submit_batch_job(asked(1))
            await ended(client, job.job_id)
            config: OpenAIConfig = pickle.loads(pickle.dumps(client._config))  # noqa: S301
        async with OpenAIClient(config) as other:
            (response,) = await other.retrieve_batch_results(job.job_id)
    assert response.content == "echo: p0"


async def test_what_is_settled_twice_is_billed_once() -> None:
    """Also where the first time failed on the way."""
    with SimulatedServer(batch_seconds=0.01, endpoint_script={"content": ["500"]}) as server:
        async with connect(server, max_retries=0) as client:
            job = await client.submit_batch_job(asked(2))
            await ended(client, job.job_id)
            with pytest.raises(openai.InternalServerError):
                await client.retrieve_batch_results(job.job_id)
            assert float(client.stats.cost) == 0
            first = await client.retrieve_batch_results(job.job_id)
            again = await client.retrieve_batch_results(job.job_id)
            stats = client.stats
    assert first == again
    assert float(stats.cost) == pytest.approx(sum(response.usage.estimated_cost for response in first))
    assert stats.prompt_tokens == sum(response.usage.prompt_tokens for response in first)


async def test_a_duplicate_is_billed_once() -> None:
    with SimulatedServer(batch_seconds=0.01, batch_plans=[{"lines": ["duplicate", "ok"]}]) as server:
        async with connect(server) as client:
            job = await client.submit_batch_job(asked(2))
            await ended(client, job.job_id)
            responses = await client.retrieve_batch_results(job.job_id)
            cost = float(client.stats.cost)
    assert cost == pytest.approx(sum(response.usage.estimated_cost for response in responses))


async def test_how_answers_by_batch_ended_is_counted_once() -> None:
    """The run's page shows their finish reasons beside those of answers online."""
    cut = BatchRequest(prompt="one two three four", max_tokens=1)
    with SimulatedServer(batch_seconds=0.01) as server:
        async with connect(server) as client:
            job = await client.submit_batch_job([*asked(2), cut])
            await ended(client, job.job_id)
            responses = await client.retrieve_batch_results(job.job_id)
            await client.retrieve_batch_results(job.job_id)
            reasons = client._account.recorder.snapshot().finish_reasons
    assert [response.finish_reason for response in responses] == ["stop", "stop", "length"]
    assert reasons == {"stop": 2, "length": 1}
