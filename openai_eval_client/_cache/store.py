"""What is kept between runs: answers and the journal of jobs, committed before a write returns."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from openai_eval_client._cache.database import Connection, Database, is_locked
from openai_eval_client._log import warn
from openai_eval_client._runtime import Background, FileLock

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    Statement = tuple[str, tuple[Any, ...]]


_PATIENCE = 60.0  # seconds to wait for another user of the file
_SLICE = 1.0  # of them at a time: a fork has to wait for the end of one
_LITTLE_PATIENCE = 0.5  # seconds for each write after one that waited in vain, until one succeeds

_GET = "SELECT created, value, checksum FROM {} WHERE key = ?"
_PUT = "INSERT OR REPLACE INTO {} (key, created, value, checksum) VALUES (?, ?, ?, ?)"
_DELETE = "DELETE FROM journal WHERE key = ?"


class Store:
    """One file of kept values, used by any number of tasks, event loops, threads and processes at once.

    Writes that wait at the same time are committed together, by a thread of their own; reads likewise.
    """

    def __init__(self, path: str | Path, *, read_only: bool = False, patience: float = _PATIENCE) -> None:
        self._database = Database(path, read_only=read_only)
        self._reader, self._writer = Connection(self._database), Connection(self._database)
        self._reads = Background("openai_eval_client reads", self._read)
        self._writes = Background("openai_eval_client writes", self._write)
        self._patience = self._write_patience = patience
        self._warned: set[str] = set()
        self._closed = False

    async def get(self, key: bytes, *, since: float = 0.0) -> bytes | None:
        """Return what was kept under a key since a time; None where there is nothing."""
        try:
            row = await self._do(self._reads, (_GET.format("answers"), (key,)))
        except (sqlite3.OperationalError, RuntimeError) as error:
            self._warn("cache %s cannot be read (%s): asking again", error)
            return None
        except sqlite3.DatabaseError as error:
            raise self._database.damaged(error) from None
        if row is not None and not _is_intact(key, row):
            self._warn("cache %s: an answer is damaged (%s): asking again", "wrong checksum")
            return None
        return row[1] if row is not None and row[0] >= since else None

    async def put(self, key: bytes, value: bytes) -> bool:
        """Keep a value and return once it is committed; False where it could not be."""
        try:
            await self._do(self._writes, _put("answers", key, value))
        except Exception as error:  # noqa: BLE001  # the answer is paid for: it is handed on in any case
            self._warn("cache %s cannot be written (%s): the run goes on, its answers are not kept", error)
            return False
        return True

    async def journal_get(self, key: str) -> dict[str, Any] | None:
        """Return an entry of the journal, None where there is none."""
        name = key.encode()
        row = await self._do_journal(self._reads, (_GET.format("journal"), (name,)))
        if row is None:
            return None
        if not _is_intact(name, row):
            raise self._database.damaged(f"wrong checksum of {key!r} in the journal")
        entry: dict[str, Any] = json.loads(row[1])
        return entry

    async def journal_put(self, key: str, value: dict[str, Any]) -> None:
        """Write an entry of the journal, in place of an older one, and return once it is committed."""
        await self._do_journal(self._writes, _put("journal", key.encode(), json.dumps(value).encode()))

    async def journal_delete(self, key: str) -> None:
        """Remove an entry of the journal, if it is there, and return once that is committed."""
        await self._do_journal(self._writes, (_DELETE, (key.encode(),)))

    @contextlib.asynccontextmanager
    async def exclusive(self, name: str) -> AsyncIterator[None]:
        """Wait for a name, and hold it alone among all users of this file, in this process and others."""
        # The lock ends with the process, also when that is killed.
        digest = blake2b(name.encode(), digest_size=8).hexdigest()
        path = self._database.path
        async with contextlib.AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(FileLock(path.with_name(f"{path.name}-{digest}.lock")))
            except OSError as error:
                raise self._database.unusable(f"no lock beside it: {error.strerror or error}") from None
            yield

    def close(self) -> None:
        """Finish what is waiting and close the file; blocks as long as that takes."""
        self._closed = True
        self._reads.finish()
        self._writes.finish()
        self._reader.close()
        self._writer.close()

    async def _do(self, background: Background, statement: Statement) -> Any:
        if self._closed:
            raise sqlite3.OperationalError("it was closed")
        return await background.do(statement)

    async def _do_journal(self, background: Background, statement: Statement) -> Any:
        try:
            return await self._do(background, statement)
        except (sqlite3.Error, RuntimeError) as error:
            what = "read" if background is self._reads else "written"
            raise self._database.unusable(f"the journal cannot be {what}: {error}") from None

    def _read(self, statements: Sequence[Statement]) -> list[Any]:
        """Return the row of each statement; on the thread of the reads."""
        with self._reader.lent(self._patience) as connection:
            connection.execute("BEGIN")
            rows = [_row(connection, statement) for statement in statements]
            connection.execute("COMMIT")
            return rows

    def _write(self, statements: Sequence[Statement]) -> list[None]:
        """Commit all statements together; on the thread of the writes."""
        deadline = time.monotonic() + self._write_patience
        while True:
            left = max(deadline - time.monotonic(), 0.0)
            try:
                with self._writer.lent(min(left, _SLICE)) as connection:
                    connection.execute("BEGIN IMMEDIATE")
                    for statement in statements:
                        connection.execute(*statement)
                    connection.execute("COMMIT")
            except sqlite3.OperationalError as error:
                if is_locked(error) and left > _SLICE:
                    continue
                if is_locked(error):
                    self._write_patience = min(self._patience, _LITTLE_PATIENCE)
                raise
            self._write_patience = self._patience
            return [None] * len(statements)

    def _warn(self, message: str, why: object) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warn(message, self._database.name, why, event="cache_failed")


def _put(table: str, key: bytes, value: bytes) -> Statement:
    created = time.time()
    return _PUT.format(table), (key, created, value, _checksum(key, created, value))


def _checksum(key: bytes, created: float, value: bytes) -> bytes:
    return blake2b(b"%s %s " % (key, created.hex().encode()) + value, digest_size=16).digest()


def _is_intact(key: bytes, row: Any) -> bool:
    """Return whether a row is as it was written."""
    created, value, checksum = row
    return (
        isinstance(created, float) and isinstance(value, bytes) and checksum == _checksum(key, created, value)
    )


def _row(connection: sqlite3.Connection, statement: Statement) -> Any:
    """Return a row, or the error where that part of the file is damaged."""
    try:
        return connection.execute(*statement).fetchone()
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError as error:
        return error
