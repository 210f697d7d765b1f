"""The page about what a client did: what it says, and that it stands alone."""

import asyncio
import os
import threading
from pathlib import Path

import pytest
from answers import answer
from pages import Page, check

from openai_eval_client import OpenAIClient, OpenAIConfig, RateLimitConfig
from openai_eval_client._format import dollars
from openai_eval_client._report.page import write_page
from openai_eval_client.testing import SimulatedServer

KEY = "sk-report-0123456789"
PROMPT = "the secret of the third island"
SCRIPT = '<script>alert("x")</script>'


def client_of(server, **options):
    """A client of a simulated server."""
    config = OpenAIConfig(
        api_key=KEY, base_url=server.base_url, default_model="gpt-4o-mini", max_retries=1, timeout=5
    )
    return OpenAIClient(config, **options)


def read(path):
    """A page from its file, checked."""
    return check(Page(path.read_text("utf-8")))


async def test_the_figures_on_the_page_are_those_of_the_statistics(tmp_path, no_pauses, few_certificates):
    """Answered, failed, cost, tokens and 429s are the same, and each attempt is in some column."""
    limits = RateLimitConfig(requests_per_minute=6000, tokens_per_minute=900_000, adaptive_throttling=False)
    with SimulatedServer(faults={"500": 0.3, "429": 0.1}, seed=2) as server:
        async with client_of(server, rate_limit=limits) as client:
            await client.batch_generate(["hi"] * 60, max_tokens=20, return_exceptions=True)
            stats = client.stats
            page = read(client.report(tmp_path / "run.html"))
    tiles = page.tiles()
    assert tiles["answered"] == f"{stats.requests - stats.failures}"
    assert tiles["failed"] == f"{stats.failures}"
    assert tiles["cost"] == dollars(stats.cost.total)
    assert tiles["429s / retries"] == f"{stats.rate_limited} / {stats.retries}"
    assert tiles["tokens in"] == f"{stats.prompt_tokens:,}"
    assert page.words.count(f"{stats.requests - stats.failures} answered, {stats.failures} failed, ") == 1
    data = client._account.recorder.report_data()
    timeline = data.history.models["gpt-4o-mini"]
    assert sum(timeline.admitted) == stats.attempts
    assert sum(timeline.rate_limited) == stats.rate_limited
    assert sum(timeline.used) == stats.prompt_tokens + stats.completion_tokens
    assert sum(data.latency.values()) == stats.requests - stats.failures
    assert sum(row.prompts for row in data.failures) == stats.failures
    assert sum(row.attempts for row in data.failures) == stats.failures + stats.retries
    assert {(row.kind, row.status) for row in data.failures} == {
        ("InternalServerError", 500),
        ("RateLimitError", 429),
    }
    assert "the server failed" in page.words


async def test_neither_prompt_nor_answer_nor_key_is_on_the_page(tmp_path, few_certificates):
    """They are missing whatever failed and whatever was answered."""
    with SimulatedServer(script=["garbage", "500"] * 3) as server:
        async with client_of(server) as client:
            await client.batch_generate([PROMPT] * 5, max_tokens=20, return_exceptions=True)
            text = client.report(tmp_path / "run.html").read_text("utf-8")
    assert KEY not in text
    assert PROMPT not in text
    assert "echo:" not in text


async def test_names_from_outside_are_escaped(tmp_path, few_certificates):
    """A model and a title are shown as text, and what is no valid Unicode as question marks."""
    with SimulatedServer() as server:
        async with client_of(server) as client:
            await client.generate_response("x", model=SCRIPT, max_tokens=5)
            page = read(client.report(tmp_path / "run.html", title=f"{SCRIPT} & \ud800\x00co"))
    assert "<script" not in page.text
    assert f"{SCRIPT} & ??co" in page.words
    assert page.words.count(SCRIPT) > 3


async def test_a_client_that_did_nothing_has_a_page(tmp_path):
    """It says that nothing was sent, and has no charts."""
    client = OpenAIClient(OpenAIConfig(api_key=KEY))
    page = read(client.report(tmp_path / "run.html"))
    assert "0 answered, 0 failed, $0.00, 0 s; nothing was sent" in page.words
    assert page.svgs() == []
    await client.close()


async def test_one_request_has_a_page(tmp_path, few_certificates):
    """Its charts have one column each."""
    with SimulatedServer() as server:
        async with client_of(server) as client:
            await client.generate_response("x", max_tokens=5)
            page = read(client.report(tmp_path / "run.html"))
    assert len(page.svgs()) == 5
    assert "bound by the time the server takes" in page.words


async def test_many_models_with_long_names_have_a_page(tmp_path, few_certificates):
    """Six have charts of their own, all stand in the table."""
    names = [f"ft:gpt-4o-mini:{'very-long-name-' * 5}{number}" for number in range(12)]
    with SimulatedServer() as server:
        async with client_of(server) as client:
            runs = [client.generate_response("x", model=name, max_tokens=5) for name in names]
            await asyncio.gather(*runs)
            page = read(client.report(tmp_path / "run.html"))
    assert len(page.svgs()) == 6 * 2 + 3
    assert "has 6 more" in page.words
    assert all(page.text.count(name) >= 1 for name in names)


async def test_a_page_can_be_written_in_the_middle_of_a_run_and_after_it(tmp_path, few_certificates):
    """It is also written from another thread meanwhile."""
    seen = []
    with SimulatedServer(latency=0.02) as server:
        client = client_of(server)

        def write_one(_):
            seen.append(read(client.report(tmp_path / "run.html")))

        await client.batch_generate(["x"] * 20, max_tokens=5, progress_callback=write_one)
        thread = threading.Thread(target=client.report, args=(tmp_path / "other.html",))
        thread.start()
        thread.join()
        await client.close()
    assert len(seen) == 20
    assert "20 answered" in read(client.report(tmp_path / "run.html")).words
    assert read(tmp_path / "other.html")


async def test_calls_on_the_drop_in_client_are_on_the_page(tmp_path, few_certificates):
    """The page says how the server refused one of them."""
    with SimulatedServer(script=["500"]) as server:
        async with client_of(server) as client:
            messages = [{"role": "user", "content": PROMPT}]
            await client.openai.chat.completions.create(model="gpt-4o-mini", messages=messages)
            page = read(client.report(tmp_path / "run.html"))
    assert "InternalServerError 500" in page.words
    assert PROMPT not in page.text


async def test_finish_reasons_are_a_table(tmp_path, few_certificates):
    """The most frequent comes first, with its share; what was not counted is said."""
    with SimulatedServer() as server:
        async with client_of(server) as client:
            recorder = client._account.recorder
            for reason in ("stop", "length", "stop", "stop", SCRIPT, ""):
                recorder.answered(reason)
            recorder.settled(
                [answer(finish_reason=reason) for reason in ("content_filter", *["length"] * 4)], 1
            )
            page = read(client.report(tmp_path / "run.html"))
    assert f"how answers ended answers share length 5 50% stop 3 30% {SCRIPT} 1 10%" in page.words
    assert "content_filter 1 10%" in page.words
    assert "Not counted: 1 answers without a finish reason, or to calls on client.openai." in page.words


async def test_what_is_odd_about_the_answers_is_on_the_page(tmp_path):
    """In words; a page about answers that are all whole has no such section."""
    heading = "What to know about the answers"
    async with OpenAIClient(OpenAIConfig(api_key=KEY)) as client:
        client._account.recorder.answered(answer())
        assert heading not in read(client.report(tmp_path / "run.html")).words
        client._account.recorder.answered(
            answer(finish_reason=SCRIPT, fits_schema=False, unsent_parameters=["temperature"])
        )
        words = read(client.report(tmp_path / "run.html")).words
    assert f"{heading} 1 answer ended with '{SCRIPT}' 1 answer without what the schema asks for" in words
    assert "1 answer to requests without temperature, which the model refuses" in words


async def test_a_page_without_finish_reasons_has_no_table_of_them(tmp_path):
    """A client that only asked through `client.openai` knows none."""
    async with OpenAIClient(OpenAIConfig(api_key=KEY)) as client:
        client._account.recorder.answered()
        assert "Finish reasons" not in read(client.report(tmp_path / "run.html")).words


async def test_nothing_stays_in_flight_after_cancelled_and_failed_runs(few_certificates, no_pauses):
    """However a run ends, each attempt that began has ended."""
    with SimulatedServer(latency=0.05, faults={"drop": 0.2, "500": 0.2}, seed=5) as server:
        async with client_of(server) as client:
            for seconds in (0.02, 0.1, 0.2):
                run = client.batch_generate(["x"] * 50, max_tokens=5, return_exceptions=True)
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(run, seconds)
            await client.batch_generate(["x"] * 20, max_tokens=5, return_exceptions=True)
            timeline = client._account.recorder._timeline
    assert timeline._in_flight == 0
    of_model = timeline.history().models["gpt-4o-mini"]
    assert sum(of_model.admitted) > 20


def test_threads_keep_one_history(few_certificates):
    """What four event loops did at a time adds up."""
    with SimulatedServer() as server:
        client = client_of(server)
        runs = [
            threading.Thread(target=lambda: asyncio.run(client.batch_generate(["x"] * 25, max_tokens=5)))
            for _ in range(4)
        ]
        for run in runs:
            run.start()
        for run in runs:
            run.join()
        timeline = client._account.recorder._timeline
        asyncio.run(client.close())
    assert timeline._in_flight == 0
    assert sum(timeline.history().models["gpt-4o-mini"].admitted) == 100


# --- the file --------------------------------------------------------------------------------------------


def test_a_page_replaces_another_whole_or_not_at_all(tmp_path, monkeypatch):
    """Where the disk is full, the old page stays, and nothing is left beside it."""
    path = tmp_path / "run.html"
    assert write_page(path, "one") == path
    assert write_page(str(path), "two") == path
    monkeypatch.setattr("pathlib.Path.replace", _full)
    with pytest.raises(OSError, match="full"):
        write_page(path, "three")
    assert path.read_text() == "two"
    assert [each.name for each in tmp_path.iterdir()] == ["run.html"]


def _full(*_):
    raise OSError(28, "disk full")


def test_a_page_is_written_through_a_link(tmp_path):
    """The link stays a link."""
    target, link = tmp_path / "real.html", tmp_path / "link.html"
    target.write_text("old")
    link.symlink_to(target)
    write_page(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"


def test_a_device_is_written_to_and_not_replaced():
    """Otherwise /dev/null would be a file from then on."""
    write_page(os.devnull, "page")
    assert not Path(os.devnull).is_file()


def test_a_path_that_cannot_be_written_raises(tmp_path):
    """The error is Python's own."""
    with pytest.raises(FileNotFoundError):
        write_page(tmp_path / "no" / "run.html", "x")
    with pytest.raises(IsADirectoryError):
        write_page(tmp_path, "x")
