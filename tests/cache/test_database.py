"""The file of a cache: ours or refused, whole or damaged, and never a wrong value."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import sqlite3
import stat
import tempfile
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from stores import KEYS, POSIX, VALUES, fill, names, outcome, started

from openai_eval_client import ValidationError
from openai_eval_client._cache.store import Store

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
    ("make", "message"),
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
def test_a_file_that_is_not_ours_is_refused_and_left_alone(path: Path, make, message: str) -> None:
    """With an error that names it; not a byte is changed, nothing appears beside it."""
    make(path)
    before, beside = path.read_bytes(), names(path.parent)
    for read_only in (False, True):
        with pytest.raises(ValidationError, match=message) as raised:
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
    """Deleted while in use: logged once for reads and once for writes, and not made again by itself."""
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


async def test_a_damaged_value_is_missing_and_logged_once(path: Path, caplog) -> None:
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
    """Puts without room return False, logged once; what was kept stays; with room again they succeed."""
    logged, result = outcome(started(FULL, path)).splitlines()
    assert logged == "WARNING"
    kept, more, found, refused, again = json.loads(result)
    assert kept == 20
    assert 0 < more < 200
    assert (found, refused, again) == (True, True, True)


UNPRIVILEGED = """
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
        result = outcome(started(UNPRIVILEGED, path))
        Path(folder).chmod(0o700)
        assert result.splitlines() == ["ValidationError True", "b'value'"]
        assert path.read_bytes() == before
