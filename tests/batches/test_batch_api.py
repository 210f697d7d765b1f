"""The files and batches endpoints on a bad day: nothing is created twice, nothing is lost on the way."""

from __future__ import annotations

import asyncio
import json
import logging
import pickle
from typing import Any

import openai
import pytest
from aiohttp import web
from batches import (
    KEY,
    Spoiling,
    asked,
    by_hand,
    connect,
    creations,
    cut_json,
    ended,
    html,
    line,
    places,
    refusal,
)

from openai_eval_client import BatchError, ModelResponse, QuotaError, TimeoutError, ValidationError
from openai_eval_client._batches import api as _batch_api
from openai_eval_client.errors import sdk_httpx
from openai_eval_client.testing import SimulatedServer

pytestmark = pytest.mark.usefixtures("few_certificates", "no_pauses")


async def answers(client: Any, job_id: str) -> list[str]:
    await ended(client, job_id)
    return [response.content for response in await client.retrieve_batch_results(job_id)]


# --- a failure of which it is not clear whether a batch was created --------------------------------------

UNCLEAR = {
    "dropped after": ["drop_after"],
    "500 after": ["500_after"],
    "hung after": ["hang_after"],
    "dropped before": ["drop"],
    "500 before": ["500"],
    "503 before": ["503"],
    "429 before": ["429"],
    "hung before": ["hang"],
    "several before": ["500", "drop", "503"],
    "before and after": ["drop", "500_after"],
}


@pytest.mark.parametrize("case", UNCLEAR)
async def test_an_unclear_creation_makes_one_batch(case: str) -> None:
    """It is looked for before it is created again; and its results are there."""
    timeout = {"timeout": 0.3} if "hung" in case else {}
    with SimulatedServer(batch_seconds=0.01, endpoint_script={"create": ["ok", *UNCLEAR[case]]}) as server:
        async with connect(server, **timeout) as client:
            other = await by_hand(client, [line("one", "c")])  # a list with nothing in it proves nothing
            job = await client.submit_batch_job(asked(2))
            assert await answers(client, job.job_id) == ["echo: p0", "echo: p1"]
        assert [batch["id"] for batch in server.batches] == [other, job.job_id]
        lost = sum(fault.endswith("_after") for fault in UNCLEAR[case])
        assert len(creations(server)) == 1 + len(UNCLEAR[case]) + (not lost)


def other_server(response: Any) -> Any:
    """Spoil an answer: times and counts as other servers write them, and no name of the input file."""
    try:
        body = response.json()
    except ValueError:  # a file
        return response
    if body.get("object") not in {"batch", "list"}:
        return response
    for each in body.get("data", [body]):
        each["created_at"], each["completed_at"], each["input_file_id"] = None, "2026-01-02T03:04:05Z", None
        each["request_counts"] = {name: float(n) for name, n in (each["request_counts"] or {}).items()}
    if "data" in body:
        body["data"] = [None, *body["data"], "x"]
    return sdk_httpx().Response(200, json=body)


async def test_a_job_on_another_server() -> None:
    """Its times may be null or texts, its counts floats: it runs, is listed, and its results are there."""
    with SimulatedServer(batch_seconds=0.01) as server:
        spoiling = Spoiling("GET", "", [other_server] * 1000)
        async with connect(server, http_client=spoiling.client) as client:
            job = await client.submit_batch_job(asked(2))
            assert await answers(client, job.job_id) == ["echo: p0", "echo: p1"]
            status = await client.get_batch_status(job.job_id)
            assert (status.created_at, str(status.completed_at)) == (None, "2026-01-02 03:04:05+00:00")
            assert (status.request_count, status.completed_count) == (2, 2)
            assert [each.job_id async for each in client.list_batch_jobs()] == [job.job_id]
            assert "created" in status._repr_html_()
            ran = await client.batch_generate(["a", "b"], use_batch_api=True)
            assert [answer.content for answer in ran] == ["echo: a", "echo: b"]
            theirs = await by_hand(client, [line("one", "c")])
            assert await answers(client, theirs) == ["echo: c"]


GARBLED = {"html": [html], "cut json": [cut_json], "both": [cut_json, html]}
GARBLED |= {
    "an empty object": [lambda _: sdk_httpx().Response(200, json={})],
    "null": [
        lambda _: sdk_httpx().Response(200, content=b"null", headers={"content-type": "application/json"})
    ],
}


@pytest.mark.parametrize("case", GARBLED)
@pytest.mark.parametrize("path", ["/files", "/batches"])
async def test_a_garbled_answer_makes_one_batch(case: str, path: str) -> None:
    """The upload may be made twice, the batch never."""
    with SimulatedServer(batch_seconds=0.01) as server:
        async with connect(server, http_client=Spoiling("POST", path, GARBLED[case]).client) as client:
            job = await client.submit_batch_job(asked(2))
            assert await answers(client, job.job_id) == ["echo: p0", "echo: p1"]
        assert [batch["id"] for batch in server.batches] == [job.job_id]


@pytest.mark.parametrize("case", GARBLED)
async def test_a_garbled_list_is_asked_again(case: str) -> None:
    """Where an unclear batch is looked for, a list that cannot be read is no list without it."""
    with SimulatedServer(batch_seconds=0.01, endpoint_script={"create": ["drop_after"]}) as server:
        async with connect(server, http_client=Spoiling("GET", "/batches", GARBLED[case]).client) as client:
            job = await client.submit_batch_job(asked(2))
        assert [batch["id"] for batch in server.batches] == [job.job_id]


async def test_a_batch_that_comes_about_after_its_creation_failed_is_found(monkeypatch) -> None:
    """A gateway gives up a moment before the server is done: that batch is the one."""
    monkeypatch.setattr(_batch_api, "_LATE", 0.5)
    with SimulatedServer(batch_seconds=0.01) as server:
        late: list[Any] = []

        async def give_up(request: Any) -> Any:
            async def finish() -> None:
                await asyncio.sleep(0.1)
                async with openai.AsyncOpenAI(api_key="k", base_url=server.base_url) as sdk:
                    await sdk.batches.create(**json.loads(request.content))

            late.append(asyncio.create_task(finish()))
            return refusal(504, "Gateway Timeout")(request)

        spoiling = Spoiling("POST", "/batches", [give_up], effect=False)
        async with connect(server, http_client=spoiling.client) as client:
            job = await client.submit_batch_job(asked(2))
            await late[0]
        assert [batch["id"] for batch in server.batches] == [job.job_id]


async def test_an_unclear_batch_is_found_among_many() -> None:
    """Page by page, past the batches of others and of other jobs."""
    with SimulatedServer(batch_seconds=0.01) as server:
        async with connect(server) as client:
            await client.submit_batch_job(asked(1))
            file = await client.openai.files.create(file=("x.jsonl", b"{}"), purpose="batch")
            others = {"endpoint": "/v1/embeddings", "completion_window": "24h", "input_file_id": file.id}
            for _ in range(130):
                await client.openai.batches.create(**others)
        before = len(server.batches)

        def crowd(response: Any) -> Any:  # others come in between the creation and the look
            with openai.OpenAI(api_key="k", base_url=server.base_url, max_retries=0) as sdk:
                for _ in range(120):
                    sdk.batches.create(**others)
            return refusal(500, "lost")(response)

        creating = Spoiling("POST", "/batches", [crowd])
        async with connect(server, http_client=creating.client) as client:
            job = await client.submit_batch_job(asked(2))
        assert len(server.batches) == before + 121
        assert job.job_id in {batch["id"] for batch in server.batches}
        assert [pair for pair in places(server) if pair].count(places(server)[before]) == 1
        lists = [call for call in server.calls if (call.method, call.path) == ("GET", "/v1/batches")]
        assert len(lists) == 2


async def test_a_creation_that_stays_unclear_leaves_nothing_running() -> None:
    """With no retries left the error comes out; what it had created is cancelled, and named."""
    with SimulatedServer(batch_seconds=30, endpoint_script={"create": ["drop_after"]}) as server:
        async with connect(server, max_retries=0) as client:
            with pytest.raises(openai.APIConnectionError) as caught:
                await client.submit_batch_job(asked(2))
        (batch,) = server.batches
    assert batch["status"] in {"cancelling", "cancelled"}
    assert caught.value.job_id == batch["id"]


# --- files that are not there yet ------------------------------------------------------------------------


@pytest.mark.parametrize("refused", ["create", "later"])
async def test_a_file_just_uploaded_may_be_unknown_for_a_moment(refused: Any) -> None:
    """The batch is created when the server knows the file; one upload is enough."""
    with SimulatedServer(batch_seconds=0.01, file_lag=0.4, unknown_file=refused) as server:
        async with connect(server, max_retries=0) as client:
            job = await client.submit_batch_job(asked(2))
            assert await answers(client, job.job_id) == ["echo: p0", "echo: p1"]
        uploads = [call for call in server.calls if (call.method, call.path) == ("POST", "/v1/files")]
        assert [call.status for call in creations(server)] == [200]
    assert len(uploads) == len(server.batches) == 1


@pytest.mark.parametrize("status", [400, 404])
@pytest.mark.parametrize(
    "message", ["No such File object: {}", "Cannot find file {}, or project p does not have access to it."]
)
async def test_a_file_may_be_known_here_and_not_there(status: int, message: str) -> None:
    """Where the creation does not find it, it is tried again, beyond all retries."""

    def unknown(response: Any) -> Any:
        return refusal(status, message.format(response.json().get("input_file_id")), param="input_file_id")(
            response
        )

    with SimulatedServer(batch_seconds=0.01) as server:
        spoiling = Spoiling("POST", "/batches", [unknown, unknown], effect=False)
        async with connect(server, http_client=spoiling.client, max_retries=0) as client:
            job = await client.submit_batch_job(asked(2))
            assert await answers(client, job.job_id) == ["echo: p0", "echo: p1"]
        assert [batch["id"] for batch in server.batches] == [job.job_id]


@pytest.mark.parametrize("status", [403, 404, 405, 500])
async def test_a_server_that_shows_no_files_is_left_in_peace(status: int) -> None:
    """The batch is created nevertheless, and at once."""
    with SimulatedServer(batch_seconds=0.01) as server:
        refusing = Spoiling("GET", "", [refusal(status, "Not Found")] * 4)
        async with connect(server, http_client=refusing.client) as client:
            await client.submit_batch_job(asked(2))
        assert len(server.batches) == 1


async def test_a_result_file_may_be_unknown_for_a_moment() -> None:
    """The batch has just ended: it is waited for, beyond all retries."""
    with SimulatedServer(batch_seconds=0.01) as server:
        unknown = [refusal(404, "No such File object: file-x", param="id")] * 3
        spoiling = Spoiling("GET", "/content", unknown, effect=False)
        async with connect(server, http_client=spoiling.client, max_retries=0) as client:
            job = await client.submit_batch_job(asked(2))
            assert await answers(client, job.job_id) == ["echo: p0", "echo: p1"]


# --- uploads and downloads -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "faults", [["drop"], ["500", "503"], ["429"], ["drop_after"], ["hang"], ["hang_after"]]
)
async def test_an_upload_is_repeated_whole(faults: list[str]) -> None:
    """The whole file arrives, whatever was sent before."""
    timeout = {"timeout": 0.3} if "hang" in faults[0] else {}
    with SimulatedServer(batch_seconds=0.01, endpoint_script={"upload": faults}) as server:
        async with connect(server, **timeout) as client:
            job = await client.submit_batch_job(asked(50))
            assert await answers(client, job.job_id) == [f"echo: p{n}" for n in range(50)]
        assert len(server.batches) == 1


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize(
    "faults", [["truncate"], ["truncate"] * 3, ["drop", "truncate", "500"], ["truncate", "drop_after"]]
)
async def test_a_download_that_breaks_off_is_completed(ranges: bool, faults: list[str]) -> None:
    """From where it broke off if the server can, else whole; byte by byte what the server holds."""
    with SimulatedServer(batch_seconds=0.01, endpoint_script={"content": faults}, ranges=ranges) as server:
        async with connect(server, max_retries=4) as client:
            job = await client.submit_batch_job(asked(300))
            assert await answers(client, job.job_id) == [f"echo: p{n}" for n in range(300)]
        downloads = [call for call in server.calls if call.path.endswith("/content")]
    assert len(downloads) == len(faults) + 1
    assert (downloads[-1].status == 206) == (ranges and "truncate" in faults)


async def test_drops_of_a_download_that_gets_on_are_not_counted() -> None:
    """A long file over a bad line: with no retries at all, as long as each attempt brings more of it."""
    faults = {"content": ["truncate"] * 6}
    with SimulatedServer(batch_seconds=0.01, endpoint_script=faults) as server:
        async with connect(server, max_retries=0) as client:
            job = await client.submit_batch_job(asked(300))
            assert await answers(client, job.job_id) == [f"echo: p{n}" for n in range(300)]
    with SimulatedServer(batch_seconds=0.01, endpoint_script=faults, ranges=False) as server:
        async with connect(server, max_retries=0) as client:
            job = await client.submit_batch_job(asked(300))
            await ended(client, job.job_id)
            with pytest.raises(openai.APIConnectionError):
                await client.retrieve_batch_results(job.job_id)
        assert sum(call.path.endswith("/content") for call in server.calls) == 2


async def test_a_download_that_hangs_is_given_up_and_repeated() -> None:
    """The timeout is for each piece, not for the whole file."""
    with SimulatedServer(batch_seconds=0.01, endpoint_script={"content": ["hang", "ok"]}) as server:
        async with connect(server, timeout=0.3) as client:
            job = await client.submit_batch_job(asked(2))
            assert await answers(client, job.job_id) == ["echo: p0", "echo: p1"]


async def test_a_download_that_never_ends_is_a_timeout() -> None:
    with SimulatedServer(batch_seconds=0.01, endpoint_faults={"content": {"hang": 1.0}}) as server:
        async with connect(server, timeout=0.2, max_retries=1) as client:
            job = await client.submit_batch_job(asked(2))
            await ended(client, job.job_id)
            with pytest.raises(TimeoutError):
                await client.retrieve_batch_results(job.job_id)


class Host:
    """A file host of odd ways behind the batches of a simulated server.

    Args:
        server: Answers everything but downloads.
        manners: One for each download in order: "cut" closes the connection after all bytes, without saying
            that they are all; "416", "elsewhere" answer a range with a refusal, or with another range.
    """

    def __init__(self, server: SimulatedServer, manners: list[str]) -> None:
        self._server, self._manners, self.ranges = server, manners, []

    async def __aenter__(self) -> str:
        app = web.Application()
        app.router.add_get("/v1/files/{id}/content", self._content)
        app.router.add_route("*", "/v1/{rest:.*}", self._other)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0]
        return f"http://{host}:{port}/v1"

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _other(self, request: web.Request) -> web.Response:
        reply = await self._forward(request.method, request.path, await request.read(), request.headers)
        return web.Response(
            status=reply.status_code,
            body=reply.content,
            headers={"content-type": reply.headers["content-type"]},
        )

    async def _forward(self, method: str, path: str, body: bytes, headers: Any) -> Any:
        kept = {name: headers[name] for name in ("authorization", "content-type") if name in headers}
        async with sdk_httpx().AsyncClient() as http:
            url = self._server.base_url.removesuffix("/v1") + path
            return await http.request(method, url, content=body, headers=kept)

    async def _content(self, request: web.Request) -> web.StreamResponse:
        self.ranges.append(request.headers.get("range"))
        manner = self._manners.pop(0) if self._manners else "plain"
        whole = (await self._forward("GET", request.path, b"", request.headers)).content
        if manner == "416":
            return web.Response(status=416, body=b"no such range")
        if manner == "elsewhere":
            span = f"bytes 1-{len(whole) - 1}/{len(whole)}"
            return web.Response(status=206, body=whole[1:], headers={"content-range": span})
        if manner != "cut":
            return web.Response(body=whole)
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        await response.write(whole)
        request.transport.close()
        return response


@pytest.mark.parametrize(
    "manners", [["cut"], ["cut", "416"], ["cut", "elsewhere"], ["cut", "cut", "416", "cut"]]
)
async def test_a_file_host_of_odd_ways(manners: list[str], caplog) -> None:
    """A connection that drops after the last byte; a range refused; another range than was asked for."""
    with SimulatedServer(batch_seconds=0.01) as server:
        host = Host(server, list(manners))
        async with host as url, connect(url, max_retries=6) as client:
            job = await client.submit_batch_job(asked(20))
            assert await answers(client, job.job_id) == [f"echo: p{n}" for n in range(20)]
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == []
    assert host.ranges[0] is None
    assert host.ranges[1].startswith("bytes=")
    assert len(host.ranges) >= 2


# --- what retries do not heal ----------------------------------------------------------------------------


async def test_a_wait_that_the_server_asks_for_is_kept() -> None:
    """A 429 with retry-after: the next attempt is not made before."""
    waits = [refusal(429, "slow down", headers={"retry-after-ms": "150"})] * 2
    with SimulatedServer(batch_seconds=0.01) as server:
        async with connect(server, http_client=Spoiling("POST", "/files", waits).client) as client:
            await client.submit_batch_job(asked(1))
        times = [call.at for call in server.calls if call.path == "/v1/files"]
    assert len(times) == 3
    assert min(times[1] - times[0], times[2] - times[1]) >= 0.15


async def test_a_wait_too_long_is_not_waited_for() -> None:
    """Beyond max_wait the refusal comes out at once."""
    long = [refusal(429, "tomorrow", headers={"retry-after": "86400"})]
    with SimulatedServer() as server:
        async with connect(server, http_client=Spoiling("POST", "/files", long).client) as client:
            with pytest.raises(openai.RateLimitError, match="tomorrow"):
                await client.submit_batch_job(asked(1))


QUOTAS = {
    "credit": refusal(
        429, "You exceeded your current quota", code="insufficient_quota", type="insufficient_quota"
    ),
    "credit, only its type": refusal(429, "You exceeded your current quota", type="insufficient_quota"),
    "enqueued": refusal(
        429, "Enqueued token limit reached for m. Limit: 9 enqueued tokens.", code="token_limit_exceeded"
    ),
    "enqueued, only its text": refusal(400, "Enqueued token limit reached for gpt-4o in organization org-x."),
}


@pytest.mark.parametrize("case", QUOTAS)
@pytest.mark.parametrize("path", ["/files", "/batches"])
async def test_a_quota_used_up_is_a_quota_error(case: str, path: str) -> None:
    """Not tried again; it pickles."""
    with SimulatedServer() as server:
        async with connect(server, http_client=Spoiling("POST", path, [QUOTAS[case]] * 4).client) as client:
            with pytest.raises(QuotaError) as caught:
                await client.submit_batch_job(asked(1))
        assert sum(call.method == "POST" and call.path.endswith(path) for call in server.calls) == 1
    again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301
    assert (type(again), again.code, again.message) == (QuotaError, caught.value.code, caught.value.message)


async def test_a_refused_window_is_a_validation_error() -> None:
    """It names the window, and what the server says."""
    with SimulatedServer(completion_windows=("24h",)) as server:
        async with connect(server) as client:
            with pytest.raises(ValidationError, match="'7d'") as caught:
                await client.submit_batch_job(asked(1), completion_window="7d")
        assert (caught.value.field, caught.value.index) == ("completion_window", None)
        assert len(creations(server)) == 1
        assert server.batches == []
    with SimulatedServer(completion_windows=("7d",), batch_seconds=0.01) as server:
        async with connect(server, batch={"completion_window": "7d"}) as client:
            await ended(client, (await client.submit_batch_job(asked(1))).job_id)
        assert server.batches[0]["completion_window"] == "7d"


FOR_GOOD = {
    401: openai.AuthenticationError,
    403: openai.PermissionDeniedError,
    404: openai.NotFoundError,
    422: openai.UnprocessableEntityError,
}


@pytest.mark.parametrize("status", FOR_GOOD)
async def test_what_is_refused_for_good_is_not_tried_again(status: int) -> None:
    spoils = [refusal(status, "no")] * 9
    with SimulatedServer() as server:
        async with connect(server, http_client=Spoiling("POST", "/batches", spoils).client) as client:
            with pytest.raises(FOR_GOOD[status]):
                await client.submit_batch_job(asked(1))
        assert len(creations(server)) == 1


# --- the key ---------------------------------------------------------------------------------------------


def chain(error: BaseException | None) -> list[BaseException]:
    """Return an error and what it came from."""
    found: list[BaseException] = []
    while error is not None:
        found.append(error)
        found += [inner for failure in getattr(error, "failures", {}).values() for inner in chain(failure)]
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return found


async def whole_life(client: Any, *, cancelled: bool) -> None:
    """Submit a job, wait for its end, and collect its results."""
    job = await client.submit_batch_job(asked(2))
    if cancelled:
        await client.cancel_batch_job(job.job_id)
    await ended(client, job.job_id)
    await client.retrieve_batch_results(job.job_id)


def all_texts(error: BaseException) -> str:
    """Return all text that an error, and what it came from, hold."""
    texts = []
    for each in chain(error):
        texts += [repr(each), str(each), repr(vars(each)), repr(pickle.dumps(each))]
        request = getattr(each, "request", None)
        texts += [repr(list(request.headers.raw))] if request is not None else []
        response = getattr(each, "response", None)
        texts += [response.text, repr(response.headers.raw)] if response is not None else []
    return "\n".join(texts)


@pytest.mark.parametrize("where", ["upload", "create", "list", "retrieve", "cancel", "content"])
@pytest.mark.parametrize("fault", ["500", "drop", "hang", "429"])
async def test_the_key_is_in_no_error_and_no_log(where: str, fault: str, caplog) -> None:
    """Wherever a call fails, whichever way."""
    caplog.set_level(logging.DEBUG)
    script = {where: [fault] * (30 if where == "list" else 9)}
    if where == "list":
        script["create"] = ["drop_after"]
    with SimulatedServer(batch_seconds=30 if where == "cancel" else 0.02, endpoint_script=script) as server:
        async with connect(server, max_retries=1, timeout=0.1) as client:
            with pytest.raises((openai.APIError, BatchError)) as caught:
                await whole_life(client, cancelled=where == "cancel")
    assert KEY not in all_texts(caught.value)
    assert KEY not in caplog.text


async def test_an_error_that_echoes_the_key_does_not_show_it(caplog) -> None:
    """Nor do the prompts' own errors, where a batch was never run."""
    caplog.set_level(logging.DEBUG)
    echo = [None, refusal(401, f"Incorrect API key provided: {KEY}")]
    with SimulatedServer(batch_seconds=0.01) as server:
        spoiling = Spoiling("POST", "/batches", echo)
        async with connect(server, http_client=spoiling.client, batch={"max_batch_size": 2}) as client:
            outcomes = await client.batch_generate(list("abcd"), use_batch_api=True, return_exceptions=True)
    assert [isinstance(outcome, ModelResponse) for outcome in outcomes] == [True, True, False, False]
    assert isinstance(outcomes[2], openai.AuthenticationError)
    assert KEY not in all_texts(outcomes[2])
    assert KEY not in caplog.text
