"""The store on real files: committed, found again, safe between processes, and never a wrong value."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from openai_eval_client import ValidationError
from openai_eval_client._cache.store import Store
from openai_eval_client._runtime.loops import Background

KEYS = [bytes([n]) * 32 for n in range(40)]
VALUES = {key: (b"%d " % n) * (3000 if n % 10 == 9 else 40) for n, key in enumerate(KEYS)}
POSIX = pytest.mark.skipif(os.name != "posix", reason="forks, signals and permission bits")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs.sqlite"


@pytest.fixture
def store(path: Path):
    opened = Store(path)
    yield opened
    opened.close()


def names(folder: Path) -> set[str]:
    return {each.name for each in folder.iterdir()}


async def fill(store: Store) -> None:
    assert all(await asyncio.gather(*(store.put(key, VALUES[key]) for key in KEYS)))
    await store.journal_put("job", {"id": "batch_1"})


# A program that forks while it has threads is warned of it.
QUIET = "import os, time, warnings; warnings.simplefilter('ignore', DeprecationWarning)\n"


def started(code: str, *arguments: object, **options: object) -> subprocess.Popen[str]:
    """A process of its own, in which a warning is an error."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *map(str, arguments)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, text=True, cwd=Path(__file__).parents[2], **pipes, **options)


def outcome(child: subprocess.Popen[str]) -> str:
    out, errors = child.communicate(timeout=50)
    assert (child.returncode, errors) == (0, "")
    return out


# --- kept and found ---------------------------------------------------------------------------------------


async def test_what_was_put_is_found_again(store: Store, path: Path) -> None:
    """By the same store and by the next one; what was not put is not there."""
    await fill(store)
    other = Store(path)
    for each in (store, other):
        assert [await each.get(key) for key in KEYS] == [VALUES[key] for key in KEYS]
        assert await each.get(b"unknown") is None
    other.close()


async def test_a_put_is_committed_when_it_returns(store: Store, path: Path) -> None:
    """Another connection sees it at once."""
    await store.put(b"key", b"value")
    with closing(sqlite3.connect(path)) as other:
        assert other.execute("SELECT value FROM answers").fetchall() == [(b"value",)]


async def test_a_later_value_replaces_an_earlier_one(store: Store) -> None:
    """One value for each key."""
    await store.put(b"key", b"old")
    await store.put(b"key", b"new")
    assert await store.get(b"key") == b"new"


async def test_a_value_can_be_too_old(store: Store) -> None:
    """Only those kept since then are returned."""
    await store.put(b"key", b"value")
    assert await store.get(b"key", since=time.time() - 60) == b"value"
    assert await store.get(b"key", since=time.time() + 60) is None


async def test_the_journal_keeps_entries_by_name(store: Store, path: Path) -> None:
    """Written, replaced, removed; found by the next store."""
    assert await store.journal_get("job") is None
    await store.journal_put("job", {"state": 1, "id": "é"})
    await store.journal_put("job", {"state": 2, "id": "é"})
    await store.journal_put("other", {})
    other = Store(path)
    assert await other.journal_get("job") == {"state": 2, "id": "é"}
    assert await other.journal_get("other") == {}
    await other.journal_delete("job")
    await other.journal_delete("job")
    assert await store.journal_get("job") is None
    other.close()


async def test_a_read_only_store_keeps_nothing(store: Store, path: Path, caplog) -> None:
    """It finds what others keep; a put returns False, the journal refuses."""
    await fill(store)
    reader = Store(path, read_only=True)
    assert await reader.get(KEYS[0]) == VALUES[KEYS[0]]
    assert not await reader.put(b"key", b"value")
    with pytest.raises(ValidationError, match="journal cannot be written"):
        await reader.journal_put("job", {})
    reader.close()
    assert await store.get(b"key") is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]


# --- the thread -------------------------------------------------------------------------------------------


async def test_what_waits_is_done_in_one_go() -> None:
    """Jobs asked for while a group is at work make the next group, in order; their outcomes are their own."""
    groups, go_on = [], threading.Event()

    def work(jobs):
        groups.append(list(jobs))
        go_on.wait(10)
        return [ValueError(job) if job == 7 else -job for job in jobs]

    background = Background("test", work)
    first = asyncio.create_task(background.do(0))
    while not groups:
        await asyncio.sleep(0.001)
    rest = [asyncio.create_task(background.do(job)) for job in range(1, 50)]
    await asyncio.sleep(0)
    go_on.set()
    outcomes = await asyncio.gather(first, *rest, return_exceptions=True)
    assert groups == [[0], list(range(1, 50))]
    assert [each for each in outcomes if not isinstance(each, ValueError)] == [
        -n for n in range(50) if n != 7
    ]
    background.finish()


async def test_the_thread_goes_when_there_is_nothing_to_do() -> None:
    """By itself after a moment, at once when finished; and comes back when there is."""
    background = Background("test thread", lambda jobs: jobs)
    for _ in range(2):
        assert await background.do("job") == "job"
        (thread,) = [each for each in threading.enumerate() if each.name == "test thread"]
        await asyncio.to_thread(thread.join, 10)
        assert not thread.is_alive()
    await background.do("job")
    background.finish()
    assert "test thread" not in [each.name for each in threading.enumerate()]


async def test_work_that_raises_raises_for_each() -> None:
    """And the next group is another matter."""

    def work(jobs):
        if "bad" in jobs:
            raise OSError("no")
        return jobs

    background = Background("test", work)
    with pytest.raises(OSError, match="no"):
        await background.do("bad")
    assert await background.do("good") == "good"
    background.finish()


async def test_a_put_nobody_waits_for_any_more_is_kept(store: Store) -> None:
    """Cancelling the wait does not undo it: the answer was paid for."""
    task = asyncio.create_task(store.put(b"key", b"value"))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await store.put(b"next", b"value")
    assert await store.get(b"key") == b"value"


def test_several_loops_in_several_threads_use_one_store(store: Store) -> None:
    """Each gets its own outcomes; one loop after the other, too."""

    async def use(number: int) -> None:
        for n in range(50):
            key = b"%d %d" % (number, n)
            assert await store.put(key, key)
            assert await store.get(key) == key

    threads = [threading.Thread(target=lambda n=n: asyncio.run(use(n))) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    asyncio.run(use(9))
    with closing(sqlite3.connect(store._database.path)) as other:
        assert other.execute("SELECT count(*) FROM answers").fetchone() == (250,)


def test_a_loop_that_ended_is_no_trouble(store: Store) -> None:
    """A loop that closes while its puts are on their way: they are kept, and the store goes on."""

    async def leave() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        for key in KEYS:
            asyncio.ensure_future(store.put(key, b"value"))  # noqa: RUF006
        await asyncio.sleep(0)

    asyncio.run(leave())
    asyncio.run(store.put(b"last", b"value"))
    assert asyncio.run(store.get(KEYS[-1])) == b"value"


async def test_after_closing_nothing_is_left(path: Path, caplog) -> None:
    """No thread, no side file; a second close does nothing, and a late put is only logged."""
    store = Store(path)
    await fill(store)
    store.close()
    store.close()
    assert names(path.parent) == {path.name}
    assert not [each for each in threading.enumerate() if each.name.startswith("openai_eval_client")]
    assert not await store.put(b"key", b"value")
    assert await store.get(KEYS[0]) is None
    assert len(caplog.records) == 2


def test_a_store_that_is_never_closed_ends_with_the_interpreter(path: Path) -> None:
    """Without a warning, a hanging thread, a lost value or a side file."""
    child = started(
        """
        import asyncio, sys
        from openai_eval_client._cache.store import Store
        store = Store(sys.argv[1])
        async def main():
            await store.put(b"key", b"value")
            print(await store.get(b"key"))
            asyncio.ensure_future(store.put(b"late", b"value"))
            await asyncio.sleep(0)
        asyncio.run(main())
        """,
        path,
    )
    assert outcome(child) == "b'value'\n"
    assert names(path.parent) == {path.name}
    with closing(sqlite3.connect(path)) as other:
        assert other.execute("SELECT count(*) FROM answers").fetchone() == (2,)


# --- the file ---------------------------------------------------------------------------------------------


@POSIX
@pytest.mark.parametrize("mask", [0, 0o022, 0o277])
async def test_only_its_owner_may_read_it(path: Path, mask: int) -> None:
    """The file and both its side files are 0600 whatever the umask; so is a lock."""
    before = os.umask(mask)
    try:
        store = Store(path)
        await fill(store)
        async with store.exclusive("job"):
            modes = [stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()]
    finally:
        os.umask(before)
    store.close()
    assert len(modes) == 4
    assert set(modes) == {0o600}


def sqlite_file(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


def a_text(path: Path) -> None:
    path.write_text("prompt,answer\n" * 100)


def empty(path: Path) -> None:
    path.touch()


def short(path: Path) -> None:
    path.write_bytes(b"SQLite format 3\0")


def foreign(path: Path) -> None:
    sqlite_file(
        path, "PRAGMA journal_mode = WAL", "CREATE TABLE answers (x)", "INSERT INTO answers VALUES (1)"
    )


def of_another_application(path: Path) -> None:
    sqlite_file(path, "PRAGMA application_id = 42", "CREATE TABLE t (x)")


def newer(path: Path) -> None:
    Store(path).close()
    sqlite_file(path, "PRAGMA user_version = 99")


def with_another_table(path: Path) -> None:
    Store(path).close()
    sqlite_file(path, "CREATE TABLE more (x)")


def with_a_trigger(path: Path) -> None:
    Store(path).close()
    sqlite_file(path, "CREATE TRIGGER t AFTER INSERT ON answers BEGIN DELETE FROM journal; END")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (a_text, "no cache of this package"),
        (empty, "is empty"),
        (short, "no cache of this package"),
        (foreign, "another program"),
        (of_another_application, "another program"),
        (newer, "newer version"),
        (with_another_table, "not as they were made"),
        (with_a_trigger, "not as they were made"),
    ],
)
def test_a_file_that_is_not_ours_is_refused_and_left_alone(path: Path, make, says: str) -> None:
    """With an error that names it; not a byte is changed, nothing appears beside it."""
    make(path)
    before, beside = path.read_bytes(), names(path.parent)
    for read_only in (False, True):
        with pytest.raises(ValidationError, match=says) as raised:
            Store(path, read_only=read_only)
        assert repr(str(path)) in str(raised.value)
        assert raised.value.field == "cache"
    assert path.read_bytes() == before
    assert names(path.parent) == beside


@pytest.mark.parametrize("name", ["", "missing/runs.sqlite", "/dev/null", "dangling"])
def test_a_place_where_no_file_can_be_is_refused(tmp_path: Path, name: str) -> None:
    """A directory, a directory that is not there, a device, a link to nowhere."""
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "runs.sqlite")
    with pytest.raises(ValidationError, match="cache="):
        Store(tmp_path / name)


def test_a_read_only_store_makes_no_file(path: Path) -> None:
    """write=False needs one that is there."""
    with pytest.raises(ValidationError, match="does not exist"):
        Store(path, read_only=True)
    assert not path.exists()


async def test_any_name_will_do(tmp_path: Path, monkeypatch) -> None:
    """Spaces, question marks, percent signs, other alphabets; relative, wherever the program goes."""
    monkeypatch.chdir(tmp_path)
    name = "läufe 100%?mode=memory#1 .sqlite"
    store = Store(name)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert await store.put(b"key", b"value")
    store.close()
    assert names(tmp_path) == {name, "elsewhere"}


async def test_a_link_is_followed(path: Path, tmp_path: Path) -> None:
    """Two names of one file are one cache."""
    link = tmp_path / "link.sqlite"
    store = Store(path)
    link.symlink_to(path)
    other = Store(link)
    assert await store.put(b"key", b"value")
    assert await other.get(b"key") == b"value"
    other.close()
    store.close()


async def test_a_file_that_vanishes_stops_nothing(store: Store, path: Path, caplog) -> None:
    """Deleted while in use: said once each, and not made again behind the user's back."""
    await fill(store)
    path.unlink()
    for _ in range(3):
        assert not await store.put(b"key", b"value")
        assert await store.get(KEYS[0]) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "the file is gone" in caplog.text
    assert not path.exists()


async def test_a_file_put_in_its_place_is_not_touched(store: Store, path: Path, tmp_path: Path) -> None:
    """SQLite would apply the old file's log to it: for this client it is as good as none."""
    other = Store(tmp_path / "other.sqlite")
    await other.put(b"key", b"other")
    other.close()
    await fill(store)
    before = (tmp_path / "other.sqlite").read_bytes()
    (tmp_path / "other.sqlite").replace(path)
    assert await store.get(b"key") is None
    assert not await store.put(b"key", b"value")
    store.close()
    assert path.read_bytes() == before


async def test_a_log_left_of_a_file_that_is_gone_is_not_taken_for_the_new_ones(path: Path) -> None:
    """As after a kill and deleting only the file itself: an error that says what to do."""
    _, data, log = whole()
    damaged_file(str(path.parent), data, log).unlink()
    with pytest.raises(ValidationError, match="delete that file") as raised:
        Store(path)
    assert f"{path}-wal" in str(raised.value)
    assert not path.exists()
    Path(f"{path}-wal").unlink()
    store = Store(path)
    assert [await store.get(key) for key in KEYS] == [None] * len(KEYS)
    store.close()


# --- damage -----------------------------------------------------------------------------------------------


@functools.cache
def whole() -> tuple[bytes, bytes, bytes]:
    """A file that was closed; and one as a kill leaves it, with its log beside it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "runs.sqlite"
        store = Store(path)
        asyncio.run(fill(store))
        killed = path.read_bytes(), Path(f"{path}-wal").read_bytes()
        store.close()
        return path.read_bytes(), *killed


async def look(path: Path, *, write: bool) -> bool:
    """Read everything; whether anything was found. Only our own error may come, and only right values."""
    try:
        store = Store(path)
    except ValidationError as error:
        assert repr(str(path)) in str(error)
        return False
    found = False
    try:
        if write:
            await store.put(b"new", b"value")
        for key in KEYS:
            try:
                value = await store.get(key)
            except ValidationError as error:
                assert repr(str(path)) in str(error)
                continue
            assert value in {None, VALUES[key]}
            found |= value is not None
        try:
            assert await store.journal_get("job") in (None, {"id": "batch_1"})
        except ValidationError:
            return found
    finally:
        store.close()
    return found


def damaged_file(folder: str, data: bytes, log: bytes = b"") -> Path:
    path = Path(folder) / "runs.sqlite"
    path.write_bytes(data)
    if log:
        Path(f"{path}-wal").write_bytes(log)
    return path


# Half of the places are where the pages keep their structure, which a page's content would drown.
PLACES = st.integers(0, len(whole()[0]) - 1) | st.builds(
    lambda page, offset: page * 4096 + offset,
    st.integers(0, len(whole()[0]) // 4096 - 1),
    st.integers(0, 150),
)
MANY = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))


@MANY
@given(place=PLACES, bit=st.integers(0, 7), write=st.booleans())
@example(place=3866, bit=7, write=False)  # SQLite quotes what is no text
def test_a_flipped_bit_never_makes_a_wrong_value(place: int, bit: int, write: bool) -> None:
    """Anywhere in the file: found as it was, missing, or refused with an error that names the file."""
    data = bytearray(whole()[0])
    data[place] ^= 1 << bit
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(look(damaged_file(folder, bytes(data)), write=write))


@MANY
@given(place=PLACES, write=st.booleans())
def test_a_truncated_file_never_makes_a_wrong_value(place: int, write: bool) -> None:
    """At any byte."""
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(look(damaged_file(folder, whole()[0][:place]), write=write))


@MANY
@given(share=st.floats(0, 1, exclude_max=True), bit=st.none() | st.integers(0, 7), write=st.booleans())
def test_a_damaged_log_never_makes_a_wrong_value(share: float, bit: int | None, write: bool) -> None:
    """The log that a kill left beside the file: one bit flipped in it, or cut anywhere."""
    _, data, log = whole()
    place = int(share * len(log))
    changed = bytearray(log)
    if bit is None:
        del changed[place:]
    else:
        changed[place] ^= 1 << bit
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(look(damaged_file(folder, data, bytes(changed)), write=write))


async def test_the_files_are_whole_before_they_are_damaged(tmp_path: Path) -> None:
    """Else the three properties above would prove nothing."""
    closed, data, log = whole()
    (tmp_path / "killed").mkdir()
    assert await look(damaged_file(str(tmp_path), closed), write=False)
    assert await look(damaged_file(str(tmp_path / "killed"), data, log), write=False)


async def test_a_damaged_value_is_missing_and_said_once(path: Path, caplog) -> None:
    """A checksum that does not fit: the value is not returned, another takes its place."""
    store = Store(path)
    await fill(store)
    store.close()
    sqlite_file(path, "UPDATE answers SET value = x'00'", "UPDATE journal SET created = created + 1")
    store = Store(path)
    assert [await store.get(key) for key in KEYS] == [None] * len(KEYS)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(path) in caplog.text
    await store.put(KEYS[0], b"new")
    assert await store.get(KEYS[0]) == b"new"
    with pytest.raises(ValidationError, match="wrong checksum of 'job'"):
        await store.journal_get("job")
    store.close()


# --- a disk that is full, a place that cannot be written --------------------------------------------------

FULL = """
    import asyncio, json, resource, sys, logging
    from openai_eval_client import ValidationError
    from openai_eval_client._cache.store import Store

    logging.basicConfig(stream=sys.stdout, format="%(levelname)s")

    async def main(path):
        store = Store(path)
        kept = [n for n in range(20) if await store.put(b"%d" % n, bytes(1000))]
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # no file may grow beyond it
        more = [n for n in range(100, 300) if await store.put(b"%d" % n, bytes(1000))]
        try:
            while True:
                await store.journal_put("job", {"x": "y" * 10_000})
        except ValidationError:
            refused = True
        found = [n for n in [*kept, *more] if await store.get(b"%d" % n) == bytes(1000)]
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        again = await store.put(b"again", b"value")
        store.close()
        print(json.dumps([len(kept), len(more), found == [*kept, *more], refused, again]))

    asyncio.run(main(sys.argv[1]))
"""


@POSIX
def test_a_full_disk_stops_nothing_and_loses_nothing(path: Path) -> None:
    """Puts without room return False, said once; what was kept stays; with room again they succeed."""
    said, result = outcome(started(FULL, path)).splitlines()
    assert said == "WARNING"
    kept, more, found, refused, again = json.loads(result)
    assert kept == 20
    assert 0 < more < 200
    assert (found, refused, again) == (True, True, True)


NOBODY = """
    import asyncio, os, sys, logging
    from openai_eval_client import ValidationError
    from openai_eval_client._cache.store import Store

    if os.geteuid() == 0:
        os.setgid(65534)
        os.setuid(65534)  # root may write anywhere

    async def main(path):
        for read_only in (False, True):
            try:
                store = Store(path, read_only=read_only)
            except ValidationError as error:
                print(type(error).__name__, "cannot be" in str(error) and path in str(error))
            else:
                print(await store.get(b"key"))
                store.close()

    asyncio.run(main(sys.argv[1]))
"""


@POSIX
@pytest.mark.parametrize("what", ["file", "directory"])
def test_what_cannot_be_written_can_be_read(what: str) -> None:
    """A read-only file, or one in a read-only directory: refused for writing, used with write=False."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "runs.sqlite"
        store = Store(path)
        asyncio.run(store.put(b"key", b"value"))
        store.close()
        path.chmod(0o444)
        Path(folder).chmod(0o777 if what == "file" else 0o555)
        before = path.read_bytes()
        said = outcome(started(NOBODY, path))
        Path(folder).chmod(0o700)
        assert said.splitlines() == ["ValidationError True", "b'value'"]
        assert path.read_bytes() == before


# --- several processes ------------------------------------------------------------------------------------

PUTTING = """
    import asyncio, sys
    from openai_eval_client._cache.store import Store

    async def main(path, number):
        store = Store(path)
        async def one(n):
            assert await store.put(b"%d" % n, b"value %d" % n)
            assert await store.put(b"%d of %s" % (n, number.encode()), b"own")
            assert await store.get(b"%d" % n) == b"value %d" % n
        for start in range(0, 120, 10):
            await asyncio.gather(*(one(n) for n in range(start, start + 10)))
        store.close()

    print("ready", flush=True)
    sys.stdin.readline()
    asyncio.run(main(*sys.argv[1:]))
"""


async def test_four_processes_write_one_file(path: Path) -> None:
    """All make it, write the same and their own, and read: no lock error, nothing lost."""
    children = [started(PUTTING, path, n) for n in range(4)]
    for child in children:
        child.stdout.readline()
    for child in children:
        child.stdin.write("\n")
        child.stdin.flush()
    for child in children:
        outcome(child)
    store = Store(path)
    for n in range(120):
        assert await store.get(b"%d" % n) == b"value %d" % n
        assert [await store.get(b"%d of %d" % (n, number)) for number in range(4)] == [b"own"] * 4
    store.close()
    assert names(path.parent) == {path.name}


KILLED = """
    import asyncio, sys
    from openai_eval_client._cache.store import Store

    async def main(path):
        store = Store(path)
        for n in range(100_000):
            assert await store.put(b"%d" % n, b"value %d" % n)
            print(n, flush=True)

    asyncio.run(main(sys.argv[1]))
"""


@POSIX
async def test_a_kill_loses_nothing_that_was_put(path: Path) -> None:
    """What a killed process had been told is kept is there."""
    for moment in (1, 100):
        child = started(KILLED, path)
        told = [int(child.stdout.readline()) for _ in range(moment)]
        child.kill()
        told += [int(line) for line in child.communicate()[0].splitlines()]
        store = Store(path)
        assert [await store.get(b"%d" % n) for n in told] == [b"value %d" % n for n in told]
        store.close()


async def test_a_writer_in_the_way_is_waited_for(store: Store, path: Path) -> None:
    """Another program holds the write lock for a while: the put takes as long, reads do not."""
    await store.put(b"key", b"value")
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        waiting = asyncio.create_task(store.put(b"later", b"value"))
        assert await store.get(b"key") == b"value"
        assert not waiting.done()
        other.execute("COMMIT")
    assert await waiting


async def test_a_writer_in_the_way_for_too_long_is_not_waited_for(path: Path, caplog) -> None:
    """It is logged once; each later put tries again, and succeeds when the way is free."""
    store = Store(path, patience=0.05)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        for _ in range(3):
            assert not await store.put(b"key", b"value")
        with pytest.raises(ValidationError, match="journal cannot be written: database is locked"):
            await store.journal_put("job", {})
        other.execute("ROLLBACK")
    assert await store.put(b"key", b"value")
    assert len(caplog.records) == 1
    store.close()


FORKED = """
    import asyncio, os, sys
    from openai_eval_client._cache.store import Store

    store = Store(sys.argv[1])

    async def use(name):
        for n in range(50):
            assert await store.put(b"%s %d" % (name, n), name)
            assert await store.get(b"%s %d" % (name, n)) == name
        assert await store.get(b"before") == b"value"

    async def before():
        await store.put(b"before", b"value")
        await store.get(b"before")
        for n in range(100):  # on their way when it forks
            asyncio.ensure_future(store.put(b"flying %d" % n, b"value"))
        await asyncio.sleep(0)
        global child
        child = os.fork()
        if not child:
            return
        await asyncio.sleep(0)

    async def hold():
        async with store.exclusive("job"):
            pass

    asyncio.run(before())
    asyncio.run(use(b"parent" if child else b"child"))
    asyncio.run(hold())
    if child:
        _, status = os.waitpid(child, 0)
        print(status)
"""


@POSIX
async def test_it_survives_a_fork(path: Path) -> None:
    """Parent and child go on with the same store, each for itself; nothing on its way is lost."""
    assert outcome(started(QUIET + textwrap.dedent(FORKED), path)) == "0\n"
    store = Store(path)
    for name in (b"parent", b"child"):
        assert [await store.get(b"%s %d" % (name, n)) for n in range(50)] == [name] * 50
    assert [await store.get(b"flying %d" % n) for n in range(100)] == [b"value"] * 100
    store.close()
    assert names(path.parent) == {path.name}


# --- mutual exclusion -------------------------------------------------------------------------------------

HOLDING = """
    import asyncio, sys
    from openai_eval_client._cache.store import Store

    async def main(path):
        store = Store(path)
        async with store.exclusive("job"):
            print("held", flush=True)
            await asyncio.to_thread(sys.stdin.readline)
        print("free", flush=True)

    asyncio.run(main(sys.argv[1]))
"""


async def test_a_name_is_held_by_one_task_at_a_time(store: Store, path: Path) -> None:
    """Of one store and of two; other names are free meanwhile; no file is left."""
    other, held, most = Store(path), 0, 0

    async def hold(each: Store) -> None:
        nonlocal held, most
        async with each.exclusive("job"):
            held += 1
            most = max(most, held)
            async with each.exclusive(f"another {id(asyncio.current_task())}"):
                await asyncio.sleep(0.001)
            held -= 1

    await asyncio.gather(*(hold(each) for each in (store, other) * 5))
    assert most == 1
    other.close()
    assert not list(path.parent.glob("*.lock"))


async def test_a_name_is_held_by_one_process_at_a_time(store: Store, path: Path) -> None:
    """Until it lets go, by itself or because it was killed; waiting blocks no loop and can be cancelled."""
    for end in ("let go", "killed"):
        child = started(HOLDING, path)
        assert child.stdout.readline() == "held\n"
        waiting = asyncio.create_task(store.exclusive("job").__aenter__())
        await asyncio.wait([waiting], timeout=0.1)
        assert not waiting.done()
        waiting.cancel()
        await asyncio.wait([waiting])
        if end == "killed":
            child.kill()
            child.communicate()
        else:
            assert child.communicate("\n")[0] == "free\n"
        async with store.exclusive("job"):
            pass


@POSIX
async def test_a_child_does_not_prolong_its_parents_hold(store: Store, path: Path) -> None:
    """A process killed while a process it had forked lives on: the name is free."""
    code = HOLDING.replace('print("held"', 'os.fork() or time.sleep(60); print("held"')
    child = started(QUIET + textwrap.dedent(code), path, start_new_session=True)
    try:
        assert child.stdout.readline() == "held\n"
        child.kill()
        child.wait()
        async with store.exclusive("job"):
            pass
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()


async def test_no_lock_where_there_can_be_no_file(store: Store, path: Path, tmp_path: Path) -> None:
    """The directory went: our own error, naming the file."""
    shutil.move(tmp_path, f"{tmp_path} moved")
    with pytest.raises(ValidationError, match="no lock beside it"):
        async with store.exclusive("job"):
            pass
    shutil.move(f"{tmp_path} moved", tmp_path)


def test_logging_names_the_file_and_no_content(caplog, path: Path) -> None:
    """What a warning says is the path and SQLite's reason."""
    store = Store(path)
    path.unlink()
    with caplog.at_level(logging.DEBUG):
        asyncio.run(store.put(b"key", b"a secret answer"))
    store.close()
    assert str(path) in caplog.text
    assert "secret" not in caplog.text
