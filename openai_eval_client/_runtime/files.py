"""Files written whole or not at all, and locks on files."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import uuid
from pathlib import Path  # typer reads the annotations
from typing import IO, TYPE_CHECKING

from openai_eval_client._runtime.loops import mind_forks

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from typing_extensions import Self


@contextlib.contextmanager
def replacing(name: str) -> Iterator[IO[bytes]]:
    """Open a file that takes its name when all is written: until then, what had the name keeps it."""
    path = Path(name).resolve()
    is_special = path.exists() and not path.is_file()
    target = path if is_special else path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex}.part")
    try:
        file = target.open("wb" if is_special else "xb")
    except OSError as error:
        error.filename = name
        raise
    if is_special:
        with file:
            yield file
        return
    try:
        with file:
            yield file
        target.replace(path)
    finally:
        target.unlink(missing_ok=True)


_SHORTEST, _LONGEST = 0.01, 0.5  # seconds between two tries


class FileLock:
    """The operating system's lock on a file made for it: `async with` waits for it without blocking the loop.

    Processes, threads and tasks exclude one another alike. The file goes when the lock is handed back.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None
        mind_forks(self)

    async def __aenter__(self) -> Self:
        pause = _SHORTEST
        while not self._take():  # a thread that waits in the system's own call could not be cancelled
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(OSError):  # where an open file cannot be removed, it stays
            self._path.unlink()
        if self._file is not None:
            _unlock(self._file)
        self._close()

    def before_fork(self) -> None:
        """Nothing: the lock stays the parent's."""

    def after_fork(self, *, child: bool) -> None:  # the same on both sides
        """Close the child's copy of the file, which would hold the lock beyond the parent's end."""
        if child:
            self._close()

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def _take(self) -> bool:
        file = os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            if hasattr(os, "fchmod"):
                os.fchmod(file, 0o600)  # whatever the umask
            if _lock(file) and self._is_current(file):
                self._file = file
                return True
        finally:
            if self._file is None:
                os.close(file)
        return False

    def _is_current(self, file: int) -> bool:
        """Return whether the locked file still has its name: who held it before has removed it."""
        try:
            return os.path.samestat(os.fstat(file), self._path.stat())
        except FileNotFoundError:
            return False


if sys.platform == "win32":
    import msvcrt

    def _lock(file: int) -> bool:
        try:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def _unlock(file: int) -> None:
        msvcrt.locking(file, msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _lock(file: int) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _unlock(file: int) -> None:
        fcntl.flock(file, fcntl.LOCK_UN)
