"""The store: what was put is found again, committed and safe between tasks, threads and processes."""

import asyncio
import logging
import os
import shutil
import signal
import sqlite3
import textwrap
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
from stores import KEYS, POSIX, QUIET, VALUES, fill, names, outcome, started

from openai_eval_client import ValidationError
from openai_eval_client._cache.store import Store

# --- kept and found ---------------------------------------------------------------------------------------


async def test_what_was_put_is_found_again(store: Store, path: Path) -> None:
    """By the same store and by the next one; what was not put is not there."""
    await fill(store)
    other = Store(path)
    for reader in (store, other):
        assert [await reader.get(key) for key in KEYS] == [VALUES[key] for key in KEYS]
        assert await reader.get(b"unknown") is None
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


async def test_a_put_whose_caller_is_cancelled_is_kept(store: Store) -> None:
    """The answer was paid for."""
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
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("openai_eval_client")]
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
    """Each put that returned in the killed process is found."""
    for moment in (1, 100):
        child = started(KILLED, path)
        returned = [int(child.stdout.readline()) for _ in range(moment)]
        child.kill()
        returned += [int(line) for line in child.communicate()[0].splitlines()]
        store = Store(path)
        assert [await store.get(b"%d" % n) for n in returned] == [b"value %d" % n for n in returned]
        store.close()


async def test_a_put_waits_for_another_writer(store: Store, path: Path) -> None:
    """Another program holds the write lock for a while: the put takes as long, reads do not."""
    await store.put(b"key", b"value")
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        waiting = asyncio.create_task(store.put(b"later", b"value"))
        assert await store.get(b"key") == b"value"
        assert not waiting.done()
        other.execute("COMMIT")
    assert await waiting


async def test_a_put_does_not_wait_too_long_for_another_writer(path: Path, caplog) -> None:
    """It is logged once; later puts try again, and succeed once the lock is free."""
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


FORKED_WHILE_WAITING = """
    import asyncio, sys
    from openai_eval_client._cache.store import Store

    async def main(path):
        store = Store(path)
        putting = asyncio.ensure_future(store.put(b"key", b"value"))
        await asyncio.sleep(0.5)
        began = time.monotonic()
        if not os.fork():
            os._exit(0)
        print("forked", time.monotonic() - began < 20, flush=True)
        assert await putting
        store.close()

    asyncio.run(main(sys.argv[1]))
"""


@POSIX
async def test_a_fork_does_not_wait_until_another_program_is_done(store: Store, path: Path) -> None:
    """The put that waits for that program does: it goes on after the fork."""
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        parent = started(QUIET + textwrap.dedent(FORKED_WHILE_WAITING), path)
        assert await asyncio.to_thread(parent.stdout.readline) == "forked True\n"
        other.execute("ROLLBACK")
    assert await asyncio.to_thread(outcome, parent) == ""
    assert await store.get(b"key") == b"value"


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
    other, held, at_most = Store(path), 0, 0

    async def hold(holder: Store) -> None:
        nonlocal held, at_most
        async with holder.exclusive("job"):
            held += 1
            at_most = max(at_most, held)
            async with holder.exclusive(f"another {id(asyncio.current_task())}"):
                await asyncio.sleep(0.001)
            held -= 1

    await asyncio.gather(*(hold(holder) for holder in (store, other) * 5))
    assert at_most == 1
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
    """A warning holds the path and SQLite's reason."""
    store = Store(path)
    path.unlink()
    with caplog.at_level(logging.DEBUG):
        asyncio.run(store.put(b"key", b"a secret answer"))
    store.close()
    assert str(path) in caplog.text
    assert "secret" not in caplog.text
