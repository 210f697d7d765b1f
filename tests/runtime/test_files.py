"""Locks on files: waited for without holding up the loop, the interpreter's end, or another waiter."""

import asyncio
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
from stores import POSIX, QUIET, outcome, started

from openai_eval_client._runtime.loops import FileLock

WAITING = """
import asyncio, sys
from pathlib import Path
from openai_eval_client._runtime.loops import FileLock

async def main(path):
    lock = FileLock(Path(path))
    waiting = asyncio.ensure_future(lock.__aenter__())
    while lock._file is None:
        await asyncio.sleep(0.001)
    print("waits", flush=True)
    await go_on(waiting)

async def go_on(waiting):
    pass  # ends while it waits

asyncio.run(main(sys.argv[1]))
"""
FORK = """
    if not os.fork():
        time.sleep(30)
    await waiting
    print("held", flush=True)
    time.sleep(30)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "job.lock"


def waiting_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "file lock"]


async def test_a_free_lock_takes_no_thread(path: Path) -> None:
    """It is held at once, and its file is removed afterwards."""
    async with FileLock(path):
        assert path.exists()
        assert waiting_threads() == []
    assert not path.exists()


@POSIX
@pytest.mark.parametrize("place", ["link", "hard link", "dangling link", "pipe", "text"])
async def test_what_stands_in_its_place_is_left_alone(path: Path, tmp_path: Path, place: str) -> None:
    """A link that somebody put there is not followed: no other file is locked, made, changed or removed."""
    other = tmp_path / "other"
    if place != "dangling link":
        other.write_text("mine")
        other.chmod(0o644)
    if place == "pipe":
        os.mkfifo(path, 0o644)
    elif place == "text":
        path.write_text("mine")
        path.chmod(0o644)
    elif place == "hard link":
        path.hardlink_to(other)
    else:
        path.symlink_to(other)
    before = sorted((each.name, each.lstat().st_mode) for each in tmp_path.iterdir())
    with pytest.raises(OSError):  # noqa: PT011  # which one, the system decides
        await FileLock(path).__aenter__()
    assert sorted((each.name, each.lstat().st_mode) for each in tmp_path.iterdir()) == before


async def test_a_waiter_gets_the_lock_when_it_is_released(path: Path) -> None:
    """On a new file, as the holder has removed its own."""
    async with FileLock(path):
        waiting = asyncio.create_task(FileLock(path).__aenter__())
        await asyncio.wait([waiting], timeout=0.05)
        assert not waiting.done()
    lock = await waiting
    assert path.exists()
    await lock.__aexit__()
    assert not path.exists()


async def test_a_cancelled_waiter_leaves_the_lock_to_the_next(path: Path) -> None:
    """Its thread waits on, and releases the lock as soon as it has it."""
    async with FileLock(path):
        waiting = asyncio.create_task(FileLock(path).__aenter__())
        await asyncio.wait([waiting], timeout=0.05)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert len(waiting_threads()) == 1
    for thread in waiting_threads():
        await asyncio.to_thread(thread.join, 10)
    assert not path.exists()
    async with FileLock(path):
        pass


async def test_a_waiter_cancelled_after_it_got_the_lock_releases_it(path: Path) -> None:
    """The thread has taken it, and the task has not gone on yet."""
    async with FileLock(path):
        waiting = asyncio.create_task(FileLock(path).__aenter__())
        await asyncio.wait([waiting], timeout=0.05)
    for thread in waiting_threads():
        thread.join(10)  # the loop runs nothing meanwhile
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not path.exists()


async def test_what_is_wrong_while_waiting_is_raised(path: Path) -> None:
    """The directory is gone when the lock is free."""
    held = FileLock(path)
    await held.__aenter__()
    waiting = asyncio.create_task(FileLock(path).__aenter__())
    await asyncio.wait([waiting], timeout=0.05)
    shutil.move(path.parent, f"{path.parent} moved")
    await held.__aexit__()
    with pytest.raises(FileNotFoundError):
        await waiting
    shutil.move(f"{path.parent} moved", path.parent)


async def test_the_interpreter_ends_while_a_thread_waits(path: Path) -> None:
    """Without a warning."""
    async with FileLock(path):
        child = started(WAITING, path)
        assert await asyncio.to_thread(outcome, child) == "waits\n"


@POSIX
async def test_a_child_forked_by_a_waiter_does_not_prolong_its_hold(path: Path) -> None:
    """The parent gets the lock, left by a killed process, and is killed; the child lives on without it."""
    import fcntl  # not on Windows

    code = QUIET + WAITING.replace("    pass  # ends while it waits\n", FORK)
    with path.open("w") as left:  # as a killed process leaves it: not removed
        fcntl.flock(left, fcntl.LOCK_EX)
        parent = started(code, path, start_new_session=True)
        assert await asyncio.to_thread(parent.stdout.readline) == "waits\n"
    try:
        assert await asyncio.to_thread(parent.stdout.readline) == "held\n"
        parent.kill()
        parent.wait()
        lock = await asyncio.wait_for(FileLock(path).__aenter__(), 10)
        await lock.__aexit__()
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
        parent.communicate()
