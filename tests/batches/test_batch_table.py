"""What becomes of every request of a batch job: status by files by lines, settled from its job_id alone."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import openai
import pytest
from batches import (
    KEY,
    MODEL,
    OTHER_MODEL,
    asked,
    batch_price,
    by_hand,
    connect,
    ended,
    fingerprint,
    line,
)

from openai_eval_client import BatchError, BatchRequest, ModelResponse, PartialFailureError
from openai_eval_client.testing import SimulatedServer

pytestmark = pytest.mark.usefixtures("few_certificates")

ROOT = Path(__file__).parents[2]
WANTED = {  # class and code of an error
    "400": (openai.BadRequestError, "invalid_value"),
    "429": (openai.RateLimitError, "rate_limit_exceeded"),
    "500": (openai.InternalServerError, None),
    "expired": (BatchError, "batch_expired"),
    "cancelled": (BatchError, "batch_cancelled"),
    "timeout": (BatchError, "request_timeout"),
    "missing": (BatchError, "missing_result"),
    "lost": (BatchError, "lost_result"),
    "cut": (BatchError, "unreadable_result"),
    "empty": (BatchError, "no_answer"),
    "failed": (BatchError, "batch_failed"),
    "too_many": (BatchError, "too_many_tasks"),
}
EVERY = (
    "ok 400 429 500 expired cancelled missing duplicate duplicate_error unknown_id timeout status_0 "
    "truncated null_body no_usage garbage"
)
EVERY_WANTED = (
    "answer 400 429 500 expired cancelled lost answer answer answer timeout empty cut empty answer empty"
)
TEMPERATURES = {"same": (0.5,), "mixed": (0.0, 0.7, None), "absent": (None,), "zero": (0,)}


def one(count: int) -> list[list[int]]:
    return [list(range(count))]


def pairs(count: int) -> list[list[int]]:
    return [[n for n in (first, first + 1) if n < count] for first in range(0, count, 2)]


def by_model(count: int) -> list[list[int]]:
    return [list(range(0, count, 2)), list(range(1, count, 2))]


def halves(count: int) -> list[list[int]]:
    return [list(range(count // 2)), list(range(count // 2, count))]


@dataclass(frozen=True, kw_only=True)
class Job:
    """How requests become batches.

    Attributes:
        split: The requests of each batch, in the order of creation.
        names: Own custom_ids; they neither rise nor hold the index.
        models: Asked in turn.
        size: Requests in a batch at most.
        api: "chat" or "responses".
        by_hand: Created through the SDK's endpoints; "spaced": with empty lines in the file.
    """

    split: Any = one
    names: str = "none"
    models: tuple[str, ...] = (MODEL,)
    size: int = 50_000
    api: str = "chat"
    by_hand: str = ""

    def name(self, index: int) -> str | None:
        own = self.names == "own" or (self.names == "some" and index % 2 == 1)
        return f"mine-{(7 * index) % 101}-{97 - index}" if own else None

    async def submit(self, client: Any, temperatures: list[float | None]) -> str:
        if self.by_hand:
            return await self._submit_by_hand(client, temperatures)
        requests = [
            BatchRequest(
                prompt=f"p{n}",
                custom_id=self.name(n),
                model=self.models[n % len(self.models)],
                temperature=temperature,
            )
            for n, temperature in enumerate(temperatures)
        ]
        return (await client.submit_batch_job(requests, api=self.api)).job_id

    async def _submit_by_hand(self, client: Any, temperatures: list[float | None]) -> str:
        made = []
        for indexes in self.split(len(temperatures)):
            lines: list[Any] = []
            for n in indexes:
                params = {} if temperatures[n] is None else {"temperature": temperatures[n]}
                lines += [line(f"mine-{97 - n}", f"p{n}", **params)]
                lines += [None] if self.by_hand == "spaced" else []
            made.append(await by_hand(client, lines))
        return "+".join(made)


JOBS = {
    "plain": Job(),
    "own ids": Job(names="own"),
    "some own ids": Job(names="some"),
    "in pairs": Job(split=pairs, size=2),
    "own ids in pairs": Job(split=pairs, size=2, names="own"),
    "two models": Job(split=by_model, models=(MODEL, OTHER_MODEL)),
    "two models, own ids": Job(split=by_model, models=(MODEL, OTHER_MODEL), names="own"),
    "two models, some own ids": Job(split=by_model, models=(MODEL, OTHER_MODEL), names="some"),
    "responses": Job(api="responses"),
    "by hand": Job(by_hand="dense"),
    "by hand, empty lines": Job(by_hand="spaced"),
    "two by hand": Job(by_hand="dense", split=halves),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One case.

    Attributes:
        lines: What the server does with each request, in the caller's order.
        want: What becomes of each: "answer", or a key of WANTED.
        warned: The warnings logged when it is settled, ids left out.
        job: How the requests become batches.
        status: Of the batches, or of each in turn.
        plan: What else the server does with them.
        temperature: What the requests ask.
        restored: Whether the temperatures can be known.
        ordered: Whether the order can be known.
        fails: Code of the BatchError where no request was run.
    """

    lines: str
    want: str = ""
    warned: tuple[str, ...] = ()
    job: str = "plain"
    status: str = "completed"
    plan: dict[str, Any] = field(default_factory=dict)
    temperature: str = "same"
    restored: bool = True
    ordered: bool = True
    fails: str | None = None

    @property
    def count(self) -> int:
        return len(self.lines.split())

    @property
    def plans(self) -> list[dict[str, Any]]:
        batches = JOBS[self.job].split(self.count)
        outcomes, statuses = self.lines.split(), self.status.split() * len(batches)
        plans = [
            {"status": status, "lines": [outcomes[n] for n in indexes], **self.plan}
            for indexes, status in zip(batches, statuses, strict=False)
        ]
        return [{name: value for name, value in plan.items() if value is not None} for plan in plans]

    @property
    def temperatures(self) -> list[float | None]:
        cycle = TEMPERATURES[self.temperature]
        return [cycle[n % len(cycle)] for n in range(self.count)]


def counted(stated: int, held: int) -> str:
    return f"batch: the API counts {stated} completed requests, its files hold {held} answers"


UNREADABLE = "batch: 1 unreadable lines in its result files"
TWICE = "batch: 1 second lines of one request in its result files"
FOREIGN = "batch: 1 lines of no request of this job in its result files"
EVERY_WARNED = (
    counted(9, 5),
    FOREIGN,
    "batch: 2 second lines of one request in its result files",
    UNREADABLE,
)
INPUT_GONE = "batch: its input file is gone"
UNPLACED = "job of 2 batches without our metadata: their results are in the order of the ids"
UNORDERED = "batch: the order of its requests is not known any more"
RESULT_GONE = "batch: its result file is gone"

ROWS = {
    # how jobs are made
    "all answered": Row(lines="ok ok ok", want="answer answer answer"),
    "one": Row(lines="ok", want="answer"),
    "own ids": Row(lines="ok ok ok", want="answer answer answer", job="own ids"),
    "some own ids": Row(lines="ok ok ok", want="answer answer answer", job="some own ids"),
    "pairs": Row(lines="ok ok ok ok ok", want="answer answer answer answer answer", job="in pairs"),
    "pairs, own ids": Row(lines="ok ok ok", want="answer answer answer", job="own ids in pairs"),
    "two models": Row(lines="ok ok ok ok ok", want="answer answer answer answer answer", job="two models"),
    "two models, own ids": Row(lines="ok ok ok", want="answer answer answer", job="two models, own ids"),
    "responses": Row(lines="ok ok ok", want="answer answer answer", job="responses"),
    "by hand": Row(lines="ok ok ok", want="answer answer answer", job="by hand"),
    "by hand, empty lines": Row(
        lines="ok 400 missing",
        want="answer 400 lost",
        job="by hand, empty lines",
        warned=(counted(2, 1),),
    ),
    "two by hand": Row(
        lines="ok 400 500 ok", want="answer 400 500 answer", job="two by hand", warned=(UNPLACED,)
    ),
    # each outcome of a line
    "400": Row(lines="ok 400 ok", want="answer 400 answer"),
    "429": Row(lines="ok 429 ok", want="answer 429 answer"),
    "500": Row(lines="ok 500 ok", want="answer 500 answer"),
    "expired line": Row(lines="ok expired ok", want="answer expired answer"),
    "cancelled line": Row(lines="ok cancelled ok", want="answer cancelled answer"),
    "timeout": Row(lines="ok timeout ok", want="answer timeout answer"),
    "missing": Row(lines="ok missing ok", want="answer lost answer", warned=(counted(3, 2),)),
    "duplicate": Row(lines="ok duplicate ok", want="answer answer answer", warned=(TWICE,)),
    "duplicate error": Row(lines="ok duplicate_error ok", want="answer answer answer", warned=(TWICE,)),
    "unknown id": Row(lines="ok unknown_id ok", want="answer answer answer", warned=(FOREIGN,)),
    "status 0": Row(lines="ok status_0 ok", want="answer empty answer"),
    "truncated": Row(lines="ok truncated ok", want="answer cut answer", warned=(counted(3, 2), UNREADABLE)),
    "null body": Row(lines="ok null_body ok", want="answer empty answer", warned=(counted(3, 2),)),
    "no usage": Row(lines="ok no_usage ok", want="answer answer answer"),
    "garbage": Row(lines="ok garbage ok", want="answer empty answer", warned=(counted(3, 2),)),
    "none answered": Row(lines="400 500 expired", want="400 500 expired"),
    "every outcome": Row(lines=EVERY, want=EVERY_WANTED, warned=EVERY_WARNED),
    "every outcome, own ids": Row(lines=EVERY, want=EVERY_WANTED, warned=EVERY_WARNED, job="own ids"),
    "every outcome, responses": Row(lines=EVERY, want=EVERY_WANTED, warned=EVERY_WARNED, job="responses"),
    "every outcome, by hand": Row(lines=EVERY, want=EVERY_WANTED, warned=EVERY_WARNED, job="by hand"),
    "every outcome, expired": Row(
        lines=EVERY,
        want=EVERY_WANTED,
        warned=EVERY_WARNED,
        status="expired",
        job="some own ids",
    ),
    "every outcome, two models": Row(
        lines=EVERY,
        want=EVERY_WANTED,
        warned=(counted(5, 3), counted(4, 2), TWICE, FOREIGN, TWICE, UNREADABLE),
        job="two models, some own ids",
    ),
    # batches that end differently
    "batches of every status": Row(
        lines="ok ok missing missing ok expired 400 ok missing cancelled",
        want="answer answer lost lost answer expired 400 answer lost cancelled",
        warned=(counted(1, 0), counted(2, 0)),
        status="completed completed expired completed cancelled",
        job="in pairs",
    ),
    "one batch failed with no line run": Row(
        lines="ok missing ok missing",
        want="answer too_many answer too_many",
        status="completed failed",
        plan={"errors": [{"code": "too_many_tasks", "message": "too many"}]},
        job="two models",
        warned=(counted(2, 0),),
    ),
    # files
    "gone output": Row(
        lines="ok 400 ok",
        want="lost 400 lost",
        plan={"output_file": "gone"},
        warned=(counted(2, 0), RESULT_GONE),
    ),
    "gone errors": Row(
        lines="ok 400", want="answer missing", plan={"error_file": "gone"}, warned=(RESULT_GONE,)
    ),
    "empty output": Row(
        lines="ok 400", want="lost 400", plan={"output_file": "empty"}, warned=(counted(1, 0),)
    ),
    "nameless files": Row(
        lines="ok 400",
        want="lost lost",
        plan={"output_file": "", "error_file": ""},
        warned=(counted(1, 0),),
    ),
    # counts
    "counts too high": Row(
        lines="ok 400", want="answer 400", plan={"counts": {"completed": 2}}, warned=(counted(2, 1),)
    ),
    "counts too low": Row(
        lines="ok ok", want="answer answer", plan={"counts": {"completed": 0}}, warned=(counted(0, 2),)
    ),
    "counts beyond the job": Row(
        lines="ok ok",
        want="answer answer",
        plan={"counts": {"total": 9, "completed": 9}},
        warned=(counted(9, 2),),
    ),
    # temperatures
    "temperatures differ": Row(lines="ok ok ok ok", want="answer answer answer answer", temperature="mixed"),
    "temperatures differ, two models": Row(
        lines="ok ok 400 ok ok",
        want="answer answer 400 answer answer",
        temperature="mixed",
        job="two models, own ids",
    ),
    "temperatures differ, pairs": Row(
        lines="ok ok ok ok ok",
        want="answer answer answer answer answer",
        temperature="mixed",
        job="own ids in pairs",
    ),
    "temperatures differ, by hand": Row(
        lines="ok ok ok", want="answer answer answer", temperature="mixed", job="by hand"
    ),
    "no temperature": Row(lines="ok ok", want="answer answer", temperature="absent"),
    "no temperature, by hand": Row(lines="ok ok", want="answer answer", temperature="absent", job="by hand"),
    "temperature 0": Row(lines="ok ok", want="answer answer", temperature="zero"),
    # input gone
    "input gone": Row(
        lines="ok missing 400",
        want="answer lost 400",
        plan={"input_gone": True},
        warned=(counted(2, 1),),
    ),
    "input gone, temperatures differ": Row(
        lines="ok missing 400 ok",
        want="answer lost 400 answer",
        plan={"input_gone": True},
        temperature="mixed",
        restored=False,
        warned=(counted(3, 2), INPUT_GONE),
    ),
    "input gone, two models": Row(
        lines="ok ok 400 500 ok ok ok",
        want="answer answer 400 500 answer answer answer",
        plan={"input_gone": True},
        job="two models",
        warned=(INPUT_GONE, INPUT_GONE),
    ),
    "input gone, two models, own ids, missing lines": Row(
        lines="ok missing 400 ok missing missing ok ok",
        want="answer lost 400 answer lost lost answer answer",
        plan={"input_gone": True},
        job="two models, own ids",
        warned=(counted(3, 2), counted(4, 2), INPUT_GONE, INPUT_GONE),
    ),
    "input gone, own ids": Row(
        lines="ok missing 400 ok",
        want="answer lost 400 answer",
        plan={"input_gone": True},
        job="own ids",
        ordered=False,
        warned=(counted(3, 2), INPUT_GONE, UNORDERED),
    ),
    "input gone, by hand": Row(
        lines="ok missing 400 ok",
        want="answer lost 400 answer",
        plan={"input_gone": True},
        job="by hand",
        ordered=False,
        restored=False,
        warned=(counted(3, 2), INPUT_GONE, UNORDERED),
    ),
    "input gone, no files, by hand": Row(
        lines="ok 400",
        want="lost lost",
        status="expired",
        plan={"input_gone": True, "output_file": False, "error_file": False},
        job="by hand",
        warned=(counted(1, 0), INPUT_GONE, UNORDERED),
    ),
    "input gone, no files, own ids in pairs": Row(
        lines="ok ok ok",
        want="lost lost lost",
        plan={"input_gone": True, "output_file": False},
        job="own ids in pairs",
        warned=(counted(1, 0), counted(2, 0), INPUT_GONE, INPUT_GONE, UNORDERED, UNORDERED),
    ),
    "input gone, no usage": Row(
        lines="no_usage ok", want="answer answer", plan={"input_gone": True}, warned=(INPUT_GONE,)
    ),
    # nothing was run
    "failed": Row(
        lines="ok ok", status="failed", plan={"done": 0, "error_file": False}, fails="batch_failed"
    ),
    "failed with a reason": Row(
        lines="ok ok", status="failed",
        plan={"errors": [{"code": "too_many_tasks", "message": "too many"}], "lines": None},
        fails="too_many_tasks",
    ),
    "failed, by hand, input gone": Row(
        lines="ok ok",
        status="failed",
        job="by hand",
        plan={"input_gone": True, "output_file": False},
        fails="batch_failed",
    ),
    "all batches failed": Row(
        lines="ok ok ok", status="failed", job="in pairs", plan={"output_file": False}, fails="batch_failed"
    ),
}  # fmt: skip


async def settled(client: Any, job_id: str) -> list[Any]:
    """Collect the outcomes in both ways, which must agree."""
    outcomes = await client.retrieve_batch_results(job_id, return_exceptions=True)
    failures = {
        n: fingerprint(outcome) for n, outcome in enumerate(outcomes) if isinstance(outcome, Exception)
    }
    try:
        assert await client.retrieve_batch_results(job_id) == outcomes
        assert not failures
    except PartialFailureError as error:
        assert {n: fingerprint(failure) for n, failure in error.failures.items()} == failures
        assert error.responses == [None if n in failures else outcome for n, outcome in enumerate(outcomes)]
    return outcomes


def warnings(caplog: Any) -> list[str]:
    """Return what was warned of, without ids."""
    texts = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    caplog.clear()
    return sorted(re.sub(r" ?(?<=batch|.file) ?\b(batch_|file-)[0-9a-f]{32}", "", text) for text in texts)


def check_answer(response: ModelResponse, row: Row, index: int) -> None:
    """The answer to that very prompt, at its temperature, by its model, at the batch price."""
    assert response.content == f"echo: p{index}"
    models = JOBS[row.job].models
    assert response.model == models[index % len(models)]
    asked_for = row.temperatures[index] if row.restored else None
    assert response.temperature == (1.0 if asked_for is None else asked_for)
    assert response.usage.estimated == (row.lines.split()[index] == "no_usage")
    assert response.usage.completion_tokens > 0
    assert response.usage.prompt_tokens > 0 or row.plan.get("input_gone")
    assert response.usage.estimated_cost == pytest.approx(batch_price(response), abs=1e-15)
    assert (response.latency_ms, response.finish_reason, response.cached) == (0.0, "stop", False)


def check_error(outcome: Any, wanted: str, index: int) -> None:
    kinds = [WANTED[each] for each in wanted.split("|")]
    assert (type(outcome), outcome.code) in kinds
    if isinstance(outcome, BatchError):
        assert (outcome.index, outcome.line) == (index, index + 1)
    else:
        assert outcome.status_code == int(wanted)
        assert outcome.request_id


def check(outcomes: list[Any], row: Row) -> None:
    """Every request has its outcome, in its place."""
    assert len(outcomes) == row.count
    wanted = row.want.split()
    if not row.ordered:
        answers = {o.content: o.temperature for o in outcomes if isinstance(o, ModelResponse)}
        asked_for = row.temperatures if row.restored else [None] * row.count
        assert answers == {
            f"echo: p{n}": 1.0 if asked_for[n] is None else asked_for[n]
            for n in range(row.count)
            if wanted[n] == "answer"
        }
        errors = [(type(o), o.code) for o in outcomes if isinstance(o, Exception)]
        assert Counter(errors) == Counter(WANTED[each] for each in wanted if each != "answer")
        return
    for index, (outcome, each) in enumerate(zip(outcomes, wanted, strict=True)):
        if each == "answer":
            check_answer(outcome, row, index)
        else:
            check_error(outcome, each, index)


@pytest.mark.parametrize("name", ROWS)
async def test_every_request_has_its_outcome(name: str, caplog) -> None:
    """From the job_id alone, by the client that submitted it and by another; and the log says what is odd."""
    row = ROWS[name]
    job = JOBS[row.job]
    with SimulatedServer(batch_seconds=0.01, batch_plans=row.plans) as server:
        async with connect(server, batch={"max_batch_size": job.size}) as client:
            job_id = await job.submit(client, row.temperatures)
            status = await ended(client, job_id)
            caplog.clear()
            if row.fails:
                with pytest.raises(BatchError) as caught:
                    await client.retrieve_batch_results(job_id)
                assert caught.value.code == row.fails
                with pytest.raises(BatchError):
                    await client.retrieve_batch_results(job_id, return_exceptions=True)
                return
            outcomes = await settled(client, job_id)
        assert warnings(caplog) == sorted(2 * row.warned)
        async with connect(server) as other:
            again = await other.retrieve_batch_results(job_id, return_exceptions=True)
        assert len(server.batches) == len(row.plans)
    check(outcomes, row)
    assert list(map(fingerprint, again)) == list(map(fingerprint, outcomes))
    assert status.request_count == row.count


IN_OUTPUT = {"ok": "answer", "garbage": "empty"}
IN_ERRORS = {"400": "400", "500": "500", "expired": "expired", "timeout": "timeout"}
LOST = {  # or lost, where the batch counts more answers than its files have
    "completed": "missing|lost", "expired": "expired|lost", "cancelled": "cancelled|lost", "failed": "failed",
}  # fmt: skip
FILES = list(product((True, False), repeat=2))


@pytest.mark.parametrize("status", LOST)
@pytest.mark.parametrize("files", FILES, ids=["both", "output", "errors", "neither"])
async def test_any_mix_of_files_in_any_state(status: str, files: tuple[bool, bool], caplog) -> None:
    """What is in a file that is there counts; the rest has the reason that the status gives."""
    has_output, has_errors = files
    lines = ["ok", "400", "garbage", "ok", "missing", "timeout", "500", "expired", "ok"]

    def wanted(outcome: str) -> str:
        found = IN_OUTPUT.get(outcome) if has_output else None
        return found or (IN_ERRORS.get(outcome) if has_errors else None) or LOST[status]

    rows = [
        Row(
            lines=" ".join(lines),
            want=" ".join(map(wanted, lines)),
            status=status,
            plan={"output_file": has_output, "error_file": has_errors},
            job=job,
        )
        for job in ("plain", "two models, own ids", "own ids in pairs")
    ]
    with SimulatedServer(
        batch_seconds=0.01, batch_plans=[plan for row in rows for plan in row.plans]
    ) as server:
        for row in rows:
            async with connect(server, batch={"max_batch_size": JOBS[row.job].size}) as client:
                job_id = await JOBS[row.job].submit(client, row.temperatures)
                ending = await ended(client, job_id)
                assert ending.status == status
                assert ending.completed_count + ending.failed_count == ending.request_count == len(lines)
                caplog.clear()
                if status == "failed" and not any(files):
                    with pytest.raises(BatchError, match="no reason given"):
                        await client.retrieve_batch_results(job_id)
                else:
                    check(await settled(client, job_id), row)
                assert all(text.startswith("batch: the API counts ") for text in warnings(caplog))


@pytest.mark.parametrize("status", ["expired", "cancelled"])
@pytest.mark.parametrize("done", [0, 0.4, 1])
async def test_what_was_done_in_time_is_kept(status: str, done: float) -> None:
    """A batch cut short hands out what it finished; the rest has expired or was cancelled."""
    with SimulatedServer(batch_seconds=0.01, batch_plans=[{"status": status, "done": done}]) as server:
        async with connect(server) as client:
            job_id = (await client.submit_batch_job(asked(10))).job_id
            await ended(client, job_id)
            outcomes = await settled(client, job_id)
    answers = {n: o.content for n, o in enumerate(outcomes) if isinstance(o, ModelResponse)}
    assert len(answers) == 10 * done
    assert all(content == f"echo: p{n}" for n, content in answers.items())
    assert {o.code for o in outcomes if isinstance(o, BatchError)} == (
        {f"batch_{status}"} if done < 1 else set()
    )


async def test_a_job_that_has_not_ended_says_so() -> None:
    """BatchError whose code is the status, whatever batches have ended."""
    plans = [{}, {"status": "in_progress"}, {"status": "finalizing"}]
    with SimulatedServer(batch_seconds=0.01, batch_plans=plans) as server:
        async with connect(server, batch={"max_batch_size": 1}) as client:
            job_id = (await client.submit_batch_job(asked(3))).job_id
            first = job_id.partition("+")[0]
            await ended(client, first)
            for _ in range(100):
                if (await client.get_batch_status(job_id)).status == "in_progress":
                    break
                await asyncio.sleep(0.01)
            with pytest.raises(BatchError, match="2 of 3 batches have not ended") as caught:
                await client.retrieve_batch_results(job_id)
            assert caught.value.code == "in_progress"
            (response,) = await client.retrieve_batch_results(first)
    assert response.content == "echo: p0"


OTHER_PROCESS = """
import asyncio, json, sys
from openai_eval_client import ModelResponse, OpenAIClient

async def main(job_id):
    async with OpenAIClient() as client:
        outcomes = await client.retrieve_batch_results(job_id, return_exceptions=True)
    return [
        outcome.model_dump_json() if isinstance(outcome, ModelResponse)
        else [type(outcome).__name__, outcome.code, str(outcome)]
        for outcome in outcomes
    ]

print(json.dumps(asyncio.run(main(sys.argv[1]))))
"""


async def test_another_process_settles_it_from_the_job_id() -> None:
    """With nothing but the id and the account: the same outcomes, order, temperatures and costs."""
    lines = EVERY.replace("missing", "400").replace("truncated", "500")  # lost answers are waited for
    row = dataclasses.replace(ROWS["every outcome, two models"], lines=lines)
    with SimulatedServer(batch_seconds=0.01, batch_plans=row.plans) as server:
        async with connect(server) as client:
            job_id = await JOBS[row.job].submit(client, [n / 10 for n in range(row.count)])
            await ended(client, job_id)
            here = await client.retrieve_batch_results(job_id, return_exceptions=True)
        environment = {
            **os.environ,
            "OPENAI_API_KEY": KEY,
            "OPENAI_BASE_URL": server.base_url,
            "PYTHONPATH": str(ROOT),
        }
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-c", OTHER_PROCESS, job_id],
            env=environment,
            capture_output=True,
            check=True,
        )
    assert json.loads(done.stdout) == [
        o.model_dump_json() if isinstance(o, ModelResponse) else [type(o).__name__, o.code, str(o)]
        for o in here
    ]
    assert [o.temperature for o in here if isinstance(o, ModelResponse)] == [0, 0.7, 0.8, 0.9, 1.4]


async def test_an_endpoint_without_responses_is_named() -> None:
    """A batch of embeddings is left to the SDK."""
    request = {"custom_id": "a", "method": "POST", "url": "/v1/embeddings"}
    request["body"] = {"model": "text-embedding-3-small", "input": "hello"}
    with SimulatedServer(batch_seconds=0.01) as server:
        async with connect(server) as client:
            batch_id = await by_hand(client, [request], endpoint="/v1/embeddings")
            assert (await ended(client, batch_id)).completed_count == 1
            with pytest.raises(BatchError, match="/v1/embeddings") as caught:
                await client.retrieve_batch_results(batch_id)
    assert caught.value.code == "unsupported_endpoint"
