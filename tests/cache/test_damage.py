"""Files that are no cache, or a damaged one: refused once, before the first prompt, by every way in."""

from __future__ import annotations

import asyncio
import functools
import gzip
import os
import sqlite3
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from batches import connect
from stores import KEYS, POSIX, VALUES, fill, names, outcome, started

from openai_eval_client import BatchRequest, CacheConfig, ValidationError
from openai_eval_client._cache import store as store_module
from openai_eval_client._cache.store import Store
from openai_eval_client.testing import SimulatedServer

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("few_certificates")

PAGE = 4096
PROMPTS = [f"prompt {n}" for n in range(60)]


@functools.cache
def whole() -> bytes:
    """Return a cache with some answers, closed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "runs.sqlite"
        store = Store(path)
        asyncio.run(fill(store))
        store.close()
        return path.read_bytes()


@pytest.fixture(scope="module", autouse=True)
def cache_made() -> None:
    """Make it where no event loop runs."""
    whole()


def changed(start: int, data: bytes) -> bytes:
    """Return the cache with other bytes in one place."""
    return whole()[:start] + data + whole()[start + len(data) :]


def pages(kind: int) -> list[int]:
    """Return where the pages of a kind start: 13 is a leaf of a table, 10 one of keys."""
    return [start for start in range(0, len(whole()), PAGE) if start and whole()[start] == kind]


def by_sql(*statements: str, of: Callable[[], bytes] = whole) -> Callable[[Path], None]:
    """Return how to make the cache, changed by SQL."""

    def make(path: Path) -> None:
        path.write_bytes(of())
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            for statement in statements:
                connection.execute(statement)

    return make


def with_bytes(content: Callable[[], bytes]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content()) and None


SCHEMA = "PRAGMA writable_schema = ON"
FILES: dict[str, Callable[[Path], object]] = {
    "empty": Path.touch,
    "text": lambda path: path.write_text("prompt,answer\n" * 1000),
    "JSON lines": lambda path: path.write_text('{"prompt": "hello"}\n' * 1000),
    "invalid UTF-8": with_bytes(lambda: b"\xff\xfe\x80" * 3000),
    "zeros": with_bytes(lambda: bytes(3 * PAGE)),
    "compressed": with_bytes(lambda: gzip.compress(whole())),
    "magic alone": with_bytes(lambda: whole()[:16]),
    "header alone": with_bytes(lambda: whole()[:100]),
    "first page alone": with_bytes(lambda: whole()[:PAGE]),
    "first page that says so": with_bytes(lambda: (whole()[:28] + b"\0\0\0\1" + whole()[32:])[:PAGE]),
    "half": with_bytes(lambda: whole()[: len(whole()) // 2]),
    "no header": with_bytes(lambda: changed(0, bytes(PAGE))),
    "page of a key zeroed": with_bytes(lambda: changed(pages(10)[0], bytes(PAGE))),
    "page of answers zeroed": with_bytes(lambda: changed(pages(13)[-1], bytes(PAGE))),
    "page of answers overwritten": with_bytes(lambda: changed(pages(13)[1], b"\xa5" * PAGE)),
    "two pages exchanged": with_bytes(lambda: changed(pages(13)[1], whole()[pages(10)[0] :][:PAGE])),
    "other database": by_sql("CREATE TABLE answers (x)", of=bytes),
    "other application": by_sql("PRAGMA application_id = 42"),
    "newer format": by_sql("PRAGMA user_version = 99"),
    "no format": by_sql("PRAGMA user_version = 0"),
    "negative format": by_sql("PRAGMA user_version = -1"),
    "table missing": by_sql("DROP TABLE journal"),
    "another table": by_sql("CREATE TABLE more (x)"),
    "other columns": by_sql("ALTER TABLE answers ADD COLUMN x"),
    "a trigger": by_sql("CREATE TRIGGER t AFTER INSERT ON answers BEGIN DELETE FROM journal; END"),
    "schema that is no UTF-8": by_sql(SCHEMA, "UPDATE sqlite_master SET sql = CAST(x'ff80' AS TEXT)"),
    "schema of tables elsewhere": by_sql(SCHEMA, "UPDATE sqlite_master SET rootpage = 99999"),
    "both tables in one place": by_sql(SCHEMA, "UPDATE sqlite_master SET rootpage = 2"),
    "directory": Path.mkdir,
    "link to nowhere": lambda path: path.symlink_to(path.with_name("nowhere") / "x"),
    "below a file": lambda path: path.touch(),
}


def made(kind: str, folder: Path) -> Path:
    """Make such a file, and return the path to give."""
    path = folder / "runs.sqlite"
    FILES[kind](path)
    return path / "runs.sqlite" if kind == "below a file" else path


def content_of(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


@pytest.mark.parametrize("kind", FILES)
async def test_a_client_refuses_it_and_leaves_it_alone(tmp_path: Path, kind: str) -> None:
    """As it is made, so all its methods do; with an error that names field and path."""
    path = made(kind, tmp_path)
    before, beside = content_of(path), names(tmp_path)
    for given in (path, str(path), CacheConfig(path=path)):
        with pytest.raises(ValidationError) as raised:
            connect("http://127.0.0.1:9/v1", cache=given)  # type: ignore[arg-type]
        assert raised.value.field == "cache"
        assert repr(str(path)) in str(raised.value)
        assert "\n" not in str(raised.value)
    assert content_of(path) == before
    new = [tmp_path / name for name in names(tmp_path) - beside]
    assert {file.name for file in new} <= {
        "runs.sqlite-shm",
        "runs.sqlite-wal",
    }  # of a cache, but a damaged one
    assert all(not file.stat().st_size for file in new if file.name.endswith("-wal"))


@pytest.mark.parametrize("kind", FILES)
def test_the_commands_refuse_it_and_leave_the_output_alone(cli, tmp_path: Path, kind: str) -> None:
    """Exit code 2 and one line that names the file; `--overwrite` has not emptied the output by then."""
    (tmp_path / "cache").mkdir()
    path = made(kind, tmp_path / "cache")
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('"hello"\n' * 3)
    out.write_text("paid for\n")
    for options in ([], ["--batch"]):
        assert cli("run", prompts, "-o", out, "--overwrite", "--cache", path, *options, "-q") == 2
        assert (cli.out, cli.err.count(str(path)), cli.err.count("\n")) == ("", 1, 1)
        assert out.read_text() == "paid for\n"
    assert cli("batch", "submit", prompts, "--cache", path, "--model", "m") == 2
    assert (cli.out, cli.err.count(str(path)), cli.err.count("\n")) == ("", 1, 1)


def test_the_output_is_not_the_cache(cli, tmp_path: Path) -> None:
    """It would be emptied first."""
    prompts, path = tmp_path / "in.jsonl", tmp_path / "runs.sqlite"
    prompts.write_text('"hello"\n')
    path.write_bytes(whole())
    assert cli("run", prompts, "-o", path, "--overwrite", "--cache", path) == 2
    assert "is the cache as well" in cli.err
    assert path.read_bytes() == whole()


@pytest.mark.parametrize("given", ["~nobody-of-this-name/runs.sqlite", "\ud800.sqlite", "x" * 5000])
def test_a_path_that_no_file_can_have_is_refused(given: str) -> None:
    """No such user, half of a surrogate pair, too long a name."""
    with pytest.raises(ValidationError, match="cache=") as raised:
        connect("http://127.0.0.1:9/v1", cache=given)  # type: ignore[arg-type]
    assert raised.value.field == "cache"


UNREADABLE = """
    import os, sys
    from openai_eval_client import OpenAIClient, OpenAIConfig, ValidationError
    from openai_eval_client import _cache

    config = OpenAIConfig(api_key="none", base_url="http://127.0.0.1:9/v1")
    client = OpenAIClient(config)  # imports what another user may not
    if os.geteuid() == 0:
        os.setgid(65534)
        os.setuid(65534)  # root may read anything
    try:
        OpenAIClient(config, cache=sys.argv[1])
    except ValidationError as error:
        print(error.field, error)
"""


@POSIX
@pytest.mark.parametrize(("file", "folder"), [(0o000, 0o777), (0o200, 0o777), (0o666, 0o600)])
def test_a_file_that_may_not_be_read_is_refused(file: int, folder: int) -> None:
    """Without any right, with the right to write alone, and in a directory that is closed."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "runs.sqlite"
        path.write_bytes(whole())
        path.chmod(file)
        Path(place).chmod(folder)
        result = outcome(started(UNREADABLE, path))
        Path(place).chmod(0o700)
        assert result.startswith(f"cache cache={str(path)!r}: cannot be used")


@POSIX
def test_a_pipe_is_refused(path: Path) -> None:
    """And not waited for."""
    os.mkfifo(path)
    with pytest.raises(ValidationError, match="not a regular file"):
        connect("http://127.0.0.1:9/v1", cache=path)


# --- what can still be read of it -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE answers SET value = CAST(x'ff80' AS TEXT)",
        "UPDATE answers SET value = CAST(value AS TEXT)",
        "UPDATE answers SET created = CAST(x'ff80' AS TEXT)",
        "UPDATE answers SET created = 'yesterday'",
        "UPDATE answers SET checksum = CAST(checksum AS TEXT)",
        "UPDATE answers SET value = x''",
        "UPDATE answers SET value = zeroblob(100000)",
        "UPDATE answers SET value = 5, checksum = 5",
    ],
)
async def test_an_entry_that_is_not_as_it_was_written_is_missing(path: Path, statement: str, caplog) -> None:
    """Texts that are no UTF-8, wrong types, other bytes: asked for again, logged once, and put anew."""
    by_sql(statement)(path)
    store = Store(path)
    assert [await store.get(key) in {None, VALUES[key]} for key in KEYS] == [True] * len(KEYS)
    for key in KEYS:
        await store.put(key, VALUES[key])
    assert [await store.get(key) for key in KEYS] == [VALUES[key] for key in KEYS]
    store.close()
    assert len(caplog.records) <= 1


async def test_a_file_that_lacks_its_last_bytes_is_used(path: Path, caplog) -> None:
    """At most the entry that ends there is missing."""
    path.write_bytes(whole()[:-5])
    store = Store(path)
    found = [await store.get(key) for key in KEYS]
    store.close()
    assert found.count(None) == len(caplog.records) <= 1
    assert all(value in {None, VALUES[key]} for key, value in zip(KEYS, found, strict=True))


async def test_write_false_answers_from_what_can_be_read(path: Path, caplog) -> None:
    """Of a damaged file all other entries are found; those on the damaged page are asked for again."""
    path.write_bytes(changed(pages(13)[-1], bytes(PAGE)))
    before = path.read_bytes()
    store = Store(path, read_only=True)
    found = await asyncio.gather(*map(store.get, KEYS))
    store.close()
    assert 0 < found.count(None) < len(KEYS) / 2
    assert all(value in {None, VALUES[key]} for key, value in zip(KEYS, found, strict=True))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert path.read_bytes() == before


async def test_of_a_large_file_the_keys_are_looked_through(path: Path, monkeypatch) -> None:
    """A damaged page of answers is found when it is read, one of keys at once."""
    monkeypatch.setattr(store_module, "_KEYS_ONLY", 0)
    path.write_bytes(changed(pages(13)[-1], bytes(PAGE)))
    store = Store(path)
    outcomes = await asyncio.gather(*map(store.get, KEYS), return_exceptions=True)
    store.close()
    assert {type(one) for one in outcomes} == {bytes, ValidationError}
    path.write_bytes(changed(pages(10)[0], bytes(PAGE)))
    with pytest.raises(ValidationError, match="damaged"):
        Store(path)


# --- damage that comes while it is used -------------------------------------------------------------------


def damage(path: Path) -> None:
    """Overwrite all pages but the first."""
    data = path.read_bytes()
    with path.open("r+b") as file:
        file.seek(PAGE)
        file.write(b"\xa5" * (len(data) - PAGE))


async def warm(server: SimulatedServer, path: Path) -> None:
    async with connect(server, cache=path) as client:
        await client.batch_generate(PROMPTS)


async def test_a_run_ends_with_one_error(path: Path) -> None:
    """And not with one for each prompt: nothing is sent that the file may have."""
    with SimulatedServer() as server:
        await warm(server, path)
        async with connect(server, cache=path) as client:
            damage(path)
            with pytest.raises(ValidationError, match="damaged") as raised:
                await client.batch_generate(PROMPTS)
            assert raised.value.field == "cache"
        assert len(server.calls) == len(PROMPTS)


async def test_every_other_call_ends_with_one_error(path: Path) -> None:
    """A prompt alone, prompts by batches, a job submitted."""
    with SimulatedServer() as server:
        await warm(server, path)
        async with connect(server, cache=path) as client:
            damage(path)
            for call in (
                client.generate_response(PROMPTS[0]),
                client.batch_generate(PROMPTS, use_batch_api=True),
                client.submit_batch_job([BatchRequest(prompt="a")]),
            ):
                with pytest.raises(ValidationError) as raised:
                    await call
                assert raised.value.field == "cache"
        assert len(server.calls) == len(PROMPTS)


async def test_an_answer_that_cannot_be_kept_is_handed_out(path: Path, caplog) -> None:
    """With read=False nothing is looked up: all is answered, and one warning says that it is not kept."""
    with SimulatedServer() as server:
        await warm(server, path)
        async with connect(server, cache=CacheConfig(path=path, read=False)) as client:  # type: ignore[arg-type]
            damage(path)
            responses = await client.batch_generate(PROMPTS)
            assert client.stats.cache_writes == 0
    assert [response.content for response in responses] == [f"echo: {prompt}" for prompt in PROMPTS]
    assert len(caplog.records) == 1


@pytest.mark.skipif(sys.version_info < (3, 11), reason="SQLite's limits can be set from Python 3.11 on")
async def test_what_cannot_be_kept_keeps_no_other_from_it(path: Path, caplog) -> None:
    """Of writes that are committed together, one is too large for SQLite: the others are there."""
    store = Store(path)
    connections = []
    current = store._writer._current

    def limited(patience: float) -> sqlite3.Connection:
        connections.append(current(patience))
        connections[-1].setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 10_000)
        return connections[-1]

    store._writer._current = limited  # type: ignore[method-assign]
    values = [bytes(20_000 if n == 5 else 100) for n in range(len(KEYS))]
    kept = await asyncio.gather(*map(store.put, KEYS, values))
    assert kept == [n != 5 for n in range(len(KEYS))]
    assert [await store.get(key) is not None for key in KEYS] == kept
    store.close()
    assert len(caplog.records) == 1
