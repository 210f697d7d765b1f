"""The benchmarks run and count correctly; how long they take is not judged here."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from local_redis import started_redis

from openai_eval_client.testing import SimulatedServer

BENCHMARKS = Path(__file__).parent / "benchmarks"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.alone
@pytest.mark.parametrize(
    ("case", "most"),
    [
        ("limits right, 5 s windows", 0.005),
        ("limits 4x too high, 5 s windows, 64 in flight", 0.02),
        ("limits 4x too high, 5 s windows, no headers", 0.12),
    ],
)
def test_the_pacing_benchmark_in_short(case: str, most: float) -> None:
    """Over real sockets every prompt is answered in order, with few or no refusals."""
    pacing = load("pacing")
    (row,) = [row for row in pacing.ROWS if row.name == case]
    figures = pacing.measure(row, share=0.2)
    assert figures["failed"] == 0
    assert figures["refused"] <= most


@pytest.mark.alone
@pytest.mark.timeout(120)
async def test_a_short_soak_leaves_nothing_behind() -> None:
    """With mixed sizes, faults and changing limits all is answered in order; no task or slot stays."""
    soak = load("soak")
    with SimulatedServer(
        rpm=6000, tpm=1_500_000, window=5, latency=0.1, faults=soak.FAULTS, seed=1, process=True
    ) as server:
        verdict = await soak.soak(server, 12, batch=100)
    assert verdict.clean, verdict
    assert verdict.answered >= 100


@pytest.mark.alone
@pytest.mark.timeout(180)
def test_a_short_chaos_loses_nothing(tmp_path: Path) -> None:
    """While programs, server, cache and Redis fail, each row is answered once, and the bills agree."""
    with started_redis() as redis:
        verdict = load("chaos").measure(5, 1, tmp_path, redis)
    assert verdict.clean, verdict
    assert verdict.rows > 0
    assert verdict.bills > 0


def test_chaos_finds_what_is_wrong(tmp_path: Path) -> None:
    """A row twice or missing, another row's answer, a wrong bill, what is left behind, a key in a file."""
    chaos, key = load("chaos"), "sk-chaos-0123456789"
    rows = [(row, f"echo: {chaos.prompt(0, row)}"[:20]) for row in (0, 1, 1, 3)] + [(4, "echo: another")]
    lines = [json.dumps({"index": index, "content": content}) for index, content in rows]
    (tmp_path / "log").write_text(f"Bearer {key}")
    (tmp_path / "rows-0.jsonl").write_text("\n".join(lines))
    twice, other = chaos.check_rows(tmp_path / "rows-0.jsonl", 0, None)
    assert twice.endswith("{1: 2, 2: 0}")
    assert "row 4 was answered with 'echo: another'" in other
    assert chaos.check_key(tmp_path, key) == [f"the key is in {tmp_path / 'log'}"]

    life = {"total": 1e-6, "unaccounted": 0.0, "in_flight": 1, "waiting": 0, "open": 0, "reserved": 0.0}
    (tmp_path / "life-0-1.json").write_text(json.dumps(life))
    call = SimpleNamespace(
        served=True, body={"user": "0-1"}, fault=None, prompt_tokens=10, completion_tokens=1
    )
    bill, left = chaos.check_bills(tmp_path, [call])
    assert bill == "0-1: billed 1e-06 to 1e-06, by the server 2.1e-06 to 2.1e-06"
    assert "{'in_flight': 1}" in left


@pytest.mark.timeout(120)
def test_a_killed_run_pays_only_for_the_rest(tmp_path: Path) -> None:
    """After three kills all prompts are answered; at most those in flight at a kill are sent twice."""
    resume = load("resume")
    options = resume.parsed(["--prompts", "300", "--kills", "3", "--in-flight", "20", "--latency", "0.1"])
    verdict = resume.measure(options, tmp_path / "runs.sqlite")
    assert verdict.clean, verdict
    assert verdict.from_cache > 0


async def test_a_warm_cache_sends_nothing(tmp_path: Path) -> None:
    """In a second run every prompt is answered from the file."""
    cache = load("cache")
    with SimulatedServer(process=True) as server:
        figures = await cache.measure(server, tmp_path, 300)
    assert (figures.prompts, figures.sent) == (300, 0)


@pytest.mark.parametrize("pause", [0.0, 0.002])
async def test_few_prompts_are_taken_ahead_however_slow_the_consumer(pause: float) -> None:
    """At most two prompts for each request in flight are taken and not yet consumed; all are answered."""
    memory = load("memory")
    with SimulatedServer(process=True) as server:
        figures = await memory.measure(
            server.base_url, "as_completed", 400, in_flight=10, warm=20, pause=pause
        )
        assert server.max_in_flight <= 10
    assert figures.answered == figures.prompts == 400
    assert 10 <= figures.ahead <= 20


async def test_an_estimate_reads_every_prompt_and_sends_none() -> None:
    """The count is that of the generator, and the server sees no call."""
    memory = load("memory")
    with SimulatedServer() as server:
        figures = await memory.measure(server.base_url, "estimate", 5000, warm=20)
        assert server.calls == []
    assert figures.answered == 5000


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("no_pauses")
async def test_a_killed_batch_job_goes_on_from_its_id() -> None:
    """After two kills every request is answered in its place, and no batch exists twice."""
    verdict = await load("batch_kill").kill(2, count=30, seconds=0.3, seed=1)
    assert verdict.clean, verdict
    assert (verdict.answered, verdict.kills.total()) == (60, 2)


@pytest.mark.timeout(120)
def test_a_killed_program_goes_on_from_its_cache() -> None:
    """Killed at any moment of a job, every request is answered in its place, and no batch exists twice."""
    verdict = load("batch_resume").kill(3, count=30, seconds=0.3, seed=1)
    assert verdict.clean, verdict
    assert verdict.kills.total() >= 3
    assert verdict.answered == 10 * verdict.batches


def test_the_batch_benchmark_in_short() -> None:
    """Every request of a job of several files is answered in order."""
    figures = load("batch").measure(600, 250)
    assert figures["in order"]
    assert (figures["answered"], figures["one file"]) == (600, 250)


async def test_the_table_of_the_world_beside_the_raw_sdk() -> None:
    """Rows that need no wait come out as the table has them; the raw SDK hands out what is no answer."""
    world = load("world")
    chosen = [row for row in world.rows() if "answers: choice" in row.name and row.calls == 1]
    chosen += [row for row in world.rows() if "answers: error: " in row.name or "moderation" in row.name]
    compared = await world.compare(chosen)
    assert all(ours.right for _, _, ours in compared)
    assert any(raw.false_answer for _, raw, _ in compared)
    assert not any(ours.false_answer for _, _, ours in compared)
