"""Files written whole or not at all, and locks on files."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
import uuid
from concurrent.futures import Future
from pathlib import Path
from typing import IO, TYPE_CHECKING

from openai_eval_client._runtime.loops import ForkAware, mind_forks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Self


@contextlib.contextmanager
def replacing(name: str) -> Iterator[IO[bytes]]:
    """Open a file that takes its name once all is written: until then, what had the name keeps it."""
    path = Path(name).resolve()
    is_special = path.exists() and not path.is_file()
    target = path if is_special else path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex}.part")
    try:
        file = target.open("wb" if is_special else "xb")
    except OSError as error:
        error.filename = name
        raise
    try:
        with file:
            yield file
        if not is_special:
            target.replace(path)
    finally:
        if not is_special:
            target.unlink(missing_ok=True)


class FileLock(ForkAware):
    """The operating system's lock on a file made for it: `async with` waits for it without blocking the loop.

    Processes, threads and tasks exclude one another alike. The file is removed when the lock is released.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None  # open while the lock is waited for or held
        mind_forks(self)

    async def __aenter__(self) -> Self:
        if not self._take(wait=False):
            taken: Future[None] = Future()
            taken.set_running_or_notify_cancel()  # from here on, no cancelled wait can cancel it
            # nothing interrupts the thread, so it is a daemon: the interpreter's end does not wait for it
            threading.Thread(target=self._wait, args=(taken,), name="file lock", daemon=True).start()
            try:
                await asyncio.wrap_future(taken)
            except BaseException:
                taken.add_done_callback(lambda _: self._release())
                raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._release()

    def after_fork(self, *, child: bool) -> None:  # the same on both sides
        """Close the child's copy of the file, which would hold the lock beyond the parent's end."""
        if child:
            self._close()

    def _wait(self, taken: Future[None]) -> None:
        try:
            while not self._take(wait=True):
                pass  # the lock was that of a file removed by its last holder: the next is on a new one
        except OSError as error:
            taken.set_exception(error)
        else:
            taken.set_result(None)

    def _take(self, *, wait: bool) -> bool:
        taken = False
        self._file = file = os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            if hasattr(os, "fchmod"):
                os.fchmod(file, 0o600)  # whatever the umask
            if _lock(file, wait=wait):
                with contextlib.suppress(
                    FileNotFoundError
                ):  # the last holder of the lock has removed the file
                    taken = os.path.samestat(os.fstat(file), self._path.stat())
        finally:
            if not taken:
                self._close()
        return taken

    def _release(self) -> None:
        if self._file is None:  # in a forked child, or where waiting failed
            return
        with contextlib.suppress(OSError):  # where an open file cannot be removed, it stays
            self._path.unlink()
        _unlock(self._file)
        self._close()

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            os.close(file)


if sys.platform == "win32":
    import msvcrt

    def _lock(file: int, *, wait: bool) -> bool:
        try:
            msvcrt.locking(file, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
        except OSError:  # LK_LOCK waits for 10 seconds at most
            return False
        return True

    def _unlock(file: int) -> None:
        msvcrt.locking(file, msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _lock(file: int, *, wait: bool) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _unlock(file: int) -> None:
        fcntl.flock(file, fcntl.LOCK_UN)
