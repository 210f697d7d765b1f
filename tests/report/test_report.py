"""The page about what a client did: what it says, and that it stands alone."""

import asyncio
import os
import re
import threading
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from pages import Page, check

from openai_eval_client import OpenAIClient, OpenAIConfig, RateLimitConfig
from openai_eval_client import _format as _html
from openai_eval_client._report.charts import Layer, TimeAxis, histogram
from openai_eval_client._report.page import write_page as write
from openai_eval_client._stats import History
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
    """A page from its file, looked at."""
    return check(Page(path.read_text("utf-8")))


async def test_the_figures_on_the_page_are_those_of_the_statistics(tmp_path, no_pauses, few_certificates):
    """Answered, failed, cost, tokens, 429s; and each attempt is in some column."""
    limits = RateLimitConfig(requests_per_minute=6000, tokens_per_minute=900_000, adaptive_throttling=False)
    with SimulatedServer(faults={"500": 0.3, "429": 0.1}, seed=2) as server:
        async with client_of(server, rate_limit=limits) as client:
            await client.batch_generate(["hi"] * 60, max_tokens=20, return_exceptions=True)
            stats = client.stats
            page = read(client.report(tmp_path / "run.html"))
    tiles = page.tiles()
    assert tiles["answered"] == f"{stats.requests - stats.failures}"
    assert tiles["failed"] == f"{stats.failures}"
    assert tiles["cost"] == _html.dollars(stats.cost.total)
    assert tiles["429s / retries"] == f"{stats.rate_limited} / {stats.retries}"
    assert tiles["tokens in"] == f"{stats.prompt_tokens:,}"
    assert page.words.count(f"{stats.requests - stats.failures} answered, {stats.failures} failed, ") == 1
    story = client._account.recorder.report_data()
    track = story.history.models["gpt-4o-mini"]
    assert sum(track.admitted) == stats.attempts
    assert sum(track.rate_limited) == stats.rate_limited
    assert sum(track.used) == stats.prompt_tokens + stats.completion_tokens
    assert sum(story.latency.values()) == stats.requests - stats.failures
    assert sum(row.prompts for row in story.failures) == stats.failures
    assert sum(row.attempts for row in story.failures) == stats.failures + stats.retries
    assert {(row.kind, row.status) for row in story.failures} == {
        ("InternalServerError", 500),
        ("RateLimitError", 429),
    }
    assert "the server failed; sent again" in page.words


async def test_neither_prompt_nor_answer_nor_key_is_on_the_page(tmp_path, few_certificates):
    """Whatever failed, and whatever was answered."""
    with SimulatedServer(script=["garbage", "500"] * 3) as server:
        async with client_of(server) as client:
            await client.batch_generate([PROMPT] * 5, max_tokens=20, return_exceptions=True)
            text = client.report(tmp_path / "run.html").read_text("utf-8")
    assert KEY not in text
    assert PROMPT not in text
    assert "echo:" not in text


async def test_names_from_outside_are_escaped(tmp_path, few_certificates):
    """A model, a title; what is no valid Unicode, too."""
    with SimulatedServer() as server:
        async with client_of(server) as client:
            await client.generate_response("x", model=SCRIPT, max_tokens=5)
            page = read(client.report(tmp_path / "run.html", title=f"{SCRIPT} & \ud800\x00co"))
    assert "<script" not in page.text
    assert f"{SCRIPT} & ??co" in page.words
    assert page.words.count(SCRIPT) > 3


async def test_a_client_that_did_nothing_has_a_page(tmp_path):
    """It says so."""
    client = OpenAIClient(OpenAIConfig(api_key=KEY))
    page = read(client.report(tmp_path / "run.html"))
    assert "0 answered, 0 failed, $0.00, 0 s; nothing was sent" in page.words
    assert page.svgs() == []
    await client.close()


async def test_one_request_has_a_page(tmp_path, few_certificates):
    """Pictures of one column each."""
    with SimulatedServer() as server:
        async with client_of(server) as client:
            await client.generate_response("x", max_tokens=5)
            page = read(client.report(tmp_path / "run.html"))
    assert len(page.svgs()) == 5
    assert "bound by the time the server takes" in page.words


async def test_many_models_with_long_names_have_a_page(tmp_path, few_certificates):
    """Six have pictures of their own, all stand in the table."""
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
    """And from another thread meanwhile."""
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
    """With what the server said of those it refused."""
    with SimulatedServer(script=["500"]) as server:
        async with client_of(server) as client:
            messages = [{"role": "user", "content": PROMPT}]
            await client.openai.chat.completions.create(model="gpt-4o-mini", messages=messages)
            page = read(client.report(tmp_path / "run.html"))
    assert "InternalServerError 500" in page.words
    assert PROMPT not in page.text


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
    track = timeline.history().models["gpt-4o-mini"]
    assert sum(track.admitted) > 20


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
    """Nothing is left beside it where the disk is full."""
    path = tmp_path / "run.html"
    assert write(path, "one") == path
    assert write(str(path), "two") == path
    monkeypatch.setattr("pathlib.Path.replace", _full)
    with pytest.raises(OSError, match="full"):
        write(path, "three")
    assert path.read_text() == "two"
    assert [each.name for each in tmp_path.iterdir()] == ["run.html"]


def _full(*_):
    raise OSError(28, "disk full")


def test_a_page_is_written_through_a_link(tmp_path):
    """The link stays."""
    target, link = tmp_path / "real.html", tmp_path / "link.html"
    target.write_text("old")
    link.symlink_to(target)
    write(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"


def test_a_device_is_written_to_and_not_replaced():
    """Or /dev/null would be a file from then on."""
    write(os.devnull, "page")
    assert not Path(os.devnull).is_file()


def test_a_folder_that_is_not_there_is_said(tmp_path):
    """As Python says it."""
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "no" / "run.html", "x")
    with pytest.raises(IsADirectoryError):
        write(tmp_path, "x")


# --- pictures --------------------------------------------------------------------------------------------


def heights(svg):
    """Of all columns."""
    return [float(rect.get("height")) for rect in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}rect")]  # noqa: S314


def over_time(seconds, layer, **options):
    """A chart of one-second columns."""
    history = History(0.0, seconds, 1.0, {}, [], {})
    return TimeAxis(history).draw("t", "u", layer, **options)


def test_columns_are_as_high_as_their_values_from_nought():
    """Twice the value is twice the height."""
    drawn = heights(over_time(4.0, Layer("a", "a", [1.0, 2.0, 0.0, 4.0])))
    assert drawn[1] == pytest.approx(2 * drawn[0], abs=0.02)
    assert drawn[2] == pytest.approx(4 * drawn[0], abs=0.02)


def test_a_peak_is_cut_off_and_says_so():
    """The rest stays readable."""
    values = [500.0, *[10.0] * 30]
    svg = over_time(31.0, Layer("a", "a", values), limits={"limit 12": 12.0})
    drawn = heights(svg)
    assert drawn[1] > 0.5 * drawn[0]
    assert "up to 500" in svg
    assert 'class="cut"' in svg


def test_a_limit_far_above_is_named_and_not_drawn():
    """Or the columns could not be seen."""
    near = over_time(1.0, Layer("a", "a", [10.0]), limits={"limit 20": 20.0})
    far = over_time(1.0, Layer("a", "a", [10.0]), limits={"limit 1M": 1e6})
    assert 'class="limit"' in near
    assert 'class="limit"' not in far
    assert "far below limit 1M" in far


def test_a_histogram_has_every_value_in_a_bar():
    """However many classes there are."""
    svg = histogram(dict.fromkeys(range(-100, 400), 2), {"p50": 1.0})
    counted = sum(int(count) for count in re.findall(r": (\d+)</title>", svg))
    assert counted == 1000
    assert len(heights(svg)) <= 36


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0 s"),
        (0.0123, "12 ms"),
        (1, "1 s"),
        (9.87, "9.9 s"),
        (59.9, "59 s"),
        (250, "4 min 10 s"),
        (3600, "1 h"),
        (7500, "2 h 5 min"),
        (200_000, "2 d 7 h"),
    ],
)
def test_times_have_units(seconds, said):
    """The two largest."""
    assert _html.duration(seconds) == said


@pytest.mark.parametrize(
    ("amount", "said"),
    [(None, "unknown"), (0, "$0.00"), (1234.5, "$1,234.50"), (0.00012345, "$0.00012"), (0.05, "$0.050")],
)
def test_amounts_say_what_is_known(amount, said):
    """Little is not nothing."""
    assert _html.dollars(amount) == said
