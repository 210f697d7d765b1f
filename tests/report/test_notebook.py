"""What a notebook shows, and plain data."""

import asyncio
import json
import math
from datetime import datetime, timezone
from decimal import Decimal

import pytest
from answers import SCRIPT, answer, parsed
from pages import Page

from openai_eval_client import (
    BatchError,
    BatchJobStatus,
    ClientStats,
    CostEstimate,
    CostLedger,
    ModelCost,
    OpenAIClient,
    OpenAIConfig,
)
from openai_eval_client._report.rows import rows
from openai_eval_client.testing import SimulatedServer

ROW = ModelCost(
    model=SCRIPT,
    channel="online",
    service_tier="default",
    calls=2,
    input_tokens=1200,
    cached_tokens=0,
    output_tokens=30,
    reasoning_tokens=0,
    unpriced=0,
    cost=Decimal("0.0012345"),
)
LEDGER = CostLedger(total=Decimal("0.0012345"), rows=[ROW], unaccounted=1, saved_by_cache=Decimal("0.5"))
STATS = ClientStats(
    requests=1234,
    failures=3,
    cost=LEDGER,
    utilisation={SCRIPT: {"tokens": 0.97}},
    wait_seconds=9.0,
    wait_seconds_by={"tokens": 8.0, "requests": 1.0},
    latency_p50=0.25,
    budget={"limit": Decimal(5)},
    finish_reasons={"stop": 1200, "length": 30, SCRIPT: 1},
    schema_misses=2,
    unsent_parameters={"temperature": 1231},
)
ESTIMATE = CostEstimate(
    model=SCRIPT, requests=5000, prompt_tokens=69_000, cost_low=0.01, cost_high=0.16, minutes=9
)
JOB = BatchJobStatus(
    job_id=f"batch_1{SCRIPT}",
    status="failed",
    created_at=datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc),
    request_count=10,
    completed_count=4,
    errors=[BatchError(SCRIPT, code="invalid", line=3)],
)


@pytest.mark.parametrize(
    ("thing", "shown"),
    [
        (STATS, ["1,231 / 3", "$0.0012", "97%", "9 s (tokens 8 s, requests 1 s)", "250 ms / - / -"]),
        (STATS, ["30 answers cut off: longer than max_tokens", "2 answers without what the schema asks for"]),
        (ESTIMATE, ["5,000 requests", "69,000 tokens in", "9 min", "$0.01", "$0.16"]),
        (JOB, ["failed", "4 / 0 / 10", "error invalid"]),
        (LEDGER, ["$0.0012", "1,200", "online", "saved by the cache: $0.50", "unaccounted: 1 attempts"]),
        (answer(), ["7 / 3", "$0.0020", "12 ms"]),
        (answer(content="", refusal=SCRIPT), ["refusal"]),
    ],
    ids=["stats", "what answers lack", "estimate", "job", "ledger", "answer", "refusal"],
)
def test_a_notebook_shows_a_small_table(thing, shown):
    """Numbers have units, and what comes from outside is text, not HTML."""
    page = Page(thing._repr_html_())
    assert "<script" not in page.text
    assert SCRIPT in page.words
    assert [each for each in shown if each not in page.words] == []
    assert len(page.text) < 5000


def test_a_long_answer_is_cut_in_a_notebook():
    """An answer is one cell among others."""
    assert len(answer(content="x" * 100_000)._repr_html_()) < 5000


@pytest.mark.parametrize("thing", [STATS, ESTIMATE, JOB, LEDGER, ROW, answer(), answer().usage])
def test_plain_data_is_json_and_reads_back(thing):
    """Numbers are numbers and times are texts, which every parser takes."""
    plain = thing.to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert type(thing).model_validate(plain).to_dict() == plain
    assert plain.keys() == thing.model_dump().keys()


def test_plain_data_has_money_as_numbers_and_times_as_texts():
    """`model_dump` keeps both as they are."""
    assert STATS.to_dict()["cost"]["total"] == 0.0012345
    assert STATS.to_dict()["budget"] == {"limit": 5.0}
    assert JOB.to_dict()["created_at"] == "2026-01-02T03:04:05+00:00"
    assert JOB.to_dict()["errors"] == [{"code": "invalid", "message": SCRIPT, "line": 3, "param": None}]


def test_plain_data_has_no_infinity():
    """JSON has none: it becomes None."""
    odd = answer(logprobs={"content": [{"logprob": -math.inf}, {"logprob": math.nan}]})
    assert odd.to_dict()["logprobs"] == {"content": [{"logprob": None}, {"logprob": None}]}


def test_plain_data_has_the_parsed_object():
    """An answer that was parsed has it as plain data, too."""
    assert parsed("Paris").to_dict()["parsed"] == {"city": "Paris", "founded": "1000-01-01T00:00:00Z"}


async def test_everything_works_inside_a_running_loop(tmp_path, few_certificates):
    """A notebook always runs one."""
    with SimulatedServer() as server:
        config = OpenAIConfig(api_key="sk-nb", base_url=server.base_url, default_model="gpt-4o-mini")
        async with OpenAIClient(config) as client:
            responses = await client.batch_generate(["a", "b"], max_tokens=5)
            shown = [client.stats, client.stats.cost, responses[0], await client.estimate(["a"])]
            assert all(Page(each._repr_html_()).words for each in shown)
            assert client.report(tmp_path / "run.html").exists()
    assert [row["content"] for row in rows(responses)] == ["echo: a", "echo: b"]


def test_everything_works_without_one(tmp_path, few_certificates):
    """A script shows the same after `asyncio.run`."""
    with SimulatedServer() as server:
        client = OpenAIClient(OpenAIConfig(api_key="sk-nb", base_url=server.base_url))
        asyncio.run(client.batch_generate(["a", "b"], max_tokens=5))
        assert Page(client.stats._repr_html_()).words
        assert client.report(tmp_path / "run.html").exists()
        asyncio.run(client.close())
