"""Servers of the Batch API that lie, lag or leave things out: nobody pays twice, and nothing hangs."""

from __future__ import annotations

import asyncio
import copy
import json
import time
from typing import TYPE_CHECKING, Any

import openai
import pytest
from batches import SOON, asked, by_hand, cancelled, connect, line
from wire_server import Reply, chat, serving

from openai_eval_client import BatchError, BatchRequest, ModelResponse, ValidationError
from openai_eval_client._batches import api as _batch_api
from openai_eval_client._batches import run as _batch_run
from openai_eval_client.testing import SimulatedServer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from wire_server import WireServer

    Hook = Callable[[int, Reply], Reply | None]

pytestmark = pytest.mark.usefixtures("few_certificates", "no_pauses")

PROMPTS = [f"p{n}." for n in range(4)]
ECHOES = [f"echo: {prompt}" for prompt in PROMPTS]
SCRIPT = {f'"{prompt}"': [Reply(chat(echo))] for prompt, echo in zip(PROMPTS, ECHOES, strict=True)}
DROPPED = Reply(raw=b"", hang_up=True)
BROKEN = Reply({"error": {"message": "broken"}}, 500)
NO_FILE = Reply({"error": {"message": "No such File object: file-1"}}, 404)


def texts(outcomes: list[Any]) -> list[Any]:
    """Return the text of each answer; of an error, its code."""
    return [each.content if isinstance(each, ModelResponse) else each.code for each in outcomes]


async def by_prompts(server: WireServer, **options: Any) -> list[Any]:
    """Answer the prompts by a run."""
    async with connect(server.url) as client:
        answer = client.batch_generate
        return texts(await answer(PROMPTS, use_batch_api=True, return_exceptions=True, **options))


async def by_job(server: WireServer, **options: Any) -> list[Any]:
    """Answer the prompts by a job, whose results are fetched."""
    async with connect(server.url) as client:
        job = await client.submit_batch_job([BatchRequest(prompt=each) for each in PROMPTS], **options)
        assert (await client.get_batch_status(job.job_id)).request_count == 4
        return texts(await client.retrieve_batch_results(job.job_id, return_exceptions=True))


both_ways = pytest.mark.parametrize("way", [by_prompts, by_job])


# --- lines ------------------------------------------------------------------------------------------------


def lines(edit: Callable[[list[bytes]], list[bytes]]) -> dict[str, Hook]:
    """Return hooks that edit the lines of result files."""

    def edited(_: int, reply: Reply) -> Reply:
        return Reply(b"".join(each + b"\n" for each in edit(reply.body.splitlines())))

    return {"content": edited}


def first(old: str, new: str) -> dict[str, Hook]:
    """Return hooks that replace a part of the first line."""
    return lines(lambda all_: [all_[0].replace(old.encode(), new.encode()), *all_[1:]])


def nested(levels: int) -> str:
    return "[" * levels + "]" * levels


DEEP = '"logprobs": {"content": [%s]}'
READ: dict[str, Any] = {
    **{f"a status of {status}": ('"status_code": 200', f'"status_code": {status}') for status in (
        '"200"', "201", '"201"', "200.0", "null", "[200]", "true",
    )},
    "no status": ('"status_code": 200, ', ""),
    **{f"{levels} levels": ('"logprobs": null', DEEP % nested(levels)) for levels in (300, 600, 900)},
}  # fmt: skip


@pytest.mark.parametrize("case", READ)
async def test_a_line_with_a_whole_answer_is_read(case: str) -> None:
    """However its status is written, and however deep a field beside the answer is nested."""
    async with serving(SCRIPT) as server:
        server.hooks = first(*READ[case])
        assert await by_prompts(server) == ECHOES
        assert len(server.batches) == 1


@both_ways
@pytest.mark.parametrize("levels", [1000, 100_000])
async def test_a_line_nested_too_deeply_costs_that_line_alone(way: Any, levels: int) -> None:
    """It is not bought again unasked."""
    async with serving(SCRIPT) as server:
        server.hooks = first('"logprobs": null', DEEP % nested(levels))
        assert await way(server) == ["unreadable_result", *ECHOES[1:]]
        assert len(server.batches) == 1


FOREIGN = (
    "evil#3",
    "request-003",
    "request-3 ",
    " request-3",
    "REQUEST-3",
    "request-\\u0663",
    "#3",
    "request-3#3",
)


@both_ways
@pytest.mark.parametrize("name", FOREIGN)
async def test_a_line_of_another_name_takes_no_place(way: Any, name: str) -> None:
    def smuggled(all_: list[bytes]) -> list[bytes]:
        foreign = all_[0].replace(b"request-0", name.encode()).replace(b"echo: p0.", b"evil")
        return [foreign, *all_]

    async with serving(SCRIPT) as server:
        server.hooks = lines(smuggled)
        assert await way(server) == ECHOES


async def test_names_in_a_job_of_several_models_are_matched_whole() -> None:
    """There each ends with the index: a foreign name that ends like it is none of the job's."""
    names = ["a", None, "c#2", "d"]
    requests = [
        BatchRequest(prompt=prompt, custom_id=name, model=["gpt-4o-mini", "gpt-4.1"][n % 2])
        for n, (prompt, name) in enumerate(zip(PROMPTS, names, strict=True))
    ]
    async with serving(SCRIPT) as server, connect(server.url) as client:
        server.hooks = lines(
            lambda all_: [all_[0].replace(b'"a#0"', b'"evil#0"').replace(b"p0", b"evil"), *all_]
        )
        job = await client.submit_batch_job(requests)
        responses = await client.retrieve_batch_results(job.job_id)
    assert texts(responses) == ECHOES
    assert [response.custom_id for response in responses] == names


@both_ways
async def test_the_first_of_two_answers_counts(way: Any) -> None:
    async with serving(SCRIPT) as server:
        server.hooks = lines(lambda all_: [*all_, *(each.replace(b"echo", b"second") for each in all_)])
        assert await way(server) == ECHOES


# --- batch objects ----------------------------------------------------------------------------------------


def edited(reply: Reply, fields: Mapping[str, Any]) -> Reply:
    body = copy.deepcopy(reply.body)
    for each in body.get("data", [body]):
        each.update(fields)
    return Reply(body)


def objects(**fields: Any) -> dict[str, Hook]:
    """Return hooks that set fields of each batch object."""
    return dict.fromkeys(("create", "retrieve", "list"), lambda _, reply: edited(reply, fields))


ODD: list[dict[str, Any]] = [
    *({"status": status} for status in ("COMPLETED", "Completed", " completed ")),
    *({"endpoint": url} for url in (
        None, "", " ", 5, "/chat/completions", "chat/completions", "/v1/chat/completions/",
        "/openai/v1/chat/completions", "https://azure.invalid/openai/deployments/x/chat/completions",
    )),
    *({"request_counts": counts} for counts in (
        None, [], "x", 3.0, {"total": [], "completed": None, "failed": {}},
        {"total": 4.0, "completed": "4", "failed": None}, {"total": 9e8, "completed": -1, "failed": 1e300},
    )),
    *({"created_at": at, "completed_at": at} for at in (None, [], "soon", 1e300, -1e300, {"a": 1}, True)),
    *({"errors": errors} for errors in ([], "oh", {"data": "x"}, {"data": [None, 5, ["a"]]}, [[[]]], 7)),
    *({"metadata": pairs} for pairs in (None, [1], {"a": "b"})),
]  # fmt: skip


@both_ways
@pytest.mark.parametrize("fields", ODD, ids=str)
async def test_an_odd_batch_object_is_read(way: Any, fields: dict[str, Any]) -> None:
    async with serving(SCRIPT) as server:
        server.hooks = objects(**fields)
        assert await way(server) == ECHOES
        assert len(server.batches) == 1


async def test_responses_are_read_where_the_endpoint_is_left_out() -> None:
    """What was asked tells, and where that is gone, what was answered."""
    async with serving() as server, connect(server.url) as client:
        server.hooks = objects(endpoint=None, metadata=None)
        job = await client.submit_batch_job(asked(2), api="responses")
        for _ in range(2):
            assert texts(await client.retrieve_batch_results(job.job_id)) == ["yes", "yes"]
            server.hooks["input"] = lambda *_: NO_FILE


@pytest.mark.parametrize("count", [10**8, 10**30])
async def test_metadata_of_absurd_size_are_none_of_ours(count: int) -> None:
    def grown(_: int, reply: Reply) -> Reply:
        pairs = reply.body["metadata"]
        return edited(reply, {"metadata": {k: v.replace(":4,", f":{count},") for k, v in pairs.items()}})

    async with serving(SCRIPT) as server:
        server.hooks = {"retrieve": grown}
        assert await by_job(server) == ECHOES


@pytest.mark.parametrize("name", [None, 5, ["a"], ""])
async def test_a_batch_that_does_not_name_itself_is_the_one_asked_for(name: Any) -> None:
    async with serving(SCRIPT) as server:
        server.hooks = {"retrieve": lambda _, reply: edited(reply, {"id": name})}
        assert await by_prompts(server) == ECHOES


@both_ways
@pytest.mark.parametrize("name", ["batch_other", "https://evil.invalid/x", "../files"])
async def test_another_batch_than_the_one_asked_for_is_refused(way: Any, name: str) -> None:
    """Its results would be taken for ours."""
    async with serving(SCRIPT) as server:
        server.hooks = {"retrieve": lambda _, reply: edited(reply, {"id": name})}
        with pytest.raises(BatchError, match="was asked for") as caught:
            await way(server)
    assert caught.value.code == "wrong_batch"


@pytest.mark.parametrize("name", [None, 5, ["a"], "", "https://evil.invalid/x", "../files"])
async def test_a_creation_that_names_no_batch_is_looked_up_in_the_list(name: Any) -> None:
    async with serving(SCRIPT) as server:
        server.hooks = {"create": lambda _, reply: edited(reply, {"id": name})}
        assert await by_prompts(server) == ECHOES
        assert len(server.batches) == 1


PLACES = (
    "https://evil.invalid/f",
    "//evil/f",
    "../batches",
    "file-1/../x",
    "/etc/passwd",
    "a?b",
    "a%2fb",
    "a\nb",
)


@both_ways
@pytest.mark.parametrize("name", PLACES)
async def test_a_result_file_that_is_a_place_is_refused_by_name(way: Any, name: str, caplog) -> None:
    """It is not asked for, nor are its requests bought again."""
    async with serving(SCRIPT) as server:
        server.hooks = objects(output_file_id=name)
        assert await way(server) == ["unusable_file"] * 4
        assert (len(server.batches), server.looks["content"]) == (1, 0)


# --- results that are not there yet -----------------------------------------------------------------------


def at_first(times: int, reply: Callable[[Reply], Reply]) -> Hook:
    """Return a hook that answers otherwise so many times."""
    return lambda number, plain: reply(plain) if number < times else None


def cut(content: bytes) -> Reply:
    return Reply(raw=b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n" + content, hang_up=True)


NO_FILES = {"output_file_id": None, "error_file_id": None}
LATE: dict[str, dict[str, Hook]] = {
    "no files named": {"retrieve": at_first(2, lambda reply: edited(reply, NO_FILES))},
    "nor counts": {
        "retrieve": at_first(2, lambda reply: edited(reply, {**NO_FILES, "request_counts": None}))
    },
    "404": {"content": at_first(3, lambda _: NO_FILE)},
    "404, a clock far off": {
        "content": at_first(3, lambda _: NO_FILE),
        "retrieve": lambda _, reply: edited(reply, {"completed_at": 1, "created_at": 1}),
    },
    "cut in a line": {"content": at_first(1, lambda reply: cut(reply.body[: len(reply.body) // 2]))},
    "cut after a line": {
        "content": at_first(1, lambda reply: cut(reply.body[: reply.body.index(b"\n") + 1]))
    },
    "empty": {"content": at_first(1, lambda _: Reply(b""))},
}
VALIDATING: dict[str, Hook] = {"create": lambda _, reply: edited(reply, {"status": "validating"})}


@both_ways
@pytest.mark.parametrize("case", LATE)
async def test_results_that_come_late_are_looked_for_again(way: Any, case: str) -> None:
    """And never bought again."""
    async with serving(SCRIPT) as server:
        server.hooks = {**VALIDATING, **LATE[case]}
        assert await way(server) == ECHOES
        assert len(server.batches) == 1


LOST: dict[str, dict[str, Hook]] = {
    "no files named": objects(**NO_FILES),
    "404": {"content": lambda *_: NO_FILE},
    "cut": {"content": lambda _, reply: Reply(reply.body[: reply.body.index(b"\n") + 1])},
}


@pytest.mark.parametrize("case", LOST)
async def test_answers_that_stay_lost_are_bought_again_at_the_callers_word_alone(case: str) -> None:
    """The batch counts them as completed: they were paid for."""
    async with serving(SCRIPT) as server:
        server.hooks = LOST[case]
        answered = ECHOES[:1] if case == "cut" else []
        assert await by_prompts(server) == [*answered, *["lost_result"] * (4 - len(answered))]
        assert await by_job(server) == [*answered, *["lost_result"] * (4 - len(answered))]
        assert len(server.batches) == 2
        assert (await by_prompts(server, on_unclear="retry"))[-1] == "lost_result"
        assert len(server.batches) == 4


async def test_what_was_not_run_is_submitted_again() -> None:
    """Where the batch counts fewer completed requests, those without a result cost nothing."""
    async with serving(SCRIPT) as server:
        counts = {"total": 4, "completed": 1, "failed": 3}
        server.hooks = {
            "create": lambda n, reply: None if n else edited(reply, {"request_counts": counts}),
            "retrieve": lambda n, reply: None if n else edited(reply, {"request_counts": counts}),
            "content": at_first(1, lambda reply: Reply(reply.body[: reply.body.index(b"\n") + 1])),
        }
        assert await by_prompts(server) == ECHOES
        assert len(server.batches) == 2


# --- creations of which nobody knows whether they took place ----------------------------------------------


def listed(change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]], *, more: bool = False) -> Hook:
    """Return a hook that changes the list of batches."""
    return lambda _, reply: Reply({"object": "list", "has_more": more, "data": change(reply.body["data"])})


def stranger(number: int, reply: Reply) -> Reply:
    other = {**reply.body["data"][0], "id": f"batch_x{number}", "input_file_id": "file-x", "metadata": None}
    return Reply({"object": "list", "has_more": True, "data": [{**other, "created_at": None}]})


def upper(batch: dict[str, Any]) -> dict[str, Any]:
    return {**batch, "metadata": {key.upper(): value.upper() for key, value in batch["metadata"].items()}}


FOUND: dict[str, Hook] = {
    "plain": lambda *_: None,
    "lags": at_first(2, lambda _: Reply({"object": "list", "has_more": False, "data": []})),
    "fails at first": at_first(2, lambda _: BROKEN),
    "drops metadata": listed(lambda all_: [{**each, "metadata": None} for each in all_]),
    "changes the case of metadata": listed(lambda all_: list(map(upper, all_))),
    "a clock two hours off": listed(
        lambda all_: [{**each, "created_at": time.time() - 7200} for each in all_]
    ),
    "the oldest first": listed(
        lambda all_: [
            {**all_[0], "id": "batch_old", "metadata": None, "input_file_id": "x", "created_at": 1},
            *all_,
        ]
    ),
    "endless": listed(lambda all_: all_, more=True),
}


@both_ways
@pytest.mark.parametrize("failure", [BROKEN, DROPPED, Reply({"error": {"message": "slow"}}, 429)], ids="5d4")
@pytest.mark.parametrize("case", FOUND)
async def test_a_batch_whose_creation_seemed_to_fail_is_found(way: Any, failure: Reply, case: str) -> None:
    async with serving(SCRIPT) as server:
        server.hooks = {"create": at_first(1, lambda _: failure), "list": FOUND[case]}
        assert await way(server) == ECHOES
        assert len(server.batches) == 1


HIDDEN: dict[str, Hook] = {
    "empty": listed(lambda _: []),
    "broken": lambda *_: BROKEN,
    "not there": lambda *_: Reply({"error": {"message": "no such endpoint"}}, 404),
    "endless, the same": listed(
        lambda all_: [{**all_[0], "id": "b", "metadata": None, "input_file_id": "x"}], more=True
    ),
    "endless, new ones": stranger,
    "says nothing": listed(lambda all_: [{**each, "metadata": None, "input_file_id": None} for each in all_]),
}


@both_ways
@pytest.mark.parametrize("failure", [BROKEN, DROPPED], ids=["500", "dropped"])
@pytest.mark.parametrize("case", HIDDEN)
async def test_nothing_is_paid_twice_unasked_where_the_list_does_not_tell(
    way: Any, failure: Reply, case: str, monkeypatch
) -> None:
    """It is said, and `on_unclear="retry"` submits it again."""
    monkeypatch.setattr(_batch_api, "_RECENT_PAGES", 3)
    async with serving(SCRIPT) as server:
        server.hooks = {"create": at_first(1, lambda _: failure), "list": HIDDEN[case]}
        with pytest.raises(
            BatchError, match="not known whether the batch of 4 requests was created"
        ) as caught:
            await way(server)
        assert caught.value.code == "unclear_creation"
        assert len(server.batches) == 1
        server.looks.clear()
        assert await way(server, on_unclear="retry") == ECHOES
        assert len(server.batches) == 3


async def test_a_creation_that_never_reached_the_server_is_made_again() -> None:
    """The list works, for it shows another batch: so there is none of ours."""
    async with serving(SCRIPT) as server:
        async with connect(server.url) as client:
            await by_hand(client, [line("one", "x")])
        server.looks.clear()
        server.hooks = {"no create": at_first(1, lambda _: BROKEN)}
        assert await by_prompts(server) == ECHOES
        assert len(server.batches) == 2


async def test_a_list_that_lacks_a_batch_of_the_same_job_proves_nothing() -> None:
    async with serving(SCRIPT) as server, connect(server.url, batch={"max_batch_size": 2}) as client:
        other = await by_hand(client, [line("one", "x")])
        server.looks.clear()
        server.hooks = {
            "create": lambda number, _: BROKEN if number == 1 else None,
            "list": listed(lambda all_: [each for each in all_ if each["id"] == other]),
        }
        outcomes = await client.batch_generate(PROMPTS, use_batch_api=True, return_exceptions=True)
    assert texts(outcomes) == [*ECHOES[:2], *["unclear_creation"] * 2]


async def test_an_unclear_creation_is_remembered(tmp_path: Path) -> None:
    """A rerun with the cache does not pay again either, and finds the batch once the list shows it."""
    async with serving(SCRIPT) as server:
        server.hooks = {"create": at_first(1, lambda _: DROPPED), "list": HIDDEN["empty"]}
        for _ in range(2):
            async with connect(server.url, cache=tmp_path / "c") as client:
                with pytest.raises(BatchError, match="the list of batches is empty"):
                    await client.batch_generate(PROMPTS, use_batch_api=True)
        del server.hooks["list"]
        async with connect(server.url, cache=tmp_path / "c") as client:
            assert texts(await client.batch_generate(PROMPTS, use_batch_api=True)) == ECHOES
        assert len(server.batches) == 1


# --- waits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reply", [lambda reply: edited(reply, {"status": "in_progress"}), lambda _: BROKEN])
async def test_a_batch_that_never_ends_is_not_waited_for_for_ever(reply: Any, monkeypatch) -> None:
    """An hour after its window; what is waited for is named before, and afterwards."""
    monkeypatch.setattr(_batch_run, "_OVERDUE", -86_400 + 0.2)
    async with serving(SCRIPT) as server, connect(server.url, max_retries=0) as client:
        server.hooks = {**VALIDATING, "retrieve": lambda _, plain: reply(plain)}
        with pytest.raises(openai.OpenAIError) as caught:
            await client.batch_generate(PROMPTS, use_batch_api=True)
    assert caught.value.job_id == "batch_0"


async def test_an_endless_list_of_jobs_ends(monkeypatch, caplog) -> None:
    monkeypatch.setattr(_batch_api, "_MOST_PAGES", 5)
    async with serving(SCRIPT) as server, connect(server.url) as client:
        job = await client.submit_batch_job(asked(2))
        for hook in (FOUND["endless"], stranger):
            server.hooks = {"list": hook}
            found = [each.job_id async for each in client.list_batch_jobs()]
            assert found == ([job.job_id] if hook is not stranger else [])
    assert "does not end" in caplog.text


# --- called again in the same client ----------------------------------------------------------------------


async def test_a_call_that_was_cancelled_finds_its_batches_again(tmp_path: Path) -> None:
    """Three times over, each time after some of them were settled; calls that ended well stay apart."""
    prompts = [f"p{n}" for n in range(6)]
    plans = [{}, {"seconds": 0.3}, {"seconds": 0.6}]
    with SimulatedServer(batch_seconds=0.01, batch_plans=plans) as server:
        async with connect(server, cache=tmp_path / "c", batch={"max_batch_size": 2}) as client:
            for settled in (1, 2):

                async def some(settled: int = settled) -> None:
                    while sum(call.path.endswith("/content") for call in server.calls) < settled:
                        await asyncio.sleep(SOON)
                    await asyncio.sleep(4 * SOON)

                call = client.batch_generate(prompts, use_batch_api=True)
                assert isinstance(await cancelled(call, some), asyncio.CancelledError)
            assert len(await client.batch_generate(prompts, use_batch_api=True)) == 6
            assert len(server.batches) == 3
            assert len(await client.batch_generate(prompts, use_batch_api=True)) == 6
            assert len(server.batches) == 6


async def test_a_submission_that_fails_gives_its_number_to_the_next(tmp_path: Path) -> None:
    """Of two at once the first fails: the third is a job of its own, not the second again."""
    async with serving(SCRIPT) as server, connect(server.url, cache=tmp_path / "c", max_retries=0) as client:
        server.hooks = {"no upload": at_first(1, lambda _: BROKEN)}
        outcomes = await asyncio.gather(
            *(client.submit_batch_job(asked(2)) for _ in range(2)), return_exceptions=True
        )
        (job,) = [each.job_id for each in outcomes if not isinstance(each, Exception)]
        assert (await client.submit_batch_job(asked(2))).job_id != job


@pytest.mark.parametrize("value", ["", "Retry", None, 1])
async def test_on_unclear_is_one_of_two_words(value: Any) -> None:
    async with connect("http://127.0.0.1:9/v1") as client:
        for call in (
            lambda: client.batch_generate(["x"], on_unclear=value),
            lambda: client.submit_batch_job(asked(1), on_unclear=value),
        ):
            with pytest.raises(ValidationError, match=r"on_unclear=.*must be 'raise' or 'retry'"):
                await call()


@pytest.mark.parametrize("command", [["batch", "submit"], ["run"]])
def test_the_commands_that_create_batches_have_it(cli, command: list[str]) -> None:
    assert cli(*command, "--help") == 0
    assert "--on-unclear" in cli.out


@pytest.mark.parametrize("levels", [300, 600, 900])
async def test_an_answer_with_a_deep_field_can_be_written(levels: int) -> None:
    """Online as by batch: as JSON, too, which the command writes."""
    body = json.dumps(chat(ECHOES[1])).replace('"logprobs": null', DEEP % nested(levels)).encode()
    async with serving({**SCRIPT, '"p1."': [Reply(body)]}) as server, connect(server.url) as client:
        responses = await client.batch_generate(PROMPTS)
    assert texts(responses) == ECHOES
    assert json.loads(responses[1].model_dump_json())["content"] == ECHOES[1]
