"""The report of a cache file, and its command."""

import hashlib
import sqlite3

import pytest
from pages import Page, check
from typer.testing import CliRunner

from openai_eval_client import OpenAIClient, OpenAIConfig, ValidationError
from openai_eval_client._kept import read_kept
from openai_eval_client._report_cache import cache_page
from openai_eval_client.cli import app
from openai_eval_client.testing import SimulatedServer

KEY = "sk-cache-report-012345"
PROMPT = "the secret of the third island"
SCRIPT = "<script>alert(1)</script>"


def client_of(server, path):
    """A client with a cache."""
    config = OpenAIConfig(api_key=KEY, base_url=server.base_url, default_model="gpt-4o-mini")
    return OpenAIClient(config, cache=path)


@pytest.fixture
async def cache(tmp_path, few_certificates):
    """A cache of twelve answers of two models, one of them unpriced, and their client's statistics."""
    path = tmp_path / "runs.sqlite"
    with SimulatedServer(output_tokens=7) as server:
        async with client_of(server, path) as client:
            await client.batch_generate([f"{PROMPT} {n}" for n in range(9)], max_tokens=20)
            await client.batch_generate(["a", "b", "c"], max_tokens=3, model=SCRIPT, api="responses")
            stats = client.stats
    return path, stats


async def test_it_shows_what_the_cache_holds(cache):
    """Answers, tokens and cost are those of the run."""
    path, stats = cache
    kept = read_kept(path)
    assert {name: model.answers for name, model in kept.models.items()} == {"gpt-4o-mini": 9, SCRIPT: 3}
    assert sum(model.prompt_tokens for model in kept.models.values()) == stats.prompt_tokens
    assert sum(model.completion_tokens for model in kept.models.values()) == stats.completion_tokens
    assert sum(model.cost for model in kept.models.values()) == pytest.approx(float(stats.cost))
    assert kept.reasons.total() == sum(kept.latency.classes().values()) == 12
    page = check(Page(cache_page(kept)))
    assert page.tiles()["answers"] == "12"
    assert "12 answers of 2 models" in page.words
    assert "3 unpriced when they were asked for" in page.words
    assert "failures, retries and 429s: only answers are kept" in page.words
    assert SCRIPT not in page.text
    assert PROMPT not in page.text


async def test_reading_leaves_no_trace(cache):
    """The file and its folder stay as they are."""
    path, _ = cache

    def look():
        names = sorted(each.name for each in path.parent.iterdir())
        return names, hashlib.sha256(path.read_bytes()).digest(), path.stat().st_mtime_ns

    before = look()
    read_kept(path)
    assert look() == before


async def test_a_run_may_write_it_meanwhile(tmp_path, few_certificates):
    """What was committed when it was read is in it."""
    path, counts = tmp_path / "runs.sqlite", []
    with SimulatedServer() as server:
        async with client_of(server, path) as client:
            for number in range(1, 4):
                await client.generate_response(f"x {number}", max_tokens=5)
                counts.append(len(read_kept(path).times))
            await client.generate_response("x 4", max_tokens=5)
    assert counts == [1, 2, 3]
    assert len(read_kept(path).times) == 4


async def test_a_writer_that_comes_while_it_is_read_is_noticed(cache, monkeypatch):
    """It is read again, as a file in use."""
    from openai_eval_client._database import Database

    path, _ = cache
    modes, read = [], Database._read

    def interrupted(self, mode, function):
        modes.append(mode)
        if len(modes) == 1:
            other = sqlite3.connect(path)
            other.execute("DELETE FROM answers WHERE rowid = 1")
            other.commit()
            other.close()
        return read(self, mode, function)

    monkeypatch.setattr(Database, "_read", interrupted)
    assert len(read_kept(path).times) == 11
    assert modes == ["immutable=1", "mode=ro"]


async def test_a_damaged_answer_is_counted_and_left_out(cache):
    """The others are shown."""
    path, _ = cache
    connection = sqlite3.connect(path)
    connection.execute("UPDATE answers SET value = x'7b7d' WHERE rowid = 2")
    connection.commit()
    connection.close()
    kept = read_kept(path)
    assert (len(kept.times), kept.unreadable) == (11, 1)
    assert check(Page(cache_page(kept))).tiles()["damaged"] == "1"


async def test_an_empty_cache_has_a_page(tmp_path):
    """It holds nothing, and says what it would not know."""
    path = tmp_path / "empty.sqlite"
    client = OpenAIClient(OpenAIConfig(api_key=KEY), cache=path)
    await client.close()
    assert "no answers are kept" in check(Page(cache_page(read_kept(path)))).words


def test_pauses_between_runs_are_left_out():
    """Two runs a day apart are two runs, not two lines at the edges."""
    from openai_eval_client._report_cache import _places

    day = 86_400.0
    places, breaks = _places([0.0, 10.0, day, day + 5])
    assert places == [0.0, 10.0, 10.0, 15.0]
    assert breaks == {10.0: day - 10}


@pytest.mark.parametrize("kind", ["missing", "text", "other", "folder", "empty"])
def test_what_is_no_cache_is_refused_by_name(tmp_path, kind):
    """And left as it is."""
    path = tmp_path / "file"
    if kind == "text":
        path.write_text("no database" * 100)
    elif kind == "other":
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE t (x)")
        connection.close()
    elif kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    with pytest.raises(ValidationError, match=f"cache='{path}'"):
        read_kept(path)
    done = CliRunner().invoke(app, ["report", str(path), "--output", str(tmp_path / "page.html")])
    assert done.exit_code == 2
    assert str(path) in done.stderr
    assert not (tmp_path / "page.html").exists()
    assert [each.name for each in tmp_path.iterdir()] == ([] if kind == "missing" else ["file"])


async def test_the_command_writes_a_page_and_says_where(cache, monkeypatch):
    """The sum on standard error, the path on standard output."""
    path, _ = cache
    monkeypatch.chdir(path.parent)
    done = CliRunner().invoke(app, ["report", "runs.sqlite"])
    assert (done.exit_code, done.stdout) == (0, "runs.sqlite.html\n")
    assert "12 answers of 2 models" in done.stderr
    assert check(Page((path.parent / "runs.sqlite.html").read_text("utf-8"))).tiles()["answers"] == "12"


async def test_a_page_that_cannot_be_written(cache):
    """The file is named as it was given."""
    path, _ = cache
    done = CliRunner().invoke(app, ["report", str(path), "-o", "/nowhere/page.html"])
    assert done.exit_code == 2
    assert done.stderr.startswith("/nowhere/page.html: No such file")


async def test_the_command_writes_to_standard_output(cache):
    """For a pipe."""
    path, _ = cache
    done = CliRunner().invoke(app, ["report", str(path), "-o", "-"])
    assert done.exit_code == 0
    assert check(Page(done.stdout)).tiles()["answers"] == "12"


async def test_the_command_does_not_write_over_the_cache(cache):
    """By whatever name."""
    path, _ = cache
    link = path.with_name("link")
    link.symlink_to(path)
    before = path.read_bytes()
    for output in (path, link):
        done = CliRunner().invoke(app, ["report", str(path), "-o", str(output)])
        assert done.exit_code == 2
    assert path.read_bytes() == before


async def test_a_folder_that_cannot_be_written_is_said(cache):
    """In a sentence."""
    path, _ = cache
    done = CliRunner().invoke(app, ["report", str(path), "-o", str(path.parent / "no" / "page.html")])
    assert done.exit_code == 2
    assert "No such file or directory" in done.stderr
